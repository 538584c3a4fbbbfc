"""Losses of K devices at once: their gradient for each step, and their sums per device afterwards.

All are means over the rows of a mini-batch, so a row counts 1 / size, and padding counts nothing.
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lepton_simulations.engines.layers import Room, padded

_log_softmax = torch.ops.aten._log_softmax.out
_log_softmax_back = torch.ops.aten._log_softmax_backward_data.out


class Loss(Protocol):
    """Prepared for some steps, asked for their gradients, then for their values."""

    def prepare(self, targets: Tensor, weights: Tensor) -> None:
        """Take what the next steps are held against.

        Args:
            targets: (T, K, B, ...) of T steps.
            weights: (T, K, B), 1 / size for rows that count, else zero.
        """
        ...

    def gradient(self, step: int, outputs: Tensor) -> Tensor:
        """(a, s, O) with padding -> the same shape."""
        ...

    def means(self) -> NDArray[np.float64]:
        """(T, K) mean loss of each step before it was made; zero where a device made none."""
        ...


class CrossEntropy:
    """Of logits (a, s, O) whose padding is minus infinity, and labels."""

    def __init__(self, room: Room, outputs: int) -> None:
        self._room, self._outputs = room, padded(outputs)

    def prepare(self, targets: Tensor, weights: Tensor) -> None:
        """See ``Loss``; labels are within 0 to O - 1."""
        shape = (*weights.shape, self._outputs)
        self._labels, self._weights = targets[..., None], weights
        wanted = self._room.get("targets", *shape).zero_().scatter_(3, self._labels, -weights[..., None])
        self._logs = self._room.get("logs", *shape)
        self._grad = self._room.get("loss gradient", *shape[1:])
        self._steps = list(zip(wanted.unbind(), self._logs.unbind(), strict=True))

    def gradient(self, step: int, outputs: Tensor) -> Tensor:
        """(softmax - one-hot) / size."""
        wanted, logs = self._steps[step]
        grad = self._grad
        if outputs.shape != grad.shape:
            active, places = outputs.shape[:2]
            wanted, logs, grad = (x[:active, :places] for x in (wanted, logs, grad))
        _log_softmax(outputs, -1, False, out=logs)
        _log_softmax_back(wanted, logs, -1, logs.dtype, out=grad)
        return grad

    def means(self) -> NDArray[np.float64]:
        """See ``Loss``."""
        rows = self._logs.gather(3, self._labels)[..., 0].neg_()
        return _sum(rows, self._weights)


class Difference:
    """Of the difference d between outputs and targets: d^2, or Huber's with its bend at 1."""

    def __init__(self, room: Room, outputs: int, *, huber: bool) -> None:
        self._room, self._outputs, self._huber = room, outputs, huber

    def prepare(self, targets: Tensor, weights: Tensor) -> None:
        """See ``Loss``."""
        self._targets = targets.reshape(*weights.shape, self._outputs)
        self._weights = weights / self._outputs
        self._errors = self._room.get("errors", *self._targets.shape)
        shape = (*weights.shape[1:], padded(self._outputs))
        self._grad = self._room.get("loss gradient", *shape).zero_()

    def gradient(self, step: int, outputs: Tensor) -> Tensor:
        """2 d / size, or d held within -1 and 1."""
        active, places = outputs.shape[:2]
        error = self._errors[step, :active, :places]
        torch.sub(outputs[..., : self._outputs], self._targets[step, :active, :places], out=error)
        slope = error.clamp(-1, 1) if self._huber else 2 * error
        grad = self._grad[:active, :places]
        torch.mul(slope, self._weights[step, :active, :places, None], out=grad[..., : self._outputs])
        return grad

    def means(self) -> NDArray[np.float64]:
        """See ``Loss``."""
        size = self._errors.abs()
        rows = torch.where(size < 1, size * size / 2, size - 0.5) if self._huber else size * size
        return _sum(rows.sum(3), self._weights)


def _sum(rows: Tensor, weights: Tensor) -> NDArray[np.float64]:
    """Weighted sums over the places of each step; places without weight may hold anything."""
    counts = weights.numpy()
    terms = np.multiply(rows.numpy(), counts, out=np.zeros(counts.shape), where=counts > 0)
    sums: NDArray[np.float64] = terms.sum(2)
    return sums
