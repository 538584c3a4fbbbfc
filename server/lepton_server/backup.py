"""A coordinator's whole state in one folder: made while it runs, checked anywhere, without a coordinator.

    made = create(store, settings, Path("monday"))
    verify(Path("monday"))                          # every byte, the journal, what the journal names

A backup is what a power cut at one moment would have left, and a coordinator goes on from it as it goes on
after one. At that moment, while nobody can write to the database, every file beside it is opened; so what is
deleted later is still read, and a backup that is killed leaves nothing behind that ought to be erased. Then
all rows are copied through one snapshot, whichever the database is, into SQLite.

    manifest.json       what belongs to it, by size and SHA-256; its own SHA-256 in the second line
    lepton.db           all tables, of one moment
    blobs/              models, optimiser states, sealed noise; attempts/ of open rounds
    releases/           signed lists and chunks
    keys/ server.toml   the authority, the server, budgets, noise, the list of releases; or secrets.sealed

It appears under its name when all of it is on the disk.
"""

import base64
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Final

from lepton_fl import __version__
from lepton_fl.crashpoints import reached
from lepton_fl.crypto import seal, unseal
from lepton_fl.errors import (
    NotFound,
    StateConflict,
    StateCorrupt,
    StateError,
    StateLocked,
    TrustError,
)
from lepton_fl.files import (
    canonical_json,
    make_private_folder,
    remove_tree,
    rename,
    sha256_hex,
    sync_tree,
    translated,
)
from lepton_server.audit import Auditor, named_blobs, verify_releases, write_lines
from lepton_server.config import ServerConfig
from lepton_server.privacy import newest_states
from lepton_server.releases import shelf_of
from lepton_server.store import Head, Snapshot, Store, open_store

FORMAT: Final = "lepton backup 1"
MANIFEST, DATABASE, SEALED = "manifest.json", "lepton.db", "secrets.sealed"
CONFIG = "server.toml"
_PLACES = frozenset({DATABASE, SEALED, CONFIG, "blobs", "releases", "keys"})
SCRATCH: Final = ".lepton-backup-"  # begins the names of folders in which a database is copied
_PURPOSE = "lepton backup secrets v1"
_PIECE = 1 << 20  # bytes read at a time
_BLOB = re.compile(r"([0-9a-f]{2})/([0-9a-f]{62})$")  # ends the path of a file that is named by its hash
_DAMAGED = "Take another backup; this one was altered, or damaged on its medium."


class Progress:
    """What is shown of the work; this one shows nothing."""

    def rows(self, count: int) -> None:
        """So many rows were copied."""

    def file(self) -> None:
        """A file was copied or checked."""


