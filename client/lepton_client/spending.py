"""What the rows of this device have paid: its own privacy budget, whatever a coordinator asks.

    spending = Spending(state.spending, {"digits": policy})
    stream = spending.charge("digits", ticket, charge)      # BudgetRefused: nothing is trained
    spending.accounts()                                     # for ``lepton client status``

One file, appended to: a line a charge, each with the hash of the line before it. Rules:

* A charge is on disk and synced before the first row is read for training; only then is there any noise to
  train with. What is on disk is spent, whether an answer was sent or not: unknown means spent.
* A line that a kill or a power cut left half-written was never answered for, so nothing was trained: it is
  cut off. Any other damage ends all private training until the owner looks at it.
* The owner's cap of a task holds for all runs together; a run's own epsilon and number of participations hold
  besides. Charges of several tasks are not added up: give data to one task, or count them yourself.

This is not the list of participations (``ledger``), nor anything of the coordinator's ledger, whose unit is a
device.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lepton_client.config import PrivacyPolicy, TaskSection
from lepton_fl.errors import BudgetRefused, NotFound, StateConflict, StateCorrupt
from lepton_fl.files import append_durably, canonical_json, cut, make_private_folder, read_private

if TYPE_CHECKING:
    from lepton_fl.privacy.budget import Budget
    from lepton_fl.privacy.events import Event
    from lepton_fl.privacy.example import Charge
    from lepton_fl.privacy.noise import Keystream
    from lepton_fl.wire.messages import Ticket

log = logging.getLogger(__name__)

FORMAT: Final = "lepton device budget 1"
_FIRST: Final = hashlib.sha256(FORMAT.encode()).hexdigest()  # what the first line names as its predecessor
_FIELDS: Final = frozenset(
    ("attempt", "count", "delta", "event", "nonce", "prev", "round", "run", "task", "hash")
)


@dataclass(frozen=True)
class Entry:
    """One charge: ``count`` times ``event``, on every row of a task's data."""

    task: str
    run: str
    round: int
    attempt: int
    nonce: str
    event: "Event"
    count: int
    delta: float  # that the run claims; what is spent is told at the owner's

    @property
    def key(self) -> tuple[str, int, int, str]:
        """What makes it unique."""
        return self.run, self.round, self.attempt, self.nonce


