"""Bytes on disk: written whole or not at all, private when they are secret, named by their hash.

Rules:

* A file is replaced by writing a temporary file beside it, ``fsync``, rename, ``fsync`` of the folder. After
  a crash or a full disk a reader finds the old bytes or the new ones, never a mixture.
* A key file is created with mode 0600, never narrowed afterwards, and one that others can read is refused.
* What is read from a :class:`BlobStore` has been checked against its name.

Example::

    write_atomic(folder / "model.json", canonical_json({"round": 3}))
    digest = BlobStore(folder / "blobs").put(b"weights")
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from lepton_fl.errors import DiskFull, NotFound, StateCorrupt, StateError, StateLocked, TrustError

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_CHUNK = 1 << 20  # bytes read at a time when hashing
_STALE = 24 * 3600.0  # seconds after which an abandoned temporary blob is removed
GENESIS = "0" * 64  # what the first event of a journal names as its predecessor
JOURNAL = "lepton journal v1"  # what every event's line begins with
_DIGEST = re.compile(r"[0-9a-f]{64}")
_GONE = ".gone-"  # a folder on its way out


def sha256_hex(data: bytes) -> str:
    """Return SHA-256 of ``data`` as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


_CONTAINERS = (dict, list, tuple)
_SCALARS = frozenset({str, int, float, bool, type(None)})
_TEXT = frozenset({str})
_encode = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def canonical_json(obj: object) -> bytes:
    """Encode ``obj`` as the one JSON text that stands for it, in UTF-8.

    Keys are sorted, nothing is padded, text is not escaped beyond what JSON demands. Two equal objects
    made of ``dict`` (text keys), ``list``, ``tuple``, ``str``, ``int``, ``float``, ``bool`` and ``None`` give
    equal bytes.

    Raises:
        ValueError: NaN, infinity, a key that is not text, text that is not Unicode, or another type.
    """
    try:
        data = _encode(obj).encode("utf-8")
    except (TypeError, RecursionError, UnicodeEncodeError) as error:
        raise ValueError(f"Not representable as canonical JSON: {error}") from error
    _check_keys(obj)
    return data


def _check_keys(obj: object) -> None:
    """Refuse keys that ``json`` would silently turn into text: 1 and "1" would become one key."""
    waiting = [obj] if isinstance(obj, _CONTAINERS) else []
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict) and not _TEXT.issuperset(map(type, item)):
            for key in item:
                if not isinstance(key, str):
                    raise ValueError(f"Expected text as a JSON key, got {key!r}.")
        inside = item.values() if isinstance(item, dict) else item
        if not _SCALARS.issuperset(map(type, inside)):
            waiting += [v for v in inside if isinstance(v, _CONTAINERS)]


def event_line(prev: str, seq: int, time: float, kind: str, subject: str, body: str) -> bytes:
    """Return an event as the canonical JSON array whose SHA-256 is its hash; a journal's export has it.

    Args:
        prev: Hash of the event before, or :data:`GENESIS`.
        seq: 1, 2, 3, … without gaps.
        time: Seconds since 1970, UTC; enters by its exact bits.
        kind: What happened.
        subject: To what.
        body: Canonical JSON text.

    Raises:
        ValueError: Text that is not Unicode.
    """
    return canonical_json([JOURNAL, prev, seq, float(time).hex(), kind, subject, body])


def event_hash(prev: str, seq: int, time: float, kind: str, subject: str, body: str) -> str:
    """Return the hash that chains an event to all before it: SHA-256 over its :func:`event_line`."""
    return sha256_hex(event_line(prev, seq, time, kind, subject, body))


def write_atomic(path: str | os.PathLike[str], data: bytes, mode: int = 0o644) -> None:
    """Replace the file at ``path`` by ``data``, durably, or leave it as it was.

    Args:
        path: The file. Its folder must exist.
        data: The whole new content.
        mode: Permission bits of the new file, whatever the umask.

    Raises:
        DiskFull: No space (or a quota or size limit) was hit; nothing is left behind.
        StateError: The folder is missing or may not be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with _new_file(temporary, mode) as file:
            file.write(data)
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        _raise_translated(error, target)
    finally:
        temporary.unlink(missing_ok=True)  # gone already when the rename happened


def append_durably(path: str | os.PathLike[str], data: bytes) -> None:
    """Add ``data`` to the end of a private file, made if need be (0600); it is synced when this returns.

    Raises:
        DiskFull: No space was left; the file is as long as before.
        StateError: The file cannot be written.
    """
    target = Path(path)
    try:
        new = not target.exists()
        descriptor = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            before = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, data)
                os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)
        if new:
            sync_folder(target.parent)
    except OSError as error:
        _raise_translated(error, target)


def _write_all(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def cut(path: str | os.PathLike[str], length: int) -> None:
    """Forget what a file holds beyond ``length`` bytes, if there is more; raises StateError if it cannot."""
    try:
        if os.path.getsize(path) > length:
            os.truncate(path, length)
    except OSError as error:
        _raise_translated(error, Path(path))


def rename(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Give a file another name in its folder, durably; it replaces what had that name.

    Raises:
        StateError: it is missing, or the folder may not be written.
    """
    try:
        os.replace(path, target)
        sync_folder(Path(target).parent)
    except OSError as error:
        _raise_translated(error, Path(path))


