"""The first dense layer without its weights.

After some steps of SGD the weights are W0 plus a sum of outer products of output gradients and rows seen:
W = a W0 + e c + sum_j g_j x_j^T (a = 1 and no c without weight decay, FedProx and SCAFFOLD). Hence
x_i W^T = a (x_i W0^T) + e (x_i c^T) + sum_j (x_i . x_j) g_j^T: all products with W0 are one large matrix
product, those of the rows with each other (their Gram matrix) never change and are kept, each step needs a
small product, and the update W - W0 comes out of a single large one. Skinny products over all weights in
every step, and copies of the weights, are gone; a second epoch is almost free. It pays while a device has no
more rows than about the layer has outputs. Rows are read where they stand: only their products are put in
the order of the steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from lepton_fl.vector import Slot
from lepton_simulations.engines.batches import Chunk
from lepton_simulations.engines.grams import Grams, worth_keeping
from lepton_simulations.engines.layers import Room, Rule, padded
from lepton_simulations.engines.schedule import Schedule, Shape

_MAX_PLACES = 1024  # of all mini-batches of a device: a Gram matrix of 4 MB
_LINE = 64  # bytes: rows that begin elsewhere are copied
_PLACES = np.arange(_MAX_PLACES)

# GFLOP/s of the shapes involved, one core of a server of 2023; only their ratios matter.
_TALL, _SKINNY, _GRAM, _SMALL = 93, 68, 73, 30
_BYTES = 8  # GB/s of one pass over weights that are not in the nearest cache
_ROUNDS = 4  # in which a kept Gram matrix is taken to be used


@lru_cache(4096)
def pays(weight: tuple[int, int], plan: Shape, rows: int) -> bool:
    """Whether a device is trained faster this way: a function of its own number of rows only.

    Args:
        weight: (O, I) of the layer.
        plan: how the device's batches are cut.
        rows: that it holds.
    """
    outputs, inputs = weight
    places = plan.steps * plan.width
    if places > _MAX_PLACES:
        return False
    used, cells = min(rows, plan.examples), outputs * inputs
    direct = 4 * places * cells / _SKINNY + 12 * cells / _BYTES
    gram = 2 * used * used * inputs / _GRAM / (_ROUNDS if worth_keeping(rows, inputs) else 1)
    dual = 4 * used * cells / _TALL + gram + places * places * outputs / _SMALL
    return dual < direct


# Of some devices and a step: its products with the first weights, those of its rows with earlier ones, the
# gradients of the outputs of earlier steps, its own, and room for outputs.
_Views = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class DualDense:
    """The first linear layer of K devices, and the ReLU behind it, for a chunk of short schedules."""

    def __init__(
        self,
        weight: Slot,
        bias: Slot | None,
        devices: int,
        width: int,
        room: Room,
        grams: Grams,
        *,
        relu: bool,
    ) -> None:
        """See ``Dense``; ``grams`` are those of the devices' rows, and ``relu`` says whether one follows."""
        self._slot, self._bias_slot, self._room, self._grams = weight, bias, room, grams
        self._relu = relu
        (self._outputs, self._inputs), self._width = weight.shape, width
        self._wide = padded(self._outputs)
        self._out = torch.zeros(devices, width, self._wide, dtype=room.dtype)
        self._weight = torch.zeros(self._wide, self._inputs, dtype=room.dtype)
        self._bias = torch.zeros(self._wide, dtype=room.dtype)
        self._first = self._gram = self._moves = torch.zeros(0)
        self._views: dict[tuple[int, int], _Views] = {}

    def begin(
        self, rule: Rule, starts: Tensor, corrections: Tensor | None, chunk: Chunk, rows: Sequence[Tensor]
    ) -> None:
        """Everything that does not depend on the steps.

        Args:
            rule: without momentum.
            starts: (1, P) for all, or (k, P).
            corrections: (k, P) or none.
            chunk: the devices.
            rows: (n, I) of each.
        """
        self._rule, self._starts, self._corrections = rule, starts, corrections
        self._plans, count, places = chunk.plans, len(rows), chunk.plans[0].steps * self._width
        room = self._room
        first = room.get("first products", count, padded(places), self._wide)
        gram = room.get("gram", count, places, padded(places))
        moves = room.get("moves", count, padded(places + 1), self._wide)
        if not (first.is_set_to(self._first) and gram.is_set_to(self._gram) and moves.is_set_to(self._moves)):
            self._first, self._gram, self._moves = first, gram, moves
            self._views.clear()
        self._rates = room.get("rates", padded(places)).fill_(-rule.rate)
        moves[:, places].zero_()  # the place of rows that an epoch does not come to
        held = self._room_for(rows, chunk.plans)
        self._used = [
            _use(x, plan, places, space) for x, plan, space in zip(rows, chunk.plans, held, strict=True)
        ]
        self._multiply(starts, self._first)
        for client, used, out in zip(chunk.clients, self._used, self._gram.unbind(), strict=True):
            self._lay_out(self._grams.of(client.data if used.whole else None, used.rows), used.at, out)
        self._shift = None
        if corrections is not None:
            self._shift = room.get("shift products", *self._first.shape)
            self._multiply(corrections, self._shift)
        self._keep, self._pull = [1.0], [0.0]  # a and e after so many steps

    def forward(self, step: int, active: int) -> Tensor:
        """The outputs (a, B, O) of the next mini-batch."""
        first, gram, moves, _, out = self._view(step, active)
        if step == 0:
            out = first
        else:
            rate, keep = self._rule.rate, self._keep[step]
            torch.baddbmm(first, gram, moves, beta=keep, alpha=-rate, out=out)
        if self._shift is not None:
            low = step * self._width
            out.add_(self._shift[:active, low : low + self._width], alpha=self._pull[step])
        self._hidden = out.relu_() if self._relu else out
        return out

    def backward(self, step: int, grad: Tensor) -> None:
        """Take the step along the gradient (a, B, O) of the outputs."""
        _, _, moves, move, _ = self._view(step, grad.shape[0])
        rule, keep = self._rule, self._rule.keep
        if keep != 1 and step:
            moves.mul_(keep)
        if self._relu:
            torch.ops.aten.threshold_backward.grad_input(grad, self._hidden, 0, grad_input=move)
        else:
            move.copy_(grad)
        if len(self._keep) == step + 1:
            self._keep.append(self._keep[step] * keep + rule.rate * rule.mu)
            self._pull.append(self._pull[step] * keep - rule.rate)

    def _view(self, step: int, active: int) -> _Views:
        """What a step of so many devices reads and writes."""
        if (found := self._views.get((step, active))) is None:
            low, high = step * self._width, (step + 1) * self._width
            found = self._views[step, active] = (
                self._first[:active, low:high],
                self._gram[:active, low:high, :low],
                self._moves[:active, :low],
                self._moves[:active, low:high],
                self._out[:active],
            )
        return found

    def write(self, deltas: Sequence[Tensor]) -> None:
        """Write how far the devices came, (P,) each."""
        rate, moved = -self._rule.rate, zip(deltas, self._moves.unbind(), self._used, strict=True)
        changes = self._corrections is not None or any(keep != 1 for keep in self._keep)
        for k, (delta, moves, used) in enumerate(moved):
            own = moves.index_select(0, used.where[0])
            for where in used.where[1:]:
                own += moves.index_select(0, where)
            turned, bias = own.t()[: self._outputs], None
            weight = delta[self._slot.start : self._slot.stop].view(self._slot.shape)
            weight.zero_().addmm_(turned, used.rows, alpha=rate)  # which is faster than mm's own zeros
            if self._bias_slot is not None:
                bias = delta[self._bias_slot.start : self._bias_slot.stop]
                torch.mv(turned, self._rates[: own.shape[0]], out=bias)
            if changes:
                self._add_constants(k, weight, bias)

    def _add_constants(self, k: int, weight: Tensor, bias: Tensor | None) -> None:
        steps = self._plans[k].steps
        for slot, delta in ((self._slot, weight), (self._bias_slot, bias)):
            if slot is None or delta is None:
                continue
            if (change := self._keep[steps] - 1) != 0:
                start = self._starts[k if self._starts.shape[0] > 1 else 0]
                delta.add_(start[slot.start : slot.stop].view(slot.shape), alpha=change)
            if self._corrections is not None:
                shift = self._corrections[k, slot.start : slot.stop].view(slot.shape)
                delta.add_(shift, alpha=self._pull[steps])

    def _room_for(self, rows: Sequence[Tensor], plans: Sequence[Schedule]) -> Sequence[Tensor | None]:
        """Memory for the rows of each device, where those of some cannot be used as they stand."""
        if all(_stands(x, plan) for x, plan in zip(rows, plans, strict=True)):
            return [None] * len(rows)
        most = max(min(x.shape[0], plan.shape.examples) for x, plan in zip(rows, plans, strict=True))
        return self._room.get("rows", len(rows), padded(most * self._inputs)).unbind()

    def _multiply(self, vectors: Tensor, out: Tensor) -> None:
        """Products of all rows and the weight in vectors (1, P) or (k, P), with its bias, at their places."""
        weight = bias = self._bias
        for k, (used, products) in enumerate(zip(self._used, out.unbind(), strict=True)):
            if k < vectors.shape[0]:
                weight, bias = self._weights(vectors[k])
            found = _linear(used.rows, weight, bias)
            torch.index_select(found, 0, used.at, out=products[: used.at.shape[0]])

    def _weights(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (O, I) and bias (O,) of a vector (P,), with padding; until the next call."""
        weight, bias = vector[self._slot.start : self._slot.stop].view(self._slot.shape), self._bias
        if self._bias_slot is not None:
            bias[: self._outputs].copy_(vector[self._bias_slot.start : self._bias_slot.stop])
        if self._wide > self._outputs or not _onednn(vector):  # others may round by where weights begin
            weight = self._weight
            weight[: self._outputs].copy_(vector[self._slot.start : self._slot.stop].view(self._slot.shape))
        return weight, bias

    def _lay_out(self, gram: Tensor, at: Tensor, out: Tensor) -> None:
        """Products of rows at the places of the steps.

        A step meets the rows of earlier steps only: the first rows and the last columns are never read.
        """
        later, earlier = at[self._width :], at[: -self._width]
        if count := later.shape[0]:
            found = gram.index_select(0, later)
            torch.index_select(found, 1, earlier, out=out[self._width : self._width + count, :count])


@dataclass(frozen=True, eq=False)
class _Used:
    """The rows that a device trains on, and their order."""

    rows: Tensor  # (n, I)
    whole: bool  # whether they are all that the device has
    at: Tensor  # (T * B,) the row at each place of the steps
    where: Sequence[Tensor]  # (n,) of each epoch: the place of each row


def _stands(x: Tensor, plan: Schedule) -> bool:
    return plan.shape.examples >= x.shape[0] and x.data_ptr() % _LINE == 0


def _use(x: Tensor, plan: Schedule, nowhere: int, space: Tensor | None) -> _Used:
    """What a device uses of its rows; ``nowhere`` is the place of rows that an epoch does not come to."""
    order, count = plan.rows.reshape(-1), min(x.shape[0], plan.shape.examples)
    rows = x if space is None else space[: count * x.shape[1]].view(count, -1)
    if count < x.shape[0]:  # each of these once, and no padding: they are taken in the order of the steps
        torch.index_select(x, 0, torch.from_numpy(order), out=rows)
        at = torch.from_numpy(_PLACES[:count])
        return _Used(rows, False, at, [at])
    if space is not None:
        rows.copy_(x)
    where = []
    for first in range(0, len(order), -(-count // plan.width) * plan.width):
        epoch = order[first : first + count]
        places = np.full(count, nowhere)
        places[epoch] = _PLACES[first : first + len(epoch)]
        where.append(torch.from_numpy(places))
    return _Used(rows, True, torch.from_numpy(order), where)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(n, I), (O, I), (O,) -> (n, O)."""
    if _onednn(x):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found
    return torch.addmm(bias, x, weight.t())


def _onednn(x: Tensor) -> bool:
    """Whether torch brings a product that needs no copies of its operands in another order."""
    return x.dtype == torch.float32 and _has_onednn()


@cache
def _has_onednn() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")
