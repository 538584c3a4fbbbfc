"""What the batched engines share: a chunk of devices, and its rows and vectors side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lepton_fl.tasks.data import Dataset
from lepton_fl.vector import Vector
from lepton_simulations.engines.contract import ClientWork
from lepton_simulations.engines.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Chunk:
    """Devices that are trained side by side."""

    clients: Sequence[ClientWork]
    plans: Sequence[Schedule]  # the longest first
    at: Sequence[int]  # their rows in the results


class Halted(Exception):
    """Training was told to stop after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps


def flat_rows(data: Dataset, dtype: torch.dtype) -> Tensor:
    """Inputs (N, F) of this type, in their own memory where they have it."""
    x = torch.from_numpy(np.require(data.x, requirements=["C", "W"]))
    return x.view(x.shape[0], -1).to(dtype)


def vectors(common: Tensor, clients: Sequence[ClientWork]) -> tuple[Tensor, Tensor | None]:
    """Starting points (1, P) or (k, P), and corrections (k, P) where there are any."""
    starts, corrections = common, None
    if any(client.start is not None for client in clients):
        starts = torch.cat([common if c.start is None else _row(c.start, common) for c in clients])
    if any(client.correction is not None for client in clients):
        zero = torch.zeros_like(common)
        corrections = torch.cat(
            [zero if c.correction is None else _row(c.correction, common) for c in clients]
        )
    return starts, corrections


def _row(vector: Vector, like: Tensor) -> Tensor:
    return torch.from_numpy(np.require(vector, requirements=["C", "W"])).to(like.dtype)[None]


def targets(chunk: Chunk, low: int, high: int, dtype: torch.dtype, devices: int = 0) -> tuple[Tensor, Tensor]:
    """What the steps from ``low`` to ``high`` are held against.

    Returns:
        Targets (T, K, B, ...), and weights (T, K, B): 1 / size for rows that count, zero for padding and for
        devices that make no such step.
    """
    y, (steps, width) = chunk.clients[0].data.y, (high - low, chunk.plans[0].width)
    count = devices or len(chunk.clients)
    found, weights = np.zeros((count, steps, width, *y.shape[1:]), y.dtype), np.zeros((count, steps, width))
    for client, plan, ours, own in zip(chunk.clients, chunk.plans, found, weights, strict=False):
        made = max(0, min(high, plan.steps) - low)
        ours[:made] = client.data.y[plan.rows[low : low + made]]
        own[:made] = plan.shape.weights[low : low + made]
    tensor = torch.from_numpy(found.swapaxes(0, 1))
    if tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor, torch.from_numpy(weights.swapaxes(0, 1)).to(dtype)
