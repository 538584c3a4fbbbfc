"""Seconds per round with 2 and 10 devices and a model of 4 MB over TLS, against stock Flower 1.41.

    python benchmarks/rounds.py               # about six minutes
    python benchmarks/rounds.py --quick       # fewer rounds, about three
    python benchmarks/rounds.py --no-stock

Ours: one ``lepton server`` process and real ``lepton client run`` processes, enrolled over TLS; seconds are
those between two ``round.committed`` events of the journal. Stock: ``flower-superlink``, ``flower-supernode``
processes and ``flwr run`` of a FedAvg app over TLS; seconds are those between two aggregations. The work on a
device is next to nothing on both sides, there is no evaluation, no two updates are alike. Medians without the
first round; CPU is what all processes of a side used from the second round on, per round.

Exit code 1 if a target (0.5 s with 2 devices, 1.2 s with 10) is missed.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass

from _fleet import Lepton, StockFlower, gaps, median
from _million import SIZE
from rich.console import Console
from rich.table import Table

TARGETS = {2: 0.5, 10: 1.2}  # seconds per round, by devices
STOCK_ROUND_S = 60.0  # patience with one round of stock Flower


@dataclass(frozen=True)
class Result:
    """Seconds of each round after the first, and processor seconds per round of all processes."""

    seconds: list[float]
    cpu_s: float


def lepton(devices: int, rounds: int) -> Result:
    """Measure our side."""
    from lepton_server.store import open_store

    with Lepton() as fleet:
        fleet.serve()
        token = fleet.token(devices)
        for number in range(devices):
            fleet.device(number, token)
        run_id = fleet.queue(devices, rounds)
        with open_store(fleet.store_url) as store:

            def committed() -> list[float]:
                return [e.time for e in store.events(kinds=("round.committed",), subject=run_id)]

            fleet.wait(lambda: bool(committed()) or store.run(run_id).finished, 180, "our first round")
            first, cpu = len(committed()), fleet.cpu_s()
            fleet.wait(lambda: store.run(run_id).finished, 10 + 10 * rounds, "our run")
            cpu = fleet.cpu_s() - cpu
            times, run = committed(), store.run(run_id)
        if run.state != "completed" or len(times) != rounds:
            raise RuntimeError(f"our run {run.state} after {len(times)} rounds: {run.reason}")
    return Result(gaps(times), cpu / max(1, rounds - first))


def stock(nodes: int, rounds: int) -> Result:
    """Measure stock Flower."""
    with StockFlower() as fleet:
        fleet.serve(nodes)
        path = fleet.submit(nodes, rounds, SIZE)

        def lines() -> list[str]:
            return path.read_text().splitlines() if path.exists() else []

        fleet.wait(lambda: bool(lines()), 180, "stock Flower's first round")
        first, cpu = len(lines()), fleet.cpu_s()
        fleet.wait(lambda: len(lines()) >= rounds, STOCK_ROUND_S * rounds, "stock Flower's rounds")
        cpu = fleet.cpu_s() - cpu
        fields = [line.split() for line in lines()]
    if any(int(replies) != nodes for _, replies in fields):
        raise RuntimeError(f"stock Flower lost replies: {fields}")
    return Result(gaps([float(moment) for moment, _ in fields]), cpu / max(1, rounds - first))


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--stock", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--devices", type=int, nargs="+", default=list(TARGETS))
    args = parser.parse_args()
    console, good = Console(), True
    table = Table(title=f"Seconds per round, {SIZE * 4 / 1e6:g} MB each way, TLS, {os.cpu_count()} cores")
    for column in ("devices", "", "median s", "fastest", "slowest", "rounds", "CPU s/round", "load"):
        table.add_column(column, justify="right")
    for devices in args.devices:
        sides = {"lepton": (lepton, 11 if args.quick else 31)}
        if args.stock:
            sides["stock Flower"] = (stock, 3 if args.quick else 6)
        medians = {}
        for name, (measure, rounds) in sides.items():
            console.print(f"{name}, {devices} devices …")
            began = time.monotonic()
            result = measure(devices, rounds)
            medians[name] = median(result.seconds)
            figures = [medians[name], min(result.seconds), max(result.seconds)]
            load = f"{os.getloadavg()[0]:.1f}"
            table.add_row(
                str(devices), name, *(f"{f:.2f}" for f in figures), str(len(result.seconds)),
                f"{result.cpu_s:.2f}", load,
            )  # fmt: skip
            console.print(f"  {medians[name]:.2f} s per round; {time.monotonic() - began:.0f} s in all")
        if len(medians) == 2:
            ratio = medians["stock Flower"] / medians["lepton"]
            table.add_row(str(devices), "stock / lepton", f"{ratio:.1f}x", end_section=True)
        good &= medians["lepton"] <= TARGETS.get(devices, float("inf"))
    console.print(table)
    bounds = ", ".join(f"{seconds:g} s with {devices} devices" for devices, seconds in TARGETS.items())
    console.print(f"{'met' if good else 'MISSED'}: at most {bounds}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
