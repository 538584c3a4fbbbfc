"""Accuracy against uplink bytes under secure aggregation: updates in 32, 16, 8, 4 and 2 bits.

    python benchmarks/update_bits.py --data FOLDER [--task fashion_mnist] [--seeds 3] [--plot FILE]
    python benchmarks/update_bits.py --data FOLDER --own              # much longer

Each task is the scenario ``simulations/<task>.toml`` with secure aggregation and a clip norm, trained for 30
rounds by plain averaging, with a perceptron of two hidden layers (199,210 parameters for 28 x 28 pixels);
with ``--own`` it is the scenario's own model, server optimiser and number of rounds.

Bytes are those of a device's whole part in a round, the protocol's messages included, as mean over all
rounds: the first one is sent in 16 bits or more. "fewer" is against the bare float32 array. Sums are those of
the ideal functionality; two rounds go through real masks as well, and their weights and bytes are held
against it.
"""

import argparse
import json
import os
import sys
import time
import tomllib
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any

from lepton_fl.tasks.task import Task, load_task
from lepton_simulations.api import Result, run_scenario
from lepton_simulations.config import SimulationConfig

SCENARIOS = Path(__file__).parent.parent / "simulations"
TASKS = ("fashion_mnist", "mnist_by_writer")
CLIP = 10.0  # far above the norms that come
SCHEMES: dict[str, dict[str, Any]] = {
    "32 bits": {},
    "16 bits, rotated": {"secure": {"bits": 16}},
    "8 bits, tuned ring": {"quantisation": {"bits": 8}},
    "4 bits, tuned ring": {"quantisation": {"bits": 4}},
    "2 bits, tuned ring": {"quantisation": {"bits": 2}},
}


@dataclass(frozen=True)
class Line:
    """One run."""

    task: str
    scheme: str
    seed: int
    accuracy: float  # mean of the last three evaluations
    bytes_up: float  # of a device in a round
    fewer: float  # than the bare float32 array
    ring: float  # bits of a coordinate on the wire, after the first round
    error: float  # measured, mean over the rounds after the first
    lost: int  # attempts whose sum had left its ring
    seconds: float


def perceptron(task: str) -> Task:
    """The same data for a smaller model."""
    return replace(load_task(task), model=partial(_mlp, load_task(task).contract.shape))


def _mlp(shape: tuple[int, ...]) -> Any:  # noqa: ANN401 - torch is imported late
    from lepton_fl.tasks.models import MLP

    return MLP(prod(shape), 10, (200, 200))


