"""Every error that Lepton FL raises on purpose.

Rules: the message names the value, the bound and what happened; ``hint`` says what to do about it.
Other libraries' exceptions are translated where they enter. ``code`` is stable and machine-readable,
``exit_code`` is what the command line returns (see ``docs/errors.md``).

    LeptonError                     1
    ├── ConfigError                 3  a configuration file, variable or option is wrong
    ├── TaskError                   4  a task cannot be found, loaded or used
    ├── DataError                   4  a data source cannot be read
    │   └── DataContractError       4  the data are readable but break the task's contract
    ├── ConnectionFailed            5  the other side cannot be reached, a port is taken
    ├── TrustError                  6  a credential, certificate, token or signature is not accepted
    │   └── ReleaseRefused          6  a release is not taken, by fault; the one in service stays
    ├── StateError                  7  the state on disk cannot be used as it is
    │   ├── StateLocked             7  another process holds it
    │   ├── StateTooNew             7  written by newer code
    │   ├── StateCorrupt            7  a hash does not match
    │   ├── StateConflict           7  a change does not follow from what is recorded
    │   │   └── LeaseLost           7  another coordinator has taken over
    │   └── DiskFull                7  no space was left; nothing was changed
    ├── RunError                    8  a run stopped with a verdict other than success
    │   ├── QuorumError             8  too few devices could take part in time
    │   └── BudgetRefused           8  a privacy budget does not allow the release
    ├── NotFound                    9  no run, device, task or model of that name
    └── UpdateRejected              1  one message of one device is refused, by reason
"""

from enum import StrEnum
from math import nan
from typing import ClassVar


class LeptonError(Exception):
    """The root; ``str(error)`` is the message, ``error.hint`` what to do."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(LeptonError):
    """A configuration file, environment variable or option is wrong."""

    code = "config"
    exit_code = 3


class TaskError(LeptonError):
    """A task cannot be found, loaded or used."""

    code = "task"
    exit_code = 4


class DataError(LeptonError):
    """A data source cannot be read."""

    code = "data"
    exit_code = 4


class DataContractError(DataError):
    """The data are readable but break the task's contract."""

    code = "data-contract"


class ConnectionFailed(LeptonError):
    """The other side cannot be reached, or a port cannot be used."""

    code = "connection"
    exit_code = 5


class TrustError(LeptonError):
    """A credential, certificate, token or signature is not accepted."""

    code = "trust"
    exit_code = 6


class Fault(StrEnum):
    """Why a device does not take a release. The coordinator is told this word."""

    UNKNOWN = "unknown"  # the signed list of releases does not name it
    UNSIGNED = "unsigned"  # metadata without enough signatures of trusted keys
    EXPIRED = "expired"  # metadata past its end: frozen, or the clock is wrong
    REPLAYED = "replayed"  # metadata older than what was seen before
    TAMPERED = "tampered"  # bytes that do not have the signed hash, or do not decode
    ENDLESS = "endless"  # more bytes than are signed for or allowed
    OLDER = "older"  # an earlier release or round than this device may go back to
    FOREIGN = "foreign"  # of a task or for a profile that is not this device's
    QUOTA = "quota"  # does not fit on the disk or into the owner's quota
    RUNTIME = "runtime"  # this device lacks what runs it
    SELF_TEST = "self-test"  # computes something else here than where it was measured
    CRASHED = "crashed"  # ended its process, in the self-test or in service


