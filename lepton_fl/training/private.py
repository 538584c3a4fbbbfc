"""DP-SGD: the noisy mean of a batch's gradients, each row's clipped by itself (Abadi et al. 2016).

    gradient = PrivateGradient(module, loss, grad, clip_norm=1.0, spent=spent)
    rows = poisson_rows(len(x), spent.charge.rate, spent.stream)
    gradient.write(x[rows], y[rows], expected=spent.charge.rate * len(x))     # into ``grad``

One pass forward and one backward per batch (the book-keeping of Bu et al. 2023, "Differentially private
optimization on large model at small cost"). The backward pass stops at the layers' outputs; from inputs and
output gradients of each layer come the norms of the rows and then, weighted by the clip, the sum. A linear
layer's row gradients are outer products, of which neither norm nor weighted sum needs the product itself; of
all other layers Opacus' samplers give the row gradients.

**The noise is whole numbers**, as everywhere here: the clipped sum is rounded to a grid and a discrete
Gaussian from AES-256-CTR is added, so the low bits say nothing. A row moves the integers by at most
``clip_norm / step``: rows are clipped to a little less, which pays for rounding to the grid (at most half a
step a coordinate, on either side) and for float32 sums over ``CHUNK`` rows (at most ``2 * CHUNK**2 * 2**-24``
of the clip); what is beyond a chunk is added in whole numbers.

A row whose gradient is not finite counts as zero. The loss must be a mean over rows, as tasks promise, and
no row may change what the model says of another one: what is known to break this is refused by name.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from math import floor, hypot, log2, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lepton_fl.errors import ConfigError, TaskError
from lepton_fl.privacy.noise import SMOOTH, DiscreteGaussian, Keystream
from lepton_fl.tasks.models import Head

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lepton_fl.privacy.example import Spent

CHUNK = 128  # rows added up in float32
MARGIN = 2.0**-8  # of the clip, for float32: sums take at most half of it, norms and factors the rest
FINE = 2.0**-18  # step of the grid in standard deviations of the noise, at most: two tables draw it
FINEST = 2.0**-16  # the same in clip norms

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_HINTS = (
    (nn.modules.batchnorm._BatchNorm, "it mixes the rows of a batch; use nn.GroupNorm"),
    (_RECURRENT, "the gradients of its rows cannot be told apart; use convolutions over time"),
    (nn.MultiheadAttention, "the gradients of its rows cannot be told apart; use layers of nn.Linear"),
)


@dataclass(frozen=True)
class Grid:
    """In which steps the noise is added."""

    step: float  # a power of two
    row_norm: float  # to which a row's gradient is clipped in float32
    sigma: float  # of the noise, steps


def grid_of(clip_norm: float, noise_multiplier: float, coordinates: int) -> Grid:
    """The grid of a training.

    Args:
        clip_norm: the most a row may move the sum.
        noise_multiplier: standard deviation of the noise, in clip norms.
        coordinates: P', of a gradient.

    Raises:
        ConfigError: the model is so large that rounding alone would take half of the clip.
    """
    step = 2.0 ** floor(log2(clip_norm * min(noise_multiplier * FINE, FINEST)))
    row_norm = (clip_norm - sqrt(coordinates) * step) / (1 + MARGIN)
    if not row_norm > clip_norm / 2:
        raise ConfigError(f"A gradient of {coordinates} coordinates is too long for DP-SGD on a grid.")
    return Grid(step, row_norm, hypot(noise_multiplier * clip_norm / step, SMOOTH))


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one layer was given in a forward pass, and what it made of it."""

    layer: nn.Module
    inputs: Tensor
    output: Tensor
    versions: tuple[int, int]  # of both: who changes them in place changes the gradient


