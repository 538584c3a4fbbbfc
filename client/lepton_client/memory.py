"""What this device remembers of its runs, in files: SCAFFOLD's control, a personal head.

Each run has up to two files, named by the hash of its id (which comes from outside and is no file name):

    <run>.settled                  what is effective
    <run>.<round>-<attempt>.kept   what an attempt left behind, before its answer went out
    <run>.<round>-<attempt>.sent   the same, once the coordinator has taken the answer

Rules. A file appears and changes by one rename, so a kill leaves the old memory or the new one. Only what was
sent can become effective, and only when a later request says that its attempt has become part of the model.
Between the coordinator's taking the answer and the rename to ``.sent`` lie microseconds in which a kill makes
this device forget an attempt that did count: its control then lags by one change, which training survives.
The ``KEEP_RUNS`` runs last worked on are remembered, whatever the coordinator asks for.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lepton_fl.errors import NotFound, StateCorrupt, StateTooNew
from lepton_fl.files import read_private, remove, rename, sha256_hex, write_private

if TYPE_CHECKING:
    from lepton_fl.training.memory import Counted
    from lepton_fl.vector import Vector

FORMAT: Final = "1"
KEEP_RUNS: Final = 8
_ATTEMPT: Final = re.compile(r"\.(\d{1,19})-(\d{1,19})\.(?:kept|sent)\Z")


class FileMemory:
    """Implements ``training.memory.Memory`` in one folder, and what the worker tells it besides."""

    def __init__(self, folder: Path) -> None:
        """Nothing is made before something is kept."""
        self._folder = folder

    def recall(self, run_id: str, counted: "Counted") -> "Mapping[str, Vector]":
        """What is effective now.

        Raises:
            StateCorrupt, StateTooNew, StateError: the file cannot be used.
        """
        for path in self._left(run_id):
            if path.suffix == ".sent" and counted(*_attempt(path)):
                rename(path, self._settled(run_id))
            else:
                remove(path)
        return _read(self._settled(run_id), run_id)

    def keep(self, run_id: str, round_number: int, attempt: int, vectors: "Mapping[str, Vector]") -> None:
        """Keep what an attempt leaves behind, before its answer goes out.

        Raises:
            DiskFull, StateError: it cannot be written; the old memory is unchanged.
        """
        from safetensors.numpy import save

        for path in self._left(run_id):
            remove(path)
        body = save(dict(vectors))
        about = {"format": FORMAT, "run": run_id, "sha256": sha256_hex(body)}
        head = json.dumps(about).encode() + b"\n"
        write_private(self._of(run_id, round_number, attempt, "kept"), head + body)
        self._make_room()

    def settle(self, run_id: str, round_number: int, attempt: int, taken: bool) -> None:
        """The coordinator has taken the attempt's answer, or it does not count; imports nothing heavy.

        Raises:
            StateError: it cannot be noted.
        """
        kept = self._of(run_id, round_number, attempt, "kept")
        if not taken:
            remove(kept)
            remove(kept.with_suffix(".sent"))
        elif kept.exists():
            rename(kept, kept.with_suffix(".sent"))

    def _settled(self, run_id: str) -> Path:
        return self._folder / f"{_name(run_id)}.settled"

    def _of(self, run_id: str, round_number: int, attempt: int, what: str) -> Path:
        return self._folder / f"{_name(run_id)}.{round_number}-{attempt}.{what}"

    def _left(self, run_id: str) -> list[Path]:
        """What attempts of a run left behind; at most one, unless something is odd."""
        return [path for path in self._folder.glob(f"{_name(run_id)}.*") if _ATTEMPT.search(path.name)]

    def _make_room(self) -> None:
        """Forget the runs that were not worked on for longest."""
        files: dict[str, float] = {}
        for path in self._folder.glob("*.*"):
            with contextlib.suppress(OSError):
                run = path.name.partition(".")[0]
                files[run] = max(files.get(run, 0.0), path.stat().st_mtime)
        for run in sorted(files, key=lambda r: files[r], reverse=True)[KEEP_RUNS:]:
            for path in self._folder.glob(f"{run}.*"):
                remove(path)


def _name(run_id: str) -> str:
    return sha256_hex(run_id.encode())[:32]


def _attempt(path: Path) -> tuple[int, int]:
    found = _ATTEMPT.search(path.name)
    return (int(found[1]), int(found[2])) if found else (0, 0)  # round 0 has never counted


def _read(path: Path, run_id: str) -> "Mapping[str, Vector]":
    try:
        raw = read_private(path)
    except NotFound:
        return {}
    head, _, body = raw.partition(b"\n")
    try:
        about = json.loads(head)
        written_as, run, digest = about["format"], about["run"], about["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _damaged(path) from None
    if written_as != FORMAT:
        raise StateTooNew(
            f"{path} has format {written_as!r}, this version reads {FORMAT}.",
            hint="Install a newer lepton-fl.",
        )
    if run != run_id or digest != sha256_hex(body):
        raise _damaged(path)
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(body)
    except SafetensorError:
        raise _damaged(path) from None


def _damaged(path: Path) -> StateCorrupt:
    return StateCorrupt(
        f"What this device remembers of a run is damaged: {path}.",
        hint="Remove the file: the device then goes on in that run as if it were new to it.",
    )
