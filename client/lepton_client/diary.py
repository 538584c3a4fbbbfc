"""What the agent tells its owner: one log line per change, and the small file behind ``client status``.

Writing the file is also how a full or read-only disk is noticed: ``trouble`` says what is wrong until a
write succeeds again.
"""

import logging
import threading
from collections import deque
from typing import Any, Final

from lepton_client.clock import Clock
from lepton_client.state import StateDir
from lepton_fl.errors import DiskFull, LeptonError, StateError

log = logging.getLogger("lepton_client")

KEEP_VERDICTS: Final = 50


class Diary:
    """The agent's state in plain words."""

    def __init__(self, state: StateDir, clock: Clock, facts: dict[str, Any]) -> None:
        """``facts`` are fields that do not change while the agent runs."""
        self.trouble = ""
        self.full = False  # the trouble is that no space is left
        self._state, self._clock = state, clock
        self._fields = dict(facts)
        self._said: dict[str, str] = {}
        self._verdicts: deque[dict[str, Any]] = deque(_earlier(state), maxlen=KEEP_VERDICTS)
        self._dirty = True
        self._lock = threading.Lock()

    def say(self, topic: str, text: str, level: int = logging.INFO, *, key: str = "") -> None:
        """Log ``text`` if it (or its ``key``) is not what was last said on this topic; '' only forgets."""
        key = key or text
        with self._lock:
            if self._said.get(topic, "") == key:
                return
            self._said[topic] = key
        if text:
            log.log(level, "%s", text)

    def note(self, **fields: Any) -> None:  # noqa: ANN401 - any JSON value
        """Change fields of the status; a change of ``state`` keeps the time it happened."""
        with self._lock:
            if fields.get("state", self._fields.get("state")) != self._fields.get("state"):
                fields["since"] = self._clock.wall()
            if any(self._fields.get(name) != value for name, value in fields.items()):
                self._fields.update(fields)
                self._dirty = True

    def verdict(self, run_id: str, round_number: int, accepted: bool, reason: str, detail: str) -> None:
        """Keep and log what became of an answer."""
        if accepted:
            log.info("round %d of run %s: our answer counts", round_number, run_id)
        else:
            log.warning(
                "round %d of run %s: our answer does not count (%s): %s", round_number, run_id, reason, detail
            )
        entry = {
            "at": self._clock.wall(),
            "run": run_id,
            "round": round_number,
            "accepted": accepted,
            "reason": reason,
            "detail": detail[:500],
        }
        with self._lock:
            self._verdicts.append(entry)
            self._dirty = True

    def hit(self, error: LeptonError) -> None:
        """A write failed elsewhere; until one succeeds here, this device sits out."""
        self.trouble, self.full = str(error), isinstance(error, DiskFull)

    def flush(self) -> None:
        """Write the status if it changed, or if the last write failed; never raises."""
        with self._lock:
            if not (self._dirty or self.trouble):
                return
            status = self._fields | {"verdicts": list(self._verdicts)}
            self._dirty = False
        try:
            self._state.save_status(status)
        except StateError as error:
            self.trouble, self.full = str(error), isinstance(error, DiskFull)
            self._dirty = True
            self.say("disk", f"Sitting out: {error} {error.hint}", logging.ERROR)
            return
        if self.trouble:
            self.trouble = ""
            self.say("disk", "The state folder can be written again.")


def _earlier(state: StateDir) -> list[dict[str, Any]]:
    """Verdicts of earlier lives; a damaged status file is replaced, nothing depends on it."""
    try:
        verdicts = state.status().get("verdicts", [])
    except LeptonError as error:
        log.warning("starting a new status file: %s", error)
        return []
    return verdicts if isinstance(verdicts, list) else []