def scenario(
    task: str, folder: Path, scheme: str, seed: int, options: argparse.Namespace
) -> SimulationConfig:
    """The task's scenario, in so many bits."""
    body = tomllib.loads((SCENARIOS / f"{task}.toml").read_text(encoding="utf-8"))
    run, secure = body["run"], {"min_cohort": 16}
    run |= {"clip_norm": CLIP, "weighting": "equal", "secure_aggregation": "required", "seed": seed}
    run |= {k: v for k, v in SCHEMES[scheme].items() if k != "secure"}
    run["secure"] = secure | SCHEMES[scheme].get("secure", {})
    if not options.own:
        run |= {"rounds": 30, "server": {}}
    run["rounds"] = options.rounds or run["rounds"]
    run["evaluate_every"] = min(run.get("evaluate_every", 1), max(1, run["rounds"] // 5))
    run.get("early_stop", {}).pop("target", None)
    body["data"] |= {"folder": str(folder), "seed": seed}
    body["engine"] = body.get("engine", {}) | {"secure_aggregation": "ideal", "seed": seed}
    if not options.own:
        body["engine"]["tier"] = "lean"
    return SimulationConfig.model_validate(body)


def line(task: str, folder: Path, scheme: str, seed: int, options: argparse.Namespace) -> Line:
    """Train once."""
    began = time.perf_counter()
    model = None if options.own else perceptron(task)
    result = run_scenario(scenario(task, folder, scheme, seed, options), task=model)
    if result.verdict.outcome != "completed":
        raise SystemExit(f"{task}, {scheme}: {result.verdict.reason}")
    rows, size = result.rows, result.layout.size
    watched = [v for row in rows if (v := row.metric("accuracy")) is not None][-3:]
    sent = sum(row.bytes_up for row in rows) / sum(row.reports for row in rows)
    later = [row for row in rows[1:] if row.measured_error is not None]
    return Line(
        task,
        scheme,
        seed,
        fmean(watched),
        sent,
        4 * size / sent,
        fmean(row.ring_bits or 0 for row in later) if later else 32.0 if scheme == "32 bits" else 16.0,
        fmean(row.measured_error or 0 for row in later) if later else 0.0,
        sum(row.attempts - 1 for row in rows),
        time.perf_counter() - began,
    )


def masked(task: str, folder: Path, options: argparse.Namespace) -> tuple[Result, Result]:
    """Two rounds in 4 bits through the real protocol, and through the ideal functionality."""
    short = argparse.Namespace(own=options.own, rounds=2)
    config, model = (
        scenario(task, folder, "4 bits, tuned ring", 0, short),
        None if options.own else perceptron(task),
    )
    engine = config.engine.model_copy(update={"secure_aggregation": "full"})
    real = run_scenario(config.model_copy(update={"engine": engine}), task=model)
    return real, run_scenario(config, task=model)


def plot(lines: list[Line], path: Path) -> None:
    """Accuracy lost against how many times fewer bytes: one curve a task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for task in dict.fromkeys(entry.task for entry in lines):
        points = [summary([e for e in lines if e.task == task and e.scheme == s]) for s in SCHEMES]
        base = points[0]["accuracy"]
        x, y = [p["fewer"] for p in points], [100 * (p["accuracy"] - base) for p in points]
        axes.plot(x, y, marker="o", label=task)
        for scheme, a, b in zip(SCHEMES, x, y, strict=True):
            axes.annotate(
                scheme.partition(",")[0], (a, b), textcoords="offset points", xytext=(4, 5), fontsize=8
            )
    axes.axhline(-0.3, linestyle=":", color="grey", label="0.3 points")
    axes.axvline(3.5, linestyle="--", color="grey", label="3.5 times")
    axes.set_xlabel("times fewer uplink bytes than float32, the protocol's included")
    axes.set_ylabel("points of accuracy against 32 bits")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def summary(lines: list[Line]) -> dict[str, float]:
    """Means over the seeds."""
    names = ("accuracy", "bytes_up", "fewer", "ring", "error", "lost", "seconds")
    return {name: fmean(getattr(entry, name) for entry in lines) for name in names}


def main() -> int:
    """The exit code: 1 where no scheme has 3.5 times fewer bytes within 0.3 points."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("LEPTON_DATA"))
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--scheme", choices=SCHEMES, action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--own", action="store_true", help="the scenario's own model, optimiser and rounds")
    parser.add_argument("--rounds", type=int, default=0, help="0 = 30, or the scenario's own")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    if options.data is None:
        parser.error("name the folder of the data sets with --data or LEPTON_DATA")
    lines: list[Line] = []
    for task in options.task or TASKS:
        for seed in range(options.seeds):
            for scheme in options.scheme or SCHEMES:
                lines.append(line(task, options.data, scheme, seed, options))
                print(f"{task}, seed {seed}: {lines[-1]}", flush=True)
        full, ideal = masked(task, options.data, options)
        sent = [
            sum(r.bytes_up for r in result.rows) / sum(r.reports for r in result.rows)
            for result in (full, ideal)
        ]
        same = "the same weights" if full.weights_sha256 == ideal.weights_sha256 else "OTHER WEIGHTS"
        print(
            f"{task}, two masked rounds: {same}; {sent[0]:,.0f} bytes a device, the ideal says {sent[1]:,.0f}"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(entry) for entry in lines], indent=2), encoding="utf-8")
    print("\n| task | scheme | accuracy | points | bytes a round | fewer | ring bits | error | lost |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    reached: dict[str, bool] = defaultdict(bool)
    for task in dict.fromkeys(entry.task for entry in lines):
        base = None
        for scheme in dict.fromkeys(entry.scheme for entry in lines):
            found = summary([e for e in lines if e.task == task and e.scheme == scheme])
            base = base or found["accuracy"]
            points = 100 * (found["accuracy"] - base)
            reached[task] |= found["fewer"] >= 3.5 and points >= -0.3
            print(
                f"| {task} | {scheme} | {100 * found['accuracy']:.2f} | {points:+.2f} | "
                f"{found['bytes_up']:,.0f} | {found['fewer']:.2f} | {found['ring']:.0f} | "
                f"{found['error']:.3f} | {found['lost']:.1f} |"
            )
    if options.plot:
        plot(lines, options.plot)
    return 0 if all(reached.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
