"""The tables: the journal, its projections, and those that are neither.

``event`` is the truth and only grows. ``enrolment_token`` … ``privacy_total`` are projections: they hold
nothing that a replay of the journal does not give. ``journal_head`` lets a missing tail be noticed.
``presence`` is soft state (when a device was last seen): worth nothing after a restart, so not journalled.
``attempt_record`` and ``received`` are written ahead and go when their attempt is closed. ``lease`` says
which coordinator may write.

JSON columns hold canonical JSON text and public facts only, so that equal rows are equal on every engine.
"""

from typing import ClassVar

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)
from sqlmodel import Field, SQLModel


class _Base(SQLModel):
    """Ours alone: another package's SQLModel tables in the same process stay apart."""

    metadata: ClassVar[MetaData] = MetaData()


def _text() -> "Column[str]":
    return Column(Text, nullable=False)


class EventRow(_Base, table=True):
    """One event of the journal; rows are only ever added (a trigger says so, too)."""

    __tablename__ = "event"
    __table_args__ = (Index("event_kind_seq", "kind", "seq"), Index("event_subject_seq", "subject", "seq"))
    # SQLite stores rows in the order of an INTEGER key, and has no other 64-bit type for one.
    seq: int = Field(
        sa_column=Column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False)
    )
    time: float = Field(sa_column=Column(Float(53), nullable=False))
    kind: str = Field(sa_column=_text())
    subject: str = Field(sa_column=_text())
    body: str = Field(sa_column=_text())
    prev: str = Field(sa_column=_text())
    hash: str = Field(sa_column=_text())


class HeadRow(_Base, table=True):
    """The newest event, in one row."""

    __tablename__ = "journal_head"
    id: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    seq: int = Field(sa_column=Column(BigInteger, nullable=False))
    hash: str = Field(sa_column=_text())


class TokenRow(_Base, table=True):
    """A join token, by the hash of its secret."""

    __tablename__ = "enrolment_token"
    __table_args__ = (UniqueConstraint("secret_sha256", name="enrolment_token_secret"),)
    id: str = Field(sa_column=Column(Text, primary_key=True))
    secret_sha256: str = Field(sa_column=_text())
    created_at: float = Field(sa_column=Column(Float(53), nullable=False))
    expires_at: float = Field(sa_column=Column(Float(53), nullable=False))
    note: str = Field(sa_column=_text())
    uses: int = Field(sa_column=Column(Integer, nullable=False))
    used: int = Field(sa_column=Column(Integer, nullable=False))
    revoked: int = Field(sa_column=Column(Integer, nullable=False))  # 0 or 1


class TokenUseRow(_Base, table=True):
    """One use of a join token by one device."""

    __tablename__ = "token_use"
    __table_args__ = (ForeignKeyConstraint(["token_id"], ["enrolment_token.id"], name="use_token"),)
    token_id: str = Field(sa_column=Column(Text, primary_key=True))
    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    used_at: float = Field(sa_column=Column(Float(53), nullable=False))
    enrolled_seq: int = Field(sa_column=Column(BigInteger, nullable=False))  # 0 until the device enrolled


class DeviceRow(_Base, table=True):
    """A device and its twin: what is wanted of it, what it says of itself."""

    __tablename__ = "device"
    __table_args__ = (
        UniqueConstraint("public_key", name="device_public_key"),
        Index("device_state", "state", "id"),
    )
    id: str = Field(sa_column=Column(Text, primary_key=True))
    name: str = Field(sa_column=_text())
    public_key: str = Field(sa_column=_text())  # base64 DER SubjectPublicKeyInfo
    state: str = Field(sa_column=_text())  # active, revoked
    state_reason: str = Field(sa_column=_text())
    cert_serial: str = Field(sa_column=_text())
    cert_not_after: float = Field(sa_column=Column(Float(53), nullable=False))
    token_id: str = Field(sa_column=_text())
    groups: str = Field(sa_column=Column("groups", Text, nullable=False))  # JSON array of labels
    desired: str = Field(sa_column=_text())  # JSON object
    reported: str = Field(sa_column=_text())  # JSON object
    enrolled_at: float = Field(sa_column=Column(Float(53), nullable=False))
    reported_at: float | None = Field(sa_column=Column(Float(53)))
    quarantined_until: float = Field(sa_column=Column(Float(53), nullable=False))  # 0 = it is not
    quarantine_cause: str = Field(sa_column=_text())


