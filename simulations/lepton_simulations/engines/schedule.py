"""Which rows of a device go through which step.

Every mini-batch has the same number of places, so that batches of several devices stack; places beyond a
batch's size are padding, which must not move a weight. The order is that of ``Trainer.train``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lepton_fl.plan import LocalPlan

_WIDTH = 8  # widths of devices with less than one full batch are multiples of this: fewer kinds of chunk


@dataclass(frozen=True, eq=False)
class Schedule:
    """The mini-batches of one device."""

    rows: NDArray[np.int64]  # (T, B) row numbers; padding repeats row 0
    sizes: NDArray[np.int64]  # (T,) rows that count, at the front

    @property
    def steps(self) -> int:
        """Number of mini-batches T."""
        return len(self.sizes)

    @property
    def width(self) -> int:
        """Places of a mini-batch B."""
        return int(self.rows.shape[1])


def width_of(rows: int, local: LocalPlan) -> int:
    """Places of a mini-batch of a device with so many rows: a function of its own rows only."""
    return min(local.batch_size, -rows // _WIDTH * -_WIDTH)


def schedule(rows: int, seed: int, local: LocalPlan) -> Schedule:
    """The mini-batches of a device with so many rows."""
    rng = np.random.default_rng(seed)
    rng.integers(2**63)  # seeds torch in the trainer
    width = width_of(rows, local)
    per_epoch = -(-rows // local.batch_size)
    epochs, steps = local.epochs, local.epochs * per_epoch
    if local.max_steps and local.max_steps < steps:
        steps = local.max_steps
        epochs = -(-steps // per_epoch)
    order = np.zeros((epochs, per_epoch * width), np.int64)
    for epoch in order:
        epoch[:rows] = np.arange(rows) if local.batch_size >= rows else rng.permutation(rows)
    sizes = np.full((epochs, per_epoch), min(width, rows))
    sizes[:, -1] = rows - (per_epoch - 1) * width if per_epoch > 1 else rows
    return Schedule(order.reshape(-1, width)[:steps], sizes.reshape(-1)[:steps])


def chunks(schedules: Sequence[Schedule], kinds: Sequence[object], size: int) -> list[NDArray[np.int64]]:
    """Positions of devices that go together: of one kind and width, those with most steps first.

    Args:
        schedules: of each device.
        kinds: of each device; any values that can be compared for equality.
        size: devices in a chunk, at most.
    """
    groups: dict[object, list[int]] = {}
    for position, (own, kind) in enumerate(zip(schedules, kinds, strict=True)):
        groups.setdefault((kind, own.width), []).append(position)
    found = []
    for group in groups.values():
        group.sort(key=lambda position: -schedules[position].steps)
        found += [np.array(group[first : first + size]) for first in range(0, len(group), size)]
    return found
