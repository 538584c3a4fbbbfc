"""Chains of Linear, Conv2d, GroupNorm, ReLU and MaxPool2d with an explicit backward pass.

No autograd, no gradient tensors: the weight-gradient product adds straight to the weights, with SGD's rate
and weight decay as its factors. Dense chains take K devices per call, so that the few operations of a step
are shared by all of them; so do chains that end in a large dense layer, for its weights. Convolutions take
one device after the other, each of which fills the core by itself. Work memory is kept and stays in the
cache. Measured reasons are in docs/simulation.md.
"""

from collections.abc import Sequence
from ctypes import CDLL
from dataclasses import dataclass
from math import isfinite, prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lepton_fl.plan import LocalPlan
from lepton_fl.tasks.data import Dataset
from lepton_fl.training.bridge import check_vector
from lepton_fl.training.trainer import Trainer, non_finite
from lepton_fl.vector import Slot, Vector
from lepton_simulations.engines.batches import Chunk, Halted, targets, vectors
from lepton_simulations.engines.chain import (
    ConvSpec,
    FlattenSpec,
    LinearSpec,
    NormSpec,
    PoolSpec,
    ReluSpec,
)
from lepton_simulations.engines.chained import ChainEngine, rule_of
from lepton_simulations.engines.contract import ClientWork, Stop, Trained, Unsupported, stopped
from lepton_simulations.engines.dual import DualDense, pays
from lepton_simulations.engines.grams import Grams
from lepton_simulations.engines.hidden import Hidden
from lepton_simulations.engines.hidden import pays as hidden_pays
from lepton_simulations.engines.layers import (
    Conv,
    Dense,
    ImageLayer,
    Images,
    Layer,
    Norm,
    Pool,
    PooledConv,
    Relu,
    Room,
    Rule,
    padded,
)
from lepton_simulations.engines.library import library
from lepton_simulations.engines.losses import CrossEntropy, Difference, Loss
from lepton_simulations.engines.schedule import Shape, chunks, schedule

CACHE = 4 * 2**20  # bytes of weights that stay near a core
DUAL_CACHE = 13 * 2**20  # bytes of updates, where weights are not touched in between
_SMALL = Shape(10, 1, np.full(6, 10), 6, 60)  # a device with few rows
_MOST = 64  # devices side by side
_ABREAST = 2  # the same of convolutions, where they share large weights behind them
_PROGRAMS = 8  # kinds of chunk whose memory is kept
_FEED = 2 * 2**20  # bytes of rows laid out at a time


