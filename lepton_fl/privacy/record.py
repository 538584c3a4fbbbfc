"""The privacy ledger as a record that anybody can check, without the coordinator and its database.

    report = verify(lines)                  # of `lepton privacy export`; StateCorrupt names the first lie
    report.budgets[0].spent                 # computed anew from the events, by our accountant

Rules:

* Every release is a *charge* to accounts: its run's, its task's, the fleet's, and those of the groups of
  devices that could take part. A *budget* caps one account; what it allows is a signed policy, and changes
  only by the next signed policy.
* A charge is ``reserved``, perhaps ``releasing`` (from then on it may be public), then ``committed`` or
  ``voided``. All but voided charges count, whether they are settled or not.
* Each line names the hash of the one before it, and its own hash covers all of it.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from lepton_fl.errors import BudgetRefused, ConfigError, LeptonError, StateCorrupt, TrustError
from lepton_fl.files import GENESIS, canonical_json, event_hash
from lepton_fl.privacy.accounting import Adjacency
from lepton_fl.privacy.budget import Budget, admit, clearly_affordable, epsilon_of, refuse_overspent
from lepton_fl.privacy.events import Event, from_json

if TYPE_CHECKING:
    from lepton_fl.crypto import PrivateKey

FORMAT: Final = "lepton privacy ledger 1"
SUBJECT: Final = "privacy"  # of the ledger's events in the journal
FLEET: Final = "fleet"  # every device
ANYBODY: Final = "anybody"  # charged by runs that any device could take part in: counts for every group
SCOPES: Final = {"run": "model", "task": "task", "group": "population", FLEET: "population"}
TRUSTS: Final = ("central", "distributed", "local")
TOLERANCE: Final = 1e-9  # relative, between two computations of one epsilon

Unit = Literal["device", "example"]
Trust = Literal["central", "distributed", "local"]
Key = tuple[str, int, int]  # run, round, attempt


# ----------------------------------------------------------------------------------- who pays for what


def accounts_of(run_id: str, task: str, groups: Iterable[str]) -> tuple[str, ...]:
    """What a release of a run is charged to."""
    members = tuple(f"group:{label}" for label in sorted(set(groups))) or (ANYBODY,)
    return (f"run:{run_id}", f"task:{task}", FLEET, *members)


def reads(account: str) -> tuple[str, ...]:
    """The accounts whose charges a budget on ``account`` adds up."""
    return (account, ANYBODY) if account.startswith("group:") else (account,)


def scope_of(account: str) -> str:
    """``model``, ``task`` or ``population``; the name of an account must be one of ours.

    Raises:
        ConfigError: it is not.
    """
    kind, colon, name = account.partition(":")
    if kind not in SCOPES or bool(colon and name) == (kind == FLEET):
        raise ConfigError(
            f"Expected an account 'run:ID', 'task:REFERENCE', 'group:LABEL' or 'fleet', got {account!r}."
        )
    return SCOPES[kind]


@dataclass(frozen=True)
class Charge:
    """One attempt at a release, and the accounts that pay."""

    key: Key
    events: tuple[str, ...]  # as JSON; empty = paid already by an earlier charge
    accounts: tuple[str, ...]
    unit: Unit = "device"
    trust: Trust = "central"  # who sees what is not yet private


@dataclass(frozen=True)
class Policy:
    """What one account allows: the content of a signed row."""

    account: str
    version: int  # 1, 2, 3 …
    epsilon: float
    delta: float
    unit: Unit = "device"
    trust: Trust = "central"  # against whom it protects
    adjacency: Adjacency = "zero-out"
    accountant: Literal["auto", "gdp", "rdp"] = "auto"
    note: str = ""

    @property
    def budget(self) -> Budget:
        """Its arithmetic.

        Raises:
            ConfigError: no epsilon or delta that a budget can have.
        """
        return Budget(
            self.account, self.epsilon, self.delta, self.unit, self.trust, self.adjacency, self.accountant
        )

    def counts(self, trust: str) -> bool:
        """Whether charges of this trust are added up here, rather than refused.

        What hides a device from the coordinator hides it from everybody else, too. A charge under central
        trust breaks a promise of distributed trust altogether.
        """
        return self.trust == "central" or trust == self.trust

    # ------------------------------------------------------------------------------------- signatures

    def signed_bytes(self) -> bytes:
        """What a signature covers."""
        return canonical_json(
            ["lepton privacy budget v1", {f.name: getattr(self, f.name) for f in fields(self)}]
        )

    def sign(self, key: "PrivateKey") -> str:
        """ECDSA over P-256 and SHA-256, base64."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        return base64.b64encode(key.sign(self.signed_bytes(), ec.ECDSA(hashes.SHA256()))).decode("ascii")

    def check(self, signature: str, public_key: bytes) -> None:
        """Check a signature against a key (DER SubjectPublicKeyInfo).

        Raises:
            TrustError: somebody else has signed this, or something else.
        """
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        from lepton_fl.crypto import public_from_der

        try:
            found = base64.b64decode(signature, validate=True)
            public_from_der(public_key).verify(found, self.signed_bytes(), ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, ValueError) as error:
            raise TrustError(
                f"Version {self.version} of the budget {self.account!r} is not signed by the budget key.",
                hint="It was written past `lepton privacy budget`. Nothing is released under it.",
            ) from error


