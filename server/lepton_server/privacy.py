"""Private runs of a coordinator: their keys, their budgets, and the ledger that says no.

    keys = PrivacyKeys(state_dir / "keys", config.privacy)
    guard = guard_run(store, keys, run_id, spec, ready)          # opens the run's budget
    Campaign(..., private=guard.rounds, book=RunBook(..., ledger=guard.ledger))

Rules. A charge is written in the transaction that plans the round, before anybody is asked, and judged there
by every budget it falls under. It is committed in the transaction that stores the model and the mechanism's
sealed memory. A round that a crash cut short before its release was begun has released nothing, and that it
was not begun is the evidence; one that was cut short later counts as spent.
"""

import base64
import contextlib
import os
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from lepton_fl.crypto import PrivateKey, key_from_pem, key_to_pem, new_key, public_der
from lepton_fl.errors import BudgetRefused, ConfigError, NotFound, StateConflict, StateCorrupt, TrustError
from lepton_fl.files import BlobStore, read_private, remove, write_private
from lepton_fl.plan import RoundPlan, RunSpec
from lepton_fl.privacy.budget import epsilon_of
from lepton_fl.privacy.events import Event, from_json, to_json
from lepton_fl.privacy.planning import Prepared
from lepton_fl.privacy.record import FLEET, Charge, Key, Policy, accounts_of, refuse_beyond, scope_of
from lepton_fl.privacy.sealing import KEY_BYTES
from lepton_fl.rounds.private import PrivateRounds, PrivateState, budget_of
from lepton_server.config import PrivacySection
from lepton_server.store import ChargeRecord, SignedBudget, Store, Transaction

Insist = Callable[[Callable[[], object]], object]  # see ``patience.Patience.insist``

SPENT = ("reserved", "releasing", "committed")  # of a charge: all but voided
NOT_BEGUN = "The coordinator ended before the release was begun; nothing was added up."


# --- keys -------------------------------------------------------------------------------------------


class PrivacyKeys:
    """The key that seals noise, and the key that signs budgets; files of mode 0600, made at first need."""

    def __init__(self, folder: Path, config: PrivacySection) -> None:
        """Nothing is read or made yet.

        Args:
            folder: where keys lie that the configuration does not name.
            config: may name other files.
        """
        self._noise = config.noise_key or folder / "noise.key"
        self._budget = config.budget_key or folder / "budget.key"

    def noise(self, *, make: bool) -> bytes:
        """The key under which remembered noise is sealed, 32 bytes.

        Args:
            make: whether a missing one is made; a run that has sealed something needs the one it had.

        Raises:
            NotFound: it is missing.
            TrustError: others can read it.
            StateCorrupt: it is no key.
        """
        if make:
            _make_once(self._noise, lambda: secrets.token_bytes(KEY_BYTES))
        key = self._read(self._noise, "The noise of runs under way cannot be opened without it: restore it.")
        if len(key) != KEY_BYTES:
            raise StateCorrupt(f"Expected {KEY_BYTES} bytes in {self._noise}, got {len(key)}.")
        return key

    @property
    def can_sign(self) -> bool:
        """Whether there is a key that signs budgets already."""
        return self._budget.exists()

    def signer(self) -> PrivateKey:
        """The key that signs budgets, P-256."""
        _make_once(self._budget, lambda: key_to_pem(new_key()))
        return key_from_pem(self._read(self._budget, ""))

    def public(self) -> bytes:
        """Its public half, DER: what budgets are checked against."""
        return public_der(self.signer().public_key())

    def _read(self, path: Path, hint: str) -> bytes:
        try:
            return read_private(path)
        except NotFound as error:
            raise NotFound(str(error), hint=hint) from error


def _make_once(path: Path, make: Callable[[], bytes]) -> None:
    """Make a key file unless it is there; of two processes that try, one wins."""
    if path.exists():
        return
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    write_private(fresh, make())
    try:
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        remove(fresh)


# --- budgets ----------------------------------------------------------------------------------------


