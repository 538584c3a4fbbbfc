"""On-device distillation is an ordinary run: a student learns from a frozen teacher where the rows are."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from lepton_fl.compression.build import Build
from lepton_fl.compression.catalogue import read_report
from lepton_fl.compression.federated import distillation, read_taught, with_teacher
from lepton_fl.compression.profiles import Profile
from lepton_fl.compression.recipe import Recipe
from lepton_fl.compression.source import read_source, taught_on_devices
from lepton_fl.errors import ConfigError, StateCorrupt, TaskError, UpdateRejected
from lepton_fl.tasks import load_task
from lepton_fl.tasks.federated import read
from lepton_fl.training.trainer import Trainer
from lepton_simulations.api import run_scenario
from lepton_simulations.config import SimulationConfig

TASK = "lepton_fl.compression.taught:digits"
STUDENT = {"kind": "cnn", "width": 8, "hidden": 22}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The file of a trained model."""
    task = load_task("digits")
    trainer = Trainer(task)
    rows = task.transform(read(task, None).train.take(np.arange(1000)))
    start = trainer.initial(0)
    weights = start + trainer.train(start, rows, task.local, seed=0).delta
    path = tmp_path_factory.mktemp("teacher") / "global.safetensors"
    save_file(trainer.layout.unflatten(weights), path, {"task": "digits", "run": "r-1"})
    return path


def scenario(tmp_path, taught_by, /, **run):
    local = {"optimizer": "adam", "learning_rate": 0.02, "batch_size": 10, "epochs": 2}
    spec = {
        "task": TASK,
        "teacher": str(taught_by),
        "rounds": 5,
        "cohort": {"size": 20, "min_reports": 10},
        "local": local,
        "evaluate_every": 5,
    }
    return SimulationConfig.model_validate(
        {
            "run": spec | run,
            "data": {"partition": {"kind": "iid", "clients": 20}},
            "engine": {"workers": 0},
            "output": {"folder": str(tmp_path / "run"), "plots": False, "tensorboard": False},
        }
    )


SECURE = {"secure_aggregation": "required", "clip_norm": 10.0, "max_weight": 128, "rounds": 2}
STRONG = {"privacy": {"preset": "strong", "epsilon": 100.0, "clip_norm": 2.0, "population": 20}, "rounds": 2}


@pytest.mark.parametrize("more", [{}, SECURE, STRONG], ids=["plain", "secure", "strong"])
def test_a_fleet_teaches_a_student_and_a_recipe_takes_it(teacher, tmp_path, more):
    result = run_scenario(scenario(tmp_path, teacher, **more))
    assert result.verdict.outcome == "completed", result.verdict
    model = load_file(tmp_path / "run" / "model.safetensors")
    frozen = load_file(teacher)
    assert all((model[f"teacher.{name}"] == value).all() for name, value in frozen.items())
    small = sum(array.size for name, array in model.items() if name.startswith("student."))
    row = result.rows[-1]
    assert row.bytes_down == 20 * 4 * result.layout.size  # the teacher goes down ...
    assert result.layout.moving == small
    assert small * 2 * 20 <= row.bytes_up < 20 * (4 * small + 4096)  # ... and only the student comes up
    cost = taught_on_devices(tmp_path / "run")
    assert cost.bytes_up == sum(r.bytes_up for r in result.rows)
    assert cost.rounds == len(result.rows)
    assert (cost.privacy is not None) == ("privacy" in more)
    if more:
        return
    assert row.metric("accuracy") > 0.8
    step = {"student": STUDENT, "epochs": 0, "weights": tmp_path / "run"}
    recipe = Recipe.model_validate({"candidates": [{"name": "student", "distil": step}]})
    Build(read_source(teacher), recipe, folder=tmp_path / "variants").run()
    card = read_report(tmp_path / "variants")[1][-1]
    assert card.lineage.transfer == cost
    assert card.lineage.transfer.source == "devices"
    assert card.measured.metrics["accuracy"] == pytest.approx(row.metric("accuracy"))
    assert card.measured.parameters == small
    with pytest.raises(TaskError, match="with its teacher"):
        read_source(tmp_path / "run")


