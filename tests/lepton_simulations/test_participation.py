"""A deadline that keeps slow devices out is told, and costs what only they know; weights bring it back."""

import json
from pathlib import Path

import numpy as np
import pytest

from lepton_fl.config import load
from lepton_fl.tasks import load_task
from lepton_simulations.api import run_scenario
from lepton_simulations.config import SimulationConfig
from lepton_simulations.world import DevicesConfig

SCENARIO = Path(__file__).parents[2] / "simulations" / "participation.toml"


def scenario(rounds, folder="", **cohort):
    config = load(SimulationConfig, SCENARIO, env={}).value
    run = config.run.model_copy(
        update={"cohort": config.run.cohort.model_copy(update=cohort), "rounds": rounds, "evaluate_every": 0}
    )
    engine = config.engine.model_copy(update={"workers": 0})
    output = config.output.model_copy(update={"folder": str(folder), "plots": False})
    return config.model_copy(update={"run": run, "engine": engine, "output": output})


def recall(**cohort):
    """Of the class that only the slowest devices own."""
    from lepton_fl.training.trainer import Trainer

    result = run_scenario(scenario(20, **cohort))
    assert result.verdict.outcome == "completed"
    assert result.coverage.fleet.registered == 40
    assert result.coverage.fleet.contributed >= 28
    task = load_task("digits")
    sums = Trainer(task).evaluate(result.model, task.prepare(task.data(None).test))
    matrix = np.asarray(sums["confusion"]).reshape(10, 10)
    return matrix[3, 3] / matrix[3].sum()


def test_who_contributed_is_told_by_class_and_by_speed(tmp_path):
    result = run_scenario(scenario(3, tmp_path / "run"))
    found = result.coverage
    assert found.groups["fast"].registered == 28
    assert found.groups["slow"].registered == 12
    assert sum(share.contributed for share in found.groups.values()) == found.fleet.contributed
    assert found.groups["fast"].value > 0.8 > 0.2 > found.groups["slow"].value
    assert [share.registered for share in found.deciles] == [4] * 10  # also those who were never asked
    assert sum(share.contributed for share in found.deciles[7:]) == found.groups["slow"].contributed
    assert found.unknown.registered == 0
    assert any("group slow" in flag for flag in result.flags)
    assert not any("group fast" in flag for flag in result.flags)
    saved = json.loads((tmp_path / "run/coverage.json").read_text())
    assert saved == {**found.to_json(), "flags": result.flags}


def test_where_nothing_takes_time_nobody_is_slow():
    config = scenario(1)
    ideal = config.model_copy(update={"devices": DevicesConfig()})
    found = run_scenario(ideal).coverage
    assert (found.deciles, found.groups, found.unknown.registered) == ((), {}, 40)


def test_a_corrected_run_goes_on_to_the_same_bits(tmp_path):
    cohort = {"correction": "inverse-probability"}
    whole, seen = run_scenario(scenario(5, **cohort)), []
    config = scenario(5, tmp_path / "run", **cohort)
    run_scenario(config, on_round=seen.append, should_stop=lambda: len(seen) >= 3)
    result = run_scenario(config, resume=True)
    assert (result.weights_sha256, result.journal_sha256) == (whole.weights_sha256, whole.journal_sha256)
    assert result.coverage == whole.coverage


@pytest.mark.slow
def test_weights_at_least_halve_the_gap_in_recall_that_a_deadline_costs():
    patient, hasty = recall(deadline_s=3600.0), recall()
    corrected = recall(correction="inverse-probability")
    assert patient - hasty > 0.3
    assert patient - corrected <= (patient - hasty) / 2
