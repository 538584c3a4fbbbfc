"""Our engine at the benchmark's work, through the public API; in a process of its own.

python -m _simulation.ours SCENARIO.json OUT
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def scenario(
    model: str, work: Path, cohort: int, rounds: int, workers: int, run: Mapping[str, Any]
) -> dict[str, Any]:
    """The scenario of one measurement, as JSON; ``run`` holds further settings of the run."""
    return {
        "run": {
            "task": f"_simulation.task:{model}",
            "rounds": rounds,
            "cohort": {"size": cohort},
            "local": {"learning_rate": 0.1, "batch_size": 10, "epochs": 1},
            "weighting": "equal",
            "evaluate_every": 0,
            **run,
        },
        "data": {"folder": str(work), "partition": {"kind": "natural"}},
        "engine": {"workers": workers},
    }


def main(path: str, out: str) -> None:
    """Run and write the record."""
    from _simulation.work import Record
    from lepton_simulations.api import run_scenario
    from lepton_simulations.config import SimulationConfig

    record = Record()
    config = SimulationConfig.model_validate(json.loads(Path(path).read_text()))
    result = run_scenario(config, on_round=lambda row: None if row.metrics else record.commit())
    if result.verdict.outcome != "completed":
        raise SystemExit(result.verdict.reason)
    record.save(Path(out), result.model)


if __name__ == "__main__":
    main(*sys.argv[1:])
