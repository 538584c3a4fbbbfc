"""The gate: which class of devices may get a variant, and why the others may not.

    [[profiles]]
    name = "gateway"
    ram = 64_000_000
    flash = 1_000_000
    isa = ["x86_64"]
    latency_ms = 5.0
    max_drop = 0.01

    verdicts = [judge(profile, card, reference) for profile in load_profiles(path)]

A bound that is missed gives a reason with the value and the bound; a variant that fails is kept and never
offered.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from lepton_fl.compression.card import Card, Measured, Name, Transfer, Verdict
from lepton_fl.errors import ConfigError
from lepton_fl.plan import Fraction, Frozen, NonNegative, Positive

# Metric -> whether more is better; the first that a task reports is its score.
SCORES: Final = {"accuracy": True, "r2": True, "rmse": False, "loss": False}


class Profile(Frozen):
    """One class of devices and what it may be given."""

    name: Name
    ram: Annotated[int, Field(ge=1)] = 512_000_000  # bytes that loading and serving may add to a process
    flash: Annotated[int, Field(ge=1)] = 64_000_000  # bytes of model.onnx
    isa: tuple[str, ...] = ()  # as ``platform.machine()`` says; empty = that of the machine that measures
    slowdown: Annotated[float, Field(ge=0)] = (
        0.0  # times slower than that machine; 0 = the same kind of machine
    )
    latency_ms: Positive = 1000.0  # 95th percentile, one row, one thread
    metric: str = ""  # the score; empty = the first of accuracy, r2, rmse, loss
    max_drop: NonNegative = 0.01  # of the score, below the global model's
    max_drop_in_service: NonNegative = 0.01  # below that of the variant in service, if one is named
    min_score: float | None = None  # absolute
    min_recall: Fraction = 0.0  # of the worst class
    max_recall_drop: Fraction = 0.1  # of any class, below the global model's
    min_agreement: Fraction = 0.9  # with the global model's decisions
    max_shift: Fraction = 0.5  # of proxy rows from the evaluation set, as the teacher sees them


class Profiles(Frozen):
    """All classes of a fleet."""

    profiles: Annotated[tuple[Profile, ...], Field(min_length=1, max_length=256)] = (Profile(name="default"),)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [profile.name for profile in self.profiles]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several profiles are called {', '.join(twice)}")
        return self


@dataclass(frozen=True)
class Reference:
    """What a variant is held against."""

    metrics: Mapping[str, float]  # of the global model
    recall: tuple[float, ...]
    in_service: Mapping[str, float] | None  # of the variant in service, on the same rows
    isa: str  # of the machine that measured


def load_profiles(path: Path) -> tuple[Profile, ...]:
    """Read the profiles of a fleet.

    Raises:
        ConfigError: the file cannot be read or says something that is not possible.
    """
    from lepton_fl.config import load

    return load(Profiles, path, env={}).value.profiles


def judge(profile: Profile, card: Card, reference: Reference) -> Verdict:
    """Hold one variant against one profile."""
    reasons = [
        *_room(profile, card),
        *_speed(profile, card.measured, reference.isa),
        *_quality(profile, card.measured, reference),
        *_classes(profile, card.measured, reference),
        *_origin(profile, card.lineage.transfer),
    ]
    return Verdict(profile=profile.name, passed=not reasons, reasons=tuple(reasons))


def score_of(metrics: Mapping[str, float], wanted: str = "") -> str:
    """The name of the metric that counts.

    Raises:
        ConfigError: the task does not report it.
    """
    names = [wanted] if wanted else list(SCORES)
    for name in names:
        if name in metrics:
            return name
    raise ConfigError(
        f"The task reports {', '.join(sorted(metrics)) or 'nothing'}, not {' or '.join(names)}.",
        hint="Set the profile's metric to one of them.",
    )


def drop(metric: str, before: float, after: float) -> float:
    """By how much a score is worse, in its own unit; negative where it is better."""
    return before - after if SCORES.get(metric, True) else after - before


def _room(profile: Profile, card: Card) -> list[str]:
    found = []
    if card.model_bytes > profile.flash:
        found.append(f"{card.model_bytes} bytes, flash allows {profile.flash}")
    if card.measured.peak_memory > profile.ram:
        found.append(f"{card.measured.peak_memory} bytes of memory at the peak, ram allows {profile.ram}")
    return found


def _speed(profile: Profile, measured: Measured, isa: str) -> list[str]:
    if profile.isa and isa not in profile.isa and not profile.slowdown:
        return [f"measured on {isa}, so its latency on {', '.join(profile.isa)} is not known; set slowdown"]
    latency = measured.p95_ms * (profile.slowdown or 1.0)
    if latency > profile.latency_ms:
        return [f"p95 latency {latency:.4g} ms, latency_ms allows {profile.latency_ms:g}"]
    return []


def _quality(profile: Profile, measured: Measured, reference: Reference) -> list[str]:
    metric = score_of(measured.metrics, profile.metric)
    value, found = measured.metrics[metric], []
    if metric not in reference.metrics:
        return [f"the global model has no {metric} to compare with"]
    lost = drop(metric, reference.metrics[metric], value)
    if lost > profile.max_drop:
        found.append(
            f"{metric} {value:.4f} is {lost:.4f} below the global model, max_drop is {profile.max_drop:g}"
        )
    served = (reference.in_service or {}).get(metric)
    if served is not None and (lost := drop(metric, served, value)) > profile.max_drop_in_service:
        found.append(
            f"{metric} {value:.4f} is {lost:.4f} below the variant in service, max_drop_in_service is "
            f"{profile.max_drop_in_service:g}"
        )
    if profile.min_score is not None and drop(metric, profile.min_score, value) > 0:
        found.append(f"{metric} {value:.4f}, min_score is {profile.min_score:g}")
    if measured.agreement is not None and measured.agreement < profile.min_agreement:
        found.append(
            f"agrees with the global model on {measured.agreement:.4f} of the rows, min_agreement is "
            f"{profile.min_agreement:g}"
        )
    return found


def _classes(profile: Profile, measured: Measured, reference: Reference) -> list[str]:
    found = []
    for number, recall in enumerate(measured.recall):
        before = reference.recall[number] if number < len(reference.recall) else recall
        if recall < profile.min_recall:
            found.append(f"recall of class {number} is {recall:.4f}, min_recall is {profile.min_recall:g}")
        elif before - recall > profile.max_recall_drop:
            found.append(
                f"recall of class {number} fell from {before:.4f} to {recall:.4f}, max_recall_drop is "
                f"{profile.max_recall_drop:g}"
            )
    return found


def _origin(profile: Profile, transfer: Transfer | None) -> list[str]:
    if transfer is None or transfer.source != "proxy" or transfer.shift <= profile.max_shift:
        return []
    return [
        f"the proxy rows are out of the domain: their shift is {transfer.shift:.3f}, max_shift is "
        f"{profile.max_shift:g}"
    ]
