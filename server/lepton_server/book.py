"""A run's record: checkpoints in the blob store, events in the journal, and where a run stands.

A run's state is a fold over its own events plus two blobs (model, optimiser state), so there is nothing to
repair after a crash.
"""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lepton_fl.crashpoints import reached
from lepton_fl.errors import Cause, LeptonError, Rejection, StateConflict, StateCorrupt
from lepton_fl.files import BlobStore
from lepton_fl.plan import RoundPlan, RunSpec
from lepton_fl.rounds.campaign import Best, Committed, Evaluated, after_attempt
from lepton_fl.rounds.collect import ACCEPTED, SURPLUS, Collected
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.vector import Vector
from lepton_server.attempts import Attempts
from lepton_server.ops import Meters
from lepton_server.patience import Patience, Stopped, one_line
from lepton_server.privacy import Ledger, newest_states, without_names
from lepton_server.quarantine import Quarantine
from lepton_server.store import Event, Store
from lepton_server.watchdog import Wait, Watchdog, cause_of

log = logging.getLogger(__name__)

KEEP_ROUNDS = 3  # checkpoints of a run that stay besides the first and the best


def save_model(blobs: BlobStore, model: Vector) -> str:
    """Store a model's little-endian float32 bytes; their SHA-256 is the model's name everywhere."""
    return blobs.put(np.ascontiguousarray(model, "<f4").tobytes())


def load_model(blobs: BlobStore, sha256: str) -> Vector:
    """Read a model back, verified against its name."""
    return np.frombuffer(blobs.read(sha256), "<f4").astype(np.float32)


def save_server_state(blobs: BlobStore, state: ServerState) -> str | None:
    """Store the optimiser's vectors as safetensors; None if it keeps none."""
    if not state.slots:
        return None
    from safetensors.numpy import save

    return blobs.put(save(dict(state.slots)))


def load_server_state(blobs: BlobStore, sha256: str | None) -> ServerState:
    """Read the optimiser's vectors back."""
    if sha256 is None:
        return ServerState()
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return ServerState(load(blobs.read(sha256)))
    except SafetensorError as error:
        raise StateCorrupt(f"Optimiser state {sha256} does not decode: {error}.") from error


# --- where a run stands -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """A run's position, folded from its events."""

    round: int = 0
    attempt: int = 0  # last attempt planned at the round after that
    open: bool = False  # that attempt has neither been committed nor abandoned
    model_sha256: str = ""
    state_sha256: str | None = None
    evaluated: int = 0
    best: Best | None = None
    stale: int = 0
    retried: tuple[tuple[int, int], ...] = ()  # see RunState
    expected: float = 0.0  # see RunState


def fold(progress: Progress, event: Event) -> Progress:
    """One event's effect on a run's position."""
    body = event.body
    match event.kind:
        case "model.created" if body["round"] == 0:
            return replace(progress, model_sha256=body["model_sha256"])
        case "round.planned":
            return replace(progress, attempt=body["attempt"], open=True)
        case "round.abandoned" if body.get("wrapped") and progress.expected:
            return fold(replace(progress, expected=0.0), event)
        case "round.abandoned" if body.get("burnt"):
            retried = after_attempt(progress.retried, body["round"], 0)
            over = replace(progress, round=body["round"], attempt=0, open=False, retried=retried)
            return replace(over, evaluated=body["round"])
        case "round.abandoned":
            return replace(progress, open=False)
        case "round.committed":
            retried = after_attempt(progress.retried, body["round"], body["attempt"])
            done = replace(progress, round=body["round"], attempt=0, open=False, retried=retried)
            done = replace(done, expected=body.get("expected", 0.0))
            return replace(done, model_sha256=body["model_sha256"], state_sha256=body["state_sha256"])
        case "round.evaluated":
            return replace(progress, evaluated=body["round"], stale=body["stale"])
        case "run.best":
            return replace(progress, best=Best(body["round"], body["model_sha256"], body["value"]))
    return progress


def progress_of(store: Store, run_id: str) -> Progress:
    """Where a run stands, from the journal."""
    progress = Progress()
    for event in store.events(subject=run_id):
        progress = fold(progress, event)
    return progress


# --- checkpoints ------------------------------------------------------------------------------------


