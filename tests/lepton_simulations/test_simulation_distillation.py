"""On-device distillation is an ordinary run: a student learns from a frozen teacher where the rows are."""

import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lepton_fl.compression.build import Build
from lepton_fl.compression.catalogue import read_report
from lepton_fl.compression.recipe import Recipe
from lepton_fl.compression.source import read_source
from lepton_fl.errors import StateCorrupt, TaskError
from lepton_fl.tasks import load_task
from lepton_fl.tasks.federated import read
from lepton_fl.training.trainer import Trainer
from lepton_simulations.api import run_scenario
from lepton_simulations.config import SimulationConfig

TASKS = """
from pathlib import Path
from lepton_fl.compression.federated import distillation
from lepton_fl.tasks.images import digits
from lepton_fl.tasks.models import MLP

def small():
    return MLP(64, 10, (16,))

taught = distillation(digits, small, Path({teacher!r}))
untaught = distillation(digits, small, Path({teacher!r}) / "none")
"""


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """The file of a trained model, and a module with the tasks of teaching a student."""
    task = load_task("digits")
    trainer = Trainer(task)
    rows = task.transform(read(task, None).train.take(np.arange(1000)))
    start = trainer.initial(0)
    weights = start + trainer.train(start, rows, task.local, seed=0).delta
    path = tmp_path / "global.safetensors"
    save_file(trainer.layout.unflatten(weights), path, {"task": "digits", "run": "r-1"})
    (tmp_path / "fleet_tasks.py").write_text(TASKS.format(teacher=str(path)))
    monkeypatch.syspath_prepend(tmp_path)
    yield path
    sys.modules.pop("fleet_tasks", None)


def scenario(tmp_path, task, **run):
    local = {"optimizer": "adam", "learning_rate": 0.02, "batch_size": 10, "epochs": 2}
    spec = {
        "task": f"fleet_tasks:{task}",
        "rounds": 8,
        "cohort": {"size": 20, "min_reports": 10},
        "local": local,
    }
    return SimulationConfig.model_validate(
        {
            "run": spec | {"evaluate_every": 8} | run,
            "data": {"partition": {"kind": "iid", "clients": 20}},
            "engine": {"workers": 0},
            "output": {"folder": str(tmp_path / "run"), "plots": False, "tensorboard": False},
        }
    )


@pytest.mark.parametrize("secure", ["off", "required"])
def test_a_fleet_teaches_a_student_and_a_recipe_takes_it(teacher, tmp_path, secure):
    more = (
        {"secure_aggregation": secure, "clip_norm": 10.0, "max_weight": 128} if secure == "required" else {}
    )
    result = run_scenario(scenario(tmp_path, "taught", **more))
    model = load_file(tmp_path / "run" / "model.safetensors")
    assert result.rows[-1].metric("accuracy") > 0.8
    frozen = load_file(teacher)
    assert all((model[f"teacher.{name}"] == value).all() for name, value in frozen.items())
    if secure == "required":
        return
    student = {"student": {"kind": "mlp", "hidden": 16}, "epochs": 0}
    student["weights"] = tmp_path / "run" / "model.safetensors"
    recipe = Recipe.model_validate({"candidates": [{"name": "student", "distil": student}]})
    Build(read_source(teacher), recipe, folder=tmp_path / "variants").run()
    card = read_report(tmp_path / "variants")[1][-1]
    assert card.lineage.transfer.source == "devices"
    assert card.measured.metrics["accuracy"] == pytest.approx(result.rows[-1].metric("accuracy"))
    assert card.measured.parameters == 64 * 16 + 16 + 160 + 10
    with pytest.raises(TaskError, match="with its teacher"):
        read_source(tmp_path / "run")


def test_without_its_teacher_no_device_trains(teacher, tmp_path):
    config = scenario(tmp_path, "untaught")
    cohort = config.run.cohort.model_copy(update={"max_attempts": 1})
    run = config.run.model_copy(update={"cohort": cohort})
    result = run_scenario(config.model_copy(update={"run": run}))
    assert not result.rows
    assert result.verdict.outcome == "failed"


def test_a_file_without_a_student_is_refused(teacher):
    from lepton_fl.compression.federated import student_weights

    with pytest.raises(StateCorrupt, match="student"):
        student_weights(teacher)
