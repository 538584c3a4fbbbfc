"""Correlated noise: which noise of earlier rounds a round takes back.

The models of a run are prefix sums of its updates. Noise that is fresh every round adds up in them; a matrix
mechanism (Denisov et al. 2022; Choquette-Choo et al. 2023) releases ``x + C^-1 z`` instead of ``x + z``,
where C is lower-triangular with ones on its diagonal: later rounds cancel much of what earlier ones added. It
costs what one Gaussian release of ``C x + z`` costs, and a device that takes part at most k times, at least b
rounds apart, can move ``C x`` by at most :func:`sensitivity` clip norms.

    blt = optimise_blt(rounds=2000, min_separation=100, max_participations=20)
    blt.decay, blt.scale                        # two or three buffers stand for 2000 rounds
    error(blt, 2000, 100, 20).final             # 27.0, independent noise: 200

Here C is Toeplitz: ``C[t, s] = c[t - s]``. :class:`Blt` is the buffered linear one (Dvijotham et al. 2024;
McMahan et al. 2024), :class:`Banded` keeps b rounds of noise and suits small models.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil, isfinite, sqrt
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError

Floats = NDArray[np.float64]

MAX_ROUNDS = 20_000  # of one search; half a minute
MAX_BUFFERS = 3  # a fourth gains less than half a percent
_GOOD_ENOUGH = 1.001  # take fewer buffers when more gain less than this


class Factorization(Protocol):
    """A lower-triangular Toeplitz C with c[0] = 1; a value that can be compared and hashed."""

    def __hash__(self) -> int: ...

    def coefficients(self, rounds: int) -> Floats:
        """(rounds,) c[0], c[1], ..."""

    def inverse(self, signal: Floats) -> Floats:
        """C^-1 times a vector of any length."""

    @property
    def mix(self) -> Floats:
        """(rows,) weights of the remembered vectors in what a round takes back."""

    def remember(self, memory: Floats, noise: NDArray[np.int64], following: Floats) -> None:
        """Write into ``following`` (rows, n) what is remembered after a round of ``noise`` (n,)."""

    def rounding_gain(self, rounds: int) -> float:
        """Bound on the rounding error of what is taken back, per unit of noise and of the last bit."""


@dataclass(frozen=True)
class Blt:
    """``c[j] = sum over i of scale[i] * decay[i]**(j - 1)``; without buffers, independent noise.

    Raises:
        ConfigError: the coefficients would not be non-negative and non-increasing, on which the sensitivity
            formula rests.
    """

    decay: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        fits = len(self.decay) == len(self.scale)
        if not (fits and all(0 < d <= 1 for d in self.decay) and all(s > 0 for s in self.scale)):
            raise ConfigError(f"Expected decays in (0, 1] and scales > 0, got {self.decay}, {self.scale}.")
        if not sum(self.scale) <= 1:
            raise ConfigError(f"Expected scales that add up to at most 1, got {self.scale}.")

    def coefficients(self, rounds: int) -> Floats:
        """(rounds,) c[0], c[1], ..."""
        powers = np.power.outer(np.array(self.decay), np.arange(rounds - 1))  # (buffers, rounds - 1)
        return np.concatenate([[1.0], np.array(self.scale) @ powers])

    def inverse(self, signal: Floats) -> Floats:
        """C^-1 times a vector: one pass of a recursive filter."""
        from scipy.signal import lfilter

        numerator, denominator = self._rational()
        return np.asarray(lfilter(denominator, numerator, signal), np.float64)

    @property
    def mix(self) -> Floats:
        """(buffers,) the scales."""
        return np.array(self.scale)

    def remember(self, memory: Floats, noise: NDArray[np.int64], following: Floats) -> None:
        """Every buffer decays and takes the noise in."""
        for decay, old, new in zip(self.decay, memory, following, strict=True):
            np.multiply(old, decay, out=new)
            new += noise

    def rounding_gain(self, rounds: int) -> float:
        """Buffer i rounds twice a round; an error decays with it, and its size follows from its filter."""
        from scipy.signal import lfilter

        impulse = np.zeros(rounds)
        impulse[0] = 1.0
        fresh, gain = self.inverse(impulse), 0.0
        for decay, scale in zip(self.decay, self.scale, strict=True):
            size = float(np.linalg.norm(lfilter([0.0, 1.0], [1.0, -decay], fresh)))
            lasting = min(float(rounds), 1 / (1 - decay)) if decay < 1 else float(rounds)
            gain += scale * size * (lasting + len(self.decay) + 1)
        return gain

    def _rational(self) -> tuple[Floats, Floats]:
        """C as a ratio of polynomials in the delay: 1 + sum of scale * x / (1 - decay * x)."""
        denominator = np.array([1.0])
        for decay in self.decay:
            denominator = np.convolve(denominator, [1, -decay])
        numerator = denominator.copy()
        for i, scale in enumerate(self.scale):
            part = np.array([0.0, scale])
            for j, decay in enumerate(self.decay):
                if j != i:
                    part = np.convolve(part, [1, -decay])
            numerator[: len(part)] += part
        return numerator, denominator


INDEPENDENT = Blt()


@dataclass(frozen=True)
class Banded:
    """``c[j]`` given for j < bands, zero beyond."""

    bands: tuple[float, ...] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.bands or self.bands[0] != 1.0 or not all(isfinite(c) for c in self.bands):
            raise ConfigError("Expected bands that are finite and start with 1.")

    def coefficients(self, rounds: int) -> Floats:
        """(rounds,) c[0], c[1], ..."""
        row = np.zeros(rounds)
        kept = min(rounds, len(self.bands))
        row[:kept] = self.bands[:kept]
        return row

    def inverse(self, signal: Floats) -> Floats:
        """C^-1 times a vector."""
        from scipy.signal import lfilter

        return np.asarray(lfilter([1.0], self.bands, signal), np.float64)

    @property
    def mix(self) -> Floats:
        """(bands - 1,) the weights of the last rounds, latest first."""
        return np.array(self.bands[1:])

    def remember(self, memory: Floats, noise: NDArray[np.int64], following: Floats) -> None:
        """The latest noise moves in, the oldest out."""
        if len(memory):
            following[1:] = memory[:-1]
            following[0] = noise

    def rounding_gain(self, rounds: int) -> float:
        """Whole numbers are remembered exactly; only their weighted sum rounds."""
        impulse = np.zeros(rounds)
        impulse[0] = 1.0
        size = float(np.linalg.norm(self.inverse(impulse)))
        return size * float(np.abs(self.mix).sum()) * (len(self.bands) + 1)


# ------------------------------------------------------------------------------------------ what it is worth


def participations(rounds: int, min_separation: int, max_participations: int = 0) -> int:
    """How often one device can take part: as asked, and never more than the separation allows (0 = that)."""
    possible = ceil(rounds / min_separation)
    return min(max_participations or possible, possible)


@lru_cache(maxsize=256)
def sensitivity(c: Factorization, rounds: int, min_separation: int, max_participations: int = 0) -> float:
    """How far one device can move ``C x``, in clip norms.

    For non-negative non-increasing coefficients the worst pattern is to start at once and to come back as
    soon as allowed (Kalinin and Lampert 2024); bands no wider than the separation never overlap, whatever
    their values.

    Raises:
        ConfigError: bands wider than the separation that are not of that form.
    """
    times = participations(rounds, min_separation, max_participations)
    row = c.coefficients(rounds)
    wide = bool(np.any(row[min_separation:]))
    if wide and not (np.all(row >= 0) and np.all(np.diff(row) <= 0)):
        raise ConfigError(
            f"Expected bands within min_separation={min_separation}, or coefficients that never rise.",
            hint="Use fewer bands or a larger min_separation.",
        )
    return float(np.linalg.norm(_worst_column(row, min_separation, times)))


def _worst_column(row: Floats, separation: int, times: int) -> Floats:
    """The sum of ``times`` copies of the column, each ``separation`` rounds after the one before."""
    rounds = len(row)
    blocks = ceil(rounds / separation)
    table = np.zeros(blocks * separation)
    table[:rounds] = row
    running = np.cumsum(table.reshape(blocks, separation), axis=0)
    running[times:] -= running[:-times].copy()
    return running.reshape(-1)[:rounds]


def repeat_sensitivity(
    c: Factorization, rounds: int, min_separation: int, max_participations: int = 0
) -> float:
    """How far one device can move a single round of ``C x``: what one extra release of a round costs."""
    times = participations(rounds, min_separation, max_participations)
    row = np.abs(c.coefficients(rounds))
    return max(
        float(row[start::min_separation][:times].sum()) for start in range(min(min_separation, rounds))
    )


@lru_cache(maxsize=256)
def rounding_gain(c: Factorization, rounds: int) -> float:
    """``c.rounding_gain``, remembered."""
    return c.rounding_gain(rounds)


@dataclass(frozen=True)
class Error:
    """Noise of the models at equal privacy (one device moves the release by one standard deviation)."""

    final: float  # standard deviation of the last prefix sum, in clip norms
    mean: float  # root mean square over all prefix sums


def error(c: Factorization, rounds: int, min_separation: int, max_participations: int = 0) -> Error:
    """The noise of the final model and of the average one."""
    squares = c.inverse(np.ones(rounds)) ** 2
    sens = sensitivity(c, rounds, min_separation, max_participations)
    left = np.arange(rounds, 0, -1) / rounds
    return Error(final=sens * sqrt(float(squares.sum())), mean=sens * sqrt(float(squares @ left)))


# ------------------------------------------------------------------------------------------ the best ones


@lru_cache(maxsize=64)
def optimise_blt(rounds: int, min_separation: int, max_participations: int = 0) -> Blt:
    """The buffers with the least noise in the final model, at equal privacy.

    Quasi-Newton over one to three buffers from several starts; fewer buffers win ties. A tenth of a second to
    two seconds for 2,000 rounds.

    Raises:
        ConfigError: more than 20,000 rounds.
    """
    _check_rounds(rounds)
    best, least = INDEPENDENT, error(INDEPENDENT, rounds, min_separation, max_participations).final
    for buffers in range(1, MAX_BUFFERS + 1):
        for candidate in _blt_candidates(buffers, rounds, min_separation, max_participations):
            found = error(candidate, rounds, min_separation, max_participations).final
            if found * (_GOOD_ENOUGH if len(candidate.decay) > len(best.decay) else 1) < least:
                best, least = candidate, found
    return best


def _check_rounds(rounds: int) -> None:
    if rounds > MAX_ROUNDS:
        raise ConfigError(
            f"Expected at most {MAX_ROUNDS} rounds of correlated noise, got {rounds}.",
            hint="Train in several runs, each starting from the last model; a budget adds up what they cost.",
        )


def _blt_candidates(buffers: int, rounds: int, separation: int, k: int) -> list[Blt]:
    """Local optima from starts whose memories range from short to the separation or to the whole run."""
    times = participations(rounds, separation, k)

    def loss(parameters: Floats) -> float:
        blt = _unpack(parameters)
        moved = _worst_column(blt.coefficients(rounds), separation, times)
        added = blt.inverse(np.ones(rounds))
        return float(np.log(moved @ moved) + np.log(added @ added))

    found = []
    for longest in sorted({min(separation, rounds), rounds}):
        for shortest in (2.0, 3.0):
            memories = np.geomspace(shortest, max(longest, shortest + 1), buffers)[::-1]
            start = np.concatenate([np.log(memories - 1 + 1e-9), np.full(buffers, -1.0)])
            found.append(_unpack(_minimise(loss, start)))
    return found


def _unpack(parameters: Floats) -> Blt:
    """Any real numbers to valid buffers: decays in (0, 1), scales that add up to less than one."""
    half = len(parameters) // 2
    decay = 1 / (1 + np.exp(-np.clip(parameters[:half], -20, 20)))
    weights = np.exp(np.clip(parameters[half:], -20, 20))
    scale = weights / (1 + weights.sum())
    return Blt(tuple(decay.tolist()), tuple(scale.tolist()))


def _minimise(loss: Callable[[Floats], float], start: Floats) -> Floats:
    from scipy.optimize import minimize

    return np.asarray(minimize(loss, start, method="L-BFGS-B", options={"maxiter": 300}).x, np.float64)


@lru_cache(maxsize=64)
def optimise_banded(rounds: int, min_separation: int, max_participations: int = 0, bands: int = 0) -> Banded:
    """The bands (at most the separation) with the least noise in the final model, at equal privacy.

    The noise state is ``bands - 1`` past vectors: for small models.

    Raises:
        ConfigError: more than 20,000 rounds.
    """
    _check_rounds(rounds)
    width = min(bands or min_separation, min_separation, rounds)
    if width == 1:
        return Banded((1.0,))
    from scipy.optimize import minimize
    from scipy.signal import lfilter

    ones = np.ones(rounds)

    def loss(tail: Floats) -> tuple[float, Floats]:
        # ln |c|^2 + ln |g|^2 with g = C^-1 1, and its gradient: dg = -g * dc / c as power series.
        c = np.concatenate([[1.0], tail])
        added = lfilter([1.0], c, ones)
        again = lfilter([1.0], c, added)
        norm, power = float(c @ c), float(added @ added)
        if not (isfinite(power) and power > 0):
            return 1e30, np.zeros_like(tail)
        slope = np.array([added[j:] @ again[: rounds - j] for j in range(1, width)])
        return float(np.log(norm) + np.log(power)), 2 * tail / norm - 2 * slope / power

    # The best C for one participation starts 1, 1/2, 3/8, ... (Fichtenberger, Henzinger and Upadhyay 2023).
    steps = np.arange(1, width)
    start = np.cumprod((2 * steps - 1) / (2 * steps))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    return Banded((1.0, *found.tolist()))
