"""A torch model as an ONNX graph, and what the graph tells: operators, multiply-adds, weights.

Importing this module imports torch and onnx.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable
from math import prod
from typing import Any, Final

import numpy as np
import onnx
import torch
from torch import nn

from lepton_fl.compression.card import TensorSpec
from lepton_fl.compression.recipe import OPSET
from lepton_fl.errors import TaskError
from lepton_fl.tasks.data import Array

INPUT, OUTPUT, BATCH = "input", "output", "batch"
_TYPES: Final = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}

# pJ in 45 nm (Horowitz 2014): a multiply and an add of so many bits, and one byte from DRAM.
ENERGY_MODEL: Final = (
    "Horowitz 2014, 45 nm: MACs x (0.3 | 1.5 | 4.6 pJ at <= 8 | 16 | 32 bits) + weights x 160 pJ/byte"
)
_MAC_PJ: Final = {4: 0.3, 8: 0.3, 16: 1.5, 32: 4.6}
_BYTE_PJ: Final = 160.0
_ANY_SIZE: Final = 2**40


def export(module: nn.Module, example: Array) -> onnx.ModelProto:
    """The graph of a model: fixed opset, any batch, ``input`` and ``output``, and nothing about this machine.

    Args:
        module: in evaluation mode, on the CPU.
        example: (n >= 2, ...) prepared rows.

    Raises:
        TaskError: the model cannot be exported, or its weights are not finite.
    """
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TaskError(f"Tensor {name!r} is not finite: training diverged.")
    rows = (torch.from_numpy(example[:2]),)
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            program = torch.onnx.export(
                module,
                rows,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),
            )
    except Exception as error:  # a user's model may fail in any way while it is traced
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise TaskError(
            f"The model cannot be exported to ONNX: {type(error).__name__}: {first[:300]}",
            hint="Its forward() must be made of tensor operations whose shapes depend on the batch alone.",
        ) from error
    if program is None:
        raise TaskError("torch exported no ONNX program.")
    return tidy(_folded(program.model_proto))


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with everything computed that no input changes, however large.

    torch reorders the gates of a recurrent layer by operators in the graph, and its optimiser folds small
    constants only: no quantiser would find the weights, and a device would reorder them at each call.
    """
    from onnxscript import optimizer

    return optimizer.optimize(model, input_size_limit=_ANY_SIZE, output_size_limit=_ANY_SIZE)


@contextlib.contextmanager
def _quiet() -> Any:  # noqa: ANN401 - a context manager's generator
    """The exporter logs what does not concern us, and prints."""
    log = logging.getLogger("torch.onnx")
    before, log.disabled = log.level, True
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.disabled = False
        log.setLevel(before)


def tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without traces of the machine that made it, and with short names: both are bytes on the wire."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    del graph.value_info[:]  # stale as soon as a quantiser transposes a weight
    del copy.metadata_props[:]
    copy.producer_name, copy.producer_version, copy.doc_string, graph.name = "lepton-fl", "", "", "variant"
    _sort(graph)
    short = _short_names(graph)
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string, node.name = "", ""
        for names in (node.input, node.output):
            names[:] = [short.get(name, name) for name in names]
    for group in (graph.input, graph.output, graph.initializer):
        for item in group:
            del item.metadata_props[:]
            item.doc_string = ""
            item.name = short.get(item.name, item.name)
    return copy


def _sort(graph: onnx.GraphProto) -> None:
    """Put every node after those it needs, as the standard asks; converters append theirs at the end."""
    there = {""} | {item.name for group in (graph.input, graph.initializer) for item in group}
    waiting: list[Any] = list(graph.node)
    done: list[Any] = []
    while waiting:
        ready = [node for node in waiting if there.issuperset(node.input)]
        if not ready:
            return  # inner graphs see outer names: as the exporter left it
        for node in ready:
            there.update(node.output)
        done += ready
        taken = {id(node) for node in ready}
        waiting = [node for node in waiting if id(node) not in taken]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in done]
    del graph.node[:]
    graph.node.extend(copies)


