"""What a simulated run leaves behind: rows in memory, and a folder that survives kill -9.

    folder/
        scenario.json       the configuration, as checked
        journal.jsonl       plans, abandoned attempts, commits, evaluations: one JSON object a line
        metrics.csv         one line a round
        state.json          the commit point: what the next round depends on
        checkpoints/        models and optimiser states (safetensors), named by SHA-256
        model.safetensors   the final model, by tensor names

``state.json`` is replaced atomically and says how long the journal was, so whatever a crash left behind it is
cut off, and a resumed run continues bit for bit as if nothing had happened.
"""

import csv
import errno
import fcntl
import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, BinaryIO, Self

from pydantic import ValidationError

from lepton_fl.errors import DiskFull, StateCorrupt, StateError, StateLocked
from lepton_fl.files import BlobStore, canonical_json, make_private_folder, write_atomic
from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.campaign import Best, Committed, Evaluated, RunState
from lepton_fl.rounds.collect import Collected
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.vector import Layout, Vector
from lepton_simulations.config import SimulationConfig

MODEL = "model"
CSV_EVERY_S = 2.0  # metrics.csv is rewritten whole, so not more often than this


@dataclass(frozen=True)
class Row:
    """One committed round."""

    round: int
    reports: int
    asked: int
    train_loss: float
    metrics: Mapping[str, float]  # of the evaluation after it; empty if there was none
    outcomes: Mapping[str, int]  # of all attempts: accepted, surplus or a Rejection, and how often
    bytes_up: int  # from the devices
    bytes_down: int  # to the devices
    seconds: float  # wall time, training and evaluation
    attempts: int = 1

    def metric(self, name: str) -> float | None:
        """The devices' figure if there is one, else the central one."""
        return self.metrics.get(name, self.metrics.get(f"central_{name}"))


class MemoryBook:
    """Rows and the last state, in memory; implements ``rounds.campaign.Book``."""

    def __init__(self, on_row: Callable[[Row], None] = lambda row: None) -> None:
        """Open a book; ``on_row`` is called when a round is committed, and again once it is evaluated."""
        self.rows: list[Row] = []
        self.state: RunState | None = None
        self.best_model: Vector | None = None
        self._on_row = on_row
        self._abandoned: list[Collected] = []
        self._marked = time.monotonic()

    def planned(self, plan: RoundPlan) -> None:
        """Nothing to do: an attempt that dies with this process leaves no trace."""

    def abandoned(self, collected: Collected, cause: str) -> None:
        """Count what became of the attempt's devices."""
        self._abandoned.append(collected)

    def committed(self, round_: Committed) -> None:
        """Keep the round's row and state."""
        attempts = [*self._abandoned, round_.collected]
        entries = [entry for attempt in attempts for entry in attempt.participation.values()]
        self.state = round_.state
        row = Row(
            round=round_.state.round,
            reports=round_.collected.reports,
            asked=len(round_.collected.plan.cohort),
            train_loss=round_.metrics.get("loss", 0.0),
            metrics={},
            outcomes=dict(sorted(Counter(entry.outcome for entry in entries).items())),
            bytes_up=sum(attempt.bytes_up for attempt in attempts),
            bytes_down=round_.bytes_down * len(attempts),
            seconds=self._lap(),
            attempts=len(attempts),
        )
        self._abandoned = []
        self.rows.append(row)
        self._on_row(row)

    def evaluated(self, evaluation: Evaluated) -> None:
        """Complete the round's row."""
        self.state = evaluation.state
        if evaluation.improved:
            self.best_model = evaluation.state.model
        if self.rows and self.rows[-1].round == evaluation.state.round:
            last = self.rows[-1]
            self.rows[-1] = replace(
                last, metrics=dict(evaluation.metrics), seconds=last.seconds + self._lap()
            )
            self._on_row(self.rows[-1])

    def waiting(self, cause: str, seconds: float) -> None:
        """Virtual devices do not come and go: nothing to show."""

    def _lap(self) -> float:
        before, self._marked = self._marked, time.monotonic()
        return self._marked - before


