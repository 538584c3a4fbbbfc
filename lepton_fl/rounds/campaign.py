"""A whole training run: rounds in order, each a function from state to state.

    verdict = Campaign(spec, work, exchange, roster, book, rng).run(state, should_stop)

Rules. A training plan is recorded before any device hears of it. A round counts only once it is recorded as
committed; whoever restarts after a crash passes the last committed state and continues. Every wait has a
bound, and says what it waits for. A round that brought too few reports is abandoned by name and tried again
with another cohort, a bounded number of times; then the run ends with a verdict, never in silence.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import ceil
from random import Random
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from lepton_fl.crashpoints import reached
from lepton_fl.errors import BudgetRefused, ConfigError, LeptonError, QuorumError, RunError
from lepton_fl.plan import MAX_RETRIED, RoundPlan, RunSpec
from lepton_fl.rounds.cohort import Candidate, Shortfall, draw, eligible
from lepton_fl.rounds.collect import (
    ACCEPTED,
    TRAINING,
    Brought,
    Collected,
    collect_evaluation,
    collect_training,
)
from lepton_fl.rounds.coverage import Correction, History
from lepton_fl.rounds.exchange import Exchange
from lepton_fl.rounds.local import CONTROL, control_of, next_control, personal_of
from lepton_fl.rounds.optimizers import ServerState, step
from lepton_fl.rounds.private import PrivateRounds, PrivateState, example_metrics, redact
from lepton_fl.rounds.quantised import next_expected, planned_for
from lepton_fl.rounds.secure import SecureRounds
from lepton_fl.rounds.secure_sum import prove_fits
from lepton_fl.tasks.metrics import Metrics, Sums
from lepton_fl.vector import Layout, Vector, vector_digest
from lepton_fl.wire.messages import Request

Kind = Literal["train", "evaluate"]
Moved = Callable[[RoundPlan, str, Sequence[str]], None]  # of an attempt: its phase, and whose updates count
SHOW_EVERY_S = 5.0  # a cause of waiting that keeps changing is shown at most so often


@dataclass(frozen=True)
class Work:
    """What is trained, as far as a coordinator must know it (no torch needed)."""

    task: str  # package.module:attribute
    version: str
    layout_digest: str
    num_coordinates: int
    metrics: Metrics
    evaluate_centrally: Callable[[Vector], Sums] | None = None
    evaluate_on_devices: bool = True  # off: the watched metric is the central one
    layout: Layout | None = None  # needed where local.personal names tensors, or some are frozen

    @property
    def fixed(self) -> int:
        """Coordinates at the end that never move, see ``Layout``."""
        return self.layout.fixed if self.layout else 0

    @property
    def num_moving(self) -> int:
        """The other ones: those of an update."""
        return self.num_coordinates - self.fixed


@dataclass(frozen=True)
class Best:
    """The best evaluated model so far, by the watched metric."""

    round: int
    model_sha256: str
    value: float


@dataclass(frozen=True, eq=False)
class AtWork:
    """A device of a buffered run that trains across steps."""

    device_id: str
    plan: RoundPlan  # what it trains for
    model: Vector  # (P,) that it trains from
    started_s: float  # by the campaign's clock


@dataclass(frozen=True)
class RunState:
    """Everything the next round depends on."""

    model: Vector
    server: ServerState = field(default_factory=ServerState)
    round: int = 0  # last committed round; 0 before the first
    attempt: int = 0  # last attempt begun at the round after that one
    evaluated: int = 0  # last evaluated round
    best: Best | None = None
    stale: int = 0  # evaluations since the best one
    retried: tuple[tuple[int, int], ...] = ()  # (round, attempt) of rounds whose first attempt did not count
    private: PrivateState | None = None  # of a private run, after its first round
    expected: float = 0.0  # of the next sum of quantised updates, see ``next_expected``; 0 = nothing
    at_work: tuple[AtWork, ...] = ()  # of a buffered run, as they were started

    @cached_property
    def model_sha256(self) -> str:
        """The name of the model; computed once, for a hash of a large model takes a while."""
        return vector_digest(self.model)

    def on(self, **changes: Any) -> Self:  # noqa: ANN401 - the fields of this class, but the model
        """The same model with other numbers around it."""
        other = replace(self, **changes)
        if other.model is self.model:
            other.__dict__["model_sha256"] = self.model_sha256
        return other


@dataclass(frozen=True)
class Committed:
    """One finished training round, to be recorded in one step."""

    state: RunState
    collected: Collected
    metrics: Mapping[str, float]
    seconds: float
    bytes_down: int


@dataclass(frozen=True)
class Evaluated:
    """The evaluation of a committed round."""

    state: RunState
    collected: Collected | None  # None: central only
    metrics: Mapping[str, float]
    improved: bool


@dataclass(frozen=True)
class Verdict:
    """How a run ended, in one word and one sentence."""

    outcome: Literal["completed", "stopped", "failed", "exhausted"]  # the last: a privacy budget is spent
    reason: str
    error: LeptonError | None = field(default=None, compare=False)  # what a run failed of


class Roster(Protocol):
    """Who could take part now."""

    def candidates(self) -> Sequence[Candidate]:
        """Every registered device with its standing for this run's task."""
        ...

    def wait(self, seconds: float) -> None:
        """Return after ``seconds``, or as soon as a standing may have changed."""
        ...


