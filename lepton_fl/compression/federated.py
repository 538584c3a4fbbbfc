"""Distillation on the devices: a federated run whose task is to answer as the teacher does.

Where the operator has no rows, the devices have. A distillation task holds student and teacher in one model:
the teacher's weights are frozen coordinates of the model that is pushed anyway, each device computes the
teacher's logits on its own rows, and only the student moves. So nothing is new on the wire: cohorts, secure
aggregation, the privacy ledger, simulation and production carry it as any other run (FedMD, Li & Wang 2019;
FedDF, Lin et al. 2020; but without a public data set).

    # fleet_tasks.py, installed on the coordinator and on the devices
    distilled = distillation(mnist_by_writer, lambda: CNN((1, 28, 28), 10, 8, 22), Path("global.safetensors"))

Only the coordinator needs the file; a teacher that was never loaded gives losses that are no numbers, which
every device refuses. The run's model has tensors ``student.*``; a recipe takes them by ``distil.weights``.
Importing this module imports no torch.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lepton_fl.errors import StateCorrupt, TaskError
from lepton_fl.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor, nn

STUDENT: Final = "student."  # before the names of its tensors
TEACHER: Final = "teacher."


def distillation(
    base: Task, student: "Callable[[], nn.Module]", teacher: Path, *, temperature: float = 2.0
) -> Task:
    """The task of teaching a student on the devices.

    Args:
        base: the task that the teacher was trained for; rows, contract, metrics and local plan are its own.
        student: makes the smaller model; it takes the same rows and gives outputs of the same shape.
        teacher: the trained model (.safetensors, see ``lepton run export``). Devices need not have it.
        temperature: of both sides' logits.
    """
    return replace(
        base,
        name=f"{base.name}_distillation",
        model=partial(_model, base, student, teacher),
        loss=partial(_loss, temperature=temperature),
        students={},
    )


def student_weights(path: Path) -> dict[str, Any]:
    """The student's tensors in the model of a distillation run, by their names in the student.

    Raises:
        StateCorrupt: the file is damaged, or holds no student.
    """
    from lepton_fl.compression.source import read_tensors

    arrays, _ = read_tensors(path)
    found = {name.removeprefix(STUDENT): array for name, array in arrays.items() if name.startswith(STUDENT)}
    if not found:
        raise StateCorrupt(
            f"{path} holds no tensors {STUDENT}*.",
            hint="Name the model of a distillation run (docs/variants.md).",
        )
    return found


def _model(base: Task, student: "Callable[[], nn.Module]", teacher: Path) -> "nn.Module":
    taught = base.model()
    if there := teacher.is_file():
        _load(taught, teacher, base)
    made: nn.Module = _module_class()(student(), taught, there)
    return made


def _load(module: "nn.Module", path: Path, base: Task) -> None:
    import torch

    from lepton_fl.compression.source import read_tensors

    arrays, _ = read_tensors(path)
    try:
        module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    except RuntimeError as error:
        raise TaskError(f"{path} is no model of {base.name}: {error}") from error


def _loss(outputs: "Tensor", targets: "Tensor", temperature: float) -> "Tensor":
    from lepton_fl.compression.fit import teaching_loss

    return teaching_loss(outputs[:, 0], outputs[:, 1], temperature)


@cache
def _module_class() -> Any:  # noqa: ANN401 - a class, made when torch is there
    import torch
    from torch import Tensor, nn

    class Distillation(nn.Module):
        """Student and frozen teacher; in training both answers, (N, 2, ...), else the student's alone."""

        taught: Tensor

        def __init__(self, student: nn.Module, teacher: nn.Module, taught: bool) -> None:
            super().__init__()
            self.student, self.teacher = student, teacher.requires_grad_(False)
            self.register_buffer("taught", torch.full((1,), float(taught)))

        def train(self, mode: bool = True) -> "Distillation":
            super().train(mode)
            self.teacher.eval()  # its answers are facts
            return self

        def forward(self, x: Tensor) -> Tensor:
            answers: Tensor = self.student(x)
            if not self.training:
                return answers
            wanted = self.teacher(x).detach() * (self.taught / self.taught)  # 0/0: there is no teacher
            return torch.stack([answers, wanted], dim=1)

    return Distillation