@dataclass(frozen=True)
class Manifest:
    """What belongs to a backup.

    Attributes:
        created: When, seconds since 1970, UTC.
        version: Of this package.
        engine: The database that it was taken from, ``sqlite`` or ``postgresql``.
        head: The newest event of the journal.
        ledger: The newest event of the privacy ledger; number 0: there is none.
        sealed: Whether keys and configuration are under a passphrase.
        elsewhere: Settings that name key files outside the state folder; these are not in it.
        files: Path -> bytes and SHA-256.
    """

    created: float
    version: str
    engine: str
    head: Head
    ledger: Head
    sealed: bool
    elsewhere: tuple[str, ...]
    files: Mapping[str, tuple[int, str]]

    @property
    def id(self) -> str:
        """SHA-256 of all that it says, and so of the whole backup."""
        return sha256_hex(self._line())

    def to_bytes(self) -> bytes:
        """As it is written: canonical JSON, and its SHA-256."""
        return self._line() + f"\n{self.id}\n".encode()

    def _line(self) -> bytes:
        return canonical_json(asdict(self) | {"format": FORMAT})

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read it from a backup.

        Raises:
            NotFound: There is no backup.
            StateCorrupt: It is damaged, or of another format.
        """
        try:
            data = (folder / MANIFEST).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"There is no backup in {folder}: it has no {MANIFEST}.") from None
        except OSError as error:
            raise StateError(f"Cannot read {folder / MANIFEST}: {error.strerror}.") from error
        try:
            fields = json.loads(data.split(b"\n", 1)[0])
            if fields.pop("format") != FORMAT:
                raise ValueError
            if not 0 <= fields["created"] < 2**36:
                raise ValueError
            fields["head"], fields["ledger"] = Head(*fields["head"]), Head(*fields["ledger"])
            fields["elsewhere"] = tuple(map(str, fields["elsewhere"]))
            fields["files"] = {str(k): (int(size), str(sha)) for k, (size, sha) in fields["files"].items()}
            found = cls(**fields)
            if found.to_bytes() == data:
                return found
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        raise StateCorrupt(f"{folder / MANIFEST} is damaged, or of another format than {FORMAT!r}.")


# --- making one -------------------------------------------------------------------------------------


def create(
    store: Store,
    settings: ServerConfig,
    target: Path,
    *,
    config: Path | None = None,
    passphrase: bytes | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Make a backup, while a coordinator runs or not.

    Args:
        store: The coordinator's state.
        settings: Where everything else is.
        target: A new folder, mode 0700.
        config: The configuration file; kept with the keys.
        passphrase: Keys and configuration are sealed with it; None = they lie there, mode 0600.
        progress: Told how far it is.

    Raises:
        StateConflict: The folder is there already, or what belongs to a release went meanwhile.
        StateCorrupt: A file has another hash than its name; nothing was made.
        DiskFull: No space was left; nothing is left behind.
    """
    progress = progress or Progress()
    if passphrase is not None:
        seal(b"", passphrase, _PURPOSE)  # a bad one is refused at once
    with _staged(target) as staging, contextlib.ExitStack() as stack:
        still = _Still(settings, config, stack)
        still.look()  # most of it, in peace
        with still.releases_held():
            snapshot = stack.enter_context(store.snapshot(still.look))
        writer = _Writer(staging)
        snapshot.write(staging / DATABASE, progress.rows)
        writer.note(DATABASE)
        reached("backup.database")
        for name, file in still.files.items():
            writer.put(name, _pieces(file, name))
            progress.file()
        for name, data in _sealed(still.secrets, passphrase).items():
            writer.put(name, [data])
        for name in still.chunks:
            with _chunk(settings.release_dir / Path(name).relative_to("releases")) as file:
                writer.put(name, _pieces(file, name))
            progress.file()
        for name, data in still.metadata.items():
            writer.put(name, [data])
        manifest = _manifest(snapshot, settings, writer.files, sealed=passphrase is not None)
        write_lines(staging / MANIFEST, [manifest.to_bytes()])
        sync_tree(staging)
        reached("backup.written")
    return manifest


def _manifest(
    snapshot: Snapshot, settings: ServerConfig, files: dict[str, tuple[int, str]], *, sealed: bool
) -> Manifest:
    return Manifest(
        created=time.time(),
        version=__version__,
        engine=snapshot.engine,
        head=snapshot.head,
        ledger=snapshot.ledger,
        sealed=sealed,
        elsewhere=_elsewhere(settings),
        files=dict(sorted(files.items())),
    )


