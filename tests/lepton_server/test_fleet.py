"""The fleet's view: who is there, who could train, and what is kept for whom. Real store, own clock."""

import base64
import sys
import threading
import time
from pathlib import Path
from random import Random

import pytest

from lepton_fl import crypto
from lepton_fl.errors import DiskFull, LeptonError, NotFound, TrustError
from lepton_fl.rounds.cohort import Shortfall
from lepton_fl.wire.v1 import device_pb2 as pb
from lepton_server.config import CheckInSection
from lepton_server.fleet import (
    BUSY,
    IDLE,
    MAX_PENDING,
    NOT_ELIGIBLE,
    REPORT_GAP_S,
    Engaged,
    Fleet,
    Report,
    TaskState,
)
from lepton_server.store import Store, open_store

TASK, VERSION = "pkg.tasks:digits", "1"
READY = Report((TaskState(TASK, VERSION, "", True, ""),), "0.1", (("cpus", 2),))


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class FakeStream:
    """What the device service has for a waiting device, without a network."""

    def __init__(self):
        self.woken, self.closed = 0, []

    def wake(self):
        self.woken += 1

    def close(self, error):
        self.closed.append(error)


def register(store: Store, count: int, *, groups=(), start=0) -> list[str]:
    ids = []
    with store.transaction() as change:
        for i in range(start, start + count):
            key = crypto.new_key().public_key()
            device_id = crypto.device_id(key)
            body = {"token_id": f"t{i}", "secret_sha256": f"{i:064x}", "expires_at": time.time() + 3600}
            change.record("token.created", f"t{i}", body)
            change.record("token.used", f"t{i}", {"token_id": f"t{i}", "device_id": device_id})
            body = {
                "device_id": device_id,
                "name": f"device {i}",
                "public_key": base64.b64encode(crypto.public_der(key)).decode(),
                "cert_serial": f"{i:x}",
                "cert_not_after": time.time() + 86_400,
                "token_id": f"t{i}",
                "groups": list(groups),
            }
            change.record("device.enrolled", device_id, body)
            ids.append(device_id)
    return ids


@pytest.fixture
def store(tmp_path: Path):
    with open_store(tmp_path / "lepton.db") as opened:
        yield opened


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def fleet(store, clock):
    register(store, 3)
    made = Fleet(store, CheckInSection(interval_s=60, jitter=0.25, max_waiting=2), clock=clock, rng=Random(1))
    made.load()
    return made


@pytest.fixture
def ids(fleet, store):
    return [d.id for d in store.active_devices()]


def standing(fleet, device_id, groups=()):
    (found,) = [c for c in fleet.candidates(TASK, VERSION, groups) if c.device_id == device_id]
    return found.standing


def participate(run="r1", deadline_s=100.0, round=1):
    return pb.Instruction(
        participate=pb.Participate(run_id=run, round=round, attempt=1, deadline_s=deadline_s)
    )


def verdict(run="r1", round=1):
    return pb.Instruction(verdict=pb.Verdict(run_id=run, round=round, attempt=1, accepted=True))


# -- who could take part ------------------------------------------------------------------------------


def test_a_device_is_offline_until_it_calls_and_again_when_it_is_overdue(fleet, ids, clock):
    assert standing(fleet, ids[0]) == "offline"
    answer = fleet.check_in(ids[0], READY)
    assert standing(fleet, ids[0]) == "eligible"
    assert fleet.is_online(ids[0])
    clock.now += answer.next_s * 2.9
    assert standing(fleet, ids[0]) == "eligible"
    clock.now += answer.next_s * 0.2
    assert standing(fleet, ids[0]) == "offline"
    assert not fleet.is_online(ids[0])


@pytest.mark.parametrize(
    ("report", "status", "expected"),
    [
        (READY, IDLE, "eligible"),
        (READY, BUSY, "busy"),
        (READY, NOT_ELIGIBLE, "not-eligible"),
        (Report((), "0.1", ()), IDLE, "task-missing"),
        (Report((TaskState(TASK, "2", "", True, ""),), "0.1", ()), IDLE, "wrong-version"),
        (Report((TaskState(TASK, "1", "", False, "3 rows"),), "0.1", ()), IDLE, "data-contract"),
        (Report((TaskState(TASK, "0", "", True, ""), *READY.tasks), "0.1", ()), IDLE, "eligible"),
    ],
)
def test_standing_follows_the_report(fleet, ids, report, status, expected):
    fleet.check_in(ids[0], report, status, "on battery" if status == NOT_ELIGIBLE else "")
    assert standing(fleet, ids[0]) == expected


