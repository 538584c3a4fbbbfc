"""A recorded run as a scenario: the same devices at the same times, with the same outcomes.

    replay = Replay.read(Path("run.jsonl"))        # `lepton run journal RUN --output run.jsonl`, or the
                                                   # journal.jsonl of a simulated run
    world = replay.world(fleet.devices)            # recorded device k is the fleet's device k
    replay.spec, replay.attempts

Rules. A file is read strictly: a line that is damaged, altered or out of place is named and nothing is used.
Every answer comes when it came, and the one that closed an attempt when it closed. Journals written before
arrivals were recorded say only in which order a coordinator heard of its devices: there an answer is placed
no earlier than the one before it and than the device's own seconds allow.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from lepton_fl.errors import ConfigError, NotFound, Rejection, RunError, StateCorrupt, StateError
from lepton_fl.files import canonical_json
from lepton_fl.plan import RoundPlan, RunSpec
from lepton_fl.rounds.cohort import Candidate
from lepton_simulations.journal import FIELDS, Event, read_journal
from lepton_simulations.world.clock import VirtualClock
from lepton_simulations.world.config import WorldConfig
from lepton_simulations.world.timetable import Flags
from lepton_simulations.world.world import Examples, Fate, World, draw_devices

FORMAT: Final = "lepton run journal 1"
MAX_LINE: Final = 16 << 20  # bytes; a coordinator writes no longer event
_CONTEXT: Final = "lepton journal v1"  # of a coordinator's hashes
_EARLY_S: Final = 1e-6  # a moment that was rounded may come so much early

Seconds = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
Kind = Literal["train", "evaluate"]


class _Body(BaseModel):
    """The part of an event's body that a replay needs; bodies of newer versions may hold more."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Part(_Body):
    """What became of one device."""

    device_id: str
    outcome: Literal["counted", "surplus", "rejected", "dropped"]
    reason: str = ""  # a Rejection where it was rejected or dropped
    seconds: Seconds = 0.0  # the device's own
    examples: Annotated[int, Field(ge=0)] = 0
    bytes_up: Annotated[int, Field(ge=0)] = 0
    bytes_down: Annotated[int, Field(ge=0)] = 0
    arrived_s: Seconds | None = None  # when the coordinator heard of it, since the attempt began


class _Planned(_Body):
    round: int
    attempt: int
    plan: dict[str, JsonValue]


class _Closed(_Body):
    round: int
    attempt: int = 1
    participation: tuple[Part, ...] = ()
    seconds: Seconds | None = None  # of a coordinator's committed round
    cause: str = ""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a round, or one evaluation on devices."""

    kind: Kind
    round: int
    attempt: int
    cohort: tuple[str, ...]
    start_s: float  # virtual: since the run began
    seconds: float  # from sending the request until it closed
    deadline_s: float  # inf where it is not recorded
    wanted: int
    parts: tuple[Part, ...]  # in the order in which the coordinator heard of them
    crashed: bool = False  # the coordinator died in it
    committed: bool = False

    @property
    def key(self) -> tuple[str, int, int]:
        """What a plan of this attempt says."""
        return self.kind, self.round, 1 if self.kind == "evaluate" else self.attempt

    @property
    def counted(self) -> tuple[Part, ...]:
        """Those whose answers were used."""
        return tuple(part for part in self.parts if part.outcome == "counted")


@dataclass(frozen=True)
class Replay:
    """A recorded run."""

    path: Path
    run_id: str
    spec: RunSpec
    attempts: tuple[Attempt, ...]  # in order; one that was open when the journal ended is left out

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a journal.

        Raises:
            NotFound: there is no such file.
            StateCorrupt: names the first line that is damaged, altered or out of place.
            StateError: the file cannot be read.
            ConfigError: it is of a buffered run, whose devices come and go at no round's bidding.
        """
        reader = _Reader(path)
        for number, event in _events(path):
            reader.take(number, event)
        return cls(path, *reader.finish())

    @property
    def devices(self) -> tuple[str, ...]:
        """All devices that were ever asked, in the order in which they first were."""
        return tuple(dict.fromkeys(d for attempt in self.attempts for d in attempt.cohort))

    @property
    def rounds(self) -> int:
        """How many rounds were committed."""
        return sum(attempt.committed for attempt in self.attempts)

    @property
    def rows(self) -> dict[str, int]:
        """With how many rows each device trained, of those that were ever counted."""
        training = [attempt for attempt in self.attempts if attempt.kind == "train"]
        return {part.device_id: part.examples for attempt in training for part in attempt.counted}

    @property
    def evaluates_on_devices(self) -> bool:
        """Whether devices were asked to evaluate."""
        return any(attempt.kind == "evaluate" for attempt in self.attempts)

    def without_evaluations(self) -> "Replay":
        """The same run for a simulation whose devices are not asked to evaluate."""
        return replace(self, attempts=tuple(a for a in self.attempts if a.kind == "train"))

    def world(self, device_ids: Sequence[str] | None = None, clock: VirtualClock | None = None) -> World:
        """The world in which this happens again.

        Args:
            device_ids: the virtual fleet's; the k-th plays the recorded run's k-th device, further ones are
                never asked. None = the recorded ids.
            clock: of a resumed simulation.

        Raises:
            ConfigError: the fleet has fewer devices than were recorded.
        """
        ids = self.devices if device_ids is None else tuple(device_ids)
        if len(ids) < len(self.devices):
            raise ConfigError(
                f"{self.path} is about {len(self.devices)} devices, the simulated fleet has {len(ids)}.",
                hint=f"Split the data over at least {len(self.devices)} devices.",
            )
        return RecordedWorld(self, ids, clock)


