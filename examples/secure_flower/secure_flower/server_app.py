"""The server: Flower's own FedAdam, which sees one mean a round and no node's model."""

import json
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam

from lepton_strategies import SecureAggregation
from lepton_strategies.secure_keys import load_list

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train a linear model of handwritten digits."""
    config = context.run_config
    nodes = int(config["nodes"])
    strategy = SecureAggregation(
        FedAdam(eta=0.1, min_train_nodes=nodes, min_available_nodes=nodes),
        keys=load_list(Path(str(config["keys"]))),
        clip_norm=10.0,
        metrics=["train_loss"],
        min_cohort=int(config["min-cohort"]),
    )
    weights = {"w": Array(np.zeros((64, 10))), "b": Array(np.zeros(10))}
    result = strategy.start(grid, ArrayRecord(weights), num_rounds=int(config["num-server-rounds"]))
    if config["output"]:
        train = {number: dict(record) for number, record in result.train_metrics_clientapp.items()}
        evaluate = {number: dict(record) for number, record in result.evaluate_metrics_clientapp.items()}
        Path(str(config["output"])).write_text(json.dumps({"train": train, "evaluate": evaluate}, indent=2))
