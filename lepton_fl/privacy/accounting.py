"""From events to epsilon, and back to the noise that a target needs.

Three accountants over Google's ``dp-accounting``, one interface:

* :class:`GdpExact`: exact for plain Gaussian events, whole matrix mechanisms included, and valid when later
  multipliers depend on earlier releases (Smith and Thakurta 2022; Koskela et al. 2022);
* :class:`RdpGate`: Rényi divergences of any mix of events, likewise valid as a filter (Feldman and Zrnic
  2021);
* :class:`PldReport`: the tight number of a schedule that was fixed in advance; it never opens the gate of an
  adaptive run.

    GdpExact().epsilon({Gaussian(1.0): 1}, delta=1e-6)                      # 4.89
    multiplier = calibrate(lambda z: {Gaussian(z): 20}, epsilon=8, delta=1e-6)

``dp-accounting`` treats replace-one as add-or-remove-one in places (its issue 378); here replacing a device
is twice the sensitivity, and we halve the multiplier ourselves.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import comb, exp, inf, isfinite, log, log1p, sqrt
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError
from lepton_fl.privacy.events import (
    DistributedGaussian,
    Event,
    Gaussian,
    PoissonGaussian,
    Skellam,
    Zcdp,
    composed_multiplier,
)

Adjacency = Literal["zero-out", "replace-one"]
Events = Mapping[Event, int]

INTEGER_ORDERS = (*range(2, 65), 72, 80, 96, 128, 192, 256, 384, 512, 1024)  # where Skellam's bound is proven
ORDERS: tuple[float, ...] = tuple(
    sorted({1 + x / 10 for x in range(1, 100)} | {float(a) for a in INTEGER_ORDERS})
)
LARGEST_MULTIPLIER = 1e7  # of a calibration
SMALLEST_MULTIPLIER = 1e-3
LEAST_DIVERGENCE = 1e-12  # of a sampled event, an order
PRECISION = 1e-6  # of a calibrated multiplier, relative
CLEARLY = 1e-6  # of a multiplier: far above the error of any search for it


class Accountant(Protocol):
    """Reads grouped events: ``{event: how often}``."""

    name: str

    def supports(self, event: Event) -> bool:
        """Whether this accountant can read the event under its adjacency."""

    def epsilon(self, events: Events, delta: float) -> float:
        """The smallest epsilon it can prove; infinity if none."""


class _Base(ABC):
    name = ""

    def __init__(self, adjacency: Adjacency = "zero-out") -> None:
        if adjacency not in ("zero-out", "replace-one"):
            raise ConfigError(f"Expected adjacency 'zero-out' or 'replace-one', got {adjacency!r}.")
        self.adjacency = adjacency

    @abstractmethod
    def supports(self, event: Event) -> bool: ...

    def _checked(self, events: Events, delta: float) -> dict[Event, int]:
        """The events under zero-out adjacency, those that happened at least once."""
        if not 0 < delta < 1:
            raise ConfigError(f"Expected 0 < delta < 1, got {delta}.")
        checked: dict[Event, int] = {}
        for event, count in events.items():
            if count < 0:
                raise ConfigError(f"Expected a count >= 0 of {event}, got {count}.")
            if not self.supports(event):
                raise ConfigError(
                    f"The {self.name} accountant cannot read {event.kind!r} under {self.adjacency}.",
                    hint="Use the rdp accountant, or zero-out adjacency.",
                )
            if count:
                same = self._zero_out(event)
                checked[same] = checked.get(same, 0) + count
        return checked

    def _zero_out(self, event: Event) -> Event:
        """Replacing a device moves the sum by up to twice what leaving it out does."""
        if self.adjacency == "zero-out":
            return event
        if isinstance(event, Gaussian):
            return Gaussian(event.noise_multiplier / 2)
        if isinstance(event, Zcdp):
            return Zcdp(4 * event.rho)  # leave one out, put another in: a group of two
        if isinstance(event, Skellam):
            return Skellam(2 * event.l1, 2 * event.l2, event.variance)
        if isinstance(event, DistributedGaussian):
            return DistributedGaussian(
                2 * event.l1, 2 * event.l2, event.variance, event.shares, event.coordinates
            )
        raise ConfigError(f"{event.kind!r} has no meaning under replace-one adjacency.")


class GdpExact(_Base):
    """Gaussian differential privacy: squares of 1/multiplier add up, epsilon is exact (Dong et al. 2022)."""

    name = "gdp"

    def supports(self, event: Event) -> bool:
        """Plain Gaussian events only."""
        return isinstance(event, Gaussian)

    def epsilon(self, events: Events, delta: float) -> float:
        """Exact (Balle and Wang 2018)."""
        return gaussian_epsilon(composed_multiplier(self._checked(events, delta)), delta)

    def clearly_within(self, events: Events, epsilon: float, delta: float) -> bool:
        """Whether ``epsilon`` is enough by a margin, for a thousandth of the time; False: it may be."""
        found = composed_multiplier(self._checked(events, delta))
        return found >= _least_multiplier(epsilon, delta) * (1 + CLEARLY)  # NaN compares false


class RdpGate(_Base):
    """Rényi differential privacy of any mix of events."""

    name = "rdp"

    def supports(self, event: Event) -> bool:
        """Everything but sampled events under replace-one."""
        return not (isinstance(event, PoissonGaussian) and self.adjacency == "replace-one")

    def epsilon(self, events: Events, delta: float) -> float:
        """The best over the orders, with the optimal conversion (Canonne, Kamath and Steinke 2020)."""
        checked = self._checked(events, delta)
        if not checked:
            return 0.0
        total = sum((count * renyi(event) for event, count in checked.items()), np.zeros(len(ORDERS)))
        return rdp_to_epsilon(ORDERS, total, delta)


class PldReport(_Base):
    """Privacy loss distributions: tight, for schedules fixed in advance.

    Args:
        adjacency: as for the others.
        step: of the loss grid; 1e-3 is enough for a display, 1e-4 for a report.
    """

    name = "pld"

    def __init__(self, adjacency: Adjacency = "zero-out", step: float = 1e-4) -> None:
        super().__init__(adjacency)
        self._step = step

    def supports(self, event: Event) -> bool:
        """Gaussian events, sampled ones only under zero-out."""
        return isinstance(event, Gaussian) or (
            isinstance(event, PoissonGaussian) and self.adjacency == "zero-out"
        )

    def epsilon(self, events: Events, delta: float) -> float:
        """Pessimistic on the grid."""
        import dp_accounting

        accountant = dp_accounting.pld.PLDAccountant(_zero_out_relation(), self._step)
        for event, count in self._checked(events, delta).items():
            accountant.compose(_library_event(event), count)
        return float(accountant.get_epsilon(delta))


# ------------------------------------------------------------------------------------------ the mathematics


@lru_cache(maxsize=4096)  # enclosing budgets ask for the same number
def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """The exact epsilon of one Gaussian release (Balle and Wang 2018)."""
    import dp_accounting

    if noise_multiplier in (0.0, inf):
        return 0.0 if noise_multiplier else inf
    with np.errstate(divide="ignore"):  # the logarithm of a delta of zero, on the way
        return float(dp_accounting.get_epsilon_gaussian(noise_multiplier, delta))


@lru_cache(maxsize=4096)
def _least_multiplier(epsilon: float, delta: float) -> float:
    return gaussian_multiplier(epsilon, delta)


def gaussian_multiplier(epsilon: float, delta: float) -> float:
    """The multiplier of one Gaussian release for a target, rounded to more noise in the ninth digit."""
    import dp_accounting

    _check_target(epsilon, delta)
    with np.errstate(divide="ignore"):
        return float(dp_accounting.get_sigma_gaussian(epsilon, delta)) * (1 + 1e-9)


def rdp_to_epsilon(orders: tuple[float, ...], divergences: NDArray[np.float64], delta: float) -> float:
    """The optimal conversion over these orders, never below zero."""
    import dp_accounting

    epsilon, _ = dp_accounting.rdp.compute_epsilon(orders, divergences, delta)
    return max(0.0, float(epsilon)) if not np.isnan(epsilon) else inf


@lru_cache(maxsize=4096)
def renyi(event: Event) -> NDArray[np.float64]:
    """The event's Rényi divergence at every order of ``ORDERS``; infinity where nothing is proven."""
    orders = np.array(ORDERS)
    if isinstance(event, Gaussian):
        curve = orders / (2 * event.noise_multiplier**2)
    elif isinstance(event, Zcdp):
        curve = orders * event.rho
    elif isinstance(event, PoissonGaussian):
        import dp_accounting

        known = orders >= 2  # below, its series may not converge
        accountant = dp_accounting.rdp.RdpAccountant(orders[known], _zero_out_relation())
        curve = np.full(len(orders), inf)
        # Tiny divergences come out as rounding errors, even negative ones, and those read as epsilon = 0.
        curve[known] = np.maximum(accountant.compose(_library_event(event)).rdp, LEAST_DIVERGENCE)
    elif isinstance(event, Skellam):
        curve = between_whole_orders(lambda whole: skellam_renyi(event, whole), orders)
    elif isinstance(event, DistributedGaussian):
        curve = distributed_gaussian_renyi(event, orders)
    else:
        raise ConfigError(f"No Rényi divergence is known for {event!r}.")
    curve.flags.writeable = False
    return curve