class TaskRow(_Base, table=True):
    """A version of a task."""

    __tablename__ = "task_version"
    name: str = Field(sa_column=Column(Text, primary_key=True))
    version: str = Field(sa_column=Column(Text, primary_key=True))
    reference: str = Field(sa_column=_text())
    layout_digest: str = Field(sa_column=_text())
    num_parameters: int = Field(sa_column=Column(BigInteger, nullable=False))
    registered_at: float = Field(sa_column=Column(Float(53), nullable=False))


class RunRow(_Base, table=True):
    """A run, from the queue to its verdict."""

    __tablename__ = "run"
    __table_args__ = (Index("run_state", "state"),)
    id: str = Field(sa_column=Column(Text, primary_key=True))
    name: str = Field(sa_column=_text())
    spec: str = Field(sa_column=_text())  # JSON object
    state: str = Field(sa_column=_text())  # queued, running, stopping, completed, stopped, failed, exhausted
    reason: str = Field(sa_column=_text())
    queued_seq: int = Field(sa_column=Column(BigInteger, nullable=False))  # the order of the queue
    queued_at: float = Field(sa_column=Column(Float(53), nullable=False))
    started_at: float | None = Field(sa_column=Column(Float(53)))
    finished_at: float | None = Field(sa_column=Column(Float(53)))
    committed: int = Field(sa_column=Column(Integer, nullable=False))  # last committed round, 0 for none
    rounds: int | None = Field(sa_column=Column(Integer))  # as reported at the end
    model_sha256: str | None = Field(sa_column=Column(Text))  # the newest, at the end the final model
    best_round: int | None = Field(sa_column=Column(Integer))
    best_sha256: str | None = Field(sa_column=Column(Text))
    best_metric: str | None = Field(sa_column=Column(Text))
    best_value: float | None = Field(sa_column=Column(Float(53)))
    waiting: str = Field(sa_column=_text())  # why the run does not move; empty when it does
    waiting_until: float = Field(sa_column=Column(Float(53), nullable=False))
    coverage: str = Field(sa_column=_text())  # JSON object: who contributed, once the run is over
    flags: str = Field(sa_column=_text())  # JSON array: what of it is below the floor


class RoundRow(_Base, table=True):
    """One attempt of one round."""

    __tablename__ = "round"
    __table_args__ = (ForeignKeyConstraint(["run_id"], ["run.id"], name="round_run"),)
    run_id: str = Field(sa_column=Column(Text, primary_key=True))
    round: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    attempt: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    state: str = Field(sa_column=_text())  # planned, committed, abandoned
    phase: str = Field(sa_column=_text())  # events.PHASES, or abandoned
    plan: str = Field(sa_column=_text())  # JSON object
    start_sha256: str = Field(sa_column=_text())  # the model that went out
    model_sha256: str | None = Field(sa_column=Column(Text))  # the model that came of it
    state_sha256: str | None = Field(sa_column=Column(Text))  # the server optimiser's state after it
    metrics: str = Field(sa_column=_text())  # JSON object, of training
    evaluated: str = Field(sa_column=_text())  # JSON object, of the model that came of it; {} = not evaluated
    cause: str = Field(sa_column=_text())  # why it was abandoned
    bytes_up: int = Field(sa_column=Column(BigInteger, nullable=False))
    bytes_down: int = Field(sa_column=Column(BigInteger, nullable=False))
    seconds: float = Field(sa_column=Column(Float(53), nullable=False))
    planned_at: float = Field(sa_column=Column(Float(53), nullable=False))
    closed_at: float | None = Field(sa_column=Column(Float(53)))


class ParticipationRow(_Base, table=True):
    """What became of one device in one attempt."""

    __tablename__ = "participation"
    __table_args__ = (
        ForeignKeyConstraint(
            ["run_id", "round", "attempt"],
            ["round.run_id", "round.round", "round.attempt"],
            name="part_round",
        ),
        ForeignKeyConstraint(["device_id"], ["device.id"], name="part_device"),
        Index("participation_device", "device_id"),
    )
    run_id: str = Field(sa_column=Column(Text, primary_key=True))
    round: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    attempt: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    outcome: str = Field(sa_column=_text())  # counted, surplus, rejected, dropped
    reason: str = Field(sa_column=_text())
    cause: str = Field(sa_column=_text())
    detail: str = Field(sa_column=_text())
    seconds: float = Field(sa_column=Column(Float(53), nullable=False))
    examples: int = Field(sa_column=Column(BigInteger, nullable=False))
    bytes_up: int = Field(sa_column=Column(BigInteger, nullable=False))
    bytes_down: int = Field(sa_column=Column(BigInteger, nullable=False))


