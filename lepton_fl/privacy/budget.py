"""The arithmetic of a privacy ledger: reserve, then commit or void. Values in and out, no tables.

A reservation counts as spent from the moment it is made, so two coordinators that race cannot overspend, and
a crash can only lose budget, never privacy. What is not known to be unreleased was released.

    account = Account(Budget("keyboard", epsilon=8.0, delta=1e-6))
    account = account.reserve("run-7/1/1", Gaussian(4.0))     # BudgetRefused when it does not fit
    account = account.commit("run-7/1/1")                     # with what it really cost, if that differs
    account.spent                                             # epsilon so far

States of an entry: ``reserved`` -> ``committed`` or ``voided``, and nothing else. Budgets of different units
or trust are never added up: each release is charged to every budget that encloses it, see
:func:`reserve_all`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf, isfinite
from typing import Literal

from lepton_fl.errors import BudgetRefused, ConfigError, NotFound, StateConflict
from lepton_fl.privacy.accounting import Accountant, Adjacency, Events, GdpExact, RdpGate, best_accountant
from lepton_fl.privacy.events import Event, Gaussian

State = Literal["reserved", "committed", "voided"]


@dataclass(frozen=True)
class Budget:
    """What may be spent, on whom, and against whom it protects."""

    name: str
    epsilon: float
    delta: float
    unit: Literal["example", "device"] = "device"
    trust: Literal["central", "distributed", "local"] = "central"
    adjacency: Adjacency = "zero-out"
    accountant: Literal["auto", "gdp", "rdp"] = "auto"

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and isfinite(self.epsilon)):
            raise ConfigError(f"Expected epsilon > 0 and finite in budget {self.name!r}, got {self.epsilon}.")
        if not 0 < self.delta < 1:
            raise ConfigError(f"Expected 0 < delta < 1 in budget {self.name!r}, got {self.delta}.")

    def reader(self, events: Mapping[Event, int]) -> Accountant:
        """The accountant that decides; both kinds stay valid when later events depend on earlier releases."""
        if self.accountant == "gdp":
            return GdpExact(self.adjacency)
        return (
            RdpGate(self.adjacency) if self.accountant == "rdp" else best_accountant(events, self.adjacency)
        )


# ------------------------------------------------------------------------------------------ grouped events


def epsilon_of(budget: Budget, events: Events, extra: Event | None = None, count: int = 1) -> float:
    """Epsilon of the events, and of ``count`` times ``extra`` on top, at the budget's delta."""
    total = dict(events)
    if extra is not None:
        total[extra] = total.get(extra, 0) + count
    return budget.reader(total).epsilon(total, budget.delta)


def admit(budget: Budget, events: Events, event: Event, count: int = 1) -> float:
    """Epsilon with so many more releases, if the budget allows it.

    The time it takes grows with the number of distinct events, not with that of entries.

    Args:
        budget: the cap.
        events: everything reserved or committed so far, counted.
        event: what is asked for.
        count: how often.

    Raises:
        BudgetRefused: the cap would be passed.
    """
    total = epsilon_of(budget, events, event, count)
    if total <= budget.epsilon:  # written so that NaN refuses
        return total
    spent = epsilon_of(budget, events)
    hint = "Raise the budget by a new signed row, or start a run with more noise."
    if isinstance(event, Gaussian):
        least = smallest_multiplier(budget, events, count)
        hint += f" A noise multiplier of {least:.4g} instead of {event.noise_multiplier:.4g} would fit once."
    raise BudgetRefused(
        f"Budget {budget.name!r} allows epsilon={budget.epsilon:g} at delta={budget.delta:g}; {spent:.6g} is "
        f"spent, and with this release it would be {total:.6g}.",
        budget=budget.name,
        spent=spent,
        asked=total,
        remaining=max(0.0, budget.epsilon - spent),
        largest_affordable=affordable(budget, events, event) // count,
        hint=hint,
    )


def clearly_affordable(budget: Budget, events: Events, event: Event) -> bool:
    """Whether one more release fits by a margin, found without solving for epsilon; False: ask ``admit``."""
    total = dict(events)
    total[event] = total.get(event, 0) + 1
    reader = budget.reader(total)
    return isinstance(reader, GdpExact) and reader.clearly_within(total, budget.epsilon, budget.delta)


def refuse_overspent(budget: Budget, events: Events) -> float:
    """What is spent, if it is not more than the cap: the gate of an attempt that is paid already.

    Raises:
        BudgetRefused: a violation that was found later, or a budget that was lowered, has made it more.
    """
    spent = epsilon_of(budget, events)
    if spent <= budget.epsilon:  # written so that NaN refuses
        return spent
    raise BudgetRefused(
        f"Budget {budget.name!r} allows epsilon={budget.epsilon:g} at delta={budget.delta:g}; "
        f"{spent:.6g} is spent, more than was planned.",
        budget=budget.name,
        spent=spent,
        asked=spent,
        remaining=0.0,
        largest_affordable=0,
        hint="A device took part more often than promised, or the budget was lowered. Raise it by a new "
        "signed row.",
    )


