"""The events of the journal: every fact that the coordinator keeps, with the exact form of its body.

Rules:

* A kind that is not in :data:`KINDS` is refused, and so is a body with a field too many, too few or of
  another type: a journal that is read for years must not hold what nobody can read.
* A body is stored as canonical JSON, so that a replay hashes the same bytes.
* The subject is what an event is about (a device, run, task or token id) and follows from its body.
* Bodies only grow: a new field gets a default, and a field is never renamed or given another meaning.

Example::

    body = parse_body("device.revoked", {"device_id": "d-…", "reason": "lost"})
    body.subject                           # "d-…"
"""

import json
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
)

from lepton_fl.errors import StateCorrupt, StateError
from lepton_fl.files import canonical_json
from lepton_fl.privacy.events import from_json, to_json
from lepton_fl.privacy.record import SUBJECT

_MAX_REASON = 300  # characters of a device's own words
MAX_BODY = 8 << 20  # bytes of canonical JSON in one event; a plan for 1,000 devices has about 100 KB


def _is_control(char: str) -> bool:
    return ord(char) < 32 or 127 <= ord(char) < 160 or 0xD800 <= ord(char) <= 0xDFFF


def _no_control(text: str) -> str:
    """Refuse control characters and half characters: PostgreSQL cannot store them, terminals obey them."""
    if any(map(_is_control, text)):
        raise ValueError("contains a control character or half a character")
    return text


def _clean(words: object) -> object:
    if not isinstance(words, str):
        return words
    return "".join("�" if _is_control(char) else char for char in words[:_MAX_REASON])


def _encodable(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    canonical_json(value)  # ValueError on NaN, infinity and text that is not Unicode
    return value


def _an_event(text: str) -> str:
    """One that accountants can read, in its one spelling."""
    try:
        known = to_json(from_json(text)) == text
    except StateCorrupt as error:
        raise ValueError(str(error)) from error
    if not known:
        raise ValueError(f"{text[:200]!r} is not canonical")
    return text


Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}\z")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}\z")]
Serial = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{1,40}\z")]  # X.509 serial, hexadecimal
Label = Annotated[str, StringConstraints(min_length=1, max_length=200), AfterValidator(_no_control)]
Text = Annotated[str, StringConstraints(max_length=2000), AfterValidator(_no_control)]
Hex = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2}){1,300}\z")]
PublicKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{40,1000}={0,2}\z")]  # base64 DER SPKI
Base64 = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{40,2000}={0,2}\z")]
Time = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]  # seconds since 1970, UTC
Seconds = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**62)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
RoundNumber = Annotated[int, Field(ge=0, le=2**31 - 1)]
Json = Annotated[dict[str, JsonValue], AfterValidator(_encodable)]
Account = Annotated[str, StringConstraints(min_length=1, max_length=300), AfterValidator(_no_control)]
Trust = Literal["central", "distributed", "local"]
PrivacyEvent = Annotated[str, StringConstraints(max_length=1000), AfterValidator(_an_event)]
Outcome = Literal["counted", "surplus", "rejected", "dropped"]
Verdict = Literal["completed", "stopped", "failed", "exhausted"]  # the last: until `run.resumed`


