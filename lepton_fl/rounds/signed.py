"""What a device has given and signed in secure rounds, in a file (``secagg.client.Ledger``).

Whoever signs two survivor sets in one round, or is in two sums of it, may let the coordinator learn two sums,
and with them their difference. So a line is on the disk before a vector or a signature leaves, and never
changes.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lepton_fl.errors import StateCorrupt, StateError
from lepton_fl.files import sync_folder


class FileLedger:
    """A file that only grows; several processes may use it."""

    def __init__(self, path: Path) -> None:
        """Use a file; it is made at the first signature."""
        self._path = path

    def claim(self, round_key: str, digest: bytes) -> bytes:
        """See ``Ledger``.

        Raises:
            StateError: the file cannot be written; nothing may be signed.
            StateCorrupt: a line of it cannot be read.
        """
        with self._locked() as file:
            lines = self._read(file)
            if round_key not in lines:
                self._write(file, round_key, digest)
            return lines.get(round_key, digest)

    def give(self, round_key: str, attempt: int, roster: bytes) -> bool:
        """See ``Ledger``; raises like ``claim``."""
        key, value = f"{round_key} given", attempt.to_bytes(8, "big") + roster
        with self._locked() as file:
            lines = self._read(file)
            last = lines.get(key, b"")
            if last != value:
                if round_key in lines or last[:8] >= value[:8]:
                    return False
                self._write(file, key, value)
            return True

    def signed(self, round_key: str) -> bool:
        """See ``Ledger``; raises like ``claim``."""
        with self._locked() as file:
            return round_key in self._read(file)

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
                yield file
        except OSError as error:
            raise StateError(f"The ledger {self._path} cannot be written: {error.strerror}.") from error

    def _read(self, file: BinaryIO) -> dict[str, bytes]:
        """All lines by their keys; of several, the last one."""
        found, size = dict[str, bytes](), 0
        for line in file:
            if not line.endswith(b"\n"):  # a write that a crash cut short: nothing has left
                file.truncate(size)
                break
            size += len(line)
            try:
                key, value = json.loads(line)
                found[key] = bytes.fromhex(value)
            except (ValueError, TypeError) as error:
                raise StateCorrupt(f"A line of the ledger {self._path} cannot be read.") from error
        return found

    def _write(self, file: BinaryIO, key: str, value: bytes) -> None:
        is_new = file.seek(0, os.SEEK_END) == 0
        file.write(json.dumps([key, value.hex()]).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        if is_new:
            sync_folder(self._path.parent)