def test_groups(fleet, store):
    (home,) = register(store, 1, groups=("home", "north"), start=10)
    fleet.follow()
    fleet.check_in(home, READY)
    assert standing(fleet, home, ("home", "x")) == "eligible"
    assert standing(fleet, home, ("south",)) == "other-group"


def test_a_shortfall_is_explained(fleet, ids):
    fleet.check_in(ids[0], READY)
    fleet.check_in(ids[1], Report((TaskState(TASK, "1", "", False, "NaN"),), "", ()))
    text = str(Shortfall.of(fleet.candidates(TASK, VERSION), needed=2))
    assert text == "1 of 3 eligible (2 needed): 1 data contract, 1 offline"


def test_two_runs_cannot_claim_one_device(fleet, ids):
    fleet.check_in(ids[0], READY)
    assert fleet.mark_busy(ids[0], "r1")
    assert not fleet.mark_busy(ids[0], "r2")
    assert fleet.mark_busy(ids[1], "r2")
    assert standing(fleet, ids[0]) == "busy"
    fleet.mark_idle(ids[0], "r2")  # not its run
    assert standing(fleet, ids[0]) == "busy"
    fleet.check_in(ids[0], READY, BUSY)
    fleet.mark_idle(ids[0], "r1")
    assert standing(fleet, ids[0]) == "eligible"  # although its last word was "busy"


# -- the journal --------------------------------------------------------------------------------------


def test_what_another_process_writes_takes_effect(fleet, ids, store, tmp_path):
    told = []
    fleet.on_revoked(told.append)
    stream = FakeStream()
    fleet.open_stream(ids[0], stream)
    fleet.check_in(ids[1], READY)
    with open_store(tmp_path / "lepton.db") as other:
        (late,) = register(other, 1, start=50)
        other.record("device.revoked", ids[0], {"device_id": ids[0], "reason": "lost"})
        other.record("device.desired", ids[1], {"device_id": ids[1], "desired": {"a": 1}})
    fleet.follow()
    assert told == [ids[0]]
    assert isinstance(stream.closed[0], TrustError)
    assert standing(fleet, ids[0]) == "revoked"
    with pytest.raises(TrustError, match="revoked"):
        fleet.check_in(ids[0], READY)
    with pytest.raises(NotFound):
        fleet.instruct(ids[0], verdict())
    assert not fleet.mark_busy(ids[0], "r1")
    assert fleet.check_in(late, READY).desired == ""
    assert fleet.check_in(ids[1], READY).desired == '{"a":1}'
    assert fleet.counts().registered == 3


def test_desired_state_is_told_until_it_is_acknowledged(fleet, ids, store):
    import hashlib

    store.record("device.desired", ids[0], {"device_id": ids[0], "desired": {"b": [1], "a": "ü"}})
    fleet.follow()
    told = fleet.check_in(ids[0], READY).desired
    assert told == '{"a":"ü","b":[1]}'
    assert fleet.check_in(ids[0], READY, desired_digest="0" * 64).desired == told
    assert (
        fleet.check_in(ids[0], READY, desired_digest=hashlib.sha256(told.encode()).hexdigest()).desired == ""
    )
    store.record("device.desired", ids[0], {"device_id": ids[0], "desired": {}})
    fleet.follow()
    assert fleet.check_in(ids[0], READY).desired == ""


def test_unknown_device(fleet):
    with pytest.raises(TrustError, match="not enrolled"):
        fleet.check_in("d-aaaaaaaaaaaaaaaaaaaaaaaa", READY)


def test_more_events_than_a_page(fleet, store, monkeypatch):
    monkeypatch.setattr("lepton_server.fleet._PAGE", 2)
    fresh = register(store, 5, start=100)
    store.record("token.revoked", "t100", {"token_id": "t100"})
    fleet.follow()
    assert fleet.counts().registered == 8
    fleet.require(fresh[-1])


def test_idle_check_ins_do_not_grow_the_journal(fleet, ids, store, clock):
    for i in range(20):
        clock.now += 60
        fleet.check_in(ids[0], READY, (IDLE, NOT_ELIGIBLE, BUSY)[i % 3], f"{i}")
        fleet.flush()
    kinds = [e.kind for e in store.events() if e.kind == "device.reported"]
    assert len(kinds) == 1
    assert store.device(ids[0]).reported == READY.to_json()
    assert store.device(ids[0]).status == NOT_ELIGIBLE