def refuse_beyond(policy: Policy, counts: Mapping[Event, int], charge: Charge) -> None:
    """Refuse a charge that a budget cannot afford.

    Args:
        policy: of an account that pays.
        counts: everything reserved or committed there so far, counted.
        charge: what is asked for.

    Raises:
        BudgetRefused: it would pass the cap, or the promise is one that the charge cannot keep.
    """
    if not policy.counts(charge.trust):
        raise BudgetRefused(
            f"Budget {policy.account!r} promises trust={policy.trust!r}; this release is under "
            f"{charge.trust!r} trust, where the coordinator sees what is not yet private.",
            budget=policy.account,
            asked=float("inf"),
            hint="Start a run whose privacy.trust is the budget's.",
        )
    budget, total = policy.budget, dict(counts)
    if not charge.events:
        refuse_overspent(budget, total)
    for event in map(from_json, charge.events):
        if not clearly_affordable(budget, total, event):
            admit(budget, total, event)
        total[event] = total.get(event, 0) + 1


# ----------------------------------------------------------------------------------------- verification


@dataclass(frozen=True)
class BudgetReport:
    """One budget after the last line."""

    policy: Policy
    spent: float  # epsilon, of everything that is not voided
    overspent_by: tuple[str, ...] = ()  # the charges found later that made it more than was allowed


@dataclass(frozen=True)
class LedgerReport:
    """What a whole ledger proves."""

    events: int
    releases: int  # committed
    voided: int
    unsettled: int  # reserved and never settled: they count as spent
    head: str  # hash of the last line
    key: str  # fingerprint of the key that signs budgets; empty without one
    budgets: tuple[BudgetReport, ...]


@dataclass
class _State:
    charges: dict[Key, Charge] = field(default_factory=dict)
    states: dict[Key, str] = field(default_factory=dict)
    policies: dict[tuple[str, str, str], Policy] = field(default_factory=dict)
    counts: dict[tuple[str, str, str], dict[Event, int]] = field(default_factory=dict)  # account, unit, trust
    violations: dict[str, list[str]] = field(default_factory=dict)  # account -> charges found later
    key: bytes = b""


