"""Guarantees of every unit and trust side by side, before anything is spent. They are never added up.

rings = (Ring(32, 1000), Ring(16, 1000, flat=0.004))
for row in guarantees(contract, 8.0, 1e-6, Masked(100_000, rings), Rows(count=500)):
    print(row.mechanism, row.unit, row.trust, row.adjacency, row.delta, row.noise_multiplier, row.caveat)
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Literal

from lepton_fl.errors import BudgetRefused, ConfigError
from lepton_fl.plan import ExamplePrivacy, LocalPlan, PrivacySpec
from lepton_fl.privacy.accounting import Adjacency, best_accountant
from lepton_fl.privacy.distributed import DistributedNoise, Kind
from lepton_fl.privacy.events import Event
from lepton_fl.privacy.example import charge_of
from lepton_fl.privacy.factorization import participations
from lepton_fl.privacy.planning import Choice, Contract, Ring, choices, prepare, spending_curve

FLAT_STEPS = 4.0  # of a flat update's coordinate: with so many, truncation costs no accuracy (measured)
WIDEST_RING = 32
KINDS: tuple[Kind, ...] = ("skellam", "ddgauss")

Curve = Callable[[Iterable[int]], list[tuple[int, float]]]  # rounds to (round, epsilon so far)


@dataclass(frozen=True)
class Masked:
    """Sums that nobody sees without the devices' noise.

    Attributes:
        coordinates: of an update.
        rings: to plan for; a sum is of ``Ring.asked`` devices.
        bits: of the ring that sums of 32-bit coordinates may fill.
        min_survivors: share of the devices asked; with fewer there is no sum.
        colluders: share of the devices asked that may tell the coordinator their noise.
    """

    coordinates: int
    rings: tuple[Ring, ...]
    bits: int = 20
    min_survivors: float = 0.7
    colluders: float = 0.0


@dataclass(frozen=True)
class Rows:
    """One device's rows and its training; ``participations`` of 0 = in every round."""

    count: int
    batch_size: int = 32
    epochs: int = 1
    participations: int = 0
    delta: float = 0.0  # 0 = that of the device-level guarantees


@dataclass(frozen=True)
class Guarantee:
    """One row: on what unit, against whom, and the noise it takes; None = does not apply, or cannot be had.

    Attributes:
        noise_multiplier: of a round in clip norms, the least there is; for rows, of a step in norms of a row.
        final_noise: of the final model, a coordinate, in clip norms of the sum; every device answers.
        mean_noise: the same, root mean square over the models of all rounds.
        ring: bits of a coordinate on the wire; 16 are rotated.
        bits: that sums fill.
        needed_bits: the fewest with which updates come through.
        min_survivors: devices of a sum; with fewer there is none.
        caveat: what has to hold, or why it cannot be had.
        curve: epsilon of the first rounds, by itself.
    """

    mechanism: str
    unit: Literal["device", "example"]
    trust: Literal["central", "distributed", "local"]
    adjacency: Adjacency
    epsilon: float
    delta: float
    noise_multiplier: float | None = None
    final_noise: float | None = None
    mean_noise: float | None = None
    ring: int | None = None
    bits: int | None = None
    needed_bits: int | None = None
    min_survivors: int | None = None
    caveat: str = ""
    curve: Curve | None = field(default=None, repr=False, compare=False)


def guarantees(
    contract: Contract, epsilon: float, delta: float, masked: Masked | None = None, rows: Rows | None = None
) -> tuple[Guarantee, ...]:
    """Each guarantee at the same epsilon, under zero-out adjacency.

    Args:
        contract: of the devices.
        epsilon: of each guarantee by itself, for a whole run.
        delta: of it.
        masked: for the rows of distributed trust; None = none.
        rows: for that of single examples; None = none.

    Raises:
        ConfigError: the numbers contradict each other. What cannot be had says so in its row.
    """
    found = [_central(choice, contract, delta) for choice in choices(contract, epsilon, delta)]
    if masked is not None:
        found += _distributed(contract, epsilon, delta, masked)
    if rows is not None:
        found.append(_example(contract, epsilon, rows.delta or delta, rows))
    return tuple(found)


def _central(choice: Choice, contract: Contract, delta: float) -> Guarantee:
    def curve(rounds: Iterable[int]) -> list[tuple[int, float]]:
        return spending_curve(choice.mechanism, contract, choice.noise_multiplier, delta, rounds)

    return Guarantee(
        choice.mechanism,
        "device",
        "central",
        "zero-out",
        choice.epsilon,
        delta,
        choice.noise_multiplier,
        choice.final_noise,
        choice.mean_noise,
        caveat=choice.caveat,
        curve=curve,
    )


