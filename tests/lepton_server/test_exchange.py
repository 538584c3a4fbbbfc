"""Rounds over the real fleet view and the real transport's book; the devices' silence and loss."""

import threading
import time

import numpy as np
import pytest

from lepton_client.flower import HEARTBEAT_S
from lepton_fl.errors import Rejection, StateLocked
from lepton_fl.plan import RunSpec
from lepton_fl.rounds.campaign import RunState, Work, plan_round
from lepton_fl.tasks.metrics import TrainingLoss
from lepton_fl.wire.messages import Request
from lepton_server import exchange as module
from lepton_server.exchange import FleetExchange
from lepton_server.fleet import Engaged, Report
from lepton_server.patience import Interrupted

SIZE = 4


@pytest.fixture
def asking(works, monkeypatch):
    """``asking(deadline_s, ...)``: an exchange, its plan and request for the whole fleet."""
    monkeypatch.setattr(module, "WAKE_S", 0.02)

    def make(deadline_s=30.0, **options):
        spec = RunSpec(task="pkg:task", cohort={"size": 3, "deadline_s": deadline_s})
        work = Work("pkg:task", "1", "ab" * 32, SIZE, TrainingLoss())
        state = RunState(np.zeros(SIZE, np.float32))
        plan = plan_round(spec, "r1", work, "train", 1, state, works.ids, 3, "ab" * 16)
        keys = options.pop("keys", lambda device_id: works.store.device(device_id).public_key)
        options = {"stay_s": 1.0, "closing": lambda: False} | options
        return FleetExchange(works.link, works.fleet, keys, **options), plan, Request.of(plan, state.model)

    return make


def outcomes(works, exchange, plan, request):
    found = {a.device_id: a.records for a in exchange.ask(plan, request)}
    assert works.fleet.counts().busy == 0
    assert not works.link._posts
    return {device: answer.reason for device, answer in found.items()}


class Waiting:
    def wake(self):
        pass

    def close(self, error):
        pass


def test_nobody_waits_for_the_vanished_until_the_deadline(works, asking, monkeypatch):
    monkeypatch.setattr(module, "GONE_S", 0.1)
    for device_id in works.ids:
        stream = Waiting()
        assert works.fleet.open_stream(device_id, stream)
    exchange, plan, request = asking()
    answers = exchange.ask(plan, request)
    threading.Timer(0.2, lambda: works.fleet.close_stream(works.ids[2], stream)).start()
    answer = next(answers)
    assert (answer.device_id, answer.records.reason) == (works.ids[2], Rejection.OFFLINE)
    assert "not been heard of" in str(answer.records)
    answers.close()
    assert works.fleet.counts().busy == 0


def test_a_heartbeat_now_and_then_is_a_sign_of_life(works, asking):
    exchange, plan, _ = asking(deadline_s=1.0)
    nodes = {d: works.link.admit(works.store.device(d).public_key) for d in works.ids}
    # They were told by stream, lost it long ago, and work.
    attempt = module._Attempt(plan, 0.0, devices={f"m-{d}": d for d in works.ids}, nodes=nodes)
    attempt.streamed = set(works.ids)
    attempt.missing_since = dict.fromkeys(works.ids, time.monotonic() - 600.0)
    box = works.link.mailbox()
    works.link._seen = dict.fromkeys(nodes.values(), time.monotonic() - HEARTBEAT_S - 5.0)
    assert list(exchange._vanished(attempt, box)) == []
    works.link._seen = dict.fromkeys(nodes.values(), time.monotonic() - 2 * HEARTBEAT_S - 5.0)
    assert {answer.device_id for answer in exchange._vanished(attempt, box)} == set(works.ids)
    box.close()


def test_the_deadline_ends_an_attempt_and_a_stop_brings_it_near(works, asking, monkeypatch):
    exchange, plan, request = asking(deadline_s=0.2)
    outcomes(works, exchange, plan, request)
    monkeypatch.setattr(module, "STOP_S", 0.1)
    exchange, plan, request = asking(deadline_s=600.0, stopping=lambda: True)
    assert outcomes(works, exchange, plan, request) == {}


