"""The coordinator carries rollouts on: in the journal, act by act, whoever speaks meanwhile."""

import pytest

from lepton_fl.delivery.rollout import Health, RolloutPlan, Service, Stage
from lepton_fl.delivery.trial import Question, Trial
from lepton_fl.errors import ConfigError, StateConflict
from lepton_server import rollouts
from lepton_server.cli_rollout import _status
from lepton_server.fleet import Failed, Report, Serving, Tried
from lepton_server.ops import Meters
from lepton_server.releases import assign, assigned_release
from lepton_server.rollouts import RolloutKeeper, View, check_free, check_trial, find, move, view
from lepton_server.watchdog import Watchdog

OLD, NEW = "a" * 64, "b" * 64
HEALTH = Health(window_s=0, min_devices=1, min_share=1.0, settle_s=0, min_requests=10)
TRIAL = Trial(epsilon=6.0, min_answers=3)
STAGES = (Stage(share=0.001), Stage(share=1.0))


class Fleet:
    """Three devices that check in when they are asked to."""

    def __init__(self, works):
        self.store, self.fleet, self.ids = works.store, works.fleet, list(works.ids)
        self.keeper = RolloutKeeper(self.store, self.fleet.heard)
        assign(self.store, self.ids, OLD)
        for device in self.ids:
            self.says(device, OLD)
        self.fleet.flush(everything=True)

    def says(self, device, release, failed=(), service=None, word="", fault="self-test"):
        given_up = tuple(Failed(f, fault, "", True) for f in failed)
        told = Serving("digits", "phone", release, given_up, trials=True)
        counted, report = service or Service(), Report((), "0.1", (), told)
        tried = Tried(release, TRIAL.question.digest(), word) if word else Tried()
        return self.fleet.check_in(device, report, serves=release, service=counted, tried=tried)

    def plan(self, name="r1", **fields):
        fields = {"stages": STAGES, "health": HEALTH} | fields
        plan = RolloutPlan(id=name, task="digits", releases={"phone": NEW}, **fields)
        self.store.record("rollout.planned", {"rollout_id": name, "task": "digits", "plan": plan.to_json()})
        move(self.store, name, "running")

    @property
    def wanted(self):
        return {d.id: assigned_release(d.desired) for d in self.store.devices()}

    @property
    def told(self):
        return [device for device, release in self.wanted.items() if release == NEW]

    @property
    def phase(self):
        return self.store.rollouts()[-1].phase


@pytest.fixture
def fleet(works):
    return Fleet(works)


def test_a_good_release_reaches_all(fleet):
    fleet.plan()
    fleet.keeper.look()
    (canary,) = fleet.told
    fleet.keeper.look()
    assert fleet.told == [canary]  # it does not serve it yet
    fleet.says(canary, NEW)
    fleet.keeper.look()
    assert len(fleet.told) == 3
    for device in fleet.told:
        fleet.says(device, NEW)
    fleet.keeper.look()
    assert fleet.phase == "done"
    assert fleet.store.told_in() == {}
    assert fleet.store.rebuild().equal


def test_a_bad_release_stays_with_the_canary(fleet):
    fleet.plan()
    fleet.keeper.look()
    (canary,) = fleet.told
    fleet.says(canary, OLD, failed=[NEW])
    fleet.keeper.look()
    assert fleet.phase == "rolled-back"
    assert set(fleet.wanted.values()) == {OLD}
    assert "self-test" in fleet.store.rollout("r1").cause


def test_another_coordinator_goes_on_after_any_act(fleet):
    fleet.plan()
    seen = []
    while fleet.phase == "running":
        RolloutKeeper(fleet.store, fleet.fleet.heard)._step("r1")  # each knows only the journal
        seen.append(len(fleet.told))
        for device in fleet.told:
            fleet.says(device, NEW)
    assert fleet.phase == "done"
    assert seen == sorted(seen)


def test_errors_of_predictions_take_it_back(fleet):
    fleet.plan()
    fleet.keeper.look()
    (canary,) = fleet.told
    fleet.says(canary, NEW, service=Service(requests=100, errors=50))
    fleet.keeper.look()
    assert fleet.phase == "rolled-back"
    assert "50 of 100" in fleet.store.rollout("r1").cause
    assert set(fleet.wanted.values()) == {OLD}


SLOW = (Service(100, 0, 9.0), Service(200, 0, 9.0))
BAD = {
    "it does not pass its self-test": [{"failed": [NEW]}],
    "it ends the self-test": [{"failed": [NEW], "fault": "crashed"}],
    "it ends the serving process": [{}, {"failed": [NEW], "fault": "crashed"}],
    "every prediction fails": [{"service": Service(3, 3)}],
    "many predictions fail": [{"service": Service(50, 6)}],
    "some predictions fail": [{"service": Service(100, 2)}, {"service": Service(200, 4)}],
    "predictions are slow": [{"service": service} for service in SLOW],
    "it is worse on own rows": [{"word": "worse"}],
    "it decides otherwise than the one before": [{"word": "drifts"}],
}


