"""Integer noise from a cryptographic generator.

Floating-point noise leaks what it hides: the low bits of ``x + noise`` depend on x (Mironov 2012, "On
significance of the least significant bits"; Haney et al. 2022). Here x is whole grid steps, the noise is
whole grid steps, and the sum is exact, so the output's law is the law on paper.

    noise = DiscreteGaussian(sigma=3e6)        # grid steps; builds its tables once
    noise.add_to(total, Keystream())           # total: (P,) int64, changed in place

How a number is drawn: Walker's alias table with 128-bit weights, read by the words of AES-256-CTR. Every draw
takes the same steps, whatever its value; only a tie of the first 64 bits (probability 2**-50 a draw) looks at
a second word. A table's law differs from the one on paper by less than (entries) * 2**-128 in total
variation.

A sigma too wide for one table is a sum of scaled narrow ones, ``x = x1 + k * x2``: Poisson summation shows
that the sum's probabilities equal those of the wide discrete Gaussian up to a factor of 1 +- 2**-83, see
:func:`split_sigma`.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from math import isfinite, isqrt, sqrt
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError

Int64s = NDArray[np.int64]

KEY_BYTES = 32  # AES-256
BLOCK = 1 << 15  # coordinates handled at a time, so that temporaries stay in cache
WEIGHT_BITS = 128  # a table's weights add up to 2**128
TABLE_SIGMA = 1024.0  # of the fixed table under a wide discrete Gaussian
MAX_TABLE_SIGMA = 1200.0  # one table of 2**15 entries
MAX_SIGMA = 2.0**48  # grid steps: 14 sigma and a sum of updates still fit an int64
MAX_SKELLAM_SIGMA = 2.0**14  # grid steps: one table of 2**19 entries
SMOOTH = 1.75  # grid steps: a discrete Gaussian this wide is flat under shifts up to 1 +- 2**-86

_FRACTION_BITS = 320  # fixed point of the weights while they are computed
_TAIL_BITS = 136  # weights below 2**-136 of the total are left out


# ------------------------------------------------------------------------------------------ random words


class Keystream:
    """The words of AES-256-CTR under a fresh key of the operating system.

    Args:
        key: 32 bytes fix the stream. Two sums with the same noise differ by the plain data: the key of noise
            that protects somebody is used for one sum only (``rounds.private`` binds the two).
    """

    def __init__(self, key: bytes | None = None) -> None:
        if key is not None and len(key) != KEY_BYTES:
            raise ConfigError(f"Expected a key of {KEY_BYTES} bytes, got {len(key)}.")
        self._zeros = bytes(8 * BLOCK)
        self._buffer = bytearray(8 * BLOCK)
        self._fixed = key is not None
        self._rekey(key or os.urandom(KEY_BYTES))

    def _rekey(self, key: bytes) -> None:
        # The key encrypts this one stream and nothing else, so the counter may start at zero.
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._process = os.getpid()

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next ``count`` words (at most ``BLOCK``); overwritten by the next call."""
        if not self._fixed and os.getpid() != self._process:
            self._rekey(os.urandom(KEY_BYTES))  # a forked child must not repeat its parent's noise
        size = 8 * count
        self._cipher.update_into(memoryview(self._zeros)[:size], memoryview(self._buffer)[:size])
        return np.frombuffer(self._buffer, "<u8", count)


