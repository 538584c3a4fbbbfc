"""Who fails again and again rests and comes back; and no run ends without saying who was in it."""

import time

import pytest

from lepton_fl.errors import Cause, Rejection, StateConflict, UpdateRejected
from lepton_server.config import WatchdogSection
from lepton_server.fleet import Fleet
from lepton_server.ops import Meters
from lepton_server.quarantine import Quarantine
from lepton_server.reach import history_of


def failing(works, bad, reason=Rejection.OFFLINE, cause=Cause.GONE):
    """A script in which one device fails and the others are honest."""
    honest = works.exchange.script

    def script(device_id, plan, request):
        if device_id == bad and plan.kind == "train":
            return UpdateRejected(reason, "It is broken.", cause=cause)
        return honest(device_id, plan, request)

    return script


@pytest.fixture
def resting(works):
    """``resting(...)``: four devices, a driver whose quarantine has these settings."""
    works.register(1)
    works.check_in(*works.ids)

    def make(**changes):
        settings = WatchdogSection(**{"quarantine_after": 2} | changes)
        made = Quarantine(settings, works.store, works.fleet, Meters())
        works.driver(quarantine=made).start()
        return made

    return make


def standings(works):
    found = works.fleet.candidates("lepton_fl.tasks.images:digits", "1")
    return {c.device_id: c.standing for c in found}


def run(works, run_id="r1", rounds=4, **changes):
    cohort = {"size": 4, "min_reports": 2} | changes
    works.queue(run_id, rounds=rounds, evaluate_every=0, cohort=cohort)
    return works.finished(run_id)


def test_a_device_that_fails_again_and_again_rests_and_the_run_goes_on(works, resting):
    bad = works.ids[0]
    works.exchange.script = failing(works, bad)
    resting()
    ended = run(works)
    assert ended.state == "completed"
    (event,) = works.store.events(kinds=["device.quarantined"])
    assert (event.subject, event.body["cause"], event.body["faults"]) == (bad, "gone", 2)
    asked = [bad in plan.cohort for plan in works.exchange.asked]
    assert asked == [True, True, False, False]
    assert standings(works)[bad] == "quarantined"
    assert works.store.device(bad).quarantine_cause == "gone"
    works.unharmed()
    again = Fleet(works.store)  # as after a restart
    again.load()
    assert again.quarantined() == [bad]


def test_the_way_back_by_time_and_by_an_operator(works, resting):
    bad = works.ids[0]
    works.exchange.script = failing(works, bad)
    made = resting()
    run(works)
    body = {"device_id": bad, "reason": "mended"}
    works.store.record("device.readmitted", body)
    works.fleet.follow()
    assert works.fleet.quarantined() == []
    with pytest.raises(StateConflict, match="not in quarantine"):
        works.store.record("device.readmitted", body)
    works.store.record(
        "device.quarantined", {"device_id": bad, "cause": "x", "faults": 0, "until": time.time() - 1}
    )
    works.fleet.follow()
    made.sweep()
    assert [e.body["reason"] for e in works.store.events(kinds=["device.readmitted"])][-1] == (
        "its time is over"
    )
    assert standings(works)[bad] != "quarantined"
    works.unharmed()


@pytest.mark.parametrize(
    ("reason", "cause", "rests"),
    [
        (Rejection.OUT_OF_MEMORY, None, True),
        (Rejection.NON_FINITE, None, True),  # its answers are bad
        (Rejection.OFFLINE, Cause.SLOW, False),  # who is slow is not left out
        (Rejection.OFFLINE, Cause.SLOW_LINK, False),
        (Rejection.OFFLINE, Cause.EVICTED, False),  # that was us
        (Rejection.BUDGET, None, True),
    ],
)
def test_only_own_faults_count(works, resting, reason, cause, rests):
    works.exchange.script = failing(works, works.ids[0], reason, cause)
    resting()
    run(works)
    assert bool(works.store.events(kinds=["device.quarantined"])) == rests


def test_so_many_may_not_rest_that_a_round_could_not_be_had(works, resting):
    works.exchange.script = failing(works, works.ids[0])
    resting()
    run(works, min_reports=3, quorum_wait_s=60.0)
    assert len(works.store.events(kinds=["device.quarantined"])) == 1  # three of four are left
    works.exchange.script = failing(works, works.ids[1])
    run(works, "r2", rounds=3, size=3, min_reports=2)
    assert len(works.store.events(kinds=["device.quarantined"])) == 1  # two of four would be half the fleet


def test_it_can_be_switched_off(works, resting):
    works.exchange.script = failing(works, works.ids[0])
    resting(quarantine_after=0)
    run(works)
    assert works.store.events(kinds=["device.quarantined"]) == []


# --- who was in it ------------------------------------------------------------------------------------


def test_no_run_ends_without_saying_whom_it_left_out(works, resting):
    bad = works.ids[0]
    works.exchange.script = failing(works, bad)
    resting(quarantine_after=0)
    ended = run(works, coverage_floor=0.9)
    assert ended.coverage["fleet"] == [3, 4]
    assert ended.coverage["named"] == {bad: "gone"}
    assert ended.flags[0] == "coverage of fleet: 3 of 4, below the floor of 0.9"
    finished = works.store.events(kinds=["run.finished"])[-1]
    assert finished.body["coverage"] == ended.coverage
    parts = [p for p in works.store.participation("r1", 1) if p.device_id == bad]
    assert [(p.outcome, p.reason, p.cause, p.detail) for p in parts] == [
        ("dropped", "offline", "gone", "It is broken.")
    ]
    history = history_of(works.store, "r1")
    assert (history.asked[bad], history.answered[bad]) == (4, 0)
    works.unharmed()


def test_a_run_that_fails_says_it_too(works, resting):
    works.check_in(*works.ids, version="2")
    resting()
    ended = run(works, quorum_wait_s=0.2)
    assert ended.state == "failed"
    assert ended.coverage["fleet"] == [0, 4]
    assert ended.coverage["left_out"] == {"not-asked": 4}


def test_weights_follow_who_answered_and_the_sum_stays_exact(works, resting):
    """A device that answers every second time counts more in later plans; a restart computes the same."""
    rare = works.ids[0]
    honest = works.exchange.script

    def script(device_id, plan, request):
        if device_id == rare and plan.round % 2:
            return UpdateRejected(Rejection.OFFLINE, "slow", cause=Cause.SLOW)
        return honest(device_id, plan, request)

    works.exchange.script = script
    resting()
    run(works, rounds=6, correction="inverse-probability")
    factors = [dict(zip(p.cohort, p.corrections, strict=True)) for p in works.exchange.asked]
    assert set(factors[0].values()) == {16}  # nothing is known yet
    assert factors[-1][rare] > 20
    assert all(f[d] < factors[-1][rare] for f in factors for d in works.ids[1:])
    stored = [r.plan["corrections"] for r in works.store.rounds("r1")]
    assert stored == [list(p.corrections) for p in works.exchange.asked]
