"""The training runs of a coordinator: queued, driven, and continued after a restart.

The driver reads the last committed round from the journal and goes on with the next attempt. Every run has
a thread of its own. Whatever ends it, it gets a verdict, unless the coordinator shuts down: then the run is
left as it is, to be continued.
"""

import json
import logging
import threading
from collections.abc import Callable, Sequence
from random import SystemRandom

from lepton_fl.errors import LeptonError, TaskError, TrustError
from lepton_fl.files import BlobStore
from lepton_fl.plan import RunSpec
from lepton_fl.rounds.campaign import Campaign, RunState, Verdict, Work
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.tasks import load_task, resolve
from lepton_fl.vector import Vector
from lepton_server.book import RunBook, load_model, load_server_state, progress_of, save_model
from lepton_server.config import RoundsSection
from lepton_server.exchange import FleetExchange, Interrupted
from lepton_server.fleet import Fleet
from lepton_server.flower import FlowerLink
from lepton_server.ops import Meters
from lepton_server.store import Store, TaskRegistered
from lepton_server.workshop import Workshop

log = logging.getLogger(__name__)

LOOK_S = 0.3  # how soon a queued or stopping run is noticed


class FleetRoster:
    """The fleet view as the roster of one run (``rounds.campaign.Roster``)."""

    def __init__(self, fleet: Fleet, work: Work, groups: Sequence[str], closing: Callable[[], bool]) -> None:
        self._fleet, self._work, self._groups, self._closing = fleet, work, groups, closing
        self._seen = fleet.generation

    def candidates(self) -> Sequence[Candidate]:
        """Every registered device with its standing."""
        if self._closing():
            raise Interrupted
        self._seen = self._fleet.generation
        return self._fleet.candidates(self._work.task, self._work.version, self._groups)

    def wait(self, seconds: float) -> None:
        """Wait for a change in the fleet."""
        self._fleet.wait_for_change(self._seen, seconds)


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
    ) -> None:
        self._config, self._store, self._blobs, self._fleet = config, store, blobs, fleet
        self._link, self._meters = link, meters
        self._workshop = Workshop()
        self._closing = threading.Event()
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
        return sum(thread.is_alive() for thread in self._active.values())

    def _watch(self) -> None:
        seen = -1
        while not self._closing.is_set():
            try:
                head = self._store.head_seq()
                finished = any(not thread.is_alive() for thread in self._active.values())
                if head != seen or finished:
                    self._look()
                    seen = head
            except LeptonError as error:
                log.error("runs cannot be looked up: %s", error)
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
                self._finish(run.id, Verdict("stopped", "Stopped on request."))
            elif len(self._active) < self._config.max_concurrent_runs:
                thread = threading.Thread(
                    target=self._drive, args=(run.id,), name=f"run-{run.id}", daemon=True
                )
                self._active[run.id] = thread
                thread.start()
        self._fleet.set_run_active(bool(self._active))

    def _drive(self, run_id: str) -> None:
        try:
            verdict = self._run(run_id)
        except Interrupted:
            log.info("run %s is left to be continued", run_id)
            return
        except LeptonError as error:
            verdict = Verdict("failed", f"{error} {error.hint}".strip())
        except Exception as error:  # a defect of ours must end the run with a verdict, not in silence
            log.exception("run %s ended by a defect", run_id)
            verdict = Verdict("failed", f"Internal error: {type(error).__name__}: {error}")
        try:
            self._finish(run_id, verdict)
        except LeptonError as error:
            log.error("the verdict of run %s could not be recorded: %s", run_id, error)

    def _run(self, run_id: str) -> Verdict:
        spec = RunSpec.model_validate_json(json.dumps(self._store.run(run_id).spec))
        self._store.record("run.started", run_id, {"run_id": run_id})
        work, initial = self._prepare(spec)
        state = self._state(run_id, spec, initial)
        log.info("run %s: %s from round %d", run_id, work.task, state.round + 1)
        exchange = FleetExchange(
            self._link,
            self._fleet,
            self._public_key,
            stay_s=self._config.stay_s,
            closing=self._closing.is_set,
        )
        campaign = Campaign(
            spec=spec,
            run_id=run_id,
            work=work,
            exchange=exchange,
            roster=FleetRoster(self._fleet, work, spec.cohort.groups, self._closing.is_set),
            book=RunBook(self._store, self._blobs, run_id, spec, self._meters),
            rng=SystemRandom(),
        )
        return campaign.run(state, lambda: run_id in self._stopping)

    def _prepare(self, spec: RunSpec) -> tuple[Work, Vector]:
        reference = resolve(spec.task)
        task = load_task(reference)
        if spec.task_version not in ("", task.version):
            raise TaskError(
                f"The run asks for {spec.task} {spec.task_version!r}, installed is {task.version!r}.",
                hint="Install that version on the coordinator, or start the run without a version.",
            )
        layout, initial = self._workshop.initial_model(reference, spec.seed)
        self._store.ensure_task(
            TaskRegistered(
                name=task.name,
                reference=reference,
                version=task.version,
                layout_digest=layout.digest,
                num_parameters=layout.size,
            )
        )
        central = spec.central_data
        evaluate = (lambda model: self._workshop.evaluate(reference, model, central)) if central else None
        work = Work(reference, task.version, layout.digest, layout.size, task.metrics, evaluate)
        if spec.initial_model:
            initial = load_model(self._blobs, spec.initial_model)
            if initial.size != layout.size:
                raise TaskError(
                    f"Model {spec.initial_model[:12]} has {initial.size} weights, the task {layout.size}."
                )
        return work, initial

    def _state(self, run_id: str, spec: RunSpec, initial: Vector) -> RunState:
        """Where the run stands; an attempt that a crash left open is abandoned by name."""
        progress = progress_of(self._store, run_id)
        if not progress.model_sha256:
            sha256 = save_model(self._blobs, initial)
            created = {
                "model_sha256": sha256,
                "run_id": run_id,
                "round": 0,
                "parent_sha256": spec.initial_model or None,
                "metrics": {},
            }
            self._store.record("model.created", run_id, created)
            return RunState(initial, ServerState.initial(spec.server, initial.size))
        if progress.open:
            body = {"run_id": run_id, "round": progress.round + 1, "attempt": progress.attempt}
            cause = {"cause": "the coordinator was restarted", "participation": []}
            self._store.record("round.abandoned", run_id, body | cause)
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
        )

    def _public_key(self, device_id: str) -> bytes:
        device = self._store.device(device_id)
        if device.state != "active":
            raise TrustError(f"Device {device_id} was revoked.")
        return device.public_key

    def _finish(self, run_id: str, verdict: Verdict) -> None:
        run = self._store.run(run_id)
        body = {
            "run_id": run_id,
            "verdict": verdict.outcome,
            "reason": verdict.reason[:2000],
            "model_sha256": run.model_sha256,
            "rounds": run.committed,
        }
        self._store.record("run.finished", run_id, body)
        log.info("run %s %s: %s", run_id, verdict.outcome, verdict.reason)