class FolderBook(MemoryBook):
    """A book on disk; see the module."""

    def __init__(
        self, folder: Path, layout: Layout, rng: Random, on_row: Callable[[Row], None] = lambda row: None
    ) -> None:
        """Open a folder, and make it if need be.

        Args:
            folder: of one run; only one process may have it open.
            layout: of the model.
            rng: the campaign's; its state is part of the commit point.
            on_row: see ``MemoryBook``.

        Raises:
            StateLocked: another process has the folder open.
            StateError: the folder cannot be made or written.
        """
        super().__init__(on_row)
        self.folder = folder
        self._layout = layout
        self._rng = rng
        make_private_folder(self.folder)
        self._lock = _lock(self.folder)
        self._blobs = BlobStore(self.folder / "checkpoints")
        with _on_disk(self.folder):
            self._journal: BinaryIO = open(self.folder / "journal.jsonl", "ab")  # noqa: SIM115 - see close()
        self._checkpoint = self._best_checkpoint = ""
        self._csv_written = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        with suppress(OSError):  # what was not written when it mattered is not missed
            self._journal.close()
        os.close(self._lock)

    @property
    def started(self) -> bool:
        """Whether a run has been recorded here."""
        return (self.folder / "state.json").exists()

    def begin(self, scenario: SimulationConfig) -> None:
        """Record the configuration of a fresh run.

        Raises:
            StateError: a run is recorded here already.
        """
        if self.started:
            raise StateError(
                f"{self.folder} holds a run already.",
                hint="Continue it with --resume, or name another folder with --output.",
            )
        self._truncate(0)
        write_atomic(self.folder / "scenario.json", canonical_json(scenario.to_json()) + b"\n")

    def resume(self, scenario: SimulationConfig) -> RunState:
        """The last committed state; the journal and the random generator are set back to it.

        Raises:
            StateError: the folder holds no run, or one with another configuration.
            StateCorrupt: a file was damaged.
        """
        self._check_scenario(scenario)
        saved = _read_json(self.folder / "state.json")
        try:
            version, numbers, gauss = saved["random"]
            self._rng.setstate((version, tuple(numbers), gauss))
            self.rows = [Row(**row) for row in saved["rows"]]
            state = self._load(saved["state"])
            self._truncate(saved["journal_bytes"])
        except (KeyError, TypeError, ValueError) as error:
            raise StateCorrupt(f"{self.folder / 'state.json'} is not a saved state ({error}).") from error
        self.state = state
        return state

    def planned(self, plan: RoundPlan) -> None:
        """Journal a plan."""
        self._write("planned", plan.to_json())

    def abandoned(self, collected: Collected, cause: str) -> None:
        """Journal an attempt that does not count."""
        super().abandoned(collected, cause)
        self._write("abandoned", {"cause": cause, **_report(collected)})

    def committed(self, round_: Committed) -> None:
        """Journal a round and make it durable."""
        super().committed(round_)
        self._write("committed", {**_report(round_.collected), "metrics": dict(round_.metrics)})
        tensors = {MODEL: round_.state.model, **round_.state.server.slots}
        self._checkpoint = self._blobs.put(_encode(tensors))
        self._save(round_.state)

    def evaluated(self, evaluation: Evaluated) -> None:
        """Journal an evaluation and make it durable."""
        super().evaluated(evaluation)
        report = _report(evaluation.collected) if evaluation.collected else {"round": evaluation.state.round}
        self._write(
            "evaluated", {**report, "metrics": dict(evaluation.metrics), "improved": evaluation.improved}
        )
        if evaluation.improved:
            self._best_checkpoint = self._checkpoint
        self._save(evaluation.state)

    def finish(self, model: Vector) -> None:
        """Write the final model by tensor names, and the metrics."""
        write_atomic(self.folder / "model.safetensors", _encode(self._layout.unflatten(model)))
        self._write_csv()

    # --- writing ------------------------------------------------------------------------------------

    def _write(self, event: str, body: Mapping[str, Any]) -> None:
        line = canonical_json({"event": event, "time": round(time.time(), 3), **body}) + b"\n"
        with _on_disk(self.folder):
            self._journal.write(line)

    def _save(self, state: RunState) -> None:
        with _on_disk(self.folder):
            self._journal.flush()
            os.fsync(self._journal.fileno())
        body = {
            "state": {
                "checkpoint": self._checkpoint,
                "best_checkpoint": self._best_checkpoint,
                "round": state.round,
                "attempt": state.attempt,
                "evaluated": state.evaluated,
                "stale": state.stale,
                "best": asdict(state.best) if state.best else None,
            },
            "random": self._rng.getstate(),
            "journal_bytes": self._journal.tell(),
            "rows": [asdict(row) for row in self.rows],
        }
        write_atomic(self.folder / "state.json", canonical_json(body))
        self._forget({self._checkpoint, self._best_checkpoint})
        if time.monotonic() - self._csv_written > CSV_EVERY_S:
            self._write_csv()

    def _forget(self, keep: set[str]) -> None:
        """Remove checkpoints that nothing needs any more."""
        for path in self._blobs.folder.glob("??/*"):
            if path.parent.name + path.name not in keep:
                path.unlink(missing_ok=True)

    def _write_csv(self) -> None:
        fixed = ["round", "reports", "asked", "attempts", "train_loss", "bytes_up", "bytes_down", "seconds"]
        names = sorted({name for row in self.rows for name in row.metrics})
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([*fixed, *names])
        for row in self.rows:
            writer.writerow([*(getattr(row, f) for f in fixed), *(row.metrics.get(n, "") for n in names)])
        write_atomic(self.folder / "metrics.csv", text.getvalue().encode())
        self._csv_written = time.monotonic()

    # --- reading ------------------------------------------------------------------------------------

    def _check_scenario(self, scenario: SimulationConfig) -> None:
        if not self.started:
            raise StateError(f"{self.folder} holds no run to continue.", hint="Leave out --resume.")
        recorded, now = read_scenario(self.folder).identity(), scenario.identity()
        differing = sorted(k for k in recorded.keys() | now.keys() if recorded.get(k) != now.get(k))
        if differing:
            raise StateError(
                f"{self.folder} holds a run with other settings in [{'], ['.join(differing)}].",
                hint="Continue it with the scenario it was started with, or name another folder.",
            )

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
        best = Best(**saved["best"]) if saved["best"] else None
        return RunState(
            model,
            ServerState(tensors),
            saved["round"],
            saved["attempt"],
            saved["evaluated"],
            best,
            saved["stale"],
        )

    def _tensors(self, digest: str) -> dict[str, Vector]:
        from safetensors.numpy import load

        return load(self._blobs.read(digest))

    def _truncate(self, length: int) -> None:
        size = self._journal.tell()
        if length > size:
            raise StateCorrupt(f"The journal in {self.folder} has {size} bytes, the commit point {length}.")
        with _on_disk(self.folder):
            self._journal.truncate(length)
            self._journal.seek(0, os.SEEK_END)


