"""Chains of Linear and ReLU in C: one device at a time, whose weights stay in the cache.

The three products of a step are loops over tiles that stay in registers, with SGD inside that of the
weights' gradient; nothing else is left of a step, so small models train as fast as the processor multiplies.
``native.c`` is compiled on first use; see ``library``.
"""

from collections.abc import Iterator, Sequence
from math import prod
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from lepton_fl.plan import LocalPlan
from lepton_fl.tasks.data import Dataset
from lepton_fl.training.bridge import check_vector
from lepton_fl.training.trainer import Trainer, non_finite
from lepton_fl.vector import Vector
from lepton_simulations.engines.chain import FlattenSpec, LinearSpec, ReluSpec, SqueezeSpec
from lepton_simulations.engines.chained import ChainEngine, rule_of
from lepton_simulations.engines.contract import ClientWork, Elsewhere, Stop, Trained, Unsupported, stopped
from lepton_simulations.engines.layers import Rule, padded
from lepton_simulations.engines.library import library
from lepton_simulations.engines.schedule import Schedule, schedule

LOSSES = ("cross_entropy", "squared_error", "huber")  # their numbers in native.c
MOST_LAYERS = 16  # the same there
UPDATES = 4 * 2**20  # bytes of the updates of a chunk, which are added up while they are near
_MOST = 64  # devices in a chunk
_PATIENCE = 5 * 10**8  # multiplications between two questions whether to stop: some milliseconds
_WORDS = "start correction x targets at sizes width steps first last delta size"  # addresses and numbers
DEVICE = np.dtype(  # as in native.c
    [(name, np.int64) for name in _WORDS.split()]
    + [(name, np.float64) for name in ("square", "peak", "lost")]
)


