"""What an operator may ask of privacy, and which combinations are refused when the configuration is loaded.

spec = PrivacySpec(mechanism="blt", clip_norm=0.5, epsilon=8.0, delta=1e-6, population=100_000,
                   min_separation=100, max_participations=20)
refuse_conflicts(spec, run, secure_aggregation=False)      # ConfigError names every conflict
"""

from math import ceil
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lepton_fl.errors import ConfigError
from lepton_fl.plan import Frozen, NonNegative, Positive, RunSpec

Mechanism = Literal["blt", "independent", "banded", "skellam", "ddgauss", "dp-sgd"]

_TRUST: dict[str, tuple[str, str]] = {  # mechanism -> unit, trust
    "blt": ("device", "central"),
    "independent": ("device", "central"),
    "banded": ("device", "central"),
    "skellam": ("device", "distributed"),
    "ddgauss": ("device", "distributed"),
    "dp-sgd": ("example", "local"),
}


class AdaptiveClipSpec(Frozen):
    """Let the clip norm follow a quantile of the devices' norms (Andrew et al. 2021)."""

    target: Annotated[float, Field(gt=0, lt=1)] = 0.5  # quantile
    rate: Annotated[float, Field(gt=0, le=1)] = 0.2
    bit_noise: NonNegative = 0.0  # on the count of devices within the clip; 0 = a twentieth of the cohort


class PrivacySpec(Frozen):
    """One guarantee: on what unit, against whom, by which mechanism, and how strong."""

    unit: Literal["device", "example"] = "device"
    trust: Literal["central", "distributed", "local"] = "central"  # who may see what is not yet private
    mechanism: Mechanism = "blt"
    adjacency: Literal["zero-out", "replace-one"] = "zero-out"
    clip_norm: Positive = 1.0
    adaptive_clip: AdaptiveClipSpec | None = None
    noise_multiplier: NonNegative = 0.0  # of a round, in clip norms; 0 = as epsilon and delta ask
    epsilon: NonNegative = 0.0  # of the whole run; 0 = as noise_multiplier gives
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    population: Annotated[int, Field(ge=0)] = 0  # devices that could ever take part; 0 = not known
    min_separation: Annotated[int, Field(ge=1)] = 1  # rounds between two participations of one device
    max_participations: Annotated[int, Field(ge=0)] = 0  # of one device; 0 = as min_separation allows
    sampling: Literal["none", "poisson"] = "none"
    always_reachable: bool = False  # every device of the population answers whenever it is drawn
    bands: Annotated[int, Field(ge=0)] = 0  # banded only; 0 = min_separation
    bits: Annotated[int, Field(ge=2, le=62)] = 20  # distributed only: of the ring
    min_survivors: Annotated[float, Field(gt=0, le=1)] = 0.7  # distributed only: share of the cohort
    colluders: Annotated[float, Field(ge=0, lt=1)] = 0.0  # distributed only: share of the cohort
    weight_cap: Annotated[int, Field(ge=0)] = 0  # examples that count in full; 0 = all devices count the same

    @model_validator(mode="after")
    def _one_guarantee(self) -> Self:
        if (self.unit, self.trust) != _TRUST[self.mechanism]:
            unit, trust = _TRUST[self.mechanism]
            raise ValueError(
                f"mechanism={self.mechanism!r} gives unit={unit!r}, trust={trust!r}, not unit={self.unit!r}, "
                f"trust={self.trust!r}"
            )
        return self

    @model_validator(mode="after")
    def _one_strength(self) -> Self:
        if (self.noise_multiplier > 0) == (self.epsilon > 0):
            raise ValueError("give either noise_multiplier or epsilon: the other one follows")
        if self.population and self.delta * self.population > 1:
            raise ValueError(
                f"delta={self.delta:g} is above 1/population={1 / self.population:g}: that would allow to "
                "publish one device's data whole"
            )
        return self

    @model_validator(mode="after")
    def _sampling_is_true(self) -> Self:
        if self.sampling == "none":
            return self
        if self.mechanism != "independent":
            raise ValueError(f"sampling='poisson' is for mechanism='independent', not {self.mechanism!r}")
        if self.adjacency != "zero-out":
            raise ValueError("sampling='poisson' is accounted under adjacency='zero-out' only")
        if not (self.population and self.always_reachable):
            raise ValueError(
                "sampling='poisson' needs a registered population whose devices always answer (population "
                "and always_reachable): elsewhere the draw is not what the proof assumes"
            )
        return self

    @model_validator(mode="after")
    def _only_where_it_means_something(self) -> Self:
        if self.adaptive_clip and self.mechanism != "independent":
            raise ValueError(
                f"adaptive_clip is for mechanism='independent': the noise of {self.mechanism!r} is made for "
                "one clip norm"
            )
        if self.bands and self.mechanism != "banded":
            raise ValueError(f"bands is for mechanism='banded', not {self.mechanism!r}")
        if self.bands > self.min_separation:
            raise ValueError(f"bands={self.bands} exceeds min_separation={self.min_separation}")
        if self.colluders >= self.min_survivors:
            raise ValueError(
                f"colluders={self.colluders:g} leaves nobody honest of min_survivors={self.min_survivors:g}"
            )
        return self

    @property
    def has_contract(self) -> bool:
        """Whether how often a device may take part is limited, and must be enforced."""
        return self.min_separation > 1 or self.max_participations > 0


def refuse_conflicts(spec: PrivacySpec, run: RunSpec, *, secure_aggregation: bool) -> None:
    """Refuse a run in which the guarantee would not be true.

    Raises:
        ConfigError: names every conflict at once.
    """
    asked = ceil(run.cohort.size * run.cohort.over_selection)
    needed = asked * spec.min_separation
    found = {
        f"aggregation.name={run.aggregation.name!r} is no sum": not run.aggregation.is_sum,
        "mode='buffered' has no rounds to account for": run.mode == "buffered",
        "weighting='examples' lets one device count for many; use 'equal', or privacy.weight_cap": (
            run.weighting != "equal"
        ),
        "local.control_variates sends a second vector outside the clip": run.local.control_variates,
        f"clip_norm={run.clip_norm:g} differs from privacy.clip_norm={spec.clip_norm:g}": (
            run.clip_norm not in (0.0, spec.clip_norm) and spec.unit == "device"
        ),
        "trust='distributed' needs secure aggregation": (
            spec.trust == "distributed" and not secure_aggregation
        ),
        "evaluate_every > 0 would release metrics that are not accounted for; evaluate on central_data": (
            run.evaluate_every > 0 and spec.unit == "device"
        ),
        f"{asked} devices a round, each at most every {spec.min_separation} rounds, need a population of "
        f"{needed}, not {spec.population}": 0 < spec.population < needed,
    }
    conflicts = [why for why, is_so in found.items() if is_so]
    if conflicts:
        raise ConfigError("This run cannot be private: " + "; ".join(conflicts) + ".")