class Book(Protocol):
    """Where a run is recorded: the journal in production, a folder in a simulation."""

    def planned(self, plan: RoundPlan) -> None:
        """Record a plan; only then is it sent."""
        ...

    def abandoned(self, collected: Collected, cause: str) -> None:
        """Record that an attempt does not count."""
        ...

    def committed(self, round_: Committed) -> None:
        """Record a round durably; when this returns it will never be trained again."""
        ...

    def evaluated(self, evaluation: Evaluated) -> None:
        """Record an evaluation."""
        ...

    def waiting(self, cause: str, seconds: float) -> None:
        """Show why the run does not move and how much longer it will wait; '' when it moves again."""
        ...


@dataclass
class Campaign:
    """One run's spec and seams; ``run`` may be called once."""

    spec: RunSpec
    run_id: str
    work: Work
    exchange: Exchange
    roster: Roster
    book: Book
    rng: Random  # draws cohorts and nonces: the operating system's in production
    claim: Callable[[Sequence[str]], bool] = lambda _: True  # take a drawn cohort; False: another run has it
    clock: Callable[[], float] = time.monotonic
    look_s: float = 1.0  # a waiting run looks around at least so often; inf in virtual time, which can jump
    private: PrivateRounds | None = None  # of a run with privacy
    secure: SecureRounds | None = None  # of a run with secure aggregation
    # Further figures of a round that counts, which only a simulation can know.
    measure: Callable[[Collected, NDArray[np.float64]], Mapping[str, float]] = lambda collected, mean: {}
    # What an exchange knows that counts what it sends: plan -> bytes to each device; None = it does not.
    down: Callable[[RoundPlan], Mapping[str, int] | None] = lambda plan: None
    # Of who was asked in this run; a restart brings it back.
    history: History = field(default_factory=History)
    unfinished: RoundPlan | None = None  # an attempt that a restart cut off and the exchange can go on with
    moved: Moved = lambda plan, phase, counted: None  # records the phases of an attempt
    _gathered: bool = field(default=False, init=False)  # a quorum has been seen once
    _void: int = field(default=0, init=False)  # rounds in a row that gave nothing and cannot be repeated
    _known: tuple[Sequence[Candidate], list[str]] = field(default=((), []), init=False)

    def run(self, state: RunState, should_stop: Callable[[], bool] = lambda: False) -> Verdict:
        """Train until the last round, an early stop, a request to stop, or a failure."""
        try:
            personal_of(self.spec.local, self.work.layout)  # a wrong pattern ends the run now
            self._resume_privacy(state)
            self._refuse_plain_rounds()
            while True:
                if self._evaluation_due(state):
                    state = self._evaluate(state)
                if reason := self._finished(state):
                    return Verdict("completed", reason)
                if should_stop():
                    return Verdict("stopped", f"Stopped on request after round {state.round}.")
                advanced = self._train(state, should_stop)
                if advanced is None:
                    return Verdict("stopped", f"Stopped on request in round {state.round + 1}.")
                state = advanced
        except BudgetRefused as refusal:  # the last model stays as it is
            return Verdict("exhausted", f"{refusal} {refusal.hint}".strip())
        except LeptonError as error:
            return Verdict("failed", f"{error} {error.hint}".strip(), error)

    def _resume_privacy(self, state: RunState) -> None:
        if self.private is not None:
            self.private.resume(state.private, state.round)
        elif self.spec.privacy is not None and self.spec.privacy.unit == "device":
            raise ConfigError(
                "run.privacy is set, and nothing here charges it or adds its noise.",
                hint="Private runs work in `lepton simulate`.",
            )

    def _refuse_plain_rounds(self) -> None:
        """A run that must not see single updates never falls back to rounds that do."""
        control = self.spec.local.control_variates
        if control and self.work.fixed:
            raise ConfigError(
                "local.control_variates do not work with a model of which parts are frozen.",
                hint="Set local.control_variates = false.",
            )
        prove_fits(self.spec, self.work.num_moving * (2 if control else 1))
        if self.secure is None and self.spec.secure_aggregation == "required":
            raise ConfigError(
                "run.secure_aggregation is 'required', and nothing here runs its protocol.",
                hint="It runs in `lepton simulate`, `lepton server`, and Flower apps (SecureAggregation).",
            )

    def _finished(self, state: RunState) -> str:
        watch, best = self.spec.early_stop, state.best
        if best and watch.target is not None and _better(best.value, watch.target, watch.mode, 0.0, True):
            return f"Reached {watch.metric} {best.value:.4g} in round {best.round} (target {watch.target:g})."
        if watch.patience and state.stale >= watch.patience:
            found = f"best in round {best.round}" if best else "none found"
            return f"No better {watch.metric} for {state.stale} evaluations; {found}."
        return f"All {self.spec.rounds} rounds are done." if state.round >= self.spec.rounds else ""

    # --- training -----------------------------------------------------------------------------------

    def _train(self, state: RunState, should_stop: Callable[[], bool]) -> RunState | None:
        """One committed round, after as many attempts as it takes and is allowed; None: asked to stop."""
        number, cause, failures = state.round + 1, "", 0
        while failures < self.spec.cohort.max_attempts:
            plan, self.unfinished = self.unfinished, None
            if plan is None:
                cohort = self._quorum(should_stop)
                if cohort is None:
                    return None
                state = state.on(attempt=state.attempt + 1)
                plan = self._plan("train", number, state, cohort, self.spec.cohort.size)
                if self.private:
                    self.private.reserve(plan)
                reached("round.planning")
                self.book.planned(plan)
                reached("round.planned")
            elif self.private:
                self.private.reopened(plan)
            began = self.clock()
            collected, mean = self._collect(plan, state)
            collected.down = self.down(plan)
            self._remember(collected)
            if mean is None:
                stopped = should_stop()
                if collected.wrapped:
                    state = state.on(expected=0.0)
                cause, failures = collected.summary(), failures + 1
                self.book.abandoned(collected, f"Stopped on request: {cause}" if stopped else cause)
                if stopped:
                    return None
                if collected.burnt:
                    return self._skip(state, cause, counts=not collected.forgotten)
                continue
            measured = self.measure(collected, mean)
            after = advance(self.spec, self.work, plan, state, mean, collected.reports)
            del mean
            seconds = self.clock() - began
            after, metrics = self._settled(after, collected)
            metrics |= measured
            self.book.committed(Committed(after, collected, metrics, seconds, collected.bytes_down))
            reached("round.released")
            self._void = 0
            return after
        raise RunError(
            f"Round {number} was abandoned {failures} times in a row; the last time: {cause}.",
            hint="See `lepton run show` for each device's reason; cohort.max_attempts bounds the attempts.",
        )

    def _remember(self, collected: Collected) -> None:
        """Who was asked and whose answer counted: what later plans are corrected by."""
        for device_id, entry in collected.participation.items():
            cause = entry.outcome if entry.cause is None else entry.cause.value
            counted = entry.outcome == ACCEPTED
            self.history.heard(device_id, counted, entry.arrived_s or 0.0 if counted else 0.0, cause)

    def _skip(self, state: RunState, cause: str, *, counts: bool) -> RunState:
        """Go on after a round of which a survivor set went out for signing, and no sum came.

        Devices sign no other set in this round: two sums of the same updates would tell their difference. So
        the next attempt is one at the next round, from the same model. Rounds that a coordinator had done
        before it was restored from an older state are passed over so, and do not count as failures.
        """
        number, self._void = state.round + 1, self._void + counts
        if self._void >= self.spec.cohort.max_attempts:
            raise RunError(
                f"{self._void} rounds in a row gave no sum; the last one, round {number}: {cause}.",
                hint="See `lepton run show` for each device's reason; cohort.max_attempts bounds it.",
            )
        retried = after_attempt(state.retried, number, 0)
        private = self.private.state if self.private else None
        return state.on(round=number, attempt=0, evaluated=number, retried=retried, private=private)

    def _collect(self, plan: RoundPlan, state: RunState) -> Brought:
        """One attempt; of a private run, its noise is in the mean."""
        control = control_of(self.spec.local, state.server, len(state.model))
        finish = partial(self.private.release, plan) if self.private else None
        if self.secure and plan.secure:
            request = Request.of(plan, state.model, control)
            collected, mean = self.secure.collect(plan, request, self.exchange, self.clock, finish)
        else:
            closed = partial(self._closed, plan)
            collected, mean = collect_training(
                plan, state.model, self.exchange, control, self.clock, finish, closed
            )
        if self.private:
            redact(collected)
            if mean is None and collected.burnt:
                self.private.left_out(plan)
            elif mean is None:
                self.private.void(plan, f"Nothing was added up: {collected.summary()}.")
        return collected, mean

    def _closed(self, plan: RoundPlan, collected: Collected) -> None:
        """Whose updates count is fixed before anything is made of them."""
        reached("round.aggregating")
        self.moved(plan, "aggregated", collected.accepted)
        reached("round.aggregated")

    def _settled(self, after: RunState, collected: Collected) -> tuple[RunState, dict[str, float]]:
        """The state to commit, and what may be told of the round."""
        if self.private is None:
            after, figures = learnt(after, collected), collected.figures()
            if self.spec.privacy is not None:
                return after, example_metrics(self.spec.privacy) | figures
            return after, TRAINING.summarise(collected.sums) | figures
        private = self.private.commit(collected.plan, collected.accepted)
        return after.on(private=private), self.private.metrics()

    def _candidates(self) -> Sequence[Candidate]:
        found = self.roster.candidates()
        if self.history.blamed:
            found = [c for c in found if c.device_id not in self.history.blamed]
        return self.private.rested(found) if self.private else found

    def _quorum(self, should_stop: Callable[[], bool]) -> tuple[str, ...] | None:
        """Wait for enough eligible devices and draw from them; None: asked to stop."""
        spec, needed, asked = self.spec.cohort, self._needed(), self._asked()
        began, shown, shown_at = self.clock(), "", 0.0
        while not should_stop():
            candidates = self._candidates()
            ids, waited = self._eligible(candidates), self.clock() - began
            full = len(ids) >= asked or len(ids) >= self._could_come(candidates)
            if len(ids) >= needed and (full or waited >= spec.fill_wait_s):
                cohort = draw(ids, asked, self.rng)
                if self.claim(cohort):  # else another run was faster: look again, within the same bounds
                    self._gathered = True
                    if shown:
                        self.book.waiting("", 0.0)
                    return cohort
            cause = str(Shortfall.of(candidates, needed))
            left = spec.quorum_wait_s - waited
            if left <= 0:
                raise QuorumError(
                    f"No quorum within {spec.quorum_wait_s:g} s: {cause}.",
                    hint="See `lepton devices list` for each device's reason, or lower cohort.min_reports.",
                )
            fill = spec.fill_wait_s - waited
            if cause != shown and (not shown or waited - shown_at >= SHOW_EVERY_S):
                self.book.waiting(cause, fill if len(ids) >= needed and fill > 0 else left)
                shown, shown_at = cause, waited
            self.roster.wait(min(left, fill if fill > 0 else self.look_s, self.look_s))
        return None

    def _eligible(self, candidates: Sequence[Candidate]) -> list[str]:
        """Found and sorted once, for as long as the roster gives the very same tuple."""
        if self._known[0] is not candidates or not isinstance(candidates, tuple):
            self._known = candidates, eligible(candidates)
        return self._known[1]

    def _asked(self) -> int:
        return ceil(self.spec.cohort.size * self.spec.cohort.over_selection)

    def _needed(self) -> int:
        return self.spec.min_reports

    def _could_come(self, candidates: Sequence[Candidate]) -> int:
        """For how many devices a short wait makes sense: first the whole fleet, then those that are there."""
        if not self._gathered:
            return population(candidates)
        return sum(c.standing in ("eligible", "busy") for c in candidates)

    def _plan(self, kind: Kind, number: int, state: RunState, cohort: Sequence[str], size: int) -> RoundPlan:
        nonce = f"{self.rng.getrandbits(128):032x}"
        plan = plan_round(self.spec, self.run_id, self.work, kind, number, state, cohort, size, nonce)
        if kind == "train" and self.spec.cohort.is_corrected:
            factors = Correction(self.spec.cohort.correction_bound).factors(cohort, self.history)
            plan = plan.model_copy(update={"corrections": factors})
        if self.private and kind == "train":
            plan = self.private.shaped(plan)
        if not plan.auxiliary:
            return plan
        return plan.model_copy(update={"population": population(self.roster.candidates())})

    # --- evaluation ---------------------------------------------------------------------------------

    def _evaluation_due(self, state: RunState) -> bool:
        every = self.spec.evaluate_every
        last = state.round == self.spec.rounds
        return state.evaluated < state.round and bool(every) and (last or state.round % every == 0)

    def _evaluate(self, state: RunState) -> RunState:
        collected = self._evaluate_on_devices(state)
        metrics = self.work.metrics.summarise(collected.sums) if collected and collected.reports else {}
        if self.work.evaluate_centrally is not None:
            central = self.work.metrics.summarise(self.work.evaluate_centrally(state.model))
            metrics |= {f"central_{name}": value for name, value in central.items()}
        after, improved = state.on(evaluated=state.round), False
        if self._heard(collected):
            after, improved = self._judge(after, metrics)
        self.book.evaluated(Evaluated(after, collected, metrics, improved))
        reached("round.evaluated")
        return after

    def _evaluate_on_devices(self, state: RunState) -> Collected | None:
        ids = eligible(self.roster.candidates()) if self._on_devices else []
        size = self.spec.evaluate_cohort or self.spec.cohort.size
        if not ids:
            return None
        plan = self._plan("evaluate", state.round, state, draw(ids, size, self.rng), size)
        collected = collect_evaluation(plan, state.model, self.exchange, self.work.metrics, self.clock)
        collected.down = self.down(plan)
        return collected

    @property
    def _on_devices(self) -> bool:
        """Whether devices evaluate; private and secure runs do not: one device's counts would be seen."""
        closed = self.spec.privacy is not None or self.spec.secure_aggregation == "required"
        return self.work.evaluate_on_devices and not closed

    def _heard(self, collected: Collected | None) -> bool:
        """Whether the watched metric can be expected; a silent fleet does not end a run."""
        if self._watched().startswith("central_"):
            return self.work.evaluate_centrally is not None
        return bool(collected and collected.reports)

    def _watched(self) -> str:
        """The devices' figure, unless only the central one is computed."""
        name = self.spec.early_stop.metric
        return name if self._on_devices or name.startswith("central_") else f"central_{name}"

    def _judge(self, state: RunState, metrics: Mapping[str, float]) -> tuple[RunState, bool]:
        watch, best = self.spec.early_stop, state.best
        if self._watched() not in metrics:
            raise ConfigError(
                f"early_stop.metric is {watch.metric!r}; this task reports {', '.join(sorted(metrics))}.",
                hint="Name one of these.",
            )
        value = metrics[self._watched()]
        if best and not _better(value, best.value, watch.mode, watch.min_delta, False):
            return state.on(stale=state.stale + 1), False
        return state.on(best=Best(state.round, state.model_sha256, value), stale=0), True


