"""What all virtual devices remember of a run: SCAFFOLD's controls, personal heads.

One table for the whole fleet, in memory that worker processes share, or in a file of the run's folder: then
a simulation that goes on finds it again. A device that never took part costs no memory. Room for a row is had
before it is written; where there is none, the run ends with ``DiskFull``. The rules are those
of a real device's files (see ``lepton_fl.training.memory``): what an attempt left behind becomes effective
when a later plan says that the attempt has counted.

    memory = FleetMemory(devices, spec.local, layout)          # before the workers are forked
    state = memory.state(device_id, plan, model, control, num_trained)
    ...                                                         # train with state.start, state.correction
    sent = outgoing(states, deltas, steps, learning_rate)       # (K, P + A), to be encoded
    memory.keep(device_id, plan, state.leaves(delta, update, plan.grid_step))
"""

import mmap
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import DiskFull, StateCorrupt
from lepton_fl.plan import LocalPlan, RoundPlan
from lepton_fl.training.local import LocalState
from lepton_fl.training.memory import CONTROL, PERSONAL, Counted
from lepton_fl.vector import Layout, Vector
from lepton_simulations.appended import on_disk

TABLE: Final = "devices.memory"  # the file in a run's folder
# Columns of a device's tags: whether something is effective; round and attempt of what was left behind, or 0.
_SETTLED, _ROUND = 0, 1
_LEFT: Final = 1  # of the two vectors of a device: the other one is _SETTLED


class FleetMemory:
    """A row for each device: what is effective, what its last attempt left behind, and which one that was."""

    def __init__(
        self, devices: Sequence[str], local: LocalPlan, layout: Layout, folder: Path | None = None
    ) -> None:
        """Open the table, or make an empty one.

        Args:
            devices: of the fleet.
            local: says what there is to remember.
            layout: of the model.
            folder: where the file is; None = in memory only.

        Raises:
            DiskFull, StateError: the file cannot be used.
            StateCorrupt: it is of another fleet or model.
        """
        self.full: DiskFull | None = None  # once no room was left for a row
        self._local, self._layout = local, layout
        self._row = {device_id: row for row, device_id in enumerate(devices)}
        self._sizes = _sizes(local, layout)
        width, count = sum(self._sizes.values()), len(devices)
        self._tags: NDArray[np.int64]
        self._settled: NDArray[np.float32]
        self._left: NDArray[np.float32]
        size = 8 * 3 * count + 2 * 4 * count * width
        self._file = _File(folder / TABLE, size) if folder else None
        whole = self._file.map() if self._file else _anonymous(size)
        self._start = {_SETTLED: 24 * count, _LEFT: 24 * count + 4 * count * width}  # of the rows, in bytes
        self._real = {_SETTLED: set[int](), _LEFT: set[int]()}  # rows that have room on the disk for certain
        self._make_room(0, 24 * count)
        self._tags = whole[: 24 * count].view(np.int64).reshape(count, 3)
        vectors = whole[24 * count :].view(np.float32).reshape(2, count, width)
        self._settled, self._left = vectors[0], vectors[1]

    def of(self, device_id: str) -> "DeviceMemory":
        """One device's part, as ``training.memory.Memory``."""
        return DeviceMemory(self, self._row[device_id])

    def state(
        self, device_id: str, plan: RoundPlan, model: Vector, control: Vector | None, num_trained: int
    ) -> LocalState:
        """What a device brings to a training, or evaluation, besides its data; see ``LocalState.of``."""
        held = self.recall(self._row[device_id], plan.counted)
        return LocalState.of(self._local, self._layout, num_trained, model, control, held)

    def keep(self, device_id: str, plan: RoundPlan, vectors: Mapping[str, Vector]) -> None:
        """Keep what an attempt leaves behind.

        Raises:
            DiskFull: no room is left for it; what was there is unchanged.
        """
        self.write(self._row[device_id], plan.round, plan.attempt, vectors)

    def refused(self, device_id: str) -> None:
        """The device's last answer did not count."""
        self._tags[self._row[device_id], _ROUND:] = 0

    def rewind(self, round_number: int) -> None:
        """Forget what was left behind after this round: the run goes on from there."""
        self._tags[self._tags[:, _ROUND] > round_number, _ROUND:] = 0

    def recall(self, row: int, counted: Counted) -> dict[str, Vector]:
        """See ``Memory``; the vectors are views.

        Raises:
            DiskFull: as ``keep``.
        """
        settled, round_number, attempt = self._tags[row].tolist()
        if round_number and counted(round_number, attempt):
            self._make_real(_SETTLED, row)
            self._settled[row] = self._left[row]
            self._tags[row, _SETTLED] = settled = 1
        self._tags[row, _ROUND:] = 0
        return self._named(self._settled[row]) if settled else {}

    def write(self, row: int, round_number: int, attempt: int, vectors: Mapping[str, Vector]) -> None:
        """See ``Memory.keep``."""
        self._make_real(_LEFT, row)
        self._tags[row, _ROUND:] = 0  # in between, nothing is left behind
        for name, part in self._named(self._left[row]).items():
            part[:] = vectors[name]
        self._tags[row, _ROUND:] = round_number, attempt

    def _make_real(self, vector: int, row: int) -> None:
        """Have room for a row before it is written: a page that cannot be had kills the process."""
        if row not in self._real[vector]:
            length = 4 * self._left.shape[1]
            self._make_room(self._start[vector] + row * length, length)
            self._real[vector].add(row)

    def _make_room(self, start: int, length: int) -> None:
        if self._file is None:
            return
        try:
            self._file.make_room(start, length)
        except DiskFull as error:
            self.full = error
            raise

    def _named(self, values: Vector) -> dict[str, Vector]:
        parts, start = {}, 0
        for name, size in self._sizes.items():
            parts[name] = values[start : start + size]
            start += size
        return parts