def set_budget(change: Transaction, keys: PrivacyKeys, policy: Policy) -> Policy:
    """Sign what an account allows from now on, as the next version; earlier charges count, too.

    Args:
        change: in which it is recorded.
        keys: with the budget key.
        policy: its version is filled in.

    Raises:
        ConfigError: no account, epsilon or delta that a budget can have.
        TrustError: the version before is signed by another key.
    """
    scope_of(policy.account)
    _ = policy.budget  # its bounds
    known = [
        b
        for b in change.budgets_over([policy.account], policy.unit)
        if (b.policy.account, b.policy.trust) == (policy.account, policy.trust)
    ]
    for before in change.budgets_over(None, policy.unit):
        if before.key != keys.public():  # the one that had signed is lost: nothing new is signed in its place
            raise TrustError(
                f"The budget {before.policy.account!r} is not signed by the budget key of this coordinator.",
                hint="Restore the budget key (privacy.budget_key) from a copy.",
            )
    for before in known:
        before.policy.check(before.signature, keys.public())
    signed = replace(policy, version=known[0].policy.version + 1 if known else 1)
    key = keys.signer()
    row = {f.name: getattr(signed, f.name) for f in fields(signed)}
    row["key"] = base64.b64encode(public_der(key.public_key())).decode("ascii")
    change.record("budget.set", row | {"signature": signed.sign(key)})
    return signed


