"""Smaller models: a student's architecture, and what pruning leaves. Importing this module imports torch."""

import logging
from copy import deepcopy
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from lepton_fl.compression.recipe import PruneSpec, StudentSpec
from lepton_fl.errors import TaskError
from lepton_fl.tasks import Task
from lepton_fl.tasks.data import Array

_PRUNED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.GRU, nn.LSTM)  # layers whose weights may be zeroed
_GROUP, _KEEP = 4, 2  # 2:4 (Mishra et al. 2021): of four weights in a row, two stay


def student(spec: StudentSpec, task: Task, teacher: nn.Module, example: Array, seed: int) -> nn.Module:
    """A student to train.

    Args:
        spec: its architecture.
        task: what it is for.
        teacher: the global model; a scaled student begins with its strongest channels.
        example: (n, ...) prepared rows.
        seed: of its weights.

    Raises:
        TaskError: the task has no such student, or the architecture does not fit the task.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spec.scale:
            made = thinned(teacher, 1 - spec.scale, example)
        elif spec.name:
            made = _named(spec.name, task)
        else:
            made = _built(spec, task, example)
    _fits(made, teacher, example)
    return made.eval()


def _named(name: str, task: Task) -> nn.Module:
    if name not in task.students:
        raise TaskError(
            f"The task {task.name!r} has no student {name!r}.",
            hint=f"It has {', '.join(task.students) or 'none'}; a recipe may give kind or scale instead.",
        )
    return task.students[name]()


def _built(spec: StudentSpec, task: Task, example: Array) -> nn.Module:
    from lepton_fl.tasks import models

    classes, shape = task.contract.num_classes, example.shape[1:]
    try:
        if spec.kind == "linear":
            return models.Linear(prod(shape), classes)
        if spec.kind == "mlp":
            return models.MLP(prod(shape), classes, (spec.hidden,) * spec.layers)
        if spec.kind == "cnn":
            channels, height, width = shape
            return models.CNN((channels, height, width), classes, spec.width, spec.hidden)
        cell = models.GRU if spec.kind == "gru" else models.LSTM
        tokens = example.dtype.kind == "i"
        return cell(
            classes,
            vocabulary=int(np.max(task.contract.high)) + 1 if tokens else 0,
            inputs=0 if tokens else shape[-1],
            embedding=spec.embedding,
            hidden=spec.hidden,
            layers=spec.layers,
            every_step=bool(task.contract.target_shape),
        )
    except ValueError as error:
        raise TaskError(
            f"A student of kind {spec.kind!r} does not fit rows of shape {shape}: {error}."
        ) from error


def _fits(made: nn.Module, teacher: nn.Module, example: Array) -> None:
    x = torch.from_numpy(example[:2])
    with torch.inference_mode():
        try:
            got, want = made.eval()(x).shape, teacher(x).shape
        except (RuntimeError, IndexError, ValueError) as error:
            raise TaskError(f"The student does not take the task's rows: {error}") from error
    if got != want:
        raise TaskError(f"The student answers {tuple(got)}, the global model {tuple(want)}.")


# --- pruning ----------------------------------------------------------------------------------------------


def pruned(module: nn.Module, spec: PruneSpec, example: Array) -> tuple[nn.Module, dict[str, Tensor]]:
    """A pruned copy, and masks of the weights that must stay zero (none if the shapes got smaller).

    Raises:
        TaskError: the structure of the model cannot be pruned.
    """
    if spec.kind == "structured":
        return thinned(module, spec.amount, example), {}
    copy = deepcopy(module)
    masks = _two_of_four(copy) if spec.kind == "2:4" else _largest(copy, spec.amount)
    named = dict(copy.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            named[name].mul_(mask)
    return copy, masks


def zero_masks(module: nn.Module) -> dict[str, Tensor]:
    """Masks that keep those weights zero that are."""
    return {
        name: (weight != 0).to(weight) for name, weight in _weights(module).items() if (weight == 0).any()
    }


def thinned(module: nn.Module, amount: float, example: Array) -> nn.Module:
    """A copy without the weakest channels, and without all that hangs on them (Fang et al. 2023, DepGraph).

    Args:
        module: stays as it is.
        amount: share of the channels of each layer to remove; the last layer keeps its outputs.
        example: (n, ...) prepared rows.

    Raises:
        TaskError: channels of this model cannot be removed (recurrent layers, fused attention).
    """
    import torch_pruning

    copy, x = deepcopy(module).eval(), torch.from_numpy(example[:2])
    outputs = [layer for layer in copy.modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1:]
    recurrent = [type(layer).__name__ for layer in copy.modules() if isinstance(layer, nn.RNNBase)]
    if recurrent or not outputs:
        raise TaskError(
            f"Channels of {recurrent[0] if recurrent else type(copy).__name__} layers cannot be removed.",
            hint="Prune by magnitude, or declare a student of kind 'gru' or 'lstm'.",
        )
    logging.getLogger("torch_pruning").setLevel(logging.ERROR)
    before = sum(p.numel() for p in copy.parameters())
    try:
        torch_pruning.pruner.MagnitudePruner(
            copy,
            x,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=amount,
            ignored_layers=outputs,
        ).step()
        with torch.inference_mode():
            copy(x)
    except Exception as error:  # the library raises whatever it met in a model it does not know
        raise TaskError(
            f"Channels of this model cannot be removed: {type(error).__name__}: {error}.",
            hint="Prune by magnitude, or declare a student by kind.",
        ) from error
    if sum(p.numel() for p in copy.parameters()) >= before:
        raise TaskError(f"Removing {amount:.0%} of the channels removed nothing: the layers are too narrow.")
    return copy


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Name -> weight of every layer that may be sparse; biases and normalisation stay dense."""
    return {
        f"{prefix}.{name}".lstrip("."): parameter
        for prefix, layer in module.named_modules()
        if isinstance(layer, _PRUNED)
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.ndim > 1
    }


