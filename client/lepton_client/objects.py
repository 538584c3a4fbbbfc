"""Parts of models that this device was sent, kept for the next round.

They are named by their SHA-256, so that what is here need not come again: a teacher that goes with every
round, a model that was evaluated and is then trained from. And the next model comes as the difference to the
one that is here (``lepton_fl.wire.downlink``). Nothing depends on them: what is missing, damaged or was
pushed out by the quota is fetched.

    objects = KeptObjects(folder, quota_bytes=2**26)
    objects.put(name, content)
    objects.get(name)                # the same bytes, verified, or None
"""

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Final

from lepton_fl.errors import LeptonError
from lepton_fl.files import make_private_folder, sha256_hex

log = logging.getLogger(__name__)

LEAST: Final = 1024  # bytes that are worth a file
_NAME: Final = re.compile(r"[0-9a-f]{64}")


class KeptObjects:
    """Files in one folder, which one process uses at a time; what was not used for longest goes first."""

    def __init__(self, folder: Path, quota_bytes: int) -> None:
        """Nothing is made before something is kept.

        Args:
            folder: of the files.
            quota_bytes: what they may take together; 0 = nothing is kept.
        """
        self._folder, self._quota = folder, quota_bytes

    def get(self, name: str) -> bytes | None:
        """An object by its SHA-256, or None; it counts as used."""
        path = self._path(name)
        if path is None:
            return None
        try:
            content = path.read_bytes()
            if sha256_hex(content) == name:
                os.utime(path)
                return content
            path.unlink()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.info("%s cannot be read, it is fetched again: %s", path, error)
            return None
        log.warning("%s is damaged, it is fetched again", path)
        return None

    def put(self, name: str, content: bytes) -> None:
        """Keep an object under its SHA-256; a disk that does not take it is no trouble.

        It is not synced: a file that a power cut leaves damaged is found out when it is read.
        """
        path = self._path(name)
        if path is None or not LEAST <= len(content) <= self._quota:
            return
        temporary = path.with_name(f".{name}.tmp")
        try:
            make_private_folder(self._folder)
            self._make_room(len(content))
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except (OSError, LeptonError) as error:
            log.info("a part of a model is not kept: %s", error)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def drop(self, name: str) -> None:
        """Something newer has taken the place of an object."""
        path = self._path(name)
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """What is here, last used first."""
        if not self._quota:
            return []
        return [path.name for _, _, path in sorted(self._files(), reverse=True)]

    def _path(self, name: str) -> Path | None:
        return self._folder / name if self._quota and _NAME.fullmatch(name) else None

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of each."""
        found = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._folder):
                if _NAME.fullmatch(entry.name):
                    status = entry.stat()
                    found.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
        return found

    def _make_room(self, wanted: int) -> None:
        """Remove what was not used for longest, and what a killed process has left half-written."""
        for leftover in self._folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        files = sorted(self._files())
        taken = wanted + sum(size for _, size, _ in files)
        for _, size, path in files:
            if taken <= self._quota:
                return
            path.unlink(missing_ok=True)
            taken -= size
