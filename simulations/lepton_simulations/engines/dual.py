"""The first dense layer without its weights.

After some steps of SGD the weights are W0 plus a sum of outer products of output gradients and rows seen:
W = a W0 + e c + sum_j g_j x_j^T (a = 1 and no c without weight decay, FedProx and SCAFFOLD). Hence
x_i W^T = a (x_i W0^T) + e (x_i c^T) + sum_j (x_i . x_j) g_j^T: all products with W0 and the Gram matrix of a
device's rows are two large matrix products, each step needs a small one, and the update W - W0 comes out of a
single one. Skinny products over all weights in every step, and copies of the weights, are gone; a second
epoch is almost free. It pays while a device has fewer rows than about the layer has outputs.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lepton_fl.vector import Slot
from lepton_simulations.engines.layers import Room, Rule, padded
from lepton_simulations.engines.schedule import Schedule, Shape

_MAX_PLACES = 1024  # of all mini-batches of a device: a Gram matrix of 4 MB

# GFLOP/s of the shapes involved, one core of a server of 2023; only their ratios matter.
_TALL, _SKINNY, _GRAM, _SMALL = 93, 68, 73, 30
_BYTES = 8  # GB/s of one pass over weights that are not in the nearest cache


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
    dual = 4 * used * cells / _TALL + 2 * used * used * inputs / _GRAM + places * places * outputs / _SMALL
    return dual < direct


class DualDense:
    """The first linear layer of K devices, for a chunk of short schedules."""

    def __init__(self, weight: Slot, bias: Slot | None, devices: int, width: int, room: Room) -> None:
        """See ``Dense``."""
        self._slot, self._bias_slot, self._room = weight, bias, room
        (self._outputs, self._inputs), self._width = weight.shape, width
        self._wide = padded(self._outputs)
        self._out = torch.zeros(devices, width, self._wide, dtype=room.dtype)

    def begin(
        self,
        rule: Rule,
        starts: Tensor,
        corrections: Tensor | None,
        rows: Sequence[Tensor],
        schedules: Sequence[Schedule],
    ) -> None:
        """Everything that does not depend on the steps.

        Args:
            rule: without momentum.
            starts: (1, P) for all, or (k, P).
            corrections: (k, P) or none.
            rows: (n, I) of each device.
            schedules: of each device, the longest first.
        """
        self._rule, self._starts, self._corrections = rule, starts, corrections
        self._schedules = schedules
        count, places = len(rows), schedules[0].steps * self._width
        room, stride = self._room, padded(places)
        self._first = room.get("first products", count, padded(places), self._wide)
        self._gram = room.get("gram", count, places, stride)
        self._moves = room.get("moves", count, padded(places), self._wide)
        self._shift = None if corrections is None else room.get("shift products", *self._first.shape)
        most = max(min(x.shape[0], s.steps * self._width) for x, s in zip(rows, schedules, strict=True))
        held = room.get("rows", count, padded(most * self._inputs)).unbind()
        firsts, grams = self._first.unbind(), self._gram.unbind()
        shifts = [None] * count if self._shift is None else self._shift.unbind()
        self._used: list[tuple[Tensor, Tensor | None]] = []
        for k, (x, own) in enumerate(zip(rows, schedules, strict=True)):
            if k == 0 or starts.shape[0] > 1:
                weights = self._transposed("weights", starts[k])
            shift = None if corrections is None else self._transposed("shift", corrections[k])
            used, index = self._take(held[k], x, own)
            self._place(firsts[k], used, index, own, *weights)
            if shift is not None and (out := shifts[k]) is not None:
                self._place(out, used, index, own, *shift)
            self._multiply(grams[k], used, index, own)
            self._used.append((used, index))
        if self._bias_slot is not None:
            self._gram.add_(1)
        self._keep, self._pull = [1.0], [0.0]  # a and e after so many steps

    def forward(self, step: int, active: int) -> Tensor:
        """The outputs (a, B, O) of the next mini-batch."""
        low, high = step * self._width, (step + 1) * self._width
        first, out = self._first[:active, low:high], self._out[:active]
        if step:
            gram, moves = self._gram[:active, low:high, :low], self._moves[:active, :low]
            torch.baddbmm(first, gram, moves, beta=self._keep[step], out=out)
        else:
            out.copy_(first)
        if self._shift is not None:
            out.add_(self._shift[:active, low:high], alpha=self._pull[step])
        return out

    def backward(self, step: int, grad: Tensor) -> None:
        """Take the step along the gradient (a, B, O) of the outputs."""
        active, low = grad.shape[0], step * self._width
        rule, keep = self._rule, self._rule.keep
        if keep != 1:
            self._moves[:active, :low].mul_(keep)
        torch.mul(grad, -rule.rate, out=self._moves[:active, low : low + self._width])
        if len(self._keep) == step + 1:
            self._keep.append(self._keep[step] * keep + rule.rate * rule.mu)
            self._pull.append(self._pull[step] * keep - rule.rate)

    def write(self, deltas: Sequence[Tensor]) -> None:
        """Write how far the devices came, (P,) each."""
        for k, (delta, moves) in enumerate(zip(deltas, self._moves.unbind(), strict=True)):
            rows, index = self._used[k]
            if index is None:
                moves = moves[: rows.shape[0], : self._outputs]
            else:
                moves = moves[: index.shape[0], : self._outputs]
                moves = moves.new_zeros(rows.shape[0], self._outputs).index_add_(0, index, moves)
            weight = delta[self._slot.start : self._slot.stop].view(self._slot.shape)
            torch.mm(moves.t(), rows, out=weight)
            parts = [(self._slot, weight)]
            if self._bias_slot is not None:
                bias = delta[self._bias_slot.start : self._bias_slot.stop]
                torch.sum(moves, 0, out=bias)
                parts.append((self._bias_slot, bias))
            self._add_constants(k, parts)

    def _add_constants(self, k: int, parts: list[tuple[Slot, Tensor]]) -> None:
        steps = self._schedules[k].steps
        for slot, delta in parts:
            if (change := self._keep[steps] - 1) != 0:
                delta.add_(self._start(k)[slot.start : slot.stop].view(slot.shape), alpha=change)
            if self._corrections is not None:
                shift = self._corrections[k, slot.start : slot.stop].view(slot.shape)
                delta.add_(shift, alpha=self._pull[steps])

    def _start(self, k: int) -> Tensor:
        return self._starts[k if self._starts.shape[0] > 1 else 0]

    def _transposed(self, name: str, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (I, O) and bias (O,) of a vector, with padding, in the order the product is fastest in."""
        weight = self._room.get(f"{name} transposed", self._inputs, self._wide)
        weight[:, self._outputs :].zero_()
        weight[:, : self._outputs].copy_(flat[self._slot.start : self._slot.stop].view(self._slot.shape).t())
        bias = self._room.get(f"{name} bias", self._wide).zero_()
        if self._bias_slot is not None:
            bias[: self._outputs].copy_(flat[self._bias_slot.start : self._bias_slot.stop])
        return weight, bias

    def _take(self, held: Tensor, x: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor | None]:
        """The rows a device uses, aligned, and which stands at each place (none: one after the other)."""
        order, index = torch.from_numpy(schedule.rows).view(-1), None
        if schedule.shape.examples <= x.shape[0]:  # each row at most once: in the order of the steps
            if schedule.shape.examples < order.shape[0]:
                order = order[: schedule.shape.examples]
        else:
            order, index = torch.arange(x.shape[0]), order
        rows = held[: order.shape[0] * self._inputs].view(-1, self._inputs)
        torch.index_select(x, 0, order, out=rows)
        return rows, index

    def _place(
        self,
        out: Tensor,
        rows: Tensor,
        index: Tensor | None,
        schedule: Schedule,
        weight: Tensor,
        bias: Tensor,
    ) -> None:
        """Products of rows and a weight, with its bias, at every place of the steps."""
        count, places = rows.shape[0], schedule.steps * self._width
        if index is not None:
            products = self._room.get("products", count, self._wide)
            torch.index_select(torch.addmm(bias, rows, weight, out=products), 0, index, out=out[:places])
            return
        torch.addmm(bias, rows, weight, out=out[:count])
        if count < places:
            out[count:places].zero_()

    def _multiply(self, gram: Tensor, rows: Tensor, index: Tensor | None, schedule: Schedule) -> None:
        """Products of each row with each at every place of the steps."""
        count, places = rows.shape[0], schedule.steps * self._width
        if index is not None:
            small = torch.mm(rows, rows.t(), out=self._room.get("small gram", count, count))
            gram[:places, :places].copy_(small.index_select(0, index).index_select(1, index))
            return
        # A step meets the rows of earlier steps only: the first rows and the last columns are never read.
        earlier = min(count, places - self._width)
        if earlier:
            torch.mm(rows[self._width :], rows[:earlier].t(), out=gram[self._width : count, :earlier])
            gram[count:places, :earlier].zero_()
