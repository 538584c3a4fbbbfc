"""At most once: what this device has begun, written down before the work starts.

A device that is killed in mid-training does not train again into the same attempt: its entry says "begun",
and a request that comes a second time is refused. The file holds the last few hundred entries; it is
replaced as a whole, so a crash leaves the old list or the new one.

    if not ledger.begin(ticket): ...        # DiskFull or StateError: do not start
    ledger.answered(ticket)
"""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lepton_fl.errors import StateCorrupt
from lepton_fl.files import canonical_json, write_atomic

if TYPE_CHECKING:
    from lepton_fl.wire.messages import Ticket

FORMAT: Final = 1
KEEP: Final = 256  # entries; a round's nonce is never used again, so old ones only cost room


@dataclass(frozen=True)
class Entry:
    """One participation."""

    kind: str
    run_id: str
    round: int
    attempt: int
    nonce: str
    answered: bool = False

    @classmethod
    def of(cls, ticket: "Ticket") -> "Entry":
        """An entry that has begun."""
        return cls(ticket.kind, ticket.run_id, ticket.round, ticket.attempt, ticket.nonce)

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        """What makes it unique."""
        return self.kind, self.run_id, self.round, self.attempt, self.nonce


class Ledger:
    """The durable list of participations in one file; used by the agent's two threads."""

    def __init__(self, path: Path, kills: Callable[[], int] = lambda: 0) -> None:
        """Read the list.

        Args:
            path: of the file.
            kills: how many processes this machine has ended for want of memory.

        Raises:
            StateCorrupt: the file is damaged. Without it a double training could not be told.
        """
        self._path, self._kills, self._lock = path, kills, threading.Lock()
        entries, self._kills_then = _read(path)
        self._entries = {entry.key: entry for entry in entries}
        self.killed_for_memory = bool(self.interrupted()) and kills() > self._kills_then >= 0

    def interrupted(self) -> list[Entry]:
        """What was begun and never answered: work that a kill or a power cut ended."""
        return [entry for entry in self._entries.values() if not entry.answered]

    def begin(self, ticket: "Ticket") -> bool:
        """Note durably that the work starts; False when it had been begun before.

        Raises:
            DiskFull, StateError: it could not be written; the work must not start.
        """
        entry = Entry.of(ticket)
        with self._lock:
            if entry.key in self._entries:
                return False
            self._kills_then = self._kills()
            self._replace({**self._entries, entry.key: entry})
        return True

    def answered(self, ticket: "Ticket | Entry") -> None:
        """Note that nobody waits for it any more; raises DiskFull or StateError."""
        entry = ticket if isinstance(ticket, Entry) else Entry.of(ticket)
        done = Entry(*entry.key, answered=True)
        with self._lock:
            self._replace({**self._entries, entry.key: done})

    def _replace(self, entries: dict[tuple[str, str, int, int, str], Entry]) -> None:
        kept = dict(list(entries.items())[-KEEP:])
        rows = [[*entry.key, entry.answered] for entry in kept.values()]
        write_atomic(
            self._path,
            canonical_json({"format": FORMAT, "entries": rows, "kills": self._kills_then}),
            mode=0o600,
        )
        self._entries = kept


def _read(path: Path) -> tuple[list[Entry], int]:
    """The entries, and how many processes had been ended for want of memory when the last one began."""
    try:
        body: Any = json.loads(path.read_bytes())
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']}")
        return [_entry(row) for row in body["entries"]], int(body.get("kills", -1))  # -1: an older file
    except FileNotFoundError:
        return [], -1
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise StateCorrupt(
            f"The participation ledger {path} cannot be read ({error}).",
            hint="Without it this device could train twice into one round. Remove it if no run is active.",
        ) from error


def _entry(row: Any) -> Entry:  # noqa: ANN401 - straight from JSON, checked here
    kind, run_id, round_number, attempt, nonce, answered = row
    texts, numbers = (kind, run_id, nonce), (round_number, attempt)
    if not all(isinstance(t, str) for t in texts) or not all(isinstance(n, int) for n in numbers):
        raise ValueError(f"unexpected entry {row!r}")
    return Entry(kind, run_id, round_number, attempt, nonce, bool(answered))
