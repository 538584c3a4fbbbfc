"""What the operator's commands need beyond the store: reading a run's file, writing models and journals."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from lepton_fl.compression.federated import check_teacher
from lepton_fl.config import load
from lepton_fl.errors import ConfigError, NotFound, TaskError
from lepton_fl.files import BlobStore, canonical_json, write_atomic
from lepton_fl.plan import RunSpec
from lepton_fl.rounds.private import refuse_run
from lepton_fl.tasks import Task
from lepton_server.store import Run, Store

JOURNAL_FORMAT = "lepton run journal 1"
_PAGE = 500  # events read at a time
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class RunFile(BaseModel):
    """A TOML file with a ``[run]`` table; a simulation's other tables are left to the simulation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    run: RunSpec
    data: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    devices: dict[str, Any] = {}
    faults: dict[str, Any] = {}
    output: dict[str, Any] = {}


def run_spec(
    path: Path | None, given: dict[str, Any], model: type[RunFile] = RunFile, *, authority: bool = True
) -> RunSpec:
    """The run that a file and the command line describe together.

    Args:
        path: the file; None = the command line only.
        given: of the command line, dotted.
        model: of the file.
        authority: whether there is an enrolment authority.

    Raises:
        ConfigError: no task, an unknown key, a value out of bounds, or a mode that this process cannot run.
    """
    overrides = {key: value for key, value in given.items() if value is not None}
    if path is None and "run.task" not in overrides:
        raise ConfigError("No task was given.", hint="Give --task, or a TOML file with a [run] table.")
    size = overrides.get("run.cohort.size")
    if size is not None and "run.cohort.min_reports" not in overrides and path is None:
        overrides["run.cohort.min_reports"] = max(1, size // 2)
    spec = load(model, path, env={}, overrides=overrides).value.run
    refuse_unknown(spec, authority=authority)
    return spec


def refuse_unknown(spec: RunSpec, *, authority: bool) -> None:
    """Refuse what this process cannot do: a run without rounds, or a guarantee that would not be true.

    Args:
        spec: of the run.
        authority: whether there is an enrolment authority, which secure aggregation needs.

    Raises:
        ConfigError: names all that stands in the way of the privacy.
    """
    refuse_run(spec, central_evaluation=bool(spec.central_data))
    if spec.secure_aggregation == "required" and not authority:
        raise ConfigError(
            "run.secure_aggregation is 'required', and no enrolment authority says whose keys are whose.",
            hint="Make one with `lepton authority create`, then set authority.public_key of the coordinator.",
        )
    if spec.mode == "buffered":
        raise ConfigError(
            "The coordinator drives synchronous rounds only; run.mode is 'buffered'.",
            hint="Buffered runs work in `lepton simulate` and over a stock Flower deployment "
            "(lepton_strategies.run_campaign).",
        )


def with_teacher(spec: RunSpec, task: Task, blobs: BlobStore, find: Callable[[str], Run]) -> RunSpec:
    """The specification with its teacher by the name of a stored model: SHA-256.

    Args:
        spec: ``teacher`` is such a name, or a run's id: its best evaluated model, else its newest.
        task: of the run.
        blobs: where models are.
        find: a run by its id.

    Raises:
        ConfigError: a distillation without a teacher, or a teacher for anything else.
        NotFound: there is no such run or model.
        StateCorrupt: the stored model is damaged.
    """
    check_teacher(task, spec.teacher)
    if not spec.teacher:
        return spec
    sha256: str | None = spec.teacher
    if not _SHA256.fullmatch(spec.teacher):
        run = find(spec.teacher)
        sha256 = run.best_sha256 or run.model_sha256
    if sha256 is None:
        raise NotFound(
            f"Run {spec.teacher} has no model yet that could teach.", hint="Wait for its first round."
        )
    blobs.read(sha256)
    return spec.model_copy(update={"teacher": sha256})


def lineage(store: Store, run: Run, sha256: str) -> dict[str, str]:
    """Where a model comes from: its round, what its run had cost by then, the journal's head, the privacy."""
    from lepton_fl.compression.source import promise

    created = [model for model in store.models(run.id) if model.sha256 == sha256]
    if not created:
        return {}
    last, seen = created[-1].round, 0
    paid = [r for r in store.rounds(run.id) if r.round <= last]
    found = {"round": str(last), "seconds": f"{sum(r.seconds for r in paid):.3f}"}
    found |= {
        "bytes_up": str(sum(r.bytes_up for r in paid)),
        "bytes_down": str(sum(r.bytes_down for r in paid)),
    }
    while page := store.events(seen, subject=run.id, limit=_PAGE):
        seen = page[-1].seq
        for event in page:
            if event.kind == "model.created" and event.body["model_sha256"] == sha256:
                found["journal_sha256"] = event.hash
    if privacy := run.spec.get("privacy"):
        spent = [r.metrics.get("epsilon") for r in store.rounds(run.id) if r.model_sha256 == sha256]
        found["privacy"] = promise(privacy, spent[-1] if spent else None)
    return found


def export_model(
    blobs: BlobStore, run: Run, sha256: str, output: Path, known: Mapping[str, str] | None = None
) -> int:
    """Write a model as safetensors with its lineage in the header; return the file's size in bytes.

    Args:
        blobs: where the model is.
        run: that made it.
        sha256: its name.
        output: the file.
        known: further facts for the header, see ``lineage``.

    Raises:
        TaskError: the installed task's model has another shape than the stored one.
        StateCorrupt: the stored weights do not match their hash.
    """
    from safetensors.numpy import save

    from lepton_fl.tasks import load_task
    from lepton_fl.training.trainer import Trainer
    from lepton_server.book import load_model

    weights = load_model(blobs, sha256)
    task = load_task(str(run.spec["task"]))
    layout = Trainer(task).layout
    if layout.size != len(weights):
        raise TaskError(
            f"The installed {task.name} {task.version} has {layout.size} weights, the model {len(weights)}.",
            hint="Install the version of the task that the run trained.",
        )
    header = {"run": run.id, "task": task.name, "task_version": task.version, "model_sha256": sha256}
    header |= {"reference": str(run.spec["task"]), **(known or {})}
    data = save(layout.unflatten(weights), metadata=header)
    write_atomic(output, data)
    return len(data)


def journal_lines(store: Store, run: Run) -> Iterator[bytes]:
    """A run's events as JSON lines, the oldest first; the first line says what the file is.

    Each event has its place in the coordinator's journal (``seq``), its time (seconds since 1970) and the two
    hashes that chain it to its predecessor there: an altered event no longer fits its own hash. Events of
    other runs and devices are left out; there are no keys, tokens, names or addresses of devices in it.
    """
    yield canonical_json({"format": JOURNAL_FORMAT, "run_id": run.id, "state": run.state}) + b"\n"
    seen = 0
    while page := store.events(seen, subject=run.id, limit=_PAGE):
        seen = page[-1].seq
        for event in page:
            line = {
                "seq": event.seq,
                "time": event.time,
                "kind": event.kind,
                "subject": event.subject,
                "body": dict(event.body),
                "prev": event.prev,
                "hash": event.hash,
            }
            yield canonical_json(line) + b"\n"
