"""What open attempts have heard: on the disk before anybody hears of it, there again after a crash.

    attempts = Attempts(store, BlobStore(folder))
    attempts.keep(plan, device_id, contents, num_bytes)         # an update; now its device may be told
    for update in attempts.of(plan): update.read()              # the same bytes, checked
    log = attempts.log(Attempt("r1", 3, 1))                     # of a secure round
    log.append(record, durable=True)                            # what its session has heard or decided
    attempts.forget("r1", 3)                                    # the attempt is closed

An update is one file, named by its hash and synced, and then one row that names it, in the transaction that
moves the first one's attempt to ``collecting``. A session's record is a row, and a file if it is large. What
noise is made of is a file in the same folder, named by its charge. No row is in the journal: a hash of one
device's update would let anybody who guesses it check the guess, for ever. Memory holds no update once it is
kept; the disk holds at most one per device of an open attempt, until the attempt is closed.

The store and the folder are all that a coordinator needs to go on, here or on another host. At its start it
removes what crashes have left: rows of closed attempts, and files that no row names: nobody was told of them.

The bytes of an update are those that Flower's objects had: ``(id, content)`` pairs, each ``SHA-256 (32) |
length (8, big endian) | content``.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lepton_fl.crashpoints import reached
from lepton_fl.errors import LeptonError, NotFound, StateConflict, StateCorrupt
from lepton_fl.files import BlobStore
from lepton_fl.plan import RoundPlan
from lepton_server.store import Attempt, Kept, Received, Store
from lepton_server.store.attempts import following

log = logging.getLogger(__name__)

CLOSED: Final = ("aggregated", "noised")  # phases in which it is fixed whose updates count
INLINE: Final = 1 << 15  # bytes of a record that a row holds; of 300 devices, key shares take 34,000


@dataclass(frozen=True)
class Update:
    """One device's answer on the disk."""

    device_id: str
    num_bytes: int  # on the wire
    counted: bool
    sha256: str
    blobs: BlobStore

    def read(self) -> dict[str, bytearray]:
        """Object id -> content, as it came.

        Raises:
            NotFound, StateCorrupt: the file is gone or damaged.
        """
        return dict(_split(self.blobs.read(self.sha256)))


class Attempts:
    """The open attempts of all runs."""

    def __init__(self, store: Store, blobs: BlobStore) -> None:
        """Remove what crashes have left.

        Args:
            store: has the rows.
            blobs: a folder of their own.
        """
        self._store, self.blobs = store, blobs
        with store.transaction() as change:
            change.forget_closed()
        blobs.keep_only(store.attempt_files())
        for unfinished in blobs.folder.glob("tmp/*"):  # nobody else writes here
            unfinished.unlink(missing_ok=True)

    def keep(self, plan: RoundPlan, device_id: str, contents: Mapping[str, bytes], num_bytes: int) -> Update:
        """Have an update on the disk, and its name in the database, when this returns.

        Args:
            plan: of the attempt.
            device_id: whose it is.
            contents: object id -> content.
            num_bytes: on the wire.

        Raises:
            DiskFull, StateLocked, ConnectionFailed, StateError: it is not kept; trying again may help.
            StateConflict: the attempt takes none any more.
        """
        sha256 = self.blobs.put(_joined(contents))
        reached("update.spooled")
        row = Received(device_id, sha256, num_bytes, counted=False)
        try:
            with self._store.transaction() as change:
                change.add_received(plan.run_id, plan.round, plan.attempt, row)
        except StateConflict:
            self._drop({sha256})
            raise
        reached("update.kept")
        return self._update(row)

    def of(self, plan: RoundPlan) -> list[Update]:
        """What an attempt has been sent so far; once it is fixed whose updates count, these only."""
        rows = self._store.received(plan.run_id, plan.round, plan.attempt)
        if self.is_closed(plan):
            rows = [row for row in rows if row.counted]
        return [self._update(row) for row in rows]

    def one(self, plan: RoundPlan, device_id: str) -> Update:
        """What one device has sent in an attempt.

        Raises:
            NotFound: nothing.
        """
        for row in self._store.received(plan.run_id, plan.round, plan.attempt):
            if row.device_id == device_id:
                return self._update(row)
        raise NotFound(f"Device {device_id} has sent nothing in round {plan.round} of run {plan.run_id}.")

    def is_closed(self, plan: RoundPlan) -> bool:
        """Whether it is fixed whose updates count."""
        return self._store.phase(plan.run_id, plan.round, plan.attempt) in CLOSED

    def is_whole(self, plan: RoundPlan) -> bool:
        """Whether every file that counts is there and intact."""
        try:
            for update in self.of(plan):
                with self.blobs.open(update.sha256):
                    pass
        except LeptonError as error:
            log.error("round %d of run %s: an update is lost: %s", plan.round, plan.run_id, error)
            return False
        return True

    def log(self, attempt: Attempt) -> "AttemptLog":
        """The records of a secure round's attempt.

        Raises:
            StateCorrupt: one is missing or damaged.
            StateError: the state cannot be read.
        """
        return AttemptLog(self._store, self.blobs, attempt)

    def forget(self, run_id: str, round_number: int | None = None, noise: str = "") -> None:
        """Erase what came in the attempts of a run, or of a round of it, which are all closed.

        Args:
            run_id: of the run.
            round_number: None = all.
            noise: the file of what its noise was made of; empty = there is none.
        """
        with self._store.transaction() as change:
            names = change.forget_attempts(run_id, round_number)
        names |= {noise} if noise else set()
        if round_number is None:
            names |= {
                c.state_sha256 for c in self._store.charges(run_id, states=("releasing",)) if c.state_sha256
            }
        self._drop(names)

    def _update(self, row: Received) -> Update:
        return Update(row.device_id, row.num_bytes, row.counted, row.sha256, self.blobs)

    def _drop(self, names: set[str]) -> None:
        for sha256 in names - self._store.attempt_files():
            self.blobs.delete(sha256)


