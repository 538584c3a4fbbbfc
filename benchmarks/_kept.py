"""Outcomes of long measurements, a line each in a file: one that was ended goes on where it was.

What is asked for is the key: the settings, and the digest of what else decides (a scenario, the code). An
outcome of other settings is not found, and stays in the file.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import lepton_fl
from lepton_fl.files import append_durably, cut


class Kept:
    """Outcomes by their settings, in one file of JSON Lines or, without one, in memory."""

    def __init__(self, path: Path | None) -> None:
        """Read what is there; half a line at the end was never an outcome and is cut off."""
        self._path, self._known = path, {}
        if path and path.exists():
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                cut(path, whole)
            for line in data[:whole].splitlines():
                row = json.loads(line)
                self._known[_name(row["settings"])] = row["outcome"]

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The outcome of these settings, if it is known."""
        return self._known.get(_name(settings))

    def add(self, settings: dict[str, Any], outcome: dict[str, Any]) -> None:
        """Keep an outcome, durably."""
        self._known[_name(settings)] = outcome
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"settings": settings, "outcome": outcome}, sort_keys=True)
            append_durably(self._path, line.encode() + b"\n")


def digest(*parts: bytes) -> str:
    """A short name of what decides an outcome besides its settings; the package's version is part of it."""
    return hashlib.sha256(b"\0".join((lepton_fl.__version__.encode(), *parts))).hexdigest()[:12]


def _name(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
