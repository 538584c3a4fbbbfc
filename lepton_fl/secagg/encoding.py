"""How an update becomes ring elements, with a proof that the sum cannot wrap around.

Both encodings carry the weighted update and, behind it, counters: non-negative integers (the weight, counts
of examples) whose sums are exact. A counter that is too large for one ring element is cut into digits.

``Exact`` (32 bits, the default): the update's integers on the grid times the weight, as they are. The sum
that comes out is, bit for bit, the int64 sum of the plain path. It exists only for plans for which

    cohort * max_weight * coordinate_bound <= 2**(bits - 1) - 1 - noise

holds; :func:`fit` finds the finest grid that does, and refuses with the numbers when none is wanted.

``Rotated`` (fewer bits: 16 are half the upload): clip the norm, rotate at random, scale, saturate, round to
integers at random without ever exceeding the clip norm. Saturation, not luck, keeps the sum within the ring:
one device's coordinate is at most ``limit``, and ``cohort * limit`` fits. What saturation costs is accuracy
in coordinates beyond ``spread`` standard deviations of a flat vector; it never raises the norm.

``Quantised`` (``secagg.quantised``, 6 or 7 bits) is for a ring that just holds what a sum is expected to be.

The ring of a coordinate is that of the integers modulo ``2**bits``, any number of bits. Sums are made in
lanes of 16 or 32 bits; the counters take whole lanes, also on the wire (``to_wire``).

Noise for differential privacy is added by the caller's mechanism as integers; ``noise`` is the part of the
ring that the plan sets aside for the sum of all noise.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import floor, frexp, isfinite, log2, sqrt
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError, Rejection, UpdateRejected
from lepton_fl.packing import lane_bits, pack, packed_size, signed, unpack
from lepton_fl.secagg.field import Random
from lepton_fl.secagg.masks import Ring, ring_type
from lepton_fl.secagg.rotation import rotate, rotation_width, unrotate

WEIGHT = "weight"  # the counter that every encoding has
_MAX_COUNTERS = 64
_BLOCK = 1 << 16  # coordinates handled at a time
_ROUNDING_TRIALS = 20


@dataclass(frozen=True)
class Counter:
    """A sum that travels with the update: every device adds an integer of [0, bound]."""

    name: str
    bound: int

    def __post_init__(self) -> None:
        if not self.name or not 1 <= self.bound < 2**62:
            raise ConfigError(f"Expected a named counter with a bound of 1 to 2**62, got {self}.")


class Encoding(Protocol):
    """What a round needs to know of an encoding."""

    @property
    def bits(self) -> int:
        """Of a coordinate, on the wire and in the ring."""
        ...

    @property
    def num_coordinates(self) -> int:
        """The first elements of a vector; the others are counters, whole lanes."""
        ...

    @property
    def length(self) -> int:
        """Elements of one vector."""
        ...

    @property
    def digest(self) -> bytes:
        """SHA-256 of all parameters."""
        ...

    @property
    def survivors(self) -> int:
        """The sum of fewer devices is not to be learnt, whatever the rules allow; 0 = as these say."""
        ...


@dataclass(frozen=True)
class Sum:
    """What the coordinator learns: exact integers."""

    update: NDArray[np.signedinteger[Any]]  # (P,), in grid steps (Exact) or scaled and rotated (Rotated)
    counters: Mapping[str, int]

    @property
    def weight(self) -> int:
        """The sum of the weights."""
        return self.counters[WEIGHT]


# --- on the wire ------------------------------------------------------------------------------------


def wire_bytes(encoding: Encoding) -> int:
    """Bytes of one vector on the wire."""
    lane = ring_type(encoding.bits).itemsize
    counters = encoding.length - encoding.num_coordinates
    return packed_size(encoding.num_coordinates, encoding.bits) + counters * lane


def to_wire(encoding: Encoding, vector: Ring) -> NDArray[np.uint8]:
    """A vector as it travels, (``wire_bytes``,): coordinates packed, counters as they are."""
    if encoding.bits == 8 * vector.itemsize:
        return vector.view(np.uint8)
    head, counters = np.split(vector, [encoding.num_coordinates])
    return np.concatenate([pack(head, encoding.bits), counters.view(np.uint8)])


def from_wire(encoding: Encoding, data: NDArray[np.uint8]) -> Ring:
    """The reverse of ``to_wire``.

    Raises:
        ValueError: there are more or fewer bytes.
    """
    dtype = ring_type(encoding.bits)
    if len(data) != wire_bytes(encoding):
        raise ValueError(f"Expected {wire_bytes(encoding)} bytes, got {len(data)}.")
    head, counters = np.split(data, [packed_size(encoding.num_coordinates, encoding.bits)])
    lanes = unpack(head, encoding.num_coordinates, encoding.bits, 8 * dtype.itemsize)
    return np.concatenate([lanes, np.ascontiguousarray(counters).view(dtype)])


# --- counters ---------------------------------------------------------------------------------------


def _digit_bits(cohort: int, bits: int) -> int:
    """Bits of one counter digit: ``cohort`` of them must add up within an unsigned lane."""
    lane = lane_bits(bits)
    return lane - (cohort - 1).bit_length() if cohort > 1 else lane


def _digits(counter: Counter, cohort: int, bits: int) -> int:
    return -(-counter.bound.bit_length() // _digit_bits(cohort, bits))


def write_counters(
    counters: tuple[Counter, ...], values: Mapping[str, int], cohort: int, bits: int
) -> list[int]:
    """The elements that carry these values, UpdateRejected if one is out of its bounds."""
    if set(values) != {c.name for c in counters}:
        raise ConfigError(f"Expected counters {sorted(c.name for c in counters)}, got {sorted(values)}.")
    width, out = _digit_bits(cohort, bits), []
    for counter in counters:
        value = values[counter.name]
        if not 0 <= value <= counter.bound:
            raise UpdateRejected(
                Rejection.OUT_OF_RANGE, f"{counter.name} is {value}, the plan says 0 to {counter.bound}."
            )
        out += [value >> width * i & ((1 << width) - 1) for i in range(_digits(counter, cohort, bits))]
    return out


def read_counters(counters: tuple[Counter, ...], elements: Ring, cohort: int, bits: int) -> dict[str, int]:
    """The sums that the first elements of a sum carry."""
    width, at, out = _digit_bits(cohort, bits), 0, {}
    for counter in counters:
        digits = _digits(counter, cohort, bits)
        out[counter.name] = sum(int(elements[at + i]) << width * i for i in range(digits))
        at += digits
    return out


def vector_length(coordinates: int, counters: tuple[Counter, ...], cohort: int, bits: int) -> int:
    """Elements of a vector of coordinates and counters."""
    return coordinates + sum(_digits(c, cohort, bits) for c in counters)


def digest_of(kind: str, encoding: Any) -> bytes:  # noqa: ANN401 - one of the records that are encodings
    """SHA-256 of an encoding's parameters."""
    body = asdict(encoding)
    if not body["survivors"]:
        del body["survivors"]
    text = json.dumps([kind, body], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(b"flsa/1 encoding\0" + text.encode()).digest()


def check_common(coordinates: int, cohort: int, counters: tuple[Counter, ...], noise: int) -> None:
    """Refuse parameters that no encoding can have, with a ConfigError."""
    if coordinates < 1 or cohort < 1 or noise < 0:
        raise ConfigError(
            f"Expected coordinates >= 1, cohort >= 1 and noise >= 0, got {coordinates}, {cohort}, {noise}."
        )
    names = [c.name for c in counters]
    if len(set(names)) != len(names) or WEIGHT not in names or len(names) > _MAX_COUNTERS:
        raise ConfigError(
            f"Expected at most {_MAX_COUNTERS} distinct counters with {WEIGHT!r} among them, got {names}."
        )


def check_update(update: NDArray[np.int32], coordinates: int) -> None:
    """Refuse an update that is not one of so many coordinates on the grid, with an UpdateRejected."""
    if update.shape != (coordinates,) or update.dtype != np.int32:
        raise UpdateRejected(
            Rejection.WRONG_SHAPE,
            f"Expected an update of shape ({coordinates},) and type int32, "
            f"got {update.shape} {update.dtype}.",
        )


def _add_signed(vector: Ring, noise: NDArray[np.int64] | None) -> None:
    """Add integers modulo the ring."""
    if noise is None:
        return
    if noise.shape != vector.shape:
        raise ConfigError(f"Expected noise of shape {vector.shape}, got {noise.shape}.")
    vector += noise.astype(vector.dtype)  # two's complement: reduces modulo the ring


# --- exact ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """Weighted integers as they are.

    Attributes:
        num_coordinates: P.
        cohort: The most devices that may be added.
        max_weight: The largest weight of one device.
        coordinate_bound: The largest magnitude of one coordinate, in grid steps.
        counters: Sums that travel with the update; one is the weight.
        noise: Ring elements set aside for noise.
        bits: 32; fewer are possible where they fit.
        survivors: The noise is made for at least so many devices; 0 = there is none.
    """

    num_coordinates: int
    cohort: int
    max_weight: int
    coordinate_bound: int
    counters: tuple[Counter, ...] = ()
    noise: int = 0
    bits: int = 32
    survivors: int = 0

    def __post_init__(self) -> None:
        if WEIGHT not in {c.name for c in self.counters}:
            object.__setattr__(self, "counters", (Counter(WEIGHT, self.max_weight), *self.counters))
        ring_type(self.bits)
        check_common(self.num_coordinates, self.cohort, self.counters, self.noise)
        if self.max_weight < 1 or self.coordinate_bound < 1:
            raise ConfigError(
                f"Expected max_weight >= 1 and coordinate_bound >= 1, got {self.max_weight} "
                f"and {self.coordinate_bound}."
            )
        room = 2 ** (self.bits - 1) - 1 - self.noise
        largest = self.cohort * self.max_weight * self.coordinate_bound
        if largest > room:
            raise ConfigError(
                f"A sum of up to {self.cohort} devices * weight {self.max_weight} * coordinate "
                f"{self.coordinate_bound} = {largest} does not fit the ring of {self.bits} bits ({room}).",
                hint=f"Bound coordinates by {max(0, room // (self.cohort * self.max_weight))} grid steps (a "
                "coarser grid or a smaller clip), or lower max_weight or the cohort.",
            )

    @property
    def length(self) -> int:
        """Ring elements of one vector."""
        return vector_length(self.num_coordinates, self.counters, self.cohort, self.bits)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all parameters."""
        return digest_of("exact", self)

    def encode(
        self,
        update: NDArray[np.int32],
        weight: int,
        counters: Mapping[str, int] | None = None,
        noise: NDArray[np.int64] | None = None,
    ) -> Ring:
        """One device's vector.

        Args:
            update: (P,), grid steps, within the bound (see :func:`limit_update`).
            weight: 1 to ``max_weight``.
            counters: The other counters' values.
            noise: (length,) integers to add, from a privacy mechanism.

        Raises:
            UpdateRejected: WRONG_SHAPE, or OUT_OF_RANGE: a value is outside the bounds of the plan.
        """
        check_update(update, self.num_coordinates)
        if not 1 <= weight <= self.max_weight:
            raise UpdateRejected(
                Rejection.OUT_OF_RANGE, f"The weight is {weight}, the plan says 1 to {self.max_weight}."
            )
        peak = largest_magnitude(update)
        if peak > self.coordinate_bound:
            raise UpdateRejected(
                Rejection.OUT_OF_RANGE,
                f"The largest coordinate is {peak} grid steps, the plan says {self.coordinate_bound}.",
                hint="Clip the update first: limit_update, or the run's clip norm.",
            )
        values = {WEIGHT: weight} | dict(counters or {})
        vector = np.empty(self.length, ring_type(self.bits))
        factor = vector.dtype.type(weight)
        np.multiply(update.astype(vector.dtype), factor, out=vector[: len(update)])
        vector[len(update) :] = write_counters(self.counters, values, self.cohort, self.bits)
        _add_signed(vector, noise)
        return vector

    def decode(self, total: Ring) -> Sum:
        """The exact sums; the update is a view of ``total`` for a ring of 32 bits."""
        update = signed(total[: self.num_coordinates], self.bits)
        counters = read_counters(self.counters, total[self.num_coordinates :], self.cohort, self.bits)
        return Sum(update.astype(np.int32, copy=False), counters)


def fit(
    num_coordinates: int,
    cohort: int,
    max_weight: int,
    largest: float,
    counters: tuple[Counter, ...] = (),
    noise: int = 0,
    finest: float = 2.0**-24,
) -> tuple[Exact, float]:
    """The finest grid on which a plan fits 32 bits; the plain path must use the same grid.

    Args:
        num_coordinates: P.
        cohort: The most devices of one sum.
        max_weight: The largest weight.
        largest: The largest magnitude of a coordinate, in units of the model: the clip norm bounds it.
        counters: Sums that travel along.
        noise: Ring elements set aside for noise, in grid steps of the result.
        finest: The finest step of interest, a power of two.

    Returns:
        The encoding and its grid step, a power of two not below ``finest``.

    Raises:
        ConfigError: not even a coordinate of one grid step fits.
    """
    if not (isfinite(largest) and largest > 0) or frexp(finest)[0] != 0.5:
        raise ConfigError(f"Expected largest > 0 and finest a power of two, got {largest} and {finest}.")
    room = (2**31 - 1 - noise) // (cohort * max_weight)
    if room < 1:
        raise ConfigError(
            f"{cohort} devices of weight {max_weight} leave no room for a coordinate in 32 bits.",
            hint="Lower max_weight, or split the cohort.",
        )
    step = finest
    while floor(largest / step) > room:
        step *= 2
    bound = max(1, floor(largest / step))
    return Exact(num_coordinates, cohort, max_weight, bound, counters, noise), step


def largest_magnitude(update: NDArray[np.int32]) -> int:
    """The largest |coordinate|; right for -2**31, too."""
    return max(int(update.max(initial=0)), -int(update.min(initial=0)))


def limit_update(update: NDArray[np.int32], bound: int) -> NDArray[np.int32]:
    """Scale an update down, as a whole, until no coordinate exceeds ``bound``; truncates toward zero.

    The direction is kept and no norm grows. Plain and secure rounds of one plan both call it, so their
    inputs, and with them their sums, are the same.

    Args:
        update: (P,) grid steps.
        bound: At least 1.
    """
    peak = largest_magnitude(update)
    if peak <= bound:
        return update
    limited = np.empty_like(update)
    for start in range(0, len(update), _BLOCK):
        part = slice(start, start + _BLOCK)
        # At most 2**62: exact integer arithmetic, on magnitudes so that it truncates toward zero.
        magnitude = np.abs(update[part].astype(np.int64)) * bound // peak
        limited[part] = np.sign(update[part]) * magnitude
    return limited


# --- rotated ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rotated:
    """Clip, rotate, scale, saturate, round: as few bits a coordinate as leave room for rounding.

    Attributes:
        num_coordinates: P.
        cohort: The most devices that may be added.
        max_weight: The largest weight; a device's update counts ``weight / max_weight`` within the clip.
        clip_norm: L2 bound of one device's contribution, in grid steps of the update.
        seed: Names the rotation, 64 hexadecimal digits; public, new in every round.
        spread: Standard deviations of a flat vector's coordinate before it saturates.
        counters: Sums that travel with the update; one is the weight.
        noise: Ring elements set aside for noise.
        bits: of the ring.
        survivors: The noise is made for at least so many devices; 0 = there is none.
    """

    num_coordinates: int
    cohort: int
    max_weight: int
    clip_norm: float
    seed: str
    spread: float = 4.0
    counters: tuple[Counter, ...] = ()
    noise: int = 0
    bits: int = 16
    survivors: int = 0

    def __post_init__(self) -> None:
        if WEIGHT not in {c.name for c in self.counters}:
            object.__setattr__(self, "counters", (Counter(WEIGHT, self.max_weight), *self.counters))
        ring_type(self.bits)
        check_common(self.num_coordinates, self.cohort, self.counters, self.noise)
        if self.max_weight < 1 or not (isfinite(self.clip_norm) and self.clip_norm >= 1):
            raise ConfigError(
                f"Expected max_weight >= 1 and clip_norm >= 1 grid step, got {self.max_weight}, "
                f"{self.clip_norm}."
            )
        if not 1 <= self.spread <= 16 or len(self.seed) != 64:
            raise ConfigError("Expected a spread of 1 to 16 and a seed of 64 hexadecimal digits.")
        if self._inner <= 0:
            raise ConfigError(
                f"{self.bits} bits are too few: {self.cohort} devices of {self.num_coordinates} coordinates "
                f"leave {self.limit} steps for one of them, less than its rounding needs.",
                hint="Use the ring of 32 bits, a smaller cohort, or less noise.",
            )

    @property
    def length(self) -> int:
        """Ring elements of one vector."""
        return vector_length(self.num_coordinates, self.counters, self.cohort, self.bits)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all parameters."""
        return digest_of("rotated", self)

    @property
    def limit(self) -> int:
        """The largest magnitude of one device's coordinate: ``cohort * limit + noise`` fits the ring."""
        room: int = 2 ** (self.bits - 1) - 1 - self.noise
        return max(0, room // self.cohort)

    @cached_property
    def scale(self) -> float:
        """Ring steps per grid step: ``limit`` is ``spread`` deviations of a flat vector of the clip norm."""
        flat = self.clip_norm / sqrt(rotation_width(self.num_coordinates))
        return float(min(self.limit / (self.spread * flat), 2.0**30 / self.clip_norm))

    @property
    def norm_bound(self) -> int:
        """The L2 norm that no encoded update exceeds, in ring steps: a mechanism's Delta_2."""
        return floor(self.clip_norm * self.scale)

    @cached_property
    def _inner(self) -> float:
        """The norm to clip to, in ring steps, so that typical rounding stays within ``norm_bound``.

        Randomised rounding adds at most d/4 to the squared norm on average and a fluctuation of about half
        the norm (Kairouz et al. 2021, "The Distributed Discrete Gaussian Mechanism", Prop. 22, with
        beta = e^-1/2); the headroom is taken from the clip, not from the bound.
        """
        d, bound = self.num_coordinates, float(self.norm_bound)
        # r^2 + r + d/4 + sqrt(d)/2 <= bound^2, solved for r
        rest = bound * bound - d / 4 - sqrt(d) / 2
        return (sqrt(1 + 4 * rest) - 1) / 2 if rest > 0 else 0.0

    def encode(
        self,
        update: NDArray[np.int32],
        weight: int,
        random: Random,
        counters: Mapping[str, int] | None = None,
        noise: NDArray[np.int64] | None = None,
    ) -> Ring:
        """One device's vector.

        Args:
            update: (P,), grid steps, of any norm: it is clipped here.
            weight: 1 to ``max_weight``.
            random: For the rounding; a CSPRNG, because rounding hides the fractions.
            counters: The other counters' values.
            noise: (length,) integers to add.

        Raises:
            UpdateRejected: WRONG_SHAPE or OUT_OF_RANGE.
        """
        check_update(update, self.num_coordinates)
        if not 1 <= weight <= self.max_weight:
            raise UpdateRejected(
                Rejection.OUT_OF_RANGE, f"The weight is {weight}, the plan says 1 to {self.max_weight}."
            )
        values = {WEIGHT: weight} | dict(counters or {})
        whole = self._round(self._scaled(update, weight), random)
        vector = np.empty(self.length, ring_type(self.bits))
        vector[: len(whole)] = whole.astype(vector.dtype)
        vector[len(whole) :] = write_counters(self.counters, values, self.cohort, self.bits)
        _add_signed(vector, noise)
        return vector

    def _scaled(self, update: NDArray[np.int32], weight: int) -> NDArray[np.float64]:
        """Weighted, clipped, rotated, saturated, in ring steps."""
        x = update.astype(np.float64)
        x *= self.scale * (weight / self.max_weight)
        norm = float(np.sqrt(np.dot(x, x)))
        if norm > self._inner:
            x *= self._inner / norm * (1 - 2.0**-20)  # beyond the error of the norm itself
        rotated = rotate(x, bytes.fromhex(self.seed))
        return np.clip(rotated, -float(self.limit), float(self.limit), out=rotated)

    def _round(self, x: NDArray[np.float64], random: Random) -> NDArray[np.int64]:
        """Integers of the same mean, tried again until the norm is within its bound.

        Should all trials fail (for a typical update one in two would), truncation toward zero is taken: it
        cannot raise the norm. The result, too, does not exceed ``limit``, which is an integer.
        """
        floors = np.floor(x)
        fractions = x - floors
        whole = floors.astype(np.int64)
        for _ in range(_ROUNDING_TRIALS):
            dice = np.frombuffer(random(4 * len(x)), "<u4") * 2.0**-32
            candidate = whole + (dice < fractions)
            if int(np.dot(candidate, candidate)) <= self.norm_bound**2:
                return candidate
        return np.trunc(x).astype(np.int64)

    def decode(self, total: Ring) -> Sum:
        """The exact integer sums, still rotated and scaled (see :meth:`restore`)."""
        update = signed(total[: self.num_coordinates], self.bits)
        counters = read_counters(self.counters, total[self.num_coordinates :], self.cohort, self.bits)
        return Sum(update.astype(np.int32), counters)

    def restore(self, total: Sum) -> NDArray[np.float64]:
        """(P,) float64: the estimate of ``sum weight * update`` in grid steps."""
        restored = unrotate(total.update.astype(np.float64), bytes.fromhex(self.seed))
        restored *= self.max_weight / self.scale
        return restored


def noise_room(total_std: float, length: int, bits: int = 40) -> int:
    """Ring elements to set aside for a sum of noise, so that a wrap-around has probability <= 2**-bits.

    For noise no heavier in its tails than a Gaussian of 1.1 times the standard deviation (Skellam and
    discrete Gaussian sums of the sizes in use): ``2 length exp(-z^2/2) <= 2**-bits``. A wrap-around costs
    accuracy, never privacy: reduction modulo the ring is post-processing.
    """
    z = sqrt(2 * np.log(2) * (bits + 1 + log2(length)))
    return int(np.ceil(1.1 * z * total_std))