# --- the world --------------------------------------------------------------------------------------


class RecordedWorld(World):
    """A world in which nothing is drawn: every attempt goes as recorded."""

    def __init__(self, replay: Replay, device_ids: tuple[str, ...], clock: VirtualClock | None) -> None:
        config = WorldConfig()
        super().__init__(config, draw_devices(config, device_ids, 0), 0, clock)
        self._path, self._attempts = replay.path, replay.attempts
        self._name = dict(zip(replay.devices, device_ids, strict=False))  # recorded -> of the fleet
        self._place = {attempt.key: place for place, attempt in enumerate(self._attempts)}
        self._next: int | None = None  # place of the attempt that comes next; None = by the clock

    def standings(self, now: float) -> Flags:
        """The cohort of the attempt that comes next, once its time has come."""
        there = np.zeros(len(self._row), bool)
        attempt = self._coming(now)
        if attempt and (attempt.kind == "evaluate" or attempt.start_s <= now + _EARLY_S):
            there[[self._row[self._name[d]] for d in attempt.cohort]] = True
        return there

    def next_change(self, now: float) -> float:
        """When the attempt that comes next began; inf = it can begin, or the record ends."""
        attempt = self._coming(now)
        return attempt.start_s if attempt and attempt.start_s > now else inf

    def candidates(self, now: float, unfit: Mapping[str, str] | None = None) -> list[Candidate]:
        """See ``World.candidates``; a device that was not asked is not eligible."""
        why = "not asked in the recorded attempt" if self._coming(now) else "the record ends here"
        found = [
            yes if is_there else Candidate(yes.device_id, "not-eligible", why)
            for yes, is_there in zip(self._eligible, self.standings(now).tolist(), strict=True)
        ]
        for device_id, broken in (unfit or {}).items():
            found[self._row[device_id]] = Candidate(device_id, "data-contract", broken)
        return found

    def fates(
        self,
        plan: RoundPlan,
        examples: Examples,
        bytes_down: int,
        bytes_up: int,
        asked_s: float | None = None,
    ) -> list[Fate]:
        """See ``World.fates``: the recorded order of arrival.

        Raises:
            RunError: the record has no such attempt.
        """
        attempt = self._of(plan)
        self._next = self._place[attempt.key] + 1
        found = {fate.device_id: fate for fate in self._recorded(attempt)}
        order = {device_id: place for place, device_id in enumerate(found)}
        known = sorted((d for d in plan.cohort if d in found), key=order.__getitem__)
        return [found[d] for d in known] + [Fate(d, inf) for d in plan.cohort if d not in found]

    def usual_seconds(self, examples: Examples, bytes_down: int, bytes_up: int) -> dict[str, float]:
        """The mean of what each device reported; infinite of one that was asked and never did."""
        reported = dict[str, list[float]]()
        for attempt in self._attempts:
            for part in attempt.parts if attempt.kind == "train" else ():
                times = reported.setdefault(self._name[part.device_id], [])
                times += [part.seconds] * (part.seconds > 0)
        return {d: fmean(times) if times else inf for d, times in reported.items()}

    def crashes(self, plan: RoundPlan) -> bool:
        """Whether the coordinator died in this attempt."""
        if not self._of(plan).crashed:
            return False
        self._next = self._place[self._of(plan).key] + 1
        return True

    def downtime_s(self, plan: RoundPlan) -> float:
        """See ``World.downtime_s``."""
        return self._of(plan).seconds

    def _of(self, plan: RoundPlan) -> Attempt:
        key = (plan.kind, plan.round, 1 if plan.kind == "evaluate" else plan.attempt)
        if key not in self._place:
            raise RunError(
                f"{self._path} has no {plan.kind} round {plan.round}, attempt {plan.attempt}.",
                hint="What is simulated differs from what was recorded; use the recorded run's settings.",
            )
        return self._attempts[self._place[key]]

    def _coming(self, now: float) -> Attempt | None:
        """The attempt that comes next; the first call after a start finds its place by the clock."""
        if self._next is None:
            over = [a.start_s + a.seconds <= now + _EARLY_S for a in self._attempts]
            self._next = over.index(False) if False in over else len(over)
            self._next = 0 if now == 0 else self._next
        return self._attempts[self._next] if self._next < len(self._attempts) else None

    def _recorded(self, attempt: Attempt) -> Iterator[Fate]:
        for part, arrives_s in zip(attempt.parts, _arrivals(attempt), strict=True):
            device_id = self._name[part.device_id]
            if part.outcome == "counted" or arrives_s == inf:
                yield Fate(device_id, arrives_s, part.seconds)
            else:
                known = part.reason in set(Rejection)
                reason = part.reason if known else Rejection.FAILED.value
                detail = f"As recorded: {part.reason or part.outcome}."
                yield Fate(device_id, arrives_s, part.seconds, refusal=reason, detail=detail)


