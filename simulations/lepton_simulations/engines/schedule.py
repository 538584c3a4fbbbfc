"""Which rows of a device go through which step.

Every mini-batch has the same number of places, so that batches of several devices stack; places beyond a
batch's size are padding, which must not move a weight. The order is that of ``Trainer.train``.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from lepton_fl.plan import LocalPlan
from lepton_simulations.engines.contract import Unsupported
from lepton_simulations.engines.library import library

_WIDTH = 8  # widths of devices with less than one full batch are multiples of this: fewer kinds of chunk


@dataclass(frozen=True, eq=False)
class Shape:
    """How the mini-batches of a device with so many rows are cut, whatever their order."""

    width: int  # places of a mini-batch B
    epochs: int  # that are begun
    sizes: NDArray[np.int64]  # (T,) rows that count, at the front of each
    steps: int  # T
    examples: int  # the sum of the sizes

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """(T, B) of each row in the mean over its mini-batch; padding has none."""
        sizes = self.sizes[:, None]
        return np.asarray((np.arange(self.width) < sizes) / sizes)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The mini-batches of one device."""

    shape: Shape
    rows: NDArray[np.int64]  # (T, B) row numbers; padding repeats row 0

    @property
    def steps(self) -> int:
        """Number of mini-batches T."""
        return self.shape.steps

    @property
    def width(self) -> int:
        """Places of a mini-batch B."""
        return self.shape.width

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(T,) rows that count, at the front of each mini-batch."""
        return self.shape.sizes


@lru_cache(4096)
def shape_of(rows: int, batch_size: int, epochs: int, max_steps: int) -> Shape:
    """How a device with so many rows is cut; see ``LocalPlan``."""
    width = min(batch_size, -rows // _WIDTH * -_WIDTH)  # a function of the device's own rows only
    per_epoch = -(-rows // batch_size)
    steps = epochs * per_epoch
    if max_steps and max_steps < steps:
        steps = max_steps
        epochs = -(-steps // per_epoch)
    sizes = np.full((epochs, per_epoch), min(width, rows))
    sizes[:, -1] = rows - (per_epoch - 1) * batch_size
    sizes = sizes.reshape(-1)[:steps]
    return Shape(width, epochs, sizes, steps, int(sizes.sum()))


def schedule(rows: int, seed: int, local: LocalPlan) -> Schedule:
    """The mini-batches of a device with so many rows."""
    shape = shape_of(rows, local.batch_size, local.epochs, local.max_steps)
    order = np.empty((shape.epochs, -(-rows // shape.width) * shape.width), np.int64)
    shuffled, functions = local.batch_size < rows, compiled_order()
    if functions is None or not 0 <= seed < 2**64:
        _draw(order, rows, seed, shuffled=shuffled)
    else:
        functions.lepton_order(seed, rows, *order.shape, shuffled, order.__array_interface__["data"][0])
    return Schedule(shape, order.reshape(-1, shape.width)[: shape.steps])


def _draw(order: NDArray[np.int64], rows: int, seed: int, *, shuffled: bool) -> None:
    """The order of the rows in each epoch: (epochs, places), zeros where there are fewer rows than places."""
    rng = np.random.default_rng(seed)
    rng.integers(2**63)  # seeds torch in the trainer
    order[:] = 0
    for epoch in order:
        epoch[:rows] = rng.permutation(rows) if shuffled else np.arange(rows)


@cache
def compiled_order() -> ctypes.CDLL | None:
    """The functions of ``native.c``, if they draw what numpy draws; ten times as fast."""
    try:
        functions = library()
    except Unsupported:
        return None
    for seed in (0, 2**31, 2**63 - 1, *range(10**18, 10**18 + 20)):
        ours, theirs = np.empty((2, 71), np.int64), np.empty((2, 71), np.int64)
        functions.lepton_order(seed, 67, 2, 71, True, ours.ctypes.data)
        _draw(theirs, 67, seed, shuffled=True)
        if not np.array_equal(ours, theirs):
            return None
    return functions


def chunks(schedules: Sequence[Schedule], size: int) -> list[list[int]]:
    """Positions of devices that go together: of one width, those with most steps first.

    Args:
        schedules: of each device.
        size: devices in a chunk, at most.
    """
    groups: dict[int, list[int]] = {}
    for position, own in enumerate(schedules):
        groups.setdefault(own.width, []).append(position)
    found = []
    for group in groups.values():
        group.sort(key=lambda position: -schedules[position].steps)
        found += [group[first : first + size] for first in range(0, len(group), size)]
    return found
