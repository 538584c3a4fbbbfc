"""Staged rollout: a release reaches a few devices, then more, and is taken back by itself when it hurts.

Pure: what is known of the devices comes in, what is to be done comes out. The coordinator journals each act
and carries it out in one transaction, so that a restart asks again and hears the same.

::

    planned ──start──> running ──last stage held──> done
                        │   ^
                        │   └─ pause / resume
                        ├──breach──> rolling-back ──all told──> rolled-back
                        └──abort───> rolling-back ──all told──> aborted

Rules:

* A device's place in a rollout is a hash of both their names: it keeps its stage, each stage holds the one
  before, and nobody chooses the canaries.
* A stage is left for the next one when enough of its devices report the release in service, and it has been
  watched for so long, and nothing is wrong. Time alone promotes nothing.
* What a device proves (its self-test failed, the release ended its process) breaches at once; so does what
  waiting cannot change: errors that are no chance, and answers, when the stage has as many as it needs or
  all that will ever come, or when even fewer leave no doubt.
* What only looks bad breaches when a second sample says the same: errors and latency after ``min_requests``
  more predictions, which the next check-in may bring; without them, and for few answers, after ``settle_s``.
* A rollback asks every device that was told, also those that are away: they hear of the good release first.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from lepton_fl.delivery.trial import (
    CLEARED,
    IS_BAD,
    LOOKS_BAD,
    Trial,
    counted,
    doubt,
    needed,
    shares,
    tail_bound,
)
from lepton_fl.plan import Frozen

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Label = Annotated[str, Field(min_length=1, max_length=50)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=90 * 86400, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]

Phase = Literal["planned", "running", "paused", "rolling-back", "rolled-back", "aborted", "done"]
OPEN: Final[tuple[Phase, ...]] = ("planned", "running", "paused", "rolling-back")
TRIED: Final = "on their own rows"  # in words: what devices answer
MOST_COUNTED: Final = 1000  # predictions of one device: a busy one does not outvote all others
FEW: Final = 20  # predictions: of fewer, the 95th percentile is the slowest one
PROOF: Final = frozenset(
    {"self-test", "crashed", "tampered", "foreign", "older"}
)  # faults that time does not cure


class Stage(Frozen):
    """The devices that a rollout has reached when the stage is full.

    Attributes:
        share: Of all devices that the rollout is for, from 0 (exclusive) to 1.
        groups: Or the devices with any of these labels, and those of the stages before.
    """

    share: Share | None = None
    groups: tuple[Label, ...] = ()

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.share is None) == (not self.groups) or self.share == 0:
            raise ValueError("a stage has a share above 0, or groups, and not both")
        return self

    def __str__(self) -> str:
        """For people: ``10 %``."""
        return f"{100 * self.share:g} %" if self.share is not None else " + ".join(self.groups)


class Health(Frozen):
    """When a stage has held, and when it has not.

    Attributes:
        window_s: A stage is watched for at least so long.
        min_share: Of the stage's devices, must report the release in service.
        min_devices: So many of them in any case, or all where the stage has fewer.
        max_failed: Share of the stage's devices that may give the release up; rounded down, so a stage of few
            devices allows none.
        max_errors: Share of predictions that may fail, over the whole stage; no device counts for more than
            ``MOST_COUNTED`` of them.
        min_requests: Predictions over the whole stage below which latency, and errors that may be chance,
            say nothing; and after so many more, what looked bad and still does is bad.
        max_slowdown: Median over devices of p95 latency now over p95 of the release before.
        settle_s: What looks bad and has no second sample is bad when it has looked so for so long.
        trial: What devices are asked of the release's quality on their own rows; None = nothing.
    """

    window_s: Seconds = 3600
    min_share: Share = 0.8
    min_devices: Annotated[int, Field(ge=1)] = 5
    max_failed: Share = 0.02
    max_errors: Share = 0.01
    min_requests: Count = 100
    max_slowdown: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    settle_s: Seconds = 300
    trial: Trial | None = None


DEFAULT_STAGES: Final = tuple(Stage(share=share) for share in (0.01, 0.1, 0.5, 1.0))


class Wish(Frozen):
    """What an operator asks for, as read from a file.

    Attributes:
        id: Names the rollout, and is what devices are drawn with.
        releases: The release for each device profile; a plan has the SHA-256 of its manifest, a file may have
            any name that says which.
        stages: In order; shares rise.
        health: What decides.
    """

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    releases: Annotated[dict[Label, Name], Field(min_length=1, max_length=50)]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1, max_length=20)] = DEFAULT_STAGES
    health: Health = Health()

    @model_validator(mode="after")
    def _rising(self) -> Self:
        shares = [stage.share for stage in self.stages if stage.share is not None]
        if any(after <= before for before, after in pairwise(shares)):
            raise ValueError(f"the shares of the stages must rise, got {shares}")
        return self


class RolloutPlan(Wish):
    """A checked wish; frozen and journalled before a device hears of it.

    Attributes:
        task: ``package.module:attribute``; devices that take releases of another one are left alone.
    """

    task: Annotated[str, Field(min_length=1, max_length=200)]
    releases: Annotated[dict[Label, Sha256], Field(min_length=1, max_length=50)]


@dataclass(frozen=True, slots=True)
class Service:
    """What a device counted since the release it serves came into service.

    Attributes:
        requests: Predictions asked for.
        errors: Of them, failed by the model or the endpoint, not by the caller.
        p95_ms: Latency of one row; 0 = not known.
    """

    requests: int = 0
    errors: int = 0
    p95_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Known:
    """What the coordinator knows of one device.

    Attributes:
        id: Its id.
        profile: As it reports it.
        groups: Its labels.
        wanted: The release that it should have, as recorded; empty = none.
        serving: The release that it reports in service; empty = none.
        failed: Releases it does not take: name to fault; only those it has given up.
        service: Its counters for ``serving``.
        trials: Whether its owner lets it answer what it makes of a release on its own rows.
        answer: What it said of ``serving`` when asked the rollout's question; empty = nothing.
    """

    id: str
    profile: str
    groups: tuple[str, ...] = ()
    wanted: str = ""
    serving: str = ""
    failed: Mapping[str, str] = field(default_factory=dict)
    service: Service = Service()
    trials: bool = False
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Told:
    """What a rollout did to a device.

    Attributes:
        stage: In which it was told.
        before: The release that it should have had before; empty = none.
        p95_ms: The p95 latency it reported then; 0 = not known.
    """

    stage: int
    before: str
    p95_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a rollout is, as the journal has it.

    Attributes:
        phase: See the module's picture.
        stage: Index into the plan's stages.
        since: Wall clock s at which the stage began.
        told: The devices that were told, and not taken back.
        suspect: What looks bad; empty = nothing.
        suspect_since: Wall clock s.
        suspect_requests: Predictions that had been counted then.
    """

    phase: Phase = "planned"
    stage: int = 0
    since: float = 0.0
    told: Mapping[str, Told] = field(default_factory=dict)
    suspect: str = ""
    suspect_since: float = 0.0
    suspect_requests: int = 0


