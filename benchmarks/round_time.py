"""Predicted seconds per round against a real fleet of 20 processes on this machine.

    python benchmarks/round_time.py                       # digits, about five minutes
    python benchmarks/round_time.py --quick
    python benchmarks/round_time.py --task mnist_by_writer --data FOLDER

One ``lepton server`` and 20 ``lepton client run`` processes over TLS train for real. Short runs, of little
and of much local work, are exported with ``lepton run journal`` and calibrate a virtual fleet whose devices
share this machine's cores. It then says how long rounds of other settings (cohort, epochs) take, and the
real fleet does them. All settings take turns, so that whatever else this machine does disturbs all alike;
medians without each run's first round.

Exit code 1 if a prediction is off by more than 15 %.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _fleet import Lepton, median
from rich.console import Console
from rich.table import Table

from lepton_fl.plan import RunSpec
from lepton_fl.tasks.federated import FederatedDataset, federated_dataset
from lepton_fl.tasks.partition import PartitionSpec
from lepton_fl.tasks.task import load_task
from lepton_simulations.world import Replay, World, WorldConfig
from lepton_simulations.world.calibrate import calibrate, round_seconds

DEVICES = 20
TARGET = 0.15  # relative error
RUN_S = 300.0  # patience with one run


@dataclass(frozen=True)
class Setting:
    """What is varied."""

    epochs: int
    cohort: int

    def __str__(self) -> str:
        return f"{self.cohort} devices, {self.epochs} epochs"

    def spec(self, task: str, rounds: int) -> RunSpec:
        """The run; nobody is left out, so that every round is of the same work."""
        local = load_task(task).local.model_copy(update={"epochs": self.epochs, "max_steps": 0})
        cohort = {"size": self.cohort, "min_reports": self.cohort, "fill_wait_s": 60.0, "deadline_s": 300.0}
        return RunSpec(task=task, rounds=rounds, evaluate_every=0, local=local, cohort=cohort)


LEARNT = (Setting(2, 20), Setting(20, 8))
PREDICTED = (Setting(10, 14), Setting(15, 20), Setting(5, 10))


class Fleet(Lepton):
    """A coordinator and devices that hold rows of a real data set."""

    def join(self, data: FederatedDataset, clients: Sequence[str]) -> None:
        """Enrol and start a device for each client."""
        token = self.token(len(clients))
        for number, client in enumerate(clients):
            raw, name = data.raw(client), f"device{number}"
            np.savez(self.folder / f"{name}.npz", x=raw.x, y=raw.y)
            state, source = self.folder / name, self.folder / f"{name}.npz"
            self.call("lepton", "client", "enroll", "--token", token, "--state-dir", state, "--name", name)
            own = ("--state-dir", state, "--task", data.task.name, "--data", source)
            self.start(name, "lepton", "client", "run", *own, LEPTON__LIMITS__NICE="0")

    def train(self, spec: RunSpec) -> Replay:
        """One run from its start to its end, as exported."""
        path = self.folder / "run.toml"
        path.write_text(_toml({"run": spec.model_dump(mode="json", exclude_defaults=True)}))
        started = self.call("lepton", "run", "start", path, "-c", self.config, "--format", "json")
        run_id = json.loads(started)["id"]
        self.call("lepton", "run", "watch", run_id, "--timeout", RUN_S, "-c", self.config)
        exported = self.folder / f"{run_id}.jsonl"
        self.call("lepton", "run", "journal", run_id, "--output", exported, "-c", self.config)
        return Replay.read(exported)


def _toml(tables: dict[str, object]) -> str:
    """Nested tables of plain values."""
    lines: list[str] = []

    def write(name: str, table: dict[str, object]) -> None:
        lines.append(f"[{name}]")
        inner = {k: v for k, v in table.items() if isinstance(v, dict)}
        lines.extend(f"{k} = {json.dumps(v)}" for k, v in table.items() if k not in inner)
        for key, value in inner.items():
            write(f"{name}.{key}", value)

    for name, table in tables.items():
        assert isinstance(table, dict)
        write(name, table)
    return "\n".join(lines) + "\n"


def measure(
    task: str, folder: Path | None, cycles: int, rounds: int, keep: Path | None, console: Console
) -> bool:
    """Run everything and print the table; whether all predictions are good."""
    data = federated_dataset(task, folder, PartitionSpec(kind="iid", clients=DEVICES), seed=0)
    learnt: list[Replay] = []
    real: dict[Setting, list[float]] = {setting: [] for setting in (*LEARNT, *PREDICTED)}
    with Fleet() as fleet:
        fleet.serve()
        fleet.join(data, data.clients)
        # Everybody loads what it needs, and says on how many rows it trains: it keeps some for evaluation.
        rows = fleet.train(Setting(1, DEVICES).spec(task, 3)).rows
        for cycle in range(cycles):
            for setting in real:
                replay = fleet.train(setting.spec(task, rounds))
                seconds = [a.seconds for a in replay.attempts if a.committed and a.round > 1]
                real[setting] += seconds
                if setting in LEARNT:
                    learnt.append(replay)
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(replay.path, keep / f"{cycle}-{setting.cohort}-{setting.epochs}.jsonl")
                console.print(f"cycle {cycle + 1}: {setting}: {median(seconds):.2f} s, {_load()}")
    devices = calibrate(learnt, shared_cores=float(os.cpu_count() or 1))
    (one,) = devices.classes
    console.print(
        f"calibrated: {one.speed.value:.0f} examples/s, {one.overhead_s.value * 1e3:.0f} ms per device, "
        f"{2e3 * one.latency_s.value:.0f} ms per round, {devices.shared_cores:g} cores"
    )
    table = Table(title=f"Seconds per round, {DEVICES} processes, {task}, {os.cpu_count()} cores")
    for column in ("", "setting", "predicted s", "measured s", "rounds", "ratio"):
        table.add_column(column, justify="right")
    good = True
    for setting, seconds in real.items():
        world = World.build(WorldConfig(devices=devices), list(rows), seed=0)
        predicted = median(round_seconds(world, setting.spec(task, 50), rows))
        ratio = predicted / median(seconds)
        if setting in PREDICTED:
            good &= abs(ratio - 1) <= TARGET
        name = "predicted" if setting in PREDICTED else "learnt"
        figures = (f"{predicted:.2f}", f"{median(seconds):.2f}", str(len(seconds)), f"{ratio:.2f}")
        table.add_row(name, str(setting), *figures)
    console.print(table)
    return good


def _load() -> str:
    return f"load {os.getloadavg()[0]:.1f}"


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="digits")
    parser.add_argument("--data", type=Path, help="folder of the task's data set")
    parser.add_argument("--keep", type=Path, help="folder for the exported journals")
    parser.add_argument("--quick", action="store_true", help="one cycle of few rounds")
    args = parser.parse_args()
    console, began = Console(), time.monotonic()
    cycles, rounds = (1, 4) if args.quick else (4, 5)
    good = measure(args.task, args.data, cycles, rounds, args.keep, console)
    console.print(
        f"{'met' if good else 'MISSED'}: within {TARGET:.0%}; {time.monotonic() - began:.0f} s in all"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
