"""What is added to the exact sum of a round before anybody sees it.

A mechanism is a value: it adds fresh noise to a sum and hands back its successor. Whoever runs the round
stores the successor in the transaction that stores the release, and keeps the old one if nothing was
released; so a second attempt at a round draws new noise and starts from the same memory.

    mechanism = Correlated.blt(rounds=2000, min_separation=100, max_participations=20,
                               noise_multiplier=7.4, norm_bound=2.0**24, coordinates=1_000_000)
    event = mechanism.charge(1)                 # into the ledger first
    release = mechanism.release(total, 1)       # total: (P,) int64, noise added in place
    mechanism = release.following               # from here on

``norm_bound`` is the largest integer norm one device can have: the clip in grid steps, together with the
extra coordinate of adaptive clipping if there is one. ``noise_multiplier`` is the standard deviation of one
round's fresh noise in units of it.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from math import ceil, isfinite, log2, sqrt
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError, StateConflict, StateCorrupt
from lepton_fl.privacy.events import Event, Gaussian, PoissonGaussian
from lepton_fl.privacy.factorization import (
    Banded,
    Blt,
    optimise_banded,
    optimise_blt,
    participations,
    repeat_sensitivity,
    rounding_gain,
    sensitivity,
)
from lepton_fl.privacy.noise import BLOCK, SMOOTH, DiscreteGaussian, Int64s, Keystream

Floats = NDArray[np.float64]

ROUNDING_SHARE = 1e-5  # of the sensitivity: what rounding the remembered noise may add to it
MAX_FINER_BITS = 24  # of the noise's own grid below the updates' grid
LARGEST_DRAW = 15.0  # standard deviations; a draw beyond has probability 2**-160
_STATE_FORMAT = "lepton-noise-state-1"


class ReleaseMechanism(Protocol):
    """Turns exact sums into private ones, round after round."""

    def charge(self, round_number: int, *, repeat: bool = False) -> Event | None:
        """What to reserve before round ``round_number`` (first: 1) starts; None if that is paid already.

        ``repeat`` says that an earlier attempt at this round may have been released.
        """

    def release(self, total: Int64s, round_number: int, stream: Keystream | None = None) -> "Release":
        """Add noise to ``total``, (P,) int64 grid steps, in place.

        Args:
            total: the exact sum of the round's integers.
            round_number: first round: 1.
            stream: None for fresh noise of the operating system; a fixed stream is for simulations.
        """


@dataclass(frozen=True)
class Release:
    """What happened: the mechanism for the round after this one."""

    following: ReleaseMechanism = field(repr=False)  # holds secret noise


# ------------------------------------------------------------------------------------------ fresh noise


@dataclass(frozen=True)
class Independent:
    """Fresh discrete Gaussian noise every round.

    Without a contract each round is charged, as if every device were in it. With one, a device is in at most
    ``participations`` rounds, which are charged together before the first.
    """

    noise_multiplier: float
    norm_bound: float  # grid steps
    participations: int = 0  # of one device in the whole run, enforced; 0 = no contract
    sampling_probability: float = 1.0  # below 1 only for a registered population that always answers

    def __post_init__(self) -> None:
        _check(self.noise_multiplier, self.norm_bound)
        if not 0 < self.sampling_probability <= 1:
            raise ConfigError(f"Expected 0 < sampling_probability <= 1, got {self.sampling_probability}.")
        if self.participations < 0 or (self.participations and self.sampling_probability < 1):
            raise ConfigError(
                f"Expected participations >= 0 and no sampling with a contract, got {self.participations} "
                f"and {self.sampling_probability}."
            )

    @property
    def sigma(self) -> float:
        """Of the noise, grid steps: see ``noise.continuous_sigma`` for the 1.75 steps on top."""
        return sqrt((self.noise_multiplier * self.norm_bound) ** 2 + SMOOTH**2)

    def charge(self, round_number: int, *, repeat: bool = False) -> Event | None:
        """A Gaussian release a round, or one for all participations before the first round."""
        if repeat or not (self.participations or self.sampling_probability < 1):
            return Gaussian(self.noise_multiplier)  # a second attempt does not draw anew
        if self.participations:
            return self.event_of(self.participations) if round_number == 1 else None
        return PoissonGaussian(self.sampling_probability, self.noise_multiplier)

    def event_of(self, participations: int) -> Gaussian:
        """What a device that was in so many rounds has spent."""
        return Gaussian(self.noise_multiplier / sqrt(participations))

    def release(self, total: Int64s, round_number: int, stream: Keystream | None = None) -> Release:
        """Add noise in place."""
        DiscreteGaussian(self.sigma).add_to(total, stream or Keystream())
        return Release(self)


# ------------------------------------------------------------------------------------------ correlated noise


@dataclass(frozen=True)
class Correlated:
    """A matrix mechanism on integers: ``released = x + w`` with ``w = z - (what C remembers of earlier w)``.

    The whole run is one Gaussian release of ``C x``, charged before its first round. Why the integers are
    safe: write K(w) for the remembered part, computed from the earlier w alone, in steps of a finer grid.
    Given the earlier releases y, a device's data shift z by ``(C x)`` up to the rounding of K(y - x), which
    is bounded over the whole run (``_rounding``, L2) and added to the sensitivity. Shifts are whole steps of
    the finer grid and z is a discrete Gaussian on it, a post-processing of a continuous one, so exact
    Gaussian accounting holds; rounding to the updates' grid afterwards commutes with x, which is whole.
    """

    factorization: Blt | Banded
    rounds: int
    min_separation: int  # b: rounds between two participations of one device
    max_participations: int  # k of one device; 0 = as many as b allows
    noise_multiplier: float
    norm_bound: float  # grid steps
    coordinates: int
    next_round: int = 1
    memory: Floats | None = field(default=None, repr=False, compare=False)  # (rows, P) past noise: secret

    def __post_init__(self) -> None:
        _check(self.noise_multiplier, self.norm_bound)
        for name in ("rounds", "min_separation", "coordinates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} >= 1, got {getattr(self, name)}.")
        if self.max_participations < 0:
            raise ConfigError(f"Expected max_participations >= 0, got {self.max_participations}.")

    @classmethod
    def blt(
        cls,
        *,
        rounds: int,
        min_separation: int,
        max_participations: int = 0,
        noise_multiplier: float,
        norm_bound: float,
        coordinates: int,
    ) -> "Correlated":
        """With the best buffers for this participation contract."""
        best = optimise_blt(rounds, min_separation, max_participations)
        contract = (rounds, min_separation, max_participations)
        return cls(best, *contract, noise_multiplier, norm_bound, coordinates)

    @classmethod
    def banded(
        cls,
        *,
        rounds: int,
        min_separation: int,
        max_participations: int = 0,
        noise_multiplier: float,
        norm_bound: float,
        coordinates: int,
        bands: int = 0,
    ) -> "Correlated":
        """With the best bands for this contract; remembers ``bands - 1`` vectors of noise."""
        best = optimise_banded(rounds, min_separation, max_participations, bands)
        contract = (rounds, min_separation, max_participations)
        return cls(best, *contract, noise_multiplier, norm_bound, coordinates)

    # -------------------------------------------------------------------------------------- what it costs

    @property
    def sensitivity(self) -> float:
        """Of ``C x``, in units of ``norm_bound``."""
        return sensitivity(self.factorization, self.rounds, self.min_separation, self.max_participations)

    def charge(self, round_number: int, *, repeat: bool = False) -> Event | None:
        """The whole run before its first round; an extra release for each repeated one.

        A repeated round is one more Gaussian release of that round of ``C x``, which a device moves through
        every participation that the round still remembers.
        """
        if repeat:
            extra = repeat_sensitivity(
                self.factorization, self.rounds, self.min_separation, self.max_participations
            )
            return Gaussian(self.noise_multiplier / extra)
        return self.event if round_number == 1 else None

    @property
    def event(self) -> Gaussian:
        """The whole run."""
        return Gaussian(self.noise_multiplier / self.sensitivity)

    def event_of(self, rounds: int, min_separation: int, max_participations: int) -> Gaussian:
        """The run as it went: fewer rounds, or devices that came back too soon or too often.

        Raises:
            ConfigError: more rounds than there is noise for.
        """
        if not 1 <= rounds <= self.rounds:
            raise ConfigError(f"Expected 1 to {self.rounds} rounds, got {rounds}.")
        actual = sensitivity(self.factorization, rounds, min_separation, max_participations)
        spare = self._widened(self.sensitivity) / self._widened(actual)  # sigma was made for the planned one
        return Gaussian(self.noise_multiplier * min(1.0, spare) / actual)

    def _widened(self, moved: float) -> float:
        """The shift of a run that moves ``moved`` norm bounds, rounding included, over the plain one."""
        return 1 + self._rounding / (moved * self.norm_bound)

    # -------------------------------------------------------------------------------------- its noise

    @property
    def finer_bits(self) -> int:
        """The noise's own grid has ``2**finer_bits`` steps to one of the updates' grid."""
        if not len(self._mix):
            return 0
        allowed = ROUNDING_SHARE * self.norm_bound * self.sensitivity
        wanted = ceil(log2(max(1.0, sqrt(self.rounds * self.coordinates) / allowed)))
        return min(wanted, MAX_FINER_BITS)

    @property
    def _rounding(self) -> float:
        """How far rounding can move the shift of a whole run, L2, grid steps; zero without memory."""
        if not len(self._mix):
            return 0.0
        times = participations(self.rounds, self.min_separation, self.max_participations)
        largest = (
            LARGEST_DRAW * self.noise_multiplier + times
        ) * self.norm_bound  # remembered, or neighbouring
        floats = 2.0**-52 * largest * rounding_gain(self.factorization, self.rounds)
        return sqrt(self.rounds * self.coordinates) * (2.0**-self.finer_bits + 2 * floats)

    @property
    def sigma(self) -> float:
        """Of the fresh noise, in steps of the finer grid."""
        plain = self.noise_multiplier * self.norm_bound * self._widened(self.sensitivity)
        return sqrt((plain * 2.0**self.finer_bits) ** 2 + SMOOTH**2)

    @property
    def _mix(self) -> Floats:
        return self.factorization.mix

    def release(self, total: Int64s, round_number: int, stream: Keystream | None = None) -> Release:
        """Add this round's noise in place, and that of rounds before it that have released nothing.

        A round that was left out is one of zeros. Its noise is added here, to the sum of both: so later noise
        still cancels it, and the sum of two releases costs no more than the two.

        Raises:
            StateConflict: the round was released already, or the run is over.
        """
        if not self.next_round <= round_number <= self.rounds:
            raise StateConflict(
                f"Expected round {self.next_round} to {self.rounds} of the correlated noise, "
                f"got {round_number}."
            )
        if total.shape != (self.coordinates,) or total.dtype != np.int64:
            raise ValueError(f"Expected ({self.coordinates},) int64, got {total.shape} {total.dtype}.")
        source, words, bits = DiscreteGaussian(self.sigma), stream or Keystream(), self.finer_bits
        memory = self.memory if self.memory is not None else np.zeros((len(self._mix), self.coordinates))
        following = np.empty_like(memory)
        for start in range(0, self.coordinates, BLOCK):
            part = slice(start, start + BLOCK)
            known = memory[:, part]
            for _ in range(self.next_round, round_number + 1):
                noise = source.draw(len(total[part]), words)
                noise -= self._remembered(known, bits)
                noise += (1 << bits) >> 1
                noise >>= bits  # round to the updates' grid
                total[part] += noise
                after = np.empty_like(known)
                self.factorization.remember(known, noise, after)
                known = after
            following[:, part] = known
        return Release(replace(self, next_round=round_number + 1, memory=following))

    def _remembered(self, memory: Floats, bits: int) -> Int64s:
        """The part of C's earlier columns, in steps of the finer grid; one fixed order of additions."""
        total = np.zeros(memory.shape[1])
        for weight, row in zip(self._mix, memory, strict=True):
            total += weight * row
        total *= 2.0**bits
        return np.rint(total).astype(np.int64)

    # -------------------------------------------------------------------------------------- its memory

    def identity(self) -> str:
        """SHA-256 (hex) of everything public about the mechanism."""
        values = [self.rounds, self.min_separation, self.max_participations, self.noise_multiplier]
        values += [self.norm_bound, self.coordinates, self.factorization.coefficients(self.rounds).tolist()]
        return hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()

    def state(self) -> bytes:
        """The memory between two rounds; whoever reads it can subtract the noise, so store it sealed."""
        rows = self.memory if self.memory is not None else np.zeros((len(self._mix), self.coordinates))
        header = {"format": _STATE_FORMAT, "identity": self.identity(), "next_round": self.next_round}
        line = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        return line + b"\n" + np.ascontiguousarray(rows, "<f8").tobytes()

    def restored(self, state: bytes) -> "Correlated":
        """The mechanism as :meth:`state` left it.

        Raises:
            StateCorrupt: the bytes are damaged, or belong to a mechanism with other parameters.
        """
        line, _, body = state.partition(b"\n")
        shape = (len(self._mix), self.coordinates)
        try:
            header = json.loads(line)
            following = header["next_round"]
            good = header["format"] == _STATE_FORMAT and header["identity"] == self.identity()
            good = good and isinstance(following, int) and 1 <= following <= self.rounds + 1
        except (ValueError, KeyError, TypeError) as error:
            raise StateCorrupt("Expected a noise state, got bytes that are none.") from error
        if not good or len(body) != 8 * shape[0] * shape[1]:
            raise StateCorrupt("The noise state belongs to another run, or is cut off.")
        memory = np.frombuffer(body, "<f8").reshape(shape).astype(np.float64)
        if not np.isfinite(memory).all():
            raise StateCorrupt("The noise state holds a number that is not finite.")
        return replace(self, next_round=following, memory=memory)


def _check(noise_multiplier: float, norm_bound: float) -> None:
    for name, value in (("noise_multiplier", noise_multiplier), ("norm_bound", norm_bound)):
        if not (value > 0 and isfinite(value)):
            raise ConfigError(f"Expected {name} > 0 and finite, got {value}.")