class Spending:
    """The budgets of one device; used by one thread at a time."""

    def __init__(self, path: Path, policies: Mapping[str, PrivacyPolicy]) -> None:
        """Nothing is read before something is asked.

        Args:
            path: the file; it need not exist.
            policies: the owner's caps, by task; a task without one has no cap, but its charges are kept.
        """
        self._path, self._policies = path, dict(policies)
        self._entries: list[Entry] | None = None
        self._head, self._length = _FIRST, 0

    def policy(self, task: str) -> PrivacyPolicy | None:
        """The owner's cap of a task; None = there is none."""
        return self._policies.get(task)

    def charge(self, task: str, ticket: "Ticket", charge: "Charge") -> "Keystream":
        """Spend what a training costs, durably.

        Args:
            task: as its owner names it.
            ticket: of the attempt.
            charge: of the round.

        Returns:
            Fresh coins and noise, for this training only.

        Raises:
            BudgetRefused: it does not fit, or the device took part often enough; nothing was written.
            StateConflict: this attempt was charged before, and its noise may be out.
            StateCorrupt, StateError, DiskFull: it could not be written; nothing may be trained.
        """
        from lepton_fl.privacy.noise import Keystream

        entries = self._known()
        entry = Entry(
            task,
            ticket.run_id,
            ticket.round,
            ticket.attempt,
            ticket.nonce,
            charge.event,
            charge.steps,
            charge.delta,
        )
        if any(entry.key == known.key for known in entries):
            raise StateConflict(f"Round {entry.round} of run {entry.run} was charged for before.")
        self._admit(entry, charge)
        self._append(entry)
        return Keystream()

    def accounts(self) -> list[dict[str, Any]]:
        """What is spent of each task's budget; epsilon is on one row, at the owner's delta or the smallest.

        Raises:
            StateCorrupt: the file is damaged.
        """
        entries = self._known()
        return [self._account(task) for task in dict.fromkeys([*self._policies, *(e.task for e in entries)])]

    def _account(self, task: str) -> dict[str, Any]:
        from lepton_fl.privacy.budget import epsilon_of

        mine = [entry for entry in self._known() if entry.task == task]
        policy = self._policies.get(task)
        delta = policy.delta if policy else min(entry.delta for entry in mine)
        budget = _budget(task, policy.epsilon if policy else 1.0, delta)
        return {
            "task": task,
            "unit": budget.unit,
            "trust": budget.trust,
            "adjacency": budget.adjacency,
            "delta": delta,
            "spent": epsilon_of(budget, _counted(mine)) if mine else 0.0,
            "allowed": policy.epsilon if policy else None,
            "rounds": len(mine),
        }

    # ------------------------------------------------------------------------------------- the arithmetic

    def _admit(self, entry: Entry, charge: "Charge") -> None:
        from lepton_fl.privacy.budget import admit

        of_run = [e for e in self._known() if e.run == entry.run]
        if len(of_run) >= charge.participations:
            raise BudgetRefused(
                f"This device has trained {len(of_run)} times in run {entry.run}, which allows "
                f"{charge.participations}.",
                hint="Start a run with more participations; each then costs less of its epsilon.",
            )
        limits = []
        if (policy := self._policies.get(entry.task)) is not None:
            mine = [e for e in self._known() if e.task == entry.task]
            limits.append((_budget(entry.task, policy.epsilon, policy.delta), mine))
        if charge.epsilon:
            limits.append((_budget(f"run {entry.run}", charge.epsilon, charge.delta), of_run))
        for budget, entries in limits:
            try:
                admit(budget, _counted(entries), entry.event, entry.count)
            except BudgetRefused as refusal:
                refusal.hint = "Ask for more noise or fewer rounds; the device's owner sets its budget."
                raise

    # ------------------------------------------------------------------------------------------ the file

    def _known(self) -> list[Entry]:
        if self._entries is None:
            self._entries = self._read()
        return self._entries

    def _read(self) -> list[Entry]:
        try:
            raw = read_private(self._path)
        except NotFound:
            return []
        entries = []
        for number, line in enumerate(raw.split(b"\n")[:-1], 1):  # what is after the last newline is torn
            try:
                entry, self._head = _decode(line, self._head)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, StateCorrupt) as error:
                raise StateCorrupt(
                    f"Line {number} of {self._path} is damaged ({error}).",
                    hint="What was spent is not known. Restore the file from a copy, or keep these data "
                    "out of private training.",
                ) from error
            entries.append(entry)
            self._length += len(line) + 1
        return entries

    def _append(self, entry: Entry) -> None:
        line, head = _encode(entry, self._head)
        make_private_folder(self._path.parent)
        if self._path.exists():
            cut(self._path, self._length)  # a half-written line of an earlier life
        append_durably(self._path, line)
        self._head, self._length = head, self._length + len(line)
        self._known().append(entry)


def policies_of(sections: tuple[TaskSection, ...]) -> dict[str, PrivacyPolicy]:
    """The owner's caps, by the name of the task in the owner's configuration."""
    return {section.reference: section.privacy for section in sections if section.privacy is not None}


def _budget(name: str, epsilon: float, delta: float) -> "Budget":
    from lepton_fl.privacy.budget import Budget

    return Budget(name, epsilon, delta, unit="example", trust="local")


def _counted(entries: list[Entry]) -> "dict[Event, int]":
    counts: dict[Event, int] = {}
    for entry in entries:
        counts[entry.event] = counts.get(entry.event, 0) + entry.count
    return counts


def _encode(entry: Entry, prev: str) -> tuple[bytes, str]:
    """A line, and its hash."""
    from lepton_fl.privacy.events import to_json

    body: dict[str, Any] = vars(entry) | {"event": json.loads(to_json(entry.event)), "prev": prev}
    digest = hashlib.sha256(canonical_json(body)).hexdigest()
    return canonical_json(body | {"hash": digest}) + b"\n", digest


def _decode(line: bytes, prev: str) -> tuple[Entry, str]:
    """A line's entry and hash; raises whatever is wrong with it."""
    from lepton_fl.privacy.events import from_json

    body = json.loads(line)
    if set(body) != _FIELDS:
        raise ValueError("it has other fields")
    digest = body.pop("hash")
    if body.pop("prev") != prev:
        raise ValueError("it does not follow the line before")
    if hashlib.sha256(canonical_json(body | {"prev": prev})).hexdigest() != digest:
        raise ValueError("its hash does not match")
    event = from_json(json.dumps(body.pop("event")))
    entry = Entry(event=event, **body)
    if not (type(entry.count) is int and entry.count > 0 and 0 < entry.delta < 1):
        raise ValueError("its numbers are out of bounds")
    return entry, str(digest)