class Body(BaseModel):
    """The body of an event: immutable, nothing coerced, nothing unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    subject_field: ClassVar[str] = ""

    @property
    def subject(self) -> str:
        """What the event is about."""
        return str(getattr(self, self.subject_field)) if self.subject_field else "server"


class _AboutToken(Body):
    subject_field: ClassVar[str] = "token_id"
    token_id: Id


class TokenCreated(_AboutToken):
    """A join token was made; only the hash of its secret is known here."""

    secret_sha256: Sha256
    expires_at: Time
    note: Text = ""
    uses: Positive = 1


class TokenUsed(_AboutToken):
    """A device spent one use of the token."""

    device_id: Id


class TokenRevoked(_AboutToken):
    """The token is worth nothing from now on."""

    reason: Text = ""


class _AboutDevice(Body):
    subject_field: ClassVar[str] = "device_id"
    device_id: Id


class DeviceEnrolled(_AboutDevice):
    """A device joined, or joined again with the same key; its token was spent just before."""

    name: Label
    public_key: PublicKey
    cert_serial: Serial
    cert_not_after: Time
    token_id: Id
    groups: list[Label] = Field(default_factory=list, max_length=100)


class DeviceRenewed(_AboutDevice):
    """A device got a fresh certificate for the same key; ``cause`` is what was wrong with the one before."""

    cert_serial: Serial
    cert_not_after: Time
    cause: Text = ""


class DeviceRevoked(_AboutDevice):
    """A device lost its enrolment, for good."""

    reason: Text = ""


class DeviceSigning(_AboutDevice):
    """A device asks the enrolment authority to certify its signing key."""

    signing_key: Sha256  # Ed25519, 32 bytes, hexadecimal
    request: Base64


class DeviceCertified(_AboutDevice):
    """The enrolment authority has certified a device's signing key."""

    signing_key: Sha256
    credential: Base64
    not_after: Time


class DeviceReported(_AboutDevice):
    """What a device says about itself has changed."""

    reported: Json


class DeviceQuarantined(_AboutDevice):
    """A device failed too often in a row: it is not drawn until then, or until it is readmitted."""

    cause: Label
    faults: Count  # in a row
    until: Time
    run_id: Text = ""  # in which it was noticed; empty = an operator's decision


class DeviceReadmitted(_AboutDevice):
    """A quarantine has ended."""

    reason: Text = ""


class DeviceDesired(_AboutDevice):
    """What the operator wants of a device has changed."""

    desired: Json


class TaskRegistered(Body):
    """A version of a task can be trained."""

    subject_field: ClassVar[str] = "name"
    name: Id
    reference: Label
    version: Label
    layout_digest: Sha256
    num_parameters: Count


class _AboutRun(Body):
    subject_field: ClassVar[str] = "run_id"
    run_id: Id


class RunQueued(_AboutRun):
    """A run waits for its turn; ``spec`` is everything that was asked for."""

    name: Label
    spec: Json


class RunStarted(_AboutRun):
    """A run goes on: for the first time, or after a restart of the coordinator."""


class RunStopping(_AboutRun):
    """Somebody asked the run to stop after the round in hand."""

    reason: Text = ""


class RunFinished(_AboutRun):
    """The run is over; nothing about it is accepted any more, unless it is exhausted and then resumed."""

    verdict: Verdict
    reason: Text = ""
    model_sha256: Sha256 | None = None
    rounds: RoundNumber
    coverage: Json = Field(default_factory=dict)  # lepton_fl.rounds.coverage.Coverage: who contributed
    flags: list[Label] = Field(default_factory=list, max_length=100)  # what of it is below the asked floor


class RunResumed(_AboutRun):
    """An exhausted run is queued again: somebody has raised the budget that refused it."""


