"""What a device owner can set, with its unit, default and bounds.

The list of tasks is an allow-list: what is not named here never runs on this device. Example::

    [client]
    state_dir = "/var/lib/lepton-client"
    [[tasks]]
    reference = "lepton_fl.tasks.digits:task"
    data = {kind = "npz", path = "/srv/digits.npz"}
    [eligibility]
    windows = ["22:00-06:00"]

Nothing here imports numpy: an idle device pays for what it uses only.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_SHORT_NAME = re.compile(r"[A-Za-z_]\w*")
_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


def _checked_windows(windows: tuple[str, ...]) -> tuple[str, ...]:
    for window in windows:
        if not _WINDOW.fullmatch(window) or window[:5] == window[6:]:
            raise ValueError(f"Expected two different times like 22:00-06:00, got {window!r}")
    return windows


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def default_state_dir() -> Path:
    """``$XDG_STATE_HOME/lepton-client``, or the folder under the home directory that stands for it."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base else Path.home() / ".local" / "state") / "lepton-client"


class ClientSection(_Section):
    """[client]: this device's name and where it keeps its key."""

    state_dir: Path = Field(
        default_factory=default_state_dir,
        description="Folder of the device's key, certificate and status, mode 0700. One agent per folder.",
    )
    name: str = Field(
        default="",
        max_length=64,
        description="Shown to the operator; empty = this host's name. Used when enrolling.",
    )
    groups: tuple[str, ...] = Field(
        default=(), max_length=16, description="Labels by which runs choose devices. Used when enrolling."
    )

    secure_aggregation: Literal["required", "off"] = Field(
        default="off",
        description="required: this device answers no round in which its own update or counts can be seen.",
    )
    least_cohort: int = Field(
        default=16,
        ge=4,
        le=1000,
        description="This device takes part in no secure sum of fewer devices.",
    )
    least_noise: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="This device takes part in no secure sum to which devices add less noise than so many "
        "times what an update can move it by; 0 = whatever the run says.",
    )
    hidden_graph: bool = Field(
        default=False,
        description="Also take part where run.secure.mask_graph is 'hidden', which is experimental.",
    )
    authority: str = Field(
        default="",
        pattern=r"^([0-9a-f]{64})?$",
        description="Public key of the enrolment authority whose devices this one believes, 64 hexadecimal "
        "digits; empty = the one of the join token, or the first that the coordinator names.",
    )

    @field_validator("groups")
    @classmethod
    def _groups(cls, groups: tuple[str, ...]) -> tuple[str, ...]:
        for group in groups:
            if not 1 <= len(group) <= 50:
                raise ValueError(f"Expected labels of 1 to 50 characters, got {group!r}")
        return groups


class PrivacyPolicy(_Section):
    """[tasks.privacy]: what every single row of this task's data may lose, over all runs together."""

    epsilon: float = Field(gt=0, allow_inf_nan=False, description="The most that may ever be spent.")
    delta: float = Field(
        gt=0, lt=1, description="At which epsilon is counted; below one over the number of rows."
    )


class TaskSection(_Section):
    """[[tasks]]: one task that this device may run, and the data it runs on."""

    reference: str = Field(description="package.module:attribute, or the short name of a ready task: digits.")
    data: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="The data source: kind (npz, csv, parquet, images, task), path and so on; "
        "empty = the task's bundled data.",
    )
    privacy: PrivacyPolicy | None = Field(
        default=None,
        description="The owner's budget {epsilon, delta} of example-level privacy. With it, this device "
        "refuses every training without such privacy, every evaluation, and what would pass epsilon.",
    )

    @field_validator("reference")
    @classmethod
    def _named(cls, reference: str) -> str:
        if not (_REFERENCE.fullmatch(reference) or _SHORT_NAME.fullmatch(reference)):
            raise ValueError(f"Expected package.module:attribute or a short name, got {reference!r}")
        return reference


class LimitsSection(_Section):
    """[limits]: what training may take from this machine."""

    threads: int = Field(default=1, ge=1, le=1024, description="Threads that training computes with.")
    memory_bytes: int = Field(
        default=0,
        ge=0,
        description="Cap on the process's private memory (RLIMIT_DATA), bytes; 0 = none. Training that hits "
        "it is reported as failed. At least 256 MiB.",
    )
    stall_s: Seconds = Field(
        default=20.0,
        le=86_400,
        description="A training step that takes longer is reported to the coordinator as hung, seconds; it "
        "is not ended, and the report ends with the next step.",
    )
    nice: int = Field(
        default=10, ge=0, le=19, description="Niceness of the process; 19 gives way to everything."
    )

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if 0 < self.memory_bytes < 2**28:
            raise ValueError(f"memory_bytes={self.memory_bytes} is below 268435456; nothing trains with that")
        return self


class EligibilitySection(_Section):
    """[eligibility]: when this device may take part; all rules must hold."""

    max_load: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="Highest 1-minute load average per CPU; 0 = any."
    )
    min_free_memory: int = Field(default=0, ge=0, description="Least memory available, bytes; 0 = any.")
    min_free_disk: int = Field(
        default=16 * 2**20, ge=0, description="Least space left where the state is, bytes; 0 = any."
    )
    windows: tuple[str, ...] = Field(
        default=(),
        max_length=32,
        description="Local times of day, HH:MM-HH:MM; may cross midnight. Empty = always.",
    )
    command: tuple[str, ...] = Field(
        default=(),
        max_length=64,
        description="A program with its arguments; exit code 0 = eligible. No shell.",
    )
    command_timeout_s: Seconds = Field(
        default=10.0, le=300, description="After so long the command is killed and counts as no, seconds."
    )
    on_ac_power_only: bool = Field(
        default=False, description="Only while plugged in; a machine without battery is."
    )
    min_battery: float = Field(
        default=0.0,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="Least charge while on battery, percent; 0 = any.",
    )

    @field_validator("windows")
    @classmethod
    def _times(cls, windows: tuple[str, ...]) -> tuple[str, ...]:
        return _checked_windows(windows)


