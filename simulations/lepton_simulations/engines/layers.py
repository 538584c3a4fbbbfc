"""Layers of K devices at once, with their own backward pass and SGD inside the weight-gradient product.

Activations of dense layers are (a, B, F): the devices still at work (a prefix of the K), the places of a
mini-batch, features. Every width F is padded to a multiple of 16 numbers, so that each device's matrices
begin at a multiple of 64 bytes and have the same shape wherever the device stands in its chunk: the result
of a device is then the same, to the bit, whoever shares its chunk. Convolutions take one device at a time,
with channels last. Padding holds zeros, in weights, activations and gradients alike.
"""

from collections.abc import Sequence
from ctypes import CDLL, c_int64
from dataclasses import dataclass
from math import prod
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
        self._own = self._part(value)
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
        (self._own if starts.shape[0] == 1 else self._own[:count]).copy_(self._piece(starts))
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
        """The same with (a, s, O) and (a, s, I); ``grad`` is used up."""
        plain = self._velocity is None
        into, keep = (self.value, self.rule.keep) if plain else (self._velocity, self.rule.momentum)
        assert into is not None
        if plain:
            grad.mul_(-self.rule.rate)
        active, places, outputs = grad.shape
        for k in range(active):
            addresses = x[k].data_ptr(), grad[k].data_ptr()
            functions.lepton_descend(*addresses, places, x.shape[2], outputs, keep, into[k].data_ptr())
        self._move_on(active)

    def _move_on(self, count: int) -> None:
        """What is left of a step once the gradient is where it belongs."""
        if self._velocity is not None:
            self._roll(slice(count))
        elif self._shift is not None:
            self.value[:count].add_(self._shifts(slice(count)))

    def descend_along(self, grad: Tensor, k: int) -> None:
        """One step of one device along a gradient."""
        value = self.value[k]
        if self._velocity is None:
            if self.rule.keep != 1:
                value.mul_(self.rule.keep)
            value.add_(grad, alpha=-self.rule.rate)
            if self._shift is not None:
                value.add_(self._shifts(slice(k, k + 1))[0])
        else:
            self._velocity[k].mul_(self.rule.momentum).add_(grad)
            self._roll(slice(k, k + 1))

    def _roll(self, some: slice) -> None:
        assert self._velocity is not None
        value, velocity, pull = self.value[some], self._velocity[some], self.rule.decay + self.rule.mu
        if pull:
            part = self._part(velocity)
            part.add_(self._part(value), alpha=pull)
        if self._shift is not None:
            velocity.add_(self._shifts(some))
        value.add_(velocity, alpha=-self.rule.rate)

    def _shifts(self, some: slice) -> Tensor:
        assert self._shift is not None
        return self._shift if len(self._shift) == 1 else self._shift[some]

    def write(self, deltas: Tensor, first: int) -> None:
        """Write how far k devices, from this one on, came into (k, P)."""
        devices = slice(first, first + deltas.shape[0])
        starts = self._starts if self._starts.shape[0] == 1 else self._starts[devices]
        torch.sub(self._own[devices], self._piece(starts), out=self._piece(deltas))


class Trainable(Protocol):
    """Parameters of K devices; see ``Weight``."""

    def begin(self, rule: Rule, starts: Tensor, corrections: Tensor | None) -> None:
        """Set every device to its start."""
        ...

    def write(self, deltas: Tensor, first: int) -> None:
        """Write how far k devices, from this one on, came into (k, P)."""
        ...


