"""Where else a run's figures go: TensorBoard's event files, MLflow.

Event files are written by this process at once, without a thread: the engine forks workers while a run goes
on. MLflow hears of a run when it is over, for the same reason.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any, Self

from lepton_fl.errors import ConfigError, RunError
from lepton_simulations.appended import on_disk
from lepton_simulations.rows import Row

EXPERIMENT = "lepton"  # the name under which MLflow lists all runs
GROUPS: Mapping[str, tuple[str, ...]] = {
    "round": ("train_loss", "reports", "asked", "attempts", "clipped", "clip_norm", "epsilon"),
    "cost": ("seconds", "time_s", "round_s", "bytes_up", "bytes_down"),
}


def scalars(row: Row) -> dict[str, float]:
    """Every figure of a row by a grouped name, such as metrics/central_accuracy; finite ones only."""
    found: dict[str, Any] = {f"metrics/{name}": value for name, value in row.metrics.items()}
    for group, names in GROUPS.items():
        found |= {f"{group}/{name}": getattr(row, name) for name in names}
    found |= {f"outcomes/{name}": count for name, count in row.outcomes.items()}
    return {name: float(value) for name, value in found.items() if value is not None and isfinite(value)}


class EventFile:
    """A run's figures for TensorBoard, by round; an evaluated row only adds what the committed one lacked."""

    def __init__(self, writer: Any) -> None:  # noqa: ANN401 - tensorboardX has no types
        self._writer = writer
        self._round = 0
        self._shown: dict[str, float] = {}

    @classmethod
    def open(cls, folder: Path, rows: Sequence[Row]) -> Self | None:
        """Start the folder's event file anew with ``rows``; None where tensorboardX is not installed.

        Raises:
            StateError, DiskFull: the folder cannot be written.
        """
        try:
            from tensorboardX.event_file_writer import EventsWriter
        except ModuleNotFoundError:
            return None
        with on_disk(folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
            file = cls(EventsWriter(str(folder / "events")))
        for row in rows:
            file.add(row)
        return file

    def add(self, row: Row) -> None:
        """Write what is new in a row.

        Raises:
            StateError, DiskFull: it cannot be written.
        """
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        before = self._shown if row.round == self._round else {}
        self._round, self._shown = row.round, scalars(row)
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in self._shown.items()
            if name not in before
        ]
        event = Event(wall_time=time.time(), step=row.round, summary=Summary(value=values))
        with on_disk(Path(self._writer._file_name).parent):
            self._writer.write_event(event)
            self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # what could not be written has been reported
            self._writer.close()


def log_to_mlflow(
    target: str,
    name: str,
    parameters: Mapping[str, Any],
    rows: Sequence[Row],
    tags: Mapping[str, str],
    files: Sequence[Path],
) -> str:
    """Record a finished run with MLflow.

    Args:
        target: tracking URI, or a folder.
        name: of the run.
        parameters: nested; logged by dotted names.
        rows: logged round by round.
        tags: e.g. the hashes.
        files: logged as artefacts.

    Returns:
        MLflow's id of the run.

    Raises:
        ConfigError: MLflow is not installed.
        RunError: MLflow refused; the run folder is complete without it.
    """
    try:
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ModuleNotFoundError as error:
        raise ConfigError(
            "output.mlflow is set, but mlflow is not installed.",
            hint="pip install mlflow, or remove output.mlflow.",
        ) from error
    try:
        uri, artifacts = _store(target)
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT, artifacts)
        run_id: str = client.create_run(experiment, run_name=name).info.run_id
        now = int(time.time() * 1000)
        params = [Param(key, value) for key, value in _flat(parameters).items()]
        client.log_batch(run_id, params=params[:100], tags=[RunTag(k, v) for k, v in tags.items()])
        for row in rows:
            figures = [Metric(key, value, now, row.round) for key, value in scalars(row).items()]
            client.log_batch(run_id, metrics=figures)
        for file in files:
            client.log_artifact(run_id, str(file))
        client.set_terminated(run_id)
    except (MlflowException, OSError) as error:
        raise RunError(
            f"MLflow at {target} did not take the run: {error}.",
            hint="The run folder is complete without it; see output.mlflow.",
        ) from error
    return run_id


def _store(target: str) -> tuple[str, str | None]:
    """Tracking URI and place of artefacts; in a folder, a database: MLflow 3 has given up its file store."""
    if "://" in target:
        return target, None
    folder = Path(target).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    leaves: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = str(value)[:500]
    return leaves