class NativeEngine(ChainEngine):
    """See the module; made for one task and rows of one shape."""

    name, is_plain = "native", True

    def __init__(self, trainer: Trainer, sample: Dataset, *, chunk: int = 0) -> None:
        """Read the chain and load the library.

        Args:
            trainer: whose task; trains what does not fit here.
            sample: some device's rows; all have this shape.
            chunk: devices per call; 0 = as many as updates stay in the cache.

        Raises:
            Unsupported: the model, the loss, the device or the rows are none of those known here, or there is
                no compiler.
        """
        super().__init__(trainer, sample)
        self._layers = self._read_layers()
        self._functions = library(double=trainer.dtype == torch.float64)
        self._real = np.dtype(np.float64 if trainer.dtype == torch.float64 else np.float32)
        self._loss = LOSSES.index(str(trainer.task.loss))
        self._products = int((self._layers[:, 0] * self._layers[:, 1]).sum())  # of a row, one way
        self.chunk = chunk or max(1, min(_MOST, UPDATES // (4 * trainer.layout.size)))
        self._memory = torch.zeros(0, padded(trainer.layout.size), dtype=trainer.dtype)
        self._room, self._places = torch.zeros(0, dtype=trainer.dtype), 0
        # Where a device's rows and targets are, and the latter themselves.
        self._inputs: WeakKeyDictionary[Dataset, tuple[int, int, object]] = WeakKeyDictionary()

    def train(
        self,
        start: Vector,
        clients: Sequence[ClientWork],
        local: LocalPlan,
        *,
        should_stop: Stop | None = None,
    ) -> Trained:
        """See ``Engine.train``; ``should_stop`` is asked before every device, and every few milliseconds."""
        check_vector(self._trainer.layout, start)
        rule, common = _numbers(rule_of(local)), self._vector(start)
        begins = _address(common)
        if len(self._memory) < len(clients):
            self._memory = self._memory.new_zeros(len(clients), self._memory.shape[1])
        trained = Trained.of(self._memory[: len(clients), : len(start)].numpy())
        told, held = list[tuple[float, ...]](), list[object]()
        positions, plans = list[int](), list[Schedule]()
        first, stride = _address(trained.deltas), trained.deltas.strides[0]
        for position, client in enumerate(clients):
            if self._rows_of(client) is None:
                self._lean.train_one(start, client, local, trained, position, should_stop)
                continue
            plan = schedule(len(client.data), client.seed, local)
            numbers, used = self._device(client, plan, begins, first + position * stride, len(start))
            told.append(numbers)
            held.append(used)
            positions.append(position)
            plans.append(plan)
        if len(plans) == len(clients) and self._real == np.float32:
            trained.looked = np.zeros(len(plans)), np.zeros(len(plans), np.float32)
        self._run(np.array(told, DEVICE), plans, positions, rule, trained, should_stop)
        return trained

    def know(self, data: Dataset) -> None:
        """See ``Engine``."""
        super().know(data)
        if (rows := self._rows[data]) is not None:
            targets = np.ascontiguousarray(data.y, None if self._loss == 0 else self._real)
            self._inputs[data] = rows.data_ptr(), _address(targets), targets

    def _device(
        self, client: ClientWork, plan: Schedule, begins: int, delta: int, size: int
    ) -> tuple[tuple[float, ...], object]:
        """What C is told of a device, and what must be held as long as C may look there."""
        start = None if client.start is None else self._vector(client.start)
        correction = None if client.correction is None else self._vector(client.correction)
        shape, (rows, targets, _) = plan.shape, self._inputs[client.data]
        told = (
            begins if start is None else _address(start), 0 if correction is None else _address(correction),
            rows, targets, _address(plan.rows), _address(shape.sizes), shape.width, shape.steps, 0,
            shape.steps, delta, size, 0.0, 0.0, 0.0,
        )  # fmt: skip
        return told, (start, correction)

    def _run(
        self,
        table: NDArray[np.void],
        plans: Sequence[Schedule],
        positions: Sequence[int],
        rule: NDArray[np.float64],
        trained: Trained,
        should_stop: Stop | None,
    ) -> None:
        """Train these devices, and note how it went."""
        self._have_room(max((plan.width for plan in plans), default=0))
        devices, done = table.ctypes.data, len(plans)  # __array_interface__ would spell out all fields
        for part in self._parts(table):
            if should_stop is not None and should_stop():
                done = part.start
                break
            self._functions.lepton_train(
                _address(self._layers), len(self._layers), self._loss, _address(rule),
                devices + part.start * DEVICE.itemsize, part.stop - part.start, self._places,
                self._room.data_ptr(),
            )  # fmt: skip
        self._note(positions[:done], plans[:done], table[:done], trained)
        for number in range(done, len(plans)):
            trained.fail(positions[number], stopped(int(table["first"][number])))

    @staticmethod
    def _note(
        at: Sequence[int], plans: Sequence[Schedule], table: NDArray[np.void], trained: Trained
    ) -> None:
        lost, steps = table["lost"], table["steps"]
        trained.steps[at], trained.loss_sum[at] = steps, lost
        trained.seen[at] = [plan.shape.examples for plan in plans]
        if trained.looked is not None:
            norms, peaks = trained.looked
            norms[at], peaks[at] = np.sqrt(table["square"]), table["peak"]
        for number in np.flatnonzero(~np.isfinite(lost)).tolist():
            trained.fail(at[number], non_finite(float(lost[number]), int(steps[number])))

    def _parts(self, table: NDArray[np.void]) -> Iterator[slice]:
        """The devices of each call: several, or one and a part of its steps."""
        each = (3 * self._products * table["width"]).tolist()  # of a step
        steps, begin = table["steps"].tolist(), 0
        while begin < len(table):
            end, spent = begin + 1, each[begin] * steps[begin]
            while end < len(table) and spent + each[end] * steps[end] <= _PATIENCE:
                spent += each[end] * steps[end]
                end += 1
            stride = max(1, _PATIENCE // each[begin]) if spent > _PATIENCE else steps[begin]
            for first in range(0, steps[begin], stride):
                if spent > _PATIENCE:
                    table["first"][begin] = first
                    table["last"][begin] = min(steps[begin], first + stride)
                yield slice(begin, end)
            begin = end

    def _have_room(self, places: int) -> None:
        if places > self._places:
            size = self._functions.lepton_room(self._layers.ctypes.data, len(self._layers), places)
            self._room, self._places = torch.zeros(size, dtype=self._trainer.dtype), places

    def _vector(self, vector: Vector) -> NDArray[np.floating]:
        """At a multiple of 64 bytes, where C can read it as weights."""
        found = np.ascontiguousarray(vector, self._real)
        if _address(found) % 64 == 0:
            return found
        aligned = torch.empty(len(found), dtype=self._trainer.dtype).numpy()
        aligned[:] = found
        return aligned

    def _read_layers(self) -> NDArray[np.int64]:
        """(L, 5): inputs, outputs, whether a ReLU follows, and where weight and bias (-1: none) stand.

        Raises:
            Unsupported: there are other layers, or too many.
        """
        if not self.dense:
            raise Elsewhere("it has convolutions")
        layers: list[list[int]] = []
        for spec in self._specs:
            if isinstance(spec, LinearSpec):
                slot, bias = self._slots[spec.weight], self._slots.get(spec.bias or "")
                layers.append([slot.shape[1], slot.shape[0], 0, slot.start, bias.start if bias else -1])
            elif isinstance(spec, ReluSpec):
                if not layers:
                    raise Unsupported("it begins with a ReLU")
                layers[-1][2] = 1
            elif not isinstance(spec, FlattenSpec | SqueezeSpec):
                raise Unsupported(f"it has a layer of type {type(spec).__name__}")
        if not 0 < len(layers) <= MOST_LAYERS:
            raise Unsupported(f"it has {len(layers)} linear layers, not 1 to {MOST_LAYERS}")
        if layers[0][0] != prod(self._shape):
            raise Unsupported(f"its first layer takes {layers[0][0]} of {prod(self._shape)} numbers")
        return np.array(layers, np.int64)


def _numbers(rule: Rule) -> NDArray[np.float64]:
    return np.array([rule.rate, rule.decay, rule.mu, rule.momentum])


def _address(array: NDArray[np.generic]) -> int:
    address: int = array.__array_interface__["data"][0]  # half the time of array.ctypes.data
    return address
