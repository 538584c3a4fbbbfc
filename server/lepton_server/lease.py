"""One coordinator writes, the others stand by: a lease in the database, with a fencing token.

    lead = Leadership.take(store, folder, standby=True, stopped=ended)    # waits, or refuses
    lead.keep(on_lost)                      # renews it until ``release``

The holder renews every ``RENEW_S``; one that has not done so for ``LIFE_S`` loses it to the first who asks.
A stand-by therefore takes over within ``LIFE_S + RENEW_S`` of the holder's death. A holder that was only
slow cannot write any more: each transaction looks at the token, which grows with every holder.
"""

import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Final, Self

from lepton_fl.errors import LeaseLost, LeptonError, StateError, StateLocked
from lepton_server.doctor import LOCK_FILE
from lepton_server.store import Store

log = logging.getLogger(__name__)

MARK: Final = "restore.unfinished"  # in the state folder, while a backup is put there
LIFE_S: Final = 6.0
RENEW_S: Final = 1.0


class Leadership:
    """The right of one coordinator process to write."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost: LeptonError | None = None  # why this coordinator must end

    @classmethod
    def take(cls, store: Store, folder: Path, *, standby: bool, stopped: threading.Event) -> Self:
        """Get the lease.

        Args:
            store: the shared state.
            folder: of this coordinator; with the host it is its name. After a crash it goes on at once.
            standby: wait for as long as another one lives, else refuse.
            stopped: ends the wait.

        Raises:
            StateLocked: another coordinator holds it, or the wait was ended.
        """
        holder, told = f"{socket.gethostname()}:{folder.absolute()}", False
        while store.take_lease(holder, LIFE_S) is None:
            other = store.lease()
            if not standby or stopped.wait(RENEW_S):
                raise StateLocked(
                    f"The coordinator {other.holder} holds the lease of this database; it was renewed "
                    f"{other.age_s:.1f} s ago.",
                    hint="Stop it, or start this one with --standby: it takes over when the other one ends.",
                )
            if not told:
                log.info("standing by: %s leads", other.holder)
                told = True
        return cls(store)

    def keep(self, on_lost: Callable[[], None]) -> None:
        """Renew the lease from now on; ``on_lost`` is called, once, when another one has it."""
        self._thread = threading.Thread(target=self._renew, args=(on_lost,), name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let the next one in at once."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self._store.drop_lease()
        except LeptonError as error:
            log.debug("the lease was not given back: %s", error)

    def _renew(self, on_lost: Callable[[], None]) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                self._store.renew_lease()
            except LeaseLost as error:
                self.lost = error
                log.error("%s", error)
                on_lost()
                return
            except LeptonError as error:  # it passes, or another one takes over
                log.warning("the lease could not be renewed: %s", error)


def refuse_unfinished(folder: Path) -> None:
    """Check that no restore into a state folder was cut off; raises StateError."""
    if (folder / MARK).exists():
        raise StateError(
            f"A backup was being restored into {folder}, and is not whole.",
            hint="If that was cut off, repeat `lepton backup restore`.",
        )


def claim(folder: Path) -> IO[str]:
    """Lock the state folder for this process; the lock ends with the process, however it ends."""
    file = open(folder / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 - closed by the caller
    try:
        _lock(file)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise StateLocked(
            f"Another coordinator (process {owner}) uses {folder}.",
            hint="Stop it first, or give this one another server.state_dir.",
        ) from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _lock(file: IO[str]) -> None:
    """Try for a moment: `lepton doctor` looks at the lock by touching it."""
    for _ in range(3):
        with suppress(OSError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.05)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
