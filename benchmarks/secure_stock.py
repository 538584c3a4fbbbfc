"""Seconds per round on a stock SuperLink, Flower's FedAvg bare and in SecureAggregation: 4 nodes, 4 MB, TLS.

    python benchmarks/secure_stock.py                # about five minutes
    python benchmarks/secure_stock.py --nodes 4 --rounds 3

``flower-superlink``, ``flower-supernode`` and ``flwr run`` as they are installed; two apps that differ in the
wrapper and the mod only, one after the other on the same nodes. Training is next to nothing. Seconds are
those between two aggregations, without the first round (whose keys are not made ahead); CPU is that of all
processes over a whole run, the first round and the app's start included.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from _fleet import StockFlower, gaps, median
from rich.console import Console
from rich.table import Table

SIZE = 1_000_000
_SERVER = '''\
"""FedAvg with a line for each round."""
import time
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from lepton_strategies import SecureAggregation
from lepton_strategies.secure_keys import load_list

app = ServerApp()


class Timed(FedAvg):
    def aggregate_train(self, server_round, replies):
        result = super().aggregate_train(server_round, list(replies))
        with open(self.times, "a") as file:
            file.write(f"{{time.time()}}\\n")
        return result


@app.main()
def main(grid, context):
    config, nodes = context.run_config, context.run_config["nodes"]
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    strategy.times = config["times"]
    if {secure}:
        keys = load_list(Path(config["keys"]))
        strategy = SecureAggregation(strategy, keys=keys, clip_norm=10.0, min_cohort=4)
    model = ArrayRecord({{"w": Array(np.zeros(config["size"], np.float32))}})
    strategy.start(grid, model, num_rounds=config["rounds"])
'''

_CLIENT = '''\
"""Answers with the model and a little noise: no two replies are alike."""
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from lepton_strategies import secure_mod

app = ClientApp(mods=[secure_mod()] if {secure} else [])


@app.train()
def train(message, context):
    model = message.content["arrays"]["w"].numpy()
    noise = np.random.default_rng().standard_normal(model.shape, np.float32)
    arrays = ArrayRecord({{"w": Array(model + np.float32(1e-3) * noise)}})
    content = {{"arrays": arrays, "metrics": MetricRecord({{"num-examples": 1}})}}
    return Message(content=RecordDict(content), reply_to=message)
'''


class SecureStock(StockFlower):
    """A stock deployment whose nodes have keys."""

    def serve(self, nodes: int) -> None:
        """Make the nodes' keys, and start a SuperLink and its SuperNodes."""
        from lepton_strategies.secure_keys import make_key

        keys = [make_key(self.folder / f"node{i}.key").hex() for i in range(nodes)]
        (self.folder / "keys.txt").write_text("\n".join(keys))
        super().serve(nodes)

    def node_config(self, number: int) -> str:
        """With the node's key."""
        keys = f'secagg-key="{self.folder}/node{number}.key" secagg-peers="{self.folder}/keys.txt"'
        return f"{keys} secagg-cohort=4"

    def measure(self, secure: bool, nodes: int, rounds: int) -> tuple[list[float], float]:
        """Seconds of the rounds but the first, and processor seconds per round."""
        name, before = "masked" if secure else "bare", self.cpu_s()
        app = _SERVER.format(secure=secure), _CLIENT.format(secure=secure)
        times = self.submit(nodes, rounds, SIZE, name=name, app=app, keys=f"{self.folder}/keys.txt")
        done = lambda: times.exists() and len(times.read_text().split()) >= rounds  # noqa: E731 - one use
        self.wait(done, 300 + 120 * rounds, f"{rounds} rounds, {name}")
        return gaps([float(line) for line in times.read_text().split()]), (self.cpu_s() - before) / rounds

    def end_keepers(self, nodes: int, folder: Path) -> None:
        """End the small processes that keep nodes' secrets between two messages."""
        from lepton_strategies.keeper import Beside, NodeKeys

        for number in range(nodes):
            its = NodeKeys(self.folder / f"node{number}.key", self.folder / "keys.txt")
            Beside(its, folder=folder / f"lepton-{os.geteuid()}").stop()


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    table = Table("aggregation", "median s", "fastest", "slowest", "rounds", "CPU s/round")
    with tempfile.TemporaryDirectory(prefix="k") as short, SecureStock() as fleet:
        fleet.environment["TMPDIR"] = short  # a socket's path must be short
        fleet.serve(args.nodes)
        try:
            for name, secure in (("FedAvg", False), ("SecureAggregation(FedAvg)", True)):
                seconds, cpu = fleet.measure(secure, args.nodes, args.rounds)
                figures = (median(seconds), min(seconds), max(seconds))
                table.add_row(name, *(f"{s:.2f}" for s in figures), str(len(seconds)), f"{cpu:.2f}")
        finally:
            fleet.end_keepers(args.nodes, Path(short))
    Console().print(f"{args.nodes} nodes, {4 * SIZE / 1e6:.0f} MB", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