class Ledger:
    """The store's ledger for one run (``rounds.ledger.Ledger``); what is staged is written by the book."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        spec: RunSpec,
        budget_key: bytes,
        insist: Insist = lambda write: write(),
        blobs: BlobStore | None = None,
    ) -> None:
        """Use the ledger; nothing is charged yet.

        Args:
            store: the coordinator's state.
            run_id: of the run.
            spec: of it, with ``privacy``.
            budget_key: that must have signed every budget (DER).
            insist: repeats a write until trouble that passes has passed.
            blobs: keeps what the noise of an open release is made of; None = a release that a crash cuts off
                is repeated, and charged again.
        """
        if spec.privacy is None:
            raise ConfigError(f"Run {run_id} asks for no privacy.")
        self._blobs, self.noise_sha256 = blobs, ""
        self._store, self._run_id, self._insist, self._budget_key = store, run_id, insist, budget_key
        self._accounts = accounts_of(run_id, spec.task, spec.cohort.groups)
        self._unit, self._trust = spec.privacy.unit, spec.privacy.trust
        self._checked: set[tuple[str, int, str]] = set()  # signed rows that were checked
        self._reserved: Charge | None = None
        self._voided: tuple[Key, str] | None = None
        self._committed: tuple[Key, list[Event]] | None = None
        self._extra: list[Event] = []

    # what rounds say

    def reserve(self, run_id: str, round_number: int, attempt: int, event: Event | None) -> None:
        """Stage a charge; ``write_reserved`` writes or refuses it."""
        events = () if event is None else (to_json(event),)
        self._reserved = Charge(
            (run_id, round_number, attempt), events, self._accounts, self._unit, self._trust
        )
        self._extra = []

    def releasing(self, run_id: str, round_number: int, attempt: int, sealed: bytes = b"") -> bytes:
        """Write it down, durably, if planning has not done so."""
        if self._trust == "distributed":
            return sealed
        key = run_id, round_number, attempt
        for begun in charges_begun(self._store, key):
            self.noise_sha256 = begun.state_sha256 or ""
            return self._blobs.read(self.noise_sha256) if self._blobs and self.noise_sha256 else b""
        self._insist(lambda: self._write_releasing(key, sealed))
        return sealed

    def _write_releasing(self, key: Key, sealed: bytes) -> None:
        if sealed and self._blobs:
            self.noise_sha256 = self._blobs.put(sealed)
        with self._store.transaction() as change:
            body = _attempt(key) | {"noise_sha256": self.noise_sha256 or None}
            change.record("privacy.releasing", body)
            change.move(*key, "noised")

    def commit(self, run_id: str, round_number: int, attempt: int) -> None:
        """Stage it; ``write_committed`` writes it with the release."""
        self._committed = (run_id, round_number, attempt), self._extra

    def void(self, run_id: str, round_number: int, attempt: int, evidence: str) -> None:
        """Stage it; ``write_voided`` writes it."""
        self._voided = (run_id, round_number, attempt), evidence

    def record(self, run_id: str, round_number: int, attempt: int, event: Event) -> None:
        """Stage what is to be charged on top, in the commit of the same attempt."""
        self._extra.append(event)

    def in_doubt(self, run_id: str, round_number: int) -> int:
        """Attempts whose release was begun and not stored."""
        found = self._store.charges(run_id, states=("reserved", "releasing"))
        return sum(c.round == round_number for c in found)

    # what the book writes

    def write_reserved(self, change: Transaction) -> None:
        """Set the staged charge aside in every budget that it falls under, or in none.

        Raises:
            BudgetRefused: of the first that cannot afford it; the transaction must not go on.
            TrustError: a budget was not signed by the budget key.
        """
        charge = self._reserved
        if charge is None:
            return
        if (missed := change.missed_head()) is not None:
            raise BudgetRefused(
                f"A device has seen event {missed} of the privacy ledger, and it is not here: this database "
                "is an older copy, and what is missing was spent.",
                budget=FLEET,
                asked=float("inf"),
                hint="Restore the newest copy. Nothing private is released under this one.",
            )
        for budget, counts in change.covering(charge.accounts, charge.unit):
            self._check(budget)
            refuse_beyond(budget.policy, counts, charge)
        body = _attempt(charge.key) | {"events": list(charge.events), "accounts": list(charge.accounts)}
        change.record("privacy.reserved", body | {"unit": charge.unit, "trust": charge.trust})
        if (
            charge.trust == "distributed"
        ):  # devices release, at a moment that a coordinator may not live to tell
            change.record("privacy.releasing", _attempt(charge.key))

    def write_committed(self, change: Transaction, model_sha256: str, state_sha256: str | None) -> None:
        """Settle the staged release, with the artefacts that this transaction names."""
        if self._committed is None:
            return
        key, extra = self._committed
        body = _attempt(key) | {"model_sha256": model_sha256, "state_sha256": state_sha256}
        change.record("privacy.committed", body | {"extra": [to_json(event) for event in extra]})

    def write_voided(self, change: Transaction) -> None:
        """Give back what the staged attempt had set aside."""
        if self._voided is not None:
            key, evidence = self._voided
            change.record("privacy.voided", _attempt(key) | {"evidence": evidence[:2000]})

    def settled(self) -> None:
        """What was staged is written."""
        self._reserved = self._voided = self._committed = None
        self.noise_sha256 = ""

    def _check(self, budget: SignedBudget) -> None:
        place = (budget.policy.account, budget.policy.version, budget.signature)
        if place not in self._checked:
            budget.policy.check(budget.signature, self._budget_key)
            self._checked.add(place)


def void_unbegun(change: Transaction, run_id: str, evidence: str = NOT_BEGUN) -> None:
    """Give back what attempts had set aside whose release was never begun; for a run that nobody drives.

    Whether one that was begun was released is known to the process only that had begun it.
    """
    for charge in change.charges(run_id, ("reserved",)):
        key = charge.run_id, charge.round, charge.attempt
        change.record("privacy.voided", _attempt(key) | {"evidence": evidence})


def _attempt(key: Key) -> dict[str, object]:
    return {"run_id": key[0], "round": key[1], "attempt": key[2]}


# --- a run ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guard:
    """What keeps a run's guarantee, and where it is charged."""

    rounds: PrivateRounds
    ledger: Ledger