class ModelRow(_Base, table=True):
    """A model and the model it came from."""

    __tablename__ = "model_version"
    __table_args__ = (
        ForeignKeyConstraint(["run_id"], ["run.id"], name="model_run"),
        Index("model_version_sha256", "sha256"),
    )
    run_id: str = Field(sa_column=Column(Text, primary_key=True))
    round: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    sha256: str = Field(sa_column=_text())
    parent_sha256: str | None = Field(sa_column=Column(Text))
    metrics: str = Field(sa_column=_text())  # JSON object
    created_at: float = Field(sa_column=Column(Float(53), nullable=False))


class BudgetRow(_Base, table=True):
    """What an account allows, by version; the highest one holds."""

    __tablename__ = "privacy_budget"
    account: str = Field(sa_column=Column(Text, primary_key=True))
    unit: str = Field(sa_column=Column(Text, primary_key=True))  # device, example
    trust: str = Field(sa_column=Column(Text, primary_key=True))  # central, distributed, local
    version: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    adjacency: str = Field(sa_column=_text())
    accountant: str = Field(sa_column=_text())
    epsilon: float = Field(sa_column=Column(Float(53), nullable=False))
    delta: float = Field(sa_column=Column(Float(53), nullable=False))
    note: str = Field(sa_column=_text())
    key: str = Field(sa_column=_text())  # base64 DER SubjectPublicKeyInfo
    signature: str = Field(sa_column=_text())  # base64
    set_at: float = Field(sa_column=Column(Float(53), nullable=False))


class ChargeRow(_Base, table=True):
    """One attempt at a release. All but the voided ones count as spent."""

    __tablename__ = "privacy_charge"
    __table_args__ = (
        ForeignKeyConstraint(["run_id"], ["run.id"], name="charge_run"),
        Index("privacy_charge_state", "state"),
    )
    run_id: str = Field(sa_column=Column(Text, primary_key=True))
    round: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    attempt: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    state: str = Field(sa_column=_text())  # reserved, releasing, committed, voided
    events: str = Field(sa_column=_text())  # JSON array: what was reserved
    extra: str = Field(sa_column=_text())  # JSON array: what was found to have been spent besides
    accounts: str = Field(sa_column=_text())  # JSON array
    unit: str = Field(sa_column=_text())
    trust: str = Field(sa_column=_text())
    evidence: str = Field(sa_column=_text())  # that nothing was released
    model_sha256: str | None = Field(sa_column=Column(Text))
    state_sha256: str | None = Field(
        sa_column=Column(Text)
    )  # sealed: while releasing, the noise's key; then its memory
    reserved_at: float = Field(sa_column=Column(Float(53), nullable=False))
    settled_at: float | None = Field(sa_column=Column(Float(53)))


class TotalRow(_Base, table=True):
    """How often an account was charged for an event: what accountants read, however long the ledger is."""

    __tablename__ = "privacy_total"
    account: str = Field(sa_column=Column(Text, primary_key=True))
    unit: str = Field(sa_column=Column(Text, primary_key=True))
    trust: str = Field(sa_column=Column(Text, primary_key=True))
    event: str = Field(sa_column=Column(Text, primary_key=True))  # JSON
    count: int = Field(sa_column=Column(BigInteger, nullable=False))


class RolloutRow(_Base, table=True):
    """A staged rollout and where it is."""

    __tablename__ = "rollout"
    id: str = Field(sa_column=Column(Text, primary_key=True))
    task: str = Field(sa_column=_text())
    plan: str = Field(sa_column=_text())  # JSON object
    phase: str = Field(sa_column=_text())
    stage: int = Field(sa_column=Column(Integer, nullable=False))
    since: float = Field(sa_column=Column(Float(53), nullable=False))  # when the stage began
    cause: str = Field(sa_column=_text())
    suspect: str = Field(sa_column=_text())
    suspect_since: float = Field(sa_column=Column(Float(53), nullable=False))
    suspect_requests: int = Field(sa_column=Column(BigInteger, nullable=False))
    aborting: int = Field(sa_column=Column(Integer, nullable=False))  # 1: an operator asked for the rollback
    planned_at: float = Field(sa_column=Column(Float(53), nullable=False))


