"""What is decided before a round starts, frozen; everything after is a function of it.

A ``RunSpec`` is what the operator asks for. A ``RoundPlan`` is one round (one attempt at it), with the
cohort drawn and the deadline fixed; it is journalled before any device hears of it. ``LocalPlan`` is the
part a device needs for its own training.
"""

import hashlib
import json
from collections.abc import Mapping
from math import ceil, cos, frexp, hypot, pi
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

PROTOCOL_VERSION = 1  # of the messages of a round
MAX_RETRIED = 256  # rounds of which a plan says that not their first attempt counted
MOST_SECURE = 1000  # devices of one secure sum
LEAST_STEPS = 1024  # grid steps in the clip norm of a secure run, at least
CORRECTION_SCALE = 16  # weights that correct for who answers are integers: multiples of 1/16
STALENESS_SCALE = 2**8  # weights of buffered updates are integers: multiples of 1/256

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Pattern = Annotated[str, Field(min_length=1, max_length=200)]  # of tensor names, as a shell's: "head.*"


class Frozen(BaseModel):
    """A frozen record that refuses what it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, every field present."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


class ExamplePrivacy(Frozen):
    """What a device promises for each single row of its own (DP-SGD, Abadi et al. 2016)."""

    clip_norm: Positive = 1.0  # of one row's gradient
    noise_multiplier: NonNegative = 0.0  # of a step, in clip norms; 0 = as epsilon asks
    epsilon: NonNegative = 0.0  # of all of one device's part in the run; 0 = as noise_multiplier gives
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5  # with epsilon
    participations: Annotated[int, Field(ge=1)] = 1  # rounds of the run in which one device may train


class LocalPlan(Frozen):
    """How one device trains in one round."""

    optimizer: Literal["sgd", "adam"] = "sgd"  # of the device; it begins anew in every round
    learning_rate: Positive = 0.1  # of the device; run.schedule multiplies it
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0  # sgd only
    weight_decay: NonNegative = 0.0  # L2
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 32  # rows of a mini-batch
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 1  # passes over a device's rows in one round
    max_steps: Annotated[int, Field(ge=0)] = 0  # stop after so many mini-batches; 0 = no bound
    proximal_mu: NonNegative = 0.0  # FedProx (Li et al. 2020): + mu/2 * |w - w_global|^2
    clip_grad_norm: NonNegative = 0.0  # per step; 0 = off
    control_variates: bool = False  # SCAFFOLD (Karimireddy et al. 2020, option II); plain SGD only
    personal: Annotated[tuple[Pattern, ...], Field(max_length=32)] = ()  # tensors that stay on the device
    example_privacy: ExamplePrivacy | None = None  # follows from run.privacy, and is not given by itself

    @model_validator(mode="after")
    def _plain_sgd(self) -> Self:
        """SCAFFOLD reads the mean gradient off the way a device went: that must be a sum of gradients."""
        others = {
            "optimizer": self.optimizer != "sgd",
            "momentum": self.momentum,
            "proximal_mu": self.proximal_mu,
            "clip_grad_norm": self.clip_grad_norm,
        }
        if self.control_variates and (wrong := [name for name, is_set in others.items() if is_set]):
            raise ValueError(
                f"control_variates work with plain SGD only; remove {', '.join(wrong)} or control_variates"
            )
        return self

    @property
    def keeps_state(self) -> bool:
        """Whether a device remembers something of a run from one of its rounds to the next."""
        return self.control_variates or bool(self.personal)


class Schedule(Frozen):
    """The learning rate of round r (first round: 1) as a multiple of the base rate."""

    kind: Literal["constant", "exponential", "cosine", "step"] = "constant"  # how it falls over the rounds
    decay: Annotated[float, Field(gt=0, le=1)] = 0.99  # factor per round (exponential) or per step
    every: Annotated[int, Field(ge=1)] = 10  # rounds between steps (step)
    warmup: Annotated[int, Field(ge=0)] = 0  # rounds of linear warm-up
    floor: Fraction = 0.0  # never below this multiple


class ServerOptimizerSpec(Frozen):
    """The server optimiser (Reddi et al. 2021, "Adaptive Federated Optimization")."""

    name: Literal["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"] = "fedavg"  # Reddi et al. 2021
    learning_rate: Positive = 1.0  # of the step along the mean update
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # beta_1; fedavg ignores it
    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.99  # of the adaptive ones
    tau: Positive = 1e-3  # adaptivity: added to the adaptive ones' denominator


class CohortSpec(Frozen):
    """Who takes part, and how long the others wait."""

    size: Annotated[int, Field(ge=1, le=20_000)] = 10  # reports wanted
    over_selection: Annotated[float, Field(ge=1, le=10)] = 1.0  # devices asked = size * this, rounded up
    min_reports: Annotated[int, Field(ge=1)] = 1  # fewer than this and the round is abandoned
    deadline_s: Annotated[float, Field(gt=0, le=7 * 86_400)] = 600.0  # an attempt is closed then
    fill_wait_s: Annotated[float, Field(ge=0, le=86_400)] = (
        5.0  # for a full cohort before starting with fewer
    )
    quorum_wait_s: Annotated[float, Field(gt=0, le=30 * 86_400)] = 3_600.0  # for enough eligible devices
    max_attempts: Annotated[int, Field(ge=1, le=1000)] = 5  # at one round, before the run stops
    groups: tuple[str, ...] = ()  # only devices with one of these labels; empty = all
    # An update counts 1/p times as much, p being how often its device answered in time when it was asked.
    correction: Literal["none", "inverse-probability"] = "none"
    correction_bound: Annotated[int, Field(ge=2, le=64)] = 8  # no update counts more than so many times
    coverage_floor: Fraction = 0.0  # a run of which a smaller share of the fleet was part is flagged; 0 = off

    @property
    def is_corrected(self) -> bool:
        """Whether who answers rarely counts more."""
        return self.correction != "none"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_reports > self.size:
            raise ValueError(f"min_reports={self.min_reports} exceeds size={self.size}")
        return self


class AggregationSpec(Frozen):
    """How the updates of a round become one; see ``lepton_fl.rounds.robust`` for the robust rules."""

    # All but "mean" look at every update, and withstand some that are made to harm.
    name: Literal["mean", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median"] = "mean"
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.1  # share cut off at either end (trimmed_mean)
    malicious: Annotated[float, Field(ge=0, lt=0.5)] = 0.2  # share of the reports to withstand (krum)

    @property
    def is_sum(self) -> bool:
        """Whether a sum is all that is needed, so that no update need be kept or seen."""
        return self.name == "mean"

    def withstands(self, reports: int) -> int:
        """So many bad ones among ``reports`` cannot steer the result: a share is rounded up."""
        if self.name in ("median", "geometric_median"):
            return max(0, reports - 1) // 2
        share = {"mean": 0.0, "trimmed_mean": self.trim}.get(self.name, self.malicious)
        return ceil(share * reports - 1e-9)  # 0.29 * 100 is a little more than 29

    @property
    def least_reports(self) -> int:
        """With so many reports, or any larger number of them, the rule holds what it promises.

        Trimming needs n > 2f, Krum n > 2f + 2 (Blanchard et al. 2017); a median of one or two outvotes
        nobody.
        """
        if self.name == "mean":
            return 1
        if self.name in ("median", "geometric_median"):
            return 3
        others = 0 if self.name == "trimmed_mean" else 2
        share = self.trim if self.name == "trimmed_mean" else self.malicious
        enough = min(20_000, int((2 + others) / (1 - 2 * share))) + 1  # rounding up costs less than one
        while enough > 1 and enough - 1 > 2 * self.withstands(enough - 1) + others:
            enough -= 1
        return enough


class BufferSpec(Frozen):
    """Buffered asynchronous aggregation, FedBuff (Nguyen et al. 2022)."""

    size: Annotated[int, Field(ge=1, le=20_000)] = 10  # updates that make one step of the server: K
    concurrency: Annotated[int, Field(ge=1, le=20_000)] = 20  # devices at work at any time
    staleness: Annotated[float, Field(ge=0, le=10)] = 0.5  # an update s steps old counts (1 + s)**-staleness


class SecureSpec(Frozen):
    """How secure aggregation is done where it is required (``docs/secure_aggregation.md``)."""

    bits: Annotated[int, Field(ge=8, le=32)] = 32  # of a coordinate on the wire; fewer: rotated and rounded
    min_cohort: Annotated[int, Field(ge=4, le=1000)] = 16  # devices take part in no smaller sum
    max_dropout: Annotated[float, Field(ge=0, le=0.333)] = 0.3  # share that may leave; more give no result
    spread: Annotated[float, Field(ge=1, le=16)] = 4.0  # rotated: deviations before a coordinate saturates
    max_cohort: Annotated[int, Field(ge=4, le=1000)] = MOST_SECURE  # more make several sums, which are added
    # EXPERIMENTAL: "hidden" leaves out most masks of large cohorts, which ones nobody can see; not reviewed.
    mask_graph: Literal["complete", "hidden"] = "complete"

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.max_cohort < self.min_cohort:
            raise ValueError(f"max_cohort={self.max_cohort} is below min_cohort={self.min_cohort}")
        return self

    def sums(self, devices: int) -> tuple[int, ...]:
        """The sizes of the sums that so many devices make: as few as possible, as equal as possible."""
        count = -(-devices // self.max_cohort)
        return tuple(devices // count + (i < devices % count) for i in range(count))

    @property
    def per_thousand(self) -> int:
        """``max_dropout`` as devices write it."""
        return round(1000 * self.max_dropout)

    def least_survivors(self, devices: int) -> int:
        """Of so many devices, these must come through, or there is no sum."""
        return max(2 * devices // 3 + 1, -(-(1000 - self.per_thousand) * devices // 1000))


class QuantisationSpec(Frozen):
    """Send updates in few bits, with and without secure aggregation (``docs/wire.md``)."""

    bits: Literal[8, 4, 2] = 4  # how finely one device's coordinate is rounded; the wire takes a few more
    ring: Annotated[int, Field(ge=0, le=32)] = 0  # bits of a coordinate's sum; 0 = as few as will do
    headroom: Annotated[float, Field(ge=1, le=100)] = 1.5  # a sum may be so much longer than those before it


class Quantisation(Frozen):
    """How the updates of one attempt become few bits; the same for every device of it."""

    bits: Annotated[int, Field(ge=2, le=32)]  # of the ring in which a coordinate is added
    reach: Positive  # the largest norm of a sum that the ring is made for, updates of weight 1 counting 1
    risk: Annotated[int, Field(ge=1, le=128)]  # such a sum leaves the ring with p <= 2**-risk
    cohort: Annotated[int, Field(ge=1)]  # devices of one sum


class EarlyStop(Frozen):
    """Stop when the watched metric has not improved for ``patience`` evaluations; 0 = never."""

    metric: str = "loss"  # of the evaluation, by its name
    mode: Literal["min", "max"] = "min"  # whether less of it is better, or more
    patience: Annotated[int, Field(ge=0)] = 0  # evaluations without a better one; 0 = it never stops so
    min_delta: NonNegative = 0.0  # what is better by no more than this is not better
    target: float | None = None  # stop as soon as it is reached


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
    rate: Annotated[float, Field(gt=0, le=1)] = 0.2  # of a step of the norm's logarithm
    # On the count of devices within the clip; 0 = a twentieth of the cohort, or more where that is dear.
    bit_noise: NonNegative = 0.0


class MetricsSpec(Frozen):
    """Release noisy training figures with every private update, for a share of what the update may move.

    Two more coordinates carry each device's number of examples and its mean loss times that number; the
    noise of the update covers them, so they are charged with it.
    """

    share: Annotated[float, Field(gt=0, le=0.5)] = (
        0.05  # of the squared norm; updates get 1 / sqrt(1 - share)
    )
    most_examples: Annotated[int, Field(ge=1, le=2**40)] = 100  # of one device; more count as this
    most_loss: Positive = 5.0  # mean loss of one device; more counts as this, less than zero as zero


class PrivatePart(Frozen):
    """What a device does for a run's privacy in one attempt, besides clipping its update.

    The tail: further coordinates behind those of the update, for which there is room in the norm that the
    noise is made for. Heights are in grid steps.
    """

    weight_cap: Annotated[int, Field(ge=0)] = 0  # who has fewer examples scales its update; 0 = nobody does
    bit: Annotated[int, Field(ge=0, lt=2**31)] = 0  # +bit if the norm is within the clip, else -bit; 0 = none
    metrics: Annotated[int, Field(ge=0, lt=2**31)] = 0  # of examples, and of examples times loss; 0 = none
    most_examples: Annotated[int, Field(ge=1)] = 1
    most_loss: Positive = 1.0
    noise: Literal["none", "skellam", "ddgauss"] = "none"  # law of the share that every device adds
    share_variance: NonNegative = 0.0  # of that share: ring steps squared
    survivors: Annotated[int, Field(ge=0)] = 0  # it is made for at least so many: no smaller sum is signed
    asked: Annotated[int, Field(ge=0)] = 0  # the sum has room for so many
    limit: Annotated[int, Field(ge=0)] = 0  # 16 bits: largest magnitude of a rotated coordinate, ring steps
    min_separation: Annotated[int, Field(ge=1)] = 1  # it takes part in no two rounds nearer than this
    max_participations: Annotated[int, Field(ge=0)] = 0  # nor more often than this; 0 = as that allows

    @property
    def has_contract(self) -> bool:
        """Whether how often a device may take part is limited."""
        return self.min_separation > 1 or self.max_participations > 0

    @property
    def tail(self) -> int:
        """How many further coordinates."""
        return (self.bit > 0) + 2 * (self.metrics > 0)

    def norm_bound(self, steps: float) -> float:
        """The largest norm of an update of norm ``steps`` and its tail together, grid steps."""
        return hypot(steps, self.bit, self.metrics, self.metrics)


class PrivacySpec(Frozen):
    """One guarantee: on what unit, against whom, by which mechanism, and how strong."""

    preset: Literal["", "strong"] = ""  # "strong": what is not said follows, see ``STRONG``
    unit: Literal["device", "example"] = "device"  # what is protected: all rows of a device, or each row
    trust: Literal["central", "distributed", "local"] = "central"  # who may see what is not yet private
    mechanism: Mechanism = "blt"  # where the noise comes from; each has its unit and its trust
    # Neighbours differ in one unit, which is left out, or is another one.
    adjacency: Literal["zero-out", "replace-one"] = "zero-out"
    clip_norm: Positive = 1.0  # L2 norm that no update, or no row's gradient, exceeds
    adaptive_clip: AdaptiveClipSpec | None = None
    noise_multiplier: NonNegative = 0.0  # of a round, in clip norms; 0 = as epsilon and delta ask
    epsilon: NonNegative = 0.0  # of the whole run; 0 = as noise_multiplier gives
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-6  # with epsilon; far below 1/population
    population: Annotated[int, Field(ge=0)] = 0  # devices that could ever take part; 0 = not known
    min_separation: Annotated[int, Field(ge=1)] = 1  # rounds between two participations of one device
    max_participations: Annotated[int, Field(ge=0)] = 0  # of one device; 0 = as min_separation allows
    # "poisson": every device is drawn by itself, which amplifies the guarantee; needs always_reachable.
    sampling: Literal["none", "poisson"] = "none"
    always_reachable: bool = False  # every device of the population answers whenever it is drawn
    bands: Annotated[int, Field(ge=0)] = 0  # banded only; 0 = min_separation
    bits: Annotated[int, Field(ge=2, le=62)] = 20  # distributed only: of the ring
    min_survivors: Annotated[float, Field(gt=0, le=1)] = 0.7  # distributed only: share of the cohort
    colluders: Annotated[float, Field(ge=0, lt=1)] = 0.0  # distributed only: share of the cohort
    weight_cap: Annotated[int, Field(ge=0)] = 0  # examples that count in full; 0 = all devices count the same
    metrics: MetricsSpec | None = None  # noisy training figures, charged; none = they are not sent

    @model_validator(mode="after")
    def _as_preset(self) -> Self:
        """What is not said follows from the preset; what is said stays."""
        if self.preset == "strong":
            strength = {} if self.noise_multiplier or self.epsilon else {"epsilon": STRONG_EPSILON}
            for name, value in {**STRONG, **strength}.items():
                if name not in self.model_fields_set:
                    object.__setattr__(self, name, value)
        return self

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
        if self.adaptive_clip and self.mechanism not in ("independent", "skellam", "ddgauss"):
            raise ValueError(
                f"adaptive_clip is for noise that is fresh in every round; that of {self.mechanism!r} is "
                "made for one clip norm: remove adaptive_clip, or set mechanism='independent'"
            )
        if self.unit == "example" and (self.adaptive_clip or self.metrics or self.weight_cap):
            raise ValueError("adaptive_clip, metrics and weight_cap are for unit='device'")
        if self.unit == "example" and self.min_separation > 1:
            raise ValueError("min_separation is for unit='device'; limit a device by max_participations")
        if self.bands and self.mechanism != "banded":
            raise ValueError(f"bands is for mechanism='banded', not {self.mechanism!r}")
        if self.bands > self.min_separation:
            raise ValueError(f"bands={self.bands} exceeds min_separation={self.min_separation}")
        if self.colluders >= self.min_survivors:
            raise ValueError(
                f"colluders={self.colluders:g} leaves nobody honest of min_survivors={self.min_survivors:g}"
            )
        return self

    def on_device(self, rounds: int) -> ExamplePrivacy | None:
        """What every device must promise for its rows in a run of so many rounds; None if it need not."""
        if self.unit != "example":
            return None
        return ExamplePrivacy(
            clip_norm=self.clip_norm,
            noise_multiplier=self.noise_multiplier,
            epsilon=self.epsilon,
            delta=self.delta,
            participations=self.max_participations or rounds,
        )

    @property
    def tail_size(self) -> int:
        """Coordinates behind those of an update: see ``PrivatePart``."""
        return (self.adaptive_clip is not None) + 2 * (self.metrics is not None)

    @property
    def has_contract(self) -> bool:
        """Whether how often a device may take part is limited, and must be enforced."""
        return self.min_separation > 1 or self.max_participations > 0


# privacy = "strong": nobody sees an update, and the sums that are seen have the devices' noise in them.
STRONG: dict[str, Any] = {"trust": "distributed", "mechanism": "skellam", "adaptive_clip": AdaptiveClipSpec()}
STRONG_EPSILON = 8.0
STRONG_SERVER = ServerOptimizerSpec(name="fedavgm", learning_rate=0.5)  # momentum averages noise away


def _preset_by_name(value: Any, read: ValidatorFunctionWrapHandler) -> Any:  # noqa: ANN401 - as pydantic has it
    return read({"preset": value} if isinstance(value, str) else value)


class RunSpec(Frozen):
    """One training run, as the operator asks for it."""

    task: str  # package.module:attribute
    task_version: str = ""  # empty = the version the coordinator has installed
    name: str = ""  # for people
    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 10  # to commit; buffered: steps of the server
    mode: Literal["synchronous", "buffered"] = "synchronous"  # buffered: nobody waits for anybody
    cohort: CohortSpec = CohortSpec()
    buffer: BufferSpec = BufferSpec()  # buffered only; there, cohort.size is that of an evaluation
    local: LocalPlan = LocalPlan()
    schedule: Schedule = Schedule()
    server: ServerOptimizerSpec = ServerOptimizerSpec()
    weighting: Literal["examples", "equal"] = "examples"  # what an update counts
    max_weight: Annotated[int, Field(ge=1, le=2**24)] = 2**20  # examples above this count as this
    grid_step: Positive = 2.0**-24  # a power of two; updates reach +-(2**31 - 1) * grid_step
    clip_norm: NonNegative = 0.0  # a device scales its update to this L2 norm if it is longer; 0 = off
    aggregation: AggregationSpec = AggregationSpec()
    # None = no promise. Implies weighting = "equal" and, of device level, clip_norm. "strong" stands for
    # { preset = "strong" }.
    privacy: Annotated[PrivacySpec | None, WrapValidator(_preset_by_name)] = None
    secure_aggregation: Literal["required", "off"] = "off"  # required: the coordinator learns sums only
    secure: SecureSpec = SecureSpec()  # how, where it is required; implies grid_step
    quantisation: QuantisationSpec | None = None  # updates in few bits; none = every coordinate in 32
    downlink: Literal["lossless", "plain"] = "lossless"  # how models go to devices: packed, or as they are
    evaluate_every: Annotated[int, Field(ge=0)] = 1  # federated evaluation every n rounds; 0 = never
    evaluate_cohort: Annotated[int, Field(ge=0)] = 0  # devices asked to evaluate; 0 = as many as train
    central_data: str = ""  # folder of the task's data set on the coordinator, or "built-in"; empty = none
    early_stop: EarlyStop = EarlyStop()
    seed: Annotated[int, Field(ge=0)] = 0  # of the initial model
    initial_model: str = ""  # SHA-256 of a stored model to start from; empty = a fresh one
    teacher: str = ""  # of a distillation task: SHA-256 of a stored model; in a simulation its file or run

    # Not mode="before": that would read the JSON of a file as Python objects, where a list is no tuple.
    @model_validator(mode="after")
    def _as_privacy_implies(self) -> Self:
        """What is not said follows from the guarantee; what is said and contradicts it is refused later."""
        if self.privacy:
            implied: dict[str, Any] = {"weighting": "equal"}
            if self.privacy.unit == "device":
                implied["clip_norm"] = self.privacy.clip_norm
            if self.privacy.preset == "strong":
                implied |= {"secure_aggregation": "required", "server": STRONG_SERVER}
            for name, value in implied.items():
                if name not in self.model_fields_set:
                    object.__setattr__(self, name, value)
        asked = self.privacy.on_device(self.rounds) if self.privacy else None
        if self.local.example_privacy not in (None, asked):
            raise ValueError("local.example_privacy follows from privacy; set privacy.unit = 'example'")
        if asked != self.local.example_privacy:
            object.__setattr__(self, "local", self.local.model_copy(update={"example_privacy": asked}))
        return self

    @model_validator(mode="after")
    def _as_secrecy_implies(self) -> Self:
        """The finest grid on which no sum of a cohort can leave 32 bits."""
        if self.secure_aggregation == "off":
            return self
        if wrong := self._unfit_for_secrecy():
            raise ValueError(f"secure_aggregation='required' cannot be combined with {'; '.join(wrong)}")
        if self.secure.bits < 32 or self.quantisation:  # scaled to the ring, whatever the grid
            return self
        if self.privacy and self.privacy.trust == "distributed":  # its plan finds the grid
            return self
        finest = self._finest_step()
        if "grid_step" not in self.model_fields_set and finest > self.grid_step:
            object.__setattr__(self, "grid_step", finest)
        if self.grid_step < finest:
            raise ValueError(
                f"grid_step={self.grid_step:g}: a sum of {self.largest_sum} devices could leave 32 bits; set "
                f"grid_step={finest:g}, or lower clip_norm, max_weight or the cohort"
            )
        steps = self.clip_norm / self.grid_step
        if steps < LEAST_STEPS:
            most = int(2**31 // (self.largest_sum * LEAST_STEPS))
            raise ValueError(
                f"an update of clip_norm={self.clip_norm:g} would have {steps:g} grid steps, fewer than "
                f"{LEAST_STEPS}: too coarse to learn from; lower max_weight to {most}, or give all devices "
                "the same weight (weighting='equal')"
            )
        return self

    def _unfit_for_secrecy(self) -> list[str]:
        """What contradicts that only a sum is learnt, or that it is one of enough devices."""
        cohort, least = self.cohort, self.secure.min_cohort
        sizes = self.secure.sums(self.most_asked)
        kept = sum(map(self.secure.least_survivors, sizes))
        most = self.secure.max_cohort
        found = {
            f"aggregation.name={self.aggregation.name!r}, which looks at every update": (
                not self.aggregation.is_sum
            ),
            "mode='buffered', which adds one update at a time": self.mode == "buffered",
            **self._privacy_unfit_for_secrecy(),
            "clip_norm=0: without a bound on updates a sum could leave its 32 bits": not self.clip_norm,
            f"cohort.size={cohort.size}, below secure.min_cohort={least}": cohort.size < least,
            f"secure.max_cohort={most}: {self.most_asked} devices cannot be divided into sums of {least} to "
            f"{most}; set max_cohort to {2 * least} or more, or lower min_cohort": (
                len(sizes) > 1 and most < 2 * least - 1
            ),
            f"cohort.over_selection={cohort.over_selection:g}: its sums need {kept} of {self.most_asked} "
            f"devices, the round would close at {cohort.size}": kept > cohort.size,
        }
        return [why for why, is_so in found.items() if is_so]

    def _privacy_unfit_for_secrecy(self) -> dict[str, bool]:
        privacy = self.privacy
        if (
            privacy is None or privacy.unit == "example"
        ):  # devices tell of no rows: their noise is in the update
            return {}
        central = privacy.trust == "central"
        bits = f"privacy.bits={privacy.bits}, above secure.bits={self.secure.bits}"
        return {
            f"privacy.trust='central' with secure.bits={self.secure.bits}: its noise is made for exact sums; "
            "set secure.bits=32, or trust='distributed'": central and self.secure.bits < 32,
            bits: not central and "bits" in privacy.model_fields_set and privacy.bits > self.secure.bits,
        }

    @model_validator(mode="after")
    def _fit_for_few_bits(self) -> Self:
        """What needs more of an update than an unbiased estimate of a sum of them."""
        if self.quantisation is None:
            return self
        found = {
            f"aggregation.name={self.aggregation.name!r}, which compares single updates": (
                not self.aggregation.is_sum
            ),
            "mode='buffered', whose sums are not of one cohort": self.mode == "buffered",
            "local.control_variates: a device adds to its control exactly what it has sent": (
                self.local.control_variates
            ),
            "clip_norm=0: nothing would bound the first sum": not self.clip_norm,
            **self._privacy_unfit_for_few_bits(),
            f"secure.bits={self.secure.bits}, another way to few bits": self.secure.bits < 32,
        }
        if wrong := [why for why, is_so in found.items() if is_so]:
            raise ValueError(f"quantisation cannot be combined with {'; '.join(wrong)}")
        return self

    def _privacy_unfit_for_few_bits(self) -> dict[str, bool]:
        """Rounding at random may make an update longer; noise is made for a norm that nothing exceeds."""
        if self.privacy is None or self.privacy.unit == "example":
            return {}
        return {
            "privacy.trust='central': rounding may lengthen an update beyond clip_norm, and a sum that wraps "
            "around is not bounded by it": self.privacy.trust == "central",
            "privacy.trust='distributed': set secure.bits, which rounds within the norm": (
                self.privacy.trust == "distributed"
            ),
        }

    @property
    def most_asked(self) -> int:
        """Devices asked in one round, at most."""
        return ceil(self.cohort.size * self.cohort.over_selection)

    @property
    def largest_sum(self) -> int:
        """Devices of one secure sum, at most, however many of the planned devices can be asked."""
        fewest = -(-min(self.min_reports, self.most_asked) // self.secure.max_cohort)  # sums of the least
        return min(self.secure.max_cohort, -(-self.most_asked // fewest))

    def _finest_step(self) -> float:
        """As ``secagg.encoding.fit`` finds it, not below 2**-24."""
        weight = self.max_weight if self.weighting == "examples" else 1
        room = (2**31 - 1) // (self.largest_sum * weight)
        step = 2.0**-24
        while int(self.clip_norm / step) > room and step < self.clip_norm:
            step *= 2
        return step

    @model_validator(mode="after")
    def _correctable(self) -> Self:
        """Who counts more than others must be allowed to: by the guarantee, the protocol and the rule."""
        if not self.cohort.is_corrected:
            return self
        found = {
            "privacy of unit='device': its noise is made for devices that all count alike": (
                self.privacy is not None and self.privacy.unit == "device"
            ),
            "secure_aggregation='required': the coordinator sees no single update that it could weigh": (
                self.secure_aggregation == "required"
            ),
            f"aggregation.name={self.aggregation.name!r}, which counts every report the same": (
                not self.aggregation.is_sum
            ),
            "mode='buffered', where nobody waits for a deadline": self.mode == "buffered",
            "quantisation, whose ring is made for weights that devices give themselves": (
                self.quantisation is not None
            ),
            "local.control_variates: the server's control is the plain mean of the devices'": (
                self.local.control_variates
            ),
        }
        if wrong := [why for why, is_so in found.items() if is_so]:
            raise ValueError(
                f"cohort.correction={self.cohort.correction!r} cannot go with {'; '.join(wrong)}"
            )
        return self

    @model_validator(mode="after")
    def _exact_grid(self) -> Self:
        mantissa, _ = frexp(self.grid_step)
        if mantissa != 0.5:
            raise ValueError(f"grid_step={self.grid_step} is not a power of two")
        # cohort * weight * int32 must fit the int64 accumulator with its sign.
        reports = int(self.cohort.size * self.cohort.over_selection) + 1
        weight = self.max_weight if self.weighting == "examples" else 1
        what = f"cohort of up to {reports}"
        if self.cohort.is_corrected:
            reports *= CORRECTION_SCALE * self.cohort.correction_bound
            what += f" times {CORRECTION_SCALE} times correction_bound={self.cohort.correction_bound}"
        if self.mode == "buffered":
            what = f"buffer.size={self.buffer.size} times {STALENESS_SCALE}"
            reports = self.buffer.size * STALENESS_SCALE
        if reports * weight > 2**32:
            raise ValueError(
                f"{what} times max_weight={weight} exceeds 2**32: the exact sum could overflow; "
                f"lower max_weight to {2**32 // reports}"
            )
        return self

    @model_validator(mode="after")
    def _synchronous_only(self) -> Self:
        """What needs the devices of one round together, or to know which attempt has counted."""
        others = {
            "local.control_variates": self.local.control_variates,
            "local.personal": self.local.personal,
            "aggregation.name": not self.aggregation.is_sum,
        }
        if self.mode == "buffered" and (wrong := [name for name, is_set in others.items() if is_set]):
            raise ValueError(f"mode = 'buffered' cannot be combined with {', '.join(wrong)}")
        return self

    @model_validator(mode="after")
    def _robust(self) -> Self:
        rule, least = self.aggregation.name, self.aggregation.least_reports
        if not self.aggregation.is_sum and self.weighting != "equal":
            raise ValueError(
                f"aggregation.name={rule!r} counts every report the same; set weighting='equal' (an example "
                "count is a device's own claim, and who may lie about an update may lie about it)"
            )
        if self.cohort.size < least:
            raise ValueError(
                f"aggregation.name={rule!r} needs {least} reports, cohort.size={self.cohort.size}"
            )
        return self

    @property
    def min_reports(self) -> int:
        """Fewer reports than this and a round is abandoned: the cohort's bound, and that of the rule."""
        secure = self.secure.min_cohort if self.secure_aggregation == "required" else 1
        return max(self.cohort.min_reports, self.aggregation.least_reports, secure, self.noise_survivors)

    @property
    def has_contract(self) -> bool:
        """Whether devices keep count of their rounds, so that they must know which have counted."""
        return self.privacy is not None and self.privacy.unit == "device" and self.privacy.has_contract

    @property
    def noise_survivors(self) -> int:
        """The noise that devices add is made for at least so many of one sum; 0 = they add none."""
        if self.privacy is None or self.privacy.trust != "distributed":
            return 0
        planned = min(self.secure.sums(self.cohort.size))
        return max(1, ceil(self.privacy.min_survivors * planned - 1e-9))

    def learning_rate(self, round_number: int) -> float:
        """The local learning rate of a round (first round: 1)."""
        return self.local.learning_rate * rate_factor(self.schedule, round_number, self.rounds)