class Verifier:
    """Takes the ledger's events one by one, oldest first, and refuses the first that is not true."""

    def __init__(self, public_key: bytes | None = None) -> None:
        """Begin with an empty ledger.

        Args:
            public_key: that must have signed the budgets (DER); None = the key of the first budget.
        """
        self._pinned = public_key
        self._state = _State(key=public_key or b"")
        self._seq, self._last, self._seen = 0, GENESIS, 0

    def take(self, line: Mapping[str, Any]) -> None:
        """The next event: seq, time, kind, subject, body, prev and hash.

        Raises:
            StateCorrupt: names the event and what is wrong.
        """
        try:
            seq, kind, body = int(line["seq"]), str(line["kind"]), dict(line["body"])
            text = canonical_json(body).decode()
            found = event_hash(line["prev"], seq, line["time"], kind, line["subject"], text)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise StateCorrupt(f"A line of the ledger is no event ({type(error).__name__}).") from error
        if found != line["hash"] or line["subject"] != SUBJECT:
            raise StateCorrupt(f"Event {seq} ({kind}) was altered: its hash does not match.")
        if seq <= self._seq or body.get("previous") != self._last:
            raise StateCorrupt(f"Event {seq} ({kind}) does not continue event {self._seq}: one is missing.")
        try:
            self._apply(kind, body)
        except StateCorrupt:
            raise
        except (LeptonError, KeyError, TypeError, ValueError) as error:
            raise StateCorrupt(f"Event {seq} ({kind}): {error}") from error
        self._seq, self._last, self._seen = seq, found, self._seen + 1

    def report(self) -> LedgerReport:
        """What the events so far prove."""
        states, state = list(self._state.states.values()), self._state
        budgets = tuple(
            BudgetReport(p, epsilon_of(p.budget, self._total(p)), tuple(state.violations.get(p.account, ())))
            for p in state.policies.values()
        )
        from lepton_fl.crypto import fingerprint

        return LedgerReport(
            self._seen,
            states.count("committed"),
            states.count("voided"),
            states.count("reserved") + states.count("releasing"),
            self._last,
            fingerprint(state.key) if state.key else "",
            budgets,
        )

    def _apply(self, kind: str, body: dict[str, Any]) -> None:
        if kind == "budget.set":
            return self._set(body)
        key: Key = (str(body["run_id"]), int(body["round"]), int(body["attempt"]))
        state = self._state.states.get(key)
        expected: dict[str, tuple[str | None, ...]] = {
            "privacy.reserved": (None,),
            "privacy.releasing": ("reserved",),
            "privacy.committed": ("releasing",),
            "privacy.voided": ("reserved", "releasing"),
        }
        if kind not in expected or state not in expected[kind]:
            raise StateCorrupt(f"{kind} of {_shown(key)}, which is {state or 'not reserved'}.")
        if kind == "privacy.reserved":
            self._reserve(charge_of(body))
        elif kind == "privacy.committed":
            self._commit(key, body["extra"])
        elif kind == "privacy.voided":
            if not str(body["evidence"]).strip():
                raise StateCorrupt(f"{_shown(key)} is voided without evidence.")
            self._count(self._state.charges[key], self._state.charges[key].events, -1)
        self._state.states[key] = kind.partition(".")[2]

    def _set(self, body: dict[str, Any]) -> None:
        policy = policy_of(body)
        scope_of(policy.account)
        state, key = self._state, base64.b64decode(body["key"])
        if state.key and key != state.key:
            raise StateCorrupt(f"the budget {policy.account!r} is signed by another key")
        policy.check(str(body["signature"]), key)
        place = (policy.account, policy.unit, policy.trust)
        known = state.policies.get(place)
        if policy.version != (known.version + 1 if known else 1):
            raise StateCorrupt(f"version {policy.version} of {policy.account!r} is out of turn")
        state.key, state.policies[place] = key, policy

    def _reserve(self, charge: Charge) -> None:
        for policy in self._covering(charge):
            try:
                refuse_beyond(_widened(policy), self._total(policy), charge)
            except BudgetRefused as refusal:
                raise StateCorrupt(f"{_shown(charge.key)} should have been refused: {refusal}") from None
        self._state.charges[charge.key] = charge
        self._count(charge, charge.events, 1)

    def _commit(self, key: Key, extra: list[str]) -> None:
        charge = self._state.charges[key]
        self._count(charge, tuple(extra), 1)
        for policy in self._covering(charge) if extra else ():
            self._state.violations.setdefault(policy.account, []).append(_shown(key))

    def _covering(self, charge: Charge) -> list[Policy]:
        """By key, not by search: there is a budget a run."""
        policies, accounts = self._state.policies, list(charge.accounts)
        if ANYBODY in accounts:
            accounts += sorted({account for account, _, _ in policies if account.startswith("group:")})
        places = [(account, charge.unit, trust) for account in accounts for trust in TRUSTS]
        return [policies[place] for place in places if place in policies]

    def _count(self, charge: Charge, events: tuple[str, ...], by: int) -> None:
        for account in charge.accounts:
            counts = self._state.counts.setdefault((account, charge.unit, charge.trust), {})
            for event in map(from_json, events):
                counts[event] = counts.get(event, 0) + by

    def _total(self, policy: Policy) -> dict[Event, int]:
        total: dict[Event, int] = {}
        for account in reads(policy.account):
            for trust in TRUSTS:
                if policy.counts(trust):
                    for event, count in self._state.counts.get((account, policy.unit, trust), {}).items():
                        total[event] = total.get(event, 0) + count
        return total