def refuse_buffered(whose: str, mode: str) -> None:
    """Only rounds can be replayed."""
    if mode == "buffered":
        raise ConfigError(
            f"{whose} run.mode is 'buffered', and only rounds can be replayed.",
            hint="Replay a run with run.mode = 'synchronous', in a scenario with that mode.",
        )


def _arrivals(attempt: Attempt) -> list[float]:
    """When each part came, ascending; inf = not before the attempt closed."""
    parts = attempt.parts
    if all(part.arrived_s is None for part in parts):
        return _placed(attempt)
    moments = [inf if part.arrived_s is None else min(part.arrived_s, attempt.seconds) for part in parts]
    counted = [place for place, part in enumerate(parts) if part.outcome == "counted"]
    if len(counted) >= attempt.wanted:
        moments[counted[-1]] = attempt.seconds
    elif moments and moments[-1] < inf:
        moments[-1] = attempt.seconds
    return moments


def _placed(attempt: Attempt) -> list[float]:
    """The same from an older journal, whose parts are in order of arrival but carry no moments."""
    last, now, moments = _closes(attempt), 0.0, []
    for place, part in enumerate(attempt.parts):
        now = max(now, attempt.seconds if place == last else min(part.seconds, attempt.seconds))
        moments.append(now if place <= last else inf)
    return moments


def _closes(attempt: Attempt) -> int:
    """The place of the device whose word closed the attempt; those after it were not heard of."""
    counted = [place for place, part in enumerate(attempt.parts) if part.outcome == "counted"]
    if len(counted) >= attempt.wanted:
        return counted[-1]
    heard = list(attempt.parts)
    if attempt.seconds >= attempt.deadline_s:  # closed by the deadline: the silent ones are listed last
        while heard and heard[-1].outcome in ("dropped", "surplus") and not heard[-1].bytes_up:
            heard.pop()
    return len(heard) - 1


