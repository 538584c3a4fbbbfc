"""A file that is only ever appended to, and cut back to its last commit point after a crash."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lepton_fl.errors import DiskFull, StateCorrupt, StateError


class AppendedFile:
    """One such file; every method translates what the operating system says."""

    def __init__(self, path: Path) -> None:
        """Open the file at its end, and make it if need be."""
        self.path = path
        with on_disk(path.parent):
            self._file: BinaryIO = open(path, "ab")  # noqa: SIM115 - closed by close()

    @property
    def length(self) -> int:
        """Bytes written."""
        return self._file.tell()

    def append(self, line: bytes) -> None:
        """Write a line; it is safe after ``sync``."""
        with on_disk(self.path.parent):
            self._file.write(line)

    def flush(self) -> None:
        """Let other processes see what was written."""
        with on_disk(self.path.parent):
            self._file.flush()

    def sync(self) -> int:
        """Make durable what was written, and return the length."""
        with on_disk(self.path.parent):
            self._file.flush()
            os.fdatasync(self._file.fileno())
        return self.length

    def cut(self, length: int) -> None:
        """Forget everything after ``length`` bytes.

        Raises:
            StateCorrupt: the file is shorter.
        """
        if length > self.length or length < 0:
            raise StateCorrupt(
                f"{self.path} has {self.length} bytes, the commit point {length}.",
                hint="Restore the file from a copy, or start the run anew.",
            )
        with on_disk(self.path.parent):
            self._file.truncate(length)
            self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file; what was not synced when it mattered is not missed."""
        with suppress(OSError):
            self._file.close()


@contextmanager
def on_disk(folder: Path) -> Iterator[None]:
    """Translate what the operating system says about a file of the run."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(
                f"No space was left in {folder}; the last committed round is safe.",
                hint="Free some space, then continue with --resume.",
            ) from error
        raise StateError(
            f"Cannot use {folder}: {error.strerror or error}.", hint="Name a folder that may be written."
        ) from error
