"""The recall of a class that only slow devices own: with a deadline, corrected, and with patience.

    python benchmarks/participation.py             # three runs with each of five seeds, about a minute
    python benchmarks/participation.py --seeds 1

The scenario is ``simulations/participation.toml``. Exit code 1 if inverse-probability weights do not at least
halve the gap in recall that the deadline costs.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lepton_fl.config import load
from lepton_fl.tasks import load_task
from lepton_simulations.api import run_scenario
from lepton_simulations.config import SimulationConfig

SCENARIO = Path(__file__).parent.parent / "simulations" / "participation.toml"
CASES: dict[str, dict[str, Any]] = {
    "deadline": {},
    "deadline, corrected": {"correction": "inverse-probability"},
    "everybody is waited for": {"deadline_s": 3600.0},
}


def recall(case: dict[str, Any], seed: int, rounds: int = 0) -> tuple[float, float]:
    """Recall of the owned class and accuracy on the test set, of one run."""
    config = load(SimulationConfig, SCENARIO, env={}).value
    run = config.run.model_copy(
        update={"cohort": config.run.cohort.model_copy(update=case), "seed": seed}
        | ({"rounds": rounds} if rounds else {})
    )
    engine = config.engine.model_copy(update={"seed": seed, "workers": 0})
    data = config.data.model_copy(update={"seed": seed})
    output = config.output.model_copy(update={"folder": ""})
    result = run_scenario(
        config.model_copy(update={"run": run, "engine": engine, "data": data, "output": output})
    )
    return of_class(result, config.data.partition.owned_class), result.rows[-1].metrics["central_accuracy"]


def of_class(result: Any, label: int) -> float:  # noqa: ANN401 - simulations' Result
    """Recall of one class on the task's test set."""
    from lepton_fl.training.trainer import Trainer

    task = load_task("digits")
    assert task.data is not None
    test = task.data(None).test
    assert test is not None
    sums = Trainer(task).evaluate(result.model, task.prepare(test))
    matrix = np.asarray(sums["confusion"]).reshape(10, 10)
    return float(matrix[label, label] / matrix[label].sum())


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=0, help="0 = as the scenario says")
    given = parser.parse_args()
    table = Table("", "recall of the owned class", "accuracy", "recalls by seed")
    mean: dict[str, float] = {}
    for name, case in CASES.items():
        found = [recall(case, seed, given.rounds) for seed in range(given.seeds)]
        recalls, accuracies = zip(*found, strict=True)
        mean[name] = statistics.mean(recalls)
        by_seed = " ".join(f"{r:.2f}" for r in recalls)
        table.add_row(name, f"{mean[name]:.3f}", f"{statistics.mean(accuracies):.3f}", by_seed)
    Console().print(table)
    patient = mean["everybody is waited for"]
    gap, left = patient - mean["deadline"], patient - mean["deadline, corrected"]
    print(f"gap in recall: {gap:.3f} with the deadline, {left:.3f} corrected")
    return 0 if left <= gap / 2 else 1


if __name__ == "__main__":
    sys.exit(main())
