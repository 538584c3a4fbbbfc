"""What an open attempt of a run has heard, written ahead: small records in the store, large parts as files.

    log = AttemptLog(store, config.spool_dir, Attempt("r1", 3, 1))
    log.found                            # what was kept before the coordinator ended
    log.append(record, durable=True)     # on the disk before anybody hears of it
    log.spool                            # masked vectors (``secagg.uploads.Spool``)

The store and the folder are all that a coordinator needs to go on, here or on another host. A file is named
by its SHA-256 and synced before the row that names it, so a row never names what is not there. The event
that closes an attempt deletes its rows in the same transaction; files that no row names are removed when the
run's next attempt begins, when the run ends, or when a coordinator starts.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from lepton_fl.files import BlobStore, remove_tree
from lepton_server.store import Attempt, Kept, Store
from lepton_server.store.attempts import following

INLINE: Final = 1 << 15  # bytes of a record that a row holds; of 300 devices, key shares take 34,000
_PIECE: Final = 1 << 18  # bytes read at a time


class AttemptLog:
    """The records of one attempt, in order, and its spool; for one thread of one coordinator."""

    def __init__(self, store: Store, folder: Path, attempt: Attempt) -> None:
        """Take over what is there.

        Args:
            store: the coordinator's state.
            folder: of the spooled files of all runs.
            attempt: the one that is open; of others of this run, nothing is needed any more.

        Raises:
            StateCorrupt: a record is missing or damaged.
            StateError: the state cannot be read.
        """
        self._store, self._attempt = store, attempt
        self._blobs = BlobStore(folder / attempt.run_id)
        rows = store.kept(attempt)
        self._last = rows[-1] if rows else None
        self.spool = BlobSpool(self._blobs, rows)
        self._blobs.keep_only({row.blob for row in rows} | self.spool.named)
        self.found = tuple(self._body(row) for row in rows)

    def append(self, record: bytes, *, durable: bool) -> None:
        """Write one record, and the names of what has come since the last one.

        Args:
            record: of any size.
            durable: see ``Store.keep``.

        Raises:
            DiskFull, StateLocked, ConnectionFailed: nothing was written.
        """
        large = len(record) > INLINE
        blob = self._blobs.put(record) if large else ""
        fresh = self.spool.fresh()
        row = following(self._attempt, self._last, b"" if large else record, blob, fresh)
        self._store.keep(self._attempt, row, durable=durable)
        self._last = row
        self.spool.noted(fresh)

    def _body(self, row: Kept) -> bytes:
        return self._blobs.read(row.blob) if row.blob else row.body


class BlobSpool:
    """Devices' bytes as files that are named by their hash (``secagg.uploads.Spool``)."""

    def __init__(self, blobs: BlobStore, rows: Collection[Kept]) -> None:
        """Take over the files that the rows name."""
        self._blobs, self._pieces = blobs, dict[str, tuple[str, ...]]()
        for row in rows:
            self._pieces |= row.spooled
        self._fresh = set[str]()  # devices of which no row knows the files yet

    @property
    def named(self) -> set[str]:
        """All files."""
        return {name for names in self._pieces.values() for name in names}

    def fresh(self) -> dict[str, tuple[str, ...]]:
        """The files that no row names yet."""
        return {device: self._pieces[device] for device in self._fresh}

    def noted(self, devices: Collection[str]) -> None:
        """A row names the files of these devices."""
        self._fresh -= set(devices)

    def append(self, device: str, data: bytes | memoryview) -> None:
        """See ``Spool``; each piece is a file of its own, synced.

        Raises:
            DiskFull: no space was left; what had been there is as it was.
            StateError: the folder cannot be written.
        """
        name = self._blobs.put(data)
        self._pieces[device] = (*self._pieces.get(device, ()), name)
        self._fresh.add(device)

    def size(self, device: str) -> int:
        """See ``Spool``."""
        return sum(self._blobs.size(name) for name in self._pieces.get(device, ()))

    def read(self, device: str) -> Iterator[bytes]:
        """See ``Spool``; ``Intake.verify`` holds it against the hash that the device has signed."""
        for name in self._pieces.get(device, ()):
            try:
                with open(self._blobs.path(name), "rb") as file:
                    while piece := file.read(_PIECE):
                        yield piece
            except FileNotFoundError:
                return

    def discard(self, device: str) -> None:
        """See ``Spool``."""
        names = self._pieces.pop(device, ())
        self._fresh.discard(device)
        for name in set(names) - self.named:
            self._blobs.delete(name)


def forget_spool(folder: Path, run_id: str) -> None:
    """Delete the files of a run whose attempts are all closed; StateError if that cannot be."""
    remove_tree(folder / run_id)


def sweep_spools(store: Store, folder: Path) -> None:
    """Delete the files of runs that have ended, as a coordinator does that starts.

    Raises:
        StateError: they cannot be deleted.
    """
    if not folder.is_dir():
        return
    unfinished = {run.id for run in store.runs() if not run.finished}
    for found in list(folder.iterdir()):
        if found.name not in unfinished:
            remove_tree(found)
