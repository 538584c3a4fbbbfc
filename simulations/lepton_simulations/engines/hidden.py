"""A large dense layer behind others, without weights of its own.

As in ``dual``, the weights after some steps are a W0 + sum_j g_j x_j^T; but here the inputs x_j are what the
layers before make of a device's rows, so they come step by step. With D the gradient of a step's outputs,

    outputs = a x W0^T + sum_j (x . x_j) g_j        gradient of the inputs = a D W0 + sum_j (D . g_j) x_j

and the update is one deep product at the end. Where W0 does not fit into a core's own cache that saves most
of the traffic: it is read and never written, in the memory that all workers share, and once for all devices
that are trained side by side.
"""

from collections.abc import Sequence
from ctypes import CDLL

import torch
from torch import Tensor

from lepton_fl.vector import Slot
from lepton_simulations.engines.layers import ALIGN, Room, Rule, padded
from lepton_simulations.engines.schedule import Shape

LARGE = 2**18  # weights: more than a core's own cache holds
_MAX_PLACES = 512  # of all mini-batches of a device; products with earlier steps grow with their square


def pays(cells: int, plan: Shape) -> bool:
    """Whether a layer of so many weights is faster this way, for a device whose batches are cut like this."""
    return cells >= LARGE and plan.steps * plan.width <= _MAX_PLACES


class Hidden:
    """The layer, for K devices without momentum and corrections."""

    def __init__(
        self, weight: Slot, bias: Slot | None, devices: int, width: int, room: Room, functions: CDLL | None
    ) -> None:
        """See ``Dense``."""
        self._slot, self._bias_slot, self._room, self._functions = weight, bias, room, functions
        self._wide, self._deep = (padded(n) for n in weight.shape)
        self._devices, self._width = devices, width
        self._out = torch.zeros(devices, width, self._wide, dtype=room.dtype)
        self._back = torch.zeros(devices, width, self._deep, dtype=room.dtype)
        self.weights: Sequence[Hidden] = [self]

    def reserve(self, places: int) -> None:
        """Make room for devices with so many places in all their mini-batches."""
        self._rows = self._room.get("hidden rows", self._devices, places, self._deep)
        self._moves = self._room.get("hidden moves", self._devices, places, self._wide)
        self._ones = self._room.get("ones", places).fill_(self._bias_slot is not None)

    def begin(self, rule: Rule, starts: Tensor, corrections: Tensor | None) -> None:
        """See ``Weight``."""
        assert not rule.momentum
        assert corrections is None
        self._rule, self._low = rule, 0
        self._made = [0] * self._devices  # steps of each device
        self._keep = [1.0]  # a after so many steps
        self._weight, self._bias = self._placed(starts)

    def _placed(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (1 or K, O, I) and biases (1 or K, O), with padding; where they are, if that will do."""
        count, slot = len(starts), self._slot
        bias = self._room.get("hidden bias", count, self._wide).zero_()
        if self._bias_slot is not None:
            own = self._bias_slot
            bias[:, : own.stop - own.start].copy_(starts[:, own.start : own.stop])
        weight = starts[:, slot.start : slot.stop].view(count, *slot.shape)
        if weight.shape == (1, self._wide, self._deep) and not weight.data_ptr() % (4 * ALIGN):
            return weight, bias
        held = self._room.get("hidden weights", count, self._wide, self._deep).zero_()
        held[:, : slot.shape[0], : slot.shape[1]].copy_(weight)
        return held, bias

    def forward(self, x: Tensor) -> Tensor:
        """(a, B, I) -> (a, B, O)."""
        active, low = len(x), self._low
        self._rows[:active, low : low + self._width] = x
        out = self._out[:active]
        for into, rows, weight, bias in self._shared(out, x):
            self._multiply(rows, weight, bias, into)
        if self._keep[-1] != 1:
            out.mul_(self._keep[-1])
        for k in range(active if low else 0):
            near = x.new_empty(self._width, low)
            self._multiply(x[k], self._rows[k, :low], self._ones[:low], near)
            out[k].addmm_(near, self._moves[k, :low])
        return out

    def backward(self, grad: Tensor, *, needs_input: bool) -> Tensor | None:
        """(a, B, O) -> (a, B, I)."""
        active, low, rate, keep = len(grad), self._low, self._rule.rate, self._rule.keep
        back = self._input_gradient(grad) if needs_input else None
        if keep != 1:
            self._moves[:active, :low].mul_(keep)
        self._low += self._width
        torch.mul(grad, -rate, out=self._moves[:active, low : self._low])
        self._keep.append(self._keep[-1] * keep + rate * self._rule.mu)
        for k in range(active):
            self._made[k] += 1
        return back

    def _input_gradient(self, grad: Tensor) -> Tensor:
        back, low = self._back[: len(grad)], self._low
        for into, rows, weight, _ in self._shared(back, grad):
            if self._functions is None:
                torch.mm(rows, weight, out=into)
            else:
                count, outputs = rows.shape
                addresses = rows.data_ptr(), weight.data_ptr()
                self._functions.lepton_back(*addresses, count, self._deep, outputs, into.data_ptr())
        if self._keep[-1] != 1:
            back.mul_(self._keep[-1])
        for k in range(len(grad) if low else 0):
            back[k].addmm_(grad[k] @ self._moves[k, :low].t(), self._rows[k, :low])
        return back

    def _shared(self, out: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """What goes with which weights: all rows at a time where that changes no row's result."""
        if self._functions is not None and len(self._weight) == 1:
            return [(out.flatten(0, 1), x.flatten(0, 1), self._weight[0], self._bias[0])]
        own = self._own
        return [(out[k], x[k], self._weight[own(k)], self._bias[own(k)]) for k in range(len(x))]

    def _own(self, k: int) -> int:
        return k if len(self._weight) > 1 else 0

    def _multiply(self, rows: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
        """Rows (n, I) times weight (O, I)^T plus bias (O,) -> (n, O)."""
        if self._functions is None:
            torch.addmm(bias, rows, weight.t(), out=out)
        else:
            addresses = rows.data_ptr(), weight.data_ptr(), bias.data_ptr()
            self._functions.lepton_forward(*addresses, len(rows), self._deep, len(weight), out.data_ptr())

    def write(self, deltas: Tensor, first: int) -> None:
        """See ``Weight``."""
        outputs, inputs = self._slot.shape
        for k, delta in enumerate(deltas, first):
            places, change = self._made[k] * self._width, self._keep[self._made[k]] - 1
            moves, own = self._moves[k, :places, :outputs], self._own(k)
            weight = delta[self._slot.start : self._slot.stop].view(self._slot.shape)
            torch.mm(moves.t(), self._rows[k, :places, :inputs], out=weight)
            if change:
                weight.add_(self._weight[own, :outputs, :inputs], alpha=change)
            if self._bias_slot is not None:
                bias = delta[self._bias_slot.start : self._bias_slot.stop]
                torch.sum(moves, 0, out=bias)
                if change:
                    bias.add_(self._bias[own, :outputs], alpha=change)
