"""Accuracy on real data: federated training of the ready tasks, to the targets in ``docs/benchmarks.md``.

    python benchmarks/accuracy.py --data FOLDER                      # every task
    python benchmarks/accuracy.py --data FOLDER --task beijing_air --to-the-end

Each task is the scenario ``simulations/<task>.toml`` run by the simulation engine, so by the code of a real
fleet; it stops at the scenario's target. Test rows are those of the published split: for ``mnist_by_writer``
297 writers who train nowhere, for the others later or other rows of every device.
"""

import argparse
import json
import os
import sys
import time
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

from lepton_simulations.api import run_scenario
from lepton_simulations.config import SimulationConfig
from lepton_simulations.rows import Row

SCENARIOS = Path(__file__).parent.parent / "simulations"
TASKS = ("mnist_by_writer", "fashion_mnist", "beijing_air", "heart_disease", "shakespeare")


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    task: str
    metric: str
    target: float
    reached: float  # at the last evaluation
    rounds: int
    cohort: int  # devices asked in a round
    seconds: float  # of wall time, reading the data included


def run(task: str, folder: Path, *, to_the_end: bool) -> Result:
    """Train one task until its target, or ``to_the_end`` of its rounds."""
    body = tomllib.loads((SCENARIOS / f"{task}.toml").read_text(encoding="utf-8"))
    body["data"]["folder"] = str(folder)
    config = SimulationConfig.model_validate(body)
    stop = config.run.early_stop
    if stop.target is None:
        raise SystemExit(f"{task}.toml names no early_stop.target")
    if to_the_end:
        free = config.run.model_copy(update={"early_stop": stop.model_copy(update={"target": None})})
        config = config.model_copy(update={"run": free})
    began = time.perf_counter()

    def show(row: Row) -> None:
        if (value := row.metric(stop.metric)) is not None:
            passed = time.perf_counter() - began
            print(f"{task}: round {row.round}, {stop.metric} {value:.4f}, {passed:.1f} s", flush=True)

    rows = run_scenario(config, on_round=show).rows
    values = [value for row in rows if (value := row.metric(stop.metric)) is not None]
    seconds = time.perf_counter() - began
    return Result(task, stop.metric, stop.target, values[-1], rows[-1].round, rows[-1].asked, seconds)


def main() -> None:
    """Run and print a table in Markdown; the exit code is 1 where a target was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("LEPTON_DATA"))
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--to-the-end", action="store_true", help="do not stop at the target")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    if options.data is None:
        parser.error("name the folder of the data sets with --data or LEPTON_DATA")
    tasks = options.task or TASKS
    results = [run(task, Path(options.data), to_the_end=options.to_the_end) for task in tasks]
    print("\n| task | metric | target | reached | rounds | devices per round | seconds |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for r in results:
        figures = f"{r.target:g} | {r.reached:.4f} | {r.rounds} | {r.cohort} | {r.seconds:.0f}"
        print(f"| {r.task} | {r.metric} | {figures} |")
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=2), encoding="utf-8")
    sys.exit(any(r.reached < r.target for r in results))


if __name__ == "__main__":
    main()