def test_a_flapping_report_is_journalled_once_per_gap_and_the_last_one_wins(fleet, ids, store, clock):
    def reported():
        return [e.body["reported"]["client_version"] for e in store.events(kinds=("device.reported",))]

    for i in range(10):
        fleet.check_in(ids[0], Report((), f"v{i}", ()))
        fleet.flush()
    assert reported() == ["v0"]
    clock.now += REPORT_GAP_S
    fleet.flush()
    assert reported() == ["v0", "v9"]


def test_a_restart_does_not_journal_what_is_journalled(fleet, ids, store, clock):
    fleet.check_in(ids[0], READY)
    fleet.stop()
    head = store.head_seq()
    again = Fleet(store, clock=clock)
    again.load()
    again.check_in(ids[0], Report(READY.tasks, READY.client_version, READY.capabilities))
    again.flush(everything=True)
    assert store.head_seq() == head


def test_what_cannot_be_written_is_kept(fleet, ids, store, monkeypatch):
    fleet.check_in(ids[0], READY)
    with monkeypatch.context() as patch:
        patch.setattr(store, "note_presence", _full)
        with pytest.raises(DiskFull):
            fleet.flush()
        patch.undo()
        patch.setattr(store, "transaction", _full)
        with pytest.raises(DiskFull):
            fleet.flush()
    fleet.flush()
    assert store.device(ids[0]).status == IDLE
    assert store.device(ids[0]).reported == READY.to_json()


def _full(*_args):
    raise DiskFull("no space")


def test_background_threads_survive_errors_and_follow(fleet, ids, store, monkeypatch):
    quick = Fleet(store, CheckInSection(journal_poll_s=0.01, batch_window_s=0.01))
    quick.start()
    try:
        failed = threading.Event()
        real = store.head_seq

        def broken():
            failed.set()
            raise LeptonError("locked")

        monkeypatch.setattr(store, "head_seq", broken)
        assert failed.wait(60)
        monkeypatch.setattr(store, "head_seq", real)
        gone = threading.Event()
        quick.on_revoked(lambda _: gone.set())
        store.record("device.revoked", ids[0], {"device_id": ids[0]})
        assert gone.wait(60)
    finally:
        quick.stop()


# -- instructions -------------------------------------------------------------------------------------


def test_an_instruction_waits_for_the_check_in(fleet, ids, clock):
    assert fleet.instruct(ids[0], verdict()) is False
    assert fleet.check_in(ids[0], READY).instructions == (verdict(),)
    assert fleet.check_in(ids[0], READY).instructions == ()


def test_newest_wins_per_kind_and_run(fleet, ids):
    for instruction in (
        verdict(round=1),
        verdict("r2"),
        verdict(round=2),
        participate(),
        participate(round=3),
    ):
        fleet.instruct(ids[0], instruction)  # the offer is of a later round than the verdict
    told = fleet.check_in(ids[0], READY).instructions
    assert [(i.WhichOneof("kind"), getattr(i, i.WhichOneof("kind")).round) for i in told] == [
        ("verdict", 1),
        ("verdict", 2),
        ("participate", 3),
    ]


def test_leave_withdraws_the_offer(fleet, ids):
    fleet.instruct(ids[0], participate())
    leave = pb.Instruction(leave=pb.Leave(run_id="r1", round=1, attempt=1))
    fleet.instruct(ids[0], leave)
    assert fleet.check_in(ids[0], READY).instructions == (leave,)


def test_a_verdict_ends_its_offer_and_not_the_next(fleet, ids):
    fleet.instruct(ids[0], participate(round=1))
    fleet.instruct(ids[0], verdict(round=1))
    assert fleet.check_in(ids[0], READY).instructions == (verdict(round=1),)
    fleet.instruct(ids[0], participate(round=2))
    fleet.instruct(ids[0], verdict(round=1))  # a late reply to the earlier round
    assert [i.WhichOneof("kind") for i in fleet.check_in(ids[0], READY).instructions] == [
        "participate",
        "verdict",
    ]


def test_kept_instructions_are_bounded_and_expire(fleet, ids, clock):
    for i in range(100):
        fleet.instruct(ids[0], verdict(f"r{i}"))
    assert len(fleet.check_in(ids[0], READY).instructions) == MAX_PENDING
    fleet.instruct(ids[1], participate(deadline_s=50))
    clock.now += 50
    assert fleet.check_in(ids[1], READY).instructions == ()