def remove(path: str | os.PathLike[str]) -> None:
    """Delete a file that may be gone already; raises StateError if the folder may not be written."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        _raise_translated(error, Path(path))


def remove_tree(path: str | os.PathLike[str]) -> None:
    """Delete a folder and all in it, which may be gone already.

    It first gets a name that nobody looks for (``.gone-…``), so that no one sees half of it; a reader that
    opened its files keeps them. What a crash leaves under such a name is removed by :func:`sweep`.

    Raises:
        StateError: It may not be removed.
    """
    target = Path(path)
    doomed = target.with_name(f"{_GONE}{secrets.token_hex(8)}")
    try:
        os.rename(target, doomed)
        shutil.rmtree(doomed)
    except FileNotFoundError:
        return
    except OSError as error:
        _raise_translated(error, target)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove what killed processes left in a folder that nobody else writes now: never raises."""
    with contextlib.suppress(OSError):
        for leftover in Path(folder).iterdir():
            if leftover.name.startswith(_GONE):
                shutil.rmtree(leftover, ignore_errors=True)
            elif leftover.name.startswith(".") and leftover.suffix == ".tmp":
                leftover.unlink(missing_ok=True)


def sync_tree(folder: str | os.PathLike[str]) -> None:
    """Have every file in a folder, and every folder below it, on the disk.

    Raises:
        DiskFull: No space was left.
        StateError: Something cannot be read.
    """
    try:
        for parent, _, names in os.walk(folder):
            for name in names:
                _sync_file(Path(parent, name))
            sync_folder(Path(parent))
    except OSError as error:
        _raise_translated(error, Path(folder))


