"""Rows in memory: what every data source delivers and every trainer takes.

data = Dataset(x, y)      # x: (N, ...), y: (N, ...)
first_ten = data.take(np.arange(10))
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import DataError

Array = NDArray[Any]
Rows = NDArray[np.int64]  # row numbers

LINE = 64  # bytes of a cache line


@dataclass(frozen=True, eq=False)
class Dataset:
    """N rows of inputs and their targets."""

    x: Array  # (N, ...)
    y: Array  # (N, ...)

    def __post_init__(self) -> None:
        if self.x.ndim == 0 or self.y.ndim == 0 or len(self.x) != len(self.y):
            raise DataError(
                f"Inputs of shape {self.x.shape} and targets of shape {self.y.shape} differ in length.",
                hint="Every row of x needs exactly one row of y.",
            )

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.x)

    def take(self, rows: Rows) -> "Dataset":
        """These rows, copied."""
        return Dataset(self.x[rows], self.y[rows])

    def aligned(self) -> "Dataset":
        """The same rows, with the inputs where they begin at the start of a cache line."""
        if self.x.ctypes.data % LINE == 0 and self.x.flags.c_contiguous:
            return self
        room = np.empty(self.x.nbytes + LINE, np.uint8)
        begin = -room.ctypes.data % LINE
        x = room[begin : begin + self.x.nbytes].view(self.x.dtype).reshape(self.x.shape)
        x[...] = self.x
        return Dataset(x, self.y)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A whole data set as published: raw rows, and whose they are where that is known."""

    train: Dataset
    test: Dataset
    train_users: Array | None = None  # (N,) user id per training row
    test_users: Array | None = None  # (M,) user id per test row
