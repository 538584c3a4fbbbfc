"""Model state as one flat float32 vector, and back.

A ``Layout`` says which named tensors stand where. Only floating-point tensors are part of it: integer
buffers (step counters and the like) are state of one device and are never averaged.

    layout = Layout.of({"weight": weight, "bias": bias})
    flat = layout.flatten({"weight": weight, "bias": bias})  # (P,) float32
    named = layout.unflatten(flat)                           # views, no copy
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import Rejection, UpdateRejected

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Slot:
    """One tensor's place in the vector."""

    name: str
    shape: tuple[int, ...]
    start: int  # first coordinate
    stop: int  # one past the last


@dataclass(frozen=True)
class Layout:
    """Which tensors a flat vector holds, in order."""

    slots: tuple[Slot, ...]

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> "Layout":
        """The layout of tensors with these shapes, in the mapping's order."""
        slots, start = [], 0
        for name, shape in shapes.items():
            stop = start + prod(shape)
            slots.append(Slot(name, tuple(int(n) for n in shape), start, stop))
            start = stop
        return cls(tuple(slots))

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[np.generic]]) -> "Layout":
        """The layout of the floating-point arrays among ``tensors``, in the mapping's order."""
        return cls.of_shapes({k: a.shape for k, a in tensors.items() if np.issubdtype(a.dtype, np.floating)})

    @property
    def size(self) -> int:
        """Number of coordinates P."""
        return self.slots[-1].stop if self.slots else 0

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of names and shapes: equal exactly when two vectors can be added."""
        described = json.dumps([[s.name, list(s.shape)] for s in self.slots], separators=(",", ":"))
        return hashlib.sha256(described.encode()).hexdigest()

    def flatten(self, tensors: Mapping[str, NDArray[np.generic]]) -> Vector:
        """Copy the named arrays into one new (P,) float32 vector.

        Raises:
            KeyError: a tensor of the layout is missing.
            ValueError: a tensor has another shape than the layout says.
        """
        flat = np.empty(self.size, np.float32)
        for slot in self.slots:
            array = tensors[slot.name]
            if array.shape != slot.shape:
                raise ValueError(f"Expected shape {slot.shape} for {slot.name!r}, got {array.shape}.")
            flat[slot.start : slot.stop] = array.reshape(-1)
        return flat

    def unflatten(self, flat: Vector) -> dict[str, Vector]:
        """Views into ``flat``, one per tensor; writing to them writes to ``flat``."""
        if flat.shape != (self.size,):
            raise ValueError(f"Expected a vector of shape ({self.size},), got {flat.shape}.")
        return {s.name: flat[s.start : s.stop].reshape(s.shape) for s in self.slots}


def vector_digest(flat: Vector) -> str:
    """SHA-256 (hex) of the little-endian float32 bytes: the name of a model."""
    return hashlib.sha256(np.ascontiguousarray(flat, dtype="<f4").data).hexdigest()


# --- the integer grid -------------------------------------------------------------------------------

GRID_LIMIT = 2**31 - 1  # the largest magnitude that fits the int32 on the wire


def to_grid(delta: Vector, step: float) -> NDArray[np.int32]:
    """Express an update in whole grid steps, truncating toward zero (never raises the norm).

    Integers make the sum of a round exact, so it does not depend on the order of arrival, and are
    what secure aggregation and discrete noise need: one pipeline for all.

    Args:
        delta: (P,) float32.
        step: the size of one grid step, a power of two.

    Raises:
        UpdateRejected: a coordinate is not finite, or exceeds ``step * (2**31 - 1)``.
    """
    scaled = delta.astype(np.float64)
    scaled /= step
    peak = float(np.abs(scaled).max(initial=0.0))  # NaN and infinity survive into the maximum
    if not np.isfinite(peak):
        where = int(np.flatnonzero(~np.isfinite(delta))[0])
        raise UpdateRejected(
            Rejection.NON_FINITE,
            f"Coordinate {where} of the update is {delta[where]}, not a finite number.",
            hint="Training diverged; lower the learning rate or look at the data of this device.",
        )
    if peak > GRID_LIMIT:
        raise UpdateRejected(
            Rejection.OUT_OF_RANGE,
            f"The largest coordinate of the update is {peak * step:g}, the bound is {GRID_LIMIT * step:g}.",
            hint="Training diverged, or the run's grid_step is too small for this task.",
        )
    return np.trunc(scaled, out=scaled).astype(np.int32)