class Participation(BaseModel):
    """What became of one device in one attempt of a round.

    Attributes:
        device_id: The device.
        outcome: ``counted``; ``surplus`` (good, but the round was full); ``rejected`` (an answer came and was
            refused); ``dropped`` (no usable answer).
        reason: A value of ``Rejection``, or words, perhaps the device's own: cut and cleaned rather than
            refused, because no device may keep a round from being recorded.
        seconds: The device's own.
        examples: Training examples used.
        bytes_up: Payload bytes from the device.
        bytes_down: Payload bytes to the device.
        arrived_s: When the coordinator heard of it, since the attempt began; None where it did not.
        cause: A value of ``Cause``, where the answer did not come or does not count; empty in older journals.
        detail: The same in a sentence, cut and cleaned like ``reason``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    device_id: Id
    outcome: Outcome
    reason: Annotated[str, BeforeValidator(_clean)] = ""
    seconds: Seconds = 0.0
    examples: Count = 0
    bytes_up: Count = 0
    bytes_down: Count = 0
    arrived_s: Seconds | None = None
    cause: Annotated[str, BeforeValidator(_clean)] = ""
    detail: Annotated[str, BeforeValidator(_clean)] = ""


def _each_once(entries: list[Participation]) -> list[Participation]:
    if len({entry.device_id for entry in entries}) != len(entries):
        raise ValueError("a device takes part at most once in an attempt")
    return entries


Participants = Annotated[list[Participation], AfterValidator(_each_once)]


class RoundPlanned(_AboutRun):
    """An attempt of a round is about to start; its decisions are frozen here."""

    round: Positive
    attempt: Positive
    plan: Json
    model_sha256: Sha256


# The order in which an attempt passes them; `planned`, `committed` and `abandoned` are events of their own.
PHASES = (
    "planned",
    "offered",  # every device of the cohort has its message
    "collecting",  # the first update is durable
    "unmasking",  # secure: the survivors are known, shares are asked for
    "aggregated",  # it is fixed whose updates count
    "noised",  # central privacy: it is fixed what noise the sum gets
    "committed",
    "released",  # the updates and the noise's key are erased; the model is all that is left
)
Phase = Literal["offered", "collecting", "unmasking", "aggregated", "noised", "released"]


class RoundMoved(_AboutRun):
    """An attempt is in another phase; phases may be left out, and never come again."""

    round: Positive
    attempt: Positive
    phase: Phase


class RoundCommitted(_AboutRun):
    """An attempt gave a new model: the round is done."""

    round: Positive
    attempt: Positive
    model_sha256: Sha256
    state_sha256: Sha256 | None = None
    metrics: Json = Field(default_factory=dict)
    participation: Participants = Field(default_factory=list)
    bytes_up: Count = 0
    bytes_down: Count = 0
    seconds: Seconds = 0.0
    expected: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # of the next quantised sum


class RoundAbandoned(_AboutRun):
    """An attempt gave nothing; the round may be tried again."""

    round: Positive
    attempt: Positive
    cause: Text
    participation: Participants = Field(default_factory=list)
    burnt: bool = False  # no other attempt is possible: the round counts as done, without a new model
    wrapped: bool = False  # the sum of quantised updates has left its ring


class RoundReoffered(_AboutRun):
    """A device of an open attempt is asked once more: its node had been shut out of the fleet port."""

    round: Positive
    attempt: Positive
    device_id: Id
    cause: Text = ""


class RoundEvaluated(_AboutRun):
    """The model of a committed round was evaluated, on devices or centrally."""

    round: Positive
    metrics: Json = Field(default_factory=dict)
    improved: bool = False  # the best so far by the metric that the run was asked to watch
    stale: Count = 0  # evaluations since the best one
    participation: Participants = Field(default_factory=list)


class RunWaiting(_AboutRun):
    """The run does not move, and why; an empty cause: it moves again."""

    cause: Text = ""
    until: Time = 0.0


class ModelCreated(Body):
    """A model exists; round 0 is the one a run starts with."""

    subject_field: ClassVar[str] = "run_id"
    model_sha256: Sha256
    run_id: Id
    round: RoundNumber
    parent_sha256: Sha256 | None = None
    metrics: Json = Field(default_factory=dict)


class RunBest(_AboutRun):
    """The best model of a run so far, by the metric the run was asked to watch."""

    round: RoundNumber
    model_sha256: Sha256
    metric: Label
    value: Annotated[float, Field(allow_inf_nan=False)]


class ReleasePublished(Body):
    """A variant was signed as a release."""

    subject_field: ClassVar[str] = "release"
    release: Sha256  # of its manifest
    task: Label
    variant: Label
    sequence: Positive
    run: Text = ""
    round: RoundNumber | None = None


class ReleaseWithdrawn(Body):
    """A release was taken off the list."""

    subject_field: ClassVar[str] = "release"
    release: Sha256
    reason: Text = ""


class _AboutRollout(Body):
    subject_field: ClassVar[str] = "rollout_id"
    rollout_id: Id


class RolloutPlanned(_AboutRollout):
    """A staged rollout was asked for; its decisions are frozen here."""

    task: Label
    plan: Json  # lepton_fl.delivery.rollout.RolloutPlan


class ToldDevice(BaseModel):
    """One device that a rollout gives a release to, and what it had before."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    device_id: Id
    before: Sha256 | Literal[""] = ""
    p95_ms: Seconds = 0.0