@dataclass
class Checkpoints:
    """The blobs of all runs. Runs share blobs by content, so that one must not drop what another just saved.

    ``lock`` is held from writing a blob until the row that names it is there, and from asking who uses a blob
    until it is gone. One coordinator uses a state folder, so a lock of this process is enough.
    """

    store: Store
    blobs: BlobStore
    lock: threading.Lock = field(default_factory=threading.Lock)

    def drop_model(self, sha256: str) -> None:
        """Delete a model unless another run has it, too."""
        with self.lock:
            if self.store.model_users(sha256) <= 1:
                self.blobs.delete(sha256)

    def drop_memory(self, sha256: str) -> None:
        """Delete the sealed memory of a private run's mechanism: it serves nobody but who wants its noise."""
        with self.lock:
            if self.store.memory_users(sha256) <= 1:
                self.blobs.delete(sha256)

    def drop_state(self, sha256: str) -> None:
        """Delete an optimiser state unless another run has it, too."""
        with self.lock:
            if self.store.state_users(sha256) <= 1:
                self.blobs.delete(sha256)


# --- the record -------------------------------------------------------------------------------------


class RunBook:
    """The journal as the book of one run (``rounds.campaign.Book``)."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        run_id: str,
        spec: RunSpec,
        meters: Meters,
        patience: Patience,
        ledger: Ledger | None = None,
        watch: Watchdog | None = None,
        quarantine: Quarantine | None = None,
        attempts: Attempts | None = None,
    ) -> None:
        """Go on from what is recorded.

        Args:
            checkpoints: of all runs.
            run_id: of this one.
            spec: of the run.
            meters: what is counted.
            patience: writes of this run.
            ledger: of a private run.
            watch: told of waits.
            quarantine: judges devices after each attempt.
            attempts: keep what comes.
        """
        self._watch, self._quarantine, self._attempts = watch, quarantine, attempts
        self._checkpoints, self._run_id, self._meters = checkpoints, run_id, meters
        self._store, self._blobs, self._patience = checkpoints.store, checkpoints.blobs, patience
        self._metric, self._ledger = spec.early_stop.metric, ledger
        memories = newest_states(self._store, run_id) if ledger else []
        self._memory = memories[-1] if memories else ""
        for sha256 in set(memories) - {self._memory}:  # a kill came before they were dropped
            self._tidy(self._checkpoints.drop_memory, sha256)
        progress = progress_of(self._store, run_id)
        self._parent, self._best = progress.model_sha256, progress.best
        self._waits = bool(self._store.run(run_id).waiting)  # as a process before this one has left it
        first = [m.sha256 for m in self._store.models(run_id) if m.round == 0]
        self._first = first[0] if first else ""
        rounds = [r for r in self._store.rounds(run_id) if r.state == "committed" and r.model_sha256]
        there = [
            (str(r.model_sha256), r.state_sha256) for r in rounds if self._blobs.has(str(r.model_sha256))
        ]
        self._release_rest()
        self._kept = deque(there)  # more than KEEP_ROUNDS if a kill came before old ones were dropped

    def _release_rest(self) -> None:
        """A kill came between the commit of a round and the end of it."""
        done = [row for row in self._store.rounds(self._run_id) if row.state == "committed"]
        for row in done[-1:]:
            if row.phase == "committed":
                self._erase(RoundPlan.model_validate_json(json.dumps(dict(row.plan))), "released")

    def planned(self, plan: RoundPlan) -> None:
        """Journal a plan; of a private run, its charge is set aside in the same step.

        Raises:
            BudgetRefused: a budget does not allow it; nothing was planned.
        """
        if self._waits:
            self.waiting("", 0.0)
        body = _attempt(plan) | {"plan": plan.to_json(), "model_sha256": plan.model_sha256}

        def write() -> None:
            with self._store.transaction() as transaction:
                transaction.record("round.planned", self._run_id, body)
                if self._ledger:
                    self._ledger.write_reserved(transaction)

        try:
            self._patience.insist(write)
        except StateConflict:
            if self._store.run(self._run_id).state != "stopping":
                raise
            raise Stopped(f"Stopped on request before round {plan.round}.") from None

    def moved(self, plan: RoundPlan, phase: str, counted: Sequence[str] = ()) -> None:
        """Journal the phase of an attempt, and fix whose updates count.

        Raises:
            Interrupted, Stopped: see ``Patience.insist``.
        """

        def write() -> None:
            with self._store.transaction() as transaction:
                if transaction.move(plan.run_id, plan.round, plan.attempt, phase):
                    transaction.count_received(plan.run_id, plan.round, plan.attempt, counted)

        self._patience.insist(write)

    def _erase(self, plan: RoundPlan, phase: str = "") -> None:
        """Nothing but the model is left of a round; what a crash leaves is erased at the next start."""
        noise = self._ledger.noise_sha256 if self._ledger else ""
        if (attempts := self._attempts) is not None:
            self._patience.insist(lambda: attempts.forget(plan.run_id, plan.round, noise))
        if phase:
            self.moved(plan, phase)

    def abandoned(self, collected: Collected, cause: str) -> None:
        """Journal that an attempt does not count, and why."""
        body = _attempt(collected.plan) | {"cause": cause, "participation": _participation(collected)}

        def write() -> None:
            with self._store.transaction() as transaction:
                lost = {"burnt": collected.burnt, "wrapped": collected.wrapped}
                transaction.record("round.abandoned", self._run_id, body | lost)
                if self._ledger:
                    self._ledger.write_voided(transaction)

        self._patience.insist(write)
        self._erase(collected.plan)
        if self._ledger:
            self._ledger.settled()
        self._meters.abandoned.labels(self._run_id).inc()
        self._count(collected)
        log.warning(
            "run %s round %d: abandoned: %s",
            self._run_id,
            collected.plan.round,
            cause,
            extra=_fields("round.abandoned", collected.plan) | {"cause": cause},
        )

    def committed(self, round_: Committed) -> None:
        """Write the blobs, then the rows that name them, in one transaction."""
        plan, state, metrics = round_.collected.plan, round_.state, dict(round_.metrics)
        model_sha256, state_sha256 = state.model_sha256, None
        body = _attempt(plan) | {
            "model_sha256": model_sha256,
            "metrics": metrics,
            "participation": _participation(round_.collected),
            "bytes_up": round_.collected.bytes_up,
            "bytes_down": round_.bytes_down,
            "seconds": round_.seconds,
            "expected": state.expected,
        }
        created = {
            "model_sha256": model_sha256,
            "run_id": self._run_id,
            "round": plan.round,
            "parent_sha256": self._parent,
            "metrics": metrics,
        }

        memory = ""

        def write() -> None:
            nonlocal state_sha256, memory
            with self._checkpoints.lock:
                save_model(self._blobs, state.model)
                state_sha256 = save_server_state(self._blobs, state.server)
                memory = self._blobs.put(without_names(state.private)) if state.private else ""
                reached("model.stored")
                with self._store.transaction() as transaction:
                    named = body | {"state_sha256": state_sha256}
                    transaction.record("round.committed", self._run_id, named)
                    transaction.record("model.created", self._run_id, created)
                    if self._ledger:
                        self._ledger.write_committed(transaction, model_sha256, memory)

        self._patience.insist(write)
        reached("round.committed")
        self._erase(plan, "released")
        self._replace_memory(memory)
        self._parent = model_sha256
        self._kept.append((model_sha256, state_sha256))
        self._drop_old_checkpoints()
        self._measure(round_)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        summary = round_.collected.summary()
        log.info(
            "run %s round %d: %s; %s; %.2f s",
            self._run_id,
            plan.round,
            summary,
            figures,
            round_.seconds,
            extra=_fields("round.committed", plan),
        )

    def evaluated(self, evaluation: Evaluated) -> None:
        """Journal an evaluation and, if it is the best so far, that too."""
        state, collected = evaluation.state, evaluation.collected
        body = {
            "run_id": self._run_id,
            "round": state.round,
            "metrics": dict(evaluation.metrics),
            "improved": evaluation.improved,
            "stale": state.stale,
            "participation": _participation(collected) if collected else [],
        }

        def write() -> None:
            with self._store.transaction() as transaction:
                transaction.record("round.evaluated", self._run_id, body)
                if evaluation.improved and state.best:
                    best = {
                        "run_id": self._run_id,
                        "round": state.best.round,
                        "model_sha256": state.best.model_sha256,
                        "metric": self._metric,
                        "value": state.best.value,
                    }
                    transaction.record("run.best", self._run_id, best)

        self._patience.insist(write)
        superseded, self._best = self._best, state.best
        if superseded and superseded != state.best:
            self._drop(superseded.model_sha256)
        figures = ", ".join(f"{k} {v:.4g}" for k, v in evaluation.metrics.items())
        log.info("run %s round %d evaluated: %s", self._run_id, state.round, figures or "no device answered")

    def waiting(self, cause: str, seconds: float) -> None:
        """Journal why the run waits; '' when it moves again."""
        self._meters.waiting.labels(self._run_id).set(1 if cause else 0)
        until = time.time() + seconds if cause else 0.0
        if self._watch is not None:
            devices = Wait("enough devices", Cause.NO_QUORUM, one_line(cause), until)
            self._watch.waits(self._run_id, devices if cause else None)
        self._record("run.waiting", {"run_id": self._run_id, "cause": one_line(cause), "until": until})
        self._waits = bool(cause)
        if cause:
            log.warning("run %s waits up to %.0f s more: %s", self._run_id, seconds, cause)

    def stage(self, words: str, seconds: float) -> None:
        """Journal at which stage of a round that hides its devices the run is, and whom it waits for."""
        until = time.time() + seconds if words else 0.0
        self._record("run.waiting", {"run_id": self._run_id, "cause": one_line(words), "until": until})
        self._waits = bool(words)

    def _record(self, kind: str, body: dict[str, Any]) -> None:
        self._patience.insist(lambda: self._store.record(kind, self._run_id, body))

    def _replace_memory(self, memory: str) -> None:
        """Drop the memory that the last round left: with it and its key, noise could be taken off again."""
        if self._ledger:
            self._ledger.settled()
            if self._memory and self._memory != memory:
                self._tidy(self._checkpoints.drop_memory, self._memory)
            self._memory = memory

    def _drop_old_checkpoints(self) -> None:
        while len(self._kept) > KEEP_ROUNDS:
            model_sha256, state_sha256 = self._kept.popleft()
            self._drop(model_sha256)
            if state_sha256 and state_sha256 not in {kept for _, kept in self._kept}:
                self._tidy(self._checkpoints.drop_state, state_sha256)

    def _drop(self, model_sha256: str) -> None:
        """Delete a checkpoint unless this run still needs it."""
        best = self._best.model_sha256 if self._best else ""
        if model_sha256 not in {self._first, best} | {kept for kept, _ in self._kept}:
            self._tidy(self._checkpoints.drop_model, model_sha256)

    def _tidy(self, drop: Callable[[str], None], sha256: str) -> None:
        try:
            drop(sha256)
        except LeptonError as error:  # a file too many is no reason to end a run
            log.warning("run %s: checkpoint %s stays: %s", self._run_id, sha256[:12], error)

    def _measure(self, round_: Committed) -> None:
        self._meters.rounds.labels(self._run_id).inc()
        self._meters.seconds.labels(self._run_id).observe(round_.seconds)
        self._meters.bytes.labels(self._run_id, "down").inc(round_.bytes_down)
        self._meters.bytes.labels(self._run_id, "up").inc(round_.collected.bytes_up)
        self._count(round_.collected)

    def _count(self, collected: Collected) -> None:
        for entry in collected.participation.values():
            self._meters.reports.labels(self._run_id, entry.outcome).inc()
        if self._quarantine is not None and collected.plan.kind == "train":
            self._quarantine.judge(collected)


def _fields(event: str, plan: RoundPlan) -> dict[str, Any]:
    """What a line of the log carries for machines."""
    return {"event": event, "run": plan.run_id, "round": plan.round, "attempt": plan.attempt}


def _attempt(plan: RoundPlan) -> dict[str, Any]:
    return {"run_id": plan.run_id, "round": plan.round, "attempt": plan.attempt}


_OUTCOMES = {
    ACCEPTED: "counted",
    SURPLUS: "surplus",
    Rejection.OFFLINE: "dropped",
    Rejection.FAILED: "dropped",
    Rejection.OUT_OF_MEMORY: "dropped",
    Rejection.DISK_FULL: "dropped",
    Rejection.INTERRUPTED: "dropped",
}


def _participation(collected: Collected) -> list[dict[str, Any]]:
    return [
        {
            "device_id": entry.device_id,
            "outcome": (outcome := _OUTCOMES.get(entry.outcome, "rejected")),
            "reason": "" if outcome in ("counted", "surplus") else entry.outcome,
            "seconds": entry.seconds,
            "examples": entry.num_examples,
            "bytes_up": entry.num_bytes,
            "bytes_down": collected.bytes_to(entry.device_id),
            "arrived_s": entry.arrived_s,
            "cause": "" if outcome in ("counted", "surplus") else cause_of(entry.outcome, entry.cause),
            "detail": "" if outcome in ("counted", "surplus") else entry.detail,
        }
        for entry in collected.participation.values()
    ]
