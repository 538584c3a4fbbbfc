"""Virtual devices: what is drawn, when they are there, how long they take, how they share cores."""

from math import inf

import numpy as np
import pytest

from lepton_fl.errors import ConfigError, NotFound
from lepton_fl.plan import LocalPlan, RoundPlan
from lepton_simulations.world import VirtualClock, World, WorldConfig
from lepton_simulations.world.cores import finished
from lepton_simulations.world.draws import chosen, dealt, device_keys, normal, uniform

IDS = tuple(f"device-{i}" for i in range(200))


def plan(cohort=IDS, round_=1, attempt=1, kind="train"):
    return RoundPlan(
        run_id="r",
        round=round_,
        attempt=attempt,
        kind=kind,
        task="t:t",
        task_version="1",
        layout_digest="0" * 64,
        num_coordinates=4,
        model_sha256="0" * 64,
        cohort=tuple(cohort),
        wanted_reports=len(cohort),
        min_reports=1,
        deadline_s=600.0,
        local=LocalPlan(),
        weighting="examples",
        max_weight=1,
        grid_step=2.0**-24,
        nonce="0",
    )


def world(devices=None, faults=None, seed=0, ids=IDS):
    return World.build(WorldConfig.of(devices=devices or {}, faults=faults or {}), ids, seed)


def one_class(**fields):
    return {"classes": [fields]}


def fates(of, *, examples=100, down=0, up=0, **about):
    return of.fates(plan(**about), lambda device_id: examples, down, up)


# --- drawing ----------------------------------------------------------------------------------------


def test_classes_may_be_parts_of_the_fleet_in_its_order():
    fast = {"name": "fast", "part": [0.0, 0.7], "speed": {"value": 100.0}}
    slow = {"name": "slow", "part": [0.7, 1.0], "speed": {"value": 1.0}}
    found = {f.device_id: f.seconds for f in fates(world({"classes": [fast, slow]}))}
    assert [found[d] for d in IDS] == [1.0] * 140 + [100.0] * 60


@pytest.mark.parametrize(
    "parts", [[[0.0, 0.5], None], [[0.0, 0.5], [0.6, 1.0]], [[0.0, 0.5], [0.5, 0.9]], [[0.5, 1.0]]]
)
def test_parts_must_follow_each_other(parts):
    classes = [{"part": part} if part else {} for part in parts]
    with pytest.raises(ConfigError, match="part"):
        world({"classes": classes})


def test_a_number_depends_on_what_it_is_about_and_on_nothing_else():
    keys = device_keys(7, IDS)
    whole = uniform(keys, "drop", "train", 1, 1)
    assert np.array_equal(uniform(keys[::-1], "drop", "train", 1, 1), whole[::-1])
    assert uniform(keys[3:4], "drop", "train", 1, 1)[0] == whole[3]
    others = [
        uniform(keys, "drop", "train", 1, 2),
        uniform(keys, "drop", "train", 2, 1),
        uniform(keys, "moment", "train", 1, 1),
        uniform(keys, "drop", "train", 1, 1, counter=1),
        uniform(device_keys(8, IDS), "drop", "train", 1, 1),
    ]
    for other in others:
        assert abs(np.corrcoef(whole, other)[0, 1]) < 0.25  # 3.5 standard deviations
        assert not np.any(whole == other)


def test_known_answers_of_the_generator():
    """They must never change: a scenario's result depends on them."""
    keys = device_keys(0, ["a", "b"])
    assert keys.tolist() == [9411421539820559777, 17590860890278328071]
    assert uniform(keys, "drop", 3).tolist() == [0.2712442082501806, 0.02696641008099876]


def test_numbers_are_uniform_and_normal():
    keys = device_keys(1, [str(i) for i in range(20_000)])
    u, z = np.sort(uniform(keys, "x")), np.sort(normal(keys, "x"))
    n = len(keys)
    assert np.abs(u - np.arange(n) / n).max() < 1.95 / np.sqrt(n)  # Kolmogorov-Smirnov, one in a thousand
    assert abs(z.mean()) < 4 / np.sqrt(n)
    assert abs(z.std() - 1) < 4 / np.sqrt(2 * n)
    assert abs(np.mean(np.abs(z) < 1.0) - 0.6827) < 4 * np.sqrt(0.6827 * 0.3173 / n)


