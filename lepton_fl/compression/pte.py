"""A second way out: an ExecuTorch program for XNNPACK beside the ONNX graph, with ``lepton-fl[executorch]``.

For devices whose own application embeds ExecuTorch; `lepton client` serves the ONNX graph. A program takes
one row at a time. ``measure`` runs it. Importing this module imports torch.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from lepton_fl.compression.recipe import QuantiseSpec
from lepton_fl.errors import ConfigError, TaskError
from lepton_fl.tasks.data import Array


def refuse_missing() -> None:
    """ConfigError where ExecuTorch is not installed."""
    if find_spec("executorch") is None:
        raise ConfigError(
            "The recipe asks for an ExecuTorch program, and ExecuTorch is not installed.",
            hint="Install 'lepton-fl[executorch]', or set executorch = false.",
        )


def lower(module: nn.Module, spec: QuantiseSpec | None, calibration: Array) -> bytes:
    """The program of a model.

    Args:
        module: in evaluation mode, on the CPU.
        spec: None = float32; static = 8 bits by XNNPACK's quantiser, per channel.
        calibration: (n, ...) prepared rows: the shape of one, and static ranges.

    Raises:
        TaskError: the model cannot be exported, quantised or lowered.
    """
    try:
        with _quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            # numpy may give an axis of length one the stride 0, which ExecuTorch refuses
            example = (torch.from_numpy(calibration[:1]).clone(memory_format=torch.contiguous_format),)
            exported = torch.export.export(module, example)
            if spec is not None:
                rounded = _quantised(exported.module(), calibration[: spec.calibration_rows])
                exported = torch.export.export(rounded, example)
            lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            return bytes(lowered.to_executorch().buffer)
    except Exception as error:  # the tools raise whatever they met in a model they do not know
        raise TaskError(f"ExecuTorch cannot take this model: {type(error).__name__}: {error}") from error


def _quantised(module: Any, rows: Array) -> nn.Module:  # noqa: ANN401 - a graph module, untyped
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    rule = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    observed = prepare_pt2e(module, rule)
    with torch.no_grad():
        for row in rows:
            observed(torch.from_numpy(row[None]))
    made: nn.Module = convert_pt2e(observed)
    return made


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The tools warn of their own deprecations, and print."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
