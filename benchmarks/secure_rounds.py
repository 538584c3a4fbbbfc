"""Seconds per round with and without secure aggregation: 10 devices, a model of 4 MB, TLS.

    python benchmarks/secure_rounds.py               # about five minutes
    python benchmarks/secure_rounds.py --quick

One ``lepton server`` and real ``lepton client run`` processes, enrolled over TLS, their signing keys
certified. Runs with ``secure_aggregation`` "off" and "required" (32 and 16 bits) take turns on the same
fleet; seconds are those between two ``round.committed`` events, medians without the first two rounds of each
run, in which keys are not made ahead yet. Training is next to nothing, so nothing is hidden behind it: the
difference is the whole price of the protocol. CPU is that of all processes per round.
"""

import argparse
import os
import sys
import time

from _fleet import Lepton, gaps, median
from _million import SIZE
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.table import Table

from lepton_fl.crypto import save_signing_key
from lepton_server.store import open_store

SECURE = 'secure_aggregation = "required"\nsecure = {{min_cohort = {devices}, bits = {bits}}}\n'
PLAIN = 'clip_norm = 1.0\nweighting = "equal"\n'


def settings(devices: int) -> dict[str, str]:
    """What is compared, as TOML of a run; everything else is the same."""
    return {
        "off": PLAIN,
        "required, 32 bits": PLAIN + SECURE.format(devices=devices, bits=32),
        "required, 16 bits": PLAIN + SECURE.format(devices=devices, bits=16),
    }


def one_run(fleet: Lepton, devices: int, rounds: int, more: str) -> tuple[list[float], float]:
    """Seconds of the rounds but the first two, and processor seconds per round."""
    run_id = fleet.queue(devices, rounds, more)
    with open_store(fleet.store_url) as store:

        def committed() -> list[float]:
            return [e.time for e in store.events(kinds=("round.committed",), subject=run_id)]

        fleet.wait(lambda: len(committed()) >= 2 or store.run(run_id).finished, 300, "the second round")
        first, cpu = len(committed()), fleet.cpu_s()
        fleet.wait(lambda: store.run(run_id).finished, 60 + 20 * rounds, "the run")
        cpu = fleet.cpu_s() - cpu
        times, run = committed(), store.run(run_id)
    if run.state != "completed" or len(times) != rounds:
        raise RuntimeError(f"the run {run.state} after {len(times)} rounds: {run.reason}")
    return gaps(times)[1:], cpu / max(1, rounds - first)


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--devices", type=int, default=10)
    args = parser.parse_args()
    console, devices = Console(), args.devices
    cycles, rounds = (1, 8) if args.quick else (3, 12)
    seconds: dict[str, list[float]] = {name: [] for name in settings(devices)}
    cpu: dict[str, list[float]] = {name: [] for name in settings(devices)}
    with Lepton() as fleet:
        key = fleet.folder / "authority.key"
        save_signing_key(key, Ed25519PrivateKey.generate())
        with open(fleet.config, "a", encoding="utf-8") as file:
            file.write(f'[authority]\nkey_file = "{key}"\n')
        fleet.serve()
        token = fleet.token(devices)
        for number in range(devices):
            fleet.device(number, token, LEPTON__CLIENT__LEAST_COHORT="4")
        for cycle in range(cycles):
            for name, more in settings(devices).items():
                began = time.monotonic()
                found, used = one_run(fleet, devices, rounds, more)
                seconds[name] += found
                cpu[name].append(used)
                load, took = os.getloadavg()[0], time.monotonic() - began
                console.print(
                    f"cycle {cycle + 1}: {name}: {median(found):.2f} s, {took:.0f} s, load {load:.1f}"
                )
    table = Table(title=f"{devices} devices, {SIZE * 4 / 1e6:g} MB model, TLS, {os.cpu_count()} cores")
    for column in ("secure aggregation", "median s", "fastest", "slowest", "rounds", "CPU s/round", "of off"):
        table.add_column(column, justify="right")
    base = median(seconds["off"])
    for name, found in seconds.items():
        figures = (median(found), min(found), max(found))
        table.add_row(
            name, *(f"{f:.2f}" for f in figures), str(len(found)),
            f"{median(cpu[name]):.2f}", f"{median(found) / base:.2f}",
        )  # fmt: skip
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
