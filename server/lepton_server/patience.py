"""What a run does when its disk is full or its database is held by another: it waits, and says for what.

Trouble of that kind passes, and a model that cost the fleet a round must not be lost over it. So a write is
tried again until it works. The cause is in the log, in ``/metrics`` and, if the database takes it, in
``lepton run show``. Two things end the wait: the coordinator shuts down (the run is continued later), or the
operator stops the run.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from lepton_fl.errors import ConnectionFailed, DiskFull, LeptonError, StateConflict, StateLocked
from lepton_server.ops import Meters
from lepton_server.store import Store

log = logging.getLogger(__name__)

RETRY_S = 2.0  # between two tries
PASSING = (DiskFull, StateLocked, ConnectionFailed)  # ends by itself or by what an operator does elsewhere


class Interrupted(Exception):
    """The coordinator shuts down: the run is left as it is, to be continued."""


class Stopped(Exception):
    """The operator has stopped the run; the message says where it was."""


class Patience:
    """The writes of one run."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        meters: Meters,
        *,
        closing: threading.Event,
        stopping: Callable[[], bool] = lambda: False,
        waits: Callable[[LeptonError | None, float], None] = lambda error, until: None,
    ) -> None:
        """Make it.

        Args:
            store: where a cause of waiting is shown.
            run_id: the run.
            meters: ``lepton_run_waiting`` is 1 during a wait.
            closing: set when the coordinator shuts down.
            stopping: whether the run was asked to stop.
            waits: told why a write does not work, and when it is tried again; None = it has worked.
        """
        self._waits = waits
        self._store, self._run_id, self._meters = store, run_id, meters
        self._closing, self._stopping = closing, stopping

    def insist(self, write: Callable[[], object], *, even_if_stopped: bool = False) -> None:
        """Call ``write``, which does all or nothing, until it has worked.

        Args:
            write: records something of this run.
            even_if_stopped: a request to stop does not end the wait: this is the record of the stop.

        Raises:
            Interrupted: the coordinator shut down meanwhile.
            Stopped: the operator stopped the run meanwhile.
            LeptonError: trouble that waiting cannot mend.
        """
        shown, unsure = "", False
        while True:
            try:
                write()
            except PASSING as error:
                shown, unsure = self._show(error, shown), unsure or isinstance(error, ConnectionFailed)
            except StateConflict:
                if not unsure:
                    raise
                break  # the connection was lost in a commit that had worked: nobody else writes this
            else:
                break
            self._wait(shown, even_if_stopped)
        if shown:
            self._waits(None, 0.0)
            self._record("", 0.0)
            self._meters.waiting.labels(self._run_id).set(0)
            log.info("run %s moves again", self._run_id)

    def _show(self, error: LeptonError, shown: str) -> str:
        cause = str(error)
        self._waits(error, time.time() + RETRY_S)
        if cause != shown:
            log.error("run %s waits: %s %s", self._run_id, cause, error.hint)
            self._meters.waiting.labels(self._run_id).set(1)
            self._record(cause, time.time() + RETRY_S)
        return cause

    def _record(self, cause: str, until: float) -> None:
        body = {"run_id": self._run_id, "cause": one_line(cause), "until": until}
        with contextlib.suppress(LeptonError):  # a row may fit where a model does not; if not, the log has it
            self._store.record("run.waiting", self._run_id, body)

    def _wait(self, cause: str, even_if_stopped: bool) -> None:
        if self._closing.wait(RETRY_S):
            raise Interrupted
        if self._stopping() and not even_if_stopped:
            raise Stopped(f"Stopped on request while it waited: {cause}")


def one_line(text: str, limit: int = 2000) -> str:
    """Words for the journal, which takes neither control characters nor half characters nor long tales."""
    words = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(words.split())[:limit]
