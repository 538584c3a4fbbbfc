"""Where the rounds of a private run are charged: before a device is asked, and settled with the release.

ledger = MemoryLedger(Budget("run-7", epsilon=8.0, delta=1e-6))
ledger.reserve("run-7", 1, 1, event)       # BudgetRefused: nothing may be asked
ledger.commit("run-7", 1, 1)               # or void(..., evidence): nothing was released
"""

from collections.abc import Mapping
from typing import Protocol

from lepton_fl.errors import NotFound, StateConflict
from lepton_fl.privacy.budget import Account, Budget, refuse_overspent
from lepton_fl.privacy.events import Event


class Ledger(Protocol):
    """Charges attempts, named by run, round and attempt; an attempt that is not settled was released.

    Over a database a change is staged, and written in the transaction of the book's next record: what is
    reserved with ``Book.planned`` (which then raises the refusal, before anybody is asked), what is voided
    with ``Book.abandoned``, a commit with the release that ``Book.committed`` stores. Only ``releasing`` is
    written at once.
    """

    def reserve(self, run_id: str, round_number: int, attempt: int, event: Event | None) -> None:
        """Open an attempt and set its budget aside, before anybody is asked.

        Args:
            run_id: of the run.
            round_number: first round: 1.
            attempt: first attempt: 1.
            event: what it costs; None = it is paid already.

        Raises:
            BudgetRefused: it does not fit, or more was spent than there is; nothing changed.
        """
        ...

    def releasing(self, run_id: str, round_number: int, attempt: int, sealed: bytes = b"") -> bytes:
        """Say durably that the release is about to be computed: from now on it may be public.

        An attempt that a crash cut short without this word has released nothing, for nothing was added up.

        Args:
            run_id: of the run.
            round_number: first round: 1.
            attempt: first attempt: 1.
            sealed: what the noise is made of; kept until the release is stored.

        Returns:
            What holds: ``sealed``, or what was given when this very release was begun before a restart.
        """
        ...

    def commit(self, run_id: str, round_number: int, attempt: int) -> None:
        """Settle an attempt that was released."""
        ...

    def void(self, run_id: str, round_number: int, attempt: int, evidence: str) -> None:
        """Settle an attempt of which nothing was released, and say how that is known."""
        ...

    def record(self, run_id: str, round_number: int, attempt: int, event: Event) -> None:
        """Add what an attempt turned out to cost on top; never refused."""
        ...

    def in_doubt(self, run_id: str, round_number: int) -> int:
        """How many attempts at a round were opened and never settled: each may have been released."""
        ...


class MemoryLedger:
    """A ledger for as long as the process lives: for simulations; implements :class:`Ledger`."""

    def __init__(self, budget: Budget, charged: Mapping[Event, int] | None = None) -> None:
        """Open an account.

        Args:
            budget: what may be spent.
            charged: what a run that is continued has spent already, counted.
        """
        self.account = Account(budget, carried=dict(charged or {}))
        self._open: dict[tuple[str, int, int], bool] = {}  # attempt -> whether something is set aside for it

    def reserve(self, run_id: str, round_number: int, attempt: int, event: Event | None) -> None:
        """See ``Ledger``."""
        if (run_id, round_number, attempt) in self._open:
            raise StateConflict(f"Attempt {_key(run_id, round_number, attempt)} is open already.")
        if event is not None:
            self.account = self.account.reserve(_key(run_id, round_number, attempt), event)
        else:
            refuse_overspent(self.account.budget, self.account.events)
        self._open[run_id, round_number, attempt] = event is not None

    def releasing(self, run_id: str, round_number: int, attempt: int, sealed: bytes = b"") -> bytes:
        """See ``Ledger``; a process that ends takes this ledger with it."""
        return sealed

    def commit(self, run_id: str, round_number: int, attempt: int) -> None:
        """See ``Ledger``."""
        if self._settle(run_id, round_number, attempt):
            self.account = self.account.commit(_key(run_id, round_number, attempt)).compacted()

    def void(self, run_id: str, round_number: int, attempt: int, evidence: str) -> None:
        """See ``Ledger``."""
        if self._settle(run_id, round_number, attempt):
            self.account = self.account.void(_key(run_id, round_number, attempt), evidence).compacted()

    def record(self, run_id: str, round_number: int, attempt: int, event: Event) -> None:
        """See ``Ledger``."""
        key = f"{_key(run_id, round_number, attempt)}/on top"
        self.account = self.account.record(key, event).compacted()

    def in_doubt(self, run_id: str, round_number: int) -> int:
        """See ``Ledger``."""
        return sum(key[:2] == (run_id, round_number) for key in self._open)

    def _settle(self, run_id: str, round_number: int, attempt: int) -> bool:
        try:
            return self._open.pop((run_id, round_number, attempt))
        except KeyError:
            raise NotFound(f"Attempt {_key(run_id, round_number, attempt)} is not open.") from None


def _key(run_id: str, round_number: int, attempt: int) -> str:
    return f"{run_id}/{round_number}/{attempt}"