def outgoing(
    states: Sequence[LocalState], deltas: Vector, steps: NDArray[np.int64], learning_rate: float
) -> Vector:
    """What a chunk of devices is to send; see ``LocalState.outgoing``.

    Args:
        states: of K devices.
        deltas: (K, P) float32, trained minus start.
        steps: (K,) mini-batches; a device that failed has 0, and sends zeros.
        learning_rate: of the training.

    Returns:
        (K, P + A) float32.
    """
    rows = [
        state.outgoing(delta, max(1, int(count)), learning_rate)
        for state, delta, count in zip(states, deltas, steps, strict=True)
    ]
    return np.stack(rows)


class DeviceMemory:
    """One row of the table; implements ``training.memory.Memory``. A simulation has one run."""

    def __init__(self, fleet: FleetMemory, row: int) -> None:
        self._fleet, self._row = fleet, row

    def recall(self, run_id: str, counted: Counted) -> Mapping[str, Vector]:
        """See ``Memory``."""
        return self._fleet.recall(self._row, counted)

    def keep(self, run_id: str, round_number: int, attempt: int, vectors: Mapping[str, Vector]) -> None:
        """See ``Memory``."""
        self._fleet.write(self._row, round_number, attempt, vectors)


def _sizes(local: LocalPlan, layout: Layout) -> dict[str, int]:
    sizes = {CONTROL: layout.size} if local.control_variates else {}
    if local.personal:
        sizes[PERSONAL] = int(layout.select(local.personal).sum())
    return sizes


def _anonymous(size: int) -> NDArray[np.uint8]:
    """Zeros, shared with forked processes."""
    return np.frombuffer(mmap.mmap(-1, max(1, size)), np.uint8, count=size)


class _File:
    """A sparse file, shared with forked processes; what it holds already is kept."""

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size
        with on_disk(path.parent):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            weakref.finalize(self, os.close, self._descriptor)
            found = os.fstat(self._descriptor).st_size
            if found not in (0, size):
                raise StateCorrupt(
                    f"{path} holds {found} bytes, the memory of this fleet takes {size}.",
                    hint="Continue with the scenario that the run was started with.",
                )
            os.ftruncate(self._descriptor, size)  # rows that nobody wrote take no room

    def map(self) -> NDArray[np.uint8]:
        """All of it."""
        with on_disk(self._path.parent):
            return np.frombuffer(mmap.mmap(self._descriptor, self._size), np.uint8)

    def make_room(self, start: int, length: int) -> None:
        """Bytes that can then be written; DiskFull where there is no room."""
        with on_disk(self._path.parent):
            os.posix_fallocate(self._descriptor, start, length)
