"""What the store answers with: frozen records, cut loose from the database."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lepton_fl.privacy.record import Policy

JsonObject = Mapping[str, Any]


class Head(NamedTuple):
    """The newest event; ``seq`` 0 is the empty journal."""

    seq: int
    hash: str


@dataclass(frozen=True, slots=True)
class Event:
    """One event of the journal. ``time`` is in seconds since 1970, UTC."""

    seq: int
    time: float
    kind: str
    subject: str
    body: JsonObject
    prev: str
    hash: str


@dataclass(frozen=True, slots=True)
class Token:
    """A join token; its secret is known by hash only."""

    id: str
    secret_sha256: str = field(repr=False)
    created_at: float
    expires_at: float
    note: str
    uses: int
    used: int
    used_by: tuple[str, ...]  # device ids
    revoked: bool

    def state(self, now: float) -> str:
        """Return ``revoked``, ``used``, ``expired`` or ``valid``."""
        if self.revoked:
            return "revoked"
        if self.used >= self.uses:
            return "used"
        return "expired" if now >= self.expires_at else "valid"


@dataclass(frozen=True, slots=True)
class Device:
    """A device and its twin."""

    id: str
    name: str
    public_key: bytes  # DER SubjectPublicKeyInfo
    state: str  # active, revoked
    state_reason: str
    cert_serial: str  # hexadecimal
    cert_not_after: float
    token_id: str
    groups: tuple[str, ...]
    desired: JsonObject
    reported: JsonObject
    enrolled_at: float
    reported_at: float | None
    last_seen: float | None  # soft state, None when not heard of
    status: str  # soft state, "" when not heard of
    quarantined_until: float = 0.0  # 0 = it is not in quarantine
    quarantine_cause: str = ""


class ActiveDevice(NamedTuple):
    """An active device as selection needs it: light, for 50,000 of them at once."""

    id: str
    public_key: bytes  # DER SubjectPublicKeyInfo
    cert_serial: str
    groups: tuple[str, ...]
    desired: JsonObject
    reported: JsonObject
    last_seen: float | None
    status: str
    quarantined_until: float = 0.0
    quarantine_cause: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """A version of a task."""

    name: str
    version: str
    reference: str
    layout_digest: str
    num_parameters: int
    registered_at: float


@dataclass(frozen=True, slots=True)
class Run:
    """A run, from the queue to its verdict."""

    id: str
    name: str
    spec: JsonObject
    state: str  # queued, running, stopping, completed, stopped, failed, exhausted
    reason: str
    queued_seq: int
    queued_at: float
    started_at: float | None
    finished_at: float | None
    committed: int  # the last committed round, 0 for none
    rounds: int | None  # as reported at the end
    model_sha256: str | None  # the newest model, at the end the final one
    best_round: int | None
    best_sha256: str | None
    best_metric: str | None
    best_value: float | None
    waiting: str  # why the run does not move; empty when it does
    waiting_until: float
    coverage: JsonObject = field(default_factory=dict)  # who contributed, once the run is over
    flags: tuple[str, ...] = ()  # what of it is below the floor

    @property
    def finished(self) -> bool:
        """Whether the run has its verdict."""
        return self.finished_at is not None


@dataclass(frozen=True, slots=True)
class Round:
    """One attempt of one round."""

    run_id: str
    round: int
    attempt: int
    state: str  # planned, committed, abandoned
    phase: str  # events.PHASES, or abandoned
    plan: JsonObject
    start_sha256: str  # the model that went out
    model_sha256: str | None  # the model that came of it
    state_sha256: str | None  # the server optimiser's state after it
    metrics: JsonObject  # of training
    evaluated: JsonObject  # of the model that came of it; empty when not evaluated
    cause: str
    bytes_up: int
    bytes_down: int
    seconds: float
    planned_at: float
    closed_at: float | None


@dataclass(frozen=True, slots=True)
class Lease:
    """Which coordinator may write; times are seconds since 1970 by the database's clock."""

    token: int
    holder: str  # empty: nobody
    renewed: float
    now: float

    @property
    def age_s(self) -> float:
        """Seconds since it was renewed; a clock that was set back makes it fresh."""
        return max(0.0, self.now - self.renewed)


@dataclass(frozen=True, slots=True)
class Received:
    """An update that was acknowledged to its device."""

    device_id: str
    sha256: str  # of its file
    num_bytes: int  # on the wire
    counted: bool  # it is one of those that were added


@dataclass(frozen=True, slots=True)
class Part:
    """What became of one device in one attempt of a round."""

    run_id: str
    round: int
    attempt: int
    device_id: str
    outcome: str  # counted, surplus, rejected, dropped
    reason: str
    seconds: float
    examples: int
    bytes_up: int
    bytes_down: int
    cause: str = ""  # a value of Cause, where the answer did not come or does not count
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """A model and the model it came from."""

    run_id: str
    round: int
    sha256: str
    parent_sha256: str | None
    metrics: JsonObject
    created_at: float


@dataclass(frozen=True, slots=True)
class SignedBudget:
    """What an account allows, and who said so."""

    policy: Policy
    key: bytes = field(repr=False)  # DER SubjectPublicKeyInfo
    signature: str = field(repr=False)  # base64
    set_at: float


@dataclass(frozen=True, slots=True)
class ChargeRecord:
    """One attempt at a release."""

    run_id: str
    round: int
    attempt: int
    state: str  # reserved, releasing, committed, voided
    events: tuple[str, ...]  # JSON
    extra: tuple[str, ...]  # JSON; found later
    accounts: tuple[str, ...]
    unit: str
    trust: str
    evidence: str
    model_sha256: str | None
    state_sha256: str | None  # sealed: while releasing, of the noise's key; then of the mechanism's memory
    reserved_at: float
    settled_at: float | None


@dataclass(frozen=True, slots=True)
class Rollout:
    """A staged rollout and where it is."""

    id: str
    task: str
    plan: JsonObject  # lepton_fl.delivery.rollout.RolloutPlan
    phase: str
    stage: int
    since: float
    cause: str
    suspect: str
    suspect_since: float
    suspect_requests: int
    aborting: bool
    planned_at: float


class Told(NamedTuple):
    """A device that has a release of a rollout."""

    device_id: str
    stage: int
    before: str
    p95_ms: float


@dataclass(frozen=True, slots=True)
class RebuildReport:
    """How a replay of the journal compares with the tables.

    Attributes:
        head: The journal as far as it was replayed.
        rows: Rows per table after the replay.
        differences: The first hundred rows that differ, in words.
        different: How many differ.
        replaced: Whether the tables were replaced by the replay.
    """

    head: Head
    rows: Mapping[str, int]
    differences: tuple[str, ...]
    different: int
    replaced: bool

    @property
    def equal(self) -> bool:
        """Whether the tables were what the journal says."""
        return self.different == 0


class Attempt(NamedTuple):
    """One attempt at one round of a run."""

    run_id: str
    round: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Kept:
    """One record of an open attempt: what was heard or decided, written before anybody acts on it.

    Attributes:
        number: 1, 2, 3, ... within the attempt.
        body: the record; empty where it is large, and then in the file that ``blob`` names.
        blob: SHA-256 of a file, or empty.
        hash: of all this and of the record before.
    """

    number: int
    body: bytes = field(repr=False)
    blob: str
    hash: str
