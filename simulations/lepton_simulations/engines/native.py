"""Chains of Linear and ReLU in C: one device at a time, whose weights stay in the cache.

The three products of a step are loops over tiles that stay in registers, with SGD inside that of the
weights' gradient; nothing else is left of a step, so small models train as fast as the processor multiplies.
With few rows and plain SGD, the first layer does without weights of its own (see ``dual``), and the update is
not written: its products go straight to the sum of the round as whole grid steps, as soon as somebody adds
them. Whoever asks for the numbers gets them.
``native.c`` is compiled on first use; see ``library``.
"""

from collections.abc import Iterator, Sequence
from ctypes import CDLL
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lepton_fl.plan import LocalPlan
from lepton_fl.tasks.data import Dataset
from lepton_fl.training.bridge import check_vector
from lepton_fl.training.trainer import Trainer, non_finite
from lepton_fl.vector import Vector
from lepton_simulations.engines.chain import FlattenSpec, LinearSpec, ReluSpec, SqueezeSpec
from lepton_simulations.engines.chained import ChainEngine, rule_of
from lepton_simulations.engines.contract import ClientWork, Elsewhere, Stop, Trained, Unsupported, stopped
from lepton_simulations.engines.grams import Grams, Kept
from lepton_simulations.engines.layers import Rule, padded
from lepton_simulations.engines.library import library
from lepton_simulations.engines.schedule import Shape, compiled_order, shape_of

LOSSES = ("cross_entropy", "squared_error", "huber")  # their numbers in native.c
MOST_LAYERS = 16  # the same there
UPDATES = 4 * 2**20  # bytes of the updates of a chunk, which are added up while they are near
_MOST = 64  # devices in a chunk
_PATIENCE = 5 * 10**8  # multiplications between two questions whether to stop: some milliseconds
_FEW = 512  # rows of a device whose first layer has no weights of its own; as in native.c
# What C is told of a device, in int64: addresses and numbers, as in native.c.
_START, _CORRECTION, _X, _TARGETS, _SEED, _EPOCHS, _PLACES, _SHUFFLED, _SIZES, _WIDTH = range(10)
_STEPS, _EXAMPLES, _ROWS, _FIRST, _LAST, _ORDER, _DELTA, _SIZE, _MOVED, _LATER, _GRAM, _MET = range(10, 22)