def test_an_offer_is_repeated_with_the_time_left_while_it_is_not_worked_on(fleet, ids, clock):
    fleet.instruct(ids[0], participate(deadline_s=100))
    clock.now += 30
    (told,) = fleet.check_in(ids[0], READY).instructions
    assert told.participate.deadline_s == pytest.approx(70)
    (told,) = fleet.check_in(ids[0], READY).instructions
    assert fleet.check_in(ids[0], READY, BUSY).instructions == ()
    assert len(fleet.check_in(ids[0], READY).instructions) == 1  # its process was killed meanwhile
    fleet.instruct(ids[0], verdict())
    assert fleet.check_in(ids[0], READY).instructions == (verdict(),)
    assert fleet.check_in(ids[0], READY).instructions == ()


def test_mark_idle_withdraws_the_offer(fleet, ids):
    fleet.mark_busy(ids[0], "r1")
    fleet.instruct(ids[0], participate())
    fleet.mark_idle(ids[0], "r1")
    assert fleet.check_in(ids[0], READY).instructions == ()


def test_a_waiting_device_is_told_at_once_and_once(fleet, ids):
    stream = FakeStream()
    assert fleet.open_stream(ids[0], stream)
    assert fleet.instruct(ids[0], participate()) is True
    assert stream.woken == 1
    assert len(fleet.take(ids[0], stream)) == 1
    assert fleet.take(ids[0], stream) == ()
    assert len(fleet.check_in(ids[0], READY).instructions) == 1  # it is idle still: offered again


def test_a_newer_stream_replaces_the_older(fleet, ids):
    old, new = FakeStream(), FakeStream()
    fleet.open_stream(ids[0], old)
    fleet.open_stream(ids[0], new)
    assert old.closed == [None]
    fleet.close_stream(ids[0], old)
    fleet.instruct(ids[0], verdict())
    assert fleet.take(ids[0], old) == ()
    assert fleet.take(ids[0], new) == (verdict(),)
    assert fleet.counts().waiting == 1
    fleet.close_stream(ids[0], new)
    assert fleet.counts().waiting == 0


def test_undelivered_instructions_come_back(fleet, ids):
    stream = FakeStream()
    fleet.open_stream(ids[0], stream)
    fleet.instruct(ids[0], verdict())
    left = fleet.take(ids[0], stream)
    fleet.close_stream(ids[0], stream, undelivered=left)
    assert fleet.check_in(ids[0], READY).instructions == (verdict(),)


def test_a_fleet_that_fits_waits_always(fleet, ids, store):
    assert not fleet.check_in(ids[0], READY).wait  # three devices, room for two
    store.record("device.revoked", ids[2], {"device_id": ids[2]})
    fleet.follow()
    assert fleet.check_in(ids[0], READY).wait


def test_waiting_is_asked_for_while_a_run_is_active_and_there_is_room(fleet, ids):
    assert not fleet.check_in(ids[0], READY).wait
    fleet.set_run_active(True)
    assert fleet.check_in(ids[0], READY).wait
    assert fleet.open_stream(ids[0], FakeStream())
    assert fleet.open_stream(ids[1], FakeStream())
    assert not fleet.check_in(ids[2], READY).wait
    assert not fleet.open_stream(ids[2], FakeStream())
    assert fleet.check_in(ids[1], READY).wait  # its stream may be dead without our knowing


def test_a_waiting_device_is_online_however_long_it_waits(fleet, ids, clock):
    stream = FakeStream()
    fleet.open_stream(ids[0], stream)
    fleet.check_in(ids[0], READY)
    clock.now += 1e6
    assert fleet.is_online(ids[0])
    fleet.close_stream(ids[0], stream)
    assert fleet.is_online(ids[0])
    clock.now += 1e3
    assert not fleet.is_online(ids[0])


# -- intervals, changes, size -------------------------------------------------------------------------


def test_the_interval_is_jittered_and_grows_with_the_fleet(fleet, ids):
    waits = [fleet.check_in(ids[0], READY).next_s for _ in range(200)]
    assert 45 <= min(waits) < 50 < 70 < max(waits) <= 75
    fleet._registered = 50_000
    assert 75 <= fleet.check_in(ids[0], READY).next_s <= 125  # 50,000 / (500 / s) = 100 s