# --- distributed trust


def _distributed(contract: Contract, epsilon: float, delta: float, masked: Masked) -> Iterator[Guarantee]:
    for kind in KINDS:
        for ring in masked.rings:
            row = Guarantee(kind, "device", "distributed", "zero-out", epsilon, delta, ring=ring.bits)
            needed = _needed_bits(kind, contract, epsilon, delta, masked, ring)
            row = replace(row, needed_bits=needed, bits=ring.bits if ring.flat else masked.bits)
            try:
                noise = _noise(kind, contract, epsilon, delta, masked, ring)
            except ConfigError as error:
                yield replace(row, caveat=str(error))
                continue
            yield _with_noise(row, contract, noise, masked.coordinates)


def _with_noise(row: Guarantee, contract: Contract, noise: DistributedNoise, coordinates: int) -> Guarantee:
    honest = noise.min_survivors - noise.colluders
    final = noise.multiplier * sqrt(contract.cohort / honest * contract.rounds)

    def events(rounds: int) -> dict[Event, int]:
        times = participations(rounds, contract.min_separation, contract.max_participations)
        return {noise.planned_event: times}

    steps = noise.l2 / sqrt(coordinates)
    coarse = f"coarse: a flat update's coordinate is {steps:.2g} steps, and what is below one is lost"
    return replace(
        row,
        noise_multiplier=noise.multiplier,
        final_noise=final,
        mean_noise=final * sqrt((contract.rounds + 1) / (2 * contract.rounds)),
        min_survivors=noise.min_survivors,
        caveat="" if noise.limit or steps >= FLAT_STEPS else coarse,
        curve=_curve(events, row.delta),
    )


def _noise(
    kind: Kind, contract: Contract, epsilon: float, delta: float, masked: Masked, ring: Ring
) -> DistributedNoise:
    """What a run with this ring would get."""
    spec = PrivacySpec(
        trust="distributed",
        mechanism=kind,
        epsilon=epsilon,
        delta=delta,
        population=contract.population,
        min_separation=contract.min_separation,
        max_participations=contract.max_participations,
        bits=masked.bits,
        min_survivors=masked.min_survivors,
        colluders=masked.colluders,
    )
    ready = prepare(
        spec,
        rounds=contract.rounds,
        cohort=ring.asked,
        coordinates=masked.coordinates,
        grid_step=1.0,
        ring=ring,
    )
    assert isinstance(ready.mechanism, DistributedNoise)  # the trust that was asked for
    return ready.mechanism


def _needed_bits(
    kind: Kind, contract: Contract, epsilon: float, delta: float, masked: Masked, ring: Ring
) -> int | None:
    """The fewest with which a rotated update can be sent, or truncation leaves a flat one as it is."""

    def enough(bits: int) -> bool:
        wider = replace(ring, bits=bits)
        try:
            noise = _noise(kind, contract, epsilon, delta, replace(masked, bits=bits), wider)
        except ConfigError:
            return False
        return bool(noise.limit) or noise.l2 >= FLAT_STEPS * sqrt(masked.coordinates)

    low, high = 1, WIDEST_RING + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high if high <= WIDEST_RING else None


# --- single examples


def _example(contract: Contract, epsilon: float, delta: float, rows: Rows) -> Guarantee:
    row = Guarantee("dp-sgd", "example", "local", "zero-out", epsilon, delta)
    times = min(contract.rounds, rows.participations or contract.rounds)
    asked = ExamplePrivacy(clip_norm=1.0, epsilon=epsilon, delta=delta, participations=times)
    local = LocalPlan(batch_size=rows.batch_size, epochs=rows.epochs, example_privacy=asked)
    try:
        charge = charge_of(local, rows.count)
    except (BudgetRefused, ConfigError) as refusal:
        return replace(row, caveat=str(refusal))

    def events(rounds: int) -> dict[Event, int]:
        return {charge.event: charge.steps * min(rounds, times)}

    return replace(
        row,
        noise_multiplier=charge.noise_multiplier,
        caveat=f"noise of a step, in norms of a row: {rows.count} rows, {charge.steps} steps a round at rate "
        f"{charge.rate:.2g}, {times} rounds",
        curve=_curve(events, delta),
    )


def _curve(events: Callable[[int], dict[Event, int]], delta: float) -> Curve:
    def curve(rounds: Iterable[int]) -> list[tuple[int, float]]:
        return [(n, best_accountant(events(n)).epsilon(events(n), delta)) for n in rounds]

    return curve