@pytest.mark.parametrize("says", BAD.values(), ids=BAD)
def test_a_bad_release_is_taken_back_within_two_check_ins(fleet, works, says):
    """Of each canary, whatever is wrong; no clock moves, so nothing but check-ins decides."""
    canaries = list(works.register(3, groups=("canary",)))
    assign(fleet.store, canaries, OLD)
    for device in canaries:
        fleet.says(device, OLD, service=Service(1000, 0, 3.0))
    fleet.fleet.flush(everything=True)
    health = Health(window_s=3600, settle_s=3600, trial=TRIAL if "word" in says[0] else None)
    fleet.plan(stages=(Stage(groups=("canary",)), Stage(share=1.0)), health=health)
    fleet.keeper.look()
    assert sorted(fleet.told) == sorted(canaries)
    assert len(says) <= 2
    for said in says:
        for device in canaries:
            fleet.says(device, OLD if "failed" in said else NEW, **said)
            fleet.keeper.look()
    assert fleet.phase == "rolled-back"
    assert set(fleet.wanted.values()) == {OLD}
    fleet.fleet.follow()
    for device in canaries:  # the next answer says so; a device that waits hears of it at once
        assert OLD in fleet.says(device, OLD if "failed" in says[-1] else NEW).desired
    assert fleet.store.rebuild().equal


def test_counters_of_another_release_say_nothing(fleet):
    fleet.plan()
    fleet.keeper.look()
    (canary,) = fleet.told
    told = Serving("digits", "phone", NEW, ())
    report = Report((), "0.1", (), told)
    fleet.fleet.check_in(canary, report, serves=OLD, service=Service(requests=100, errors=100))
    fleet.keeper.look()
    assert fleet.phase == "running"


def test_a_revoked_device_holds_nothing_up(fleet):
    fleet.plan()
    fleet.keeper.look()
    (canary,) = fleet.told
    fleet.says(canary, NEW)
    fleet.keeper.look()
    gone = next(device for device in fleet.ids if device != canary)
    fleet.store.record("device.revoked", {"device_id": gone})
    for device in fleet.ids:
        if device != gone:
            fleet.says(device, NEW)
    fleet.keeper.look()
    assert fleet.phase == "done"


def test_an_abort_takes_it_back_also_with_a_revoked_device(fleet):
    fleet.plan()
    fleet.keeper.look()
    (canary,) = fleet.told
    fleet.store.record("device.revoked", {"device_id": canary})
    move(fleet.store, "r1", "rolling-back", "enough", aborting=True)
    fleet.keeper.look()
    assert fleet.phase == "aborted"
    assert fleet.store.rollout("r1").cause == "enough"


def test_a_pause_stands_still(fleet):
    fleet.plan()
    move(fleet.store, "r1", "paused")
    fleet.keeper.look()
    assert fleet.told == []
    move(fleet.store, "r1", "running")
    fleet.keeper.look()
    assert len(fleet.told) == 1


def test_a_device_of_a_rollout_is_not_assigned_by_hand(fleet):
    fleet.plan()
    fleet.keeper.look()
    (canary,) = fleet.told
    with pytest.raises(StateConflict, match="rollout r1"):
        check_free(fleet.store, {canary})
    check_free(fleet.store, set(fleet.ids) - {canary})
    assert find(fleet.store, "").id == "r1"


def test_a_second_rollout_for_the_same_devices_waits(fleet):
    fleet.plan()
    with pytest.raises(StateConflict, match="r1 of digits is running for phone"):
        fleet.plan("r2")


def counts(lines):
    return [tuple(line.values()) for line in lines]


def test_the_journal_and_the_keeper_count_each_device_once(fleet):
    """The journal is behind: what devices say is written once a minute."""
    fleet.plan()
    fleet.keeper.look()
    row, (canary,) = fleet.store.rollout("r1"), fleet.told
    alone = [("0.1 %", 1, 1, 0, 0), ("100 %", 2, 0, 0, 0)]
    assert counts(view(fleet.store, row, 0.0).stages) == alone
    found = View(**fleet.keeper.views()["r1"])
    assert (found.act, counts(found.stages)) == ("wait", alone)
    assert "0 of 1 devices serve it" in found.cause
    fleet.says(canary, NEW)
    fleet.keeper.look()
    found = View(**fleet.keeper.views()["r1"])
    assert counts(found.stages) == [("0.1 %", 1, 1, 1, 0), ("100 %", 2, 2, 0, 0)]
    late = view(fleet.store, row, 0.0)
    assert counts(late.stages) == [("0.1 %", 1, 1, 0, 0), ("100 %", 2, 2, 0, 0)]
    assert late.at == 0
    for device in fleet.told:
        fleet.says(device, NEW)
    fleet.keeper.look()
    fleet.keeper.look()
    assert (fleet.phase, fleet.keeper.views()) == ("done", {})


