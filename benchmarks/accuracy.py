"""Accuracy on real data: federated training of the ready tasks, to the targets in ``docs/benchmarks.md``.

    python benchmarks/accuracy.py --data FOLDER                   # every task
    python benchmarks/accuracy.py --data FOLDER --task beijing_air

Settings are those of ``simulations/<task>.toml``. Rounds run as in production: examples weight exact integer
sums, the server optimiser makes the step, and a run stops at its target. Two worker processes train.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lepton_fl.plan import LocalPlan, RunSpec
from lepton_fl.rounds.optimizers import ServerState, step
from lepton_fl.tasks.federated import FederatedDataset, federated_dataset
from lepton_fl.tasks.metrics import Sums
from lepton_fl.tasks.partition import PartitionSpec
from lepton_fl.training.trainer import Trainer
from lepton_fl.vector import Vector, to_grid

SCENARIOS = Path(__file__).parent.parent / "simulations"
TASKS = ("mnist_by_writer", "fashion_mnist", "beijing_air", "heart_disease", "shakespeare")
WORKERS = 2


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    task: str
    metric: str
    target: float
    reached: float
    rounds: int
    cohort: int
    seconds: float


# One fleet and one trainer per worker process, inherited or made at its start.
_fleet: FederatedDataset
_trainer: Trainer


def _start_worker(task: str, folder: Path, spec: PartitionSpec, seed: int) -> None:
    global _fleet, _trainer
    torch.set_num_threads(1)
    _fleet = federated_dataset(task, folder, spec, seed)
    _trainer = Trainer(_fleet.task)


def _train(job: tuple[Vector, LocalPlan, float, int, list[tuple[str, int]]]) -> tuple[NDArray[np.int64], int]:
    """The exact weighted sum of several clients' updates, and of their weights."""
    model, local, grid_step, max_weight, clients = job
    total, weights = np.zeros(len(model), np.int64), 0
    for client, seed in clients:
        result = _trainer.train(model, _fleet.train(client), local, seed=seed)
        weight = min(result.num_examples, max_weight)
        total += weight * to_grid(result.delta, grid_step).astype(np.int64)
        weights += weight
    return total, weights


def _evaluate(job: tuple[Vector, int, int]) -> Sums:
    model, part, parts = job
    rows = np.arange(part, len(_fleet.corpus.test), parts)
    return _trainer.evaluate(model, _fleet.task.transform(_fleet.corpus.test.take(rows)))


def _one_round(
    pool: Pool, spec: RunSpec, number: int, model: Vector, cohort: Iterable[str]
) -> NDArray[np.float64]:
    local = spec.local.model_copy(update={"learning_rate": spec.learning_rate(number)})
    seeded = [(client, 1_000_003 * number + i) for i, client in enumerate(cohort)]
    parts = max(1, min(len(seeded), 4 * WORKERS))
    jobs = [(model, local, spec.grid_step, spec.max_weight, seeded[i::parts]) for i in range(parts)]
    total, weights = np.zeros(len(model), np.int64), 0
    for part, weight in pool.imap_unordered(_train, jobs):
        total += part
        weights += weight
    return total * (spec.grid_step / weights)


def run(task: str, folder: Path, *, to_the_end: bool) -> Result:
    """Train one task until its target, or ``to_the_end`` of its rounds."""
    scenario = tomllib.loads((SCENARIOS / f"{task}.toml").read_text())
    spec = RunSpec(**scenario["run"])
    partition = PartitionSpec(**scenario["data"]["partition"])
    began = time.perf_counter()
    _start_worker(spec.task, folder, partition, spec.seed)
    clients, metrics = np.array(_fleet.clients), _fleet.task.metrics
    model, state = _trainer.initial(spec.seed), ServerState.initial(spec.server, _trainer.layout.size)
    rng = np.random.default_rng(spec.seed)
    stop = spec.early_stop
    target = stop.target if stop.target is not None else float("inf")
    figures: dict[str, float] = {}
    number = 0
    with multiprocessing.get_context("spawn").Pool(
        WORKERS, _start_worker, (spec.task, folder, partition, spec.seed)
    ) as pool:
        for number in range(1, spec.rounds + 1):
            cohort = rng.choice(clients, min(spec.cohort.size, len(clients)), replace=False)
            mean = _one_round(pool, spec, number, model, cohort.tolist())
            model, state = step(spec.server, model, mean, state)
            if number % max(1, spec.evaluate_every) and number < spec.rounds:
                continue
            sums = metrics.zero()
            for part in pool.map(_evaluate, [(model, i, WORKERS) for i in range(WORKERS)]):
                sums = metrics.add(sums, part)
            figures = metrics.summarise(sums)
            took = time.perf_counter() - began
            print(
                f"{task} round {number:4d} {stop.metric} {figures[stop.metric]:.4f} {took:6.1f} s", flush=True
            )
            if figures[stop.metric] >= target and not to_the_end:
                break
    seconds = time.perf_counter() - began
    cohort_size = min(spec.cohort.size, len(clients))
    return Result(task, stop.metric, target, figures[stop.metric], number, cohort_size, seconds)


def main() -> None:
    """Run and print a table in Markdown; the exit code is 1 where a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("LEPTON_DATA"))
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--to-the-end", action="store_true", help="do not stop at the target")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    if options.data is None:
        parser.error("name the folder of the data sets with --data or LEPTON_DATA")
    results = [run(task, Path(options.data), to_the_end=options.to_the_end) for task in options.task or TASKS]
    print("\n| task | metric | target | reached | rounds | devices per round | seconds |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for r in results:
        print(
            f"| {r.task} | {r.metric} | {r.target:g} | {r.reached:.4f} "
            f"| {r.rounds} | {r.cohort} | {r.seconds:.0f} |"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=2))
    sys.exit(any(r.reached < r.target for r in results))


if __name__ == "__main__":
    main()