# --- reading ----------------------------------------------------------------------------------------


@dataclass
class _Reader:
    """Takes events in order and puts the attempts together."""

    path: Path
    attempts: list[Attempt] = field(default_factory=list)
    run_id: str = ""
    spec: RunSpec | None = None
    began: float | None = None  # time of the run's first start
    free_s: float = 0.0  # when an evaluation could begin
    open: tuple[RoundPlan, float] | None = None  # the plan in hand, and when it was made
    line: int = 0

    def take(self, line: int, event: Event) -> None:
        """One event of the run."""
        self.line = line
        if self.run_id and event.subject != self.run_id:
            raise self._wrong(f"is about {event.subject!r}, the lines before it about {self.run_id!r}")
        self.run_id = event.subject
        now = self._since(event.time)
        try:
            self._understand(event.kind, dict(event.body), now)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise self._wrong(f"({event.kind}) is not as it should be: {where}: {first['msg']}") from error
        except KeyError as error:
            raise self._wrong(f"({event.kind}) has no {error.args[0]!r}") from error

    def finish(self) -> tuple[str, RunSpec, tuple[Attempt, ...]]:
        """Run id, spec and attempts."""
        if self.spec is None:
            raise self._wrong("is the last one, and none says what the run was asked for (run.queued)")
        refuse_buffered("The recorded run's", self.spec.mode)
        if not any(attempt.committed for attempt in self.attempts):
            raise self._wrong("is the last one, and no round was committed: there is nothing to replay")
        return self.run_id, self.spec, tuple(self.attempts)

    def _understand(self, kind: str, body: dict[str, Any], now: float) -> None:
        match kind:
            case "run.queued":
                self.spec = _spec(body["spec"])
            case "run.started":
                self.free_s = now
                if "scenario" in body:  # of a simulation
                    self.spec = _spec(body["scenario"]["run"])
            case "round.planned":
                planned = _Planned.model_validate(body)
                self._give_up(now)
                self.open = RoundPlan.from_json(planned.plan), now
            case "round.committed" | "round.abandoned":
                self._close(_Closed.model_validate(body), now, kind == "round.committed")
            case "round.evaluated":
                self._evaluated(_Closed.model_validate(body), now)

    def _close(self, closed: _Closed, now: float, committed: bool) -> None:
        if self.open is None or (self.open[0].round, self.open[0].attempt) != (closed.round, closed.attempt):
            raise self._wrong(f"closes round {closed.round}, attempt {closed.attempt}, which is not open")
        plan, start = self.open
        seconds = now - start if closed.seconds is None else closed.seconds
        crashed = not committed and not closed.participation
        self._check_cohort(closed, plan.cohort)
        parts = _in_order(closed.participation)
        self.attempts.append(_attempt(plan, start, seconds, parts, crashed, committed))
        self.open, self.free_s = None, now

    def _give_up(self, now: float) -> None:
        """A new plan while one is open: the coordinator died in between."""
        if self.open is not None:
            plan, start = self.open
            self.attempts.append(_attempt(plan, start, now - start, (), crashed=True, committed=False))

    def _evaluated(self, closed: _Closed, now: float) -> None:
        if closed.participation:
            cohort = tuple(part.device_id for part in closed.participation)
            seconds, wanted = now - self.free_s, len(cohort)
            counted = sum(part.outcome == "counted" for part in closed.participation)
            if any(part.outcome == "surplus" for part in closed.participation):
                wanted = counted
            parts = _in_order(closed.participation)
            self._check_cohort(closed, cohort)
            self.attempts.append(
                Attempt("evaluate", closed.round, 1, cohort, self.free_s, seconds, inf, wanted, parts)
            )
        self.free_s = now

    def _check_cohort(self, closed: _Closed, cohort: Sequence[str]) -> None:
        named = [part.device_id for part in closed.participation]
        if len(set(named)) != len(named) or not set(named) <= set(cohort):
            raise self._wrong("names a device twice, or one that was not asked")

    def _since(self, time: float) -> float:
        """Virtual seconds; a clock that was set back does not turn the order around."""
        self.began = time if self.began is None else self.began
        return max(0.0, time - self.began, self.free_s, self.open[1] if self.open else 0.0)

    def _wrong(self, what: str) -> StateCorrupt:
        return StateCorrupt(f"{self.path}: line {self.line} {what}.", hint="Export the journal again.")