def rate_factor(schedule: Schedule, round_number: int, rounds: int) -> float:
    """The schedule's multiple for round ``round_number`` of ``rounds``."""
    if schedule.warmup and round_number <= schedule.warmup:
        return round_number / schedule.warmup
    done = round_number - 1 - schedule.warmup
    if schedule.kind == "exponential":
        factor = schedule.decay**done
    elif schedule.kind == "step":
        factor = schedule.decay ** (done // schedule.every)
    elif schedule.kind == "cosine":
        factor = 0.5 * (1 + cos(pi * done / max(1, rounds - schedule.warmup)))
    else:
        factor = 1.0
    return max(schedule.floor, factor)


def attempt_counted(
    kind: Literal["train", "evaluate"],
    now: int,
    retried: tuple[tuple[int, int], ...],
    round_number: int,
    attempt: int,
) -> bool:
    """Whether a training attempt has become part of the model, as far as a message can tell.

    Args:
        kind: of the message.
        now: its round.
        retried: of its plan.
        round_number: of the attempt in question.
        attempt: its number.
    """
    if not 1 <= round_number <= (now if kind == "evaluate" else now - 1):
        return False
    oldest = retried[0][0] if len(retried) == MAX_RETRIED else 0  # nothing is known of earlier ones
    return round_number >= oldest and dict(retried).get(round_number, 1) == attempt


class RoundPlan(Frozen):
    """One attempt at one round; its digest is in every message of the attempt."""

    run_id: str
    round: int  # first round: 1
    attempt: int  # first attempt: 1
    kind: Literal["train", "evaluate"]
    task: str
    task_version: str
    layout_digest: str
    num_coordinates: int  # P
    fixed: int = 0  # of them, the last ones: frozen parameters, of which nobody sends anything
    model_sha256: str
    cohort: tuple[str, ...]  # device ids asked, drawn from the eligible ones
    wanted_reports: int  # the round closes when so many were accepted
    min_reports: int
    deadline_s: float  # from the moment the requests are sent
    local: LocalPlan  # with this round's learning rate
    weighting: Literal["examples", "equal"]
    max_weight: int
    grid_step: float
    clip_norm: float = 0.0
    aggregation: AggregationSpec = AggregationSpec()
    secure: SecureSpec | None = None  # set: only a sum is learnt, by secure aggregation
    private: PrivatePart | None = None  # what devices do for the run's privacy, besides clipping
    quantisation: Quantisation | None = None  # how updates become few bits; none = they do not
    auxiliary: int = 0  # further coordinates of an update, after those of the model: SCAFFOLD's controls
    auxiliary_sha256: str = ""  # of the server's control, where there is one
    population: int = 0  # devices that could ever be asked; 0 = not known, and not needed
    retried: tuple[tuple[int, int], ...] = ()  # rounds of which not the first attempt counted; 0: none
    corrections: tuple[int, ...] = ()  # of each device of the cohort, sixteenths; empty = all count alike
    nonce: str  # hex; tells two attempts apart even after a crash between them

    @property
    def update_size(self) -> int:
        """Coordinates of an update: ``sent_size``, and a private run's tail."""
        return self.sent_size + self.tail_size

    @property
    def sent_size(self) -> int:
        """Coordinates of an update without its tail: what can move of the model, and the auxiliary ones."""
        return self.num_coordinates - self.fixed + self.auxiliary

    @property
    def down_size(self) -> int:
        """Coordinates of what is sent to a device: the model's and the auxiliary ones."""
        return self.num_coordinates + self.auxiliary

    @property
    def tail_size(self) -> int:
        """Coordinates behind those of the update: see ``PrivatePart``."""
        return self.private.tail if self.private else 0

    @property
    def update_bytes(self) -> int:
        """Bytes of an update on the wire, at most, but for what travels with it."""
        bits = self.quantisation.bits if self.quantisation else self.secure.bits if self.secure else 32
        return -(-self.update_size * bits // 8)

    @property
    def adds_up(self) -> bool:
        """Whether updates may be added up by whoever has them, without knowing whose they are."""
        return self.aggregation.is_sum and not self.corrections

    def counted(self, round_number: int, attempt: int) -> bool:
        """Whether that training attempt of this run has become part of the model; see ``attempt_counted``."""
        return attempt_counted(self.kind, self.round, self.retried, round_number, attempt)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Read back what ``to_json`` wrote."""
        return cls.model_validate_json(json.dumps(body))