def test_what_the_keeper_sees_is_as_of_its_last_look(fleet):
    now = [1000.0]
    fleet.keeper = RolloutKeeper(fleet.store, fleet.fleet.heard, lambda: now[0], said=fleet.fleet.said)
    fleet.plan()
    for _ in range(3):
        fleet.keeper.look()
        assert fleet.keeper.views()["r1"]["at"] == now[0]
        now[0] += 2


def test_status_says_as_of_when_it_is_known(fleet, tmp_path, monkeypatch):
    monkeypatch.setattr("lepton_server.watchdog.STALE_S", float("inf"))  # this machine may be busy
    fleet.plan()
    fleet.keeper.look()
    row = fleet.store.rollout("r1")
    found, _ = _status(tmp_path, fleet.store, row)
    assert found["as of"].startswith("the journal: ")
    watch = Watchdog(fleet.fleet, Meters(), tmp_path, rollouts=fleet.keeper.views)
    watch._board.open()
    watch.look()
    fleet.says(fleet.told[0], OLD, service=Service(1, 0))  # the journal knows nothing of it
    found, stages = _status(tmp_path, fleet.store, row)
    assert found["as of"].endswith(" s ago")
    assert (found["waiting"], counts(stages)[0]) == ("0 of 1 devices serve it, 1 must", ("0.1 %", 1, 1, 0, 0))
    watch._board.close()
    move(fleet.store, "r1", "paused")
    assert _status(tmp_path, fleet.store, fleet.store.rollout("r1"))[0]["as of"].startswith("the journal: ")


# --- trials on devices' own rows ----------------------------------------------------------------------


def tried(fleet, health=HEALTH):
    """A rollout to all three devices at once that asks them."""
    fleet.plan(stages=(Stage(share=1.0),), health=health.model_copy(update={"trial": TRIAL}))
    fleet.keeper.look()


def test_devices_are_asked_with_the_release_and_not_when_it_is_taken_back(fleet):
    tried(fleet)
    asked = [d.desired["release"]["trial"] for d in fleet.store.devices()]
    assert [Question.model_validate(question) for question in asked] == [TRIAL.question] * 3
    for device in fleet.ids:
        fleet.says(device, NEW, word="worse")
    fleet.keeper.look()
    assert fleet.phase == "rolled-back"  # in the check-in in which they said it
    assert "on their own rows" in fleet.store.rollout("r1").cause
    assert set(fleet.wanted.values()) == {OLD}
    assert all("trial" not in d.desired["release"] for d in fleet.store.devices())
    assert fleet.store.rebuild().equal


def test_a_release_waits_until_enough_have_answered(fleet):
    tried(fleet)
    for device in fleet.ids:
        fleet.says(device, NEW)
    fleet.keeper.look()
    assert fleet.phase == "running"
    for device in fleet.ids:
        fleet.says(device, NEW, word="fine")
    fleet.keeper.look()
    assert fleet.phase == "done"


def test_an_answer_to_another_question_says_nothing(fleet):
    other = TRIAL.model_copy(update={"max_drop": 0.5})
    fleet.plan(stages=(Stage(share=1.0),), health=HEALTH.model_copy(update={"trial": other}))
    fleet.keeper.look()
    for device in fleet.ids:
        fleet.says(device, NEW, word="worse")
    fleet.keeper.look()
    assert fleet.phase == "running"


def test_a_trial_that_the_first_stage_cannot_answer_is_refused(fleet):
    health = HEALTH.model_copy(update={"trial": TRIAL})
    plan = RolloutPlan(id="r", task="digits", releases={"phone": NEW}, stages=STAGES, health=health)
    with pytest.raises(ConfigError, match=r"has 1 devices, and 1 of them answer trials.* it needs 3 answers"):
        check_trial(fleet.store, plan)
    check_trial(fleet.store, plan.model_copy(update={"stages": (Stage(share=1.0),)}))


# --- devices that enrol later -------------------------------------------------------------------------


def everywhere(fleet, name="r1", release=NEW, **fields):
    """A rollout that is done."""
    plan = RolloutPlan(id=name, task="digits", releases={"phone": release}, health=HEALTH, **fields)
    fleet.store.record("rollout.planned", {"rollout_id": name, "task": "digits", "plan": plan.to_json()})
    move(fleet.store, name, "running")
    for _ in range(5):
        fleet.keeper.look()
        for device in fleet.told:
            fleet.says(device, release)
    assert fleet.phase == "done"