def plan_round(
    spec: RunSpec,
    run_id: str,
    work: Work,
    kind: Kind,
    number: int,
    state: RunState,
    cohort: Sequence[str],
    size: int,
    nonce: str,
) -> RoundPlan:
    """Freeze one attempt: round ``number``, asking ``cohort`` and closing at ``size`` reports."""
    control = control_of(spec.local, state.server, work.num_coordinates) if kind == "train" else None
    secure = spec.secure if kind == "train" and spec.secure_aggregation == "required" else None
    devices = max(secure.sums(len(cohort))) if secure else len(cohort)
    few = planned_for(spec, number, state.expected, devices, work.num_moving) if kind == "train" else None
    return RoundPlan(
        run_id=run_id,
        round=number,
        attempt=max(1, state.attempt),
        kind=kind,
        task=work.task,
        task_version=work.version,
        layout_digest=work.layout_digest,
        num_coordinates=work.num_coordinates,
        fixed=work.fixed,
        model_sha256=state.model_sha256,
        cohort=tuple(cohort),
        wanted_reports=min(size, len(cohort)),
        min_reports=_min_reports(spec, kind, len(cohort)),
        deadline_s=spec.cohort.deadline_s,
        local=spec.local.model_copy(update={"learning_rate": spec.learning_rate(max(1, number))}),
        weighting=spec.weighting,
        max_weight=spec.max_weight,
        grid_step=spec.grid_step,
        clip_norm=spec.clip_norm,
        aggregation=spec.aggregation,
        secure=secure,
        quantisation=few,
        auxiliary=0 if control is None else len(control),
        auxiliary_sha256="" if control is None else vector_digest(control),
        retried=state.retried if spec.local.keeps_state or spec.has_contract else (),
        nonce=nonce,
    )


