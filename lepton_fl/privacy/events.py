"""What a release costs, as a value: every event states its mathematics, so that two accountants can read it.

Events go into the ledger as JSON and come back through a list of allowed names; nothing is imported by name,
so a tampered ledger cannot run code.

    text = to_json(Gaussian(noise_multiplier=4.0))     # {"!": "gaussian", "noise_multiplier": 4.0}
    event = from_json(text)                            # StateCorrupt for anything else
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import floor, inf, isfinite, log, sqrt
from typing import ClassVar

from lepton_fl.errors import ConfigError, StateCorrupt

MULTIPLIER_GRID = 0.01  # varying multipliers are rounded down to steps of 1 %, so that equal events group


class Event:
    """One release. Equal events are equal values, so they can be counted."""

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, field.name)
            number = isinstance(value, float) and isfinite(value)
            if not (number and value > 0):  # written so that NaN refuses
                raise ConfigError(f"Expected {self.kind}.{field.name} > 0 and finite, got {value}.")


@dataclass(frozen=True)
class Gaussian(Event):
    """Gaussian noise of ``noise_multiplier`` sensitivities; a whole matrix mechanism is one such event."""

    kind: ClassVar[str] = "gaussian"
    noise_multiplier: float  # standard deviation / sensitivity


@dataclass(frozen=True)
class PoissonGaussian(Event):
    """The same, after each device was drawn independently with a secret coin.

    True only for a registered population that always answers; the plan refuses it elsewhere.
    """

    kind: ClassVar[str] = "poisson-gaussian"
    sampling_probability: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling_probability > 1:
            raise ConfigError(f"Expected sampling_probability <= 1, got {self.sampling_probability}.")


@dataclass(frozen=True)
class Zcdp(Event):
    """Any release that is ``rho``-zCDP (Bun and Steinke 2016)."""

    kind: ClassVar[str] = "zcdp"
    rho: float


@dataclass(frozen=True)
class Skellam(Event):
    """Skellam noise on integers (Agarwal, Kairouz and Liu 2021), in units of the grid."""

    kind: ClassVar[str] = "skellam"
    l1: float  # the largest L1 norm of one device's integers
    l2: float  # the largest L2 norm of one device's integers
    variance: float  # of the noise in the sum, from honest devices only


@dataclass(frozen=True)
class DistributedGaussian(Event):
    """A sum of discrete Gaussians (Kairouz, Liu and Steinke 2021), in units of the grid."""

    kind: ClassVar[str] = "distributed-gaussian"
    l1: float
    l2: float
    variance: float  # of the noise in the sum, from honest devices only
    shares: float  # how many honest devices added noise, a whole number
    coordinates: float  # length of the vector, a whole number


def composed(event: Event, count: int) -> Event:
    """``count`` times the same release as one event, exactly: both bounds are linear in the squares.

    For events that have no other form of composition: a contract on participations is paid at once.

    Raises:
        ConfigError: no such form is known.
    """
    if isinstance(event, Gaussian):
        return Gaussian(event.noise_multiplier / sqrt(count))
    if isinstance(event, Skellam):
        return Skellam(event.l1 * count, event.l2 * sqrt(count), event.variance)
    if isinstance(event, DistributedGaussian):
        size = event.coordinates * count
        return replace(event, l1=event.l1 * count, l2=event.l2 * sqrt(count), coordinates=size)
    raise ConfigError(f"{event.kind!r} cannot be composed to one event.")


_KINDS: Mapping[str, type[Event]] = {
    kind.kind: kind for kind in (Gaussian, PoissonGaussian, Zcdp, Skellam, DistributedGaussian)
}


def to_json(event: Event) -> str:
    """One line of canonical JSON."""
    body = {"!": event.kind, **asdict(event)}  # type: ignore[call-overload]  # every subclass is a dataclass
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def from_json(text: str) -> Event:
    """Read back what :func:`to_json` wrote.

    Raises:
        StateCorrupt: not JSON, an unknown event, a field missing or too many, or a value no event can have.
    """
    try:
        body = json.loads(text)
        kind = _KINDS[body.pop("!")]
        if set(body) != {f.name for f in fields(kind)}:  # type: ignore[arg-type]  # a dataclass, see _KINDS
            raise KeyError
        return kind(**body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise StateCorrupt(f"Expected a privacy event, got {text[:200]!r}.") from error


def quantised(noise_multiplier: float) -> float:
    """Round a multiplier down to a geometric grid of 1 %: never claims more privacy than there is."""
    step = 1 + MULTIPLIER_GRID
    down = step ** floor(log(noise_multiplier) / log(step) + 1e-12)
    return min(down, noise_multiplier)


def composed_multiplier(events: Mapping[Event, int]) -> float:
    """The multiplier of the one Gaussian that equals all of these.

    Raises:
        ConfigError: one of them is no plain Gaussian.
    """
    total = 0.0
    for event, count in events.items():
        if not isinstance(event, Gaussian):
            raise ConfigError(f"Expected Gaussian events only, got {event.kind!r}.")
        square = event.noise_multiplier**2
        total += count / square if square else inf  # too small a number to have a square
    return 1 / sqrt(total) if total else float("inf")


def counted(events: Iterable[Event]) -> dict[Event, int]:
    """Group equal events."""
    counts: dict[Event, int] = {}
    for event in events:
        counts[event] = counts.get(event, 0) + 1
    return counts
