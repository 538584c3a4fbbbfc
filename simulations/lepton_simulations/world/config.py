"""What is declared of a virtual fleet: its devices, and what goes wrong.

    [devices]
    shared_cores = 0                       # each device has its own; else all share so many cores of one host
    [[devices.classes]]
    name = "phone"
    share = 0.7
    speed = { kind = "lognormal", median = 400.0, sigma = 0.5 }   # examples per second
    down = 2e6                             # bytes per second
    up = 5e5
    availability = { kind = "charging", start_s = 79_200.0, shortest_s = 7_200.0, longest_s = 28_800.0 }
    [faults]
    drop_training = 0.05
    malicious = 0.2
    attack = "sign_flip"

Rules. A rate of 0 means "costs no time". A probability is per device and attempt, a share is of the devices
and exact. With nothing declared every device is ideal: it is always there and answers at once.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from lepton_fl.errors import ConfigError
from lepton_fl.plan import Fraction, Frozen, NonNegative, Positive

DAY_S = 86_400.0
SILENCE_S = 20.0  # after so long a coordinator gives up a device that has vanished

Attack = Literal["", "label_flip", "scaled_update", "sign_flip", "nan_update", "random_update"]
_TAKES = {"fixed": ("value",), "uniform": ("low", "high"), "lognormal": ("median", "sigma")}


class Spread(Frozen):
    """A non-negative quantity over the devices of a class; a plain number is the same for all of them."""

    kind: Literal["fixed", "uniform", "lognormal"] = "fixed"  # its law
    value: NonNegative = 0.0  # fixed
    low: NonNegative = 0.0  # uniform: from low to high
    high: NonNegative = 0.0  # uniform
    median: NonNegative = 0.0  # lognormal: median * exp(sigma * z), z standard normal
    sigma: Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)] = 0.0  # lognormal

    @model_validator(mode="before")
    @classmethod
    def _number(cls, given: Any) -> Any:  # noqa: ANN401 - what is parsed is of any type
        is_number = isinstance(given, int | float) and not isinstance(given, bool)
        return {"value": float(given)} if is_number else given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        takes = _TAKES[self.kind]
        surplus = [n for names in _TAKES.values() for n in names if n not in takes and getattr(self, n)]
        if surplus:
            raise ValueError(f"kind = {self.kind!r} takes {' and '.join(takes)}, not {', '.join(surplus)}")
        if self.low > self.high:
            raise ValueError(f"low = {self.low:g} exceeds high = {self.high:g}")
        return self


class Availability(Frozen):
    """When a device can be reached, in virtual seconds; all times repeat with ``period_s``."""

    kind: Literal["always", "daily", "charging", "trace"] = "always"  # its pattern
    period_s: Positive = DAY_S  # after which it repeats
    start_s: NonNegative = 0.0  # when the window of the earliest device opens (charging: may open)
    phase_spread: Fraction = 1.0  # devices are shifted by up to this part of the period, each by its own
    on_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5  # daily: part of the period that it is there
    jitter_s: NonNegative = 0.0  # charging: a window opens up to so much later, drawn anew each period
    shortest_s: NonNegative = 0.0  # charging: how long a window lasts, drawn anew each period
    longest_s: NonNegative = 0.0  # charging
    trace: str = ""  # CSV file with the columns device, start_s, end_s
    repeat_s: NonNegative = 0.0  # the trace starts again after so long; 0 = never

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        charging = self.jitter_s or self.shortest_s or self.longest_s
        if charging and self.kind != "charging":
            raise ValueError(
                f"jitter_s, shortest_s and longest_s belong to kind = 'charging', not {self.kind!r}"
            )
        if (self.trace or self.repeat_s) and self.kind != "trace":
            raise ValueError(f"trace and repeat_s belong to kind = 'trace', not {self.kind!r}")
        if self.kind == "trace" and not self.trace:
            raise ValueError("kind = 'trace' needs trace, the name of a CSV file")
        if self.kind == "charging":
            self._check_charging()
        return self

    def _check_charging(self) -> None:
        if not 0 < self.shortest_s <= self.longest_s:
            raise ValueError(
                f"expected 0 < shortest_s <= longest_s, got {self.shortest_s:g} and {self.longest_s:g}"
            )
        if self.jitter_s + self.longest_s > self.period_s:
            raise ValueError(
                f"jitter_s + longest_s = {self.jitter_s + self.longest_s:g} exceeds "
                f"period_s = {self.period_s:g}: windows would overlap"
            )


class DeviceClass(Frozen):
    """Devices of one kind."""

    name: str = ""  # for people; the devices' labels have it
    share: Positive = 1.0  # of the fleet, relative to the other classes
    # Instead of a share: the devices from this part of the fleet to that, in their order, as in [0.7, 1.0].
    part: tuple[Fraction, Fraction] | None = None
    speed: Spread = Spread()  # training: examples per second; 0 = takes no time
    evaluation_factor: Positive = 3.0  # evaluation is so many times faster than training
    overhead_s: Spread = Spread()  # work per request besides the examples: to wake, unpack, encode
    down: Spread = Spread()  # bytes per second; 0 = takes no time
    up: Spread = Spread()  # bytes per second
    latency_s: Spread = Spread()  # of each message
    jitter: Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)] = (
        0.0  # lognormal sigma of the working time, drawn anew for each request
    )
    availability: Availability = Availability()


class DevicesConfig(Frozen):
    """What the fleet consists of; no class = every device is ideal."""

    classes: Annotated[tuple[DeviceClass, ...], Field(max_length=1000)] = ()
    # All devices are processes of one host with so many cores, which they share evenly; 0 = each its own.
    shared_cores: NonNegative = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [c.name for c in self.classes if c.name]
        parts = [c.part for c in self.classes if c.part is not None]
        if parts and len(parts) < len(self.classes):
            raise ValueError("either all classes have a part of the fleet, or none has")
        ends = [0.0, *(end for _, end in parts)]
        if parts and (
            ends[-1] != 1.0 or any(p[0] != end or p[1] <= p[0] for p, end in zip(parts, ends, strict=False))
        ):
            raise ValueError(f"expected parts that follow each other from 0 to 1, got {parts}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two classes are named {twice[0]!r}")
        return self


class FaultsConfig(Frozen):
    """What goes wrong, and how often."""

    drop_out: Fraction = 0.0  # probability per device and attempt that it falls silent from the start
    drop_download: Fraction = 0.0  # the same, in the midst of its download
    drop_training: Fraction = 0.0  # the same, of its training
    drop_upload: Fraction = 0.0  # the same, of its upload, of a secure round's vector, too
    drop_adverts: Fraction = 0.0  # the same, before its keys for a secure round
    drop_shares: Fraction = 0.0  # the same, before its key shares
    drop_consents: Fraction = 0.0  # the same, before its signature of who has survived
    drop_reveals: Fraction = 0.0  # the same, before its shares that unmask the sum
    silence_s: NonNegative = SILENCE_S  # who is silent for so long is given up; 0 = only at the deadline
    stragglers: Fraction = 0.0  # share of devices that work and transfer slowly, always
    slowdown: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10.0  # they take so many times as long
    corrupt: Fraction = 0.0  # share of devices whose replies arrive damaged, each in its own way
    corrupt_data: Fraction = 0.0  # share of devices whose rows break the data contract
    bad_shares: Fraction = 0.0  # share of devices that deal garbage in secure rounds; each is found out
    wrong_shares: Fraction = 0.0  # share of devices that reveal false shares in secure rounds; as well
    repeats: Fraction = 0.0  # probability that a message of a secure round comes twice
    malicious: Fraction = 0.0  # share of devices that attack in every round
    attack: Attack = ""  # what the malicious ones do
    # scaled_update: times this. sign_flip: minus this. random_update: noise of so many times the norm.
    attack_factor: Positive = 1.0
    # Clocks are off by up to so much, each by its own: what a device reports of its time is wrong by it.
    clock_skew_s: NonNegative = 0.0
    crash_rounds: tuple[Annotated[int, Field(ge=1)], ...] = ()  # the coordinator dies in their first attempt
    restart_s: NonNegative = 10.0  # until a coordinator that died is back

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.malicious and not self.attack:
            raise ValueError(f"malicious = {self.malicious:g} needs attack, what these devices do")
        if self.attack == "scaled_update" and self.attack_factor == 1:
            raise ValueError("attack = 'scaled_update' with attack_factor = 1 changes nothing")
        if self.attack_factor != 1 and self.attack not in ("scaled_update", "sign_flip", "random_update"):
            raise ValueError(f"attack_factor = {self.attack_factor:g} has no meaning with {self.attack!r}")
        if len(set(self.crash_rounds)) != len(self.crash_rounds):
            raise ValueError("crash_rounds names a round twice")
        return self


class WorldConfig(Frozen):
    """The two sections of a scenario, or of a TOML file of their own."""

    devices: DevicesConfig = DevicesConfig()
    faults: FaultsConfig = FaultsConfig()

    @classmethod
    def of(cls, **sections: Any) -> Self:  # noqa: ANN401 - pydantic checks them
        """Check settings given as Python objects.

        Raises:
            ConfigError: names the first that is wrong, its value and the bound.
        """
        try:
            return cls.model_validate(sections)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{where} = {first['input']!r}: {first['msg']}.") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a TOML file with the two sections; ConfigError names every line that is wrong."""
        from lepton_fl.config import load

        return load(cls, path, env={}).value
