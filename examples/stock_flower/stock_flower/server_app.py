"""The server: one of our strategies under Flower's own ``Strategy.start``."""

import json
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result

import lepton_strategies

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train and, if asked to, save the figures and the model."""
    config = context.run_config
    task, nodes = str(config["task"]), int(config["nodes"])
    strategy = getattr(lepton_strategies, str(config["strategy"]))(
        task,
        cohort={"size": nodes, "min_reports": nodes},
        local={
            "optimizer": "adam",
            "learning_rate": float(config["learning-rate"]),
            "epochs": int(config["epochs"]),
            "batch_size": 16,
        },
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=lepton_strategies.initial_arrays(task),
        num_rounds=int(config["num-server-rounds"]),
        timeout=600,
    )
    if config["output"]:
        save(task, result, Path(str(config["output"])))


def save(task: str, result: Result, folder: Path) -> None:
    """Write ``metrics.json`` and ``model.safetensors``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(lepton_strategies.to_state_dict(task, result.arrays), folder / "model.safetensors")
    figures = {number: dict(record) for number, record in result.evaluate_metrics_clientapp.items()}
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2))
