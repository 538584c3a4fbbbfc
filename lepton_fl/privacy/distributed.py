"""Noise that the devices add themselves, so that the coordinator never sees a sum without it.

Every device adds a small share inside secure aggregation; the sum of the shares is the noise. Shares are
sized for the fewest devices that may be left, less those that may tell the coordinator their share: with more
survivors there is more noise than planned, with fewer the round must be voided before anything is unmasked.

    noise = plan_distributed(kind="skellam", clip_norm=1.0, coordinates=10**6, cohort=100, survivors=70,
                             colluders=10, bits=20, events=50, epsilon=8.0, delta=1e-6)
    noise.step                                  # the grid of the updates: encode(delta, noise.step, 1.0)
    noise.share().add_to(integers, Keystream()) # on the device, int64, before the mask
    noise.event(survivors=88)                   # what the round cost, at the coordinator

Sums live modulo ``2**bits``; the plan keeps ``headroom`` standard deviations free of wrap-around.
Amplification by sampling does not hold against the coordinator, which knows who takes part, and is not used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, exp, floor, isfinite, log, log2, sqrt
from typing import Literal

from lepton_fl.errors import ConfigError
from lepton_fl.privacy.accounting import RdpGate, calibrate
from lepton_fl.privacy.events import DistributedGaussian, Event, Skellam, composed
from lepton_fl.privacy.mechanisms import Release
from lepton_fl.privacy.noise import MAX_SKELLAM_SIGMA, DiscreteGaussian, Int64s, IntegerNoise, Keystream
from lepton_fl.privacy.noise import Skellam as SkellamNoise

Kind = Literal["skellam", "ddgauss"]
MAX_GRID = 2.0**40  # steps to one clip norm
COARSEST = 4.0  # steps to one clip norm: below, truncation leaves nothing of an update
ROUNDING_ROOM = 2.0  # least squared norm of a rotated update, over what its rounding may add
HEADROOM = 4.0  # standard deviations before the sum wraps around


@dataclass(frozen=True)
class DistributedNoise:
    """How much every device adds, and what that is worth.

    Attributes:
        kind: law of the shares.
        step: size of one grid step, a power of two.
        l2: largest L2 norm of one device's integers, grid steps.
        l1: largest L1 norm of one device's integers, grid steps.
        coordinates: length of the vector.
        share_variance: of one device's share, grid steps squared.
        min_survivors: with fewer the round is void.
        colluders: devices whose share the coordinator may know.
        bits: of the ring the sum lives in.
    """

    kind: Kind
    step: float
    l2: float
    l1: float
    coordinates: int
    share_variance: float
    min_survivors: int
    colluders: int
    bits: int
    participations: int = 0  # of one device, charged together before the first round; 0 = round by round
    limit: int = 0  # after a rotation: the largest magnitude of one device's coordinate, grid steps

    def share(self) -> IntegerNoise:
        """What one device adds to its integers; fresh for every attempt."""
        if self.kind == "skellam":
            return SkellamNoise(self.share_variance)
        return DiscreteGaussian(sqrt(self.share_variance))

    def event(self, survivors: int) -> Event:
        """What a released sum of so many devices cost.

        Raises:
            ConfigError: fewer survivors than planned: the sum must not be unmasked.
        """
        if survivors < self.min_survivors:
            raise ConfigError(
                f"Expected at least {self.min_survivors} survivors, got {survivors}: too little noise.",
                hint="Void the round before anything is unmasked.",
            )
        return _event(
            self.kind, self.l1, self.l2, self.share_variance, survivors - self.colluders, self.coordinates
        )

    @property
    def planned_event(self) -> Event:
        """The most a round can cost: what to reserve."""
        return self.event(self.min_survivors)

    @property
    def multiplier(self) -> float:
        """Standard deviation of the least noise in a sum, in norms."""
        return sqrt(self.share_variance * (self.min_survivors - self.colluders)) / self.l2

    # --- as a mechanism of rounds: ``mechanisms.ReleaseMechanism`` ------------------------------------

    def charge(self, round_number: int, *, repeat: bool = False) -> Event | None:
        """A round, or all participations of a device before the first."""
        if repeat or not self.participations:
            return self.planned_event
        return self.event_of(self.participations) if round_number == 1 else None

    def event_of(self, participations: int) -> Event:
        """What a device that was in so many rounds has spent."""
        return composed(self.planned_event, participations)

    def release(self, total: Int64s, round_number: int, stream: Keystream | None = None) -> Release:
        """Nothing is left to add: the noise is in the sum."""
        return Release(self)


def plan_distributed(
    *,
    kind: Kind = "skellam",
    clip_norm: float,
    coordinates: int,
    cohort: int,
    survivors: int,
    colluders: int = 0,
    bits: int = 20,
    events: int,
    epsilon: float,
    delta: float,
    headroom: float = HEADROOM,
    octave: bool = False,
) -> DistributedNoise:
    """The finest grid and the least noise that fit the ring and reach the target.

    Args:
        kind: law of the shares.
        clip_norm: of one device's update.
        coordinates: length of the vector, with the extra coordinate of adaptive clipping.
        cohort: devices asked, all of which may answer.
        survivors: the fewest whose sum may be unmasked.
        colluders: of those, how many may tell their share.
        bits: of the ring.
        events: rounds one device can take part in.
        epsilon: target for all of these together.
        delta: its failure probability.
        headroom: standard deviations of the noise before the sum wraps around.
        octave: norms of half the bound, up to the bound, are to cost no more, with noise in proportion: for
            clips that move, on a grid whose step is a power of two. ``l2`` is then the lower end.

    Raises:
        ConfigError: the numbers contradict each other, or no grid fits the ring.
    """
    _check_counts(cohort, survivors, colluders, bits, coordinates, events, clip_norm)
    honest = survivors - colluders

    spread = 2 if octave else 1

    def at(grid: float) -> tuple[float, float, float]:
        """Variance of a share, at most, and bits needed with ``grid`` steps to one clip norm, or less."""
        variance = noise_variance(
            kind, *truncated_norms(grid / spread, coordinates), honest, coordinates, events, epsilon, delta
        )
        share = variance / honest
        widest = share * spread**2
        return share, widest, _bits_needed(cohort * grid, sqrt(cohort * widest), headroom)

    exponent = floor(log2(MAX_GRID / clip_norm))
    while (grid := clip_norm * 2.0**exponent) >= COARSEST * spread**4:
        if cohort * grid < 2.0 ** (bits - 1):  # otherwise too wide already without any noise
            share, widest, needed = at(grid)
            if needed <= bits and (kind != "skellam" or widest <= MAX_SKELLAM_SIGMA**2):
                l1, l2 = truncated_norms(grid / spread, coordinates)
                step = 2.0**-exponent
                return DistributedNoise(kind, step, l2, l1, coordinates, share, survivors, colluders, bits)
        exponent -= 1
    raise ConfigError(
        f"No grid fits {bits} bits for {cohort} devices at epsilon={epsilon:g}, delta={delta:g}.",
        hint="Allow more bits, a smaller cohort or a larger epsilon.",
    )


def plan_rotated(
    *,
    kind: Kind,
    flat: float,
    coordinates: int,
    cohort: int,
    survivors: int,
    colluders: int = 0,
    bits: int = 16,
    events: int,
    epsilon: float,
    delta: float,
    headroom: float = HEADROOM,
) -> DistributedNoise:
    """The same for updates that are rotated, saturated and rounded within their norm (``secagg.Rotated``).

    Args:
        kind: law of the shares.
        flat: largest magnitude of a coordinate over the norm of the whole vector.
        coordinates: length of the vector.
        cohort: devices asked, all of which may answer.
        survivors: the fewest whose sum may be unmasked.
        colluders: of those, how many may tell their share.
        bits: of the ring.
        events: rounds one device can take part in.
        epsilon: target for all of these together.
        delta: its failure probability.
        headroom: standard deviations of the noise before the sum wraps around.

    Raises:
        ConfigError: the numbers contradict each other, or the ring is too small.
    """
    _check_counts(cohort, survivors, colluders, bits, coordinates, events, 1.0)
    honest, half = survivors - colluders, 2 ** (bits - 1)

    def at(limit: int) -> DistributedNoise:
        l1, l2 = truncated_norms(float(floor(limit / flat * (1 + 1e-9))), coordinates)
        share = noise_variance(kind, l1, l2, honest, coordinates, events, epsilon, delta) / honest
        return DistributedNoise(
            kind, 1.0, l2, l1, coordinates, share, survivors, colluders, bits, limit=limit
        )

    def fits(limit: int) -> bool:
        taken = cohort * limit
        if taken >= half:
            return False
        share = at(limit).share_variance
        narrow = kind != "skellam" or share <= MAX_SKELLAM_SIGMA**2
        return narrow and taken + headroom * sqrt(cohort * share) < half

    low, high = 0, half // cohort + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    # Rounding adds up to a quarter a coordinate to the squared norm, at the expense of the update.
    if not low or (low / flat) ** 2 < ROUNDING_ROOM * coordinates / 4:
        raise ConfigError(
            f"{bits} bits are too few for {coordinates} rotated coordinates of {cohort} devices at "
            f"epsilon={epsilon:g}, delta={delta:g}.",
            hint="Set secure.bits = 32, or allow a larger epsilon.",
        )
    return at(low)


def truncated_norms(grid: float, coordinates: int) -> tuple[float, float]:
    """(L1, L2) bounds of integers truncated toward zero from a vector of norm ``grid``.

    Truncation never raises a norm; an integer's absolute value is at most its square.
    """
    return min(sqrt(coordinates) * grid, grid**2), grid


def rounded_norms(grid: float, coordinates: int, beta: float = exp(-0.5)) -> tuple[float, float]:
    """(L1, L2) bounds under conditional randomised rounding (Kairouz, Liu and Steinke 2021, Proposition 22).

    Not used by our pipeline; kept to reproduce published numbers.
    """
    root = sqrt(coordinates)
    conditional = sqrt(grid**2 + coordinates / 4 + sqrt(2 * log(1 / beta)) * (grid + root / 2))
    l2 = min(grid + root, conditional)
    return l2 * min(root, l2), l2


def noise_variance(
    kind: Kind, l1: float, l2: float, shares: int, coordinates: int, events: int, epsilon: float, delta: float
) -> float:
    """The least variance of the whole noise that reaches the target over ``events`` releases."""

    def cost(multiplier: float) -> dict[Event, int]:
        return {_event(kind, l1, l2, (multiplier * l2) ** 2 / shares, shares, coordinates): events}

    return (calibrate(cost, epsilon, delta, RdpGate()) * l2) ** 2


def ring_scale(
    variance_of_share: Callable[[float], float],
    *,
    clip_norm: float,
    coordinates: int,
    cohort: int,
    bits: int,
    headroom: float = HEADROOM,
) -> float:
    """The finest scale (grid steps to one unit) that fits the ring after a random rotation.

    ``2**bits >= 2 k sqrt(c^2 s^2 n^2 / D + n / 4 + n v(s))``; the published rule (same source), by bisection,
    which unlike a minimiser cannot return nonsense when nothing fits.

    Raises:
        ConfigError: no scale fits.
    """

    def fits(scale: float) -> bool:
        flat = (clip_norm * scale * cohort) ** 2 / coordinates
        try:
            spread = flat + cohort / 4 + cohort * variance_of_share(scale)
        except ConfigError:
            return False
        return 2 * headroom * sqrt(spread) <= 2.0**bits

    low, high = log(1e-3), log(MAX_GRID / clip_norm)
    candidates = [low + (high - low) * i / 64 for i in range(65)]
    feasible = [x for x in candidates if fits(exp(x))]
    if not feasible:
        raise ConfigError(f"No scale fits {bits} bits for {cohort} devices.", hint="Allow more bits.")
    low = max(feasible)
    high = min((x for x in candidates if x > low), default=low)
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(exp(middle)) else (low, middle)
    return exp(low)


def _event(kind: Kind, l1: float, l2: float, share: float, shares: int, coordinates: int) -> Event:
    if kind == "skellam":
        return Skellam(l1, l2, share * shares)
    return DistributedGaussian(l1, l2, share * shares, float(shares), float(coordinates))


def _bits_needed(largest: float, sigma: float, headroom: float) -> int:
    """Of a two's-complement ring for a sum within ``largest`` and noise of ``sigma``."""
    return ceil(log2(largest + headroom * sigma + 1)) + 1


def _check_counts(
    cohort: int, survivors: int, colluders: int, bits: int, coordinates: int, events: int, clip_norm: float
) -> None:
    if not 1 <= survivors <= cohort:
        raise ConfigError(f"Expected 1 <= survivors <= cohort={cohort}, got {survivors}.")
    if not 0 <= colluders < survivors:
        raise ConfigError(f"Expected 0 <= colluders < survivors={survivors}, got {colluders}.")
    if not (2 <= bits <= 62 and coordinates >= 1 and events >= 1):
        raise ConfigError(
            f"Expected 2 to 62 bits, at least 1 coordinate and 1 event, got {bits}, {coordinates}, {events}."
        )
    if not (clip_norm > 0 and isfinite(clip_norm)):
        raise ConfigError(f"Expected clip_norm > 0 and finite, got {clip_norm}.")
