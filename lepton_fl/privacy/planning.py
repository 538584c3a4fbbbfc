"""The choices side by side, before anything is spent: epsilon to noise and back, for every mechanism.

contract = Contract(rounds=2000, cohort=1000, population=100_000, min_separation=100)
multiplier_for("blt", contract, epsilon=2.8, delta=1e-6)          # noise of a round, in clip norms
epsilon_for("blt", contract, noise_multiplier=7.4, delta=1e-6)
for choice in choices(contract, epsilon=2.8, delta=1e-6):         # a row a mechanism
    print(choice.mechanism, choice.noise_multiplier, choice.final_noise)
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

from lepton_fl.errors import ConfigError
from lepton_fl.plan import PrivacySpec
from lepton_fl.privacy.accounting import (
    Accountant,
    Adjacency,
    PldReport,
    RdpGate,
    best_accountant,
    calibrate,
    gaussian_multiplier,
)
from lepton_fl.privacy.clipping import AdaptiveClip, norm_bound
from lepton_fl.privacy.distributed import DistributedNoise, plan_distributed
from lepton_fl.privacy.events import Event, Gaussian, PoissonGaussian
from lepton_fl.privacy.factorization import (
    INDEPENDENT,
    Banded,
    Blt,
    error,
    optimise_banded,
    optimise_blt,
    participations,
    sensitivity,
)
from lepton_fl.privacy.mechanisms import Correlated, Independent, ReleaseMechanism

Central = Literal["every-round", "independent", "banded", "blt", "poisson"]
CENTRAL: tuple[Central, ...] = ("every-round", "independent", "banded", "blt", "poisson")


@dataclass(frozen=True)
class Contract:
    """How often devices take part.

    Attributes:
        rounds: of the run.
        cohort: devices a round, the public denominator of the mean.
        population: devices that could ever take part; 0 = not known.
        min_separation: rounds from one participation of a device to its next.
        max_participations: of a device; 0 = as the separation allows.
    """

    rounds: int
    cohort: int
    population: int = 0
    min_separation: int = 1
    max_participations: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "cohort", "min_separation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} >= 1, got {getattr(self, name)}.")
        if 0 < self.population < self.cohort * self.min_separation:
            raise ConfigError(
                f"Expected a population of at least cohort * min_separation = "
                f"{self.cohort * self.min_separation}, got {self.population}.",
                hint=f"With this population, min_separation can be {max(1, self.population // self.cohort)}.",
            )

    @property
    def times(self) -> int:
        """The most rounds one device takes part in."""
        return participations(self.rounds, self.min_separation, self.max_participations)


@dataclass(frozen=True)
class Choice:
    """One row of the table: a mechanism and what it is worth under a contract."""

    mechanism: Central
    noise_multiplier: float  # standard deviation of a round's fresh noise, in clip norms
    epsilon: float
    final_noise: float  # standard deviation of the final model's noise, a coordinate, in clip norms
    mean_noise: float  # the same, root mean square over the models of all rounds
    caveat: str = ""


def events_of(mechanism: Central, contract: Contract, noise_multiplier: float) -> dict[Event, int]:
    """What a whole run costs."""
    if mechanism == "every-round":  # no contract: every device is taken to be in every round
        return {Gaussian(noise_multiplier): contract.rounds}
    if mechanism == "poisson":
        return {PoissonGaussian(_sampling_rate(contract), noise_multiplier): contract.rounds}
    return {Gaussian(noise_multiplier / _sensitivity(mechanism, contract)): 1}


def epsilon_for(
    mechanism: Central,
    contract: Contract,
    noise_multiplier: float,
    delta: float,
    adjacency: Adjacency = "zero-out",
) -> float:
    """The epsilon of a whole run at this noise."""
    events = events_of(mechanism, contract, noise_multiplier)
    return _reader(mechanism, events, adjacency).epsilon(events, delta)


def multiplier_for(
    mechanism: Central, contract: Contract, epsilon: float, delta: float, adjacency: Adjacency = "zero-out"
) -> float:
    """The noise a whole run needs to stay within epsilon."""
    if mechanism != "poisson":  # one Gaussian: solved exactly
        whole = gaussian_multiplier(epsilon, delta) * (2 if adjacency == "replace-one" else 1)
        return whole * (
            sqrt(contract.rounds) if mechanism == "every-round" else _sensitivity(mechanism, contract)
        )

    def events(multiplier: float) -> dict[Event, int]:
        return events_of(mechanism, contract, multiplier)

    # Rényi divergences are quick and never too little; the exact answer is at most a half below.
    enough = calibrate(events, epsilon, delta, RdpGate(adjacency), (0.05, 1e5), 1e-3)
    reader = _reader(mechanism, events(1.0), adjacency)
    return calibrate(events, epsilon, delta, reader, (enough / 2, enough), 1e-3)


def choices(
    contract: Contract, epsilon: float, delta: float, adjacency: Adjacency = "zero-out"
) -> tuple[Choice, ...]:
    """The trade-off at equal privacy, a row a mechanism; the sampled one only where a population is known."""
    found = []
    for mechanism in CENTRAL:
        if mechanism == "poisson" and not (contract.population and adjacency == "zero-out"):
            continue
        multiplier = multiplier_for(mechanism, contract, epsilon, delta, adjacency)
        found.append(_choice(mechanism, contract, multiplier, epsilon))
    return tuple(found)


def multiplier_at_noise(mechanism: Central, contract: Contract, final_noise: float) -> float:
    """The noise of a round at which the final model has this much: to compare epsilon at equal noise."""
    return final_noise / _choice(mechanism, contract, 1.0, 0.0).final_noise


def epsilon_curve(
    mechanism: Central, contract: Contract, noise_multiplier: float, delta: float, rounds: Iterable[int]
) -> list[tuple[int, float]]:
    """Epsilon against the length of the run, for a plot."""
    return [(n, epsilon_for(mechanism, replace(contract, rounds=n), noise_multiplier, delta)) for n in rounds]


def spending_curve(
    mechanism: Central,
    contract: Contract,
    noise_multiplier: float,
    delta: float,
    rounds: Iterable[int],
    adjacency: Adjacency = "zero-out",
) -> list[tuple[int, float]]:
    """Epsilon of the first n rounds of one run, for a plot: what it is worth if it ends there."""
    factors, found = _factorization(mechanism, contract), []
    for n in rounds:
        if mechanism in ("every-round", "poisson"):
            events = events_of(mechanism, replace(contract, rounds=n), noise_multiplier)
        else:
            moved = sensitivity(factors, n, contract.min_separation, contract.max_participations)
            events = {Gaussian(noise_multiplier / moved): 1}
        found.append((n, _reader(mechanism, events, adjacency).epsilon(events, delta)))
    return found


def _choice(mechanism: Central, contract: Contract, multiplier: float, epsilon: float) -> Choice:
    factors = _factorization(mechanism, contract)
    terms = (contract.rounds, contract.min_separation, contract.max_participations)
    noise, sens = error(factors, *terms), sensitivity(factors, *terms)
    caveat = "only if every registered device always answers" if mechanism == "poisson" else ""
    per_round = multiplier / sens
    return Choice(mechanism, multiplier, epsilon, noise.final * per_round, noise.mean * per_round, caveat)


def _factorization(mechanism: Central, contract: Contract) -> Blt | Banded:
    terms = (contract.rounds, contract.min_separation, contract.max_participations)
    if mechanism == "blt":
        return optimise_blt(*terms)
    return optimise_banded(*terms) if mechanism == "banded" else INDEPENDENT


def _sensitivity(mechanism: Central, contract: Contract) -> float:
    terms = (contract.rounds, contract.min_separation, contract.max_participations)
    return sensitivity(_factorization(mechanism, contract), *terms)


def _sampling_rate(contract: Contract) -> float:
    if not contract.population:
        raise ConfigError(
            "Sampling can only be accounted for in a registered population; its size is not given."
        )
    return min(1.0, contract.cohort / contract.population)


def _reader(mechanism: Central, events: dict[Event, int], adjacency: Adjacency) -> Accountant:
    return PldReport(adjacency, 1e-3) if mechanism == "poisson" else best_accountant(events, adjacency)


# ------------------------------------------------------------------------------------------ from spec to code


@dataclass(frozen=True)
class Prepared:
    """Everything a private run needs, decided before it starts.

    Attributes:
        mechanism: at the coordinator; None if the devices add the noise.
        distributed: what the devices add; None if the coordinator does.
        clip: of the first round; None for a fixed one.
        clip_height: of the extra coordinate, grid steps; 0 without one.
        noise_multiplier: of a round, in clip norms.
        planned: what the whole run costs, counted; what :class:`Budget` must allow.
        epsilon: of that.
    """

    mechanism: ReleaseMechanism | None
    distributed: DistributedNoise | None
    clip: AdaptiveClip | None
    clip_height: int
    noise_multiplier: float
    planned: dict[Event, int]
    epsilon: float

    def reclipped(self, noisy_sum: int, *, cohort: int, grid_step: float) -> "Prepared":
        """The next round's, after the extra coordinate of this one was released as ``noisy_sum``.

        Noise and height follow the new clip, so every round costs the same.
        """
        if self.clip is None or not isinstance(self.mechanism, Independent):
            return self
        clip = self.clip.updated(noisy_sum, self.clip_height, cohort)
        height = clip.height(clip.clip_norm / grid_step, self.noise_multiplier)
        bound = norm_bound(clip.clip_norm / grid_step, height)
        mechanism = replace(self.mechanism, norm_bound=bound)
        return replace(self, mechanism=mechanism, clip=clip, clip_height=height)


def prepare(spec: PrivacySpec, *, rounds: int, cohort: int, coordinates: int, grid_step: float) -> Prepared:
    """Make the mechanism that a specification asks for.

    Args:
        spec: of a device-level guarantee.
        rounds: of the run.
        cohort: devices planned a round, the public denominator.
        coordinates: of an update, without the extra one of adaptive clipping.
        grid_step: of the updates; a distributed mechanism brings its own.

    Raises:
        ConfigError: the numbers contradict each other, or the guarantee is not device-level.
    """
    if spec.unit != "device":
        raise ConfigError("Example-level privacy is a matter of the devices; nothing is added to a sum.")
    contract = Contract(rounds, cohort, spec.population, spec.min_separation, spec.max_participations)
    if spec.trust == "distributed":
        return _prepare_distributed(spec, contract, coordinates)
    name = _central_name(spec)
    multiplier = spec.noise_multiplier or multiplier_for(
        name, contract, spec.epsilon, spec.delta, spec.adjacency
    )
    grid_norm, clip, height = spec.clip_norm / grid_step, None, 0
    if spec.adaptive_clip is not None:
        adaptive = spec.adaptive_clip
        bit_noise = adaptive.bit_noise or cohort / 20
        # The highest clip still leaves every coordinate an int32.
        clip = AdaptiveClip(
            spec.clip_norm, bit_noise, adaptive.target, adaptive.rate, 16 * grid_step, 2.0**30 * grid_step
        )
        height = clip.height(grid_norm, multiplier)
    events = events_of(name, contract, multiplier)
    epsilon = _reader(name, events, spec.adjacency).epsilon(events, spec.delta)
    bound = norm_bound(grid_norm, height)
    mechanism = _mechanism(spec, contract, multiplier, bound, coordinates + (height > 0))
    return Prepared(mechanism, None, clip, height, multiplier, events, epsilon)


def _central_name(spec: PrivacySpec) -> Central:
    if spec.mechanism == "blt":
        return "blt"
    if spec.mechanism == "banded":
        return "banded"
    if spec.sampling == "poisson":
        return "poisson"
    return "independent" if spec.has_contract else "every-round"


def _mechanism(
    spec: PrivacySpec, contract: Contract, multiplier: float, bound: float, coordinates: int
) -> ReleaseMechanism:
    name = _central_name(spec)
    if name in ("every-round", "independent", "poisson"):
        rate = _sampling_rate(contract) if name == "poisson" else 1.0
        return Independent(multiplier, bound, contract.times if name == "independent" else 0, rate)
    terms = (contract.rounds, contract.min_separation, contract.max_participations)
    factors = _factorization(name, contract)
    if name == "banded" and spec.bands:
        factors = optimise_banded(*terms, spec.bands)
    return Correlated(factors, *terms, multiplier, bound, coordinates)


def _prepare_distributed(spec: PrivacySpec, contract: Contract, coordinates: int) -> Prepared:
    if not spec.epsilon:
        raise ConfigError(
            "Distributed noise is planned from epsilon and delta; noise_multiplier was given.",
            hint="`lepton privacy plan` shows which epsilon a noise multiplier is worth.",
        )
    if spec.adjacency != "zero-out":
        raise ConfigError("Distributed noise is planned under adjacency='zero-out'.")
    survivors = max(1, int(spec.min_survivors * contract.cohort))
    noise = plan_distributed(
        kind="ddgauss" if spec.mechanism == "ddgauss" else "skellam",
        clip_norm=spec.clip_norm,
        coordinates=coordinates,
        cohort=contract.cohort,
        survivors=survivors,
        colluders=int(spec.colluders * contract.cohort),
        bits=spec.bits,
        events=contract.times,
        epsilon=spec.epsilon,
        delta=spec.delta,
    )
    events = {noise.planned_event: contract.times}
    honest = survivors - int(spec.colluders * contract.cohort)
    multiplier = sqrt(noise.share_variance * honest) / noise.l2
    return Prepared(
        None, noise, None, 0, multiplier, events, best_accountant(events).epsilon(events, spec.delta)
    )