class _Still:
    """All files beside the database, as they are at one moment."""

    def __init__(self, settings: ServerConfig, config: Path | None, stack: contextlib.ExitStack) -> None:
        self._settings, self._config, self._stack = settings, config, stack
        self._shelf = shelf_of(settings)
        self.files = dict[str, BinaryIO]()  # blobs, open: they can be read when they are deleted
        self.secrets = dict[str, bytes]()
        self.metadata = dict[str, bytes]()  # of releases
        self.chunks = list[str]()  # of releases; these are deleted by `lepton release tidy` only
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def releases_held(self) -> contextlib.AbstractContextManager[None]:
        """Nobody signs a release meanwhile."""
        if self._shelf.repository.exists:
            return self._shelf.repository.held()
        return contextlib.nullcontext()

    def look(self) -> None:
        """Open what is there now, and forget what was there before and is not."""
        found = dict(plain_files(self._settings.blob_dir, "blobs"))
        for name in self.files.keys() - found.keys():
            self.files.pop(name).close()
        for name in found.keys() - self.files.keys():
            if _BLOB.search(name):
                self._open(name, found[name])
        keys = dict(plain_files(self._settings.server.state_dir / "keys", "keys"))
        if self._config is not None:
            keys[CONFIG] = self._config
        self.secrets = {name: _read(path) for name, path in keys.items()}
        released = dict(plain_files(self._settings.release_dir, "releases"))
        self.chunks = [name for name in released if name.startswith("releases/blobs/")]
        self.metadata = {n: _read(released[n]) for n in released.keys() - set(self.chunks)}

    def _open(self, name: str, path: Path) -> None:
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with the stack
        except FileNotFoundError:
            return  # nothing needs it any more
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise StateError(
                    f"All files of the state must be open at one moment; {len(self.files)} can be.",
                    hint="Raise the limit of open files (`ulimit -Hn`).",
                ) from error
            raise StateError(f"Cannot read {path}: {error.strerror}.") from error
        self.files[name] = self._stack.enter_context(file)


def _read(path: Path) -> bytes:
    with translated(path):
        return path.read_bytes()