def between_whole_orders(
    curve: Callable[[NDArray[np.float64]], NDArray[np.float64]], orders: NDArray[np.float64]
) -> NDArray[np.float64]:
    """A bound at every order from one that is proven at whole orders >= 2.

    ``(a - 1) * divergence(a)`` is a cumulant generating function: convex, zero at a = 1. So the chord between
    two whole orders is an upper bound between them.
    """

    def cumulant(whole: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(whole > 1, (whole - 1) * curve(np.maximum(whole, 2)), 0.0)

    low, high = np.floor(orders), np.ceil(orders)
    part = orders - low
    bound: NDArray[np.float64] = ((1 - part) * cumulant(low) + part * cumulant(high)) / (orders - 1)
    return bound


def skellam_renyi(event: Skellam, orders: NDArray[np.float64]) -> NDArray[np.float64]:
    """Agarwal, Kairouz and Liu 2021, Theorem 3.5, for whole orders."""
    squared, variance = event.l2**2, event.variance
    first = orders * squared / (2 * variance)
    correction = ((2 * orders - 1) * squared + 6 * event.l1) / (4 * variance**2)
    bound: NDArray[np.float64] = first + np.minimum(correction, 3 * event.l1 / (2 * variance))
    return bound


def distributed_gaussian_renyi(
    event: DistributedGaussian, orders: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Kairouz, Liu and Steinke 2021, Proposition 14: a sum of discrete Gaussians is nearly one."""
    ratio, width = event.l2**2 / event.variance, sqrt(event.variance)
    tau, d = distributed_gaussian_tau(event.variance, int(event.shares)), event.coordinates
    bounds: list[NDArray[np.float64]] = [
        orders / 2 * ratio + tau * d,
        orders / 2 * (ratio + 2 * event.l1 * tau / width + tau**2 * d),
        orders / 2 * (sqrt(ratio) + sqrt(d) * tau) ** 2,
    ]
    return np.asarray(np.min(bounds, axis=0), np.float64)


def distributed_gaussian_tau(variance: float, shares: int) -> float:
    """How far the sum of ``shares`` discrete Gaussians is from one (same source, Definition 11)."""
    local = variance / shares
    # The terms fall, so the largest times their number bounds what is left out of a long sum.
    near = min(shares - 1, 1000)
    terms = [exp(-2 * np.pi**2 * local * k / (k + 1)) for k in range(1, near + 1)]
    rest = (shares - 1 - near) * (terms[-1] if terms else 0.0)
    return 10 * (sum(terms) + rest)


def poisson_amplified(
    curve: Callable[[int], float], sampling_probability: float, orders: tuple[int, ...]
) -> NDArray[np.float64]:
    """Amplification by Poisson sampling for any mechanism (Zhu and Wang 2019, Theorem 6), whole orders >= 2.

    Args:
        curve: the mechanism's divergence at a whole order.
        sampling_probability: of each device, independently.
        orders: at which to answer.
    """
    q = sampling_probability
    if q == 1:
        return np.array([curve(a) for a in orders])
    amplified = []
    for a in orders:
        terms = [(a - 1) * log1p(-q) + log(a * q - q + 1)]
        terms.append(log(comb(a, 2)) + 2 * log(q) + (a - 2) * log1p(-q) + curve(2))
        for j in range(3, a + 1):
            binomial = log(3) + log(comb(a, j)) + j * log(q) + (a - j) * log1p(-q)
            terms.append(binomial + (j - 1) * curve(j))
        amplified.append(float(np.logaddexp.reduce(terms)) / (a - 1))
    return np.array(amplified)


def _zero_out_relation() -> object:
    import dp_accounting

    # For Gaussian events the same numbers as zero-out; sampled events are defined for this relation.
    relation: object = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    return relation


def _library_event(event: Event) -> object:
    import dp_accounting

    found: object
    if isinstance(event, PoissonGaussian):
        inner = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        found = dp_accounting.PoissonSampledDpEvent(event.sampling_probability, inner)
    elif isinstance(event, Gaussian):
        found = dp_accounting.GaussianDpEvent(event.noise_multiplier)
    else:
        raise ConfigError(f"{event.kind!r} has no counterpart in dp-accounting.")
    return found


# ------------------------------------------------------------------------------------------ calibration


def best_accountant(events: Events, adjacency: Adjacency = "zero-out") -> Accountant:
    """The exact one if it can read all events, the general one otherwise."""
    exact = GdpExact(adjacency)
    return exact if all(exact.supports(e) for e in events) else RdpGate(adjacency)


def calibrate(
    events: Callable[[float], Events],
    epsilon: float,
    delta: float,
    accountant: Accountant | None = None,
    bracket: tuple[float, float] = (SMALLEST_MULTIPLIER, LARGEST_MULTIPLIER),
    precision: float = PRECISION,
) -> float:
    """The smallest multiplier z whose ``events(z)`` cost at most ``epsilon``, rounded to more noise.

    Args:
        events: what a whole run costs at multiplier z; more noise must never cost more.
        epsilon: the target.
        delta: the target's failure probability, below one over the number of devices.
        accountant: default: the best one for these events.
        bracket: where to look.
        precision: relative, of the result.

    Raises:
        ConfigError: no multiplier of the bracket reaches the target.
    """
    _check_target(epsilon, delta)
    reader = accountant or best_accountant(events(1.0))
    low, high = log(bracket[0]), log(bracket[1])
    if not reader.epsilon(events(exp(high)), delta) <= epsilon:
        raise ConfigError(
            f"No noise multiplier up to {bracket[1]:g} reaches epsilon={epsilon} at delta={delta}.",
            hint="Ask for a larger epsilon or delta, or for fewer rounds.",
        )
    while high - low > precision:
        middle = (low + high) / 2
        if reader.epsilon(events(exp(middle)), delta) <= epsilon:
            high = middle
        else:
            low = middle
    return exp(high)


def _check_target(epsilon: float, delta: float) -> None:
    if not (epsilon > 0 and isfinite(epsilon)):
        raise ConfigError(f"Expected epsilon > 0 and finite, got {epsilon}.")
    if not 0 < delta < 1:
        raise ConfigError(f"Expected 0 < delta < 1, got {delta}.")