def simulation_key(*parts: str | int) -> bytes:
    """A key that names what it is for, so that a simulation can be repeated; protects nobody."""
    text = json.dumps(["lepton simulated noise v1", *parts], separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


# ------------------------------------------------------------------------------------------ one table


class AliasTable:
    """Draws from a symmetric law on the integers, given by exact weights.

    Walker 1977, Vose 1991, with integer weights: column i is picked by the top bits of a word, the rest of
    the word (and, on a tie, a second word) decides between i and its alias.

    Args:
        weights: of 0, 1, 2, ... in any fixed point; -x has the weight of x.
    """

    def __init__(self, weights: list[int]) -> None:
        exact = _to_total(weights)
        self._reach = len(exact) // 2
        self._bits = max(1, (len(exact) - 1).bit_length())
        thresholds, aliases = _alias(exact, self._bits)
        self._high = np.array([t >> 64 for t in thresholds], np.uint64)
        self._low = np.array([t & (2**64 - 1) for t in thresholds], np.uint64)
        # One row per column, so that value and alias share a cache line.
        choices = np.stack([np.arange(len(aliases)), np.array(aliases)], axis=1) - self._reach
        self._choices = choices.astype(np.int32).reshape(-1)
        self._shift = np.uint64(64 - self._bits)
        self._mask = np.uint64((1 << (64 - self._bits)) - 1)

    def draw(self, count: int, stream: Keystream) -> NDArray[np.int32]:
        """(count,) independent draws, at most ``BLOCK``."""
        words = stream.words(count)
        column = (words >> self._shift).view(np.int64)
        rest = words & self._mask
        high = self._high.take(column)
        take_alias = rest >= high
        ties = np.flatnonzero(rest == high)
        if ties.size:
            take_alias[ties] = stream.words(ties.size) >= self._low[column[ties]]
        column <<= 1
        column += take_alias
        return self._choices.take(column)


def _to_total(weights: list[int]) -> list[int]:
    """Weights of -n..n that add up to exactly 2**128; what rounding leaves goes to the middle."""
    total = 2 * sum(weights) - weights[0]
    kept = [w for w in weights[1:] if w << _TAIL_BITS >= total]  # they fall, so this cuts off the tail
    half = [(w << WEIGHT_BITS) // total for w in kept]
    return [*reversed(half), (1 << WEIGHT_BITS) - 2 * sum(half), *half]


def _alias(weights: list[int], bits: int) -> tuple[list[int], list[int]]:
    """Vose's construction in exact integers: thresholds (of 2**(128 - bits)) and aliases, 2**bits columns."""
    size, capacity = 1 << bits, 1 << (WEIGHT_BITS - bits)
    rest = weights + [0] * (size - len(weights))
    aliases = list(range(size))
    small = [i for i, w in enumerate(rest) if w < capacity]
    large = [i for i, w in enumerate(rest) if w > capacity]
    while small and large:
        poor, rich = small.pop(), large[-1]
        aliases[poor] = rich
        rest[rich] -= capacity - rest[poor]
        if rest[rich] <= capacity:
            large.pop()
            if rest[rich] < capacity:
                small.append(rich)
    return rest, aliases


# ------------------------------------------------------------------------------------------ exact weights


def gaussian_weights(sigma: float) -> list[int]:
    """exp(-x**2 / (2 sigma**2)) for x = 0, 1, 2, ... in fixed point, to the last that matters.

    The ratio of neighbours falls by the same factor each step: two products of integers a value, and an error
    below (number of values)**2 * 2**-320.
    """
    with localcontext() as context:
        context.prec = 120
        rate = -1 / (2 * Decimal(sigma) ** 2)
        scale = Decimal(1 << _FRACTION_BITS)
        ratio, fall = int(rate.exp() * scale), int((2 * rate).exp() * scale)
    weights, weight = [], 1 << _FRACTION_BITS
    floor = weight >> (_TAIL_BITS + 8)
    while weight > floor:
        weights.append(weight)
        weight = weight * ratio >> _FRACTION_BITS
        ratio = ratio * fall >> _FRACTION_BITS
    return weights


def skellam_weights(variance: float) -> list[int]:
    """The Bessel functions I_x(variance) for x = 0, 1, 2, ... up to one common factor.

    Skellam's probabilities are exp(-v) I_x(v). Miller's backward recurrence
    ``I_(x-1) = I_(x+1) + (2x / v) I_x`` adds positive numbers only, so nothing cancels.
    """
    v = Fraction(variance)
    reach = 100 + isqrt(10_000 + int(200 * v))  # exp(-reach**2 / (2 (v + reach))) < 2**-140
    start = reach + reach // 3 + 20
    following, current = 0, 1 << 128
    weights = []
    for x in range(start, 0, -1):
        following, current = current, following + 2 * x * v.denominator * current // v.numerator
        weights.append(current)
    weights.reverse()
    return weights[: reach + 1]


# ------------------------------------------------------------------------------------------ the laws


class IntegerNoise(Protocol):
    """A law of independent integers, centred at zero."""

    @property
    def variance(self) -> float:
        """Of one coordinate, grid steps squared."""

    def draw(self, count: int, stream: Keystream) -> Int64s:
        """(count,) int64 independent draws."""

    def add_to(self, total: Int64s, stream: Keystream) -> None:
        """Add independent draws to ``total``, (P,) int64, in place; memory does not grow with P."""


class _Blockwise(ABC):
    """What every law shares: block after block of ``_block``."""

    @abstractmethod
    def _block(self, count: int, stream: Keystream) -> NDArray[np.integer]:
        """So many independent draws."""

    def draw(self, count: int, stream: Keystream) -> Int64s:
        """(count,) int64 independent draws."""
        drawn = np.zeros(count, np.int64)
        self.add_to(drawn, stream)
        return drawn

    def add_to(self, total: Int64s, stream: Keystream) -> None:
        """Add independent draws to ``total``, (P,) int64, in place; memory does not grow with P."""
        if total.dtype != np.int64 or total.ndim != 1:
            raise ValueError(f"Expected a flat int64 vector, got {total.dtype} of shape {total.shape}.")
        for start in range(0, len(total), BLOCK):
            part = total[start : start + BLOCK]
            part += self._block(len(part), stream)


class DiscreteGaussian(_Blockwise):
    """P(x) proportional to exp(-x**2 / (2 sigma**2)) on the integers (Canonne, Kamath and Steinke 2020).

    Args:
        sigma: grid steps, from 0.1 to 2**48.

    Raises:
        ConfigError: sigma is outside these bounds or not a number.
    """

    def __init__(self, sigma: float) -> None:
        if not 0.1 <= sigma <= MAX_SIGMA:  # written so that NaN refuses
            raise ConfigError(
                f"Expected a noise of 0.1 to {MAX_SIGMA:g} grid steps, got {sigma}.",
                hint="Choose a finer or a coarser grid_step.",
            )
        self.sigma = float(sigma)
        sigmas, self._factors = split_sigma(self.sigma)
        self._tables = [_gaussian_table(s) for s in sigmas]

    @property
    def variance(self) -> float:
        """Of one coordinate, grid steps squared (for sigma >= 1 equal to sigma**2 to 7 digits)."""
        return self.sigma**2

    def _block(self, count: int, stream: Keystream) -> NDArray[np.integer]:
        drawn = self._tables[-1].draw(count, stream).astype(np.int64)
        for table, factor in zip(reversed(self._tables[:-1]), reversed(self._factors), strict=True):
            drawn *= factor
            drawn += table.draw(count, stream)
        return drawn


def split_sigma(sigma: float) -> tuple[list[float], list[int]]:
    """Write a wide discrete Gaussian as ``x1 + k1 * (x2 + k2 * (...))`` with narrow ones.

    For x1 of width s1 and x2 of width s2, ``P(x1 + k*x2 = x)`` is ``exp(-x**2 / (2 s**2))`` with
    ``s**2 = s1**2 + k**2 * s2**2``, times ``sum over j of exp(-(j - c)**2 / (2 t**2))`` with a centre c that
    depends on x and ``t = s1 * s2 / s``. By Poisson summation that sum is constant up to a factor of
    ``1 +- 2.1 exp(-2 pi**2 t**2)``; k is chosen so that t >= 1.75, where this is 2**-86. (The argument of
    Peikert 2010 and of Micciancio and Walter 2017.)

    Returns:
        The widths, narrowest scale first, and the factors between them (one fewer).
    """
    sigmas, factors = [], []
    while sigma > MAX_TABLE_SIGMA:
        factor = int(TABLE_SIGMA * sqrt(1 - (TABLE_SIGMA / sigma) ** 2) / SMOOTH)
        sigmas.append(TABLE_SIGMA)
        factors.append(factor)
        sigma = sqrt(sigma**2 - TABLE_SIGMA**2) / factor
    return [*sigmas, sigma], factors


class Skellam(_Blockwise):
    """The difference of two Poisson variables; the sum of Skellam variables is one (Agarwal et al. 2021).

    Args:
        variance: grid steps squared, from 0.01 to 2**28.

    Raises:
        ConfigError: the variance is outside these bounds or not a number.
    """

    def __init__(self, variance: float) -> None:
        if not 0.01 <= variance <= MAX_SKELLAM_SIGMA**2:
            raise ConfigError(
                f"Expected a Skellam share of variance 0.01 to {MAX_SKELLAM_SIGMA**2:g}, got {variance}.",
                hint="Use fewer bits per coordinate; 16 cost less than 1 % more noise than 20.",
            )
        self._variance = float(variance)
        self._table = _skellam_table(self._variance)

    @property
    def variance(self) -> float:
        """Of one coordinate, grid steps squared."""
        return self._variance

    def _block(self, count: int, stream: Keystream) -> NDArray[np.integer]:
        return self._table.draw(count, stream)


@lru_cache(maxsize=16)
def _gaussian_table(sigma: float) -> AliasTable:
    return AliasTable(gaussian_weights(sigma))


@lru_cache(maxsize=4)
def _skellam_table(variance: float) -> AliasTable:
    return AliasTable(skellam_weights(variance))


def continuous_sigma(sigma: float) -> float:
    """The width of a continuous Gaussian of which the discrete one is a post-processing.

    Draw y from the continuous Gaussian of variance ``sigma**2 - 1.75**2``, then a discrete Gaussian of width
    1.75 around y: by the same Poisson summation the result has the law of the discrete Gaussian of width
    sigma, up to a factor of 1 +- 2**-85 in every probability, and whole-numbered shifts of y go through. So
    the discrete mechanism is at least as private as the continuous one of this width, and exact Gaussian
    accounting applies to it.

    Raises:
        ConfigError: sigma is too narrow for this argument (below 3 grid steps).
    """
    if not (isfinite(sigma) and sigma >= 3):
        raise ConfigError(
            f"Expected a noise of at least 3 grid steps, got {sigma}.", hint="Choose a finer grid_step."
        )
    return sqrt(sigma**2 - SMOOTH**2)
