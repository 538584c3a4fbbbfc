"""A module as a chain of layers, read from its own code.

``torch.fx`` follows the module's ``forward``; what comes out as one straight line of layers known here is a
chain, whatever the module's class. Everything else is refused with the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from lepton_simulations.engines.contract import Unsupported


@dataclass(frozen=True, eq=False)
class LinearSpec:
    """y = x W^T + b; parameters by their names in the module."""

    weight: str
    bias: str | None


@dataclass(frozen=True, eq=False)
class ConvSpec:
    """A two-dimensional convolution without dilation, groups or padding modes."""

    weight: str
    bias: str | None
    stride: tuple[int, int]
    padding: tuple[int, int]


@dataclass(frozen=True, eq=False)
class NormSpec:
    """Group normalisation."""

    weight: str
    bias: str
    groups: int
    eps: float


@dataclass(frozen=True)
class PoolSpec:
    """Maximum over windows."""

    kernel: tuple[int, int]
    stride: tuple[int, int]


@dataclass(frozen=True)
class ReluSpec:
    """max(x, 0)."""


@dataclass(frozen=True)
class FlattenSpec:
    """(N, ...) -> (N, F)."""


@dataclass(frozen=True)
class SqueezeSpec:
    """(N, 1) -> (N,)."""


Spec = LinearSpec | ConvSpec | NormSpec | PoolSpec | ReluSpec | FlattenSpec | SqueezeSpec


def chain_of(module: nn.Module) -> list[Spec]:
    """The layers of the module in order.

    Raises:
        Unsupported: it is something else.
    """
    _plain_modules(module)
    try:
        graph = fx.Tracer().trace(module)
    except Exception as error:  # a user's forward() may do anything with a symbolic value
        raise Unsupported(f"its forward() cannot be traced ({type(error).__name__})") from error
    specs: list[Spec] = []
    parameters = dict(module.named_parameters(remove_duplicate=False))
    previous: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op == "placeholder":
            if previous is not None:
                raise Unsupported("its forward() takes several inputs")
        elif not node.args or node.args[0] is not previous:
            raise Unsupported(f"{node.name!r} does not take the output of the layer before it alone")
        elif node.op != "output":
            spec = _spec(node, module)
            specs += [] if spec is None else [spec]
        previous = node
    _all_trained(specs, parameters)
    return _pool_first(specs)


def _plain_modules(module: nn.Module) -> None:
    for name, part in module.named_modules():
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        if any(hooks):
            raise Unsupported(f"{name or 'the model'} has hooks")
    if any(True for _ in module.buffers()):
        raise Unsupported("it has buffers")


def _all_trained(specs: list[Spec], parameters: dict[str, nn.Parameter]) -> None:
    used = [n for s in specs for n in (getattr(s, "weight", None), getattr(s, "bias", None)) if n]
    if sorted(used) != sorted(parameters) or len({id(p) for p in parameters.values()}) < len(parameters):
        raise Unsupported("a parameter is shared or not used by a layer of its own")
    if frozen := [name for name, parameter in parameters.items() if not parameter.requires_grad]:
        raise Unsupported(f"{frozen[0]!r} is frozen")


def _pool_first(specs: list[Spec]) -> list[Spec]:
    """ReLU after pooling instead of before: the same function and gradient, on a quarter of the values."""
    specs = list(specs)
    for i in range(len(specs) - 1):
        if isinstance(specs[i], ReluSpec) and isinstance(specs[i + 1], PoolSpec):
            specs[i], specs[i + 1] = specs[i + 1], specs[i]
    return specs


def _spec(node: fx.Node, module: nn.Module) -> Spec | None:
    if node.op == "call_module":
        part = module.get_submodule(str(node.target))
        make = _MODULES.get(type(part))
        if make is None or len(node.args) != 1 or node.kwargs:
            raise Unsupported(f"it has a layer of type {type(part).__name__}")
        return make(part, f"{node.target}.")
    call = _CALLS.get(node.target)
    if call is None:
        name = getattr(node.target, "__name__", node.target)
        raise Unsupported(f"its forward() calls {name}")
    return call(node)


# --- layers that are modules ------------------------------------------------------------------------


def _linear_module(part: nn.Linear, prefix: str) -> Spec:
    return LinearSpec(f"{prefix}weight", None if part.bias is None else f"{prefix}bias")


def _conv_module(part: nn.Conv2d, prefix: str) -> Spec:
    plain = part.dilation == (1, 1) and part.groups == 1 and part.padding_mode == "zeros"
    if not plain or isinstance(part.padding, str):
        raise Unsupported("it has a convolution with dilation, groups or a padding mode")
    bias = None if part.bias is None else f"{prefix}bias"
    return ConvSpec(f"{prefix}weight", bias, _pair(part.stride), _pair(part.padding))


def _norm_module(part: nn.GroupNorm, prefix: str) -> Spec:
    if not part.affine:
        raise Unsupported("it has a group normalisation without weights")
    return NormSpec(f"{prefix}weight", f"{prefix}bias", part.num_groups, part.eps)


def _pool_module(part: nn.MaxPool2d, prefix: str) -> Spec:
    return _pool(
        part.kernel_size, part.stride, part.padding, part.dilation, part.ceil_mode, part.return_indices
    )


def _flatten_module(part: nn.Flatten, prefix: str) -> Spec:
    return _flatten(part.start_dim, part.end_dim)


_MODULES: dict[type[nn.Module], Callable[[Any, str], Spec | None]] = {
    nn.Linear: _linear_module,
    nn.Conv2d: _conv_module,
    nn.GroupNorm: _norm_module,
    nn.MaxPool2d: _pool_module,
    nn.ReLU: lambda part, prefix: ReluSpec(),
    nn.Flatten: _flatten_module,
    nn.Identity: lambda part, prefix: None,
}


# --- layers that are functions ----------------------------------------------------------------------


def _linear_call(node: fx.Node) -> Spec:
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    weight, bias = given.get("weight"), given.get("bias")
    for tensor in (weight, bias):
        if tensor is not None and (not isinstance(tensor, fx.Node) or tensor.op != "get_attr"):
            raise Unsupported("the weight of a linear layer is computed")
    assert isinstance(weight, fx.Node)
    return LinearSpec(str(weight.target), str(bias.target) if isinstance(bias, fx.Node) else None)


def _flatten_call(node: fx.Node) -> Spec:
    given = dict(zip(("input", "start_dim", "end_dim"), node.args, strict=False)) | dict(node.kwargs)
    return _flatten(given.get("start_dim", 0), given.get("end_dim", -1))


def _squeeze_call(node: fx.Node) -> Spec:
    given = dict(zip(("input", "dim"), node.args, strict=False)) | dict(node.kwargs)
    if given.get("dim") not in (-1, 1):
        raise Unsupported("its forward() squeezes another axis than the last")
    return SqueezeSpec()


def _relu_call(node: fx.Node) -> Spec:
    return ReluSpec()


def _pool_call(node: fx.Node) -> Spec:
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    kernel = given["kernel_size"]
    rest = [given.get(n, d) for n, d in zip(names[3:], (0, 1, False, False), strict=True)]
    return _pool(kernel, given.get("stride") or kernel, *rest)


_CALLS: dict[Any, Callable[[fx.Node], Spec | None]] = {
    functional.linear: _linear_call,
    torch.flatten: _flatten_call,
    "flatten": _flatten_call,
    torch.squeeze: _squeeze_call,
    "squeeze": _squeeze_call,
    torch.relu: _relu_call,
    functional.relu: _relu_call,
    "relu": _relu_call,
    functional.max_pool2d: _pool_call,
    torch.max_pool2d: _pool_call,
}


def _flatten(first: object, last: object) -> Spec:
    if (first, last) != (1, -1):
        raise Unsupported(f"it flattens axes {first} to {last}, not all but the first")
    return FlattenSpec()


def _pool(
    kernel: object, stride: object, padding: object, dilation: object, ceil_mode: object, indices: object
) -> Spec:
    if _pair(padding) != (0, 0) or _pair(dilation) != (1, 1) or ceil_mode or indices:
        raise Unsupported("it has pooling with padding, dilation, ceil_mode or indices")
    return PoolSpec(_pair(kernel), _pair(stride or kernel))


def _pair(value: object) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    assert isinstance(value, tuple | list)
    return int(value[0]), int(value[1])