def _in_order(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """By arrival; those that never came, and parts without a moment, stay in the order they are in."""
    return tuple(sorted(parts, key=lambda part: inf if part.arrived_s is None else part.arrived_s))


def _spec(body: Mapping[str, Any]) -> RunSpec:
    return RunSpec.model_validate_json(json.dumps(body))


def _attempt(
    plan: RoundPlan, start: float, seconds: float, parts: tuple[Part, ...], crashed: bool, committed: bool
) -> Attempt:
    return Attempt(
        kind=plan.kind,
        round=plan.round,
        attempt=plan.attempt,
        cohort=plan.cohort,
        start_s=start,
        seconds=seconds,
        deadline_s=plan.deadline_s,
        wanted=plan.wanted_reports,
        parts=parts,
        crashed=crashed,
        committed=committed,
    )


def _events(path: Path) -> Iterator[tuple[int, Event]]:
    """Line numbers and checked events of an exported journal, or of a simulation's own."""
    try:
        with path.open("rb") as file:
            first = file.readline(MAX_LINE)
    except FileNotFoundError as error:
        raise NotFound(f"There is no journal {path}.", hint="`lepton run journal` exports one.") from error
    except OSError as error:
        raise StateError(f"Cannot read {path}: {error.strerror or error}.") from error
    header = _json(path, 1, first)
    if "format" not in header:
        yield from enumerate(read_journal(path), 1)
        return
    if header["format"] != FORMAT:
        raise StateCorrupt(
            f"{path}: line 1 says format {header['format']!r}, this version reads {FORMAT!r}.",
            hint="Export the journal with the version of lepton-fl that reads it.",
        )
    yield from _exported(path)


def _exported(path: Path) -> Iterator[tuple[int, Event]]:
    """Every event must fit its own hash; those of other subjects lie between, so there may be gaps."""
    last_seq, last_hash = 0, ""
    try:
        with path.open("rb") as file:
            file.readline(MAX_LINE)
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 2):
                fields = _json(path, number, line)
                if fields.keys() != FIELDS or not isinstance(fields["body"], dict):
                    raise _damaged(path, number, "is not an event")
                if not _fits(fields):
                    raise _damaged(path, number, "was altered: its hash does not match")
                if fields["seq"] <= last_seq:
                    raise _damaged(path, number, "does not come after the line before it")
                if fields["seq"] == last_seq + 1 and last_hash and fields["prev"] != last_hash:
                    raise _damaged(path, number, "does not continue the line before it")
                last_seq, last_hash = fields["seq"], fields["hash"]
                yield (
                    number,
                    Event(fields["seq"], fields["time"], fields["kind"], fields["subject"], fields["body"]),
                )
    except OSError as error:
        raise StateError(f"Cannot read {path}: {error.strerror or error}.") from error


def _fits(fields: Mapping[str, Any]) -> bool:
    """Whether an event has the hash that a coordinator gave it (``lepton_server.store.events``)."""
    try:
        body = canonical_json(fields["body"]).decode()
        place = [fields["prev"], fields["seq"], float(fields["time"]).hex()]
        whole = canonical_json([_CONTEXT, *place, fields["kind"], fields["subject"], body])
    except (ValueError, TypeError):
        return False
    return hashlib.sha256(whole).hexdigest() == str(fields["hash"])


def _json(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        if not line.endswith(b"\n"):
            raise ValueError("it is cut short")
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, RecursionError) as error:
        raise _damaged(path, number, f"cannot be read: {error}") from error
    return fields


def _damaged(path: Path, line: int, what: str) -> StateCorrupt:
    return StateCorrupt(f"{path}: line {line} {what}.", hint="Export the journal again.")
