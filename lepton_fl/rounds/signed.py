"""What a device has signed in secure rounds, in a file (``secagg.client.Ledger``).

One line per round: whoever signs two survivor sets in one round lets the coordinator learn two sums, and with
them their difference. So the line is on the disk before the signature leaves, and never changes.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lepton_fl.errors import StateCorrupt, StateError


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
        try:
            with self._locked() as file:
                found = self._find(file, round_key)
                if found is not None:
                    return found
                file.seek(0, os.SEEK_END)
                file.write(json.dumps([round_key, digest.hex()]).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                return digest
        except OSError as error:
            raise StateError(f"The ledger {self._path} cannot be written: {error.strerror}.") from error

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
            yield file

    def _find(self, file: BinaryIO, round_key: str) -> bytes | None:
        size = 0
        for line in file:
            if not line.endswith(b"\n"):  # a write that a crash cut short: it was never signed
                file.truncate(size)
                return None
            size += len(line)
            try:
                key, digest = json.loads(line)
                stored = bytes.fromhex(digest)
            except (ValueError, TypeError) as error:
                raise StateCorrupt(f"A line of the ledger {self._path} cannot be read.") from error
            if key == round_key:
                return stored
        return None
