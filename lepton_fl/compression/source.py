"""The global model that variants are made of, and the labelled rows they are measured on.

A source is the folder of a simulated run, a model that ``lepton run export`` wrote, or any safetensors file
with the tensors of the task's model. Nothing is unpickled.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lepton_fl.compression.card import Transfer
from lepton_fl.compression.federated import TEACHER, check_teacher, with_teacher
from lepton_fl.errors import ConfigError, DataError, NotFound, StateCorrupt, TaskError
from lepton_fl.tasks import Dataset, Task, load_task, resolve
from lepton_fl.vector import Vector, vector_digest

if TYPE_CHECKING:
    from torch import nn

    from lepton_fl.compression.recipe import EvaluationSpec

WEIGHTS: Final = "model.safetensors"  # of a simulated run that is over


@dataclass(frozen=True, eq=False)
class GlobalModel:
    """One trained model and what is known of its run."""

    task: Task
    reference: str  # package.module:attribute
    weights: Vector  # (P,) float32
    run: str
    round: int | None
    journal_sha256: str
    privacy: str | None
    data: Path | None  # the folder of the task's published data, if the run says

    @property
    def sha256(self) -> str:
        """Its name everywhere."""
        return vector_digest(self.weights)

    def module(self) -> "nn.Module":
        """The model with these weights, in evaluation mode."""
        from lepton_fl.tasks.models import initial_model
        from lepton_fl.training.bridge import layout_of, load_vector

        module = initial_model(self.task, 0)
        load_vector(module, layout_of(module), self.weights)
        return module.eval()


def read_source(path: Path, task: str = "") -> GlobalModel:
    """Read a run's folder or a model's file.

    Args:
        path: of the folder or the file.
        task: whose model it is; empty = as the run or the file says.

    Raises:
        NotFound: there is nothing, or the run has no final model yet.
        StateCorrupt: the file is damaged, or holds numbers that are not finite.
        TaskError: the task is not known, or the tensors are not those of its model.
    """
    folder, file = path if path.is_dir() else None, weights_file(path)
    tensors, said = read_tensors(file)
    known = _of_run(folder) if folder else _of_file(said, file)
    named = known.pop("task")
    if not task and not named:
        raise ConfigError(f"{file} does not say which task it is a model of.", hint="Name it with --task.")
    reference = resolve(task or named)
    loaded = load_task(reference)
    if (version := known.pop("task_version", "")) and version != loaded.version:
        raise TaskError(
            f"The model is of version {version} of {loaded.name}, installed is {loaded.version}.",
            hint="Install the version of the task that the run trained.",
        )
    return GlobalModel(loaded, reference, _vector(loaded, tensors, file), **known)


def weights_file(path: Path) -> Path:
    """The model's file: itself, or that in a run's folder; NotFound where there is none."""
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        hint = "A run writes it when it ends; name a run's folder or a model's .safetensors file."
        raise NotFound(f"There is no {file}.", hint=hint)
    return file


def read_weights(path: Path, task: Task) -> Vector:
    """The weights of one task's model, (P,) float32, in a run's folder or a model's file.

    Raises:
        NotFound: there is nothing, or the run has no final model yet.
        StateCorrupt: the file is damaged, or holds numbers that are not finite.
        TaskError: the tensors are not those of the task's model.
    """
    file = weights_file(path)
    return _vector(task, read_tensors(file)[0], file)


def start_of(task: Task, teacher: str, fresh: Vector) -> Vector:
    """The model a run begins with, where its teacher is named by a run's folder or a model's file.

    Args:
        task: of the run.
        teacher: ``RunSpec.teacher``.
        fresh: (P,) the task's initial model; it is that itself where there is no teacher.

    Raises:
        ConfigError: a distillation without a teacher, or a teacher for anything else.
        NotFound, StateCorrupt, TaskError: see ``read_weights``.
    """
    check_teacher(task, teacher)
    if task.teacher is None:
        return fresh
    return with_teacher(task, fresh, read_weights(Path(teacher), task.teacher))


def taught_on_devices(path: Path) -> Transfer:
    """What a distillation run has cost, as far as its folder or the header of its exported model says.

    Raises:
        NotFound: there is no such file.
        StateCorrupt: the file or the folder is damaged.
    """
    file = weights_file(path)
    folder = file.parent if file.name == WEIGHTS and (file.parent / "scenario.json").exists() else None
    known = _of_run(folder) if folder else _of_file(read_tensors(file)[1], file)
    cost = _cost_of_run(folder) if folder else _cost_of_file(read_tensors(file)[1])
    return Transfer(
        source="devices",
        rows=0,
        entropy=None,
        reference_entropy=None,
        shift=0.0,
        run=known["run"],
        rounds=known["round"] or 0,
        privacy=known["privacy"],
        **cost,
    )


def _cost_of_run(folder: Path) -> dict[str, Any]:
    try:
        lines = map(json.loads, (folder / "metrics.jsonl").read_bytes().splitlines())
        rows = {row["round"]: row for row in lines}.values()  # an evaluated round has two lines
        return {name: sum(row[name] for row in rows) for name in ("bytes_up", "bytes_down", "seconds")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateCorrupt(
            f"{folder} is not the folder of a run ({type(error).__name__}: {error})."
        ) from error


def _cost_of_file(said: Mapping[str, str]) -> dict[str, Any]:
    """Zeros where the header says nothing: the file was not written by `lepton run export`."""
    try:
        counts = {name: int(said.get(name, "0")) for name in ("bytes_up", "bytes_down")}
        return counts | {"seconds": float(said.get("seconds", "0"))}
    except ValueError as error:
        raise StateCorrupt(f"The header of the model is damaged: {error}.") from error


def read_tensors(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays of a safetensors file and what its header says of them; StateCorrupt if it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            names = list(opened.keys())
            return {name: opened.get_tensor(name) for name in names}, dict(opened.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise StateCorrupt(
            f"{file} is not a safetensors file: {error}.",
            hint="It is truncated or of another kind; export it again.",
        ) from error


def _vector(task: Task, tensors: Mapping[str, Any], file: Path) -> Vector:
    from lepton_fl.tasks.models import initial_model
    from lepton_fl.training.bridge import layout_of

    layout = layout_of(initial_model(task, 0))
    wanted = {slot.name: slot.shape for slot in layout.slots}
    given = {name: tuple(array.shape) for name, array in tensors.items()}
    if wrong := sorted(k for k in wanted.keys() | given.keys() if wanted.get(k) != given.get(k)):
        raise TaskError(
            f"{file} is no model of {task.name}: {wrong[0]!r} has shape {given.get(wrong[0])}, expected "
            f"{wanted.get(wrong[0])}.",
            hint="Name its task with --task, or install the version of the task that the run trained.",
        )
    if any(name.startswith(TEACHER) for name in wanted):
        raise TaskError(
            f"{file} is a student with its teacher, not a global model.",
            hint="Build from the teacher's run, and name this file in the recipe's distil.weights.",
        )
    flat = layout.flatten(tensors)
    if not np.isfinite(flat).all():
        count = int((~np.isfinite(flat)).sum())
        raise StateCorrupt(
            f"{count} of {flat.size} weights in {file} are not finite.",
            hint="The run diverged: take an earlier or the best model.",
        )
    return flat


def _of_run(folder: Path) -> dict[str, Any]:
    """What a simulated run says of its model."""
    try:
        scenario = json.loads((folder / "scenario.json").read_bytes())
        state = json.loads((folder / "state.json").read_bytes())
        run, data = scenario["run"], scenario["data"]["folder"]
        head, number = str(state["journal"]["hash"]), int(state["state"]["round"])
        return {
            "task": run["task"],
            "run": folder.resolve().name,
            "round": number,
            "journal_sha256": head,
            "privacy": _promise(run.get("privacy"), folder),
            "data": Path(data) if data else None,
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateCorrupt(
            f"{folder} is not the folder of a run ({type(error).__name__}: {error}).",
            hint="Name the model's file instead, and its task with --task.",
        ) from error


def _promise(privacy: Mapping[str, Any] | None, folder: Path) -> str | None:
    if privacy is None:
        return None
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    return promise(privacy, json.loads(lines[-1]).get("epsilon") if lines else None)


def promise(privacy: Mapping[str, Any], epsilon: float | None) -> str:
    """A run's guarantee in words.

    Args:
        privacy: of its specification, as JSON.
        epsilon: spent by the round of the model; None = not recorded, so what the whole run may spend.
    """
    if epsilon is not None:
        spent = f"epsilon = {epsilon:.4g}"
    elif privacy["epsilon"]:
        spent = f"epsilon <= {privacy['epsilon']:g}"
    else:
        spent = f"noise multiplier {privacy['noise_multiplier']:g}"
    return (
        f"{spent} at delta = {privacy['delta']:g}, {privacy['unit']} level, {privacy['adjacency']}, "
        f"{privacy['mechanism']}, {privacy['trust']}"
    )


def _of_file(said: Mapping[str, str], file: Path) -> dict[str, Any]:
    """What the header of an exported model says."""
    round_ = said.get("round", "")
    return {
        "task": said.get("reference") or said.get("task", ""),
        "task_version": said.get("task_version", ""),
        "run": said.get("run") or file.stem,
        "round": int(round_) if round_.isdecimal() else None,
        "journal_sha256": said.get("journal_sha256", ""),
        "privacy": said.get("privacy"),
        "data": None,
    }


# --- rows -----------------------------------------------------------------------------------------------


def evaluation_rows(model: GlobalModel, spec: "EvaluationSpec", folder: Path | None) -> Dataset:
    """The labelled rows to measure on, checked against the contract and prepared.

    Raises:
        DataError: they cannot be read, or there are none.
    """
    from lepton_fl.tasks.federated import read
    from lepton_fl.tasks.sources import read_source as read_rows

    raw = read_rows(spec.data, model.task) if spec.data else read(model.task, folder or model.data).test
    stop = len(raw) if not spec.rows else spec.first + spec.rows
    raw = raw.take(np.arange(len(raw))[spec.first : stop])
    if not len(raw):
        raise DataError(
            f"No rows are left to measure on, from row {spec.first}.",
            hint="Lower evaluation.first in the recipe.",
        )
    return model.task.prepare(raw)