class DeliverySection(_Section):
    """[delivery]: the releases that this device takes, and what a download may cost."""

    task: str = Field(
        default="",
        description="The only task whose releases this device takes: package.module:attribute or a short "
        "name. Empty = it takes none.",
    )
    profile: str = Field(
        default="", max_length=50, description="What kind of device this is, for whoever assigns variants."
    )
    root: Path | None = Field(
        default=None,
        description="File of the first root (1.root.json) that this device believes. Empty = the one that "
        "the coordinator shows first, pinned from then on.",
    )
    bytes_per_s: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Downloads take so many bytes per second; 0 = any.",
    )
    windows: tuple[str, ...] = Field(
        default=(),
        max_length=32,
        description="Local times of day for downloads, HH:MM-HH:MM. Empty = always.",
    )
    quota_bytes: int = Field(
        default=0,
        ge=0,
        description="What releases may take on the disk, bytes; 0 = any. Two are kept, one may come.",
    )
    min_free_bytes: int = Field(
        default=64 * 2**20, ge=0, description="Least space that a download leaves on the disk, bytes."
    )
    retry_min_s: Seconds = Field(
        default=30.0,
        le=86_400,
        description="Bound of the first random wait after a failed delivery, s.",
    )

    @field_validator("task")
    @classmethod
    def _named(cls, task: str) -> str:
        if task and not (_REFERENCE.fullmatch(task) or _SHORT_NAME.fullmatch(task)):
            raise ValueError(f"Expected package.module:attribute or a short name, got {task!r}")
        return task

    @field_validator("windows")
    @classmethod
    def _times(cls, windows: tuple[str, ...]) -> tuple[str, ...]:
        return _checked_windows(windows)


class TrialSection(_Section):
    """[trial]: what this device says of a release's quality on its own rows: one randomised word each."""

    data: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Labelled rows that releases are tried on: a data source as in [[tasks]], all of it. "
        "Empty = the rows that [[tasks]] of the same task keeps out of training.",
    )
    budget: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        allow_inf_nan=False,
        description="Epsilon that all answers together may cost these rows; 0 = nothing is said of them.",
    )
    epsilon: float = Field(
        default=1.0, gt=0, le=20, allow_inf_nan=False, description="The most that one answer may cost."
    )
    rows: int = Field(default=1000, ge=1, le=1_000_000, description="Rows that are looked at, at most.")


class ServeSection(_Section):
    """[serve]: the local prediction endpoint."""

    socket: Path | None = Field(
        default=None,
        description="Unix socket, mode 0600. Empty = serve.sock in state_dir, unless a port is given.",
    )
    port: int | None = Field(
        default=None, ge=0, le=65535, description="HTTP on 127.0.0.1 instead of a socket; 0 = any free port."
    )
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024, le=2**31, description="Largest request, bytes.")
    max_batch: int = Field(default=1024, ge=1, le=1_000_000, description="Most rows in one request.")
    max_concurrent: int = Field(
        default=64, ge=1, le=10_000, description="Requests in hand at once; more are told to come again."
    )


class LogSection(_Section):
    """[log]: what is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least level written."
    )
    format: Literal["text", "json"] = Field(default="text", description="One line per event.")


class ConnectionSection(_Section):
    """[connection]: patience with the network."""

    backoff_min_s: Seconds = Field(
        default=1.0,
        le=3600,
        description="Bound of the first random wait after a failed call, seconds; it doubles.",
    )
    backoff_max_s: Seconds = Field(default=300.0, le=86_400, description="Bound of any such wait, seconds.")
    timeout_s: Seconds = Field(default=20.0, le=600, description="Patience with one call, seconds.")
    poll_s: Seconds = Field(
        default=0.1,
        le=60,
        description="Pause between two looks for a round's message while selected, seconds.",
    )
    keep_bytes: int = Field(
        default=64 * 2**20,
        ge=0,
        description="What parts of models from earlier rounds may take on the disk, bytes: they need not "
        "come again, and the next model comes as the difference to the last. 0 = nothing is kept.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.backoff_min_s > self.backoff_max_s:
            raise ValueError(f"backoff_min_s={self.backoff_min_s} exceeds backoff_max_s={self.backoff_max_s}")
        return self


class ClientConfig(_Section):
    """Everything the edge client process can be told."""

    client: ClientSection = Field(default_factory=ClientSection)
    tasks: tuple[TaskSection, ...] = Field(default=(), max_length=32, description="What this device may run.")
    limits: LimitsSection = LimitsSection()
    eligibility: EligibilitySection = EligibilitySection()
    log: LogSection = LogSection()
    connection: ConnectionSection = ConnectionSection()
    delivery: DeliverySection = DeliverySection()
    serve: ServeSection = ServeSection()
    trial: TrialSection = Field(default_factory=TrialSection)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        seen: set[str] = set()
        for task in self.tasks:
            if task.reference in seen:
                raise ValueError(f"task {task.reference!r} is listed twice; one data source per task")
            seen.add(task.reference)
        return self

    def with_task(self, reference: str, data: dict[str, Any]) -> "ClientConfig":
        """This configuration with one more allowed task."""
        tasks = (*self.tasks, TaskSection(reference=reference, data=data))
        return type(self).model_validate(self.model_copy(update={"tasks": tasks}).model_dump())
