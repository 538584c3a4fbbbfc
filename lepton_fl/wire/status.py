"""Errors over gRPC: which status stands for which error, and back.

The status is for proxies, load balancers and people with grpcurl. The error itself travels in trailing
metadata, so that the client raises the class that the server meant:

* ``lepton-code``: ``LeptonError.code``, ASCII;
* ``lepton-hint-bin``: the hint, UTF-8 (gRPC wants the suffix ``-bin`` for bytes);
* ``retry-after``: after how many seconds to come again, where a call came too soon or to a busy coordinator.

With a call, in metadata:

* ``lepton-patience``: how many seconds the caller gives it, as its deadline also says. gRPC tells a server
  only what is left of a deadline, and what is gone is how long the call has waited in line.

Nothing here imports grpc: statuses are their names.
"""

from collections.abc import Iterable, Iterator

from lepton_fl.errors import (
    BudgetRefused,
    ConfigError,
    ConnectionFailed,
    DataContractError,
    DataError,
    DiskFull,
    LeaseLost,
    LeptonError,
    NotFound,
    QuorumError,
    Rejection,
    RunError,
    StateConflict,
    StateCorrupt,
    StateError,
    StateLocked,
    StateTooNew,
    TaskError,
    TrustError,
    UpdateRejected,
)

CODE_KEY = "lepton-code"
HINT_KEY = "lepton-hint-bin"
RETRY_KEY = "retry-after"
PATIENCE_KEY = "lepton-patience"
MAX_RETRY_S = 3600.0  # a peer can ask for no longer rest
MAX_DETAIL = 500  # characters of a message or a hint that cross the wire

# The first row of a status is what that status means when a peer sends no lepton-code.
_STATUS: tuple[tuple[type[LeptonError], str], ...] = (
    (TrustError, "PERMISSION_DENIED"),
    (ConfigError, "INVALID_ARGUMENT"),
    (NotFound, "NOT_FOUND"),
    (ConnectionFailed, "UNAVAILABLE"),
    (StateLocked, "UNAVAILABLE"),
    (DiskFull, "RESOURCE_EXHAUSTED"),
    (TaskError, "FAILED_PRECONDITION"),
    (DataError, "FAILED_PRECONDITION"),
    (DataContractError, "FAILED_PRECONDITION"),
    (StateError, "INTERNAL"),
    (StateConflict, "FAILED_PRECONDITION"),
    (LeaseLost, "UNAVAILABLE"),
    (StateTooNew, "INTERNAL"),
    (StateCorrupt, "DATA_LOSS"),
    (RunError, "ABORTED"),
    (QuorumError, "ABORTED"),
    (BudgetRefused, "FAILED_PRECONDITION"),
    (UpdateRejected, "INVALID_ARGUMENT"),
    (LeptonError, "INTERNAL"),
)
_STATUS_OF = dict(_STATUS)
_CLASS_OF = {error.code: error for error, _ in _STATUS}
# What gRPC itself, or a peer that is not ours, may answer.
_FALLBACK: dict[str, type[LeptonError]] = {
    "PERMISSION_DENIED": TrustError,
    "UNAUTHENTICATED": TrustError,
    "INVALID_ARGUMENT": ConfigError,
    "OUT_OF_RANGE": ConfigError,
    "NOT_FOUND": NotFound,
    "UNAVAILABLE": ConnectionFailed,
    "DEADLINE_EXCEEDED": ConnectionFailed,
    "RESOURCE_EXHAUSTED": ConnectionFailed,
    "CANCELLED": ConnectionFailed,
    "UNIMPLEMENTED": ConfigError,
    "FAILED_PRECONDITION": ConfigError,
}


def status_of(error: LeptonError) -> str:
    """Return the name of the gRPC status that stands for ``error``, e.g. ``PERMISSION_DENIED``."""
    for cls in type(error).__mro__:
        if cls in _STATUS_OF:
            return _STATUS_OF[cls]
    return "INTERNAL"


def metadata_of(error: LeptonError, retry_s: float = 0.0) -> tuple[tuple[str, str | bytes], ...]:
    """Return the trailing metadata that carries ``error``: its code, its hint, and when to come again."""
    found: list[tuple[str, str | bytes]] = [(CODE_KEY, error.code)]
    if error.hint:
        found.append((HINT_KEY, error.hint[:MAX_DETAIL].encode()))
    if retry_s > 0:
        found.append((RETRY_KEY, f"{max(retry_s, 0.001):.3f}"))  # 0 would say nothing
    return tuple(found)


def retry_after(metadata: Iterable[tuple[str, str | bytes]] | None) -> float:
    """Return after how many seconds a peer asks to come again (0 = it does not say), at most an hour."""
    for key, value in metadata or ():
        if key == RETRY_KEY:
            try:
                seconds = float(value)
            except ValueError:
                continue
            return min(seconds, MAX_RETRY_S) if seconds > 0 else 0.0  # NaN is not
    return 0.0


def waited_s(metadata: Iterable[tuple[str, str | bytes]] | None, left_s: float | None) -> float:
    """Return how long a call has waited before somebody looked at it; 0 = not known.

    Args:
        metadata: Of the call.
        left_s: Seconds that are left of its deadline; None = it has none.
    """
    for key, value in metadata or ():
        if key == PATIENCE_KEY and left_s is not None:
            try:
                return max(0.0, float(value) - left_s)
            except ValueError:
                return 0.0
    return 0.0


def error_from(
    status: str, detail: str, metadata: Iterable[tuple[str, str | bytes]] | None = None
) -> LeptonError:
    """Build the error that a peer answered with.

    Args:
        status: Name of the gRPC status.
        detail: Its text; cut to 500 characters, control characters removed.
        metadata: Trailing metadata; unknown keys and undecodable values are ignored.

    Returns:
        An instance of the class named by ``lepton-code``, else of the class that fits the status.
    """
    fields = dict(_texts(metadata or ()))
    message = _printable(detail) or f"The coordinator answered {status} without a reason."
    cls = _CLASS_OF.get(fields.get(CODE_KEY, "")) or _FALLBACK.get(status, LeptonError)
    hint = _printable(fields.get(HINT_KEY, ""))
    if cls is UpdateRejected:
        return UpdateRejected(Rejection.MALFORMED, message, hint=hint)
    return cls(message, hint=hint)


def _texts(metadata: Iterable[tuple[str, str | bytes]]) -> Iterator[tuple[str, str]]:
    for key, value in metadata:
        if key in (CODE_KEY, HINT_KEY):
            yield key, value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _printable(text: str) -> str:
    """A peer's text goes to a terminal and to logs: no control characters, no novels."""
    return "".join(c if c.isprintable() else " " for c in text[:MAX_DETAIL]).strip()