def population(candidates: Sequence[Candidate]) -> int:
    """How many devices could ever be asked: N of SCAFFOLD."""
    return sum(c.standing not in ("revoked", "other-group") for c in candidates)


def advance(
    spec: RunSpec, work: Work, plan: RoundPlan, state: RunState, mean: NDArray[np.float64], reports: int
) -> RunState:
    """One step of the server: the state after a round, which is committed once it is recorded.

    Args:
        spec: of the run.
        work: what is trained.
        plan: of the attempt.
        state: before it.
        mean: (``plan.sent_size``,) float64, the devices' aggregate update; it is overwritten.
        reports: how many it was made of.

    Raises:
        RunError: the new model or control is not finite.
    """
    size = plan.num_coordinates
    if plan.fixed:
        mean = np.concatenate([mean, np.zeros(plan.fixed)])
    personal = personal_of(spec.local, work.layout)
    if personal is not None:
        mean[:size][personal] = 0.0  # nobody sends anything there; nor shall an attacker's update be kept
    model, server = step(spec.server, state.model, mean[:size], state.server)
    control = control_of(spec.local, state.server, size)
    if control is not None:
        server = ServerState({**server.slots, CONTROL: next_control(plan, control, mean[size:], reports)})
    retried = after_attempt(state.retried, plan.round, plan.attempt)
    return replace(state, model=model, server=server, round=plan.round, attempt=0, retried=retried)


