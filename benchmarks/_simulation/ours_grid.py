"""Flower's own ``Strategy.start`` over our Grid at the benchmark's work; in a process of its own.

    python -m _simulation.ours_grid SCENARIO.json OUT ours|stock

``ours``: the FedAvg of ``lepton_strategies``; ``stock``: Flower's, which gets a message for every client.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flwr.serverapp.strategy
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

import lepton_strategies
from _simulation.work import Record
from lepton_simulations.flower import local_grid

record = Record()


class Timed:
    """Notes when each round is over."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As the strategy does; a round that brings nothing is an error."""
        result = super().aggregate_train(server_round, replies)  # type: ignore[misc]  # of the strategy
        if result[0] is None:
            raise RuntimeError(f"round {server_round} brought nothing")
        record.commit()
        return result


class Ours(Timed, lepton_strategies.FedAvg):
    """Our FedAvg."""


class Stock(Timed, flwr.serverapp.strategy.FedAvg):
    """Flower's FedAvg."""


def _strategy(kind: str, run: dict[str, Any]) -> flwr.serverapp.strategy.Strategy:
    if kind == "ours":
        names = ("cohort", "local", "weighting", "evaluate_every")
        return Ours(run["task"], seed=0, **{name: run[name] for name in names})
    size = run["cohort"]["size"]
    return Stock(fraction_train=0.0001, min_train_nodes=size, min_available_nodes=size, fraction_evaluate=0.0)


def main(path: str, out: str, kind: str) -> None:
    """Run and write the record."""
    body = json.loads(Path(path).read_text())
    run = body["run"]
    grid = local_grid(
        run["task"],
        partition="natural",
        data=body["data"]["folder"],
        local=run["local"],
        workers=body["engine"]["workers"],
    )
    with grid as nodes:
        arrays = lepton_strategies.initial_arrays(run["task"])
        result = _strategy(kind, run).start(nodes, arrays, num_rounds=run["rounds"])
    final = result.arrays.to_numpy_ndarrays()
    record.save(Path(out), np.concatenate([array.reshape(-1) for array in final]))


if __name__ == "__main__":
    main(*sys.argv[1:])