def test_shares_are_exact():
    keys = device_keys(3, IDS)
    assert chosen(keys, 0.2, "malicious").sum() == 40
    assert chosen(keys, 0.0, "malicious").sum() == 0
    assert chosen(keys, 1.0, "malicious").sum() == 200
    assert np.bincount(dealt(keys, [1, 2, 1], "class")).tolist() == [50, 100, 50]
    assert np.bincount(dealt(keys[:3], [1, 1], "class"), minlength=2).sum() == 3


# --- cores ------------------------------------------------------------------------------------------


def test_jobs_share_cores():
    """Known answers, worked out by hand."""
    ready, work = np.zeros(2), np.array([[1.0], [3.0]])
    assert finished(ready, work, 0.0).ravel().tolist() == [1.0, 3.0]  # each its own
    assert finished(ready, work, 1.0).ravel() == pytest.approx([2.0, 4.0])
    assert finished(ready, work, 2.0).ravel() == pytest.approx([1.0, 3.0])
    assert finished(ready, work, 8.0).ravel() == pytest.approx([1.0, 3.0])  # a job runs on one core
    assert finished(np.zeros(3), np.ones((3, 1)), 2.0).ravel() == pytest.approx([1.5] * 3)
    # One comes after a second: the first has two left and gets half the core until 3, when one unit is left.
    assert finished(np.array([0.0, 1.0]), np.array([[3.0], [1.0]]), 1.0).ravel() == pytest.approx([4.0, 3.0])


def test_phases_and_idle_times_on_shared_cores():
    ready = np.array([10.0, 0.0, 5.0])
    work = np.array([[1.0, 2.0], [1.0, 0.5], [0.0, 1.0]])
    alone = finished(ready, work, 0.0)
    assert finished(ready, work, 1.0) == pytest.approx(alone)  # never two at a time
    both = finished(np.zeros(2), np.array([[1.0, 1.0], [2.0, 2.0]]), 1.0)
    assert both == pytest.approx(np.array([[2.0, 4.0], [4.0, 6.0]]))
    assert finished(np.zeros(2), np.zeros((2, 2)), 1.0).tolist() == [[0.0, 0.0]] * 2
    assert finished(np.zeros(0), np.zeros((0, 2)), 1.0).shape == (0, 2)


def test_a_core_does_all_the_work_and_no_more():
    rng = np.random.default_rng(5)
    ready, work = np.sort(rng.uniform(0, 2, 50)), rng.exponential(1.0, (50, 2))
    done = finished(ready, work, 2.0)
    assert done.max() >= work.sum() / 2.0
    assert (done >= finished(ready, work, 0.0) - 1e-9).all()
    busy = finished(np.zeros(50), work, 2.0)
    assert busy.max() <= work.sum() / 2.0 + work.sum(axis=1).max()
    shuffled = rng.permutation(50)
    assert finished(ready[shuffled], work[shuffled], 2.0) == pytest.approx(done[shuffled])


# --- fates ------------------------------------------------------------------------------------------


def test_an_ideal_fleet_answers_at_once_in_the_order_of_the_cohort():
    cohort = IDS[5::-1]
    found = fates(world(), cohort=cohort, down=10**9, up=10**9)
    assert [f.device_id for f in found] == list(cohort)
    assert all(f.answers and f.ordinary and f.arrives_s == f.seconds == 0.0 for f in found)
    assert world().standings(0.0).all()
    assert world().next_change(0.0) == inf


def test_how_long_an_answer_takes():
    devices = one_class(speed=50, down=1e6, up=1e5, latency_s=0.5, overhead_s=1)
    (fate,) = fates(world(devices), cohort=IDS[:1], examples=100, down=2_000_000, up=300_000)
    assert fate.arrives_s == pytest.approx(0.5 + 2 + 1 + 2 + 3 + 0.5)
    assert fate.seconds == pytest.approx(2.0)
    (fate,) = fates(world(devices), cohort=IDS[:1], kind="evaluate", down=2_000_000)
    assert fate.seconds == pytest.approx(2.0 / 3)
    (fate,) = world(devices).fates(plan(IDS[:1]), {IDS[0]: 200}, 0, 0)
    assert fate.seconds == pytest.approx(4.0)


def test_devices_of_one_host_wait_for_each_other():
    devices = one_class(speed=100) | {"shared_cores": 2}
    found = fates(world(devices), cohort=IDS[:20], examples=100)
    assert [f.arrives_s for f in found] == pytest.approx([10.0] * 20)
    assert [f.seconds for f in found] == pytest.approx([10.0] * 20)  # a device's own clock does not stop


