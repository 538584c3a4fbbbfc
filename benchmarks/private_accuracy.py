"""Accuracy under device-level privacy: correlated and independent noise, noise of the devices, pre-training.

    python benchmarks/private_accuracy.py --data FOLDER           # five seeds: half an hour
    python benchmarks/private_accuracy.py --data FOLDER --seeds 1 --epsilon 20
    python benchmarks/private_accuracy.py --data FOLDER --kept runs.jsonl    # can be ended and goes on there
    python benchmarks/private_accuracy.py --kept runs.jsonl --report         # the table of what is there

``simulations/private_writers.toml`` (539 writers of MNIST, 100 rounds of 100, MLP 784-64-10, delta 1e-3) run
by the simulation engine, with the same seeds for every kind of noise; accuracy is that of the last round, on
297 writers who train nowhere. Each kind of noise has the server learning rate that suits it: the best of
0.25, 0.35, 0.5, 0.7 and 1 on a seed that is not among those reported (``RATES``). Everything else is the
scenario's.

``skellam`` and ``ddgauss`` are independent noise that the devices add within secure sums of 18 bits, without
drop-outs, at the rate of independent noise: what distributed trust costs, to be within 0.3 points.

``pretrained`` starts from a model that was trained on ``fashion_mnist``, which is public here: its hidden
layer is kept, the last one starts at zero. That costs no privacy.

Exit code 1 if a target is missed, correlated noise is not above independent noise for some seed, or noise of
the devices is more than 0.3 points from independent noise at the coordinator.
"""

import argparse
import os
import statistics
import sys
import time
import tomllib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _kept import Kept, digest
from torch import nn

from lepton_fl.plan import LocalPlan
from lepton_fl.tasks import Task, load_task
from lepton_fl.training.bridge import load_vector
from lepton_fl.training.trainer import Trainer
from lepton_simulations.api import run_scenario
from lepton_simulations.config import SimulationConfig

SCENARIO = Path(__file__).parent.parent / "simulations" / "private_writers.toml"
KINDS = ("blt", "independent", "skellam", "ddgauss", "pretrained")
USUAL = ("blt", "independent", "skellam", "pretrained")
DISTRIBUTED = ("skellam", "ddgauss")
RATES = {  # (kind, epsilon) -> server learning rate, found with --first-seed 1000 --rate
    ("blt", 20.0): 0.7,
    ("blt", 50.0): 0.7,
    ("independent", 20.0): 0.25,
    ("independent", 50.0): 0.5,
    ("pretrained", 20.0): 0.5,
    ("pretrained", 50.0): 0.7,
}
TARGETS = {20.0: 0.935, 50.0: 0.95}  # of correlated noise
NEAR = 0.003  # of central noise, for noise of the devices


@dataclass(frozen=True)
class Outcome:
    """One run."""

    kind: str
    epsilon: float
    seed: int
    rate: float
    accuracy: float


def settings_of(kind: str, epsilon: float, seed: int, rate: float) -> dict[str, Any]:
    """What an outcome is kept under."""
    scenario = digest(SCENARIO.read_bytes())
    return {"kind": kind, "epsilon": epsilon, "seed": seed, "rate": rate, "scenario": scenario}


def rate_of(kind: str, epsilon: float) -> float:
    """The server learning rate that suits a kind of noise."""
    return RATES["independent" if kind in DISTRIBUTED else kind, epsilon]


def train(
    kind: str, epsilon: float, seed: int, folder: Path, task: Task, rate: float, workers: int
) -> dict[str, Any]:
    """One run of the scenario."""
    began = time.perf_counter()
    body = tomllib.loads(SCENARIO.read_text(encoding="utf-8"))
    mechanism = "blt" if kind == "pretrained" else kind
    body["run"]["privacy"] |= {"mechanism": mechanism, "epsilon": epsilon}
    if kind in DISTRIBUTED:
        body["run"]["privacy"] |= {"trust": "distributed", "bits": 18, "min_survivors": 1.0}
        body["run"]["secure_aggregation"] = "required"
    body["run"] |= {"seed": seed, "evaluate_every": 10}
    body["run"]["server"]["learning_rate"] = rate
    body["data"] |= {"folder": str(folder)}
    body["engine"] = {"seed": seed, "workers": workers}
    result = run_scenario(SimulationConfig.model_validate(body), task=task)
    found = [value for row in result.rows if (value := row.metric("accuracy")) is not None]
    return {"accuracy": found[-1], "best": max(found), "seconds": time.perf_counter() - began}