def _encode(tensors: Mapping[str, Vector]) -> bytes:
    from safetensors.numpy import save

    return save(dict(tensors))


def read_scenario(folder: Path) -> SimulationConfig:
    """The configuration of the run in a folder.

    Raises:
        StateCorrupt: it cannot be read.
    """
    body = _read_json(folder / "scenario.json")
    try:
        return SimulationConfig.model_validate_json(json.dumps(body))
    except ValidationError as error:
        raise StateCorrupt(f"{folder / 'scenario.json'} is not a scenario: {error}.") from error


def _report(collected: Collected) -> dict[str, Any]:
    devices = {device_id: asdict(entry) for device_id, entry in collected.participation.items()}
    for entry in devices.values():
        del entry["device_id"]
    plan = collected.plan
    return {"round": plan.round, "attempt": plan.attempt, "reports": collected.reports, "devices": devices}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StateCorrupt(f"{path} cannot be read: {error}.", hint="Start the run anew.") from error
    if not isinstance(body, dict):
        raise StateCorrupt(f"{path} holds no JSON object.", hint="Start the run anew.")
    return body


@contextmanager
def _on_disk(folder: Path) -> Iterator[None]:
    """Translate what the operating system says about a file of the run."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(
                f"No space was left in {folder}; the last committed round is safe.",
                hint="Free some space, then continue with --resume.",
            ) from error
        raise StateError(
            f"Cannot use {folder}: {error.strerror or error}.", hint="Name a folder that may be written."
        ) from error


def _lock(folder: Path) -> int:
    # A POSIX lock belongs to this process alone; flock() would be shared with forked workers.
    with _on_disk(folder):
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StateLocked(
            f"Another process works in {folder}.", hint="Wait for it, or name another folder."
        ) from error
    return descriptor