def test_who_is_silent_in_a_stage_is_named_with_a_cause(works, asking):
    """Of a secure round, as of a plain one."""
    exchange, plan, request = asking()
    stages = exchange.stages(plan, 60.0)
    messages = dict.fromkeys(plan.cohort, request.to_records())
    answers = {a.device_id: a.records for a in stages.ask(messages, 0.2) if a is not None}
    assert set(answers) == set(works.ids)
    assert all(a.reason is Rejection.OFFLINE and a.cause is not None for a in answers.values())
    assert "within 0.2 s" in str(answers[works.ids[0]])
    answers = [a for a in stages.ask(messages, 0.0) if a is not None]  # who was silent is asked again
    assert {a.device_id for a in answers} == set(works.ids)
    stages.close()
    assert works.fleet.counts().busy == 0


def test_a_shutdown_interrupts_and_leaves_nothing_claimed(works, asking):
    closing = threading.Event()
    exchange, plan, request = asking(deadline_s=600.0, closing=closing.is_set)
    threading.Timer(0.1, closing.set).start()
    with pytest.raises(Interrupted):
        list(exchange.ask(plan, request))
    assert works.fleet.counts().busy == 0
    assert not works.link._posts


def test_a_device_of_another_run_is_not_asked_and_not_released(works, asking):
    assert works.fleet.claim(works.ids[:1], "r2")
    exchange, plan, request = asking(deadline_s=0.1)
    answers = exchange.ask(plan, request)
    answer = next(answers)
    assert (answer.device_id, answer.records.reason) == (works.ids[0], Rejection.OFFLINE)
    answers.close()
    assert works.fleet.counts().busy == 1


def test_a_device_revoked_between_its_key_and_its_admission_stays_out(works, asking):
    def revoke_meanwhile(device_id):
        key = works.store.device(device_id).public_key
        if device_id == works.ids[1]:
            works.store.record("device.revoked", {"device_id": device_id, "reason": ""})
            works.fleet.follow()  # its callback comes too early to shut anybody out
        return key

    exchange, plan, request = asking(keys=revoke_meanwhile)
    answers = exchange.ask(plan, request)
    answer = next(answers)
    assert (answer.device_id, answer.records.reason) == (works.ids[1], Rejection.REVOKED)
    answers.close()
    assert len(works.link._keys) == 1  # only who was asked before it


def test_a_database_that_is_held_does_not_make_a_device_a_revoked_one(works, asking):
    def held(device_id):
        raise StateLocked("lepton.db is locked.")

    exchange, plan, request = asking(keys=held)
    assert set(outcomes(works, exchange, plan, request).values()) == {Rejection.OFFLINE}


@pytest.mark.parametrize("secure", [False, True])
def test_who_says_that_it_has_failed_is_not_waited_for_and_whoever_stays_busy_is_told_to_leave(
    works, asking, secure
):
    exchange, plan, request = asking()
    stages = exchange.stages(plan, 60.0) if secure else None
    messages = dict.fromkeys(plan.cohort, request.to_records())
    answers = stages.ask(messages, 30.0) if stages else exchange.ask(plan, request)
    here = Engaged("r1", 1, plan.nonce)
    report, broken = Report((), "", ()), here._replace(failure="The device failed with MemoryError.")

    def checks_in(device_id, told):
        found = works.fleet.check_in(device_id, report, engaged=[told]).instructions
        return {i.leave.nonce for i in found if i.HasField("leave")}

    for _ in range(1 if secure else 0):
        assert next(answers) is None  # all are asked
    threading.Timer(0.05, checks_in, (works.ids[1], broken)).start()
    answer = next(a for a in answers if a is not None)
    assert (answer.device_id, answer.records.reason) == (works.ids[1], Rejection.FAILED)
    assert "MemoryError" in str(answer.records)
    assert checks_in(works.ids[0], here) == set()
    answers.close()
    if stages:
        assert checks_in(works.ids[0], here) == set()  # one stage is over, not the attempt
        stages.close()
    for _ in range(2):  # as long as it says that it takes part
        assert checks_in(works.ids[0], here) == {plan.nonce}


def test_at_a_shutdown_devices_keep_what_they_work_on(works, asking):
    exchange, plan, _ = asking(closing=lambda: True)
    stages = exchange.stages(plan, 60.0)
    stages.close()
    told = works.fleet.check_in(works.ids[0], Report((), "", ()), engaged=[Engaged("r1", 1, plan.nonce)])
    assert not told.instructions