class ToldRow(_Base, table=True):
    """A device that has a release of a rollout, until it is told otherwise."""

    __tablename__ = "rollout_device"
    __table_args__ = (
        ForeignKeyConstraint(["rollout_id"], ["rollout.id"], name="told_rollout"),
        ForeignKeyConstraint(["device_id"], ["device.id"], name="told_device"),
        Index("rollout_device_device", "device_id"),
    )
    rollout_id: str = Field(sa_column=Column(Text, primary_key=True))
    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    stage: int = Field(sa_column=Column(Integer, nullable=False))
    before: str = Field(sa_column=_text())  # SHA-256 of a manifest; empty = none
    p95_ms: float = Field(sa_column=Column(Float(53), nullable=False))  # before; 0 = not known


class ReceivedRow(_Base, table=True):
    """An update that was acknowledged, until its attempt is closed. Not in the journal: see ``attempts``."""

    __tablename__ = "received"
    __table_args__ = (Index("received_sha256", "sha256"),)
    run_id: str = Field(sa_column=Column(Text, primary_key=True))
    round: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    attempt: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    sha256: str = Field(sa_column=_text())  # the file's name
    num_bytes: int = Field(sa_column=Column(BigInteger, nullable=False))  # on the wire
    counted: int = Field(sa_column=Column(Integer, nullable=False))  # 1: it is one of those that were added


class LeaseRow(_Base, table=True):
    """Which coordinator may write, in one row. Not in the journal."""

    __tablename__ = "lease"
    id: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    token: int = Field(sa_column=Column(BigInteger, nullable=False))  # grows with every holder
    holder: str = Field(sa_column=_text())  # empty: nobody
    renewed: float = Field(sa_column=Column(Float(53), nullable=False))  # by the database's clock


class PresenceRow(_Base, table=True):
    """Soft state: when a device was last heard of. Not in the journal, lost without harm."""

    __tablename__ = "presence"
    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    last_seen: float = Field(sa_column=Column(Float(53), nullable=False))
    status: str = Field(sa_column=_text())


class AttemptRecordRow(_Base, table=True):
    """What an open attempt has heard and decided, in order. Not in the journal, gone when it is closed."""

    __tablename__ = "attempt_record"
    run_id: str = Field(sa_column=Column(Text, primary_key=True))
    round: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    attempt: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    number: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))  # from 1
    body: bytes = Field(sa_column=Column(LargeBinary, nullable=False))  # empty: it is in ``blob``
    blob: str = Field(sa_column=_text())  # SHA-256 of a file; empty: it is in ``body``
    hash: str = Field(sa_column=_text())  # of this row and, through the one before, of all before


METADATA: MetaData = _Base.metadata


def _table(name: str) -> Table:
    return METADATA.tables[name]


EVENT = _table("event")
HEAD = _table("journal_head")
TOKEN = _table("enrolment_token")
TOKEN_USE = _table("token_use")
DEVICE = _table("device")
TASK = _table("task_version")
RUN = _table("run")
ROUND = _table("round")
PARTICIPATION = _table("participation")
MODEL = _table("model_version")
PRESENCE = _table("presence")
ATTEMPT_RECORD = _table("attempt_record")
BUDGET = _table("privacy_budget")
CHARGE = _table("privacy_charge")
TOTAL = _table("privacy_total")
ROLLOUT = _table("rollout")
TOLD = _table("rollout_device")
RECEIVED = _table("received")
LEASE = _table("lease")

# In an order in which rows can be inserted without breaking a foreign key; deleted the other way round.
PROJECTIONS: tuple[Table, ...] = (
    TOKEN,
    TOKEN_USE,
    DEVICE,
    TASK,
    RUN,
    ROUND,
    PARTICIPATION,
    MODEL,
    BUDGET,
    CHARGE,
    TOTAL,
    ROLLOUT,
    TOLD,
)