@contextlib.contextmanager
def translated(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise DiskFull or StateError about ``path`` where the operating system refuses something."""
    try:
        yield
    except OSError as error:
        _raise_translated(error, Path(path))


def write_private(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a secret: like :func:`write_atomic` with mode 0600; a missing folder is made with 0700.

    Raises:
        DiskFull: No space was left; nothing is left behind.
        StateError: The folder cannot be made or written.
    """
    target = Path(path)
    make_private_folder(target.parent)
    write_atomic(target, data, mode=0o600)


def make_private_folder(path: str | os.PathLike[str]) -> None:
    """Make the folder (0700) and its missing parents; an existing one is left as its owner set it up.

    Raises:
        DiskFull: No space was left.
        StateError: It cannot be made.
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as error:
        _raise_translated(error, Path(path))


def read_private(path: str | os.PathLike[str]) -> bytes:
    """Read a secret that nobody but its owner can read.

    Raises:
        NotFound: There is no such file.
        TrustError: Group or others may read or write it.
        StateError: It cannot be read.
    """
    target = Path(path)
    try:
        with open(target, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise TrustError(
                    f"Expected {target} to be private (mode 0600), got {mode:04o}: others could read it.",
                    hint=f"Run `chmod 600 {target}`. If somebody may have copied it, replace it instead.",
                )
            return file.read()
    except FileNotFoundError as error:
        raise NotFound(f"There is no file {target}.") from error
    except OSError as error:
        _raise_translated(error, target)


@contextlib.contextmanager
def lock_folder(path: str | os.PathLike[str]) -> Iterator[None]:
    """Work in a folder alone, among processes; a process that dies lets go.

    Raises:
        StateLocked: another process works in it.
        StateError: the folder is missing or may not be written.
    """
    folder = Path(path)
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        _raise_translated(error, folder)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "Wait for it, or name another folder."
            raise StateLocked(f"Another process works in {folder}.", hint=hint) from error
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _new_file(path: Path, mode: int) -> Iterator[BinaryIO]:
    """Create ``path`` with exactly ``mode`` and have its content on disk when the block ends."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode & 0o700)
    with os.fdopen(descriptor, "wb") as file:
        yield file
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have a folder's names on the disk; raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_translated(error: OSError, path: Path) -> NoReturn:
    if error.errno in _NO_SPACE:
        raise DiskFull(
            f"No space was left while writing {path} ({error.strerror}); what was there is unchanged.",
            hint="Free some space or raise the limit, then try again.",
        ) from error
    raise StateError(
        f"Cannot use {path}: {error.strerror or error}.",
        hint="Check that the folder exists and that this user may read and write it.",
    ) from error


class BlobStore:
    """Content-addressed files in a local folder: ``<folder>/ab/cdef…``, named by SHA-256.

    Several processes may use one folder at once: a blob appears by one rename, and the same content always
    has the same name.
    """

    def __init__(self, folder: str | os.PathLike[str], *, make: bool = True) -> None:
        """Open it; ``make`` = False: only to be read, nothing is made or tidied."""
        self.folder = Path(folder)
        self._temporary = self.folder / "tmp"
        if make:
            make_private_folder(self.folder)
            make_private_folder(self._temporary)
            self._sweep()

    def put(self, data: bytes | memoryview | Iterable[bytes]) -> str:
        """Store bytes, or the concatenation of chunks, and return their digest (64 hexadecimal digits).

        Raises:
            DiskFull: No space was left; no partial file remains.
            StateError: The folder may not be written.
        """
        chunks = [data] if isinstance(data, bytes | bytearray | memoryview) else data
        temporary = self._temporary / secrets.token_hex(16)
        hasher = hashlib.sha256()
        try:
            with _new_file(temporary, 0o600) as file:
                for chunk in chunks:
                    hasher.update(chunk)
                    file.write(chunk)
            return self._adopt(temporary, hasher.hexdigest())
        except OSError as error:
            _raise_translated(error, self.folder)
        finally:
            temporary.unlink(missing_ok=True)

    def _adopt(self, temporary: Path, digest: str) -> str:
        target = self.path(digest)
        if not target.parent.is_dir():
            target.parent.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self.folder)
        os.replace(temporary, target)  # also heals a damaged blob of that name
        sync_folder(target.parent)
        return digest

    def path(self, digest: str) -> Path:
        """Return where the blob is or would be.

        Raises:
            StateError: ``digest`` is not 64 lower-case hexadecimal digits.
        """
        if not _DIGEST.fullmatch(digest):
            raise StateError(f"Expected 64 lower-case hexadecimal digits as a digest, got {digest!r}.")
        return self.folder / digest[:2] / digest[2:]

    def has(self, digest: str) -> bool:
        """Return whether a blob of that name is there (its content is checked when it is read)."""
        return self.path(digest).is_file()

    def size(self, digest: str) -> int:
        """Return how many bytes a blob has; 0 where there is none."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def open(self, digest: str) -> BinaryIO:
        """Open a blob for reading, from its start, after checking all of it against ``digest``.

        Raises:
            NotFound: It is not in the store.
            StateCorrupt: Its content has another hash.
        """
        target = self.path(digest)
        try:
            file = open(target, "rb")  # noqa: SIM115 - handed to the caller
        except FileNotFoundError as error:
            raise NotFound(f"There is no blob {digest} in {self.folder}.") from error
        except OSError as error:
            _raise_translated(error, target)
        try:
            self._verify(file, digest)
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file

    def _verify(self, file: BinaryIO, digest: str) -> None:
        hasher = hashlib.sha256()
        try:
            while chunk := file.read(_CHUNK):
                hasher.update(chunk)
        except OSError as error:
            _raise_translated(error, self.path(digest))
        if hasher.hexdigest() != digest:
            raise self._damaged(digest, hasher.hexdigest())

    def read(self, digest: str) -> bytes:
        """Return the content of a blob.

        Raises:
            NotFound: It is not in the store.
            StateCorrupt: Its content has another hash.
        """
        with self.open(digest) as file:
            data = file.read()
        if sha256_hex(data) != digest:  # changed between the check and the read
            raise self._damaged(digest, sha256_hex(data))
        return data

    def _damaged(self, digest: str, found: str) -> StateCorrupt:
        return StateCorrupt(
            f"Blob {digest} in {self.folder} has SHA-256 {found}: it was damaged or altered.",
            hint="Restore it from a copy; storing the original content again replaces it.",
        )

    def delete(self, digest: str) -> bool:
        """Remove a blob that nothing names any more; return whether it was there.

        Raises:
            StateError: It may not be removed.
        """
        target = self.path(digest)
        try:
            target.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            _raise_translated(error, target)
        return True

    def keep_only(self, named: Collection[str]) -> None:
        """Remove every blob but these, for a folder in which nobody else writes at the moment.

        Raises:
            StateError: One may not be removed.
        """
        for folder in list(self.folder.glob("[0-9a-f][0-9a-f]")):
            for blob in list(folder.iterdir()):
                if (digest := folder.name + blob.name) not in named:
                    self.delete(digest)

    def _sweep(self) -> None:
        """Remove what a killed process left half-written, long enough ago that nobody still writes it."""
        limit = time.time() - _STALE
        with contextlib.suppress(OSError):  # another process may sweep at the same time
            for leftover in self._temporary.iterdir():
                if leftover.stat().st_mtime < limit:
                    leftover.unlink(missing_ok=True)