def test_changes_are_seen_and_idle_check_ins_are_none(fleet, ids):
    seen = fleet.generation
    fleet.check_in(ids[0], READY)
    now = fleet.wait_for_change(seen, 5)
    assert now != seen
    fleet.check_in(ids[0], READY)
    assert fleet.generation == now
    assert fleet.wait_for_change(now, 0.01) == now


def test_a_certificate_is_renewed_once_per_gap(fleet, ids, clock):
    assert fleet.may_renew(ids[0], 60) == 0
    clock.now += 15
    assert fleet.may_renew(ids[0], 60) == pytest.approx(45)
    clock.now += 45
    assert fleet.may_renew(ids[0], 60) == 0


def test_a_wrong_clock_is_noticed_once(fleet, ids, caplog):
    for _ in range(3):
        fleet.check_in(ids[0], READY, device_time=time.time() - 4000)
    assert caplog.text.count("the clock of device") == 1
    fleet.check_in(ids[0], READY, device_time=time.time())
    fleet.check_in(ids[0], READY, device_time=time.time() + 4000)
    assert caplog.text.count("the clock of device") == 2


def test_a_device_costs_less_than_a_kilobyte(fleet, ids):
    fleet.check_in(ids[0], READY)
    device = fleet._devices[ids[0]]
    own = [device, device.device_id, device.due, device.journalled_at, device.clock_offset, device.renewed_at]
    assert sum(map(sys.getsizeof, own)) + 200 < 1000  # 200: its places in dictionaries


# -- attempts that devices take part in ---------------------------------------------------------------


def engaged(nonce="aa", run="r1", failure=""):
    return Engaged(run, 3, nonce, failure)


def left(answer):
    return [i.leave.nonce for i in answer.instructions if i.HasField("leave")]


def test_a_device_is_told_to_leave_what_is_not_open(fleet, ids):
    """A Leave that was lost with its connection, another attempt of the run, a run that nobody knows."""
    fleet.open_attempt("r1", "aa")
    told = [engaged(), engaged("bb"), engaged("aa", run="r2")]
    answer = fleet.check_in(ids[0], READY, BUSY, engaged=told)
    assert [(i.leave.run_id, i.leave.nonce) for i in answer.instructions] == [("r1", "bb"), ("r2", "aa")]
    fleet.open_attempt("r1", "bb")
    assert left(fleet.check_in(ids[0], READY, BUSY, engaged=told[:2])) == ["aa"]
    fleet.close_attempt("r1", "aa")  # the one before: late
    assert left(fleet.check_in(ids[0], READY, BUSY, engaged=told[:2])) == ["aa"]
    fleet.close_attempt("r1")
    for _ in range(2):  # until it has heard it
        assert left(fleet.check_in(ids[0], READY, BUSY, engaged=told[:2])) == ["aa", "bb"]


def test_what_a_device_has_given_up_is_known_while_its_attempt_is_open(fleet, ids):
    fleet.open_attempt("r1", "aa")
    fleet.check_in(ids[0], READY, engaged=[engaged(failure="It failed."), engaged("bb", failure="x")])
    assert fleet.gave_up(ids[0], "aa") == "It failed."
    assert fleet.gave_up(ids[1], "aa") == fleet.gave_up(ids[0], "bb") == ""
    fleet.close_attempt("r1", "aa")
    assert fleet.gave_up(ids[0], "aa") == ""
    assert fleet._given_up == {}


def test_an_attempt_that_a_coordinator_before_has_begun_is_open_until_its_run_goes_on(fleet, ids, store):
    attempt = {"run_id": "r1", "round": 1, "attempt": 1}
    store.record("run.queued", {"run_id": "r1", "name": "first", "spec": {"rounds": 3}})
    store.record("run.started", {"run_id": "r1"})
    store.record("model.created", {"run_id": "r1", "round": 0, "model_sha256": "ab" * 32, "metrics": {}})
    store.record("round.planned", attempt | {"plan": {"nonce": "aa"}, "model_sha256": "ab" * 32})
    fleet.load()
    assert left(fleet.check_in(ids[0], READY, BUSY, engaged=[engaged()])) == []
    store.record("round.abandoned", attempt | {"cause": "", "participation": []})
    fleet.load()
    assert left(fleet.check_in(ids[0], READY, BUSY, engaged=[engaged()])) == ["aa"]
