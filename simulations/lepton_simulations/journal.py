"""The event journal of a simulated run: one JSON object a line, each chained to all before it.

Events have the kinds, the bodies and the hash of a coordinator's journal (``round.planned``,
``round.committed``, ...), so what reads one reads the other. Their ``time`` is virtual seconds since the run
began and nothing in them depends on the machine: the same scenario and seed give the same last hash,
whatever the number of workers.

    chain = Chain()
    line = chain.append(12.5, "round.committed", run_id, {"round": 1})
    head = verify_journal(folder / "journal.jsonl")      # StateCorrupt names the first line that is wrong
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from lepton_fl.errors import NotFound, Rejection, StateCorrupt, StateError
from lepton_fl.files import canonical_json
from lepton_fl.rounds.collect import ACCEPTED, SURPLUS, Collected

GENESIS: Final = "0" * 64  # what the first event names as its predecessor
CONTEXT: Final = "lepton simulation journal v1"  # no hash of it can be one of a coordinator's journal
FIELDS: Final = frozenset({"seq", "time", "kind", "subject", "body", "prev", "hash"})


class Head(NamedTuple):
    """The newest event."""

    seq: int  # 1, 2, 3, ...; 0 = there is none
    sha256: str  # its hash, which stands for the whole journal


EMPTY: Final = Head(0, GENESIS)


@dataclass(frozen=True)
class Event:
    """One event, checked."""

    seq: int
    time: float  # virtual seconds since the run began
    kind: str
    subject: str  # the run's id
    body: Mapping[str, Any]


class Chain:
    """Writes events; the lines go wherever the caller wants them."""

    def __init__(self, head: Head = EMPTY) -> None:
        """Continue after ``head``."""
        self.head = head

    def append(self, time: float, kind: str, subject: str, body: Mapping[str, Any]) -> bytes:
        """The next event as a line of canonical JSON.

        Args:
            time: virtual seconds since the run began.
            kind: what happened.
            subject: to which run.
            body: JSON types only.

        Raises:
            ValueError: the body holds what JSON cannot say.
        """
        seq, prev, text = self.head.seq + 1, self.head.sha256, canonical_json(dict(body))
        sha256 = event_hash(prev, seq, time, kind, subject, text.decode())
        self.head = Head(seq, sha256)
        rest = {"hash": sha256, "kind": kind, "prev": prev, "seq": seq, "subject": subject, "time": time}
        return b'{"body":' + text + b"," + canonical_json(rest)[1:] + b"\n"  # "body" sorts first


def event_hash(prev: str, seq: int, time: float, kind: str, subject: str, body: str) -> str:
    """SHA-256 (hex) over a canonical JSON array, as in a coordinator's journal.

    Args:
        prev: hash of the event before, or GENESIS.
        seq: 1, 2, 3, ... without gaps.
        time: virtual seconds; enters by its exact bits.
        kind: what happened.
        subject: to which run.
        body: canonical JSON text.
    """
    return hashlib.sha256(
        canonical_json([CONTEXT, prev, seq, float(time).hex(), kind, subject, body])
    ).hexdigest()


def read_journal(path: Path, *, length: int | None = None) -> Iterator[Event]:
    """All events in order, each after its place in the chain was checked.

    Args:
        path: of the journal.
        length: bytes to read; None = all of it.

    Raises:
        NotFound: there is no such file.
        StateCorrupt: names the first line that is damaged, altered, missing or out of place.
        StateError: it cannot be read.
    """
    for event, _ in checked(path, length):
        yield event


def verify_journal(path: Path, *, length: int | None = None, expected: Head | None = None) -> Head:
    """Check the whole chain; see ``read_journal``.

    Args:
        path: of the journal.
        length: bytes to read; None = all of it.
        expected: the head that was noted elsewhere; without it a missing tail cannot be noticed.

    Returns:
        The newest event's number and hash.
    """
    head = EMPTY
    for _, last in checked(path, length):
        head = last
    if expected is not None:
        require(path, head, expected)
    return head


def require(path: Path, head: Head, expected: Head) -> None:
    """Refuse a journal that does not end with the event that was noted elsewhere."""
    if head != expected:
        raise StateCorrupt(
            f"{path} ends with event {head.seq} ({head.sha256[:12]}…); event {expected.seq} "
            f"({expected.sha256[:12]}…) was noted.",
            hint="Lines are missing at its end, or it was written anew. Restore it from a copy.",
        )


def checked(path: Path, length: int | None = None) -> Iterator[tuple[Event, Head]]:
    """All events in order, each with the head that it makes; see ``read_journal``."""
    last, left = EMPTY, length
    try:
        with open(path, "rb") as file:
            while line := file.readline(-1 if left is None else left):
                left = None if left is None else left - len(line)
                event, last = _decode(path, line, last)
                yield event, last
    except FileNotFoundError as error:
        raise NotFound(f"There is no journal {path}.", hint="Name the folder of a run.") from error
    except OSError as error:
        raise StateError(f"Cannot read {path}: {error.strerror or error}.") from error


def _decode(path: Path, line: bytes, last: Head) -> tuple[Event, Head]:
    try:
        fields = json.loads(line)
        if not isinstance(fields, dict) or fields.keys() != FIELDS or not isinstance(fields["body"], dict):
            raise ValueError("it is not an event")
        if canonical_json(fields) + b"\n" != line:
            raise ValueError("it is not as it was written")
        text = canonical_json(fields["body"]).decode()
        event = Event(fields["seq"], fields["time"], fields["kind"], fields["subject"], fields["body"])
        found = event_hash(fields["prev"], event.seq, event.time, event.kind, event.subject, text)
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(path, last.seq + 1, f"cannot be read: {error}") from error
    if event.seq != last.seq + 1 or fields["prev"] != last.sha256:
        raise _damaged(path, last.seq + 1, "does not continue the line before it")
    if found != fields["hash"]:
        raise _damaged(path, last.seq + 1, "was altered: its hash does not match")
    return event, Head(event.seq, found)


def _damaged(path: Path, line: int, what: str) -> StateCorrupt:
    return StateCorrupt(f"{path}: line {line} {what}.", hint="Restore the file from a copy.")


# --- bodies -----------------------------------------------------------------------------------------

_OUTCOMES: Final = {
    ACCEPTED: "counted",
    SURPLUS: "surplus",
    Rejection.OFFLINE.value: "dropped",
    Rejection.FAILED.value: "dropped",
}
_WORDS: Final = {"counted": ACCEPTED, "surplus": SURPLUS}


def participation(collected: Collected, *, seconds: bool = False) -> list[dict[str, Any]]:
    """What became of each device, in the words of a coordinator's journal.

    Args:
        collected: one attempt.
        seconds: with the devices' own seconds and moments of arrival; only where they are virtual.
    """
    each = _bytes_down(collected)
    entries = []
    for device_id, known, _, examples, own_s, num_bytes, arrived_s, _ in collected.participation.values():
        outcome = _OUTCOMES.get(known, "rejected")
        body: dict[str, Any] = {
            "device_id": device_id,
            "outcome": outcome,
            "reason": "" if outcome in ("counted", "surplus") else str(known),
            "examples": examples,
            "bytes_up": num_bytes,
            "bytes_down": each,
        }
        if seconds:
            body["seconds"], body["arrived_s"] = own_s, arrived_s
        entries.append(body)
    return entries


def bytes_down(collected: Collected) -> int:
    """Of one attempt, to all devices that were asked in it."""
    return _bytes_down(collected) * len(collected.participation)


def _bytes_down(collected: Collected) -> int:
    """To one device: the model and the auxiliary vector."""
    return 4 * collected.plan.down_size


def outcome_of(entry: Mapping[str, Any]) -> str:
    """The word of ``rounds.collect`` for a journalled device: accepted, surplus or a Rejection."""
    return _WORDS.get(entry["outcome"]) or str(entry["reason"])
