"""Model state as one flat float32 vector, and back.

A ``Layout`` says which named tensors stand where. Only floating-point tensors are part of it: integer
buffers (step counters and the like) are state of one device and are never averaged.

    layout = Layout.of({"weight": weight, "bias": bias})
    flat = layout.flatten({"weight": weight, "bias": bias})  # (P,) float32
    named = layout.unflatten(flat)                           # views, no copy
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cached_property
from math import isqrt, prod

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError, Rejection, UpdateRejected

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
    fixed: int = 0  # coordinates at the end that never move: frozen parameters

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]], fixed: int = 0) -> "Layout":
        """The layout of tensors with these shapes, in the mapping's order, the ``fixed`` ones last."""
        slots, start = [], 0
        for name, shape in shapes.items():
            stop = start + prod(shape)
            slots.append(Slot(name, tuple(int(n) for n in shape), start, stop))
            start = stop
        return cls(tuple(slots), fixed)

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[np.generic]]) -> "Layout":
        """The layout of the floating-point arrays among ``tensors``, in the mapping's order."""
        return cls.of_shapes({k: a.shape for k, a in tensors.items() if np.issubdtype(a.dtype, np.floating)})

    @property
    def size(self) -> int:
        """Number of coordinates P."""
        return self.slots[-1].stop if self.slots else 0

    @property
    def moving(self) -> int:
        """Number of coordinates, the first ones, that training may change: those of an update."""
        return self.size - self.fixed

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of names and shapes: equal exactly when two vectors can be added."""
        slots: list[object] = [[s.name, list(s.shape)] for s in self.slots]
        described = json.dumps([*slots, self.fixed] if self.fixed else slots, separators=(",", ":"))
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

    def select(self, patterns: Sequence[str]) -> NDArray[np.bool_]:
        """Which coordinates belong to tensors whose names match one of the patterns: (P,) bool.

        Patterns are those of a shell: ``head.*``, ``*.bias``, ``layer[12].weight``.

        Raises:
            ConfigError: a pattern matches no tensor, or together they match all.
        """
        chosen = np.zeros(self.size, bool)
        for pattern in patterns:
            slots = [slot for slot in self.slots if fnmatchcase(slot.name, pattern)]
            if not slots:
                known = ", ".join(slot.name for slot in self.slots[:20])
                raise ConfigError(
                    f"The pattern {pattern!r} matches no tensor of the model.",
                    hint=f"Its tensors are {known}{', ...' if len(self.slots) > 20 else ''}.",
                )
            for slot in slots:
                chosen[slot.start : slot.stop] = True
        if self.size and chosen.all():
            raise ConfigError(
                f"The patterns {', '.join(map(repr, patterns))} match every tensor of the model.",
                hint="Something must be left to train together.",
            )
        return chosen


def vector_digest(flat: Vector) -> str:
    """SHA-256 (hex) of the little-endian float32 bytes: the name of a model."""
    return hashlib.sha256(np.ascontiguousarray(flat, dtype="<f4").data).hexdigest()


# --- the integer grid -------------------------------------------------------------------------------

GRID_LIMIT = 2**31 - 1  # the largest magnitude that fits the int32 on the wire
EXACT = 2**53  # integers up to here are exact in float64
SLACK = 2.0**-22  # taken off a clipping factor: more than float32 rounds up in a product
PIECE = 4096  # coordinates handled in one go; part of what a norm is, to the last bit


@dataclass(frozen=True)
class Scaling:
    """By what each of K updates is multiplied to become whole numbers."""

    factors: NDArray[np.float32]  # (K,); 0 where the row is refused
    norms: NDArray[np.float64]  # (K,) L2 norms, shrunk, before clipping; NaN where no bound was asked for
    refused: Mapping[int, UpdateRejected] = field(default_factory=dict)  # row -> why


@dataclass(frozen=True)
class Encoded:
    """Updates as integers; a row that is refused is zero."""

    updates: NDArray[np.int32]  # (K, P), grid steps
    norms: NDArray[np.float64]  # as in ``Scaling``
    refused: Mapping[int, UpdateRejected] = field(default_factory=dict)


def encode(
    deltas: Vector,
    step: float,
    clip_norm: float = 0.0,
    *,
    shrink: NDArray[np.float64] | None = None,
    out: NDArray[np.int32] | None = None,
) -> Encoded:
    """Express updates in whole grid steps: one pipeline for plain, secure and private aggregation.

    Each row: refuse what is not finite, take one float64 L2 norm over all tensors, scale to ``clip_norm``
    where it is longer, truncate toward zero (which never raises the norm). A row's integers do not depend
    on the other rows. Integers make the sum of a round exact, so it does not depend on the order of
    arrival, and are what masks and discrete noise need.

    Args:
        deltas: (K, P) float32.
        step: the size of one grid step, a power of two.
        clip_norm: the bound; 0 = no clipping.
        shrink: (K,) of (0, 1], by what each row is multiplied before it is clipped; None = 1.
        out: (K, P) int32 to write into; None = a new array.
    """
    updates = np.empty(deltas.shape, np.int32) if out is None else out
    found = scaling(deltas, step, clip_norm, shrink)
    for part, whole in whole_numbers(deltas, found):
        np.copyto(updates[:, part], whole, casting="unsafe")
    if clip_norm:
        for update in updates:
            check_norm(update, step, clip_norm)
    return Encoded(updates, found.norms, found.refused)


def scaling(
    deltas: Vector, step: float, clip_norm: float = 0.0, shrink: NDArray[np.float64] | None = None
) -> Scaling:
    """Look at K updates before they are encoded; see ``encode`` for the arguments."""
    norms = _norms(deltas) if clip_norm else np.full(len(deltas), np.nan)
    if clip_norm and clip_norm / step <= GRID_LIMIT:
        peaks = np.zeros(len(deltas), np.float32)  # whatever is within the bound is within the grid
    else:
        peaks = np.maximum(deltas.max(axis=1, initial=0.0), -deltas.min(axis=1, initial=0.0))  # NaN survives
    return scaling_of(deltas, norms, peaks, step, clip_norm, shrink)


def scaling_of(
    deltas: Vector,
    whole: NDArray[np.float64],
    peaks: Vector,
    step: float,
    clip_norm: float = 0.0,
    shrink: NDArray[np.float64] | None = None,
) -> Scaling:
    """As ``scaling``, of updates whose norms and peaks are known.

    Args:
        deltas: (K, P) float32; looked at only where one is refused.
        whole: (K,) L2 norms as ``scaling`` finds them; NaN where there is no bound.
        peaks: (K,) the largest magnitudes, NaN if one is; may be 0 where the bound is within the grid.
        step: the size of one grid step.
        clip_norm: the bound; 0 = no clipping.
        shrink: as in ``encode``.
    """
    bound = clip_norm / step
    norms = whole if shrink is None else whole * shrink
    factors = np.full(len(deltas), 1 / step)  # a power of two: exact in float32, short of overflow
    if shrink is not None:
        factors *= shrink
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        longer = np.isfinite(norms) & (norms > clip_norm * (1 - SLACK))
        factors[longer] = bound * (1 - SLACK) / whole[longer]
        rounded = factors.astype(np.float32)
        above = rounded > factors
        rounded[above] = np.nextafter(rounded[above], np.float32(0))
        fits = peaks.astype(np.float64) * rounded <= GRID_LIMIT
    if clip_norm:
        fits &= np.isfinite(norms)
    wrong = np.flatnonzero(~fits)
    rounded[wrong] = 0
    refused = {int(row): refusal(deltas[row], step) for row in wrong}
    return Scaling(rounded, norms, refused)


def unclipped(deltas: Vector, step: float) -> Scaling:
    """Of K updates that nobody has looked at yet, without a bound: whoever adds them must look."""
    count = len(deltas)
    return Scaling(np.full(count, 1 / step, np.float32), np.full(count, np.nan))


def whole_numbers(deltas: Vector, found: Scaling) -> Iterator[tuple[slice, Vector]]:
    """The encoded updates piece by piece: coordinates, and their (K, n) float32 values, all of them whole.

    A piece is a buffer that the next one overwrites.
    """
    count, size = deltas.shape
    width = PIECE * max(1, 16 // max(1, count))
    buffer = np.empty((count, min(width, size)), np.float32)
    factors, refused = found.factors[:, None], list(found.refused)
    for start in range(0, size, width):
        part = slice(start, min(start + width, size))
        whole = buffer[:, : part.stop - start]
        with np.errstate(over="ignore", invalid="ignore"):  # in rows that are refused
            np.multiply(deltas[:, part], factors, out=whole)
        np.trunc(whole, out=whole)
        if refused:
            whole[refused] = 0
        yield part, whole


def to_grid(delta: Vector, step: float, clip_norm: float = 0.0) -> NDArray[np.int32]:
    """One update in whole grid steps, see ``encode``: (P,) float32 to (P,) int32.

    Raises:
        UpdateRejected: a coordinate is not finite, or exceeds ``step * (2**31 - 1)``.
    """
    updates = np.empty((1, len(delta)), np.int32)
    for refusal in encode(delta[None, :], step, clip_norm, out=updates).refused.values():
        raise refusal
    row: NDArray[np.int32] = updates[0]
    return row


def check_norm(update: NDArray[np.int32], step: float, clip_norm: float) -> None:
    """Refuse an update in grid steps that is longer than ``clip_norm``; exact, no rounding is forgiven.

    Raises:
        UpdateRejected: OUT_OF_RANGE.
    """
    bound = clip_norm / step  # exact: the step is a power of two
    _check_square(_square_norm(update, bound), bound, step)


def _check_square(square: int, bound: float, step: float) -> None:
    if square > Fraction(bound) ** 2:
        raise UpdateRejected(
            Rejection.OUT_OF_RANGE,
            f"The update's L2 norm is {isqrt(square) * step:.9g}, the bound is {bound * step:.9g}.",
            hint="The device did not clip; install the version of lepton-fl that the coordinator has.",
        )


def refusal(delta: Vector, step: float) -> UpdateRejected:
    """Why an update does not go onto the grid: not finite, or out of range."""
    wrong = np.flatnonzero(~np.isfinite(delta))
    if len(wrong):
        return UpdateRejected(
            Rejection.NON_FINITE,
            f"Coordinate {int(wrong[0])} of the update is {delta[wrong[0]]}, not a finite number.",
            hint="Training diverged; lower the learning rate or look at the data of this device.",
        )
    peak = float(np.abs(delta).max())
    return UpdateRejected(
        Rejection.OUT_OF_RANGE,
        f"The largest coordinate of the update is {peak:g}, the bound is {GRID_LIMIT * step:g}.",
        hint="Training diverged, or the run's grid_step is too small for this task.",
    )


def _norms(deltas: Vector) -> NDArray[np.float64]:
    """L2 norms of the rows in float64; no float32 is too large for it, and no row depends on the others.

    Squares of float32 are exact in float64. They are added in ``PIECE`` sums, coordinates in turn, and these
    by halves: an order that numpy and a vector processor follow alike, to the last bit.
    """
    count, size = deltas.shape
    lanes, squares = np.zeros((count, PIECE)), np.empty((count, PIECE))
    for start in range(0, size, PIECE):
        width = min(PIECE, size - start)
        piece = squares[:, :width]
        np.copyto(piece, deltas[:, start : start + width])
        piece *= piece
        lanes[:, :width] += piece
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    norms: NDArray[np.float64] = np.sqrt(lanes[:, 0])
    return norms


def _square_norm(update: NDArray[np.int32], bound: float) -> int:
    """The squared L2 norm: exact, or some number above ``bound**2`` where that is what it is."""
    if bound * bound < EXACT / 2:
        # Sums of squares below 2**53 are exact in float64; a sum that leaves that range is above the bound.
        total = 0.0
        for part in _blocks(len(update)):
            block = update[part].astype(np.float64)
            total += float(block @ block)
        return int(total)
    exact = 0
    for part in _blocks(len(update)):
        high, low = np.divmod(update[part].astype(np.int64), 1 << 16)  # squares and products fit 2**53
        exact += (int(high @ high) << 32) + (int(high @ low) << 17) + int(low @ low)
    return exact


def _blocks(size: int) -> list[slice]:
    """Pieces for which no linear algebra library starts threads."""
    return [slice(start, min(start + PIECE, size)) for start in range(0, size, PIECE)]