class ReleaseRefused(TrustError):
    """A device does not take a release; what it served before it serves still."""

    code = "release-refused"

    def __init__(self, fault: Fault, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.fault = fault


class StateError(LeptonError):
    """The state on disk cannot be used as it is; it has not been changed."""

    code = "state"
    exit_code = 7


class StateLocked(StateError):
    """Another process holds the state."""

    code = "state-locked"


class StateTooNew(StateError):
    """The state was written by newer code."""

    code = "state-too-new"


class StateCorrupt(StateError):
    """Stored bytes do not match their hash."""

    code = "state-corrupt"


class StateConflict(StateError):
    """A change does not follow from what is recorded (a second end of one run); nothing was changed."""

    code = "state-conflict"


class LeaseLost(StateConflict):
    """Another coordinator has taken over the database; this one writes nothing more."""

    code = "lease-lost"


class DiskFull(StateError):
    """No space was left on the device; nothing was changed."""

    code = "disk-full"


class RunError(LeptonError):
    """A run stopped with a verdict other than success."""

    code = "run"
    exit_code = 8


class QuorumError(RunError):
    """Too few devices could take part within the time allowed."""

    code = "quorum"


class BudgetRefused(RunError):
    """A privacy budget does not allow a release; nothing was charged and nothing left."""

    code = "budget-refused"

    def __init__(
        self,
        message: str,
        *,
        budget: str = "",
        spent: float = nan,
        asked: float = nan,
        remaining: float = nan,
        largest_affordable: int = 0,
        hint: str = "",
    ) -> None:
        super().__init__(message, hint=hint)
        self.budget = budget
        self.spent = spent  # epsilon so far
        self.asked = asked  # epsilon with the release
        self.remaining = remaining  # epsilon below the cap
        self.largest_affordable = largest_affordable  # how many such releases would fit


class NotFound(LeptonError):
    """There is no run, device, task or model of that name."""

    code = "not-found"
    exit_code = 9


class Rejection(StrEnum):
    """Why one message of one device does not count. The device is told this word."""

    NON_FINITE = "non-finite"  # NaN or infinity in an update, a metric or a loss
    WRONG_SHAPE = "wrong-shape"  # not the number or type of coordinates of the plan
    WRONG_VERSION = "wrong-version"  # another task version, protocol version or model
    OUT_OF_RANGE = "out-of-range"  # a number outside the bounds of the plan
    MALFORMED = "malformed"  # does not decode
    DUPLICATE = "duplicate"  # this device has already been counted in this attempt
    REPLAYED = "replayed"  # belongs to an earlier round, attempt or run
    LATE = "late"  # came after the round had closed
    NOT_SELECTED = "not-selected"  # the sender is not in the cohort
    DATA_CONTRACT = "data-contract"  # the device's data break the task's contract
    FAILED = "failed"  # the device tried and reports an error
    OUT_OF_MEMORY = "out-of-memory"  # training needed more memory than the device, or its owner, gives
    DISK_FULL = "disk-full"  # the device could not write down what it must before it works
    INTERRUPTED = "interrupted"  # the device's process ended in the midst of the work; it works once only
    BUDGET = "budget"  # the device's own privacy budget, or its owner, does not allow it
    SIGNED_BEFORE = "signed-before"  # the device has signed in this round, which the coordinator has lost
    BLAMED = "blamed"  # its messages of a secure aggregation were provably wrong
    OFFLINE = "offline"  # no answer by the deadline
    REVOKED = "revoked"  # the device lost its enrolment


class Cause(StrEnum):
    """Why somebody or something does not move; ``lepton_server.watchdog`` says what to do about each."""

    GONE = "gone"  # the device's connection ended, or it fell silent: it is off, or its process is
    HALF_OPEN = "half-open"  # its connection looks alive, but nothing comes through it any more
    SLOW_LINK = "slow-link"  # it is sending or receiving, too slowly
    HUNG_TRAINING = "hung-training"  # the device answers, its training does not move
    OUT_OF_MEMORY = "out-of-memory"
    INTERRUPTED = "interrupted"  # its process was ended in the midst of the work
    DISK_FULL = "disk-full"  # of the device
    DATA_CONTRACT = "data-contract"
    WRONG_CERTIFICATE = "wrong-certificate"  # not of this coordinator's authority, or not for its key
    EXPIRED_CERTIFICATE = "expired-certificate"
    REVOKED = "revoked"
    EVICTED = "evicted"  # enrolled, but its node was shut out of the fleet port
    CLOCK_OFF = "clock-off"
    WRONG_VERSION = "wrong-version"
    TASK_MISSING = "task-missing"
    NOT_ELIGIBLE = "not-eligible"  # a rule of its owner
    NOT_CERTIFIED = "not-certified"
    FAILED = "failed"
    SIGNED_BEFORE = "signed-before"  # in this round, for a coordinator that was restored from an older state
    SLOW = "slow"  # it was still at work at the deadline
    QUARANTINED = "quarantined"
    OFFLINE = "offline"  # has not called since the coordinator started, or for long
    SERVER_DISK_FULL = "server-disk-full"
    DATABASE_LOCKED = "database-locked"
    DATABASE_LOST = "database-lost"
    COORDINATOR_DOWN = "coordinator-down"
    NO_QUORUM = "no-quorum"
    AT_WORK = "at-work"  # devices train: nothing is wrong
    BUILDING = "building"  # the coordinator makes the first model, or evaluates
    QUEUE = "queue"  # other runs are under way


class UpdateRejected(LeptonError):
    """One message of one device is refused."""

    code = "update-rejected"

    def __init__(
        self, reason: Rejection, message: str, *, hint: str = "", cause: Cause | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason
        self.cause = cause  # where the coordinator knows more than the reason says

    def __reduce__(self) -> tuple[type["UpdateRejected"], tuple[Rejection, str], dict[str, object]]:
        """Survive the way back from a worker process."""
        return type(self), (self.reason, str(self)), self.__dict__