def learnt(after: RunState, collected: Collected) -> RunState:
    """The state after a round whose sum tells what to expect of the next one."""
    if collected.few_bits is None:
        return after
    rate = collected.plan.local.learning_rate
    return after.on(expected=next_expected(after.expected, collected.few_bits.norm, rate))


def after_attempt(
    retried: tuple[tuple[int, int], ...], round_number: int, attempt: int
) -> tuple[tuple[int, int], ...]:
    """``RunState.retried`` after a round was committed with this attempt; 0 = it was given up."""
    if attempt == 1:
        return retried
    return (*retried, (round_number, attempt))[-MAX_RETRIED:]


def _min_reports(spec: RunSpec, kind: Kind, asked: int) -> int:
    """A robust rule of so few that they could not outvote anybody is not applied, however few are asked."""
    if kind == "evaluate":
        return min(spec.cohort.min_reports, asked)
    secure = spec.secure_aggregation == "required"
    survivors = (
        spec.secure.least_survivors(min(spec.secure.sums(asked))) if secure else 1
    )  # one sum is enough
    rule = spec.aggregation.least_reports
    return max(min(spec.cohort.min_reports, asked), rule, survivors, spec.noise_survivors)


def _better(value: float, than: float, mode: str, margin: float, or_equal: bool) -> bool:
    gain = than - value if mode == "min" else value - than
    return gain > margin or (or_equal and gain >= 0)
