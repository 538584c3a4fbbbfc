"""What this device brings to a round: the tasks its owner allows, and the owner's data.

An ``Office`` lives as long as the agent and keeps models and data between rounds; torch is imported when it
answers for the first time.
"""

import logging
import os
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING

from lepton_client.config import LimitsSection, TaskSection
from lepton_client.contracts import Contracts
from lepton_client.fingerprint import fingerprint
from lepton_client.memory import FileMemory
from lepton_client.spending import Spending
from lepton_fl.errors import BudgetRefused, DataError, LeptonError, Rejection, TaskError

if TYPE_CHECKING:
    from lepton_client.material import Material
    from lepton_fl.privacy.example import Spent
    from lepton_fl.tasks.data import Dataset
    from lepton_fl.training.trainer import Trainer
    from lepton_fl.wire.messages import Request, Ticket
    from lepton_fl.wire.records import Records

log = logging.getLogger(__name__)


class Office:
    """Answers requests; used by one thread at a time."""

    def __init__(
        self,
        sections: tuple[TaskSection, ...],
        limits: LimitsSection,
        distrust: Callable[[], None],
        memory: FileMemory | None = None,
        spending: Spending | None = None,
        refused: Callable[[str], None] = lambda why: None,
        *,
        secure: bool = False,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            sections: The allow-list.
            limits: How many threads compute.
            distrust: Called when data turn out to be bad, so that they are inspected again.
            memory: What this device remembers of its runs; None = nothing.
            spending: What its rows have paid; None = it trains nothing that is charged.
            refused: Told why a budget allowed something not; '' when the next charge was allowed.
            secure: Answer no round in which the coordinator sees this device by itself.
        """
        self._secure = secure
        self._sections, self._limits, self._distrust = sections, limits, distrust
        self.memory = memory
        self._spending, self._refused = spending, refused
        self.contracts: Contracts | None = None  # of private runs, once the state folder is ours
        self._trainers: dict[str, Trainer] = {}
        self._materials: dict[str, Material] = {}

    def __call__(self, records: "Records", should_stop: Callable[[], bool]) -> "Records":
        """Do what a request asks; a failure becomes the answer."""
        if self._secure:
            return _refuse_plain(records)
        from lepton_fl.rounds.quantised import compressed

        return compressed(records, self.respond(records, should_stop), os.urandom)

    def respond(self, records: "Records", should_stop: Callable[[], bool]) -> "Records":
        """The same, of a round that hides this device."""
        if self.contracts is not None and (refusal := self.contracts.refusal(records)) is not None:
            return refusal
        import torch

        torch.set_num_threads(self._limits.threads)
        from lepton_fl.training.respond import respond

        return respond(records, _Desk(self, should_stop))

    def trainer(self, name: str) -> "Trainer":
        """The trainer of an allowed task; raises TaskError for any other."""
        if name not in self._trainers:
            from lepton_client.material import load_section_task
            from lepton_fl.training.trainer import Trainer

            self._trainers[name] = Trainer(load_section_task(self._section(name)))
        return self._trainers[name]

    def data(self, name: str, kind: str) -> "Dataset":
        """Rows to train on or evaluate with; read again when the files behind them changed."""
        section = self._section(name)
        known = self._materials.get(name)
        if known is None or known.fingerprint != fingerprint(section):
            from lepton_client.material import load_material

            try:
                known = self._materials[name] = load_material(self.trainer(name).task, section)
            except LeptonError:
                self._materials.pop(name, None)
                self._distrust()
                raise
        if kind == "train":
            return known.train
        if len(known.evaluate) == 0:
            raise DataError(
                "This device keeps no rows for evaluation.", hint="Set held_out in its data source."
            )
        return known.evaluate

    def spend(self, request: "Request", rows: int | None) -> "Spent | None":
        """Charge the rows of a task, or refuse what they must not pay; the owner hears why.

        Raises:
            BudgetRefused: the owner's budget, the run's, or the number of rows does not allow it.
            StateError: it could not be written down.
        """
        section = self._section(request.task)
        try:
            if rows is not None:
                spent = self._charge(section, request, rows)
                self._refused("")
                return spent
            if section.privacy is not None:
                raise BudgetRefused(
                    f"The owner of this device allows {section.reference} only with example-level privacy, "
                    f"and this {request.ticket.kind} request has none.",
                    hint="Start the run with privacy.unit = 'example', and evaluate on central data.",
                )
        except BudgetRefused as refusal:
            self._refused(str(refusal))
            raise
        return None

    def _charge(self, section: TaskSection, request: "Request", rows: int) -> "Spent":
        from lepton_fl.privacy.example import Spent, charge_of

        if self._spending is None:
            raise BudgetRefused("This device keeps no privacy budget.")
        charge = charge_of(request.local, rows)
        return Spent(charge, self._spending.charge(section.reference, request.ticket, charge))

    def _section(self, name: str) -> TaskSection:
        from lepton_client.material import name_of

        for section in self._sections:
            if name in (section.reference, name_of(section)):
                return section
        raise TaskError(
            f"The owner of this device does not allow the task {name[:200]!r}.",
            hint="Tasks are allowed one by one, in the [[tasks]] of the device's configuration.",
        )


def _refuse_plain(records: "Records") -> "Records":
    """The answer to a plain round of a device that must not be seen by itself: no data are touched."""
    from lepton_fl.wire.messages import Failure, Fields, Ticket

    ticket = Ticket.take(Fields(records.config))
    log.warning("sits out %s round %d: it is not aggregated securely", ticket.kind, ticket.round)
    why = "The owner of this device allows secure aggregation only, and this round would show its answer."
    return Failure(ticket, Rejection.FAILED, why).to_records()


class _Desk:
    """An ``Office`` at work on one request; see ``lepton_fl.training.respond.Desk``."""

    def __init__(self, office: Office, should_stop: Callable[[], bool]) -> None:
        self._office, self.should_stop = office, should_stop

    def trainer(self, task: str) -> "Trainer":
        return self._office.trainer(task)

    def data(self, task: str, kind: str) -> "Dataset":
        return self._office.data(task, kind)

    def memory(self) -> FileMemory | None:
        return self._office.memory

    def spend(self, request: "Request", rows: int | None) -> "Spent | None":
        return self._office.spend(request, rows)

    def seed(self, ticket: "Ticket") -> int:
        """Nobody may predict the order of the batches: part of what hides a single row."""
        return secrets.randbits(63)
