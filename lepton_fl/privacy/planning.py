"""The choices side by side, before anything is spent: epsilon to noise and back, for every mechanism.

contract = Contract(rounds=2000, cohort=1000, population=100_000, min_separation=100)
multiplier_for("blt", contract, epsilon=2.8, delta=1e-6)          # noise of a round, in clip norms
epsilon_for("blt", contract, noise_multiplier=7.4, delta=1e-6)
for choice in choices(contract, epsilon=2.8, delta=1e-6):         # a row a mechanism
    print(choice.mechanism, choice.noise_multiplier, choice.final_noise)
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil, floor, log2, sqrt
from typing import Any, Literal

from lepton_fl.errors import ConfigError
from lepton_fl.plan import PrivacySpec, PrivatePart
from lepton_fl.privacy.accounting import (
    Accountant,
    Adjacency,
    PldReport,
    RdpGate,
    best_accountant,
    calibrate,
    gaussian_multiplier,
)
from lepton_fl.privacy.clipping import AdaptiveClip
from lepton_fl.privacy.distributed import DistributedNoise, Kind, plan_distributed, plan_rotated
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
LARGEST = 2.0**30  # grid steps of one device's vector: every coordinate is an int32
LEAST_STEPS = 1024.0  # of an adaptive clip norm: below, truncation would eat the update
LOWEST_CLIP, HIGHEST_CLIP = 2.0**-30, 2.0**30  # of an adaptive one
USUAL_PART = 0.1  # of the squared norm: what following a quantile may take, if nobody says more
NOTCHES = 8  # clip norms of an adaptive clip to a factor of two
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
class Ring:
    """Where the sums of a run live, if the coordinator learns sums only.

    Attributes:
        bits: of a coordinate.
        asked: devices of one sum, at most.
        flat: largest magnitude of a rotated coordinate over the norm of its vector; 0 = not rotated.
    """

    bits: int
    asked: int
    flat: float = 0.0


@dataclass(frozen=True)
class Shape:
    """The numbers of one attempt."""

    clip_norm: float
    grid_step: float
    part: PrivatePart
    norm_bound: float  # grid steps: of update and tail together


@dataclass(frozen=True)
class Prepared:
    """Everything a private run needs, decided before it starts.

    Attributes:
        mechanism: adds noise at the coordinator, or knows what the devices add; says what a round costs.
        clip: of the first round; None for a fixed one.
        noise_multiplier: of a round, in norms of update and tail together.
        planned: what the whole run costs, counted; what :class:`Budget` must allow.
        epsilon: of that.
        clip_norm: of the first round.
        grid_step: of the updates: where the clip moves, the finest.
        largest: norm of update and tail, grid steps, at most; the step follows a clip that moves.
        part: what devices do besides clipping; heights and variance follow a clip that moves.
        metrics: their share of the squared norm.
    """

    mechanism: ReleaseMechanism
    clip: AdaptiveClip | None
    noise_multiplier: float
    planned: dict[Event, int]
    epsilon: float
    clip_norm: float
    grid_step: float
    largest: float
    part: PrivatePart
    metrics: float

    @property
    def distributed(self) -> DistributedNoise | None:
        """What the devices add; None if the coordinator does."""
        return self.mechanism if isinstance(self.mechanism, DistributedNoise) else None

    def shape(self, clip: AdaptiveClip | None) -> Shape:
        """The numbers of an attempt with this clip; None = the fixed one."""
        tail = self.metrics + (clip.part(self.noise_multiplier) ** 2 if clip else 0.0)
        room = sqrt(1 - tail)  # of the norm: what is the update's
        if clip is None:
            step, steps = self.grid_step, self.clip_norm / self.grid_step
        else:
            step, steps = self._moved(clip.clip_norm, self.largest * room)
        whole = steps / room
        bit = max(1, floor(whole * clip.part(self.noise_multiplier))) if clip else 0
        metrics = max(1, floor(whole * sqrt(self.metrics / 2))) if self.metrics else 0
        part = self.part.model_copy(update={"bit": bit, "metrics": metrics})
        bound = part.norm_bound(steps)
        noise = self.distributed
        if noise is not None and clip is not None and not noise.limit:
            variance = noise.share_variance * (bound / noise.l2) ** 2
            part = part.model_copy(update={"share_variance": variance})
        return Shape(steps * step, step, part, bound)

    def _moved(self, wanted: float, top: float) -> tuple[float, float]:
        """Step and whole number of steps of a clip norm within a tenth of ``wanted``.

        One of eight to a factor of two, so that a run needs few tables of noise. The step is the first power
        of two on which it fits below ``top``.
        """
        step = max(self.grid_step, 2.0 ** ceil(log2(wanted / top)))
        if self.grid_step:  # the same clips wherever the sum is made
            notch = floor(NOTCHES * log2(wanted / step) + 1e-9)
            return step, max(1.0, floor(2.0 ** (notch / NOTCHES)))
        # Noise in proportion is enough down to half of the top, and not below.
        notch = min(NOTCHES - 1, ceil(NOTCHES * log2(top * step / wanted) - 1e-9))
        return step, float(floor(top * 2.0 ** (-notch / NOTCHES)))


def prepare(
    spec: PrivacySpec,
    *,
    rounds: int,
    cohort: int,
    coordinates: int,
    grid_step: float,
    survivors: int = 0,
    ring: Ring | None = None,
) -> Prepared:
    """Make the mechanism that a specification asks for.

    Args:
        spec: of a device-level guarantee.
        rounds: of the run.
        cohort: devices planned a round, the public denominator.
        coordinates: of an update, without its tail.
        grid_step: of the updates; a distributed mechanism brings its own.
        survivors: the fewest whose sum is unmasked, for noise that devices add.
        ring: of the sums; None = the coordinator adds updates itself.

    Raises:
        ConfigError: the numbers contradict each other, the ring is too small, or the guarantee is not
            device-level.
    """
    if spec.unit != "device":
        raise ConfigError("Example-level privacy is a matter of the devices; nothing is added to a sum.")
    contract = Contract(rounds, cohort, spec.population, spec.min_separation, spec.max_participations)
    if spec.trust == "distributed":
        return _prepare_distributed(spec, contract, coordinates + spec.tail_size, grid_step, survivors, ring)
    name = _central_name(spec)
    multiplier = spec.noise_multiplier or multiplier_for(
        name, contract, spec.epsilon, spec.delta, spec.adjacency
    )
    events = events_of(name, contract, multiplier)
    epsilon = _reader(name, events, spec.adjacency).epsilon(events, spec.delta)
    largest = LARGEST if ring is None else min(LARGEST, (2.0 ** (ring.bits - 1) - 1) // ring.asked)
    draft = Prepared(
        Independent(multiplier, 1.0),
        _clip(spec, contract, grid_step, multiplier),
        multiplier,
        events,
        epsilon,
        spec.clip_norm,
        grid_step,
        largest,
        _part(spec, contract, ring),
        spec.metrics.share if spec.metrics else 0.0,
    )
    bound = draft.shape(draft.clip).norm_bound
    return replace(
        draft, mechanism=_mechanism(spec, contract, multiplier, bound, coordinates + spec.tail_size)
    )


def _part(spec: PrivacySpec, contract: Contract, ring: Ring | None) -> PrivatePart:
    """All but the heights and the noise."""
    asked = ring.asked if ring else contract.cohort
    given = spec.metrics
    told = {"most_examples": given.most_examples, "most_loss": given.most_loss} if given else {}
    return PrivatePart.model_validate({"weight_cap": spec.weight_cap, "asked": asked, **told})


def _clip(spec: PrivacySpec, contract: Contract, grid_step: float, multiplier: float) -> AdaptiveClip | None:
    given = spec.adaptive_clip
    if given is None:
        return None
    # The paper's twentieth of the cohort; more where that would take a large part of the budget.
    usual = max(contract.cohort / 20, multiplier / (2 * sqrt(USUAL_PART)))
    lowest = min(spec.clip_norm, max(LOWEST_CLIP, LEAST_STEPS * grid_step))
    highest = max(spec.clip_norm, HIGHEST_CLIP)
    return AdaptiveClip(spec.clip_norm, given.bit_noise or usual, given.target, given.rate, lowest, highest)


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


def _prepare_distributed(
    spec: PrivacySpec,
    contract: Contract,
    coordinates: int,
    grid_step: float,
    survivors: int,
    ring: Ring | None,
) -> Prepared:
    if not spec.epsilon:
        raise ConfigError(
            "Distributed noise is planned from epsilon and delta; noise_multiplier was given.",
            hint="`lepton privacy plan` shows which epsilon a noise multiplier is worth.",
        )
    if spec.adjacency != "zero-out":
        raise ConfigError("Distributed noise is planned under adjacency='zero-out'.")
    ring = ring or Ring(spec.bits, contract.cohort)
    metrics = spec.metrics.share if spec.metrics else 0.0
    least = survivors or max(1, ceil(spec.min_survivors * contract.cohort - 1e-9))
    kind: Kind = "ddgauss" if spec.mechanism == "ddgauss" else "skellam"
    terms: dict[str, Any] = {
        "kind": kind,
        "coordinates": coordinates,
        "cohort": ring.asked,
        "survivors": least,
        "colluders": ceil(spec.colluders / spec.min_survivors * least - 1e-9),
        "events": contract.times,
        "epsilon": spec.epsilon,
        "delta": spec.delta,
    }
    if ring.flat:
        noise = plan_rotated(**terms, flat=ring.flat, bits=ring.bits)
        step, largest = grid_step, LARGEST
    elif spec.adaptive_clip is not None:
        noise = plan_distributed(**terms, clip_norm=1.0, bits=min(spec.bits, ring.bits), octave=True)
        step, largest = 0.0, 2 * noise.l2
    else:
        whole = spec.clip_norm / sqrt(1 - metrics)
        noise = plan_distributed(**terms, clip_norm=whole, bits=min(spec.bits, ring.bits))
        step, largest = noise.step, noise.l2
    if spec.has_contract:
        noise = replace(noise, participations=contract.times)
    part = _part(spec, contract, ring).model_copy(
        update={
            "noise": kind,
            "share_variance": noise.share_variance,
            "survivors": noise.min_survivors,
            "limit": noise.limit,
        }
    )
    clip = _clip(spec, contract, step, noise.multiplier)
    events = {noise.planned_event: contract.times}
    epsilon = best_accountant(events).epsilon(events, spec.delta)
    ready = Prepared(
        noise, clip, noise.multiplier, events, epsilon, spec.clip_norm, step, largest, part, metrics
    )
    ready.shape(clip)  # refuses a clip that cannot be followed
    return ready
