"""Secure aggregation in a Flower app: what a round costs with the wrapper and without, and the model's error.

    python benchmarks/secagg_flower.py                    # 20 nodes, 1 M float32: some minutes
    python benchmarks/secagg_flower.py --nodes 16 --coordinates 100000 --rounds 5

Flower's own ``FedAvg`` and its message types, in one process: 20 nodes answer one after the other, training
is next to nothing, so the difference is the protocol (keys, shares, masks, signatures, hashes) and the larger
number of messages; no transport. Processor seconds per round of the server and all nodes together, median
without the first round, in which keys are not there ahead.

Exit code 1 if the models differ by more than the grid explains.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lepton_fl.rounds.cohort import Candidate

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Context, Message
    from flwr.clientapp import ClientApp


class Nodes:
    """A roster of nodes that are always there."""

    def __init__(self, count: int) -> None:
        self._ids = [str(1000 + i) for i in range(count)]

    def candidates(self) -> Sequence[Candidate]:
        """All of them."""
        return [Candidate(device, "eligible") for device in self._ids]

    def wait(self, seconds: float) -> None:
        """Nothing changes."""


def app_of(folder: Path, secure: bool) -> "ClientApp":
    """Nodes that move the model by something of their own."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    from lepton_strategies.keeper import NodeKeys
    from lepton_strategies.masking import secure_mod

    def keys(context: "Context") -> NodeKeys:
        return NodeKeys(folder / f"{context.node_config['partition-id']}.key", folder / "keys.txt")

    app = ClientApp(mods=[secure_mod(keys, keep="here")] if secure else [])

    @app.train()  # type: ignore[untyped-decorator]  # Flower's
    def train(message: "Message", context: "Context") -> "Message":
        place = int(context.node_config["partition-id"])
        model = message.content["arrays"]["w"].numpy()
        arrays = ArrayRecord({"w": Array(model + np.float32(1e-4 * (place + 1)))})
        metrics = MetricRecord({"num-examples": 1})
        return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def rounds_of(
    folder: Path, nodes: int, coordinates: int, rounds: int, secure: bool
) -> tuple[list[float], Any]:
    """Processor seconds of each round, and the model."""
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp.strategy import FedAvg

    from lepton_strategies import SecureAggregation
    from lepton_strategies.local_grid import AppNodes, LocalGrid
    from lepton_strategies.secure_keys import load_list

    inner = FedAvg(min_train_nodes=nodes, fraction_evaluate=0.0)
    strategy: Any = inner
    if secure:
        keys = load_list(folder / "keys.txt")
        strategy = SecureAggregation(inner, keys=keys, clip_norm=100.0, poll_s=0.0)
    stamps = [time.process_time()]

    def stamp(server_round: int, arrays: "ArrayRecord") -> None:
        stamps.append(time.process_time())

    grid = LocalGrid(None, Nodes(nodes), AppNodes(app_of(folder, secure), nodes))
    start = ArrayRecord({"w": Array(np.zeros(coordinates, np.float32))})
    result = strategy.start(grid, start, num_rounds=rounds, evaluate_fn=stamp)
    spent = [after - before for before, after in pairwise(stamps[1:])]  # the first is before the first round
    return spent, result.arrays["w"].numpy()


def main() -> int:
    """The exit code."""
    from lepton_simulations.flower import flower_process
    from lepton_strategies.secure_keys import make_key

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--coordinates", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as name, flower_process():
        folder = Path(name)
        publics = [make_key(folder / f"{place}.key").hex() for place in range(options.nodes)]
        (folder / "keys.txt").write_text("\n".join(publics) + "\n")
        found = {
            secure: rounds_of(folder, options.nodes, options.coordinates, options.rounds, secure)
            for secure in (False, True)
        }
    table = Table("", "CPU s per round", "first round")
    for secure, (spent, _) in found.items():
        label = "SecureAggregation(FedAvg)" if secure else "FedAvg"
        table.add_row(label, f"{statistics.median(spent[1:]):.2f}", f"{spent[0]:.2f}")
    console.print(table)
    error = float(np.abs(found[True][1] - found[False][1]).max())
    console.print(f"largest difference of the models: {error:.1e}")
    return 0 if error < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