class NativeEngine(ChainEngine):
    """See the module; made for one task and rows of one shape."""

    name, is_plain = "native", True

    def __init__(self, trainer: Trainer, sample: Dataset, *, chunk: int = 0, spare: bool = True) -> None:
        """Read the chain and load the library.

        Args:
            trainer: whose task; trains what does not fit here.
            sample: some device's rows; all have this shape.
            chunk: devices per call; 0 = as many as updates stay in the cache.
            spare: whether first layers may do without weights of their own.

        Raises:
            Unsupported: the model, the loss, the device or the rows are none of those known here, or there is
                no compiler.
        """
        super().__init__(trainer, sample)
        self._layers, self._spares = self._read_layers(), spare
        self._functions = library(double=trainer.dtype == torch.float64)
        if compiled_order() is None:
            raise Unsupported("it draws another order of rows than numpy")
        self._real = np.dtype(np.float64 if trainer.dtype == torch.float64 else np.float32)
        self._loss = LOSSES.index(str(trainer.task.loss))
        self._products = int((self._layers[:, 0] * self._layers[:, 1]).sum())  # of a row, one way
        self.chunk = chunk or max(1, min(_MOST, UPDATES // (4 * trainer.layout.size)))
        self._memory = torch.zeros(0, padded(trainer.layout.size), dtype=trainer.dtype)
        self._room, self._places, self._rows_held = torch.zeros(0, dtype=trainer.dtype), 0, 0
        self._moves = torch.zeros(0, 0, dtype=trainer.dtype)  # of devices whose first layer has no weights
        self._unkept = torch.zeros(0, 0, dtype=trainer.dtype)  # products of the rows of the others
        self._grams = Grams(trainer.dtype, biased=bool(self._layers[0, 4] >= 0))
        self._orders = np.empty(0, np.int64)  # of the rows of a chunk's devices
        self._inputs: WeakKeyDictionary[Dataset, _Inputs] = WeakKeyDictionary()

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
        told, held, positions = list[tuple[int, ...]](), list[object](), list[int]()
        inputs = list[_Inputs]()
        for position, client in enumerate(clients):
            if self._rows_of(client) is None or not 0 <= client.seed < 2**63:
                self._lean.train_one(start, client, local, trained, position, should_stop)
                continue
            words, _ = _cut(len(client.data), local.batch_size, local.epochs, local.max_steps)
            told.append((*self._addresses(client, begins, held), client.seed, *words))
            positions.append(position)
            inputs.append(self._inputs[client.data])
        if not told:
            return trained
        table = self._table(told, positions, trained)
        self._spare_weights(table, inputs, rule)
        if len(told) == len(clients) and self._real == np.float32:
            if table[:, _MOVED].all():
                table[:, _LATER] = 1
                trained.unwritten = _Moves(self._functions, self._layers, table, self._moves, held)
            else:
                trained.looked = np.zeros(len(told)), np.zeros(len(told), np.float32)
        for number in self._run(table, positions, rule, trained, should_stop):
            if table[number, _GRAM] and (kept := inputs[number].kept):
                kept.done()
        return trained

    def know(self, data: Dataset) -> None:
        """See ``Engine``."""
        super().know(data)
        if (rows := self._rows[data]) is not None:
            targets = np.ascontiguousarray(data.y, None if self._loss == 0 else self._real)
            self._grams.reserve(data, rows)
            kept = self._grams.kept(data)
            self._inputs[data] = _Inputs(rows.data_ptr(), _address(targets), targets, kept)

    def _addresses(self, client: ClientWork, begins: int, held: list[object]) -> tuple[int, int, int, int]:
        """Where C finds what a device brings; ``held`` keeps what is made for it."""
        known = self._inputs[client.data]
        if client.start is None and client.correction is None:
            return begins, 0, known.rows, known.targets
        start = None if client.start is None else self._vector(client.start)
        correction = None if client.correction is None else self._vector(client.correction)
        held += start, correction
        return (
            begins if start is None else _address(start),
            0 if correction is None else _address(correction),
            known.rows,
            known.targets,
        )

    def _table(
        self, told: Sequence[tuple[int, ...]], positions: Sequence[int], trained: Trained
    ) -> NDArray[np.int64]:
        """What C is told of all devices."""
        table = np.zeros((len(told), _MET + 1), np.int64)
        table[:, : _ROWS + 1] = told
        table[:, _LAST], table[:, _SIZE] = table[:, _STEPS], trained.rows.shape[1]
        table[:, _DELTA] = _address(trained.rows) + np.array(positions) * trained.rows.strides[0]
        longest = int((table[:, _EPOCHS] * table[:, _PLACES]).max())
        if len(self._orders) < len(told) * longest:
            self._orders = np.empty(len(told) * longest, np.int64)
        table[:, _ORDER] = _address(self._orders) + np.arange(len(told)) * 8 * longest
        return table

    def _spare_weights(
        self, table: NDArray[np.int64], inputs: Sequence["_Inputs"], rule: NDArray[np.float64]
    ) -> None:
        """Let the first layers of devices with few rows do without weights of their own."""
        few = self._are_few(table, rule)
        most = int(table[few, _ROWS].max(initial=0))
        self._have_room(int(table[:, _WIDTH].max()), most)
        if not most:
            return
        self._moves = self._at_least(self._moves, len(table), most * padded(int(self._layers[0, 1])))
        self._unkept = self._at_least(self._unkept, len(table), most * most)
        for found, of in ((self._moves, _MOVED), (self._unkept, _GRAM)):
            stride = found.stride(0) * self._real.itemsize
            table[:, of] = np.where(few, found.data_ptr() + np.arange(len(table)) * stride, 0)
        for row in np.flatnonzero(few).tolist():
            if kept := inputs[row].kept:
                table[row, _GRAM], table[row, _MET] = kept.address, kept.is_done

    def _at_least(self, held: Tensor, count: int, size: int) -> Tensor:
        """Work memory (count, size) or larger."""
        large = held.shape[0] >= count and held.shape[1] >= size
        return held if large else torch.zeros(count, size, dtype=self._trainer.dtype)

    def _are_few(self, table: NDArray[np.int64], rule: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which devices have so few rows that their first layer is better off without weights of its own."""
        inputs, outputs = self._layers[0, :2].tolist()
        if len(self._layers) < 2 or rule[1:].any() or inputs % 16 or outputs % 4 or not self._spares:
            return np.zeros(len(table), np.bool_)
        few: NDArray[np.bool_] = table[:, _ROWS] <= min(_FEW, 2 * outputs)  # about where it begins to pay
        few &= self._costs(table) <= _PATIENCE
        few &= table[:, _CORRECTION] == 0
        few &= table[:, _X] % 64 == 0
        return few

    def _costs(self, table: NDArray[np.int64]) -> NDArray[np.int64]:
        """Multiplications of each device."""
        costs: NDArray[np.int64] = 3 * self._products * table[:, _WIDTH] * table[:, _STEPS]
        return costs

    def _run(
        self,
        table: NDArray[np.int64],
        positions: Sequence[int],
        rule: NDArray[np.float64],
        trained: Trained,
        should_stop: Stop | None,
    ) -> range:
        """Train these devices, and note how it went; which of them are done."""
        results, done = np.zeros((len(table), 3)), len(table)
        for part in self._parts(table):
            if should_stop is not None and should_stop():
                done = part.start
                break
            self._functions.lepton_train(
                _address(self._layers), len(self._layers), self._loss, _address(rule),
                _address(table) + part.start * table.strides[0], part.stop - part.start, self._places,
                self._room.data_ptr(), _address(results) + part.start * results.strides[0],
            )  # fmt: skip
        self._note(positions[:done], table[:done], results[:done], trained)
        for number in range(done, len(table)):
            trained.fail(positions[number], stopped(int(table[number, _FIRST])))
        return range(done)

    @staticmethod
    def _note(
        at: Sequence[int], table: NDArray[np.int64], results: NDArray[np.float64], trained: Trained
    ) -> None:
        lost, square, peak = results.T
        trained.steps[at], trained.loss_sum[at] = table[:, _STEPS], lost
        trained.seen[at] = table[:, _EXAMPLES]
        if trained.looked is not None:
            norms, peaks = trained.looked
            norms[at], peaks[at] = np.sqrt(square), peak
        if not np.isfinite(lost).all():
            for number in np.flatnonzero(~np.isfinite(lost)).tolist():
                trained.fail(at[number], non_finite(float(lost[number]), int(table[number, _STEPS])))

    def _parts(self, table: NDArray[np.int64]) -> Iterator[slice]:
        """The devices of each call: several, or one and a part of its steps."""
        costs = self._costs(table).tolist()
        begin = 0
        while begin < len(table):
            end, spent = begin + 1, costs[begin]
            while end < len(table) and spent + costs[end] <= _PATIENCE:
                spent += costs[end]
                end += 1
            steps = int(table[begin, _STEPS])
            stride = max(1, _PATIENCE * steps // costs[begin]) if spent > _PATIENCE else steps
            for first in range(0, steps, stride):
                if spent > _PATIENCE:
                    table[begin, _FIRST], table[begin, _LAST] = first, min(steps, first + stride)
                yield slice(begin, end)
            begin = end

    def _have_room(self, places: int, rows: int) -> None:
        places, rows = max(places, self._places), max(rows, self._rows_held)
        if (places, rows) != (self._places, self._rows_held):
            size = self._functions.lepton_room(self._layers.ctypes.data, len(self._layers), places, rows)
            self._room = torch.zeros(size, dtype=self._trainer.dtype)
            self._places, self._rows_held = places, rows

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


@dataclass(eq=False)
class _Inputs:
    """What is known of a device's data."""

    rows: int  # addresses
    targets: int
    held: object  # the targets
    kept: Kept | None  # room for the products of its rows with each other


class _Moves:
    """Updates as C has left them; implements ``contract.Unwritten``."""

    def __init__(
        self,
        functions: CDLL,
        layers: NDArray[np.int64],
        table: NDArray[np.int64],
        moves: Tensor,
        held: Sequence[object],
    ) -> None:
        self._functions, self._layers, self._table = functions, layers, table
        self._moves, self._held = moves, held

    def write(self) -> None:
        """See ``Unwritten``."""
        self._functions.lepton_finish(_address(self._layers), _address(self._table), len(self._table))

    def clear(self, position: int) -> None:
        """See ``Unwritten``."""
        self._moves[position] = 0

    def norms(self) -> NDArray[np.float64]:
        """See ``Unwritten``."""
        most, squares = int(self._table[:, _ROWS].max()), np.empty(len(self._table))
        room = self._moves.new_empty(most, most)
        self._functions.lepton_reach(
            _address(self._layers),
            _address(self._table),
            len(self._table),
            room.data_ptr(),
            _address(squares),
        )
        return np.sqrt(squares)

    def add(
        self, factors: Vector, limit: float, weights: NDArray[np.int64], total: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """See ``Unwritten``."""
        squares = np.zeros(len(self._table))
        self._functions.lepton_add_moves(
            _address(self._layers), _address(self._table), len(self._table), _address(factors), limit,
            _address(weights), _address(total), _address(squares),
        )  # fmt: skip
        return squares


@lru_cache(4096)
def _cut(rows: int, batch_size: int, epochs: int, max_steps: int) -> tuple[tuple[int, ...], Shape]:
    """How C is to cut a device's rows: the words from ``_EPOCHS`` to ``_ROWS``, and what they point at."""
    shape = shape_of(rows, batch_size, epochs, max_steps)
    places, sizes = -(-rows // shape.width) * shape.width, _address(shape.sizes)
    return (
        shape.epochs, places, int(batch_size < rows), sizes, shape.width, shape.steps, shape.examples, rows,
    ), shape  # fmt: skip


def _numbers(rule: Rule) -> NDArray[np.float64]:
    return np.array([rule.rate, rule.decay, rule.mu, rule.momentum])


def _address(array: NDArray[np.generic]) -> int:
    address: int = array.__array_interface__["data"][0]  # half the time of array.ctypes.data
    return address