def test_a_rate_that_is_too_high_and_a_foreign_teacher_are_caught(teacher, tmp_path):
    local = {"learning_rate": 0.9, "batch_size": 10, "momentum": 0.9, "clip_grad_norm": 5.0}
    watch = {"metric": "accuracy", "mode": "max", "patience": 1}
    result = run_scenario(
        scenario(tmp_path, teacher, local=local, early_stop=watch, evaluate_every=1, rounds=4)
    )
    assert "No better accuracy" in result.verdict.reason
    tensors = load_file(tmp_path / "run" / "model.safetensors")
    tensors["teacher.classifier.layers.0.bias"] += 1e-3
    save_file(tensors, tmp_path / "foreign.safetensors")
    steps = {"diverged": tmp_path / "run", "foreign": tmp_path / "foreign.safetensors"}
    candidates = [
        {"name": name, "distil": {"student": STUDENT, "epochs": 0, "weights": path}}
        for name, path in steps.items()
    ]
    gate = (Profile(name="any"),)
    recipe = Recipe.model_validate({"candidates": candidates})
    Build(read_source(teacher), recipe, gate, folder=tmp_path / "variants").run()
    report, cards = read_report(tmp_path / "variants")
    assert [card.name for card in cards] == ["fp32", "diverged"]
    assert not cards[1].offered
    assert any("max_drop" in reason for reason in cards[1].gate[0].reasons)
    assert "another model" in report.failures[0].reason


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"teacher": ""}, ConfigError, "names no model to learn from"),
        ({"task": "digits"}, ConfigError, "no distillation"),
        ({"teacher": "/nowhere/at/all"}, Exception, "no /nowhere/at/all"),
    ],
)
def test_teacher_and_task_go_together(teacher, tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        run_scenario(scenario(tmp_path, teacher, **change))


def test_control_variates_are_refused(teacher, tmp_path):
    local = {"learning_rate": 0.1, "control_variates": True}
    result = run_scenario(scenario(tmp_path, teacher, local=local))
    assert result.verdict.outcome == "failed"
    assert "frozen" in result.verdict.reason


def test_without_a_teacher_no_device_trains():
    task = load_task(TASK)
    trainer = Trainer(task)
    rows = task.transform(read(task, None).train.take(np.arange(20)))
    with pytest.raises(UpdateRejected, match="teacher's answers"):
        trainer.train(trainer.initial(0), rows, task.local, seed=0)


def test_only_a_finite_model_of_the_task_can_teach():
    task = load_task(TASK)
    start = Trainer(task).initial(0)
    size = Trainer(task.teacher).layout.size
    with pytest.raises(TaskError, match="has 7 weights"):
        with_teacher(task, start, np.zeros(7, np.float32))
    with pytest.raises(StateCorrupt, match="finite"):
        with_teacher(task, start, np.full(size, np.nan, np.float32))
    with pytest.raises(TaskError, match="no distillation"):
        with_teacher(load_task("digits"), start, np.zeros(size, np.float32))


def test_running_means_of_a_teacher_stay_what_they_are():
    def normalised():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Linear(12, 10))

    base = load_task("digits")
    task = distillation(
        base.__class__(**{**vars(base), "model": normalised}),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    )
    trainer, theirs = Trainer(task), Trainer(task.teacher)
    taught = theirs.initial(3) + np.float32(0.25)
    start = with_teacher(task, trainer.initial(0), taught)
    rows = task.transform(read(task, None).train.take(np.arange(40)))
    delta = trainer.train(start, rows, task.local, seed=0).delta
    assert trainer.layout.moving == 650
    assert trainer.layout.fixed == theirs.layout.size + 1
    assert delta[:650].any()
    assert not delta[650:].any()
    theirs.module.eval()
    x = torch.from_numpy(rows.x)
    theirs._load(taught)
    trainer._load(start)
    with torch.no_grad():
        assert torch.equal(theirs.module(x), trainer.module.answers(x))


def test_a_file_without_a_student_is_refused(teacher):
    with pytest.raises(StateCorrupt, match="student"):
        read_taught(teacher)


def test_a_damaged_run_says_no_cost(teacher, tmp_path):
    run_scenario(scenario(tmp_path, teacher, rounds=1, evaluate_every=0))
    rows = tmp_path / "run" / "metrics.jsonl"
    rows.write_text(json.dumps({"round": 1}) + "\n")
    with pytest.raises(StateCorrupt, match="bytes_up"):
        taught_on_devices(tmp_path / "run")
