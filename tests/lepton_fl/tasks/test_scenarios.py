"""The recommended settings of the ready tasks name tasks that exist."""

import tomllib
from pathlib import Path

import pytest

from lepton_fl.plan import RunSpec
from lepton_fl.tasks import load_task
from lepton_fl.tasks.partition import PartitionSpec

FILES = sorted((Path(__file__).parents[3] / "simulations").glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_recommended_settings(path):
    body = tomllib.loads(path.read_text(encoding="utf-8"))
    spec = RunSpec(**body["run"])
    task = load_task(spec.task)
    better = {"loss": "min", "rmse": "min", "accuracy": "max", "r2": "max"}
    assert spec.early_stop.mode == better[spec.early_stop.metric]
    kind = PartitionSpec(**body["data"]["partition"]).kind
    assert kind != "natural" or task.name not in ("digits", "fashion_mnist")