class RolloutTold(_AboutRollout):
    """Devices of a stage are told of their release, in this very transaction."""

    stage: Count
    devices: list[ToldDevice] = Field(min_length=1, max_length=10_000)


class RolloutReverted(_AboutRollout):
    """Devices are told, in this very transaction, to have again what they had."""

    devices: list[Id] = Field(min_length=1, max_length=10_000)


class RolloutSuspected(_AboutRollout):
    """Something looks bad; an empty cause: no more."""

    cause: Text = ""
    requests: Count = 0  # predictions that had been counted


class RolloutMoved(_AboutRollout):
    """A rollout is in another phase or stage."""

    phase: Literal["running", "paused", "rolling-back", "rolled-back", "aborted", "done"]
    stage: Count
    cause: Text = ""
    aborting: bool = False  # an operator asked for the rollback


class LedgerBody(Body):
    """A line of the privacy ledger; all of them have one subject, so that they can be read as a whole.

    ``previous`` is filled in by the store: the hash of the ledger's event before, or ``GENESIS``. With it the
    ledger can be checked by those who have no other event of the journal.
    """

    previous: Sha256 | Literal[""] = ""

    @property
    def subject(self) -> str:
        """The ledger."""
        return SUBJECT


class BudgetSet(LedgerBody):
    """What an account allows from now on: a signed policy (``lepton_fl.privacy.record.Policy``)."""

    account: Account
    version: Positive
    unit: Literal["device", "example"]
    trust: Trust
    adjacency: Literal["zero-out", "replace-one"]
    accountant: Literal["auto", "gdp", "rdp"]
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    note: Text = ""
    key: PublicKey
    signature: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{8,200}={0,2}\z")]


class _AboutAttempt(LedgerBody):
    run_id: Id
    round: Positive
    attempt: Positive


class PrivacyReserved(_AboutAttempt):
    """Budget was set aside for an attempt, before anybody was asked; from now on it counts as spent."""

    events: list[PrivacyEvent] = Field(default_factory=list, max_length=16)  # empty: paid already
    accounts: list[Account] = Field(min_length=1, max_length=200)
    unit: Literal["device", "example"] = "device"
    trust: Trust = "central"


class PrivacyReleasing(_AboutAttempt):
    """The release is about to be computed: from now on it may be public, whatever happens."""

    noise_sha256: Sha256 | None = None  # the sealed key of its noise, which is deleted when it is stored


class PrivacyCommitted(_AboutAttempt):
    """The release is stored, in this very transaction."""

    extra: list[PrivacyEvent] = Field(default_factory=list, max_length=16)  # found later; never refused
    model_sha256: Sha256
    state_sha256: Sha256 | None = None  # what the mechanism remembers, sealed


class PrivacyVoided(_AboutAttempt):
    """Nothing was released, and how that is known."""

    evidence: Annotated[str, StringConstraints(min_length=1, max_length=2000), AfterValidator(_no_control)]


class LedgerMissed(Body):
    """A device has shown a head of the privacy ledger that our key has signed and that is not here.

    Not a line of the ledger: it says that lines are missing. Nothing is reserved any more.
    """

    device_id: Id
    seq: Count  # in the journal that was lost
    hash: Sha256
    key: Hex
    signature: Hex