@dataclass(frozen=True, slots=True)
class Act:
    """What is to be done now.

    Attributes:
        kind: ``tell`` devices of the release; ``suspect`` (or no more, with an empty cause); ``breach``:
            begin to roll back; ``promote`` to the next stage; ``finish``; ``revert`` devices to what they
            had; ``wait``.
        devices: Of ``tell`` and ``revert``.
        cause: In words.
        until: Wall clock s until which nothing can change by itself; 0 = not known.
        requests: Of ``suspect``: predictions counted so far.
    """

    kind: Literal["tell", "suspect", "breach", "promote", "finish", "revert", "wait"]
    devices: tuple[str, ...] = ()
    cause: str = ""
    until: float = 0.0
    requests: int = 0


def draw(rollout_id: str, device_id: str) -> float:
    """The place of a device in a rollout, uniform in [0, 1); the same for ever."""
    digest = hashlib.sha256(f"lepton-rollout/1\0{rollout_id}\0{device_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def stages_of(plan: RolloutPlan, devices: Iterable[Known]) -> dict[str, int]:
    """The first stage of each device that is of one: by hash or by label, and of a profile with a release.

    Args:
        plan: The plan.
        devices: All that could take part: enrolled, of the plan's task, and in no other rollout.

    Returns:
        Id -> index of the stage. The first stage with a share has at least one device, if there is any and
        none is reached before: the first by hash.
    """
    fleet = sorted((d for d in devices if d.profile in plan.releases), key=lambda d: d.id)
    places = {d.id: draw(plan.id, d.id) for d in fleet}
    found: dict[str, int] = {}
    for index, stage in enumerate(plan.stages):
        if stage.share is None:
            mine = [d.id for d in fleet if set(d.groups) & set(stage.groups)]
        else:
            mine = [name for name, place in places.items() if place < stage.share]
            if fleet and not mine and not found:
                mine = [min(places, key=lambda name: (places[name], name))]
        for name in mine:
            found.setdefault(name, index)
    return found


def members(plan: RolloutPlan, stage: int, devices: Iterable[Known]) -> list[Known]:
    """The devices of a stage and of those before it, in order of ids; see :func:`stages_of`."""
    fleet = sorted(devices, key=lambda d: d.id)
    index = stages_of(plan, fleet)
    return [d for d in fleet if index.get(d.id, len(plan.stages)) <= stage]


def reaches(plan: RolloutPlan, device: Known) -> bool:
    """Whether a device is of one of the plan's stages, whoever else there is."""
    place = draw(plan.id, device.id)
    return device.profile in plan.releases and any(
        place < stage.share if stage.share is not None else bool(set(device.groups) & set(stage.groups))
        for stage in plan.stages
    )


def decide(plan: RolloutPlan, standing: Standing, devices: Collection[Known], now: float) -> Act:
    """The next act of a rollout; asked again after it was carried out, until it is ``wait``.

    Args:
        plan: The frozen plan.
        standing: Where it is.
        devices: All enrolled devices of the plan's task that are in no other rollout, and all that were told.
        now: Wall clock s; may jump: a window that would end later than it lasts ends when it has lasted.
    """
    if standing.phase == "rolling-back":
        return _take_back(standing)
    if standing.phase != "running":
        return Act("wait", cause=_RESTING[standing.phase])
    wanted = members(plan, standing.stage, devices)
    if untold := tuple(d.id for d in wanted if d.id not in standing.told):
        return Act("tell", untold)
    reached = [d for d in devices if d.id in standing.told]
    if proof := _proof(plan, reached):
        return Act("breach", cause=proof)
    if act := _doubt(plan, standing, reached, now):
        return act
    return _progress(plan, standing, reached, now)


_RESTING: Final[Mapping[Phase, str]] = {
    "planned": "nobody has started it",
    "paused": "somebody has paused it",
    "rolled-back": "it is over",
    "aborted": "it is over",
    "done": "it is over",
}


def _take_back(standing: Standing) -> Act:
    if standing.told:
        return Act("revert", tuple(sorted(standing.told)))
    return Act("finish", cause="every device that was told is told otherwise")


def _proof(plan: RolloutPlan, reached: Sequence[Known]) -> str:
    """What devices proved against the release, or say beyond doubt; empty = nothing."""
    enough = _all_said(plan, reached) or not _untried(plan, reached)
    if tried := _tried_badly(plan, reached, LOOKS_BAD if enough else IS_BAD):
        return tried
    if failed := _errors_beyond_doubt(plan, reached):
        return failed
    bad = [d for d in reached if d.failed.get(plan.releases.get(d.profile, "")) in PROOF]
    if len(bad) <= int(plan.health.max_failed * len(reached)):
        return ""
    faults = sorted({d.failed[plan.releases[d.profile]] for d in bad})
    return (
        f"{len(bad)} of {len(reached)} devices gave the release up ({', '.join(faults)}), "
        f"at most {100 * plan.health.max_failed:g} % may: {', '.join(d.id for d in bad[:5])}"
    )


def _all_said(plan: RolloutPlan, reached: Sequence[Known]) -> bool:
    """Whether every device that will ever answer has: waiting would bring no other count."""
    return all(d.answer and d.serving == plan.releases.get(d.profile) for d in reached if d.trials)


def _errors_beyond_doubt(plan: RolloutPlan, reached: Sequence[Known]) -> str:
    """Whether more predictions fail than chance explains, however few were asked for; empty = no."""
    requests, errors = _predictions(_in_service(plan, reached))
    if tail_bound(requests, errors, plan.health.max_errors) >= IS_BAD:
        return ""
    return f"{_failures(plan, requests, errors)}, and that is no chance"


def _predictions(served: Sequence[Known]) -> tuple[float, float]:
    """Predictions asked for and failed, over all devices; none counts for more than ``MOST_COUNTED``."""
    weights = [min(1.0, MOST_COUNTED / max(1, d.service.requests)) for d in served]
    counted = list(zip(weights, (d.service for d in served), strict=True))
    return math.fsum(w * s.requests for w, s in counted), math.fsum(w * s.errors for w, s in counted)


def _failures(plan: RolloutPlan, requests: float, errors: float) -> str:
    allowed = 100 * plan.health.max_errors
    return f"{errors:.0f} of {requests:.0f} predictions failed, at most {allowed:g} % may"


def _doubt(plan: RolloutPlan, standing: Standing, reached: Sequence[Known], now: float) -> Act | None:
    """What looks bad, new or for long enough; None = go on."""
    looks = _looks_bad(plan, standing, reached)
    if not looks:
        return Act("suspect") if standing.suspect else None
    requests = sum(d.service.requests for d in _in_service(plan, reached))
    if not standing.suspect:
        return Act("suspect", cause=looks, requests=min(requests, 2**53))
    if TRIED not in looks + standing.suspect:
        fresh = requests - standing.suspect_requests
        if fresh >= max(1, plan.health.min_requests):
            return Act("breach", cause=f"{looks}; {fresh} predictions later it is the same")
    passed = now - standing.suspect_since
    if 0 <= passed < plan.health.settle_s:
        until = standing.suspect_since + plan.health.settle_s
        return Act("wait", cause=f"it looks bad and may settle: {looks}", until=until)
    return Act("breach", cause=f"{looks}, for {max(passed, 0):.0f} s")


def _looks_bad(plan: RolloutPlan, standing: Standing, reached: Sequence[Known]) -> str:
    health, served = plan.health, _in_service(plan, reached)
    level = CLEARED if TRIED in standing.suspect else LOOKS_BAD
    if tried := _tried_badly(plan, reached, level):
        return tried
    if sum(d.service.requests for d in served) < max(1, health.min_requests):
        return ""
    requests, errors = _predictions(served)
    if errors > health.max_errors * requests:
        return _failures(plan, requests, errors)
    ratios = sorted(
        d.service.p95_ms / standing.told[d.id].p95_ms
        for d in served
        if d.service.requests >= FEW and d.service.p95_ms > 0 and standing.told[d.id].p95_ms > 0
    )
    slow = ratios[len(ratios) // 2] if ratios else 0.0
    if slow > health.max_slowdown:
        return f"predictions take {slow:.2f} times as long as before, at most {health.max_slowdown:g} may"
    return ""


def _in_service(plan: RolloutPlan, reached: Sequence[Known]) -> list[Known]:
    """The devices that serve what the rollout has brought them."""
    return [d for d in reached if d.serving == plan.releases.get(d.profile)]


def _tried_badly(plan: RolloutPlan, reached: Sequence[Known], level: float) -> str:
    """Whether devices' answers say that the release is bad, at this level of doubt; empty = no."""
    trial = plan.health.trial
    counts = counted(d.answer for d in _in_service(plan, reached))
    total = sum(counts.values())
    if trial is None or total < trial.min_answers or doubt(trial, counts) >= level:
        return ""
    truly = {word: min(1.0, max(0.0, share)) for word, share in shares(counts, trial.epsilon).items()}
    return (
        f"{total - counts.get('fine', 0)} of {total} devices say {TRIED} that it is worse or drifts: without "
        f"the randomisation {100 * truly['worse']:.0f} % and {100 * truly['drifts']:.0f} %, at most "
        f"{100 * trial.max_bad:g} % may"
    )


def _untried(plan: RolloutPlan, reached: Sequence[Known]) -> str:
    """How many answers of a trial are missing, in words; empty = none."""
    trial = plan.health.trial
    if trial is None:
        return ""
    total = sum(counted(d.answer for d in _in_service(plan, reached)).values())
    if total >= needed(trial):
        return ""
    able = sum(d.trials for d in reached)
    return f"{total} devices have answered, {needed(trial)} must; {able} of {len(reached)} do answer"


def _progress(plan: RolloutPlan, standing: Standing, reached: Sequence[Known], now: float) -> Act:
    health, last = plan.health, standing.stage == len(plan.stages) - 1
    served = len(_in_service(plan, reached))
    needed = min(len(reached), max(health.min_devices, math.ceil(health.min_share * len(reached))))
    if not reached:
        return Act("wait", cause="no enrolled device of these profiles takes releases of this task")
    if served < needed:
        return Act("wait", cause=f"{served} of {len(reached)} devices serve it, {needed} must")
    if missing := _untried(plan, reached):
        return Act("wait", cause=f"{served} of {len(reached)} devices serve it; {missing}")
    held = now - standing.since
    if 0 <= held < health.window_s:
        until = standing.since + health.window_s
        return Act(
            "wait", cause=f"{served} of {len(reached)} devices serve it; the stage is watched", until=until
        )
    cause = f"{served} of {len(reached)} devices serve it and nothing is wrong"
    return Act("finish" if last else "promote", cause=cause)