class AttemptLog:
    """The records of one attempt, in order; for one thread of one coordinator."""

    def __init__(self, store: Store, blobs: BlobStore, attempt: Attempt) -> None:
        """See ``Attempts.log``."""
        self._store, self._blobs, self._attempt = store, blobs, attempt
        rows = store.kept(attempt)
        self._last = rows[-1] if rows else None
        self.found = tuple(self._body(row) for row in rows)  # before the coordinator ended

    def append(self, record: bytes, *, durable: bool) -> None:
        """Write one record.

        Args:
            record: of any size.
            durable: see ``Store.keep``.

        Raises:
            DiskFull, StateLocked, ConnectionFailed: nothing was written.
        """
        large = len(record) > INLINE
        blob = self._blobs.put(record) if large else ""
        row = following(self._attempt, self._last, b"" if large else record, blob)
        self._store.keep(self._attempt, row, durable=durable)
        self._last = row

    def _body(self, row: Kept) -> bytes:
        try:
            return self._blobs.read(row.blob) if row.blob else row.body
        except NotFound as error:
            raise StateCorrupt(f"The file of record {row.number} is missing: {error}") from error


class Vectors:
    """Masked vectors where they are already: in their devices' updates (``secagg.uploads.Spool``)."""

    def __init__(self, kept: Callable[[str], bytes | memoryview]) -> None:
        """Take over what is there.

        Args:
            kept: reads a device's vector.
        """
        self._kept = kept
        self._gone = set[str]()  # devices that are to give theirs again
        self._last: tuple[str, bytes | memoryview] = ("", b"")  # the one that is being worked on

    def append(self, device: str, data: bytes | memoryview) -> None:
        """See ``Spool``; all of it at once, on the disk since before anybody heard of it."""
        self._gone.discard(device)
        self._last = device, data

    def size(self, device: str) -> int:
        """See ``Spool``."""
        return len(self._vector(device))

    def read(self, device: str) -> Iterator[bytes | memoryview]:
        """See ``Spool``; ``Intake.verify`` holds it against the hash that the device has signed."""
        yield self._vector(device)

    def discard(self, device: str) -> None:
        """See ``Spool``."""
        self._gone.add(device)

    def _vector(self, device: str) -> bytes | memoryview:
        if device in self._gone:
            return b""
        if device != self._last[0]:
            self._last = device, self._kept(device)
        return self._last[1]


def adopt(store: Store, blobs: BlobStore, old: Path) -> None:
    """Take over the records' files of a coordinator that had a folder of its own for them.

    Raises:
        DiskFull, StateError: they cannot be copied; all are where they were.
    """
    named = store.attempt_files()
    for found in old.glob("*/[0-9a-f][0-9a-f]/*"):
        if found.parent.name + found.name in named:
            blobs.put(found.read_bytes())
    shutil.rmtree(old, ignore_errors=True)  # of what is left, the next start makes an end


def _joined(contents: Mapping[str, bytes]) -> Iterator[bytes]:
    for name, content in contents.items():
        yield bytes.fromhex(name) + len(content).to_bytes(8, "big")
        yield content


def _split(data: bytes) -> Iterator[tuple[str, bytearray]]:
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at + 32 : at + 40], "big")
        if at + 40 + size > len(data):
            raise StateCorrupt("An update's file ends in the middle of an object.")
        yield data[at : at + 32].hex(), bytearray(data[at + 40 : at + 40 + size])
        at += 40 + size
