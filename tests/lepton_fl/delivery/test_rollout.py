"""Staged rollout: who is reached, when a stage holds, when it is taken back."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lepton_fl.delivery.rollout import (
    MOST_COUNTED,
    Act,
    Health,
    Known,
    RolloutPlan,
    Service,
    Stage,
    Standing,
    Told,
    decide,
    draw,
    members,
)
from lepton_fl.delivery.trial import Trial

OLD, NEW = "a" * 64, "b" * 64
HEALTH = Health(window_s=60, min_devices=1, settle_s=30)
PLAN = RolloutPlan(id="r1", task="pkg.mod:task", releases={"phone": NEW}, health=HEALTH)
FLEET = [Known(f"d{i:04}", "phone", wanted=OLD, serving=OLD) for i in range(1000)]


class World:
    """A coordinator that carries every act out, and devices that do as they are told when they are awake."""

    def __init__(self, plan: RolloutPlan, fleet: list[Known]) -> None:
        self.plan, self.now = plan, 1000.0
        self.devices = {d.id: d for d in fleet}
        self.standing = Standing("running", since=self.now)
        self.ran: set[str] = set()  # devices that have ever served the new release
        self.acts: list[Act] = []

    def step(self) -> Act:
        act = decide(self.plan, self.standing, list(self.devices.values()), self.now)
        again = decide(self.plan, self.standing, list(self.devices.values()), self.now)
        assert act == again
        self.acts.append(act)
        now, was = self.now, self.standing
        if act.kind == "tell":
            told = {
                n: Told(was.stage, self.devices[n].wanted, self.devices[n].service.p95_ms)
                for n in act.devices
            }
            for name in act.devices:
                self._want(name, self.plan.releases[self.devices[name].profile])
            self.standing = replace(was, told={**was.told, **told})
        elif act.kind == "suspect":
            self.standing = replace(was, suspect=act.cause, suspect_since=now, suspect_requests=act.requests)
        elif act.kind == "breach":
            self.standing = replace(was, phase="rolling-back")
        elif act.kind == "promote":
            self.standing = replace(was, stage=was.stage + 1, since=now)
        elif act.kind == "revert":
            for name in act.devices:
                self._want(name, was.told[name].before)
            self.standing = replace(was, told={n: t for n, t in was.told.items() if n not in act.devices})
        elif act.kind == "finish":
            self.standing = replace(was, phase="rolled-back" if was.phase == "rolling-back" else "done")
        return act

    def settle(self) -> Act:
        while (act := self.step()).kind != "wait" and self.standing.phase in ("running", "rolling-back"):
            pass
        return act

    def _want(self, name: str, release: str) -> None:
        self.devices[name] = replace(self.devices[name], wanted=release)

    def check_in(
        self, names: list[str], bad: Mapping[str, str] | None = None, service: Service | None = None
    ) -> None:
        for name in names:
            device = self.devices[name]
            if device.wanted == device.serving:
                continue
            if bad and device.wanted in bad:
                self.devices[name] = replace(device, failed={device.wanted: bad[device.wanted]})
                continue
            if device.wanted == NEW:
                self.ran.add(name)
            self.devices[name] = replace(device, serving=device.wanted, service=service or Service())


def test_the_stages_hold_each_other_and_a_share_is_a_share() -> None:
    reached = [{d.id for d in members(PLAN, stage, FLEET)} for stage in range(4)]
    assert reached[0] < reached[1] < reached[2] < reached[3] == {d.id for d in FLEET}
    for names, share in zip(reached, (0.01, 0.1, 0.5), strict=False):
        assert abs(len(names) / 1000 - share) < 4 * (share * (1 - share) / 1000) ** 0.5


def test_another_rollout_has_other_canaries() -> None:
    other = PLAN.model_copy(update={"id": "r2"})
    assert {d.id for d in members(PLAN, 1, FLEET)} != {d.id for d in members(other, 1, FLEET)}


def test_the_draw_is_part_of_the_format() -> None:
    assert draw("r1", "d0000") == 0.6943081005824274  # of sha256sum


def test_a_small_fleet_has_a_canary_and_other_profiles_are_left_alone() -> None:
    fleet = [*FLEET[:3], Known("x", "server", wanted=OLD, serving=OLD)]
    assert len(members(PLAN, 0, fleet)) == 1
    assert "x" not in {d.id for d in members(PLAN, 3, fleet)}


def test_groups_are_stages_too() -> None:
    plan = PLAN.model_copy(update={"stages": (Stage(groups=("lab",)), Stage(share=1.0))})
    fleet = [replace(d, groups=("lab",)) if d.id in ("d0003", "d0005") else d for d in FLEET[:10]]
    assert [d.id for d in members(plan, 0, fleet)] == ["d0003", "d0005"]
    assert len(members(plan, 1, fleet)) == 10


def test_a_good_release_reaches_everybody_stage_by_stage() -> None:
    world = World(PLAN, FLEET)
    while world.standing.phase == "running":
        world.settle()
        world.check_in(list(world.devices))
        world.now += 61
    assert world.standing.phase == "done"
    assert {d.serving for d in world.devices.values()} == {NEW}
    assert [a.kind for a in world.acts if a.kind != "wait"] == ["tell", "promote"] * 3 + ["tell", "finish"]


def test_time_alone_promotes_nothing() -> None:
    world = World(PLAN, FLEET)
    world.settle()
    world.now += 1e9
    act = world.settle()
    assert act.kind == "wait"
    assert "must" in act.cause


def test_before_the_window_is_over_nothing_is_promoted() -> None:
    world = World(PLAN, FLEET)
    world.settle()
    world.check_in(list(world.devices))
    act = world.settle()
    assert (act.kind, act.until) == ("wait", 1060.0)
    assert world.standing.stage == 0


@pytest.mark.parametrize("fault", ["self-test", "crashed"])
def test_a_bad_release_stays_with_the_canaries_and_is_taken_back(fault: str) -> None:
    world = World(PLAN, FLEET)
    canaries = {d.id for d in members(PLAN, 0, FLEET)}
    world.settle()
    world.check_in(list(world.devices), bad={NEW: fault})
    world.settle()
    assert world.standing.phase == "rolled-back"
    assert {d.wanted for d in world.devices.values()} == {OLD}
    assert {n for act in world.acts for n in act.devices} == canaries
    assert any(act.kind == "breach" and fault in act.cause for act in world.acts)


def test_a_download_that_may_still_succeed_is_no_breach() -> None:
    world = World(PLAN, FLEET)
    world.settle()
    world.check_in(list(world.devices), bad={NEW: "quota"})
    assert world.settle().kind == "wait"
    assert world.standing.phase == "running"


def counting(world: World, service: Service) -> None:
    """All that serve the new release count so much from now on."""
    for name, device in world.devices.items():
        if device.serving == NEW:
            world.devices[name] = replace(device, service=service)


FEW_ERRORS = Service(1000, 15)  # more than 1 %, and may be chance


def test_errors_that_may_be_chance_must_last_before_they_count() -> None:
    world = World(ONE, FLEET)
    world.settle()
    world.check_in(list(world.devices), service=FEW_ERRORS)
    assert world.settle().until == world.now + 30
    counting(world, Service(1000, 0))
    assert world.settle().kind == "wait"
    assert world.standing.suspect == ""
    counting(world, FEW_ERRORS)
    world.settle()
    world.now += 31
    world.settle()
    assert world.standing.phase == "rolled-back"


ONE = PLAN.model_copy(update={"stages": (Stage(share=0.0001), Stage(share=1.0))})  # one canary


@pytest.mark.parametrize(
    ("first", "second", "phase"),
    [
        (FEW_ERRORS, Service(1099, 16), "running"),  # 99 more are no sample
        (FEW_ERRORS, Service(1100, 17), "rolled-back"),
        (FEW_ERRORS, Service(1100, 11), "running"),  # it was chance
        (FEW_ERRORS, Service(10, 1), "running"),  # the endpoint was started anew and counts from zero
        (Service(1000, 0, 4.1), Service(1100, 0, 4.1), "rolled-back"),
        (Service(1000, 0, 4.1), Service(1100, 0, 3.9), "running"),
        (Service(1000, 0, 4.1), Service(1100, 15, 0.0), "rolled-back"),
    ],
)
def test_what_looks_bad_is_bad_when_a_second_sample_says_the_same(
    first: Service, second: Service, phase: str
) -> None:
    world = World(ONE, [replace(d, service=Service(1000, 0, p95_ms=2.0)) for d in FLEET])
    world.settle()
    world.check_in(list(world.devices), service=first)
    world.settle()
    assert world.standing.phase == "running"
    assert world.standing.suspect_requests == 1000
    counting(world, second)
    world.settle()
    assert world.standing.phase == phase


def test_a_busy_device_does_not_outvote_the_others() -> None:
    plan = PLAN.model_copy(update={"stages": (Stage(share=1.0),)})
    world = World(plan, FLEET[:20])
    world.settle()
    names = list(world.devices)
    world.check_in(names[:1], service=Service(10**9, 0))
    world.check_in(names[1:], service=Service(50, 5))
    world.settle()
    assert world.standing.phase == "rolled-back"
    assert any(f"95 of {MOST_COUNTED + 19 * 50} predictions failed" in act.cause for act in world.acts)


def test_slower_predictions_are_taken_back() -> None:
    world = World(PLAN, [replace(d, service=Service(1000, 0, p95_ms=2.0)) for d in FLEET])
    world.settle()
    world.check_in(list(world.devices), service=Service(1000, 0, p95_ms=4.1))
    world.settle()
    world.now += 31
    world.settle()
    assert world.standing.phase == "rolled-back"
    assert any("2.05 times" in act.cause for act in world.acts)


def test_the_slowest_of_a_few_predictions_is_no_latency() -> None:
    plan = PLAN.model_copy(update={"health": HEALTH.model_copy(update={"min_requests": 0})})
    world = World(plan, [replace(d, service=Service(1000, 0, p95_ms=2.0)) for d in FLEET])
    world.settle()
    world.check_in(list(world.devices), service=Service(19, 0, p95_ms=400.0))
    world.settle()
    assert not world.standing.suspect


def test_few_predictions_say_nothing() -> None:
    world = World(ONE, FLEET)
    world.settle()
    world.check_in(list(world.devices), service=Service(requests=2, errors=1))
    assert world.settle().kind == "wait"
    assert not world.standing.suspect


@pytest.mark.parametrize(
    ("requests", "max_errors", "phase"),
    [
        (1, 0.01, "running"),
        (2, 0.01, "rolled-back"),
        (1, 0.0, "rolled-back"),
        (9, 0.5, "running"),
        (10, 0.5, "rolled-back"),
        (0, 0.0, "running"),
        (10**12, 1.0, "running"),
    ],
)
def test_predictions_that_fail_every_time_need_neither_number_nor_time(
    requests: int, max_errors: float, phase: str
) -> None:
    """One canary, and so few requests that the share that may fail would not say so once in 1,000 times."""
    health = HEALTH.model_copy(update={"max_errors": max_errors})
    world = World(PLAN.model_copy(update={"health": health}), FLEET[:3])
    world.settle()
    world.check_in(list(world.devices), service=Service(requests, requests))
    world.settle()
    assert world.standing.phase == phase


TRIAL = Trial(epsilon=4.0, min_answers=2)  # it needs 4; nothing is beyond doubt below 5


@pytest.mark.parametrize("silent", ["two", "one", "fine", "nobody"])
def test_answers_that_are_enough_or_all_that_will_come_need_no_time(silent: str) -> None:
    health = HEALTH.model_copy(update={"trial": TRIAL})
    plan = PLAN.model_copy(update={"health": health, "stages": (Stage(share=1.0),)})
    world = World(plan, [replace(d, trials=n < 5) for n, d in enumerate(FLEET[:8])])
    world.settle()
    names = list(world.devices)
    away = {"two": 2, "one": 1}.get(silent, 0)
    world.check_in(names[away:])
    for name in names[max(away, silent == "nobody") : 5]:
        world.devices[name] = replace(world.devices[name], answer="worse")
    if silent == "fine":
        world.devices[names[0]] = replace(world.devices[names[0]], answer="fine")
    if silent == "nobody":
        world.devices[names[0]] = replace(world.devices[names[0]], trials=False)
    act = world.settle()
    if silent == "two":  # three answers are too few, and more may come
        assert (world.standing.phase, act.until) == ("running", world.now + 30)
        world.now += 31
        world.settle()
    assert world.standing.phase == "rolled-back"
    assert any(a.kind == "breach" and "on their own rows" in a.cause for a in world.acts)


def test_a_clock_that_is_set_back_does_not_hold_a_stage_for_ever() -> None:
    world = World(PLAN, FLEET)
    world.settle()
    world.check_in(list(world.devices))
    world.now -= 1e6
    world.settle()
    assert world.standing.stage == 1


@settings(deadline=None)  # a fleet is walked through; the machine may be busy
@given(
    fleet=st.integers(1, 60),
    awake=st.lists(st.sets(st.integers(0, 59)), min_size=1, max_size=12),
    fault=st.sampled_from(["self-test", "crashed"]),
)
def test_a_device_that_was_away_never_runs_the_bad_one(fleet: int, awake: list[set[int]], fault: str) -> None:
    world = World(PLAN, FLEET[:fleet])
    for names in awake:
        world.settle()
        world.check_in([f"d{i:04}" for i in names if i < fleet], bad={NEW: fault})
        world.now += 61
    world.settle()
    assert not world.ran
    assert len({n for act in world.acts if act.kind == "tell" for n in act.devices}) == len(
        members(PLAN, 0, FLEET[:fleet])
    )
    if world.standing.phase == "rolled-back":
        assert {d.wanted for d in world.devices.values()} == {OLD}


@pytest.mark.parametrize(
    "wrong",
    [
        {"stages": ()},
        {"stages": ({"share": 0.5}, {"share": 0.1})},
        {"stages": ({"share": 0.0},)},
        {"stages": ({"share": 0.1, "groups": ("a",)},)},
        {"releases": {}},
        {"releases": {"phone": "x"}},
        {"health": {"max_failed": float("nan")}},
        {"id": "../x"},
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RolloutPlan.model_validate({"id": "r", "task": "t", "releases": {"phone": NEW}} | wrong)
