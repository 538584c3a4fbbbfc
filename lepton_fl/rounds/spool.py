"""Masked vectors on disk until they are added: memory stays that of one sum (``secagg.uploads.Spool``)."""

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lepton_fl.errors import DiskFull, StateError

_PIECE: Final = 1 << 18  # bytes read at a time


class FolderSpool:
    """One file per device in a folder of its own; what is there when it is opened is taken over."""

    def __init__(self, folder: Path, *, durable: bool = False) -> None:
        """Use a folder.

        Args:
            folder: private, of this attempt only.
            durable: sync every piece, so that it outlives a power cut; else it outlives the process only.
        """
        self._folder, self._durable = folder, durable

    def append(self, device: str, data: bytes | memoryview) -> None:
        """See ``Spool``.

        Raises:
            DiskFull: no space was left; what had been there is as it was.
            StateError: the folder cannot be written.
        """
        have = self.size(device)
        try:
            with open(self._path(device), "ab") as file:
                file.write(data)
                file.flush()
                if self._durable:
                    os.fsync(file.fileno())
        except OSError as error:
            self._cut(device, have)
            kind = DiskFull if error.errno == errno.ENOSPC else StateError
            raise kind(f"A masked vector cannot be kept in {self._folder}: {error.strerror}.") from error

    def size(self, device: str) -> int:
        """See ``Spool``."""
        try:
            return self._path(device).stat().st_size
        except FileNotFoundError:
            return 0

    def read(self, device: str) -> Iterator[bytes]:
        """See ``Spool``."""
        try:
            with open(self._path(device), "rb") as file:
                while piece := file.read(_PIECE):
                    yield piece
        except FileNotFoundError:
            return

    def discard(self, device: str) -> None:
        """See ``Spool``."""
        self._path(device).unlink(missing_ok=True)

    def _cut(self, device: str, size: int) -> None:
        """Undo a write that was cut short."""
        try:
            os.truncate(self._path(device), size)
        except FileNotFoundError:
            return

    def _path(self, device: str) -> Path:
        """Named by a hash: a device's id need not be a name of a file."""
        return self._folder / hashlib.sha256(device.encode()).hexdigest()[:40]