def test_fates_do_not_depend_on_the_order_of_calls_or_on_the_others():
    devices = one_class(speed={"kind": "lognormal", "median": 100, "sigma": 1}, jitter=0.3)
    faults = {"drop_training": 0.2, "corrupt": 0.2, "drop_upload": 0.1}
    first, second = world(devices, faults), world(devices, faults)
    late = fates(second, round_=9, attempt=3)
    fates(second, round_=2)
    assert fates(first, round_=9, attempt=3) == late
    few = {f.device_id: f for f in fates(first, cohort=IDS[10:20], round_=9, attempt=3)}
    assert all(few[f.device_id] == f for f in late if f.device_id in few)
    assert fates(world(devices, faults, seed=1), round_=9, attempt=3) != late
    assert fates(first, round_=9, attempt=2) != late


def test_speeds_are_spread_as_declared():
    ids = tuple(map(str, range(4000)))
    lognormal = {"kind": "lognormal", "median": 50.0, "sigma": 0.5}
    times = [f.arrives_s for f in fates(world(one_class(speed=lognormal), ids=ids), cohort=ids)]
    assert np.median(times) == pytest.approx(2.0, rel=0.04)
    assert np.std(np.log(times)) == pytest.approx(0.5, rel=0.05)
    uniform_ = {"kind": "uniform", "low": 1.0, "high": 3.0}
    times = [f.arrives_s for f in fates(world(one_class(latency_s=uniform_), ids=ids), cohort=ids)]
    assert 2.0 <= min(times) < 2.01
    assert 5.99 < max(times) <= 6.0
    assert np.mean(times) == pytest.approx(4.0, rel=0.02)


def test_classes_and_stragglers():
    devices = {"classes": [{"speed": 100, "share": 3}, {"speed": 10}]}
    of = world(devices, {"stragglers": 0.1, "slowdown": 5})
    times = sorted(round(f.arrives_s, 9) for f in fates(of))
    counts = {t: times.count(t) for t in set(times)}
    assert counts.keys() <= {1.0, 5.0, 10.0, 50.0}
    assert counts[5.0] + counts.get(50.0, 0) == 20
    assert counts[10.0] + counts.get(50.0, 0) == 50
    slow = {f.device_id for f in fates(of, round_=2) if round(f.arrives_s, 9) in (5.0, 50.0)}
    assert slow == {f.device_id for f in fates(of) if round(f.arrives_s, 9) in (5.0, 50.0)}


def test_a_skewed_clock_changes_what_is_reported_and_nothing_else():
    skewed, plain = (world(one_class(speed=10), {"clock_skew_s": s}) for s in (300.0, 0.0))
    reported = [f.seconds for f in fates(skewed)]
    assert [f.arrives_s for f in fates(skewed)] == [f.arrives_s for f in fates(plain)] == [10.0] * 200
    assert min(reported) == 0.0
    assert 200 < max(reported) <= 310
    assert len(set(reported)) > 50


def test_a_device_that_is_not_of_the_fleet_is_named():
    with pytest.raises(NotFound, match="'stranger' is not among the 200"):
        fates(world(), cohort=["stranger"])


# --- availability -----------------------------------------------------------------------------------


def daily(**fields):
    return one_class(availability={"kind": "daily", "period_s": 100.0, "on_fraction": 0.4, **fields})


def test_day_and_night():
    of = world(daily(phase_spread=0.0, start_s=10.0))
    there = {now: of.standings(now) for now in (0.0, 9.99, 10.0, 49.99, 50.0, 109.99, 110.0, 1_000_049.0)}
    assert [bool(v.all()) for v in there.values()] == [False, False, True, True, False, False, True, True]
    assert all(v.all() or not v.any() for v in there.values())
    assert [of.next_change(t) for t in (0.0, 10.0, 50.0, 110.0)] == [10.0, 50.0, 110.0, 150.0]
    candidates = of.candidates(0.0, unfit={IDS[3]: "no rows"})
    assert {c.standing for c in candidates} == {"offline", "data-contract"}
    assert candidates[3].reason == "no rows"
    assert {c.standing for c in of.candidates(10.0)} == {"eligible"}


