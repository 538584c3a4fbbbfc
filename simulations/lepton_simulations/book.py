"""What a simulated run leaves behind: rows in memory, and a folder that survives kill -9.

    folder/
        scenario.json          the configuration, as checked, and what is simulated
        journal.jsonl          plans, abandoned attempts, commits, evaluations; see ``journal``
        metrics.jsonl          one row a round, and again once it is evaluated
        metrics.csv, .parquet  the same as tables
        participation.parquet  one line a device
        coverage.json          who contributed: of the fleet, by class, by tenth of speed
        state.json             the commit point: what the next round depends on; its size does not grow
        checkpoints/           models and optimiser states (safetensors), named by SHA-256; of a private run,
                               the sealed noise and who took part when
        plots/  tensorboard/   for people; see ``plot`` and ``sinks``
        model.safetensors      the final model, by tensor names

``state.json`` is replaced atomically and says how long the journal and the rows were, so whatever a crash
left behind them is cut off, and a resumed run continues bit for bit as if nothing had happened. Of a buffered
run it names the devices at work, when they began and for which plan of the journal; the models that they
train from stay among the checkpoints. Wall-clock seconds are in the rows and nowhere else.
"""

import fcntl
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any, Self

from pydantic import ValidationError

from lepton_fl.errors import StateCorrupt, StateError, StateLocked
from lepton_fl.files import BlobStore, canonical_json, make_private_folder, write_atomic
from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.campaign import AtWork, Best, Committed, Evaluated, RunState
from lepton_fl.rounds.collect import ACCEPTED, Collected
from lepton_fl.rounds.coverage import History
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.rounds.private import PrivateState
from lepton_fl.vector import Layout, Vector
from lepton_simulations.appended import AppendedFile, on_disk
from lepton_simulations.config import SimulationConfig
from lepton_simulations.journal import (
    EMPTY,
    Chain,
    Head,
    bytes_down,
    checked,
    outcome_of,
    participation,
    require,
)
from lepton_simulations.rows import Row, Tally, device_columns, row_columns, write_csv, write_parquet
from lepton_simulations.sinks import EventFile

MODEL = "model"
COVERAGE = "coverage.json"
SIMULATED = "simulated"  # in scenario.json, beside the configuration: what is simulated, for people
CSV_EVERY_S = 2.0  # metrics.csv is rewritten whole: not more often than this, ...
CSV_SHARE = 0.05  # ... and not for more than this share of the time

OnRow = Callable[[Row], None]
Clock = Callable[[], float]  # virtual seconds since the run began


def standing_still() -> float:
    """The clock of a run without virtual time."""
    return 0.0


