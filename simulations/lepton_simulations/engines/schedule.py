"""Which rows of a device go through which step.

Every mini-batch has the same number of places, so that batches of several devices stack; places beyond a
batch's size are padding, which must not move a weight. The order is that of ``Trainer.train``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lepton_fl.plan import LocalPlan

_WIDTH = 8  # widths of devices with less than one full batch are multiples of this: fewer kinds of chunk


@dataclass(frozen=True, eq=False)
class Shape:
    """How the mini-batches of a device with so many rows are cut, whatever their order."""

    width: int  # places of a mini-batch B
    epochs: int  # that are begun
    sizes: NDArray[np.int64]  # (T,) rows that count, at the front of each
    steps: int  # T
    examples: int  # the sum of the sizes


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
def _shape(rows: int, batch_size: int, epochs: int, max_steps: int) -> Shape:
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
    shape = _shape(rows, local.batch_size, local.epochs, local.max_steps)
    rng = np.random.default_rng(seed)
    rng.integers(2**63)  # seeds torch in the trainer
    places = -(-rows // shape.width) * shape.width
    order = np.zeros((shape.epochs, places), np.int64)
    for epoch in order:
        epoch[:rows] = np.arange(rows) if local.batch_size >= rows else rng.permutation(rows)
    return Schedule(shape, order.reshape(-1, shape.width)[: shape.steps])


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
