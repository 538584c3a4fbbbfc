"""One coordinator writes, the others stand by: a lease in the database, with a fencing token.

    lead = Leadership.take(store, folder, standby=True, stopped=ended)    # waits, or refuses
    lead.keep(on_lost)                      # renews it until ``release``

The holder renews every ``RENEW_S``; one that has not done so for ``LIFE_S`` loses it to the first who asks.
A stand-by therefore takes over within ``LIFE_S + RENEW_S`` of the holder's death. A holder that was only
slow cannot write any more: each transaction looks at the token, which grows with every holder.
"""

import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from lepton_fl.errors import LeaseLost, LeptonError, StateLocked
from lepton_server.store import Store

log = logging.getLogger(__name__)

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
