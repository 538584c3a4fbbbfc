"""A deadline that keeps slow devices out costs what only they know; weights bring it back."""

from pathlib import Path

import numpy as np
import pytest

from lepton_fl.config import load
from lepton_fl.tasks import load_task
from lepton_simulations.api import run_scenario
from lepton_simulations.config import SimulationConfig

SCENARIO = Path(__file__).parents[2] / "simulations" / "participation.toml"


def recall(**cohort):
    """Of the class that only the slowest devices own."""
    from lepton_fl.training.trainer import Trainer

    config = load(SimulationConfig, SCENARIO, env={}).value
    run = config.run.model_copy(
        update={"cohort": config.run.cohort.model_copy(update=cohort), "rounds": 20, "evaluate_every": 0}
    )
    engine = config.engine.model_copy(update={"workers": 0})
    output = config.output.model_copy(update={"folder": ""})
    result = run_scenario(config.model_copy(update={"run": run, "engine": engine, "output": output}))
    assert result.verdict.outcome == "completed"
    assert result.coverage.fleet.registered == 40
    assert result.coverage.fleet.contributed >= 28
    task = load_task("digits")
    sums = Trainer(task).evaluate(result.model, task.prepare(task.data(None).test))
    matrix = np.asarray(sums["confusion"]).reshape(10, 10)
    return matrix[3, 3] / matrix[3].sum()


@pytest.mark.slow
def test_weights_at_least_halve_the_gap_in_recall_that_a_deadline_costs():
    patient, hasty = recall(deadline_s=3600.0), recall()
    corrected = recall(correction="inverse-probability")
    assert patient - hasty > 0.3
    assert patient - corrected <= (patient - hasty) / 2