def _short_names(graph: onnx.GraphProto) -> dict[str, str]:
    """A new name for everything but the graph's own inputs and outputs; none if there are inner graphs."""
    if any(a.type in (a.GRAPH, a.GRAPHS) for node in graph.node for a in node.attribute):
        return {}
    fixed = {item.name for group in (graph.input, graph.output) for item in group} | {""}
    names = dict.fromkeys(
        [item.name for item in graph.initializer] + [name for node in graph.node for name in node.output]
    )
    return {name: f"v{i:x}" for i, name in enumerate(name for name in names if name not in fixed)}


def interface(model: onnx.ModelProto) -> tuple[TensorSpec, TensorSpec]:
    """What goes in and what comes out.

    Raises:
        TaskError: there is not exactly one of each, or of a type that devices do not serve.
    """
    if len(model.graph.input) != 1 or len(model.graph.output) != 1:
        raise TaskError(
            f"The graph has {len(model.graph.input)} inputs and {len(model.graph.output)} outputs; one of "
            "each is served."
        )
    return _spec(model.graph.input[0]), _spec(model.graph.output[0])


def _spec(value: Any) -> TensorSpec:  # noqa: ANN401 - onnx is untyped
    tensor = value.type.tensor_type
    if tensor.elem_type not in _TYPES:
        raise TaskError(f"{value.name} has the ONNX type {tensor.elem_type}; float32 and int64 are served.")
    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return TensorSpec.model_validate({"name": value.name, "dtype": _TYPES[tensor.elem_type], "shape": shape})


def operators(model: onnx.ModelProto) -> frozenset[str]:
    """The operator types in the graph."""
    return frozenset(node.op_type for node in model.graph.node)


def opset(model: onnx.ModelProto) -> int:
    """The version of the standard operators."""
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


# --- cost -------------------------------------------------------------------------------------------------


def multiply_adds(model: onnx.ModelProto) -> int:
    """Multiply-adds of one row in the layers that count: convolutions, matrix products, recurrent cells."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in (*copy.graph.input, *copy.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    shapes = {item.name: tuple(item.dims) for item in inferred.graph.initializer}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    return sum(_macs(node, shapes) for node in inferred.graph.node)


def _macs(node: Any, shapes: dict[str, tuple[int, ...]]) -> int:  # noqa: ANN401 - onnx is untyped
    def shape(names: Iterable[str], index: int) -> tuple[int, ...]:
        listed = list(names)
        return tuple(max(1, n) for n in shapes.get(listed[index], ())) if index < len(listed) else ()

    if node.op_type in ("Conv", "ConvTranspose"):
        return prod(shape(node.output, 0)) * prod(shape(node.input, 1)[1:])
    if node.op_type == "MatMul":
        right = shape(node.input, 1)  # (..., K, outputs), often a constant, so of known shape
        return prod(shape(node.output, 0)) * (
            right[-2] if len(right) > 1 else (shape(node.input, 0) or (1,))[-1]
        )
    if node.op_type == "Gemm":
        return prod(shape(node.input, 1)) * (shape(node.output, 0) or (1,))[0]
    if node.op_type in ("GRU", "LSTM", "RNN"):  # W, R: (directions, gates * hidden, ...); X: (T, N, inputs)
        steps = (shape(node.input, 0) or (1,))[0]
        return steps * (prod(shape(node.input, 1)) + prod(shape(node.input, 2)))
    return 0


def energy_uj(macs: int, weight_bytes: int, bits: int) -> float:
    """An estimate of one row's energy in uJ: arithmetic, and every weight read once; see ENERGY_MODEL."""
    return (macs * _MAC_PJ[bits] + weight_bytes * _BYTE_PJ) * 1e-6


def compare(model: onnx.ModelProto, module: nn.Module, rows: Array) -> float:
    """The largest difference of a float graph from its torch model on real rows.

    Raises:
        TaskError: they do not compute the same.
    """
    import onnxruntime

    with torch.inference_mode():
        wanted = module(torch.from_numpy(rows)).numpy()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    got = session.run([OUTPUT], {INPUT: rows})[0]
    if got.shape != wanted.shape:
        raise TaskError(f"The exported graph answers {got.shape}, the model {wanted.shape}.")
    error = float(np.abs(got - wanted).max())
    bound = 1e-4 * (1.0 + float(np.abs(wanted).max()))
    if not error <= bound:  # NaN, too
        raise TaskError(
            f"The exported graph differs from the model by {error:g}, at most {bound:g} is allowed."
        )
    return error