def guard_run(
    store: Store,
    keys: PrivacyKeys,
    run_id: str,
    spec: RunSpec,
    ready: Prepared,
    *,
    devices: int,
    committed: int,
    insist: Insist = lambda write: write(),
    blobs: BlobStore | None = None,
) -> Guard:
    """Open a run's own budget, if it is not there, and make what keeps its guarantee.

    Args:
        store: the coordinator's state.
        keys: of noise and budgets.
        run_id: of the run.
        spec: of it, with ``privacy`` of device level.
        ready: its mechanism.
        devices: that could take part.
        committed: its last committed round.
        insist: repeats a write until trouble that passes has passed.
        blobs: see ``Ledger``.

    Raises:
        ConfigError: delta would allow to publish one device's data whole.
        NotFound, TrustError: a key is missing, or others can read it.
    """
    delta = spec.privacy.delta if spec.privacy else 0.0
    if devices * delta > 1:
        raise ConfigError(
            f"privacy.delta={delta:g} is above 1/{devices}, one over the devices: that would allow to "
            "publish one device's data whole.",
            hint="Lower run.privacy.delta.",
        )
    budget = budget_of(spec, ready, f"run:{run_id}")
    epsilon_of(budget, ready.planned)  # what accountants import takes a second: not while others wait
    policy = Policy(
        budget.name,
        1,
        budget.epsilon,
        budget.delta,
        budget.unit,
        budget.trust,
        budget.adjacency,
        note="as the run asks",
    )
    insist(lambda: _open(store, keys, policy))
    ledger = Ledger(store, run_id, spec, keys.public(), insist, blobs)
    sealing_key = keys.noise(make=committed == 0)
    return Guard(PrivateRounds(spec, run_id, ready, ledger, sealing_key=sealing_key), ledger)


def _open(store: Store, keys: PrivacyKeys, policy: Policy) -> None:
    with store.transaction() as change:
        if not change.budgets_over([policy.account], policy.unit):
            set_budget(change, keys, policy)


def stored_state(
    store: Store, read: Callable[[str], bytes], run_id: str, spec: RunSpec
) -> PrivateState | None:
    """What the next round depends on: the sealed memory of the last one, and who took part.

    Args:
        store: the coordinator's state.
        read: a blob by its hash.
        run_id: of the run.
        spec: of it.

    Returns:
        None before the first model, and for a run without privacy of device level.

    Raises:
        StateConflict: a model has no charge; what the run has spent is not known.
    """
    if spec.privacy is None or spec.privacy.unit != "device":
        return None
    over = store.run(run_id).committed  # the last round that was committed, or left out
    if not over:
        return None
    state = PrivateState(separation=spec.privacy.min_separation, times=spec.privacy.max_participations)
    charges = [c for c in store.charges(run_id, states=SPENT) if c.round <= over]
    done = [r.round for r in store.rounds(run_id) if r.state == "committed"]
    if done:
        found = {c.round: c.state_sha256 for c in charges if c.state == "committed"}
        sha256 = found.get(done[-1])
        if sha256 is None:
            raise StateConflict(f"Round {done[-1]} of run {run_id} is committed without its privacy.")
        state = PrivateState.from_bytes(read(sha256))
        if state.noise_round not in (0, done[-1]):
            raise StateCorrupt(f"The noise of run {run_id} is that of round {state.noise_round}.")
    charged = Counter(from_json(text) for c in charges for text in (*c.events, *c.extra))
    return replace(state, charged=dict(charged), took_part=store.participations(run_id))


def charges_begun(store: Store, key: Key) -> list[ChargeRecord]:
    """The charge of an attempt, if its release was begun and is not stored."""
    run_id, *attempt = key
    return [c for c in store.charges(run_id, states=("releasing",)) if [c.round, c.attempt] == attempt]


def may_go_on(store: Store, plan: RoundPlan, blobs: BlobStore | None) -> bool:
    """Whether an attempt that a restart cut off can go on under the charge that it has.

    Under distributed trust its sum is the one release that was reserved. Under central trust noise that was
    drawn may have been seen: the same may be added to the same sum again, if what it is made of was kept;
    fresh noise would be another release, of another attempt.
    """
    begun = charges_begun(store, (plan.run_id, plan.round, plan.attempt))
    return all(
        c.trust == "distributed" or (blobs is not None and c.state_sha256 and blobs.has(c.state_sha256))
        for c in begun
    )


def without_names(state: PrivateState) -> bytes:
    """What is stored of a state: who took part is in the table of participations."""
    return replace(state, took_part={}).to_bytes()


def newest_states(store: Store, run_id: str) -> Sequence[str]:
    """The sealed memories that a run has left, the newest last."""
    return [c.state_sha256 for c in store.charges(run_id, states=("committed",)) if c.state_sha256]
