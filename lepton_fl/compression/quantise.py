"""Fewer bits in an ONNX graph: integers that the runtime computes with, or weights only stored small.

Importing this module imports onnx.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lepton_fl.compression.graph import INPUT, tidy
from lepton_fl.compression.recipe import QuantiseSpec
from lepton_fl.errors import StateError, TaskError
from lepton_fl.tasks.data import Array

_SMALL: Final = 256  # numbers; a shorter constant stays as it is
_BLOCK: Final = 32  # weights that share one scale (matmul)
_FEW_BITS: Final = frozenset(
    (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT16)
)
_STORED: Final = frozenset({"Gemm", "MatMul", "Conv", "GRU", "LSTM", "Gather"})


def quantise(model: onnx.ModelProto, spec: QuantiseSpec, calibration: Array) -> onnx.ModelProto:
    """A quantised copy.

    Args:
        model: the float graph of ``graph.export``.
        spec: how.
        calibration: (n, ...) prepared rows, for static ranges.

    Raises:
        TaskError: there is nothing in this graph that could be quantised so, or the tool failed.
    """
    try:
        with _quiet():
            made = _convert(model, spec, calibration)
    except TaskError:
        raise
    except OSError as error:  # not the model's fault: the tool works with a temporary file
        raise StateError(
            f"Quantising needs a temporary file: {error}.", hint="Free some space, or set TMPDIR."
        ) from error
    except Exception as error:  # the runtime's tools raise whatever they met in a graph
        raise TaskError(f"Quantising ({spec.kind}) failed: {type(error).__name__}: {error}") from error
    if not any(item.data_type in _FEW_BITS for item in made.graph.initializer):
        raise TaskError(f"Quantising ({spec.kind}) changed nothing: this graph has no operator for it.")
    return tidy(made)


def _convert(model: onnx.ModelProto, spec: QuantiseSpec, calibration: Array) -> onnx.ModelProto:
    if spec.kind == "weights":
        return _stored(model, spec.bits)
    if spec.kind == "matmul":
        return _blocks(model, spec.bits)
    if spec.kind == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        half: onnx.ModelProto = convert_float_to_float16(_copy(model), keep_io_types=True)
        return half
    with TemporaryDirectory(prefix="lepton-quantise-") as folder:
        path = Path(folder) / "model.onnx"
        _integers(model, spec, calibration, path)
        return onnx.load(path)


def _integers(model: onnx.ModelProto, spec: QuantiseSpec, calibration: Array, path: Path) -> None:
    from onnxruntime import quantization

    only = list(spec.operators) or None
    if spec.kind == "dynamic":
        quantization.quantize_dynamic(_copy(model), path, op_types_to_quantize=only, per_channel=True)
        return
    quantization.quantize_static(
        _copy(model),
        path,
        _Reader(calibration[: spec.calibration_rows]),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=only,
        per_channel=True,
        calibrate_method=quantization.CalibrationMethod.MinMax,  # entropy fails outright on some models
    )


class _Reader:
    """Calibration rows, in batches, as the runtime's tool asks for them."""

    def __init__(self, rows: Array) -> None:
        self._batches = iter([rows[i : i + 64] for i in range(0, len(rows), 64)])

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}

    def __iter__(self) -> "_Reader":
        return self

    def __next__(self) -> dict[str, Array]:
        batch = self.get_next()
        if batch is None:
            raise StopIteration
        return batch