def newcomer(fleet, works, profile="phone"):
    (device,) = works.register(1)
    fleet.fleet.follow()
    told = Serving("digits", profile, "", ())
    fleet.fleet.check_in(device, Report((), "0.1", (), told))
    return device


def test_a_device_that_enrols_later_gets_what_its_profile_has_in_service(fleet, works):
    everywhere(fleet)
    device = newcomer(fleet, works)
    other = newcomer(fleet, works, profile="gateway")
    fleet.keeper.look()
    assert fleet.wanted[device] == NEW
    assert fleet.wanted[other] is None
    assert fleet.store.rebuild().equal


def test_nobody_is_given_what_was_withdrawn_or_what_the_operator_took_away(fleet, works):
    everywhere(fleet)
    taken = newcomer(fleet, works)
    assign(fleet.store, [taken], None)  # nothing was wanted of it, and nothing changes
    fleet.keeper.look()
    assert fleet.wanted[taken] == NEW
    assign(fleet.store, [taken], None)
    fleet.keeper.look()
    assert fleet.wanted[taken] is None
    fleet.store.record("release.withdrawn", NEW, {"release": NEW, "reason": "wrong"})
    late = newcomer(fleet, works)
    fleet.keeper.look()
    assert fleet.wanted[late] is None


def test_a_rollout_to_a_group_says_nothing_of_the_others(fleet, works):
    (lab,) = works.register(1, groups=("lab",))
    fleet.says(lab, "")
    fleet.fleet.flush(everything=True)
    everywhere(fleet, stages=(Stage(groups=("lab",)),))
    assert fleet.told == [lab]
    late = newcomer(fleet, works)
    (mate,) = works.register(1, groups=("lab",))
    fleet.says(mate, "")
    fleet.keeper.look()
    assert (fleet.wanted[late], fleet.wanted[mate]) == (None, NEW)


# --- looking only when there is something to see ------------------------------------------------------


class Counting:
    """A store that counts who reads all devices."""

    def __init__(self, store):
        self._store, self.reads = store, 0

    def devices(self, **fields):
        self.reads += 1
        return self._store.devices(**fields)

    def __getattr__(self, name):
        return getattr(self._store, name)


def test_devices_are_read_once_and_nothing_is_decided_without_news(fleet, monkeypatch):
    store = Counting(fleet.store)
    fleet.keeper = RolloutKeeper(store, fleet.fleet.heard, said=fleet.fleet.said)
    decided = []
    real = rollouts.decide
    monkeypatch.setattr(rollouts, "decide", lambda *a: decided.append(len(a[2])) or real(*a))
    fleet.plan()
    fleet.keeper.look()
    (canary,) = fleet.told
    assert store.reads == 1
    fleet.keeper.look()
    decided.clear()
    for _ in range(5):
        fleet.keeper.look()
    assert decided == []
    fleet.says(canary, NEW)  # somebody says something else
    fleet.keeper.look()
    assert len(fleet.told) == 3
    assert decided[0] == 1  # only who was told is looked at, until a stage begins
    for device in fleet.told:
        fleet.says(device, NEW)
    fleet.keeper.look()
    assert fleet.phase == "done"
    assert store.reads == 1


def test_time_alone_is_news(fleet):
    now = [1000.0]
    fleet.keeper = RolloutKeeper(fleet.store, fleet.fleet.heard, lambda: now[0], said=fleet.fleet.said)
    fleet.plan(stages=(Stage(share=1.0),), health=HEALTH.model_copy(update={"window_s": 3600}))
    now[0] = fleet.store.rollout("r1").since + 1
    fleet.keeper.look()
    for device in fleet.told:
        fleet.says(device, NEW)
    fleet.keeper.look()
    fleet.keeper.look()
    assert fleet.phase == "running"
    now[0] += 3600
    fleet.keeper.look()
    assert fleet.phase == "done"


def test_a_command_and_a_new_device_are_news(fleet, works):
    fleet.keeper = RolloutKeeper(fleet.store, fleet.fleet.heard, said=fleet.fleet.said)
    fleet.plan(stages=(Stage(share=1.0),))
    fleet.keeper.look()
    fleet.keeper.look()
    late = newcomer(fleet, works)
    fleet.fleet.flush(everything=True)
    fleet.keeper.look()
    assert late in fleet.told
    move(fleet.store, "r1", "rolling-back", "enough", aborting=True)
    fleet.keeper.look()
    assert fleet.phase == "aborted"
