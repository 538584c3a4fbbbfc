"""Updates that devices were told are here: on the disk before the word goes out, there again after a crash.

    inbox = Inbox(store, BlobStore(folder))
    kept = inbox.keep(plan, device_id, contents, num_bytes)     # durable; now the device may be told
    for update in inbox.of(plan): update.read()                 # the same bytes, checked
    inbox.forget(plan)                                          # the attempt is closed

An answer is one file, named by its hash and synced, and then one row that names it, in the transaction that
moves the first one's attempt to ``collecting``. The row is not in the journal: a hash of one device's update
would let anybody who guesses it check the guess, for ever. Memory holds no answer once it is kept; the disk
holds at most one per device of an open attempt, until the attempt is closed.

The bytes are those that Flower's objects had: ``(id, content)`` pairs, each ``SHA-256 (32) | length (8, big
endian) | content``. A file without a row was never acknowledged, and goes at the next start.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lepton_fl.crashpoints import reached
from lepton_fl.errors import LeptonError, StateConflict, StateCorrupt
from lepton_fl.files import BlobStore
from lepton_fl.plan import RoundPlan
from lepton_server.store import Received, Store

log = logging.getLogger(__name__)

CLOSED = ("aggregated", "noised")  # phases in which it is fixed whose updates count


@dataclass(frozen=True)
class Kept:
    """One answer on the disk."""

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


class Inbox:
    """The acknowledged updates of all runs."""

    def __init__(self, store: Store, blobs: BlobStore) -> None:
        """Remove what was never acknowledged.

        Args:
            store: has the rows.
            blobs: a folder of their own.
        """
        self._store, self.blobs = store, blobs
        self._drop({path.parent.name + path.name for path in blobs.folder.glob("??/*")})
        for unfinished in blobs.folder.glob("tmp/*"):  # nobody else writes here
            unfinished.unlink(missing_ok=True)

    def keep(self, plan: RoundPlan, device_id: str, contents: Mapping[str, bytes], num_bytes: int) -> Kept:
        """Have an answer on the disk, and its name in the database, when this returns.

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
        return Kept(device_id, num_bytes, False, sha256, self.blobs)

    def of(self, plan: RoundPlan) -> list[Kept]:
        """What an attempt has been sent so far; once it is fixed whose updates count, these only."""
        rows = self._store.received(plan.run_id, plan.round, plan.attempt)
        if self.is_closed(plan):
            rows = [row for row in rows if row.counted]
        return [Kept(r.device_id, r.num_bytes, r.counted, r.sha256, self.blobs) for r in rows]

    def is_closed(self, plan: RoundPlan) -> bool:
        """Whether it is fixed whose updates count."""
        return self._store.phase(plan.run_id, plan.round, plan.attempt) in CLOSED

    def is_whole(self, plan: RoundPlan) -> bool:
        """Whether every file that counts is there and intact."""
        try:
            for kept in self.of(plan):
                with self.blobs.open(kept.sha256):
                    pass
        except LeptonError as error:
            log.error("round %d of run %s: an update is lost: %s", plan.round, plan.run_id, error)
            return False
        return True

    def forget(self, run_id: str, round_number: int | None = None, noise: str = "") -> None:
        """Erase the updates of a run, or of a round of it, whose attempts are all closed.

        Args:
            run_id: of the run.
            round_number: None = all.
            noise: the file of what its noise was made of; empty = there is none.
        """
        with self._store.transaction() as change:
            names = change.forget_received(run_id, round_number)
        names |= {noise} if noise else set()
        if round_number is None:
            names |= {
                c.state_sha256 for c in self._store.charges(run_id, states=("releasing",)) if c.state_sha256
            }
        self._drop(names)

    def _drop(self, names: set[str]) -> None:
        for sha256 in names - self._store.attempt_files():
            self.blobs.delete(sha256)


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
