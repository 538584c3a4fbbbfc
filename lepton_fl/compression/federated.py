"""Distillation on the devices: a federated run whose task is to answer as the teacher does.

Where the operator has no rows, the devices have. A distillation task holds student and teacher in one model:
each device computes the teacher's logits on its own rows, and only the student moves. The teacher is pushed
as frozen coordinates, of which nobody sends anything, so updates are the student's alone; cohorts, secure
aggregation, the privacy ledger, simulation and production carry them as those of any other run (FedMD, Li &
Wang 2019; FedDF, Lin et al. 2020; but without a public data set).

    # fleet_tasks.py, installed on the coordinator and on the devices; some are ready in compression.taught
    distilled = distillation(mnist_by_writer, lambda: CNN((1, 28, 28), 10, 8, 22))

The run names the trained model in ``teacher``. Devices refuse to learn from one that was never set. The
run's model has tensors ``student.*`` and ``teacher.*``; a recipe takes the student by ``distil.weights``.
Importing this module imports no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lepton_fl.errors import ConfigError, StateCorrupt, TaskError
from lepton_fl.tasks import Task
from lepton_fl.vector import Vector

if TYPE_CHECKING:
    from torch import Tensor, nn

STUDENT: Final = "student."  # before the names of its tensors
TEACHER: Final = "teacher."
_TAUGHT: Final = "taught"  # 1 once a teacher is set


def distillation(base: Task, student: "Callable[[], nn.Module]", *, temperature: float = 2.0) -> Task:
    """The task of teaching a student on the devices.

    Args:
        base: the task that the teacher was trained for; rows, contract, metrics and local plan are its own.
        student: makes the smaller model; it takes the same rows and gives outputs of the same shape.
        temperature: of both sides' logits.
    """
    return replace(
        base,
        name=f"{base.name}_distillation",
        model=partial(_model, base, student),
        loss=partial(_loss, temperature=temperature),
        students={},
        teacher=base,
    )


def check_teacher(task: Task, named: str) -> None:
    """Refuse a distillation without a teacher, and a teacher for anything else.

    Args:
        task: of the run.
        named: the run's ``teacher``; empty = none.

    Raises:
        ConfigError: one goes without the other.
    """
    if task.teacher is not None and not named:
        raise ConfigError(
            f"{task.name} teaches a student, and run.teacher names no model to learn from.",
            hint=f"Name a trained model of {task.teacher.name}.",
        )
    if task.teacher is None and named:
        raise ConfigError(
            f"run.teacher is set, and {task.name} is no distillation.",
            hint="Remove it, or run a task made by lepton_fl.compression.federated.distillation.",
        )


def with_teacher(task: Task, start: Vector, teacher: Vector) -> Vector:
    """The initial model of a distillation run: a fresh student and a trained teacher; imports torch.

    Args:
        task: made by ``distillation``.
        start: (P,) its initial model.
        teacher: (Q,) a model of ``task.teacher``.

    Raises:
        TaskError: the teacher is of another shape.
        StateCorrupt: its numbers are not finite.
    """
    from lepton_fl.tasks.models import initial_model
    from lepton_fl.training.bridge import layout_of

    if task.teacher is None:
        raise TaskError(f"{task.name} is no distillation: there is no place for a teacher.")
    theirs = layout_of(initial_model(task.teacher, 0))
    if teacher.shape != (theirs.size,):
        raise TaskError(
            f"The teacher has {teacher.size} weights, a model of {task.teacher.name} has {theirs.size}.",
            hint="Name a model that was trained by a run of that task, in its present version.",
        )
    if not np.isfinite(teacher).all():
        raise StateCorrupt("The teacher has weights that are not finite.", hint="Name an earlier model.")
    whole = start.copy()
    named = layout_of(initial_model(task, 0)).unflatten(whole)
    for name, array in theirs.unflatten(teacher).items():
        named[TEACHER + name][...] = array
    named[_TAUGHT][...] = 1.0
    return whole


@dataclass(frozen=True, eq=False)
class Taught:
    """What a distillation run has left."""

    student: dict[str, Vector]  # tensors, by their names in the student
    teacher: dict[str, Vector]


def read_taught(path: Path) -> Taught:
    """Student and teacher in the model of a distillation run.

    Raises:
        StateCorrupt: the file is damaged, or holds no student.
    """
    from lepton_fl.compression.source import read_tensors

    arrays, _ = read_tensors(path)
    student, teacher = _under(STUDENT, arrays), _under(TEACHER, arrays)
    if not student or not teacher:
        raise StateCorrupt(
            f"{path} holds no tensors {STUDENT}* and {TEACHER}*.",
            hint="Name the model of a distillation run (docs/variants.md).",
        )
    return Taught(student, teacher)


def _under(prefix: str, arrays: dict[str, Any]) -> dict[str, Vector]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _model(base: Task, student: "Callable[[], nn.Module]") -> "nn.Module":
    made: nn.Module = _module_class()(student(), base.model())
    return made


def _loss(outputs: "Tensor", answers: "Tensor", temperature: float) -> "Tensor":
    from lepton_fl.compression.fit import teaching_loss

    return teaching_loss(outputs, answers, temperature)


@cache
def _module_class() -> Any:  # noqa: ANN401 - a class, made when torch is there
    import torch
    from torch import Tensor, nn

    class Distillation(nn.Module):
        """A student, and beside it the frozen teacher."""

        def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
            super().__init__()
            self.student, self.teacher = student, _frozen(teacher)
            self.taught = nn.Parameter(torch.zeros(1), requires_grad=False)

        def train(self, mode: bool = True) -> "Distillation":
            super().train(mode)
            self.teacher.eval()  # its answers are facts
            return self

        def forward(self, x: Tensor) -> Tensor:
            """What the student answers."""
            outputs: Tensor = self.student(x)
            return outputs

        def answers(self, x: Tensor) -> Tensor:
            """What the teacher answers; no numbers where none was set."""
            self.teacher.eval()
            wanted: Tensor = self.teacher(x) * (self.taught / self.taught)
            return wanted

    return Distillation


def _frozen(module: "nn.Module") -> "nn.Module":
    """Nothing of it moves: buffers, such as running means, become frozen parameters, too."""
    from torch import nn

    module.requires_grad_(False)
    for layer in module.modules():
        for name, buffer in list(layer.named_buffers(recurse=False)):
            if buffer.is_floating_point() and name not in layer._non_persistent_buffers_set:
                delattr(layer, name)
                layer.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
    return module