class Layer(Protocol):
    """A step of the chain; ``backward`` also takes the optimiser's step of its weights."""

    @property
    def weights(self) -> Sequence[Trainable]:
        """That it has."""
        ...

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
            functions: of ``native.c``, whose products are faster for few devices; None = torch's.
        """
        self._functions = functions
        outputs, inputs = (padded(n) for n in weight.shape)
        fill = -torch.inf if last else 0.0
        self._weight = Weight(weight, torch.zeros(devices, outputs, inputs, dtype=room.dtype))
        self._bias = torch.full((devices, 1, outputs), 0.0, dtype=room.dtype)
        self._bias[..., weight.shape[0] :] = fill
        self._own_bias = None if bias is None else Weight(bias, self._bias, fill)
        self.weights: Sequence[Trainable] = (
            [self._weight] if self._own_bias is None else [self._weight, self._own_bias]
        )
        self._out = torch.zeros(devices, width, outputs, dtype=room.dtype)
        self._back = torch.zeros(devices, width, inputs, dtype=room.dtype)
        self._ones = torch.ones(devices, 1, width, dtype=room.dtype)
        self._seen: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(a, s, I) -> (a, s, O)."""
        active, places = x.shape[:2]
        self._x, (bias, turned, out, _, _) = x, self._views(active, places)
        if self._functions is not None:
            weight, bias, (_, outputs, inputs) = self._weight.value, self._bias, self._weight.value.shape
            for k in range(active):
                addresses = x[k].data_ptr(), weight[k].data_ptr(), bias[k].data_ptr()
                self._functions.lepton_forward(*addresses, places, inputs, outputs, out[k].data_ptr())
            return out
        return torch.baddbmm(bias, x, turned, out=out)

    def backward(self, grad: Tensor, *, needs_input: bool) -> Tensor | None:
        """(a, s, O) -> (a, s, I)."""
        _, _, _, out, ones = self._views(*grad.shape[:2])
        back = self._input_gradient(grad, out) if needs_input else None
        if self._own_bias is not None:
            self._own_bias.descend(ones, grad)
        if self._functions is not None:
            self._weight.descend_natively(self._functions, grad, self._x)
        else:
            self._weight.descend(grad.transpose(1, 2), self._x)
        return back

    def _views(self, active: int, places: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Bias, weight transposed, outputs, gradient of the inputs, ones: of so many devices and places."""
        if (found := self._seen.get((active, places))) is None:
            found = self._seen[active, places] = (
                self._bias[:active],
                self._weight.value[:active].transpose(1, 2),
                self._out[:active, :places],
                self._back[:active, :places],
                self._ones[:active, :, :places],
            )
        return found

    def _input_gradient(self, grad: Tensor, out: Tensor) -> Tensor:
        active, places, outputs = grad.shape
        weight = self._weight.value
        if self._functions is None:
            return torch.bmm(grad, weight[:active], out=out)
        for k in range(active):
            addresses = grad[k].data_ptr(), weight[k].data_ptr()
            self._functions.lepton_back(*addresses, places, weight.shape[2], outputs, out[k].data_ptr())
        return out


class Relu:
    """max(x, 0), in place; of K devices, or of the images of device number k."""

    weights: Sequence[Weight] = ()

    def __init__(self) -> None:
        self._y: dict[int, Tensor] = {}

    def forward(self, x: Tensor, k: int = 0) -> Tensor:
        """Of any shape."""
        self._y[k] = x.relu_()
        return x

    def backward(self, grad: Tensor, k: int = 0, *, needs_input: bool) -> Tensor | None:
        """Of the same shape."""
        torch.ops.aten.threshold_backward.grad_input(grad, self._y[k], 0, grad_input=grad)
        return grad


class ImageLayer(Protocol):
    """A layer that takes the images (s, C, H, W) of one device after the other: number k."""

    weights: Sequence[Weight]

    def forward(self, x: Tensor, k: int) -> Tensor:
        """The output; what the backward pass needs is kept."""
        ...

    def backward(self, grad: Tensor, k: int, *, needs_input: bool) -> Tensor | None:
        """See ``Layer``."""
        ...


class Images:
    """The layers before a chain is flattened, each device's for itself; their results side by side."""

    def __init__(
        self, layers: Sequence[ImageLayer], features: int, devices: int, width: int, room: Room
    ) -> None:
        """Make room for K devices with so many places in a mini-batch, and so many features of a row."""
        self._layers, self._features = layers, features
        self.weights = [weight for layer in layers for weight in layer.weights]
        self._out = torch.zeros(devices, width, padded(features), dtype=room.dtype)
        lowest = next((i for i, layer in enumerate(layers) if layer.weights), len(layers))
        self._reverse = [(layers[i], i > lowest) for i in range(len(layers) - 1, lowest - 1, -1)]

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Of each device (s, C, H, W) -> (a, B, F); places beyond s are zero.

        Features are in the order channel, row, column, as ``torch.flatten`` has it.
        """
        self._shapes = []
        for k, (x, out) in enumerate(zip(images, self._out.unbind(), strict=False)):
            x = channels_last(x)
            for layer in self._layers:
                x = layer.forward(x, k)
            out[: len(x), : self._features].view(x.shape).copy_(x)
            out[len(x) :].zero_()
            self._shapes.append(x.shape)
        return self._out[: len(images)]

    def backward(self, grad: Tensor) -> None:
        """(a, B, F), and the steps of all weights."""
        for k, shape in enumerate(self._shapes):
            images = grad[k, : shape[0], : self._features].view(shape)
            images = images.contiguous(memory_format=torch.channels_last)
            for layer, needs_input in self._reverse:
                if (back := layer.backward(images, k, needs_input=needs_input)) is not None:
                    images = back


class Conv:
    """A convolution."""

    def __init__(self, spec: ConvSpec, weight: Slot, bias: Slot | None, devices: int, room: Room) -> None:
        self.spec, self.x = spec, dict[int, Tensor]()
        outputs, channels, *kernel = weight.shape
        value = torch.zeros(devices, outputs, channels, *kernel, dtype=room.dtype)
        if channels > 1:
            value = torch.zeros(devices, outputs, *kernel, channels, dtype=room.dtype).permute(0, 1, 4, 2, 3)
        self.weight, self._bias = Weight(weight, value), None
        if bias is not None:
            self._bias = Weight(bias, torch.zeros(devices, *bias.shape, dtype=room.dtype))
        self.weights: Sequence[Weight] = [self.weight] if self._bias is None else [self.weight, self._bias]

    def forward(self, x: Tensor, k: int) -> Tensor:
        """(s, C, H, W) -> (s, C', H', W')."""
        self.x[k] = x
        bias = None if self._bias is None else self._bias.value[k]
        return torch.conv2d(x, self.weight.value[k], bias, self.spec.stride, self.spec.padding)

    def backward(self, grad: Tensor, k: int, *, needs_input: bool) -> Tensor | None:
        """The reverse."""
        has_bias = self._bias is not None
        back, weight, bias = torch.ops.aten.convolution_backward(
            grad,
            self.x[k],
            self.weight.value[k],
            [grad.shape[1]] if has_bias else None,
            self.spec.stride,
            self.spec.padding,
            (1, 1),
            False,
            (0, 0),
            1,
            [needs_input, True, has_bias],
        )
        self.descend(weight, bias, k)
        return back if needs_input else None

    def descend(self, weight: Tensor, bias: Tensor, k: int) -> None:
        """One step of device k along these gradients."""
        self.weight.descend_along(weight, k)
        if self._bias is not None:
            self._bias.descend_along(bias, k)


class Pool:
    """The maximum over windows."""

    weights: Sequence[Weight] = ()

    def __init__(self, spec: PoolSpec) -> None:
        self._spec, self.where = spec, dict[int, Tensor]()
        self.like = torch.empty(0)

    def forward(self, x: Tensor, k: int) -> Tensor:
        """(s, C, H, W) -> (s, C, H', W')."""
        if len(self.like) < len(x):  # its shape and order are all that the backward pass wants of the input
            self.like = torch.empty_like(x)
        y, self.where[k] = torch.ops.aten.max_pool2d_with_indices(x, self._spec.kernel, self._spec.stride)
        return y  # type: ignore[no-any-return]  # torch leaves it untyped

    def backward(self, grad: Tensor, k: int, *, needs_input: bool) -> Tensor | None:
        """To where the maxima were."""
        spec = self._spec
        back: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, self.like[: len(grad)], spec.kernel, spec.stride, (0, 0), (1, 1), False, self.where[k]
        )
        return back


class PooledConv:
    """A convolution and the maximum over windows of it.

    Only maxima have a gradient, and not all of those after a ReLU: the way back passes over the zeros, which
    are most of what torch multiplies.
    """

    def __init__(self, conv: Conv, pool: Pool, room: Room, functions: CDLL) -> None:
        """Of these two; ``functions`` are those of ``native.c``."""
        self._conv, self._pool, self._room, self._functions = conv, pool, room, functions
        self.weights = conv.weights
        self._images = self._back = torch.zeros(0, dtype=room.dtype)

    @staticmethod
    def pays(kernel: Sequence[int]) -> bool:
        """Whether a kernel (O, I, H, W) has lines long enough for that."""
        return kernel[1] * kernel[3] >= ALIGN

    def forward(self, x: Tensor, k: int) -> Tensor:
        """(s, C, H, W) -> (s, C', H', W')."""
        return self._pool.forward(self._conv.forward(x, k), k)

    def backward(self, grad: Tensor, k: int, *, needs_input: bool) -> Tensor | None:
        """The reverse."""
        x, kernel, grad, where = (
            part.permute(0, 2, 3, 1)
            for part in (self._conv.x[k], self._conv.weight.value[k], grad, self._pool.where[k])
        )
        grad, where = grad.contiguous(), where.contiguous()
        outputs, tall, wide, channels = kernel.shape
        weight, length = self._lines(kernel), padded(wide * channels)
        (down, right), frame = self._conv.spec.stride, self._frame(x.shape)
        image, line, (rows, columns) = prod(frame), frame[1] * channels, self._pool.like.shape[2:]
        images, back = (self._inner(held, x.shape) for held in (self._images, self._back))
        images.copy_(x)
        shape = [len(x), grad.shape[1] * grad.shape[2], outputs, rows * columns, columns]
        shape += [image, line, down * line, right * channels, tall, length]
        terms = self._room.get("terms", 2 * grad[0].numel() + 2)
        ends = self._room.get("ends", 2 * rows * columns + outputs + 2, dtype=torch.int32)
        slope, bias = self._room.get("slope", outputs, tall, length), self._room.get("bias slope", outputs)
        given = (t.data_ptr() for t in (self._images, weight, grad, where, terms, ends, slope, bias))
        into = self._back.data_ptr() if needs_input else None
        self._functions.lepton_unpool((c_int64 * len(shape))(*shape), *given, into)
        self._conv.descend(slope[..., : wide * channels].view(kernel.shape).permute(0, 3, 1, 2), bias, k)
        return back.contiguous().permute(0, 3, 1, 2) if needs_input else None

    def _lines(self, kernel: Tensor) -> Tensor:
        """The kernel (O, H, W, I) with its lines padded."""
        outputs, tall, wide, channels = kernel.shape
        if kernel.is_contiguous() and wide * channels % ALIGN == 0:
            return kernel
        lines = self._room.get("lines", outputs, tall, padded(wide * channels)).zero_()
        lines[..., : wide * channels].view(kernel.shape).copy_(kernel)
        return lines

    def _frame(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Height, width and channels of images (s, H, W, C) with their padding; makes room for them."""
        count, height, width, channels = shape
        above, left = self._conv.spec.padding
        frame = height + 2 * above, width + 2 * left, channels
        if len(self._images) < (size := count * prod(frame) + ALIGN):
            self._images, self._back = torch.zeros(2, size, dtype=self._room.dtype).unbind()
        return frame

    def _inner(self, held: Tensor, shape: Sequence[int]) -> Tensor:
        """Images without their padding: (s, H, W, C)."""
        (count, height, width, _), frame = shape, self._frame(shape)
        above, left = self._conv.spec.padding
        whole = held[: count * prod(frame)].view(count, *frame)
        return whole[:, above : above + height, left : left + width]


class Norm:
    """Group normalisation (Wu & He 2018)."""

    def __init__(self, spec: NormSpec, weight: Slot, bias: Slot, devices: int, room: Room) -> None:
        self._spec = spec
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor, tuple[int, int, int, int]]] = {}
        self._weight, self._bias = (
            Weight(slot, torch.zeros(devices, *slot.shape, dtype=room.dtype)) for slot in (weight, bias)
        )
        self.weights: Sequence[Weight] = [self._weight, self._bias]

    def forward(self, x: Tensor, k: int) -> Tensor:
        """(s, C, H, W), the same shape."""
        sizes = (x.shape[0], x.shape[1], x.shape[2] * x.shape[3], self._spec.groups)
        y, mean, scale = torch.ops.aten.native_group_norm(
            x, self._weight.value[k], self._bias.value[k], *sizes, self._spec.eps
        )
        self._kept[k] = x, mean, scale, sizes
        return y  # type: ignore[no-any-return]  # torch leaves it untyped

    def backward(self, grad: Tensor, k: int, *, needs_input: bool) -> Tensor | None:
        """The reverse."""
        x, mean, scale, sizes = self._kept[k]
        back, weight, bias = torch.ops.aten.native_group_norm_backward(
            grad, x, mean, scale, self._weight.value[k], *sizes, [needs_input, True, True]
        )
        self._weight.descend_along(weight, k)
        self._bias.descend_along(bias, k)
        return back if needs_input else None


def channels_last(images: Tensor) -> Tensor:
    """Images (N, C, H, W) with channels last in memory, also where one channel leaves that open."""
    images = images.contiguous(memory_format=torch.channels_last)
    n, c, h, w = images.shape
    return images.as_strided((n, c, h, w), (c * h * w, 1, w * c, c))
