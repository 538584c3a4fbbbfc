"""Bytes of a model on its way down: as it is, packed, and packed as the difference to the round before.

    python benchmarks/downlink.py --data FOLDER [--rounds 20]

Two scenarios are trained for some rounds (``simulations/fashion_mnist.toml`` with its own CNN,
``simulations/mnist_by_writer.toml`` with a perceptron of 199,210 parameters), and every round's model goes
through what the coordinator packs and what a device unpacks, by their own code. Bytes are means over the
rounds; CPU is that of one model, packed in both forms, and unpacked from the difference.
"""

import argparse
import time
from pathlib import Path
from statistics import fmean, median
from unittest.mock import patch

from update_bits import perceptron, scenario

from lepton_fl.rounds import campaign
from lepton_fl.rounds.campaign import RunState
from lepton_fl.vector import Vector
from lepton_fl.wire.downlink import unpack
from lepton_server.flower import frames
from lepton_server.flower.forms import Forms
from lepton_simulations.api import run_scenario

TASKS = {"fashion_mnist": True, "mnist_by_writer": False}  # whether with the scenario's own model


def models(task: str, folder: Path, rounds: int) -> list[Vector]:
    """The global model of each round."""
    options = argparse.Namespace(own=TASKS[task], rounds=rounds)
    config = scenario(task, folder, "32 bits", 0, options)
    found: list[Vector] = []

    def advance(*parts: object, **named: object) -> RunState:
        state: RunState = real(*parts, **named)
        found.append(state.model.copy())
        return state

    real = campaign.advance
    with patch.object(campaign, "advance", advance):
        run_scenario(config, task=None if TASKS[task] else perceptron(task))
    return found


def line(task: str, found: list[Vector]) -> str:
    """One row of the table."""
    forms, before, figures = Forms(), dict[str, bytes](), []
    for model in found:
        chunks = frames.chunks_of(frames.shared_arrays({"model": model}))
        began = time.process_time()
        forms.make(task, chunks)
        packing, whole, change, unpacking, now = time.process_time() - began, 0, 0, 0.0, {}
        for name, frame in chunks.values():
            plain, alone = bytes(frame), forms.smallest(name, [])
            small = forms.smallest(name, list(before))
            whole, change = whole + len(alone or plain), change + len(small or plain)
            began = time.process_time()
            now[name] = unpack(small, name, before.get) if small else plain
            unpacking += time.process_time() - began
        figures.append((whole, change, packing, unpacking))
        before = now
    size, later = 4 * found[0].size, figures[1:]
    whole, change = fmean(f[0] for f in figures), fmean(f[1] for f in later)
    last = later[-1][1]
    packing, unpacking = median(f[2] for f in later), median(f[3] for f in later)
    packed = f"{whole:,.0f} ({whole / size:.3f})"
    difference = f"{change:,.0f} ({change / size:.3f}; last round {last / size:.3f})"
    cpu = f"{1e3 * packing:.1f} | {1e3 * unpacking:.1f}"
    return f"| {task}, {found[0].size:,} | {size:,} | {packed} | {difference} | {cpu} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    print("| task, parameters | plain | packed | difference | packing, ms CPU | unpacking, ms CPU |")
    print("|--|--:|--:|--:|--:|--:|")
    for task in TASKS:
        print(line(task, models(task, options.data, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