class PrivateGradient:
    """Writes noisy gradients of one module; use within ``listening``."""

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        grad: Tensor,
        clip_norm: float,
        spent: "Spent",
    ) -> None:
        """Prepare the grid and its noise.

        Args:
            module: that passed ``refuse_model``.
            loss: the mean over the rows of a batch.
            grad: (P',) float32, over the trained parameters in the module's order; written by ``write``.
            clip_norm: the most a row may move the sum.
            spent: the noise multiplier, and the stream of the noise.
        """
        self._module, self._loss, self._grad = module, loss, grad
        self._stream: Keystream = spent.stream
        self.grid = grid_of(clip_norm, spent.charge.noise_multiplier, len(grad))
        self._noise = DiscreteGaussian(self.grid.sigma)
        trained = [p for p in module.parameters() if p.requires_grad]
        self._parts = dict(zip(trained, _split(grad, trained), strict=True))
        owners = Counter(p for m in module.modules() for p in m.parameters(recurse=False))
        self._shared = {p for p, count in owners.items() if count > 1}
        self._seen: list[_Seen] = []

    @contextmanager
    def listening(self) -> "Iterator[PrivateGradient]":
        """Take note of what goes through the layers."""
        layers = layers_of(self._module)
        for layer in layers:
            if not _outer(layer) and type(layer) not in _samplers():
                _by_functions(layer)  # copies the layer, which must have no hook yet
        hooks = [layer.register_forward_hook(self._note) for layer in layers]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def write(self, x: Tensor, y: Tensor, expected: float) -> None:
        """The noisy sum over these rows, divided by the expected number of rows.

        Args:
            x: (n, ...) inputs of the batch; n may be zero.
            y: (n, ...) targets.
            expected: the public denominator, whatever n is.
        """
        total = np.zeros(len(self._grad), np.int64)
        for first in range(0, len(x), CHUNK):
            self._sum(x[first : first + CHUNK], y[first : first + CHUNK])
            scaled = self._grad.mul_(1 / self.grid.step).round_()
            total += scaled.cpu().numpy().astype(np.int64)
        self._noise.add_to(total, self._stream)
        self._grad.copy_(torch.from_numpy(total))
        self._grad.mul_(self.grid.step / expected)

    def row_norms(self, x: Tensor, y: Tensor) -> Tensor:
        """(n,) norms of the rows' gradients, for tests; they are private."""
        found = self._backward(x, y)
        return self._norms(found, *self._row_gradients(found))

    # ------------------------------------------------------------------------------- one chunk of rows

    def _sum(self, x: Tensor, y: Tensor) -> None:
        """The clipped sum over a chunk into the gradient."""
        found = self._backward(x, y)
        alone, rows = self._row_gradients(found)
        norms = self._norms(found, alone, rows)
        finite = torch.isfinite(norms)
        if not finite.all():
            del found, alone, rows
            if finite.any():
                self._sum(x[finite], y[finite])
            else:
                self._grad.zero_()
            return
        weights = (self.grid.row_norm / norms).clamp_(max=1.0)  # 1 / 0 is infinite, and clamped
        self._grad.zero_()
        for seen, backprop in alone:
            weighted = backprop * weights[:, None]
            for parameter in _trained(seen.layer):
                part = self._parts[parameter]
                if parameter.dim() == 2:
                    torch.mm(weighted.T, seen.inputs, out=part)
                else:
                    torch.sum(weighted, 0, out=part)
        for parameter, gradients in rows.items():
            torch.mv(gradients.flatten(1).T, weights, out=self._parts[parameter].view(-1))

    def _backward(self, x: Tensor, y: Tensor) -> list[tuple[_Seen, Tensor]]:
        """Every layer's inputs with the gradients of the rows' own losses at its output."""
        self._seen = []
        loss = self._loss(self._module(x), y) * len(x)  # the sum of the rows' losses
        seen, self._seen = self._seen, []
        for note in seen:
            if (note.inputs._version, note.output._version) != note.versions:
                raise TaskError(
                    f"The model changes tensors of {type(note.layer).__name__} in place; DP-SGD needs them.",
                    hint="Use operations that return a new tensor in forward().",
                )
        grads = torch.autograd.grad(loss, [note.output for note in seen], allow_unused=True)
        return [(note, grad) for note, grad in zip(seen, grads, strict=True) if grad is not None]

    def _row_gradients(
        self, found: list[tuple[_Seen, Tensor]]
    ) -> tuple[list[tuple[_Seen, Tensor]], dict[nn.Parameter, Tensor]]:
        """Layers whose rows are outer products, with (n, out) gradients; and (n, ...) gradients of others."""
        times = Counter(seen.layer for seen, _ in found)
        alone, rows = list[tuple[_Seen, Tensor]](), dict[nn.Parameter, Tensor]()
        for seen, grad in found:
            layer, outer = seen.layer, _outer(seen.layer)
            if outer:
                grad = grad.reshape(*seen.inputs.shape[:-1], -1)
            if outer and seen.inputs.dim() == 2 and times[layer] == 1 and not self._has_shared(layer):
                alone.append((seen, grad))
                continue
            for parameter, gradients in _sampler(layer)(layer, [seen.inputs], grad).items():
                known = rows.get(parameter)
                rows[parameter] = gradients if known is None else known + gradients
        return alone, rows

    def _has_shared(self, layer: nn.Module) -> bool:
        return any(parameter in self._shared for parameter in layer.parameters())

    def _norms(
        self,
        found: list[tuple[_Seen, Tensor]],
        alone: list[tuple[_Seen, Tensor]],
        rows: dict[nn.Parameter, Tensor],
    ) -> Tensor:
        squares = torch.zeros(len(found[0][0].inputs)) if found else torch.zeros(0)
        squares = squares.to(self._grad)
        for seen, backprop in alone:
            of_output = backprop.square().sum(1)
            for parameter in _trained(seen.layer):
                squares += of_output * seen.inputs.square().sum(1) if parameter.dim() == 2 else of_output
        for gradients in rows.values():
            squares += gradients.flatten(1).square().sum(1)
        return squares.sqrt_()

    def _note(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401 - a layer's
        if not torch.is_grad_enabled():
            return
        if len(inputs) != 1 or not isinstance(output, Tensor):
            raise TaskError(
                f"{type(layer).__name__} takes or gives several tensors; DP-SGD cannot follow it.",
                hint="Write it as layers with one input and one output.",
            )
        given = inputs[0].detach()
        self._seen.append(_Seen(layer, given, output, (given._version, output._version)))


# ------------------------------------------------------------------------------------ which models


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers that own trained parameters, each once."""
    return [layer for layer in module.modules() if _trained(layer)]


def refuse_model(module: nn.Module, name: str = "The model") -> None:
    """Refuse a model whose rows cannot be told apart.

    Args:
        module: in training mode, as it will be trained.
        name: for the message.

    Raises:
        TaskError: names every layer that is in the way, and what to do about it.
    """
    found = [
        f"{path or 'the model'} is a {type(layer).__name__}: {why}"
        for path, layer in module.named_modules()
        if (why := _objection(layer))
    ]
    if found:
        raise TaskError(
            f"{name} cannot be trained with example-level privacy: {'; '.join(found)}.",
            hint="Change the task's model, or train it with device-level privacy.",
        )


def _objection(layer: nn.Module) -> str:
    for kind, why in _HINTS:
        if isinstance(layer, kind):
            return why
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
        return "it keeps statistics of the rows; leave track_running_stats out, or use nn.GroupNorm"
    if any(buffer.is_floating_point() for buffer in layer.buffers(recurse=False)):
        return "it holds a floating-point buffer, which training could change without noise"
    known = _outer(layer) or type(layer) in _samplers()
    if (
        _trained(layer)
        and not known
        and any(_trained(child) for child in layer.modules() if child is not layer)
    ):
        return "it owns parameters beside layers that own some; put them into a layer of their own"
    return ""


def refuse_mixing(module: nn.Module, x: Tensor) -> None:
    """Refuse a model that lets one row change what it says of another one.

    Args:
        module: of the task.
        x: (n, ...) rows; the first two are tried.

    Raises:
        TaskError: it does.
    """
    if len(x) < 2:
        return
    said = list[Tensor]()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for other in (1, 0):
            torch.manual_seed(0)
            said.append(module(x[[0, other]])[0])
    if not torch.allclose(said[0], said[1], rtol=1e-4, atol=1e-5, equal_nan=True):
        raise TaskError(
            "The model's output for one row depends on the other rows of its batch.",
            hint="Example-level privacy needs rows that are independent; look for statistics over the batch.",
        )


def _outer(layer: nn.Module) -> bool:
    """Whether the layer is a plain matrix product."""
    return type(layer) in (nn.Linear, Head)


def _trained(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters(recurse=False) if p.requires_grad]


def _sampler(layer: nn.Module) -> Callable[..., dict[nn.Parameter, Tensor]]:
    from opacus.grad_sample.functorch import ft_compute_per_sample_gradient

    kind = nn.Linear if _outer(layer) else type(layer)
    found: Callable[..., dict[nn.Parameter, Tensor]] = _samplers().get(kind, ft_compute_per_sample_gradient)
    return found


def _samplers() -> dict[type[nn.Module], Any]:
    """Opacus' row gradients by kind of layer."""
    try:
        from opacus.grad_sample import GradSampleHooks
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"Example-level privacy needs {error.name}, which is not installed.",
            hint="pip install 'lepton-fl[train,privacy]'",
        ) from error
    samplers: dict[type[nn.Module], Any] = GradSampleHooks.GRAD_SAMPLERS
    return samplers


def _by_functions(layer: nn.Module) -> None:
    """Let torch.func find the row gradients of a layer that Opacus does not know."""
    from opacus.grad_sample.functorch import prepare_layer

    prepare_layer(layer, batch_first=True)


def _split(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Views of consecutive pieces, shaped like the parameters."""
    pieces = torch.split(flat, [p.numel() for p in parameters])
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
