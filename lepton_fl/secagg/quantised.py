"""Updates in few bits: rotated, rounded at random, in a ring that just holds what is expected of their sum.

    encoding = Quantised(d, cohort, max_weight, reach, seed, bits=7)
    vector = encoding.encode(update, weight, os.urandom)          # a device's, every round of every run alike
    total = encoding.decode(sum_of_vectors)                       # exact sums of the integers
    encoding.restore(total)                                       # the estimate of sum(weight * update)

A rotation with random signs makes every coordinate of a sum X sub-Gaussian with a variance of at most
``|X|^2 / D`` (Hoeffding; D is the width of the transform), and rounding to one of the two nearest integers,
unbiased, adds at most 1/4 for each device. So a sum of a norm up to ``reach`` leaves a ring of b bits with a
probability of at most ``2 d exp(-M^2 / 2 v)``, M = 2^(b-1) - 1, v = (scale * reach)^2 / D + cohort / 4. The
scale is the largest for which that is at most ``2**-risk`` (Suresh et al. 2017 for rotation and rounding;
Bonawitz et al. 2019, "Federated Learning with Autotuned Communication-Efficient Secure Aggregation", for a
ring made for the sum instead of for the worst case).

No single update is saturated, so the estimate is unbiased. Where ``reach`` is ``cohort`` times the clip norm
the bound holds for whatever honest devices send. Where it is what sums of past rounds let expect, a longer
sum may leave the ring, and is found out: every vector carries check elements, sums of its integers with
public random coefficients, modulo the whole lane. They tell no more than the exact sum does, and disagree
with one that has wrapped around but for a chance of 2^-48. Such a sum is not used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil, isfinite, log, log2, sqrt

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError, Rejection, UpdateRejected
from lepton_fl.packing import lane_bits, pack, packed_size, signed, unpack, width_of
from lepton_fl.secagg.encoding import (
    WEIGHT,
    Counter,
    Sum,
    check_common,
    check_update,
    digest_of,
    read_counters,
    vector_length,
    write_counters,
)
from lepton_fl.secagg.field import Random
from lepton_fl.secagg.masks import Ring, keystream, ring_type
from lepton_fl.secagg.rotation import rotate, rotation_width, unrotate

SURE = 40  # risk of a bound that rests on nothing but the clip norm
TUNED = 10  # of one whose reach is expected: should it not hold, a round is lost
_CHECKED = 48  # bits with which a sum that has left its ring is found out
_ROUNDING = 0.25  # sub-Gaussian variance of rounding one number to one of its neighbours


def deviations(coordinates: int, risk: int) -> float:
    """Standard deviations that none of so many sub-Gaussian coordinates exceeds but for 2**-risk."""
    return sqrt(2 * log(2) * (risk + 1 + log2(coordinates)))


def ring_bits(resolution: int, cohort: int, coordinates: int, risk: int = TUNED) -> int:
    """The narrowest ring for devices whose flat coordinate is to have ``2**resolution / 8`` steps.

    That is as much as two's complement of ``resolution`` bits holds within four standard deviations. A sum of
    n such devices that have nothing in common has sqrt(n) times as many.

    Args:
        resolution: bits of one device's coordinate.
        cohort: devices of a sum.
        coordinates: of an update.
        risk: see the module.
    """
    deviation = sqrt(cohort * (4.0 ** (resolution - 3) + _ROUNDING))
    bits = ceil(log2(deviations(coordinates, risk) * deviation + 1)) + 1
    return 17 if bits == 16 else bits  # a full lane leaves no room for checks


@dataclass(frozen=True)
class Quantised:
    """See the module.

    Attributes:
        num_coordinates: d.
        cohort: The most devices that may be added.
        max_weight: The largest weight; a device's update counts ``weight / max_weight`` within the reach.
        reach: The largest norm of a sum of such updates that the ring is made for, in grid steps.
        seed: Names the rotation and the checks, 64 hexadecimal digits; public, new in every attempt.
        bits: Of the ring.
        risk: The sum leaves the ring with a probability of at most ``2**-risk``.
        counters: Sums that travel with the update; one is the weight.
        survivors: 0; there is no noise.
    """

    num_coordinates: int
    cohort: int
    max_weight: int
    reach: float
    seed: str
    bits: int
    risk: int = TUNED
    counters: tuple[Counter, ...] = ()
    survivors: int = 0

    def __post_init__(self) -> None:
        if WEIGHT not in {c.name for c in self.counters}:
            object.__setattr__(self, "counters", (Counter(WEIGHT, self.max_weight), *self.counters))
        ring_type(self.bits)
        check_common(self.num_coordinates, self.cohort, self.counters, 0)
        if self.max_weight < 1 or not (isfinite(self.reach) and self.reach > 0):
            raise ConfigError(
                f"Expected max_weight >= 1 and a finite reach > 0, got {self.max_weight} and {self.reach}."
            )
        if not 1 <= self.risk <= 128 or len(self.seed) != 64 or self.survivors:
            raise ConfigError("Expected a risk of 1 to 128, a seed of 64 hexadecimal digits, no survivors.")
        if self._room <= 0:
            need = deviations(self.num_coordinates, self.risk) * sqrt(self.cohort * _ROUNDING)
            raise ConfigError(
                f"{self.bits} bits are too few: rounding the updates of {self.cohort} devices alone takes "
                f"+-{need:.3g} of the +-{2 ** (self.bits - 1) - 1} steps of a coordinate.",
                hint=f"Use a ring of {ring_bits(2, self.cohort, self.num_coordinates, self.risk)} bits or "
                "more, or a smaller cohort.",
            )

    @property
    def length(self) -> int:
        """Elements of one vector."""
        counted = vector_length(self.num_coordinates, self.counters, self.cohort, self.bits)
        return counted + self.checks

    @property
    def checks(self) -> int:
        """How many check elements; none where the ring fills its lane, which takes a sure bound."""
        spare = lane_bits(self.bits) - self.bits
        return ceil(_CHECKED / spare) if spare else 0

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all parameters."""
        return digest_of("quantised", self)

    @property
    def _room(self) -> float:
        """The squared deviation that is left for a coordinate of the sum, in ring steps."""
        half = 2 ** (self.bits - 1) - 1
        deviation = half / deviations(self.num_coordinates, self.risk)
        return float(deviation * deviation) - self.cohort * _ROUNDING

    @cached_property
    def scale(self) -> float:
        """Ring steps per grid step."""
        return sqrt(self._room * rotation_width(self.num_coordinates)) / self.reach

    def integers(self, update: NDArray[np.int32], weight: int, random: Random) -> NDArray[np.int64]:
        """One device's numbers, of which only the sum modulo the ring leaves it: (d,).

        Args:
            update: (d,), grid steps, clipped.
            weight: 1 to ``max_weight``.
            random: For the rounding; a CSPRNG, because rounding hides the fractions.

        Raises:
            UpdateRejected: WRONG_SHAPE or OUT_OF_RANGE.
        """
        check_update(update, self.num_coordinates)
        if not 1 <= weight <= self.max_weight:
            raise UpdateRejected(
                Rejection.OUT_OF_RANGE, f"The weight is {weight}, the plan says 1 to {self.max_weight}."
            )
        x = update.astype(np.float64)
        x *= self.scale * (weight / self.max_weight)
        rotated = rotate(x, bytes.fromhex(self.seed))
        if not float(np.abs(rotated).max()) < 2.0**62:
            raise UpdateRejected(
                Rejection.OUT_OF_RANGE,
                f"A coordinate of the update would have {float(np.abs(rotated).max()):.3g} ring steps.",
                hint="The coordinator expects a far smaller sum than this update alone.",
            )
        floors = np.floor(rotated)
        rotated -= floors
        dice = np.frombuffer(random(4 * len(x)), "<u4") * 2.0**-32
        whole: NDArray[np.int64] = floors.astype(np.int64)
        whole += dice < rotated
        return whole

    def encode(
        self,
        update: NDArray[np.int32],
        weight: int,
        random: Random,
        counters: Mapping[str, int] | None = None,
    ) -> Ring:
        """One device's vector; see ``integers``.

        Raises:
            UpdateRejected: WRONG_SHAPE or OUT_OF_RANGE.
        """
        whole = self.integers(update, weight, random)
        values = {WEIGHT: weight} | dict(counters or {})
        vector = np.empty(self.length, ring_type(self.bits))
        vector[: len(whole)] = whole.astype(vector.dtype)  # two's complement
        counted = write_counters(self.counters, values, self.cohort, self.bits)
        vector[len(whole) : len(whole) + len(counted)] = counted
        vector[len(vector) - self.checks :] = self._check(vector[: len(whole)])
        return vector

    def decode(self, total: Ring) -> Sum:
        """The exact integer sums, still rotated and scaled (see ``restore``)."""
        update = signed(total[: self.num_coordinates], self.bits)
        counters = read_counters(self.counters, total[self.num_coordinates :], self.cohort, self.bits)
        return Sum(update.astype(np.int32), counters)

    def has_left_ring(self, total: Ring, found: Sum) -> bool:
        """Whether some coordinate of a sum has wrapped around, so that ``found`` is not what was added."""
        expected = self._check(found.update.astype(total.dtype))
        return not np.array_equal(expected, total[len(total) - self.checks :])

    def norm(self, found: Sum) -> float:
        """Of the sum, in grid steps, its rounding included."""
        update = found.update.astype(np.float64)
        return float(np.sqrt(np.dot(update, update))) / self.scale

    def restore(self, total: Sum) -> NDArray[np.float64]:
        """(d,) float64: the estimate of ``sum weight * update`` in grid steps."""
        restored = unrotate(total.update.astype(np.float64), bytes.fromhex(self.seed))
        restored *= self.max_weight / self.scale
        return restored

    def _check(self, lanes: Ring) -> Ring:
        """Sums of a vector's integers with public random coefficients, modulo the lane."""
        sums = np.empty(self.checks, lanes.dtype)
        if self.checks:
            stream = keystream(bytes.fromhex(self.seed)[::-1], self.checks * lanes.nbytes)
            for i, coefficients in enumerate(np.frombuffer(stream, lanes.dtype).reshape(self.checks, -1)):
                sums[i] = np.sum(coefficients * lanes, dtype=lanes.dtype)
        return sums


