"""What one device contributes to a private sum: its update within the clip, and a tail of further numbers.

    whole = contributions(part, deltas, step, clip_norm, examples, losses)     # (K, P + E) int32
    check_tail(part, update[P:])                                               # at the coordinator

A device with few examples scales its update before the clip, never beyond it, so that the clip stays the
sensitivity. The tail holds whole numbers of bounded height: whether the norm is within the clip, for adaptive
clipping (Andrew et al. 2021), and training figures; ``PrivatePart`` says which. It is clipped, masked, noised
and charged with the update, as further coordinates of the same vector.
"""

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.plan import PrivatePart
from lepton_fl.vector import Encoded, Vector, encode

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


def contributions(
    part: PrivatePart | None, deltas: Vector, step: float, clip_norm: float, examples: Counts, losses: Floats
) -> Encoded:
    """Updates with their tails, on the grid; see ``vector.encode``.

    Args:
        part: of the plan; None = updates without a tail.
        deltas: (K, P) float32.
        step: of the grid.
        clip_norm: the bound of an update without its tail.
        examples: (K,) of each device.
        losses: (K,) mean training loss of each device.
    """
    if part is None:
        return encode(deltas, step, clip_norm)
    size = deltas.shape[1]
    updates = np.empty((len(deltas), size + part.tail), np.int32)
    found = encode(deltas, step, clip_norm, shrink=shrink(part, examples), out=updates[:, :size])
    updates[:, size:] = tails(part, clip_norm, found.norms, examples, losses)
    updates[list(found.refused), size:] = 0
    return Encoded(updates, found.norms, found.refused)


def shrink(part: PrivatePart | None, examples: Counts) -> Floats | None:
    """(K,) what devices with so many examples multiply their updates by, of (0, 1]; None = nothing."""
    if part is None or not part.weight_cap:
        return None
    factors: Floats = np.minimum(examples, part.weight_cap) / part.weight_cap
    return factors


def tails(
    part: PrivatePart, clip_norm: float, norms: Floats, examples: Counts, losses: Floats
) -> NDArray[np.int32]:
    """(K, E) the further coordinates of K devices, grid steps.

    Args:
        part: of the plan.
        clip_norm: of the attempt.
        norms: (K,) before clipping; of those who are refused, anything.
        examples: (K,) of each device.
        losses: (K,) mean training loss; what is not a number counts as the most.
    """
    columns: list[Floats] = []
    if part.bit:
        columns.append(np.where(norms <= clip_norm, part.bit, -part.bit).astype(np.float64))
    if part.metrics:
        seen = np.minimum(examples, part.most_examples) / part.most_examples
        loss = np.clip(np.nan_to_num(losses, nan=np.inf), 0.0, part.most_loss) / part.most_loss
        columns += [np.floor(part.metrics * seen), np.floor(part.metrics * seen * loss)]
    return np.stack(columns, axis=1).astype(np.int32) if columns else np.empty((len(norms), 0), np.int32)


def check_tail(part: PrivatePart, tail: NDArray[np.int32]) -> None:
    """Refuse a tail that no device makes which keeps the rules.

    Raises:
        UpdateRejected: OUT_OF_RANGE.
    """
    values, good = tail.tolist(), True
    if part.bit:
        good = values.pop(0) in (part.bit, -part.bit)
    if not (good and all(0 <= value <= part.metrics for value in values)):
        raise UpdateRejected(
            Rejection.OUT_OF_RANGE,
            "What follows the update is outside the heights of the plan.",
            hint="Install the version of lepton-fl on the device that the coordinator has.",
        )


def mean_losses(loss_sums: Floats, seen: Counts) -> Floats:
    """(K,) mean losses of devices; NaN where nothing was seen."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(seen > 0, loss_sums / seen, np.nan)
