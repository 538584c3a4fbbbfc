"""Example-level privacy on one device: how rows are drawn, what a training costs, how much noise it needs.

    charge = charge_of(plan.local, rows=len(data))   # one round of one device
    charge.events                                    # {PoissonGaussian(0.28, 1.1): 40}
    rows = poisson_rows(len(data), charge.rate, stream)

A device draws its own rows with its own secret coins, so that amplification by Poisson sampling holds here,
where it does not hold for cohorts. Adjacency is zero-out: one row is replaced by one without a gradient; how
many rows a device has is public, and so are the rate and the number of steps that follow from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, exp, log, sqrt

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import BudgetRefused, ConfigError
from lepton_fl.plan import LocalPlan
from lepton_fl.privacy.accounting import RdpGate, best_accountant, calibrate, gaussian_multiplier
from lepton_fl.privacy.events import Event, Gaussian, PoissonGaussian
from lepton_fl.privacy.noise import BLOCK, Keystream

RATE_GRID = 0.01  # rates are rounded up to steps of 1 %, so that equal events group


@dataclass(frozen=True)
class Charge:
    """What one round of DP-SGD costs each row of one device.

    Attributes:
        rate: the probability that a row is in a batch.
        noise_multiplier: standard deviation of a step's noise, in clip norms.
        steps: how many there are, empty batches included.
        delta: of the run's claim.
        epsilon: what all of this device's part in the run may cost; 0 = the run names none.
        participations: rounds of the run in which this device may train.
    """

    rate: float
    noise_multiplier: float
    steps: int
    delta: float
    epsilon: float
    participations: int

    @property
    def event(self) -> Event:
        """One step."""
        if self.rate == 1:
            return Gaussian(self.noise_multiplier)
        return PoissonGaussian(self.rate, self.noise_multiplier)

    @property
    def events(self) -> Mapping[Event, int]:
        """One round."""
        return {self.event: self.steps}


@dataclass(frozen=True, eq=False)
class Spent:
    """A charge that was accepted, and the randomness that may be used for it, once."""

    charge: Charge
    stream: Keystream


def charge_of(local: LocalPlan, rows: int) -> Charge:
    """What a device with so many rows is charged for a round.

    Args:
        local: with ``example_privacy``.
        rows: the device holds; at least one.

    Raises:
        ConfigError: the plan asks for no example-level privacy, or no noise is enough.
        BudgetRefused: delta is above one over the rows: that would allow to publish one of them.
    """
    asked = local.example_privacy
    if asked is None or rows < 1:
        raise ConfigError(f"Expected a plan with example-level privacy and rows, got {asked} and {rows}.")
    if asked.delta * rows > 1:
        raise BudgetRefused(
            f"The run's delta={asked.delta:g} is above 1/{rows}, one over the rows of this device: it would "
            "allow to publish one of them whole.",
            hint=f"Ask for delta <= {1 / rows:.1e}.",
        )
    rate, steps = sampling_rate(rows, local.batch_size), num_steps(local, rows)
    multiplier = asked.noise_multiplier or example_multiplier(
        rate, steps * asked.participations, asked.epsilon, asked.delta
    )
    return Charge(rate, multiplier, steps, asked.delta, asked.epsilon, asked.participations)


def num_steps(local: LocalPlan, rows: int) -> int:
    """Batches of a round: as many as without privacy."""
    steps = local.epochs * ceil(rows / local.batch_size)
    return min(steps, local.max_steps) if local.max_steps else steps


def sampling_rate(rows: int, batch_size: int) -> float:
    """The probability of a row: ``batch_size / rows``, rounded up, so that few rates are distinct."""
    if batch_size >= rows:
        return 1.0
    steps = ceil(log(batch_size / rows) / log(1 + RATE_GRID) - 1e-9)
    return min(1.0, exp(steps * log(1 + RATE_GRID)))


@lru_cache(maxsize=1024)
def example_multiplier(rate: float, steps: int, epsilon: float, delta: float) -> float:
    """The noise of a step at which so many of them cost at most epsilon; a second of work.

    Raises:
        ConfigError: no noise is enough.
    """
    if rate == 1:
        return gaussian_multiplier(epsilon, delta) * sqrt(steps)

    def events(multiplier: float) -> Mapping[Event, int]:
        return {PoissonGaussian(rate, multiplier): steps}

    return calibrate(events, epsilon, delta, RdpGate(), (0.2, 1e4), 1e-3)


def example_epsilon(rate: float, steps: int, noise_multiplier: float, delta: float) -> float:
    """What so many steps cost, as the device's ledger counts."""
    events = Charge(rate, noise_multiplier, steps, delta, 0.0, 1).events
    return best_accountant(events).epsilon(events, delta)


def poisson_rows(count: int, rate: float, stream: Keystream) -> NDArray[np.int64]:
    """The rows of one batch, each drawn by its own secret coin; there may be none.

    Args:
        count: rows there are.
        rate: the probability of each, exact to 2**-53.
        stream: the coins.
    """
    if rate >= 1:
        return np.arange(count)
    limit = np.uint64(int(rate * 2**64))
    return np.concatenate(
        [
            start + np.flatnonzero(stream.words(min(BLOCK, count - start)) < limit)
            for start in range(0, count, BLOCK)
        ]
    )
