"""Layers of K devices at once, with their own backward pass and SGD inside the weight-gradient product.

Activations of dense layers are (a, B, F): the devices still at work (a prefix of the K), the places of a
mini-batch, features. Every width F is padded to a multiple of 16 numbers, so that each device's matrices
begin at a multiple of 64 bytes and have the same shape wherever the device stands in its chunk: the result
of a device is then the same, to the bit, whoever shares its chunk. Convolutions take one device at a time,
with channels last. Padding holds zeros, in weights, activations and gradients alike.
"""

from collections.abc import Sequence
from ctypes import CDLL
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lepton_fl.plan import LocalPlan
from lepton_fl.vector import Slot
from lepton_simulations.engines.chain import ConvSpec, NormSpec, PoolSpec

ALIGN = 16  # numbers; 64 bytes in float32


def padded(count: int) -> int:
    """The next multiple of ``ALIGN``."""
    return -(-count // ALIGN) * ALIGN


class Room:
    """Work memory that is allocated once and only grows."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._held: dict[str, Tensor] = {}

    def get(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor of this shape; what it holds is left over from before, finite or not."""
        size = 1
        for count in shape:
            size *= count
        held = self._held.get(name)
        if held is None or held.shape[0] < size:
            held = self._held[name] = torch.zeros(size, dtype=dtype or self.dtype)
        return held[:size].view(shape)


@dataclass(frozen=True)
class Rule:
    """SGD as numbers: v <- m v + g + (decay + mu) w - mu w0 + c;  w <- w - rate v."""

    rate: float
    decay: float
    mu: float
    momentum: float

    @classmethod
    def of(cls, local: LocalPlan) -> "Rule":
        """The plan's."""
        return cls(local.learning_rate, local.weight_decay, local.proximal_mu, local.momentum)

    @property
    def keep(self) -> float:
        """What a step leaves of a weight where there is no momentum."""
        return 1 - self.rate * (self.decay + self.mu)


class Weight:
    """One parameter of K devices in the memory its layer likes, and its SGD.

    ``value`` is (K, ...) with padding; ``_part`` takes what stands in the model's vector out of it.
    """

    def __init__(self, slot: Slot, value: Tensor, padding: float = 0.0) -> None:
        self.slot = slot
        self.value = value
        self._padding = padding
        self._is_padded = value[0].numel() > slot.stop - slot.start
        self._shift: Tensor | None = None
        self._velocity: Tensor | None = None

    def _part(self, full: Tensor) -> Tensor:
        shape = (full.shape[0], *self.slot.shape)
        if full.dim() > len(shape):  # (K, 1, F)
            full = full.squeeze(1)
        for axis, count in enumerate(shape[1:], 1):
            full = full.narrow(axis, 0, count)
        return full

    def _piece(self, flat: Tensor) -> Tensor:
        """What vectors (k, P) hold of this parameter: (k, ...)."""
        return flat[:, self.slot.start : self.slot.stop].view(-1, *self.slot.shape)

    def begin(self, rule: Rule, starts: Tensor, corrections: Tensor | None) -> None:
        """Set every device to its start.

        Args:
            rule: of the steps to come.
            starts: (1, P) for all, or (k, P).
            corrections: (k, P) or none.
        """
        self.rule, self._starts = rule, starts
        count = (starts if corrections is None else corrections).shape[0]
        if self._is_padded:
            self.value.fill_(self._padding)
        self._part(self.value if starts.shape[0] == 1 else self.value[:count]).copy_(self._piece(starts))
        self._velocity = torch.zeros_like(self.value) if rule.momentum else None
        self._shift = None
        if rule.mu or corrections is not None:
            shift = torch.zeros_like(self.value[:count])
            if corrections is not None:
                self._part(shift).copy_(self._piece(corrections))
            self._part(shift).sub_(self._piece(starts), alpha=rule.mu)
            self._shift = shift if rule.momentum else shift.mul_(-rule.rate)

    def descend(self, left: Tensor, right: Tensor) -> None:
        """One step along the gradient left @ right, (a, O, B) x (a, B, I)."""
        count = left.shape[0]
        if self._velocity is None:
            self.value[:count].baddbmm_(left, right, beta=self.rule.keep, alpha=-self.rule.rate)
        else:
            self._velocity[:count].baddbmm_(left, right, beta=self.rule.momentum)
        self._move_on(count)

    def descend_natively(self, functions: CDLL, grad: Tensor, x: Tensor) -> None:
        """The same of one device: (1, s, O) and (1, s, I); ``grad`` is used up."""
        plain = self._velocity is None
        into, keep = (self.value, self.rule.keep) if plain else (self._velocity, self.rule.momentum)
        assert into is not None
        if plain:
            grad.mul_(-self.rule.rate)
        _, places, outputs = grad.shape
        functions.lepton_descend(
            x.data_ptr(), grad.data_ptr(), places, x.shape[2], outputs, keep, into.data_ptr()
        )
        self._move_on(1)

    def _move_on(self, count: int) -> None:
        """What is left of a step once the gradient is where it belongs."""
        if self._velocity is not None:
            self._roll(self.value[:count])
        elif self._shift is not None:
            self.value[:count].add_(self._shifts(count))

    def descend_along(self, grad: Tensor) -> None:
        """One step along a gradient of one device."""
        value = self.value[0]
        if self._velocity is None:
            if self.rule.keep != 1:
                value.mul_(self.rule.keep)
            value.add_(grad, alpha=-self.rule.rate)
            if self._shift is not None:
                value.add_(self._shift[0])
        else:
            self._velocity[0].mul_(self.rule.momentum).add_(grad)
            self._roll(self.value[:1])

    def _roll(self, value: Tensor) -> None:
        assert self._velocity is not None
        velocity, pull = self._velocity[: value.shape[0]], self.rule.decay + self.rule.mu
        if pull:
            part = self._part(velocity)
            part.add_(self._part(value), alpha=pull)
        if self._shift is not None:
            velocity.add_(self._shifts(value.shape[0]))
        value.add_(velocity, alpha=-self.rule.rate)

    def _shifts(self, active: int) -> Tensor:
        assert self._shift is not None
        return self._shift[:active]

    def write(self, deltas: Tensor, first: int) -> None:
        """Write how far k devices, from this one on, came into (k, P)."""
        devices = slice(first, first + deltas.shape[0])
        starts = self._starts if self._starts.shape[0] == 1 else self._starts[devices]
        torch.sub(self._part(self.value[devices]), self._piece(starts), out=self._piece(deltas))


class Layer(Protocol):
    """A step of the chain; ``backward`` also takes the optimiser's step of its weights."""

    weights: Sequence[Weight]

    def forward(self, x: Tensor) -> Tensor:
        """The output; the input is kept for the backward pass."""
        ...

    def backward(self, grad: Tensor, *, needs_input: bool) -> Tensor | None:
        """The gradient of the input, where it is asked for."""
        ...


class Dense:
    """Linear layers of K devices."""

    def __init__(
        self,
        weight: Slot,
        bias: Slot | None,
        devices: int,
        width: int,
        room: Room,
        last: bool,
        functions: CDLL | None = None,
    ) -> None:
        """Make room.

        Args:
            weight: (O, I).
            bias: (O,) or none.
            devices: K.
            width: places of a mini-batch B.
            room: work memory.
            last: whether the outputs are logits: padding is then minus infinity, the probability zero.
            functions: of ``native.c``, whose products are faster for one device; None = torch's.
        """
        self._functions = functions
        outputs, inputs = (padded(n) for n in weight.shape)
        fill = -torch.inf if last else 0.0
        self._weight = Weight(weight, torch.zeros(devices, outputs, inputs, dtype=room.dtype))
        self._bias = torch.full((devices, 1, outputs), 0.0, dtype=room.dtype)
        self._bias[..., weight.shape[0] :] = fill
        self._own_bias = None if bias is None else Weight(bias, self._bias, fill)
        self.weights: Sequence[Weight] = (
            [self._weight] if self._own_bias is None else [self._weight, self._own_bias]
        )
        self._out = torch.zeros(devices, width, outputs, dtype=room.dtype)
        self._back = torch.zeros(devices, width, inputs, dtype=room.dtype)
        self._ones = torch.ones(devices, 1, width, dtype=room.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(a, s, I) -> (a, s, O)."""
        active, places = x.shape[:2]
        self._x, out = x, self._out[:active, :places]
        if self._functions is not None:
            weight, (_, outputs, inputs) = self._weight.value, self._weight.value.shape
            addresses = x.data_ptr(), weight.data_ptr(), self._bias.data_ptr()
            self._functions.lepton_forward(*addresses, places, inputs, outputs, out.data_ptr())
            return out
        return torch.baddbmm(self._bias[:active], x, self._weight.value[:active].transpose(1, 2), out=out)

    def backward(self, grad: Tensor, *, needs_input: bool) -> Tensor | None:
        """(a, s, O) -> (a, s, I)."""
        active, places = grad.shape[:2]
        back = self._input_gradient(grad, self._back[:active, :places]) if needs_input else None
        if self._own_bias is not None:
            self._own_bias.descend(self._ones[:active, :, :places], grad)
        if self._functions is not None:
            self._weight.descend_natively(self._functions, grad, self._x)
        else:
            self._weight.descend(grad.transpose(1, 2), self._x)
        return back

    def _input_gradient(self, grad: Tensor, out: Tensor) -> Tensor:
        active, places, outputs = grad.shape
        weight = self._weight.value
        if self._functions is None:
            return torch.bmm(grad, weight[:active], out=out)
        addresses = grad.data_ptr(), weight.data_ptr()
        self._functions.lepton_back(*addresses, places, weight.shape[2], outputs, out.data_ptr())
        return out


class Relu:
    """max(x, 0), in place."""

    weights: Sequence[Weight] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        self._y = x.relu_()
        return self._y

    def backward(self, grad: Tensor, *, needs_input: bool) -> Tensor | None:
        """Of the same shape."""
        torch.ops.aten.threshold_backward.grad_input(grad, self._y, 0, grad_input=grad)
        return grad


class Flatten:
    """One device's images (s, C, H, W), channels last in memory, to (1, s, F)."""

    weights: Sequence[Weight] = ()

    def __init__(self, features: int, width: int, room: Room) -> None:
        self._features = features
        self._out = torch.zeros(1, width, padded(features), dtype=room.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """In the order channel, row, column, as ``torch.flatten`` has it."""
        self._shape = x.shape
        out = self._out[:, : len(x)]
        out[0, :, : self._features].view(x.shape).copy_(x)
        return out

    def backward(self, grad: Tensor, *, needs_input: bool) -> Tensor | None:
        """Back to images."""
        images: Tensor = grad[0, :, : self._features].view(self._shape)
        return images.contiguous(memory_format=torch.channels_last)


class Conv:
    """A convolution of one device."""

    def __init__(self, spec: ConvSpec, weight: Slot, bias: Slot | None, room: Room) -> None:
        self._spec = spec
        value = torch.zeros(weight.shape, dtype=room.dtype).to(memory_format=torch.channels_last)
        self._weight = Weight(weight, channels_last(value)[None])
        self._bias = None if bias is None else Weight(bias, torch.zeros(1, *bias.shape, dtype=room.dtype))
        self.weights: Sequence[Weight] = [self._weight] if self._bias is None else [self._weight, self._bias]

    def forward(self, x: Tensor) -> Tensor:
        """(s, C, H, W) -> (s, C', H', W')."""
        self._x = x
        bias = None if self._bias is None else self._bias.value[0]
        return torch.conv2d(x, self._weight.value[0], bias, self._spec.stride, self._spec.padding)

    def backward(self, grad: Tensor, *, needs_input: bool) -> Tensor | None:
        """The reverse."""
        has_bias = self._bias is not None
        back, weight, bias = torch.ops.aten.convolution_backward(
            grad,
            self._x,
            self._weight.value[0],
            [grad.shape[1]] if has_bias else None,
            self._spec.stride,
            self._spec.padding,
            (1, 1),
            False,
            (0, 0),
            1,
            [needs_input, True, has_bias],
        )
        self._weight.descend_along(weight)
        if self._bias is not None:
            self._bias.descend_along(bias)
        return back if needs_input else None


class Pool:
    """The maximum over windows, of one device."""

    weights: Sequence[Weight] = ()

    def __init__(self, spec: PoolSpec) -> None:
        self._spec = spec

    def forward(self, x: Tensor) -> Tensor:
        """(s, C, H, W) -> (s, C, H', W')."""
        self._x = x
        y, self._where = torch.ops.aten.max_pool2d_with_indices(x, self._spec.kernel, self._spec.stride)
        return y  # type: ignore[no-any-return]  # torch leaves it untyped

    def backward(self, grad: Tensor, *, needs_input: bool) -> Tensor | None:
        """To where the maxima were."""
        spec = self._spec
        back: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, self._x, spec.kernel, spec.stride, (0, 0), (1, 1), False, self._where
        )
        return back


class Norm:
    """Group normalisation (Wu & He 2018) of one device."""

    def __init__(self, spec: NormSpec, weight: Slot, bias: Slot, room: Room) -> None:
        self._spec = spec
        self._weight, self._bias = (
            Weight(slot, torch.zeros(1, *slot.shape, dtype=room.dtype)) for slot in (weight, bias)
        )
        self.weights: Sequence[Weight] = [self._weight, self._bias]

    def forward(self, x: Tensor) -> Tensor:
        """(s, C, H, W), the same shape."""
        self._x = x
        self._sizes = (x.shape[0], x.shape[1], x.shape[2] * x.shape[3], self._spec.groups)
        y, self._mean, self._scale = torch.ops.aten.native_group_norm(
            x, self._weight.value[0], self._bias.value[0], *self._sizes, self._spec.eps
        )
        return y  # type: ignore[no-any-return]  # torch leaves it untyped

    def backward(self, grad: Tensor, *, needs_input: bool) -> Tensor | None:
        """The reverse."""
        back, weight, bias = torch.ops.aten.native_group_norm_backward(
            grad,
            self._x,
            self._mean,
            self._scale,
            self._weight.value[0],
            *self._sizes,
            [needs_input, True, True],
        )
        self._weight.descend_along(weight)
        self._bias.descend_along(bias)
        return back if needs_input else None


def channels_last(images: Tensor) -> Tensor:
    """Images (N, C, H, W) with channels last in memory, also where one channel leaves that open."""
    images = images.contiguous(memory_format=torch.channels_last)
    n, c, h, w = images.shape
    return images.as_strided((n, c, h, w), (c * h * w, 1, w * c, c))