def pretrained(task: Task, folder: Path) -> Task:
    """The task, starting from what a model of the same shape learns on ``fashion_mnist``."""
    public = load_task("fashion_mnist")
    assert public.data is not None
    rows = public.prepare(public.data(folder).train)
    trainer = Trainer(replace(task, transform=public.transform))
    start = trainer.initial(0)
    local = LocalPlan(optimizer="adam", learning_rate=1e-3, batch_size=128, epochs=10)
    model = start + trainer.train(start, rows, local, seed=0).delta
    return replace(task, model=partial(_begun, task, trainer, model))


def _begun(task: Task, trainer: Trainer, model: object) -> nn.Module:
    module = task.model()
    load_vector(module, trainer.layout, model)  # type: ignore[arg-type]  # a Vector
    last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return module


def main() -> None:
    """Run and print a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("LEPTON_DATA"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epsilon", type=float, action="append")
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--rate", type=float, help="another server learning rate")
    parser.add_argument("--kept", type=Path, help="file of outcomes: those in it are not computed again")
    parser.add_argument("--report", action="store_true", help="compute nothing, only show what is kept")
    parser.add_argument("--workers", type=int, default=0, help="processes besides this one; 0 = none")
    options = parser.parse_args()
    if options.data is None and not options.report:
        parser.error("name the folder of the data sets with --data or LEPTON_DATA")
    torch.set_num_threads(1)
    kept, tasks, outcomes = Kept(options.kept), {}, []
    for kind, epsilon, seed in jobs(options):
        rate = options.rate or rate_of(kind, epsilon)
        settings = settings_of(kind, epsilon, seed, rate)
        found = kept.find(settings)
        if found is None:
            if options.report:
                continue
            if kind not in tasks:
                tasks[kind] = task_of(kind, Path(options.data))
            found = train(kind, epsilon, seed, Path(options.data), tasks[kind], rate, options.workers)
            kept.add(settings, found)
            print(settings, found, flush=True)
        outcomes.append(Outcome(kind, epsilon, seed, rate, found["accuracy"]))
    sys.exit(report(outcomes))


def jobs(options: argparse.Namespace) -> list[tuple[str, float, int]]:
    """Seed by seed, so that what is there can be compared; pre-training decides nothing and comes last."""
    wanted, seeds = options.kind or USUAL, range(options.first_seed, options.first_seed + options.seeds)
    found = []
    for group in ([k for k in wanted if k != "pretrained"], [k for k in wanted if k == "pretrained"]):
        for seed in seeds:
            found += [(kind, eps, seed) for eps in options.epsilon or sorted(TARGETS) for kind in group]
    return found


def task_of(kind: str, folder: Path) -> Task:
    """The task, and the model it starts from."""
    plain = load_task("lepton_fl.tasks.images:mnist_by_writer_mlp")
    return pretrained(plain, folder) if kind == "pretrained" else plain


def report(outcomes: list[Outcome]) -> int:
    """Print mean and standard deviation of each kind; return the exit code."""
    print("\n| epsilon | noise | accuracy, % | sd | seeds | lowest | beside independent, same seeds |")
    print("|--:|--|--:|--:|--:|--:|--|")
    missed = False
    for epsilon in sorted({o.epsilon for o in outcomes}):
        alone = {
            o.seed: 100 * o.accuracy for o in outcomes if (o.kind, o.epsilon) == ("independent", epsilon)
        }
        for kind in KINDS:
            mine = {o.seed: 100 * o.accuracy for o in outcomes if (o.kind, o.epsilon) == (kind, epsilon)}
            if not mine:
                continue
            mean, values = statistics.mean(mine.values()), list(mine.values())
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            figures = f"{mean:.2f} | {spread:.2f} | {len(values)} | {min(values):.2f}"
            gains = [value - alone[seed] for seed, value in mine.items() if seed in alone]
            said, bad = compared(kind, gains)
            print(f"| {epsilon:g} | {kind} | {figures} | {said} |")
            missed |= bad or (kind in ("blt", "pretrained") and mean < 100 * TARGETS.get(epsilon, 0))
    return int(missed)


def compared(kind: str, gains: list[float]) -> tuple[str, bool]:
    """What is said of a kind beside independent noise, gains in points; and whether that misses a target."""
    if kind == "independent" or not gains:
        return "", False
    said = f"{statistics.mean(gains):+.2f}, above on {sum(g > 0 for g in gains)} of {len(gains)} seeds"
    if kind in DISTRIBUTED:
        return said, abs(statistics.mean(gains)) > 100 * NEAR
    return said, min(gains) <= 0


if __name__ == "__main__":
    main()