# --- outside secure aggregation ---------------------------------------------------------------------


def to_message(encoding: Quantised, vector: Ring) -> NDArray[np.uint8]:
    """A vector of which nothing is hidden: its coordinates in as few bits as hold them, and how many."""
    d = encoding.num_coordinates
    integers = signed(vector[:d], encoding.bits)
    width = min(width_of(integers), encoding.bits)
    others = np.ascontiguousarray(vector[d:]).view(np.uint8)
    return np.concatenate([np.array([width], np.uint8), pack(vector[:d], width), others])


def from_message(encoding: Quantised, data: NDArray[np.uint8]) -> Ring:
    """The reverse of ``to_message``, modulo the ring.

    Raises:
        UpdateRejected: WRONG_SHAPE: it is not such a vector.
    """
    d, dtype = encoding.num_coordinates, ring_type(encoding.bits)
    width = int(data[0]) if len(data) else 0
    head = packed_size(d, width)
    size = 1 + head + (encoding.length - d) * dtype.itemsize
    if not 2 <= width <= encoding.bits or len(data) != size:
        raise UpdateRejected(
            Rejection.WRONG_SHAPE,
            f"Expected {d} coordinates of 2 to {encoding.bits} bits, got {len(data)} bytes of {width} bits.",
        )
    lanes = signed(unpack(data[1 : 1 + head], d, width, 8 * dtype.itemsize), width).view(dtype)
    return np.concatenate([lanes, np.ascontiguousarray(data[1 + head :]).view(dtype)])
