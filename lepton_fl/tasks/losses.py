"""Losses by name. Importing this module imports torch."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from lepton_fl.errors import TaskError
from lepton_fl.tasks.task import Task


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over rows, and over positions where there are several; logits (N, ..., C), labels (N, ...)."""
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "squared_error": functional.mse_loss,
    "huber": functional.smooth_l1_loss,
}


def loss_of(task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    """The task's loss as a function of (outputs, targets)."""
    if callable(task.loss):
        return task.loss
    if task.loss not in _LOSSES:
        raise TaskError(
            f"Task {task.name!r} has the unknown loss {task.loss!r}.", hint=f"Known: {', '.join(_LOSSES)}."
        )
    return _LOSSES[task.loss]
