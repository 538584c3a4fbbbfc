"""The training runs of a coordinator: queued, driven, and continued after a restart.

The driver reads the last committed round from the journal and goes on with the next attempt. Every run has
a thread of its own. Whatever ends it, it gets a verdict, unless the coordinator shuts down: then the run is
left as it is, to be continued.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from random import Random, SystemRandom

from lepton_fl.compression.federated import check_teacher
from lepton_fl.crashpoints import reached
from lepton_fl.errors import Cause, ConfigError, LeptonError, StateConflict, TaskError, TrustError
from lepton_fl.files import BlobStore
from lepton_fl.plan import RoundPlan, RunSpec
from lepton_fl.rounds.campaign import Campaign, RunState, Verdict, Work, population
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.rounds.exchange import Exchange
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.tasks import load_task, resolve
from lepton_fl.vector import Vector
from lepton_server.attempts import Attempts
from lepton_server.book import Checkpoints, RunBook, load_model, load_server_state, progress_of, save_model
from lepton_server.config import RoundsSection
from lepton_server.exchange import FleetExchange
from lepton_server.fleet import Fleet
from lepton_server.flower import FlowerLink
from lepton_server.ops import Meters
from lepton_server.patience import PASSING, RETRY_S, Interrupted, Patience, Stopped, one_line
from lepton_server.privacy import (
    Guard,
    PrivacyKeys,
    guard_run,
    may_go_on,
    newest_states,
    stored_state,
    void_unbegun,
)
from lepton_server.quarantine import Quarantine
from lepton_server.reach import coverage_of, floor_of, history_of
from lepton_server.requests import refuse_unknown
from lepton_server.secure import SecureFleet
from lepton_server.signing import Signing
from lepton_server.store import Store, TaskRegistered
from lepton_server.watchdog import Wait, Watchdog, wait_of
from lepton_server.workshop import Workshop

log = logging.getLogger(__name__)

LOOK_S = 0.3  # how soon a queued or stopping run is noticed
SWEEP_EVERY = 16  # looks between two at whose quarantine is over
REST_S = 0.1  # between two looks at a fleet that keeps changing: each costs time for every device


class FleetRoster:
    """The fleet view as the roster of one run (``rounds.campaign.Roster``)."""

    def __init__(
        self,
        fleet: Fleet,
        work: Work,
        groups: Sequence[str],
        closing: threading.Event,
        *,
        secure: bool = False,
    ) -> None:
        self._fleet, self._work, self._groups, self._closing = fleet, work, groups, closing
        self._secure = secure
        self._seen = fleet.generation

    def candidates(self) -> Sequence[Candidate]:
        """Every registered device with its standing."""
        if self._closing.is_set():
            raise Interrupted
        self._seen = self._fleet.generation
        return self.look()

    def look(self) -> Sequence[Candidate]:
        """The same, for who only looks on."""
        return self._fleet.candidates(self._work.task, self._work.version, self._groups, secure=self._secure)

    def wait(self, seconds: float) -> None:
        """Wait for a change in the fleet."""
        self._closing.wait(min(seconds, REST_S))
        self._fleet.wait_for_change(self._seen, seconds)


def workshop_of(config: RoundsSection, store: Store) -> Workshop:
    """Where models are made; it is on its way already if there are runs that want to go on."""
    workshop = Workshop(patience_s=config.build_s)
    if not all(run.finished for run in store.runs()):
        workshop.warm_up()
    return workshop


class RunDriver:
    """Starts queued runs, continues running ones, and stops them when asked; one thread per active run."""

    def __init__(
        self,
        config: RoundsSection,
        store: Store,
        blobs: BlobStore,
        fleet: Fleet,
        link: FlowerLink,
        meters: Meters,
        *,
        keys: PrivacyKeys | None = None,
        rng: Random | None = None,
        exchange: Callable[[str], Exchange] | None = None,
        signing: Signing | None = None,
        watch: Watchdog | None = None,
        quarantine: Quarantine | None = None,
        attempts: Attempts | None = None,
        workshop: Workshop | None = None,
    ) -> None:
        """Prepare; nothing happens before :meth:`start`.

        Args:
            config: how many runs at once.
            store: the coordinator's state.
            blobs: where models lie.
            fleet: who is there.
            link: Flower's fleet API.
            meters: what is counted.
            keys: of private runs; None = there are none.
            rng: draws cohorts and nonces; None = the operating system's, as nobody must foresee them.
            exchange: run id -> its way to the devices; None = the real one.
            signing: the way to the enrolment authority; None = there is none, and no secure runs.
            watch: told of what runs wait for; None = nobody looks on.
            quarantine: judges devices after each attempt; None = nobody does.
            attempts: keep what comes; None = no secure runs, and an attempt that a restart cuts off is
                abandoned.
            workshop: where models are made, closed by :meth:`close`; None = one of its own.
        """
        self._signing, self._attempts = signing, attempts
        self._config, self._store, self._blobs, self._fleet = config, store, blobs, fleet
        self._link, self._meters, self._privacy_keys = link, meters, keys
        self._rng, self._exchange = rng or SystemRandom(), exchange
        self._closing = threading.Event()
        self._workshop = workshop or Workshop(patience_s=config.build_s)
        self._workshop.give_up = self._closing.is_set
        self._checkpoints = Checkpoints(store, blobs)
        self._keys: dict[str, bytes] = {}  # device id -> public key, DER, of all that were ever asked
        self._watch_dog = watch or Watchdog(fleet, meters)
        self._quarantine = quarantine
        self._active: dict[str, threading.Thread] = {}
        self._stopping: set[str] = set()  # runs that were asked to stop
        self._thread = threading.Thread(target=self._watch, name="runs", daemon=True)

    def start(self) -> None:
        """Look for runs from now on."""
        self._thread.start()

    def close(self) -> None:
        """Leave every run as it is, to be continued, and wait until its thread has ended."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        for thread in list(self._active.values()):
            thread.join()
        self._workshop.close()

    def is_watching(self) -> bool:
        """Whether queued runs will be noticed."""
        return self._thread.is_alive()

    def active(self) -> int:
        """How many runs are being driven."""
        return sum(thread.is_alive() for thread in list(self._active.values()))

    def expel(self, device_id: str) -> None:
        """Shut a device that lost its enrolment out of the fleet API; reads no state, so nothing can fail."""
        key = self._keys.pop(device_id, None)
        if key is not None:
            self._link.expel(key)

    def _watch(self) -> None:
        seen, looks = -1, 0
        while not self._closing.is_set():
            try:
                head = self._store.head_seq()
                finished = any(not thread.is_alive() for thread in self._active.values())
                if head != seen or finished:
                    self._look()
                    seen = head
                looks += 1
                if self._quarantine is not None and looks % SWEEP_EVERY == 0:
                    self._quarantine.sweep()
            except LeptonError as error:
                log.error("runs cannot be looked up: %s; trying again", error)
                self._closing.wait(RETRY_S)
            except Exception:  # without this thread no run would ever start or stop again
                log.exception("runs cannot be looked up; trying again")
                self._closing.wait(RETRY_S)
            self._closing.wait(LOOK_S)

    def _look(self) -> None:
        self._active = {run_id: t for run_id, t in self._active.items() if t.is_alive()}
        runs = [r for r in self._store.runs() if not r.finished]
        self._stopping = {r.id for r in runs if r.state == "stopping"}
        runs.sort(key=lambda r: (r.state == "queued", r.queued_seq))  # those under way go on first
        for run in runs:
            if run.id in self._active:
                continue
            if run.state == "stopping":
                self._record_verdict(run.id, Verdict("stopped", "Stopped on request."))
            elif len(self._active) >= self._config.max_concurrent_runs:
                others = f"{len(self._active)} other runs are under way"
                self._watch_dog.waits(run.id, Wait("its turn", Cause.QUEUE, others))
            else:
                thread = threading.Thread(
                    target=self._drive, args=(run.id,), name=f"run-{run.id}", daemon=True
                )
                self._active[run.id] = thread
                thread.start()
        self._fleet.set_run_active(bool(self._active))
        active = [r for r in runs if r.id in self._active]
        self._fleet.set_secure_active(any(r.spec.get("secure_aggregation") == "required" for r in active))

    def _drive(self, run_id: str) -> None:
        self._watch_dog.begins(run_id)
        self._watch_dog.waits(run_id, None)
        try:
            verdict = self._run(run_id)
        except Interrupted:
            log.info("run %s is left to be continued", run_id)
            return
        except Stopped as stop:
            verdict = Verdict("stopped", str(stop))
        except PASSING as error:  # while it was being read where the run stands
            log.error("run %s cannot go on: %s; trying again", run_id, error)
            self._closing.wait(RETRY_S)
            return
        except LeptonError as error:
            verdict = Verdict("failed", f"{error} {error.hint}".strip())
        except Exception as error:  # a defect of ours must end the run with a verdict, not in silence
            log.exception("run %s ended by a defect", run_id)
            verdict = Verdict("failed", f"Internal error: {type(error).__name__}: {error}")
        finally:
            self._fleet.release(run_id)
            self._link.forms.forget(run_id)
        self._finish(run_id, verdict)

    def _patience(self, run_id: str) -> Patience:
        def waits(error: LeptonError | None, until: float) -> None:
            self._watch_dog.waits(run_id, None if error is None else wait_of(error, until))

        stopping = self._is_stopping(run_id)
        return Patience(
            self._store, run_id, self._meters, closing=self._closing, stopping=stopping, waits=waits
        )

    def _is_stopping(self, run_id: str) -> Callable[[], bool]:
        return lambda: run_id in self._stopping

    def _fleet_exchange(
        self, run_id: str, book: RunBook, unfinished: RoundPlan | None, packs: bool
    ) -> FleetExchange:
        return FleetExchange(
            self._link,
            self._fleet,
            self._public_key,
            stay_s=self._config.stay_s,
            closing=self._closing.is_set,
            stopping=self._is_stopping(run_id),
            attends=lambda attempt: self._watch_dog.attends(run_id, attempt),
            reoffered=self._note_reoffer,
            attempts=self._attempts,
            moved=book.moved,
            unfinished=unfinished,
            packs=packs,
        )

    def _note_reoffer(self, plan: RoundPlan, device_id: str) -> None:
        self._meters.repairs.labels("reoffer").inc()
        if plan.kind != "train":
            return
        body = {"run_id": plan.run_id, "round": plan.round, "attempt": plan.attempt, "device_id": device_id}
        try:
            self._store.record("round.reoffered", plan.run_id, body | {"cause": Cause.EVICTED.value})
        except LeptonError as error:  # the act matters more than its record, which the log has
            log.warning(
                "run %s: that device %s was asked again is not recorded: %s", plan.run_id, device_id, error
            )

    def _run(self, run_id: str) -> Verdict:
        spec = RunSpec.model_validate_json(json.dumps(self._store.run(run_id).spec))
        refuse_unknown(spec, authority=self._signing is not None)
        patience = self._patience(run_id)
        self._record_start(run_id, patience)
        until = time.time() + self._config.build_s
        self._watch_dog.waits(run_id, Wait("the first model", Cause.BUILDING, "it is being made", until))
        work, initial = self._prepare(spec, patience)
        self._watch_dog.waits(run_id, None)
        unfinished = self._unfinished(run_id)
        start = [self._state(run_id, spec, initial, patience, unfinished)]
        del initial
        guard = self._guard(run_id, spec, work, start[0].round, patience)
        ledger = guard.ledger if guard else None
        book = RunBook(
            self._checkpoints,
            run_id,
            spec,
            self._meters,
            patience,
            ledger,
            self._watch_dog,
            self._quarantine,
            self._attempts,
        )
        fleet = self._fleet_exchange(run_id, book, unfinished, spec.downlink == "lossless")
        secure = self._secure(run_id, spec, book, patience, fleet, unfinished)
        log.info("run %s: %s from round %d", run_id, work.task, start[0].round + 1)
        roster = FleetRoster(self._fleet, work, spec.cohort.groups, self._closing, secure=secure is not None)
        self._watch_dog.chooses_from(run_id, roster.look)
        campaign = Campaign(
            spec=spec,
            run_id=run_id,
            work=work,
            exchange=self._exchange(run_id) if self._exchange else fleet,
            roster=roster,
            history=history_of(self._store, run_id),
            book=book,
            rng=self._rng,
            claim=lambda device_ids: self._fleet.claim(device_ids, run_id),
            private=guard.rounds if guard else None,
            secure=secure,
            unfinished=unfinished,
            moved=book.moved,
            down=fleet.down,
        )
        return campaign.run(
            start.pop(), self._is_stopping(run_id)
        )  # no name here keeps the first model alive

    def _secure(
        self,
        run_id: str,
        spec: RunSpec,
        book: RunBook,
        patience: Patience,
        fleet: FleetExchange,
        unfinished: RoundPlan | None,
    ) -> SecureFleet | None:
        """How the rounds of a run that must not see single updates are collected."""
        if spec.secure_aggregation == "off" or self._signing is None or self._attempts is None:
            return None
        return SecureFleet(
            fleet,
            self._fleet,
            self._signing,
            self._attempts,
            stage_s=self._config.stage_s,
            show=book.stage,
            insist=patience.insist,
            unfinished=unfinished,
            name_of=lambda device_id: self._store.device(device_id).name,
        )

    def _unfinished(self, run_id: str) -> RoundPlan | None:
        """The attempt that a restart has cut off, if it can go on."""
        planned = [r for r in self._store.rounds(run_id) if r.state == "planned"]
        if not planned:
            return None
        plan = RoundPlan.model_validate_json(json.dumps(dict(planned[-1].plan)))
        if not plan.secure and (self._attempts is None or not self._attempts.is_whole(plan)):
            return None
        if not may_go_on(self._store, plan, self._attempts.blobs if self._attempts else None):
            return None
        log.info("run %s goes on with round %d, attempt %d", run_id, plan.round, plan.attempt)
        return plan

    def _record_start(self, run_id: str, patience: Patience) -> None:
        try:
            patience.insist(lambda: self._store.record("run.started", run_id, {"run_id": run_id}))
        except StateConflict:
            if self._store.run(run_id).state != "stopping":
                raise
            raise Stopped("Stopped on request.") from None

    def _prepare(self, spec: RunSpec, patience: Patience) -> tuple[Work, Vector]:
        reference = resolve(spec.task)
        task = load_task(reference)
        if spec.task_version not in ("", task.version):
            raise TaskError(
                f"The run asks for {spec.task} {spec.task_version!r}, installed is {task.version!r}.",
                hint="Install that version on the coordinator, or start the run without a version.",
            )
        check_teacher(task, spec.teacher)
        rows_apart = spec.local.example_privacy is not None
        layout, initial = self._workshop.initial_model(reference, spec.seed, rows_apart=rows_apart)
        registered = TaskRegistered(
            name=task.name,
            reference=reference,
            version=task.version,
            layout_digest=layout.digest,
            num_parameters=layout.size,
        )
        patience.insist(lambda: self._store.ensure_task(registered))
        central = spec.central_data
        evaluate = (lambda model: self._workshop.evaluate(reference, model, central)) if central else None
        if evaluate is not None:
            evaluate(initial)  # data that cannot be used end the run now, not after its first round
        work = Work(
            reference, task.version, layout.digest, layout.size, task.metrics, evaluate, layout=layout
        )
        if spec.initial_model:
            initial = load_model(self._blobs, spec.initial_model)
            if initial.size != layout.size:
                raise TaskError(
                    f"Model {spec.initial_model[:12]} has {initial.size} weights, the task {layout.size}."
                )
        if spec.teacher:
            initial = self._workshop.with_teacher(reference, initial, load_model(self._blobs, spec.teacher))
        return work, initial

    def _guard(
        self, run_id: str, spec: RunSpec, work: Work, committed: int, patience: Patience
    ) -> Guard | None:
        """What keeps a private run's guarantee; None if it has none of device level."""
        if spec.privacy is None or spec.privacy.unit != "device":
            return None
        if self._privacy_keys is None:
            raise ConfigError("This coordinator was started without the keys of private runs.")
        ready = self._workshop.prepared(spec, work.num_moving)
        found = self._fleet.candidates(work.task, work.version, spec.cohort.groups)
        return guard_run(
            self._store,
            self._privacy_keys,
            run_id,
            spec,
            ready,
            devices=population(found),
            committed=committed,
            insist=patience.insist,
            blobs=self._attempts.blobs if self._attempts else None,
        )

    def _state(
        self,
        run_id: str,
        spec: RunSpec,
        initial: Vector,
        patience: Patience,
        unfinished: RoundPlan | None = None,
    ) -> RunState:
        """Where the run stands; an attempt that a crash left open and nobody goes on with is abandoned."""
        progress = progress_of(self._store, run_id)
        if not progress.model_sha256:
            patience.insist(lambda: self._save_first(run_id, spec, initial))
            return RunState(initial, ServerState.initial(spec.server, initial.size))
        if progress.open and unfinished is None:
            body = {"run_id": run_id, "round": progress.round + 1, "attempt": progress.attempt}
            cause = {"cause": "the coordinator was restarted", "participation": []}
            patience.insist(lambda: self._abandon(run_id, body | cause))
            self._fleet.close_attempt(run_id)  # devices that are at work on it could make no quorum
        if progress.state_sha256:
            server = load_server_state(self._blobs, progress.state_sha256)
        else:
            server = ServerState.initial(spec.server, initial.size)
        return RunState(
            model=load_model(self._blobs, progress.model_sha256),
            server=server,
            round=progress.round,
            attempt=progress.attempt,
            evaluated=progress.evaluated,
            best=progress.best,
            stale=progress.stale,
            retried=progress.retried,
            expected=progress.expected,
            private=stored_state(self._store, self._blobs.read, run_id, spec),
        )

    def _abandon(self, run_id: str, body: dict[str, object]) -> None:
        """Close an attempt that nobody drives any more; what it had set aside is given back if it may be."""
        with self._store.transaction() as change:
            change.record("round.abandoned", run_id, body)
            void_unbegun(change, run_id)

    def _save_first(self, run_id: str, spec: RunSpec, initial: Vector) -> None:
        with self._checkpoints.lock:
            created = {
                "model_sha256": save_model(self._blobs, initial),
                "run_id": run_id,
                "round": 0,
                "parent_sha256": spec.initial_model or spec.teacher or None,
                "metrics": {},
            }
            self._store.record("model.created", run_id, created)

    def _public_key(self, device_id: str) -> bytes:
        key = self._keys.get(device_id)
        if key is None:
            device = self._store.device(device_id)
            if device.state != "active":
                raise TrustError(f"Device {device_id} was revoked.")
            key = self._keys[device_id] = device.public_key
        return key

    def _finish(self, run_id: str, verdict: Verdict) -> None:
        """Record a verdict, however long it takes; what is not recorded at a shutdown is found again."""
        try:
            self._patience(run_id).insist(lambda: self._record_verdict(run_id, verdict), even_if_stopped=True)
        except Interrupted:
            log.warning("run %s %s, which could not be recorded before the shutdown", run_id, verdict.outcome)
        except LeptonError as error:
            log.error("the verdict of run %s could not be recorded: %s", run_id, error)

    def _forget_noise(self, run_id: str) -> None:
        for sha256 in newest_states(self._store, run_id)[-1:]:
            try:
                self._checkpoints.drop_memory(sha256)
            except LeptonError as error:  # a sealed file too many is no reason to lose a verdict
                log.warning("run %s: the memory of its noise stays: %s", run_id, error)

    def _record_verdict(self, run_id: str, verdict: Verdict) -> None:
        run = self._store.run(run_id)
        body: dict[str, object] = {
            "run_id": run_id,
            "verdict": verdict.outcome,
            "reason": one_line(verdict.reason),
            "model_sha256": run.model_sha256,
            "rounds": run.committed,
        }
        found = coverage_of(self._store, run)
        body |= {"coverage": found.to_json(), "flags": found.flags(floor_of(run))}
        reached("run.finishing")
        with self._store.transaction() as change:
            void_unbegun(change, run_id, "The run ended before the release was begun; nothing was added up.")
            change.record("run.finished", run_id, body)
        if verdict.outcome != "exhausted":  # that one may be resumed
            self._forget_noise(run_id)
        if self._attempts is not None:
            self._attempts.forget(run_id)
        self._meters.waiting.labels(run_id).set(0)
        self._watch_dog.ends(run_id)
        self._fleet.close_attempt(run_id)
        log.info(
            "run %s %s: %s %s",
            run_id,
            verdict.outcome,
            verdict.reason,
            found.sentence(),
            extra={"event": "run.finished", "run": run_id, "verdict": verdict.outcome},
        )