class MemoryBook:
    """Rows, tallies and the last state, in memory; implements ``rounds.campaign.Book``."""

    def __init__(
        self,
        on_row: OnRow = lambda row: None,
        *,
        clock: Clock = standing_still,
        device_seconds: bool = False,
    ) -> None:
        """Open a book.

        Args:
            on_row: called when a round is committed, and again once it is evaluated.
            clock: virtual seconds since the run began.
            device_seconds: journal the devices' own seconds; only where they are virtual.
        """
        self.rows: list[Row] = []
        self.tallies: defaultdict[str, Tally] = defaultdict(Tally)  # by device
        self.history = History()  # as a campaign that begins now is to know it
        self.state: RunState | None = None
        self.best_model: Vector | None = None
        self.time_s = 0.0  # virtual, at the commit point; where the clock of a resumed run goes on
        self._on_row = on_row
        self._clock = clock
        self._device_seconds = device_seconds
        self._chain = Chain()
        self._run_id = ""
        self._abandoned: list[Collected] = []
        self._marked = time.monotonic()

    @property
    def journal_sha256(self) -> str:
        """The hash of the last event, which stands for the whole journal."""
        return self._chain.head.sha256

    def know(self, devices: Sequence[str]) -> None:
        """Name the devices there are, so that those who are never asked are in the tallies, too."""
        for device_id in devices:
            self.tallies.setdefault(device_id, Tally())

    def begin(self, scenario: SimulationConfig, labels: Sequence[str] = ()) -> None:
        """Journal what a fresh run depends on.

        Args:
            scenario: the configuration.
            labels: what is simulated, for people.
        """
        self._run_id = scenario.run_id
        self._write("run.started", {"scenario": scenario.identity()})

    def planned(self, plan: RoundPlan) -> None:
        """Journal a plan."""
        body = _attempt(plan) | {"plan": plan.to_json(), "model_sha256": plan.model_sha256}
        self._write("round.planned", body)

    def abandoned(self, collected: Collected, cause: str) -> None:
        """Journal an attempt that does not count, and count what became of its devices."""
        self._abandoned.append(collected)
        entries = self._participation(collected)
        self._count(entries)
        body = _attempt(collected.plan) | {"cause": cause, "participation": entries}
        self._write("round.abandoned", body)

    def committed(self, round_: Committed) -> None:
        """Journal a round, and keep its row and state."""
        collected = round_.collected
        row = self._row(round_, [*self._abandoned, collected])
        self.state, self._abandoned = round_.state, []
        entries = self._participation(collected)
        self._count(entries)
        body = _attempt(collected.plan) | {
            "model_sha256": round_.state.model_sha256,
            "metrics": dict(round_.metrics),
            "participation": entries,
            "bytes_up": collected.bytes_up,
            "bytes_down": round_.bytes_down,
        }
        self._write("round.committed", body)
        self.rows.append(row)
        self._keep(row)
        self._on_row(row)

    def evaluated(self, evaluation: Evaluated) -> None:
        """Journal an evaluation, and complete the round's row."""
        state, collected = evaluation.state, evaluation.collected
        self.state = state
        if evaluation.improved:
            self.best_model = state.model
        body = {
            "round": state.round,
            "metrics": dict(evaluation.metrics),
            "improved": evaluation.improved,
            "stale": state.stale,
            "participation": self._participation(collected) if collected else [],
        }
        self._write("round.evaluated", body)
        if self.rows and self.rows[-1].round == state.round:
            last = self.rows[-1]
            row = replace(last, metrics=dict(evaluation.metrics), seconds=last.seconds + self._lap())
            self.rows[-1] = row
            self._keep(row)
            self._on_row(row)

    def waiting(self, cause: str, seconds: float) -> None:
        """Nothing to show: what a simulation waits for is in its virtual time."""

    def _row(self, round_: Committed, attempts: Sequence[Collected]) -> Row:
        entries = [entry for attempt in attempts for entry in attempt.participation.values()]
        now, before = self._clock(), self.rows[-1].time_s if self.rows else 0.0
        return Row(
            round=round_.state.round,
            reports=round_.collected.reports,
            asked=len(round_.collected.plan.cohort),
            train_loss=round_.metrics.get("loss"),
            metrics={},
            outcomes=dict(sorted(Counter([str(entry.outcome) for entry in entries]).items())),
            bytes_up=sum(attempt.bytes_up for attempt in attempts),
            bytes_down=round_.bytes_down + sum(map(bytes_down, self._abandoned)),
            seconds=self._lap(),
            attempts=len(attempts),
            time_s=now,
            round_s=now - before,
            clipped=round_.metrics.get("clipped"),
            clip_norm=round_.metrics.get("clip_norm") or round_.collected.plan.clip_norm or None,
            epsilon=round_.metrics.get("epsilon"),
            ring_bits=round_.metrics.get("ring_bits"),
            quantisation_error=round_.metrics.get("quantisation_error"),
            measured_error=round_.metrics.get("measured_error"),
        )

    def _count(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Count journalled devices."""
        for entry in entries:
            device_id, outcome = entry["device_id"], outcome_of(entry)
            self.tallies[device_id].add(outcome, entry["examples"], entry["bytes_up"], entry["bytes_down"])
            self.history.heard(device_id, outcome == ACCEPTED, 0.0, outcome)

    def _participation(self, collected: Collected) -> list[dict[str, Any]]:
        return participation(collected, seconds=self._device_seconds)

    def _write(self, kind: str, body: Mapping[str, Any]) -> bytes:
        return self._chain.append(self._clock(), kind, self._run_id, body)

    def _keep(self, row: Row) -> None:
        """Record a row; in memory it is already."""

    def _lap(self) -> float:
        before, self._marked = self._marked, time.monotonic()
        return self._marked - before


class FolderBook(MemoryBook):
    """A book on disk; see the module."""

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        rng: Random,
        on_row: OnRow = lambda row: None,
        *,
        clock: Clock = standing_still,
        device_seconds: bool = False,
    ) -> None:
        """Open a folder, and make it if need be.

        Args:
            folder: of one run; only one process may have it open.
            layout: of the model.
            rng: the campaign's; its state is part of the commit point.
            on_row: see ``MemoryBook``.
            clock: see ``MemoryBook``.
            device_seconds: see ``MemoryBook``.

        Raises:
            StateLocked: another process has the folder open.
            StateError: the folder cannot be made or written.
        """
        super().__init__(on_row, clock=clock, device_seconds=device_seconds)
        self.folder = folder
        self._layout = layout
        self._rng = rng
        make_private_folder(self.folder)
        self._lock = _lock(self.folder)
        self._blobs = BlobStore(self.folder / "checkpoints")
        self._journal = AppendedFile(self.folder / "journal.jsonl")
        self._metrics = AppendedFile(self.folder / "metrics.jsonl")
        self._checkpoint = self._best_checkpoint = self._private = ""
        self._models: dict[str, str] = {}  # SHA-256 of a model that devices at work train from -> checkpoint
        self._csv_due = 0.0
        self._board: EventFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        self._journal.close()
        self._metrics.close()
        if self._board:
            self._board.close()
        os.close(self._lock)

    @property
    def started(self) -> bool:
        """Whether a run has been recorded here."""
        return (self.folder / "state.json").exists()

    @property
    def barely_begun(self) -> bool:
        """Whether a run was recorded here that ended before its first round was committed."""
        return not self.started and (self.folder / "scenario.json").exists()

    def begin(self, scenario: SimulationConfig, labels: Sequence[str] = ()) -> None:
        """Record the configuration of a fresh run.

        Raises:
            StateError: a run is recorded here already.
        """
        if self.started:
            raise StateError(
                f"{self.folder} holds a run already.",
                hint="Continue it with --resume, or name another folder with --output.",
            )
        self._journal.cut(0)
        self._metrics.cut(0)
        body = {**scenario.to_json(), SIMULATED: list(labels)}
        write_atomic(self.folder / "scenario.json", canonical_json(body) + b"\n")
        self._open_board(scenario)
        super().begin(scenario, labels)

    def resume(self, scenario: SimulationConfig) -> RunState:
        """The last committed state; journal, rows and the random generator are set back to it.

        Raises:
            StateError: the folder holds no run, or one with another configuration.
            StateCorrupt: a file was damaged.
        """
        if not self.started:
            raise StateError(f"{self.folder} holds no run to continue.", hint="Leave out --resume.")
        self.check(scenario)
        saved = read_json(self.folder / "state.json")
        try:
            version, numbers, gauss = saved["random"]
            self._rng.setstate((version, tuple(numbers), gauss))
            state, at_work = self._load(saved["state"]), saved["state"].get("at_work", [])
            wanted = {_key(one) for one in at_work}
            self.time_s = float(saved["time"])
            self._journal.cut(saved["journal"]["bytes"])
            self._metrics.cut(saved["metrics_bytes"])
            head = Head(saved["journal"]["seq"], saved["journal"]["hash"])
        except (KeyError, TypeError, ValueError) as error:
            raise StateCorrupt(f"{self.folder / 'state.json'} is not a saved state ({error}).") from error
        self._run_id = scenario.run_id
        plans = self._take_up(head, wanted)
        self.rows = read_rows(self.folder)
        state = self.state = state.on(at_work=self._at_work(at_work, plans))
        self._open_board(scenario)
        return state

    def committed(self, round_: Committed) -> None:
        """Journal a round and make it durable."""
        state, before = round_.state, self._checkpoint
        self._checkpoint = self._blobs.put(_encode({MODEL: state.model, **state.server.slots}))
        if state.private:
            self._private = self._blobs.put(state.private.to_bytes())
        self._keep_models(state.at_work, before)
        super().committed(round_)

    def evaluated(self, evaluation: Evaluated) -> None:
        """Journal an evaluation and make it durable."""
        if evaluation.improved:
            self._best_checkpoint = self._checkpoint
        super().evaluated(evaluation)

    def finish(self, model: Vector, coverage: Mapping[str, Any]) -> None:
        """Write the final model by tensor names, the tables, and whom the model was made of."""
        write_atomic(self.folder / "model.safetensors", _encode(self._layout.unflatten(model)))
        self._journal.flush()
        self._write_csv()
        write_parquet(row_columns(self.rows), self.folder / "metrics.parquet")
        write_parquet(device_columns(self.tallies), self.folder / "participation.parquet")
        write_atomic(self.folder / COVERAGE, canonical_json(coverage) + b"\n")

    # --- writing ------------------------------------------------------------------------------------

    def _write(self, kind: str, body: Mapping[str, Any]) -> bytes:
        line = super()._write(kind, body)
        self._journal.append(line)
        return line

    def _keep(self, row: Row) -> None:
        """Commit: called with every row, after its event and its checkpoint were written."""
        self._metrics.append(canonical_json(asdict(row)) + b"\n")
        if self.state:
            self._save(self.state)
        if self._board:
            self._board.add(row)
        if time.monotonic() >= self._csv_due:
            self._write_csv()

    def _save(self, state: RunState) -> None:
        self.time_s = self._clock()
        seq, sha256 = self._chain.head
        body = {
            "state": {
                "checkpoint": self._checkpoint,
                "best_checkpoint": self._best_checkpoint,
                "round": state.round,
                "attempt": state.attempt,
                "evaluated": state.evaluated,
                "stale": state.stale,
                "retried": state.retried,
                "expected": state.expected,
                "private": self._private,
                "best": asdict(state.best) if state.best else None,
                "models": self._models,
                "at_work": [_started(one) for one in state.at_work],
            },
            "random": self._rng.getstate(),
            "time": self.time_s,
            "journal": {"bytes": self._journal.sync(), "seq": seq, "hash": sha256},
            "metrics_bytes": self._metrics.sync(),
        }
        write_atomic(self.folder / "state.json", canonical_json(body))
        self._forget({self._checkpoint, self._best_checkpoint, self._private, *self._models.values()})

    def _keep_models(self, at_work: Sequence[AtWork], before: str) -> None:
        """Keep what devices at work train from: checkpoints of earlier rounds, and the first model.

        Args:
            at_work: the devices.
            before: the checkpoint of the round before.
        """
        there, self._models = self._models, {}
        if at_work and self.state:
            there[self.state.model_sha256] = before
        for one in at_work:
            sha256 = one.plan.model_sha256
            if sha256 not in self._models:
                self._models[sha256] = there.get(sha256) or self._blobs.put(_encode({MODEL: one.model}))

    def _forget(self, keep: set[str]) -> None:
        """Remove checkpoints that nothing needs any more."""
        for path in self._blobs.folder.glob("??/*"):
            if path.parent.name + path.name not in keep:
                path.unlink(missing_ok=True)
                with suppress(OSError):  # another one is in there
                    path.parent.rmdir()

    def _write_csv(self) -> None:
        began = time.monotonic()
        write_csv(row_columns(self.rows), self.folder / "metrics.csv")
        ended = time.monotonic()
        self._csv_due = ended + max(CSV_EVERY_S, (ended - began) / CSV_SHARE)

    def _open_board(self, scenario: SimulationConfig) -> None:
        """Events for TensorBoard: a run that goes on writes its rows anew, so that none is there twice."""
        if scenario.output.tensorboard:
            self._board = EventFile.open(self.folder / "tensorboard", self.rows)

    # --- reading ------------------------------------------------------------------------------------

    def check(self, scenario: SimulationConfig) -> None:
        """Refuse to continue a run with other settings than it was started with."""
        recorded, now = read_scenario(self.folder).identity(), scenario.identity()
        differing = sorted(k for k in recorded.keys() | now.keys() if recorded.get(k) != now.get(k))
        if differing:
            raise StateError(
                f"{self.folder} holds a run with other settings in [{'], ['.join(differing)}].",
                hint="Continue it with the scenario it was started with, or name another folder.",
            )

    def _take_up(self, head: Head, wanted: Collection[tuple[int, int]]) -> dict[tuple[int, int], RoundPlan]:
        """Check the journal up to the commit point, count its devices anew, and go on after it.

        Returns:
            The plans of these rounds and attempts.
        """
        path, last, plans = self._journal.path, EMPTY, dict[tuple[int, int], RoundPlan]()
        for event, now in checked(path):
            last = now
            if event.kind in ("round.committed", "round.abandoned"):
                self._count(event.body["participation"])
            elif event.kind == "round.planned" and (key := _key(event.body)) in wanted:
                plan = RoundPlan.from_json(event.body["plan"])
                if plan.kind == "train":
                    plans[key] = plan
        require(path, last, head)
        self._chain = Chain(head)
        return plans

    def _at_work(
        self, saved: Sequence[Mapping[str, Any]], plans: Mapping[tuple[int, int], RoundPlan]
    ) -> tuple[AtWork, ...]:
        """The devices that were at work at the commit point."""
        models = {sha256: self._tensors(digest)[MODEL] for sha256, digest in self._models.items()}
        found = []
        try:
            for one in saved:
                plan = plans[_key(one)]
                model, began = models[plan.model_sha256], float(one["started_s"])
                found.append(AtWork(one["device_id"], plan, model, began))
        except (KeyError, TypeError, ValueError) as error:
            raise StateCorrupt(f"{self.folder / 'state.json'} does not fit the journal ({error}).") from error
        return tuple(found)

    def _load(self, saved: Mapping[str, Any]) -> RunState:
        tensors = self._tensors(saved["checkpoint"])
        model = tensors.pop(MODEL)
        if model.shape != (self._layout.size,):
            raise StateCorrupt(
                f"The checkpoint has {model.size} coordinates, the task's model {self._layout.size}.",
                hint="Continue with the version of the task that the run was started with.",
            )
        self._checkpoint, self._best_checkpoint = saved["checkpoint"], saved["best_checkpoint"]
        if self._best_checkpoint:
            self.best_model = self._tensors(self._best_checkpoint)[MODEL]
        self._private, self._models = saved.get("private", ""), saved.get("models", {})
        private = PrivateState.from_bytes(self._blobs.read(self._private)) if self._private else None
        best = Best(**saved["best"]) if saved["best"] else None
        return RunState(
            model,
            ServerState(tensors),
            saved["round"],
            saved["attempt"],
            saved["evaluated"],
            best,
            saved["stale"],
            tuple((number, attempt) for number, attempt in saved.get("retried", [])),
            private,
            saved.get("expected", 0.0),
        )

    def _tensors(self, digest: str) -> dict[str, Vector]:
        from safetensors.numpy import load

        return load(self._blobs.read(digest))


def _encode(tensors: Mapping[str, Vector]) -> bytes:
    from safetensors.numpy import save

    return save(dict(tensors))


def read_scenario(folder: Path) -> SimulationConfig:
    """The configuration of the run in a folder.

    Raises:
        StateCorrupt: it cannot be read.
    """
    body = read_json(folder / "scenario.json")
    body.pop(SIMULATED, None)
    try:
        return SimulationConfig.model_validate_json(json.dumps(body))
    except ValidationError as error:
        raise StateCorrupt(f"{folder / 'scenario.json'} is not a scenario: {error}.") from error


def read_rows(folder: Path, length: int | None = None) -> list[Row]:
    """The rows of a run, as they were at its last commit point or later.

    Args:
        folder: of the run.
        length: bytes to read of ``metrics.jsonl``, as in the commit point; None = all of it.

    Raises:
        StateCorrupt: they cannot be read.
    """
    path, rows = folder / "metrics.jsonl", dict[int, Row]()
    try:
        for line in path.read_bytes()[:length].splitlines():
            row = Row.from_json(json.loads(line))
            rows[row.round] = row  # an evaluated row replaces the committed one
    except (OSError, ValueError, TypeError) as error:
        raise StateCorrupt(f"{path} cannot be read: {error}.", hint="Restore it from a copy.") from error
    return list(rows.values())


def _started(one: AtWork) -> dict[str, Any]:
    about = {"round": one.plan.round, "attempt": one.plan.attempt}
    return {"device_id": one.device_id, **about, "started_s": one.started_s}


def _key(body: Mapping[str, Any]) -> tuple[int, int]:
    return body["round"], body["attempt"]


def _attempt(plan: RoundPlan) -> dict[str, Any]:
    return {"run_id": plan.run_id, "round": plan.round, "attempt": plan.attempt}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run's folder; StateCorrupt where it is none."""
    try:
        body = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StateCorrupt(f"{path} cannot be read: {error}.", hint="Start the run anew.") from error
    if not isinstance(body, dict):
        raise StateCorrupt(f"{path} holds no JSON object.", hint="Start the run anew.")
    return body


def _lock(folder: Path) -> int:
    # A POSIX lock belongs to this process alone; flock() would be shared with forked workers.
    with on_disk(folder):
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StateLocked(
            f"Another process works in {folder}.", hint="Wait for it, or name another folder."
        ) from error
    return descriptor