def affordable(budget: Budget, events: Events, event: Event, limit: int = 1_000_000) -> int:
    """How many more such releases fit, at most ``limit``."""

    def fits(count: int) -> bool:
        return epsilon_of(budget, events, event, count) <= budget.epsilon

    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def smallest_multiplier(budget: Budget, events: Events, count: int = 1) -> float:
    """The least noise at which ``count`` more Gaussian releases fit; infinity if no noise is enough."""

    def fits(multiplier: float) -> bool:
        return epsilon_of(budget, events, Gaussian(multiplier), count) <= budget.epsilon

    low, high = 1e-3, 1e6
    if not fits(high):
        return inf
    while high / low > 1 + 1e-6:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


# -------------------------------------------------------------------------------------- the ledger as a value


@dataclass(frozen=True)
class Entry:
    """One charge."""

    key: str  # unique: run, round and attempt
    event: Event  # what counts
    state: State = "reserved"
    evidence: str = ""  # why nothing was released (voided)


@dataclass(frozen=True)
class Account:
    """A budget and its entries; every change is a new value."""

    budget: Budget
    entries: Mapping[str, Entry] = field(default_factory=dict)
    carried: Mapping[Event, int] = field(default_factory=dict)  # committed entries whose keys were forgotten

    @cached_property
    def events(self) -> dict[Event, int]:
        """What counts: everything but the voided."""
        counts = dict(self.carried)
        for entry in self.entries.values():
            if entry.state != "voided":
                counts[entry.event] = counts.get(entry.event, 0) + 1
        return counts

    @cached_property
    def spent(self) -> float:
        """Epsilon of everything reserved and committed, at the budget's delta."""
        return epsilon_of(self.budget, self.events)

    @property
    def remaining(self) -> float:
        """What is left of the cap, never below zero. Epsilons do not add up; see :func:`affordable`."""
        return max(0.0, self.budget.epsilon - self.spent)

    @property
    def exhausted(self) -> bool:
        """Whether the cap is reached or, by a violation found later, passed."""
        return not self.spent < self.budget.epsilon

    # ------------------------------------------------------------------------------------- the transitions

    def reserve(self, key: str, event: Event) -> "Account":
        """Set budget aside, before the first byte that depends on data can leave.

        Raises:
            BudgetRefused: it does not fit; nothing changed.
            StateConflict: there is an entry of this key already.
        """
        if key in self.entries:
            raise StateConflict(f"Entry {key!r} of budget {self.budget.name!r} exists already.")
        admit(self.budget, self.events, event)
        return replace(self, entries={**self.entries, key: Entry(key, event)})

    def commit(self, key: str, actual: Event | None = None) -> "Account":
        """Settle a reservation, in the transaction that stores the release.

        Never refused: what was released was spent, even if a violation makes it more than was reserved.

        Args:
            key: of the reservation.
            actual: what it really cost; None = as reserved.

        Raises:
            NotFound: no such entry.
            StateConflict: it is settled already.
        """
        entry = self._reserved(key)
        return self._with(replace(entry, event=actual or entry.event, state="committed"))

    def void(self, key: str, evidence: str) -> "Account":
        """Give a reservation back, with evidence that nothing was released.

        Raises:
            NotFound: no such entry.
            StateConflict: it is settled already.
            ConfigError: no evidence; unknown means spent.
        """
        if not evidence.strip():
            raise ConfigError(
                f"Expected evidence that {key!r} released nothing.",
                hint="Without it, the reservation stays spent.",
            )
        return self._with(replace(self._reserved(key), state="voided", evidence=evidence))

    def record(self, key: str, event: Event) -> "Account":
        """Add what turned out to have been released, without asking; never refused.

        Raises:
            StateConflict: there is an entry of this key already.
        """
        if key in self.entries:
            raise StateConflict(f"Entry {key!r} of budget {self.budget.name!r} exists already.")
        return self._with(Entry(key, event, "committed"))

    def compacted(self) -> "Account":
        """The same account, its settled entries counted and forgotten: it no longer grows with the run."""
        carried = dict(self.carried)
        for entry in self.entries.values():
            if entry.state == "committed":
                carried[entry.event] = carried.get(entry.event, 0) + 1
        left = {key: entry for key, entry in self.entries.items() if entry.state == "reserved"}
        return replace(self, entries=left, carried=carried)

    def _reserved(self, key: str) -> Entry:
        entry = self.entries.get(key)
        if entry is None:
            raise NotFound(f"There is no entry {key!r} in budget {self.budget.name!r}.")
        if entry.state != "reserved":
            raise StateConflict(f"Entry {key!r} of budget {self.budget.name!r} is {entry.state} already.")
        return entry

    def _with(self, entry: Entry) -> "Account":
        return replace(self, entries={**self.entries, entry.key: entry})


def reserve_all(accounts: Sequence[Account], key: str, event: Event) -> tuple[Account, ...]:
    """Charge every enclosing budget (model, task, population), or none of them.

    Raises:
        BudgetRefused: of the first that cannot afford it.
        StateConflict: one of them has an entry of this key.
    """
    return tuple(account.reserve(key, event) for account in accounts)