def verify(
    lines: Iterable[Mapping[str, Any]], public_key: bytes | None = None, head: str = ""
) -> LedgerReport:
    """Check an export from its first line (the header) to its last.

    Args:
        lines: decoded, in order.
        public_key: that must have signed the budgets (DER); None = the key of the first budget.
        head: a hash noted earlier that must be among the lines: a ledger cut short no longer has it.

    Raises:
        StateCorrupt: names the first thing that is not true.
    """
    verifier, rest = Verifier(public_key), iter(lines)
    header = next(rest, {})
    if header.get("format") != FORMAT:
        raise StateCorrupt(f"Expected an export that begins with format {FORMAT!r}.")
    hashes = {GENESIS}
    for line in rest:
        verifier.take(line)
        hashes.add(str(line["hash"]))
    report = verifier.report()
    if (report.events, report.head) != (header.get("events"), header.get("head")):
        raise StateCorrupt(f"The export announces {header.get('events')} events, {report.events} are there.")
    if head and head not in hashes:
        raise StateCorrupt(f"The head {head[:12]}… that was noted earlier is not part of this ledger.")
    return report


def policy_of(body: Mapping[str, Any]) -> Policy:
    """The policy in a ``budget.set``."""
    return Policy(**{f.name: body[f.name] for f in fields(Policy)})


def charge_of(body: Mapping[str, Any]) -> Charge:
    """The charge in a ``privacy.reserved``."""
    return Charge(
        (str(body["run_id"]), int(body["round"]), int(body["attempt"])),
        tuple(body["events"]),
        tuple(body["accounts"]),
        cast(Unit, body["unit"]),
        cast(Trust, body["trust"]),
    )


def read_export(data: bytes) -> list[Mapping[str, Any]]:
    """The lines of an export, JSON Lines or one JSON array.

    Raises:
        StateCorrupt: it is neither.
    """
    try:
        text = data.decode("utf-8")
        found = (
            json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(row) for row in text.splitlines()]
        )
    except (ValueError, RecursionError) as error:
        raise StateCorrupt(
            "Expected JSON Lines, or one JSON array; the file is cut off or damaged."
        ) from error
    if not all(isinstance(line, dict) for line in found):
        raise StateCorrupt("Expected one JSON object a line.")
    return cast("list[Mapping[str, Any]]", found)


def _widened(policy: Policy) -> Policy:
    """The same with the cap of a computation that rounds otherwise."""
    values = {f.name: getattr(policy, f.name) for f in fields(Policy)}
    return Policy(**values | {"epsilon": policy.epsilon * (1 + TOLERANCE)})


def _shown(key: Key) -> str:
    return f"run {key[0]}, round {key[1]}, attempt {key[2]}"