class ServerStarted(Body):
    """A coordinator process began to serve."""

    version: Text = ""
    info: Json = Field(default_factory=dict)


class ServerStopped(Body):
    """A coordinator process ended in good order."""

    reason: Text = ""


KINDS: Mapping[str, type[Body]] = {
    "token.created": TokenCreated,
    "token.used": TokenUsed,
    "token.revoked": TokenRevoked,
    "device.enrolled": DeviceEnrolled,
    "device.renewed": DeviceRenewed,
    "device.revoked": DeviceRevoked,
    "device.signing": DeviceSigning,
    "device.certified": DeviceCertified,
    "device.reported": DeviceReported,
    "device.desired": DeviceDesired,
    "device.quarantined": DeviceQuarantined,
    "device.readmitted": DeviceReadmitted,
    "task.registered": TaskRegistered,
    "run.queued": RunQueued,
    "run.started": RunStarted,
    "run.stopping": RunStopping,
    "run.finished": RunFinished,
    "run.resumed": RunResumed,
    "run.best": RunBest,
    "round.planned": RoundPlanned,
    "round.moved": RoundMoved,
    "round.committed": RoundCommitted,
    "round.abandoned": RoundAbandoned,
    "round.evaluated": RoundEvaluated,
    "round.reoffered": RoundReoffered,
    "run.waiting": RunWaiting,
    "model.created": ModelCreated,
    "release.published": ReleasePublished,
    "release.withdrawn": ReleaseWithdrawn,
    "rollout.planned": RolloutPlanned,
    "rollout.told": RolloutTold,
    "rollout.reverted": RolloutReverted,
    "rollout.suspected": RolloutSuspected,
    "rollout.moved": RolloutMoved,
    "budget.set": BudgetSet,
    "privacy.reserved": PrivacyReserved,
    "privacy.releasing": PrivacyReleasing,
    "privacy.committed": PrivacyCommitted,
    "privacy.voided": PrivacyVoided,
    "ledger.missed": LedgerMissed,
    "server.started": ServerStarted,
    "server.stopped": ServerStopped,
}


def parse_body(kind: str, body: Mapping[str, object] | Body) -> Body:
    """Check a body against its kind.

    Args:
        kind: One of :data:`KINDS`.
        body: The fields, or the body itself.

    Raises:
        StateError: The kind is unknown or the body does not fit it; the message names each wrong field.
    """
    model = KINDS.get(kind)
    if model is None:
        raise StateError(f"Expected an event kind of {', '.join(KINDS)}, got {kind!r}.")
    if isinstance(body, Body):
        if type(body) is not model:
            raise StateError(f"Expected a {model.__name__} as the body of {kind}, got {type(body).__name__}.")
        return body
    try:
        return model.model_validate(dict(body))
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)
        )
        raise StateError(f"The body of {kind} is not as it should be: {wrong}.") from error


def encode_body(kind: str, body: Body) -> str:
    """Return the canonical JSON of a body, as it is stored and hashed.

    Raises:
        StateError: It is larger than :data:`MAX_BODY`, or holds text that is not Unicode.
    """
    try:
        data = canonical_json(body.model_dump(mode="python"))
    except ValueError as error:
        raise StateError(f"The body of {kind} is not as it should be: {error}") from error
    if len(data) > MAX_BODY:
        raise StateError(f"Expected a body of {kind} of at most {MAX_BODY} bytes, got {len(data)}.")
    return data.decode("utf-8")


def decode_body(kind: str, text: str) -> Body:
    """Read a stored body back.

    Raises:
        StateError: It does not decode or does not fit its kind.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StateError(f"The stored body of {kind} is not JSON.") from error
    if not isinstance(fields, dict):
        raise StateError(f"Expected the stored body of {kind} to be an object, got {type(fields).__name__}.")
    return parse_body(kind, fields)
