"""A backup put back: into an empty installation, or in place of one that is told to go.

    restore(folder, settings, head=published)

Rules:

* The backup is checked first, all of it, and every file again as it is copied.
* A ledger that lacks what was seen elsewhere (the published head, the database that is there) is refused: it
  does not know what was spent.
* The first thing that is written is a mark, the last one that goes is this mark; while it is there no
  coordinator starts. The database is last but one, and comes as a whole. Who was cut off begins again.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lepton_fl.crashpoints import reached
from lepton_fl.errors import ConfigError, StateConflict, StateCorrupt, StateLocked
from lepton_fl.files import (
    make_private_folder,
    read_private,
    remove,
    remove_tree,
    rename,
    sync_folder,
    sync_tree,
    write_private,
)
from lepton_server.audit import write_lines
from lepton_server.backup import CONFIG, SCRATCH, Manifest, checked, make_folders, plain_files
from lepton_server.heads import refuse_older
from lepton_server.lease import LIFE_S, MARK, claim
from lepton_server.store import Store, file_of, open_store

if TYPE_CHECKING:
    from lepton_fl.privacy.head import LedgerHead
    from lepton_server.backup import Checked, Progress
    from lepton_server.config import ServerConfig

ASIDE: Final = b"replace"  # in the mark: what was here before is moved aside


def restore(
    folder: Path,
    settings: "ServerConfig",
    *,
    head: "LedgerHead | None" = None,
    replace: bool = False,
    passphrase: bytes | None = None,
    progress: "Progress | None" = None,
) -> "Manifest":
    """Put a backup where the configuration says that the state is.

    Args:
        folder: The backup.
        settings: Of the installation; of no coordinator that runs.
        head: Of the privacy ledger, as it was published: the backup must have it.
        replace: What is there is moved aside (``….replaced-TIME``); in PostgreSQL it is deleted.
        passphrase: Opens the keys, if they are sealed.
        progress: Told how far it is.

    Raises:
        NotFound, StateCorrupt, StateTooNew, TrustError: See ``backup.checked``.
        ConfigError: The keys are sealed and no passphrase is given.
        StateCorrupt: The backup is older than what was seen elsewhere.
        StateLocked: A coordinator runs here, or leads the database.
        StateConflict: Something is there; nothing was changed.
        DiskFull: No space was left; what was begun is marked.
    """
    target = _Target(settings)
    Manifest.read(folder)  # before anything is made
    make_private_folder(target.state)
    with contextlib.closing(claim(target.state)):
        target.sweep()
        if not replace:
            target.refuse_files()
        with checked(folder, scratch=target.state, passphrase=passphrase, progress=progress) as backup:
            if backup.manifest.sealed and not backup.secrets:
                raise ConfigError("The keys of this backup are sealed.", hint="Give --passphrase-file.")
            if head is not None:
                refuse_older(backup.store, head)
            target.refuse(backup, replace=replace)
            _put(backup, target, replace=replace)
    return backup.manifest


def _put(backup: "Checked", target: "_Target", *, replace: bool) -> None:
    target.mark(replace=replace)
    reached("restore.begun")
    target.clear()
    for name in backup.manifest.files:
        if (path := target.place(name)) is not None:
            write_lines(path, backup.read(name))
    for name, data in backup.secrets.items():
        if name != CONFIG or not (target.state / name).exists():  # which may be the one in use
            make_folders(target.state, name)
            write_private(target.state / name, data)
    target.sync()
    reached("restore.files")
    target.fill(backup.store, replace=replace)
    reached("restore.database")
    target.unmark()


class _Target:
    """The places of an installation."""

    def __init__(self, settings: "ServerConfig") -> None:
        self.state = settings.server.state_dir.absolute()
        self._folders = {
            "blobs": settings.blob_dir.absolute(),
            "releases": settings.release_dir.absolute(),
            "keys": self.state / "keys",
        }
        self._url, self._file = settings.store_url, file_of(settings.store_url)
        self._mark = self.state / MARK

    def place(self, name: str) -> Path | None:
        """Where a file of a backup goes; None for the database and for what is sealed."""
        top, _, rest = name.partition("/")
        if not rest or top == "keys":
            return None
        make_folders(self._folders[top], rest)
        return self._folders[top] / rest

    # --- before anything is changed ------------------------------------------------------------------

    def sweep(self) -> None:
        """Remove what a restore has left that was killed: copies of a database."""
        for folder in {self.state} | ({self._file.parent} if self._file else set()):
            for left in folder.glob(f"{SCRATCH}*"):
                shutil.rmtree(left, ignore_errors=True)

    def refuse_files(self) -> None:
        """Check that there are no files but those of a restore that was cut off; raises StateConflict."""
        for folder in self._folders.values() if not self._mark.exists() else ():
            for _, path in plain_files(folder, ""):
                raise _there(str(path))

    def refuse(self, backup: "Checked", *, replace: bool) -> None:
        """Check that what is here may go, and that nobody leads it.

        Raises:
            StateConflict: There is something, by name.
            StateLocked: A coordinator leads the database.
            StateCorrupt: The privacy ledger here has what the backup lacks.
        """
        if self._file is not None and not (self._file.exists() and self._file.stat().st_size):
            return
        with _existing(self._url) as store:
            lease, head, ledger = store.lease(), store.head(), store.ledger_head()
        if lease.holder and lease.age_s < LIFE_S:
            raise StateLocked(
                f"The coordinator {lease.holder} holds the lease of the database; it was renewed "
                f"{lease.age_s:.1f} s ago.",
                hint="Stop it first.",
            )
        if head.seq and head != backup.manifest.head and not (replace or self._half()):
            raise _there(f"a database with {head.seq} events")
        if ledger.seq and backup.store.event_hash(ledger.seq) != ledger.hash:
            raise StateCorrupt(
                f"The privacy ledger that is here ends with event {ledger.seq}, which the backup lacks: it "
                "is older, and does not know what was spent.",
                hint="Restore a newer backup. What it lacks was spent.",
            )

    def _half(self) -> bool:
        """Whether the file of the database is of a restore that was cut off."""
        return self._file is not None and self._mark.exists()

    # --- the change ----------------------------------------------------------------------------------

    def mark(self, *, replace: bool) -> None:
        """Say that what is here is not whole, from now on; and whether something was here before."""
        if not self._mark.exists() or replace:
            write_private(self._mark, ASIDE if replace else b"")

    def clear(self) -> None:
        """Make room: what was here before is moved aside, what a restore has left is deleted."""
        keep = read_private(self._mark) == ASIDE
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        files = [Path(f"{self._file}{end}") for end in ("", "-wal", "-shm")] if self._file else []
        for path in (*self._folders.values(), *files):
            if keep and path.exists():
                rename(path, _free(path.with_name(f"{path.name}.replaced-{stamp}")))
            elif path.is_dir():
                remove_tree(path)
            else:
                remove(path)

    def fill(self, source: "Store", *, replace: bool) -> None:
        """The database, all of it or nothing."""
        if self._file is None:
            with open_store(self._url) as store:
                if store.head() != source.head():  # else it was here when a restore was cut off
                    store.fill(source, life_s=LIFE_S, replace=replace)
            return
        make_private_folder(self._file.parent)
        scratch = Path(tempfile.mkdtemp(dir=self._file.parent, prefix=SCRATCH))
        try:
            with open_store(scratch / self._file.name) as store:
                store.fill(source, life_s=LIFE_S)
            sync_tree(scratch)
            rename(scratch / self._file.name, self._file)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def sync(self) -> None:
        """Have all files on the disk."""
        for folder in self._folders.values():
            if folder.is_dir():
                sync_tree(folder)

    def unmark(self) -> None:
        """Say that what is here is whole."""
        remove(self._mark)
        sync_folder(self.state)


@contextlib.contextmanager
def _existing(url: str) -> "Iterator[Store]":
    try:
        with open_store(url) as store:
            yield store
    except StateCorrupt as error:
        raise StateCorrupt(
            f"What the ledger here has seen cannot be read: {error}",
            hint="Move the state away by hand and restore into an empty place; give --head if you have one.",
        ) from error


def _free(path: Path) -> Path:
    """A name that nothing has: one that was cut off may have been here in the same second."""
    tries = chain([path], (path.with_name(f"{path.name}-{i}") for i in count(2)))
    return next(name for name in tries if not os.path.lexists(name))


def _there(what: str) -> StateConflict:
    return StateConflict(
        f"The installation is not empty: there is {what}.",
        hint="Restore into an empty one, or give --replace: what is there is moved aside.",
    )