@pytest.mark.parametrize(
    "availability",
    [
        {"kind": "daily", "on_fraction": 0.3, "period_s": 86_400.0},
        {"kind": "charging", "shortest_s": 7200.0, "longest_s": 30_000.0, "jitter_s": 9000.0},
    ],
)
def test_a_clock_that_jumps_from_change_to_change_sees_every_change(availability):
    of = world(one_class(availability=availability))
    moments, now = [], 0.0
    while now < 2 * 86_400.0:
        after = of.next_change(now)
        assert after > now
        assert np.array_equal(of.standings(now), of.standings((now + after) / 2))  # none in between
        assert not np.array_equal(of.standings(now), of.standings(after))
        now = after
        moments.append(now)
    assert len(moments) >= 2 * 2 * 200 - 2  # each device comes and goes each day
    shares = [of.standings(t).mean() for t in np.linspace(0, 86_400, 97)]
    expected = 0.3 if availability["kind"] == "daily" else 18_600 / 86_400
    assert np.mean(shares) == pytest.approx(expected, abs=0.02)


def test_a_window_that_ends_in_mid_round_is_a_drop_out_in_that_stage():
    devices = daily(phase_spread=0.0, start_s=0.0)  # there until 40
    devices["classes"][0] |= {"speed": 10.0, "down": 1.0, "up": 1.0}
    of = world(devices)
    for now, stage, gone in ((0.0, "", 26.0), (16.0, "upload", 44.0), (26.0, "training", 34.0)):
        of.clock.advance_to(now)
        found = fates(of, down=8, up=8)
        assert {f.stage for f in found} == {stage}
        assert found[0].arrives_s == pytest.approx(gone)
    of.clock.advance_to(38.0)
    assert {f.stage for f in fates(of, down=8, up=8)} == {"download"}
    of.clock.advance_to(41.0)
    found = fates(of, down=8, up=8)
    assert {(f.stage, f.refusal, f.arrives_s) for f in found} == {("offline", "offline", 20.0)}
    assert found[0].word().reason == "offline"


def test_a_trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("device,start_s,end_s\ndevice-0,0,10\ndevice-1,5,8\ndevice-0,20,30\ndevice-0,10,12\n")
    of = world(one_class(availability={"kind": "trace", "trace": str(path)}), ids=IDS[:3])
    seen = {t: of.standings(t).tolist() for t in (0.0, 5.0, 8.0, 11.0, 12.0, 25.0, 30.0)}
    assert seen == {
        0.0: [True, False, False],
        5.0: [True, True, False],
        8.0: [True, False, False],
        11.0: [True, False, False],
        12.0: [False, False, False],
        25.0: [True, False, False],
        30.0: [False, False, False],
    }
    changes, now = [], 0.0
    while (now := of.next_change(now)) < inf:
        changes.append(now)
    assert changes == [5.0, 8.0, 12.0, 20.0, 30.0]
    again = {"kind": "trace", "trace": str(path), "repeat_s": 40.0}
    of = world(one_class(availability=again), ids=IDS[:3])
    assert of.standings(51.0).tolist() == [True, False, False]
    assert of.next_change(30.0) == 40.0
    assert of.next_change(33.0 + 400.0) == 440.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "csv:1: expected the columns device, start_s, end_s"),
        ("device,start_s,end_s\n", "holds no window"),
        ("device,start_s,end_s\nd,1\n", "csv:2: expected 3 columns, got 2"),
        ("device,start_s,end_s\nd,1,x\n", "csv:2: '1' and 'x' must be numbers"),
        ("device,start_s,end_s\nd,1,2\nd,3,3\n", "csv:3: expected 0 <= start_s < end_s, got 3 and 3"),
        ("device,start_s,end_s\nd,1,nan\n", "csv:2: expected 0 <= start_s"),
        ("device,start_s,end_s\nd,1,3\nd,2,4\n", "device 'd' has windows that overlap at 2 s"),
        ("device,start_s,end_s\nd,1,3\n", "about none of the fleet's devices"),
    ],
)
def test_a_bad_trace_names_its_line(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        world(one_class(availability={"kind": "trace", "trace": str(path)}))


def test_a_missing_trace(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        world(one_class(availability={"kind": "trace", "trace": str(tmp_path / "none.csv")}))


# --- the clock --------------------------------------------------------------------------------------


def test_the_clock_only_runs_forward():
    clock = VirtualClock()
    clock.advance_to(12.5)
    clock.advance_to(3.0)
    clock.advance(-1.0)
    assert clock() == clock.now_s == 12.5
    clock.advance(0.5)
    assert clock() == 13.0
    for wrong in (inf, float("nan"), -1.0):
        with pytest.raises(ValueError, match="Expected a moment"):
            clock.advance_to(wrong)
