"""From journals of short runs to devices, and from devices to the seconds of other rounds."""

from pathlib import Path

import numpy as np
import pytest

from lepton_fl.errors import ConfigError
from lepton_fl.plan import LocalPlan, RunSpec
from lepton_simulations.world import World, WorldConfig
from lepton_simulations.world.calibrate import calibrate, examples_of, round_seconds
from lepton_simulations.world.replay import Attempt, Part, Replay

IDS = tuple(f"d-{i}" for i in range(20))
ROWS = {d: 30 + 7 * i for i, d in enumerate(IDS)}


def spec(epochs=2, size=20, rounds=6):
    cohort = {"size": size, "min_reports": size, "fill_wait_s": 0.0}
    return RunSpec(task="tests.none:task", rounds=rounds, cohort=cohort, local={"epochs": epochs})


def record(world, asked, *, arrivals=True, noise=0.0):
    """What a coordinator would journal of a run in this world."""
    rng, attempts, cohorts = np.random.default_rng(3), [], np.random.default_rng(4)
    rounds = asked.rounds
    for number in range(1, rounds + 1):
        cohort = tuple(cohorts.permutation(IDS)[: asked.cohort.size])
        fates = fates_of(world, asked, cohort, number)
        stretch = float(np.exp(noise * rng.standard_normal()))
        parts = tuple(
            Part(
                device_id=f.device_id,
                outcome="counted",
                seconds=f.seconds * stretch,
                examples=ROWS[f.device_id],
                arrived_s=f.arrives_s * stretch if arrivals else None,
            )
            for f in fates
        )
        start, seconds = 100.0 * number, fates[-1].arrives_s * stretch
        attempts.append(
            Attempt(
                kind="train",
                round=number,
                attempt=1,
                cohort=cohort,
                start_s=start,
                seconds=seconds,
                deadline_s=600.0,
                wanted=len(cohort),
                parts=parts,
                committed=True,
            )
        )
    return Replay(Path("recorded"), "r", asked, tuple(attempts))


def fates_of(world, asked, cohort, number):
    from lepton_fl.rounds.campaign import RunState, Work, plan_round
    from lepton_fl.tasks.metrics import TrainingLoss

    work = Work(asked.task, "1", "0" * 64, 1, TrainingLoss())
    state = RunState(np.zeros(1, np.float32), attempt=1)
    plan = plan_round(asked, "r", work, "train", number, state, cohort, len(cohort), "0")
    return world.fates(plan, lambda d: examples_of(asked.local, ROWS[d]), 0, 0)


def world_of(devices, seed=0):
    return World.build(WorldConfig.of(devices=devices), IDS, seed)


HOST = {"shared_cores": 2, "classes": [{"speed": 2000, "overhead_s": 0.03, "latency_s": 0.1}]}


def test_two_runs_tell_what_a_round_a_device_and_an_example_cost():
    real = world_of(HOST)
    runs = [record(real, spec(epochs=1)), record(real, spec(epochs=8, size=8))]
    found = calibrate(runs, shared_cores=2)
    (one,) = found.classes
    assert found.shared_cores == 2
    assert one.speed.value == pytest.approx(2000, rel=0.01)
    assert one.overhead_s.value == pytest.approx(0.03, rel=0.02)
    assert one.latency_s.value == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize(
    ("other", "noise", "within"),
    [
        (spec(epochs=5), 0.0, 0.002),
        (spec(epochs=3, size=12), 0.0, 0.002),
        (spec(epochs=1, size=5), 0.0, 0.002),
        (spec(epochs=5), 0.1, 0.12),
        (spec(epochs=3, size=12), 0.1, 0.12),
    ],
)
def test_rounds_of_another_run_are_predicted(other, noise, within):
    real = world_of(HOST)
    runs = [record(real, spec(1), noise=noise), record(real, spec(8, 8), noise=noise), record(real, spec(8))]
    predicted = World.build(WorldConfig(devices=calibrate(runs, shared_cores=2)), IDS, 1)
    expected = np.median(round_seconds(real, other, ROWS, seed=1))
    assert np.median(round_seconds(predicted, other, ROWS, seed=1)) == pytest.approx(expected, rel=within)


def test_one_run_is_enough_for_more_of_the_same_work():
    real = world_of({"shared_cores": 2, "classes": [{"speed": 2000, "overhead_s": 0.03}]})
    predicted = calibrate([record(real, spec(epochs=2))], shared_cores=2)
    world = World.build(WorldConfig(devices=predicted), IDS, 1)
    expected = np.median(round_seconds(real, spec(epochs=6), ROWS))
    assert np.median(round_seconds(world, spec(epochs=6), ROWS)) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("arrivals", [True, False])
def test_machines_of_their_own(arrivals):
    devices = [
        {"speed": {"kind": "lognormal", "median": 300, "sigma": 0.6}, "overhead_s": 0.5, "jitter": 0.1}
    ]
    real = world_of({"classes": devices}, seed=2)
    (one,) = calibrate([record(real, spec(rounds=30), arrivals=arrivals)]).classes
    speeds = np.log([300 * np.exp(0.6 * z) for z in _standard_normals(real)])
    assert np.log(one.speed.median) == pytest.approx(np.median(speeds), abs=0.08)
    assert one.speed.sigma == pytest.approx(np.std(speeds), abs=0.08)
    assert one.jitter == pytest.approx(0.1, abs=0.02)
    assert one.overhead_s.value == pytest.approx(0.5, abs=0.05)


def _standard_normals(world):
    costs = world._devices.speed_s
    return [np.log(1 / (300 * c)) / 0.6 for c in costs]


def test_evaluations_say_how_much_faster_they_are():
    run = record(world_of({"classes": [{"speed": 100}]}), spec())
    part = Part(device_id="d-0", outcome="counted", seconds=0.1, examples=50)
    evaluation = Attempt("evaluate", 1, 1, ("d-0",), 0.0, 0.2, np.inf, 1, (part,))
    run = Replay(run.path, run.run_id, run.spec, (*run.attempts, evaluation))
    assert calibrate([run]).classes[0].evaluation_factor == pytest.approx(5.0)


def test_nothing_to_learn_from():
    real = world_of(HOST)
    short = record(real, spec(rounds=1))
    with pytest.raises(ConfigError, match="None of the 1 journals has a round after round 1"):
        calibrate([short], shared_cores=2)
    with pytest.raises(ConfigError, match="None of the 0 journals"):
        calibrate([])


def test_examples_of_a_round():
    assert examples_of(LocalPlan(epochs=3), 50) == 150
    assert examples_of(LocalPlan(epochs=3, max_steps=2, batch_size=10), 50) == 20
    assert examples_of(LocalPlan(epochs=1, max_steps=9, batch_size=10), 50) == 50


def test_predicted_rounds_leave_out_devices_that_drop_out():
    world = World.build(WorldConfig.of(devices={"classes": [{"speed": 100}]}, faults={"drop_out": 0.2}), IDS)
    wanted = spec(size=10)
    cohort = wanted.cohort.model_copy(update={"min_reports": 1, "deadline_s": 50.0})
    took = round_seconds(world, wanted.model_copy(update={"cohort": cohort}), ROWS)
    assert len(took) == 6
    assert max(took) == 20.0  # a silent device is given up
    assert world.clock() == pytest.approx(sum(took))