def _largest(module: nn.Module, amount: float) -> dict[str, Tensor]:
    """Keep the largest weights of the whole model (Han et al. 2015)."""
    weights = _weights(module)
    if not weights:
        raise TaskError("The model has no layer whose weights could be zeroed.")
    sizes = torch.cat([w.detach().abs().flatten() for w in weights.values()])
    bound = sizes.kthvalue(max(1, int(amount * len(sizes)))).values
    return {name: (w.detach().abs() > bound).to(w) for name, w in weights.items()}


def _two_of_four(module: nn.Module) -> dict[str, Tensor]:
    """Two of four neighbours along the inputs; a layer whose inputs are no multiple of four stays dense."""
    masks = {}
    for name, weight in _weights(module).items():
        rows = weight.detach().abs().flatten(1)  # (outputs, inputs)
        if rows.shape[1] % _GROUP:
            continue
        groups = rows.reshape(len(rows), -1, _GROUP)
        kept = groups.topk(_KEEP, dim=-1).indices
        masks[name] = torch.zeros_like(groups).scatter_(-1, kept, 1.0).reshape(weight.shape)
    if not masks:
        raise TaskError("No layer of the model has a multiple of four inputs, so 2:4 leaves nothing out.")
    return masks


# --- quantisation-aware training -----------------------------------------------------------------------


class _Rounded(nn.Module):
    """A weight as 8 or 4 bits would store it, per output channel; gradients pass straight through."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.peak = 2 ** (bits - 1) - 1

    def forward(self, weight: Tensor) -> Tensor:
        scale = (
            weight.detach().abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True).clamp(min=1e-12)
            / self.peak
        )
        rounded = (weight / scale).round().clamp(-self.peak, self.peak) * scale
        through: Tensor = weight + (rounded - weight).detach()
        return through


class _RoundedInput:
    """The input of a layer in 8 bits, ranges as they come; gradients pass straight through."""

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        low, high = x.detach().amin().clamp(max=0), x.detach().amax().clamp(min=0)
        scale = ((high - low) / 255).clamp(min=1e-12)
        rounded = (x / scale).round() * scale
        return (x + (rounded - x).detach(), *inputs[1:])


def with_rounding(module: nn.Module, bits: int, *, activations: bool) -> nn.Module:
    """A copy whose layers compute with rounded weights (and inputs), for quantisation-aware training.

    Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference"; ``without_rounding`` turns it into an ordinary model again.
    """
    from torch.nn.utils import parametrize

    copy = deepcopy(module)
    layers = [layer for layer in copy.modules() if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _Rounded(bits))
        if activations:
            layer.register_forward_pre_hook(_RoundedInput())
    if not layers:
        raise TaskError("The model has no layer that could be trained with rounding.")
    return copy


def without_rounding(rounding: nn.Module, module: nn.Module) -> nn.Module:
    """A copy of ``module`` with the weights that ``rounding`` was trained to, not rounded."""
    copy = deepcopy(module)
    trained = {
        name.replace("parametrizations.", "").removesuffix(".original"): tensor
        for name, tensor in rounding.state_dict().items()
    }
    copy.load_state_dict(trained)
    return copy.eval()