def plain_files(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """Name in the backup, and path, of each file; not of those that are being written."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "tmp" and not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield f"{prefix}/{path.relative_to(folder).as_posix()}", path


def _elsewhere(settings: ServerConfig) -> tuple[str, ...]:
    """Settings that name key files which are not in the folder of keys."""
    named = {
        "privacy.noise_key": settings.privacy.noise_key,
        "privacy.budget_key": settings.privacy.budget_key,
        "authority.key_file": settings.authority.key_file,
    }
    keys = (settings.server.state_dir / "keys").absolute()
    return tuple(name for name, path in named.items() if path and keys not in path.absolute().parents)


@contextlib.contextmanager
def _chunk(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except FileNotFoundError as error:
        raise StateConflict(
            f"{path} was deleted while the backup was made.", hint="Try again when nobody tidies releases."
        ) from error


def _pieces(file: BinaryIO, name: str) -> Iterator[bytes]:
    """What a file holds; if its name is a hash, it must be the right one."""
    named, hasher = _BLOB.search(name), hashlib.sha256()
    while piece := file.read(_PIECE):
        hasher.update(piece)
        yield piece
    if named and hasher.hexdigest() != named[1] + named[2]:
        raise StateCorrupt(
            f"{name} has SHA-256 {hasher.hexdigest()}: it was damaged or altered. No backup was made.",
            hint="Put it back from an earlier backup; `lepton audit verify` shows whether it is needed.",
        )


def _sealed(secrets: dict[str, bytes], passphrase: bytes | None) -> dict[str, bytes]:
    if passphrase is None:
        return secrets
    plain = canonical_json({name: base64.b64encode(data).decode() for name, data in secrets.items()})
    return {SEALED: seal(plain, passphrase, _PURPOSE)}


class _Writer:
    """New files of a backup; remembers what it has written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files = dict[str, tuple[int, str]]()

    def put(self, name: str, pieces: Iterable[bytes]) -> None:
        """Write one, mode 0600, synced."""
        path, hasher = self._folder / name, hashlib.sha256()

        def watched() -> Iterator[bytes]:
            for piece in pieces:
                hasher.update(piece)
                yield piece

        make_folders(self._folder, name)
        self.files[name] = (write_lines(path, watched()), hasher.hexdigest())

    def note(self, name: str) -> None:
        """Remember one that is there."""
        self.files[name] = _digest(self._folder / name)


def make_folders(root: Path, name: str) -> None:
    """Make the folders of ``root / name``, all of them private."""
    for parent in reversed(Path(name).parents):
        make_private_folder(root / parent)


def _digest(path: Path) -> tuple[int, str]:
    with translated(path), open(path, "rb") as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A private folder that becomes ``target`` at the end of the block, or is gone."""
    target = target.absolute()
    if os.path.lexists(target):
        raise StateConflict(f"{target} is there already.", hint="Name a new folder.")
    staging = target.with_name(f".{target.name}.part")
    with _owned(staging):
        try:
            for left in staging.iterdir():  # by one that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield staging
            if os.path.lexists(target):
                raise StateConflict(f"{target} has come meanwhile.", hint="Name a new folder.")
            rename(staging, target)
        except BaseException:
            with contextlib.suppress(StateError):
                remove_tree(staging)
            raise


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Make a folder and hold it alone, among processes; who dies lets go."""
    with translated(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(descriptor), os.stat(folder))
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise StateLocked(f"Another process makes {folder}.", hint="Wait for it, or name another folder.")
        yield
    finally:
        os.close(descriptor)


# --- checking one -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A backup that is whole and true.

    Attributes:
        folder: Where it is.
        manifest: What belongs to it.
        store: A copy of its database, open.
        secrets: Keys and configuration by path; empty while they are sealed.
        budget_key: Fingerprint of the key that has signed its budgets, or ''.
    """

    folder: Path
    manifest: Manifest
    store: Store
    secrets: Mapping[str, bytes]
    budget_key: str

    def read(self, name: str) -> Iterator[bytes]:
        """The bytes of one file, checked again as they are read; raises StateCorrupt after the last."""
        hasher = hashlib.sha256()
        with translated(self.folder / name), open(self.folder / name, "rb") as file:
            while piece := file.read(_PIECE):
                hasher.update(piece)
                yield piece
        if hasher.hexdigest() != self.manifest.files[name][1]:
            raise StateCorrupt(f"{name} was altered while it was read.")


@contextlib.contextmanager
def checked(
    folder: Path,
    *,
    scratch: Path | None = None,
    passphrase: bytes | None = None,
    progress: Progress | None = None,
) -> Iterator[Checked]:
    """Check all of a backup, and open it; nothing is written there.

    Args:
        folder: The backup.
        scratch: Where a copy of its database may lie meanwhile; None = the system's temporary folder.
        passphrase: Opens the keys, if they are sealed; without one they are checked by their hash only.
        progress: Told how far it is.

    Raises:
        NotFound: There is none.
        StateCorrupt: Names the first thing that is missing, additional, altered or not true.
        StateTooNew: It was made by newer code.
        TrustError: The passphrase is another, or releases are not signed.
    """
    manifest = Manifest.read(folder)
    _check_files(folder, manifest, progress or Progress())
    secrets = _open_secrets(folder, manifest, passphrase)
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(dir=scratch, prefix=SCRATCH))
        copy = Path(place, DATABASE)
        with translated(copy):
            shutil.copyfile(folder / DATABASE, copy)
        store = stack.enter_context(open_store(copy))  # also brings an older one up to date
        budget_key = _check_state(folder, manifest, store)
        yield Checked(folder, manifest, store, secrets, budget_key)


def verify(
    folder: Path, *, passphrase: bytes | None = None, progress: Progress | None = None
) -> tuple[Manifest, str]:
    """Check all of a backup; see :func:`checked`.

    Returns:
        What belongs to it, and the fingerprint of the key that has signed its budgets, or ''.
    """
    with checked(folder, passphrase=passphrase, progress=progress) as found:
        return found.manifest, found.budget_key


def _check_files(folder: Path, manifest: Manifest, progress: Progress) -> None:
    there = set(_all_names(folder)) - {MANIFEST}
    for what, names in (
        ("is missing", manifest.files.keys() - there),
        ("does not belong to it", there - manifest.files.keys()),
    ):
        if names:
            more = f" ({len(names)} such files)" if len(names) > 1 else ""
            raise StateCorrupt(f"Backup {folder}: {min(names)} {what}{more}.", hint=_DAMAGED)
    for name, (size, sha256) in manifest.files.items():
        if _digest(folder / name) != (size, sha256):
            raise StateCorrupt(f"Backup {folder}: {name} was altered or damaged.", hint=_DAMAGED)
        if name.partition("/")[0] not in _PLACES:
            raise StateCorrupt(f"Backup {folder}: {name} does not belong to it.", hint=_DAMAGED)
        blob = _BLOB.search(name)
        if blob and blob[1] + blob[2] != sha256:
            raise StateCorrupt(f"Backup {folder}: {name} is not what its name says.", hint=_DAMAGED)
        progress.file()
    for name in ({DATABASE} | ({SEALED} if manifest.sealed else set())) - manifest.files.keys():
        raise StateCorrupt(f"Backup {folder}: it has no {name}.", hint=_DAMAGED)


def _all_names(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        for name in [*names, *(n for n in folders if Path(parent, n).is_symlink())]:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if not stat.S_ISREG(path.lstat().st_mode):
                raise StateCorrupt(f"Backup {folder}: {relative} is no plain file.", hint=_DAMAGED)
            yield relative


def _open_secrets(folder: Path, manifest: Manifest, passphrase: bytes | None) -> dict[str, bytes]:
    if not manifest.sealed:
        names = [n for n in manifest.files if n.startswith("keys/") or n == CONFIG]
        return {name: (folder / name).read_bytes() for name in names}
    if passphrase is None:
        return {}
    try:
        plain = unseal((folder / SEALED).read_bytes(), passphrase, _PURPOSE)
    except TrustError as error:
        raise TrustError(
            f"The passphrase does not open the keys of {folder}.", hint="Check it and try again."
        ) from error
    return {name: base64.b64decode(text) for name, text in json.loads(plain).items()}


def _check_state(folder: Path, manifest: Manifest, store: Store) -> str:
    """The journal, what follows from it, and what it names; returns who has signed the budgets."""
    auditor = Auditor(deep=True)
    with store.journal() as (_, lines):
        for line in lines:
            auditor.take(line)
    report = auditor.report()
    if (report.head, store.ledger_head()) != (manifest.head, manifest.ledger):
        raise StateCorrupt(f"Backup {folder}: its journal is not the one that {MANIFEST} names.")
    rebuilt = store.rebuild()
    if not rebuilt.equal:
        raise StateCorrupt(
            f"Backup {folder}: {rebuilt.different} rows are not what the journal says: "
            f"{rebuilt.differences[0]}."
        )
    for name, why in _needed(store).items():
        if name not in manifest.files:
            raise StateCorrupt(f"Backup {folder}: {name} of {why} is not in it.")
    if report.releases or any(name.startswith("releases/metadata/") for name in manifest.files):
        verify_releases(folder / "releases", report.releases)
    return report.ledger.key


def _needed(store: Store) -> dict[str, str]:
    """The files without which a run cannot go on, or has no result: path -> whose they are."""
    needed = {_blob("blobs", sha256): f"run {run}" for sha256, run in named_blobs(store)[1].items()}
    for run in store.runs():
        if not run.finished:
            current = [m.sha256 for m in store.models(run.id) if m.round == run.committed]
            for sha256 in (*current, *newest_states(store, run.id)[-1:]):
                needed[_blob("blobs", sha256)] = f"run {run.id}"
    return needed | {_blob("blobs/attempts", sha256): "an open round" for sha256 in store.attempt_files()}


def _blob(folder: str, sha256: str) -> str:
    return f"{folder}/{sha256[:2]}/{sha256[2:]}"