def _blocks(model: onnx.ModelProto, bits: int) -> onnx.ModelProto:
    """MatMulNBits, every 32 weights with a scale of their own."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    tool = MatMulNBitsQuantizer(_without_gemm(model), bits=bits, block_size=_BLOCK, is_symmetric=True)
    tool.process()
    found: onnx.ModelProto = tool.model.model
    return found


def _without_gemm(model: onnx.ModelProto) -> onnx.ModelProto:
    """Gemm(x, W, b) with constant W as MatMul and Add, which is what MatMulNBits can replace."""
    copy = _copy(model)
    graph = copy.graph
    constants = {item.name: item for item in graph.initializer}
    nodes = []
    for node in graph.node:
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = (
            given.get("alpha", 1.0) == 1.0 and given.get("beta", 1.0) == 1.0 and not given.get("transA", 0)
        )
        if node.op_type != "Gemm" or node.input[1] not in constants or not plain:
            nodes.append(node)
            continue
        weight = numpy_helper.to_array(constants[node.input[1]])
        weight = np.ascontiguousarray(weight.T) if given.get("transB", 0) else weight
        name, product = f"{node.input[1]}_t", f"{node.output[0]}_p"
        graph.initializer.append(numpy_helper.from_array(weight, name))
        has_bias = len(node.input) > 2
        nodes.append(
            helper.make_node("MatMul", [node.input[0], name], [product if has_bias else node.output[0]])
        )
        if has_bias:
            nodes.append(helper.make_node("Add", [product, node.input[2]], [node.output[0]]))
    _put(graph, nodes)
    return copy


def _stored(model: onnx.ModelProto, bits: int) -> onnx.ModelProto:
    """Large constants as integers with one scale per output channel, behind a DequantizeLinear."""
    copy = _copy(model)
    graph = copy.graph
    axes = _channel_axes(graph)
    nodes, constants = [], []
    for item in graph.initializer:
        array = numpy_helper.to_array(item) if item.data_type == TensorProto.FLOAT else None
        if array is None or array.size < _SMALL or item.name not in axes:
            constants.append(item)
            continue
        axis = axes[item.name] % array.ndim
        scale, whole = _rounded(array, axis, bits)
        small, scales = f"{item.name}_q", f"{item.name}_s"
        kind = TensorProto.INT8 if bits == 8 else TensorProto.INT4
        packed = whole.tobytes() if bits == 8 else _packed(whole)
        constants.append(helper.make_tensor(small, kind, array.shape, packed, raw=True))
        constants.append(numpy_helper.from_array(scale, scales))
        nodes.append(helper.make_node("DequantizeLinear", [small, scales], [item.name], axis=axis))
    if not nodes:
        raise TaskError(f"No constant of this graph has {_SMALL} numbers or more: nothing to store small.")
    del graph.initializer[:]
    graph.initializer.extend(constants)
    _put(graph, [*nodes, *graph.node])
    if bits == 4:  # opset 21 differs from 20 in that operators take 4-bit types
        _require_opset(copy, 21)
    return copy


def _require_opset(model: onnx.ModelProto, version: int) -> None:
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = max(entry.version, version)


def _channel_axes(graph: Any) -> dict[str, int]:  # noqa: ANN401 - onnx is untyped
    """Constant -> the axis along which each entry gets a scale of its own."""
    axes: dict[str, int] = {}
    for node in graph.node:
        if node.op_type not in _STORED:
            continue
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        last = node.op_type == "MatMul" or (node.op_type == "Gemm" and not transposed)
        recurrent = node.op_type in ("GRU", "LSTM")  # (directions, gates * hidden, inputs)
        inputs = (
            node.input[:1] if node.op_type == "Gather" else node.input[1:3] if recurrent else node.input[1:2]
        )
        axes |= dict.fromkeys(inputs, -1 if last else 1 if recurrent else 0)
    return axes


def _rounded(array: Array, axis: int, bits: int) -> tuple[Array, Array]:
    peak = 2 ** (bits - 1) - 1
    others = tuple(i for i in range(array.ndim) if i != axis)
    scale = (np.abs(array).max(axis=others) / peak).astype(np.float32)
    scale[scale == 0] = 1.0
    shape = [1] * array.ndim
    shape[axis] = -1
    whole = np.rint(array / scale.reshape(shape)).clip(-peak, peak).astype(np.int8)
    return scale, whole


def _packed(whole: Array) -> bytes:
    """Two 4-bit numbers a byte, the first in the low half."""
    flat = whole.ravel().astype(np.uint8) & 0x0F
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    return bytes((flat[::2] | flat[1::2] << 4).astype(np.uint8))


def _put(graph: Any, nodes: list[Any]) -> None:  # noqa: ANN401 - onnx is untyped
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    constants = [item for item in graph.initializer if item.name in used]
    del graph.initializer[:]
    graph.initializer.extend(constants)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The runtime's tools give advice through the root logger."""
    log = logging.getLogger()
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