class FusedEngine(ChainEngine):
    """See the module; made for one task and rows of one shape."""

    name, is_plain = "fused", True

    def __init__(self, trainer: Trainer, sample: Dataset, *, chunk: int = 0, dual: bool = True) -> None:
        """Read the chain.

        Args:
            trainer: whose task; trains what does not fit here.
            sample: some device's rows; all have this shape.
            chunk: devices side by side in a dense chain; 0 = as many as the cache holds.
            dual: whether a layer may do without its weights where that is faster.

        Raises:
            Unsupported: the model, the loss, the device or the rows are none of those known here.
        """
        super().__init__(trainer, sample)
        self._room = Room(trainer.dtype)
        self._functions = None if self.dense else _functions(trainer.dtype)
        self._bare = self._without_weights() if dual else None
        biased = self._bare is not None and self._bare.bias is not None
        self._grams = Grams(trainer.dtype, biased=biased)
        self._flat_at = self._flattened()
        self._most_direct = (chunk or self._devices(CACHE)) if self.dense else 1
        self._most = chunk or (self._devices(DUAL_CACHE) if self.dense else _ABREAST)
        many = self._is_dual(_SMALL, _SMALL.examples, Rule(0.1, 0, 0, 0), False)
        self.chunk = self._most if many else self._most_direct
        self._programs: dict[tuple[int, bool, int], _Program] = {}
        self._memory = torch.zeros(0, padded(trainer.layout.size), dtype=trainer.dtype)

    def train(
        self,
        start: Vector,
        clients: Sequence[ClientWork],
        local: LocalPlan,
        *,
        should_stop: Stop | None = None,
    ) -> Trained:
        """See ``Engine.train``."""
        check_vector(self._trainer.layout, start)
        rule = rule_of(local)
        if len(self._memory) < len(clients):
            self._memory = self._memory.new_zeros(len(clients), self._memory.shape[1])
        deltas = self._memory[: len(clients), : len(start)]
        trained = Trained.of(deltas.numpy())
        rows = [self._rows_of(client) for client in clients]
        fitting = [i for i, x in enumerate(rows) if x is not None]
        for position in set(range(len(clients))).difference(fitting):
            self._lean.train_one(start, clients[position], local, trained, position, should_stop)
        plans = [schedule(len(clients[i].data), clients[i].seed, local) for i in fitting]
        kinds = [
            self._is_dual(plan.shape, len(clients[i].data), rule, clients[i].correction is not None)
            for i, plan in zip(fitting, plans, strict=True)
        ]
        common = self._flat(start)[None]
        for dual, most in ((True, self._most), (False, self._most_direct)):
            some = [k for k, kind in enumerate(kinds) if kind == dual]
            for group in chunks([plans[k] for k in some], most):
                at = [fitting[some[k]] for k in group]
                chunk = Chunk([clients[i] for i in at], [plans[some[k]] for k in group], at)
                inputs = [x for i in at if (x := rows[i]) is not None]
                program = self._program(chunk.plans[0].width, dual, most if len(at) > 1 else 1)
                program.train(common, chunk, inputs, rule, deltas, trained, should_stop)
        return trained

    def know(self, data: Dataset) -> None:
        """See ``Engine``."""
        super().know(data)
        if self.dense and self._bare is not None and (rows := self._rows[data]) is not None:
            self._grams.reserve(data, rows)

    def _devices(self, cache: int) -> int:
        return max(1, min(_MOST, cache // (4 * self._trainer.layout.size)))

    def _flattened(self) -> int:
        """Which layer makes images flat; those behind it are dense."""
        at = next((i for i, spec in enumerate(self._specs) if isinstance(spec, FlattenSpec)), 0)
        if not self.dense and not any(isinstance(spec, LinearSpec) for spec in self._specs[at:]):
            raise Unsupported("no linear layer follows those for images")
        return at

    def _without_weights(self) -> LinearSpec | None:
        """The layer that may do without its weights: the first, or behind images the largest."""
        linear = [spec for spec in self._specs if isinstance(spec, LinearSpec)][:-1]
        return max(linear, key=self._cells) if linear and not self.dense else next(iter(linear), None)

    def _cells(self, spec: LinearSpec) -> int:
        return prod(self._slots[spec.weight].shape)

    def _is_dual(self, plan: Shape, rows: int, rule: Rule, corrected: bool) -> bool:
        """Whether a device is trained faster this way."""
        if self._bare is None or rule.momentum:
            return False
        if self.dense:
            return pays(self._slots[self._bare.weight].shape, plan, rows)
        return not corrected and hidden_pays(self._cells(self._bare), plan)

    def _program(self, width: int, dual: bool, devices: int) -> "_Program":
        key = (width, dual, devices)
        if key not in self._programs:
            if len(self._programs) == _PROGRAMS:
                del self._programs[next(iter(self._programs))]
            self._programs[key] = _Program(self, width, dual, devices)
        return self._programs[key]

    def make_loss(self) -> Loss:
        """A fresh loss of the task."""
        if self._trainer.task.loss == "cross_entropy":
            return CrossEntropy(self._room, self._outputs)
        return Difference(self._room, self._outputs, huber=self._trainer.task.loss == "huber")

    def make_layers(self, width: int, devices: int, dual: bool) -> list[Layer]:
        """Fresh dense layers for K devices with so many places in a mini-batch."""
        layers: list[Layer] = []
        linear = [spec for spec in self._specs if isinstance(spec, LinearSpec)]
        for spec in self._specs if self.dense else self._specs[self._flat_at :]:
            if isinstance(spec, ReluSpec):
                layers.append(Relu())
            if not isinstance(spec, LinearSpec) or (self.dense and dual and spec is self._bare):
                continue
            logits = spec is linear[-1] and self._trainer.task.loss == "cross_entropy"
            slots = self._slots[spec.weight], self._slots.get(spec.bias or "")
            if dual and spec is self._bare:
                layers.append(Hidden(*slots, devices, width, self._room, self._functions))
            else:
                layers.append(Dense(*slots, devices, width, self._room, logits, self._functions))
        return layers

    def make_images(self, width: int, devices: int) -> Images | None:
        """The layers before the chain is flat, where they are others."""
        if self.dense:
            return None
        layers: list[ImageLayer] = []
        for spec in self._specs[: self._flat_at]:
            if isinstance(spec, ConvSpec):
                slots = self._slots[spec.weight], self._slots.get(spec.bias or "")
                layers.append(Conv(spec, *slots, devices, self._room))
            elif isinstance(spec, NormSpec):
                slots = self._slots[spec.weight], self._slots[spec.bias]
                layers.append(Norm(spec, *slots, devices, self._room))
            elif isinstance(spec, PoolSpec):
                layers.append(Pool(spec))
                layers[-2:] = self._joined(layers[-2:])
            else:
                layers.append(Relu())
        [features] = self._shapes[self._flat_at]
        return Images(layers, features, devices, width, self._room)

    def _joined(self, layers: list[ImageLayer]) -> list[ImageLayer]:
        """A convolution and its pooling as one layer, where that is faster."""
        match layers:
            case [Conv() as conv, Pool() as pool] if PooledConv.pays(conv.weight.slot.shape):
                if self._functions is not None:
                    return [PooledConv(conv, pool, self._room, self._functions)]
        return layers

    @property
    def context(self) -> "_Context":
        """What programs need to know."""
        slots = None
        if self._bare is not None:
            slots = self._slots[self._bare.weight], self._slots.get(self._bare.bias or "")
        return _Context(self._trainer.dtype, self._room, self._grams, self.dense, self._shape, slots)


@dataclass(frozen=True, eq=False)
class _Context:
    dtype: torch.dtype
    room: Room
    grams: Grams
    dense: bool  # K devices per call, rows flat
    shape: tuple[int, ...]  # of a row
    bare: tuple[Slot, Slot | None] | None  # of the layer that may do without its weights


class _Program:
    """The chain with its weights and work memory, for chunks of one kind."""

    @torch.inference_mode()
    def __init__(self, engine: FusedEngine, width: int, dual: bool, devices: int) -> None:
        self._context = engine.context
        self._width, self._devices = width, devices
        self._loss = engine.make_loss()
        self._images = engine.make_images(width, devices)
        self._layers = engine.make_layers(width, devices, dual)
        self._dual: DualDense | None = None
        if dual and self._images is None:
            assert self._context.bare is not None
            context, relu = self._context, isinstance(self._layers[0], Relu)
            self._dual = DualDense(
                *self._context.bare, devices, width, context.room, context.grams, relu=relu
            )
            self._layers = self._layers[1:] if relu else self._layers
        below = [] if self._images is None else self._images.weights
        self._weights = [*below, *(weight for layer in self._layers for weight in layer.weights)]
        lowest = next(i for i, layer in enumerate(self._layers) if layer.weights)
        needs_all = bool(below) or self._dual is not None
        self._reverse = [
            (layer, needs_all or i > lowest) for i, layer in reversed(list(enumerate(self._layers)))
        ]

    @torch.inference_mode()
    def train(
        self,
        common: Tensor,
        chunk: Chunk,
        rows: Sequence[Tensor],
        rule: Rule,
        deltas: Tensor,
        trained: Trained,
        should_stop: Stop | None,
    ) -> None:
        """Train these devices into their rows of the results."""
        steps = np.array([plan.steps for plan in chunk.plans])
        try:
            losses = self._run(common, chunk, rows, rule, steps, should_stop)
        except Halted as halt:
            for at in chunk.at:
                trained.fail(at, stopped(halt.steps))
            return
        self._write(deltas, chunk.at)
        for at, plan, loss in zip(chunk.at, chunk.plans, losses.tolist(), strict=True):
            trained.steps[at], trained.seen[at] = plan.steps, plan.shape.examples
            trained.loss_sum[at] = loss
            if not isfinite(loss):
                trained.fail(at, non_finite(loss, plan.steps))

    def _run(
        self,
        common: Tensor,
        chunk: Chunk,
        rows: Sequence[Tensor],
        rule: Rule,
        steps: NDArray[np.int64],
        should_stop: Stop | None,
    ) -> NDArray[np.float64]:
        """All steps of all devices; returns the sum of mean loss times examples, (k,)."""
        starts, corrections = vectors(common, chunk.clients)
        total = int(steps[0])
        for weight in self._weights:
            weight.begin(rule, starts, corrections)
        for layer in self._layers:
            if isinstance(layer, Hidden):
                layer.reserve(total * self._width)
        if self._dual is not None:
            self._dual.begin(rule, starts, corrections, chunk, rows)
        sizes = np.zeros((total, len(steps)))
        for k, plan in enumerate(chunk.plans):
            sizes[: plan.steps, k] = plan.sizes
        active = np.count_nonzero(sizes, axis=1).tolist()  # devices that make each step
        parts = []
        stride = total if self._dual is not None else self._stride()
        for low in range(0, total, stride):
            high = min(total, low + stride)
            self._loss.prepare(*targets(chunk, low, high, self._context.dtype))
            feed = None if self._dual is not None else self._feed(chunk, rows, low, high)
            for step in range(low, high):
                if should_stop is not None and should_stop():
                    raise Halted(step)
                self._step(step, low, active[step], feed, sizes[step])
            parts.append(self._loss.means())
        losses = np.concatenate(parts) * sizes
        sums: NDArray[np.float64] = losses.cumsum(0)[-1]  # one by one: zeros at the end change no bit
        return sums

    def _step(
        self, step: int, low: int, active: int, feed: Tensor | None, sizes: NDArray[np.float64]
    ) -> None:
        """One mini-batch, of these sizes, of the first so many devices."""
        first, width = step - low, self._width
        if feed is None:
            assert self._dual is not None
            hidden = self._dual.forward(step, active)
        else:
            hidden = feed[:active, first * width : (first + 1) * width]
        if self._images is not None:
            batches = hidden.view(*hidden.shape[:2], *self._context.shape).unbind()
            hidden = self._images.forward([x[: int(n)] for x, n in zip(batches, sizes, strict=False)])
        for layer in self._layers:
            hidden = layer.forward(hidden)
        grad: Tensor | None = self._loss.gradient(first, hidden)
        for layer, needs_input in self._reverse:
            assert grad is not None
            grad = layer.backward(grad, needs_input=needs_input)
        if self._dual is not None:
            assert grad is not None
            self._dual.backward(step, grad)
        if self._images is not None and self._images.weights:
            assert grad is not None
            self._images.backward(grad)

    def _write(self, deltas: Tensor, at: Sequence[int]) -> None:
        if list(at) == list(range(at[0], at[0] + len(at))):
            for weight in self._weights:
                weight.write(deltas[at[0] : at[0] + len(at)], 0)
        else:
            for k, row in enumerate(at):
                for weight in self._weights:
                    weight.write(deltas[row : row + 1], k)
        if self._dual is not None:
            rows = deltas.unbind()
            self._dual.write([rows[row] for row in at])

    def _stride(self) -> int:
        """Steps whose rows are laid out at a time."""
        numbers = self._width * self._devices * padded(prod(self._context.shape))
        return max(1, _FEED // (4 * numbers))

    def _feed(self, chunk: Chunk, rows: Sequence[Tensor], low: int, high: int) -> Tensor:
        """The rows of these steps: (K, T * B, F)."""
        places, room = (high - low) * self._width, self._context.room
        features = prod(self._context.shape)
        wide = padded(features) if self._context.dense else features
        feed = room.get("feed", len(chunk.clients), places, wide)
        if wide > features:
            feed[..., features:].zero_()
        for out, x, plan in zip(feed.unbind(), rows, chunk.plans, strict=True):
            index = torch.from_numpy(plan.rows[low:high]).view(-1)
            out = out[: index.shape[0]]
            if wide > features:
                out[:, :features].copy_(x.index_select(0, index))
            else:
                torch.index_select(x, 0, index, out=out)
        return feed


def _functions(dtype: torch.dtype) -> CDLL | None:
    """What multiplies large weights faster than torch does, if it can be had."""
    try:
        return library(double=dtype == torch.float64)
    except Unsupported:
        return None
