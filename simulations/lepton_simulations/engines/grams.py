"""Gram matrices of devices' rows: computed once for each device, not in every round.

They stand in memory that is shared with forked workers, so whoever trains a device first computes it for all.
"""

import mmap
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lepton_fl.tasks.data import Dataset
from lepton_simulations.engines.layers import padded

_BLOCK = 2**22  # numbers that memory is asked for at a time; pages that nothing touches cost nothing
_MOST = 2**26  # numbers kept in all
_WORTH = 4  # rows have at least as many times the features that a device has rows: they take more memory


class Kept:
    """Room for one matrix, and whether somebody has filled it."""

    def __init__(self, gram: Tensor, known: NDArray[np.uint8]) -> None:
        self.gram, self._known = gram, known  # (n, n); what is shared, too
        self.address: int = gram.data_ptr()

    @property
    def is_done(self) -> bool:
        """Whether the matrix is there."""
        return bool(self._known[0])

    def done(self) -> None:
        """The matrix is there."""
        self._known[0] = 1


class Grams:
    """See the module."""

    def __init__(self, dtype: torch.dtype, *, biased: bool) -> None:
        """Keep nothing yet.

        Args:
            dtype: of the rows.
            biased: whether a layer has a bias, which is one more feature of value 1.
        """
        self._dtype, self._biased = dtype, biased
        self._block, self._used, self._total = torch.zeros(0, dtype=dtype), 0, 0
        self._slots: WeakKeyDictionary[Dataset, Kept] = WeakKeyDictionary()

    def reserve(self, data: Dataset, rows: Tensor) -> None:
        """Make room for the matrix of a device with these rows (n, F), where it is worth its memory."""
        count, features = rows.shape
        size = padded(count * count) + padded(1)
        if not worth_keeping(count, features) or self._total + size > _MOST:
            return
        if self._used + size > len(self._block):
            self._block, self._used = _shared(max(size, _BLOCK), self._dtype), 0
        slot = self._block[self._used : self._used + size]
        self._used, self._total = self._used + size, self._total + size
        known = slot[-padded(1) :].numpy().view(np.uint8)
        self._slots[data] = Kept(slot[: count * count].view(count, count), known)

    def kept(self, data: Dataset) -> "Kept | None":
        """The room for a device's matrix, for whoever fills it without ``of``; None = it was not worth it."""
        return self._slots.get(data)

    def of(self, data: Dataset | None, rows: Tensor) -> Tensor:
        """All products (n, n) of a device's rows (n, F), or of some that are not all it has (None)."""
        if data is None or (found := self._slots.get(data)) is None:
            return self._multiply(rows, rows.new_empty(rows.shape[0], rows.shape[0]))
        if not found.is_done:
            self._multiply(rows, found.gram)
            found.done()
        return found.gram

    def _multiply(self, rows: Tensor, out: Tensor) -> Tensor:
        torch.mm(rows, rows.t(), out=out)
        return out.add_(1) if self._biased else out


def worth_keeping(rows: int, features: int) -> bool:
    """Whether the products of so many rows take little memory beside the rows."""
    return rows * _WORTH <= features


def _shared(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros that forked processes share."""
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize), dtype=dtype)
