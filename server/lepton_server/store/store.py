"""The store: one write path, plain reads.

Rules:

* :meth:`Store.record` is the only way to change what the coordinator knows. In one transaction it chains an
  event to the journal and applies it to the tables; either both happen or neither.
* Reads give frozen records of one moment; nothing of the database leaks out.
* Any number of threads and processes may use one database. Writers queue; readers never wait.

Example::

    with open_store("state/lepton.db") as store:
        with store.transaction() as change:
            change.record("token.used", token_id, {"token_id": token_id, "device_id": device_id})
            change.record("device.enrolled", device_id, {...})
        store.device(device_id).name
"""

import base64
import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, overload

from sqlalchemy import (
    Connection,
    Engine,
    RowMapping,
    Select,
    and_,
    case,
    delete,
    func,
    insert,
    select,
    update,
)

from lepton_fl.errors import LeaseLost, NotFound, StateConflict, StateError, StateLocked
from lepton_fl.files import event_hash
from lepton_fl.privacy.events import Event as PrivacyEvent
from lepton_server.store import attempts, journal, ledger
from lepton_server.store.engine import make_engine, parse_url, reading, writing
from lepton_server.store.events import (
    PHASES,
    Body,
    LedgerBody,
    TaskRegistered,
    encode_body,
    parse_body,
)
from lepton_server.store.projection import When, apply
from lepton_server.store.schema import prepare
from lepton_server.store.snapshot import Moved, Snapshot, fill
from lepton_server.store.statements import adding, changing
from lepton_server.store.tables import (
    ATTEMPT_RECORD,
    CHARGE,
    DEVICE,
    EVENT,
    HEAD,
    LEASE,
    MODEL,
    PARTICIPATION,
    PRESENCE,
    RECEIVED,
    ROLLOUT,
    ROUND,
    RUN,
    TASK,
    TOKEN,
    TOKEN_USE,
    TOLD,
)
from lepton_server.store.views import (
    ActiveDevice,
    Attempt,
    ChargeRecord,
    Device,
    Event,
    Head,
    Kept,
    Lease,
    Model,
    Part,
    RebuildReport,
    Received,
    Rollout,
    Round,
    Run,
    SignedBudget,
    Task,
    Token,
    Told,
)

_CHUNK = 500  # ids in one IN (…)
_PAGE = 1000  # events that a follower reads at a time
LOCK_TIMEOUT = 10.0  # seconds to wait for another writer


BodyLike = Mapping[str, object] | Body


def _checked(kind: str, subject: str | BodyLike, body: BodyLike | None) -> Body:
    """Return the checked body of ``record(kind, body)`` or ``record(kind, subject, body)``."""
    if isinstance(subject, str):
        checked = parse_body(kind, {} if body is None else body)
        if subject != checked.subject:
            raise StateError(f"Expected {checked.subject!r} as its subject, got {subject!r} ({kind}).")
        return checked
    return parse_body(kind, subject)


class Transaction:
    """Several events that happen together or not at all; made by :meth:`Store.transaction`."""

    def __init__(self, connection: Connection, clock: Callable[[], float]) -> None:
        self._connection = connection
        self._clock = clock
        self._head = journal.head(connection)
        self._start = self._head
        self._ledger_head = ""  # of the privacy ledger, once it was needed

    @overload
    def record(self, kind: str, body: BodyLike, /) -> Event: ...
    @overload
    def record(self, kind: str, subject: str, body: BodyLike, /) -> Event: ...
    def record(self, kind: str, subject: str | BodyLike, body: BodyLike | None = None, /) -> Event:
        """Append one event and apply it. A refused event changes nothing, and others may follow it.

        Args:
            kind: One of ``events.KINDS``.
            subject: What it is about: the device, run, task or token id in the body, or ``server``. Follows
                from the body and may be left out; when it is given, it is checked.
            body: The fields of the kind, or the body itself.

        Returns:
            The event, with its place in the chain.

        Raises:
            StateError: The kind is unknown or the body does not fit it.
            StateConflict: The event does not follow from the recorded state.
            TrustError: A token or device is not, or no longer, accepted.
            NotFound: The event is about something unknown.
        """
        checked = _checked(kind, subject, body)
        if isinstance(checked, LedgerBody):
            self._ledger_head = self._ledger_head or ledger.head(self._connection).hash
            checked = checked.model_copy(update={"previous": self._ledger_head})
        subject = checked.subject
        now = self._now()
        encoded = encode_body(kind, checked)
        seq, prev = self._head.seq + 1, self._head.hash
        apply(self._connection, When(seq, now), checked)
        digest = event_hash(prev, seq, now, kind, subject, encoded)
        row = {
            "seq": seq,
            "time": now,
            "kind": kind,
            "subject": subject,
            "body": encoded,
            "prev": prev,
            "hash": digest,
        }
        self._connection.execute(adding(EVENT), row)
        self._head = Head(seq, digest)
        if isinstance(checked, LedgerBody):
            self._ledger_head = digest
        return Event(seq, now, kind, subject, json.loads(encoded), prev, digest)

    def task(self, name: str, version: str) -> Task | None:
        """Return a task version as this transaction sees it."""
        row = self._connection.execute(_task_query(name, version)).mappings().first()
        return None if row is None else Task(**row)

    def budgets_over(self, accounts: Sequence[str] | None, unit: str) -> list[SignedBudget]:
        """Return the budgets that a charge to these accounts falls under, all of them when None."""
        return ledger.budgets(self._connection, accounts, unit)

    def covering(
        self, accounts: Sequence[str], unit: str
    ) -> list[tuple[SignedBudget, dict[PrivacyEvent, int]]]:
        """Return the budgets over these accounts, each with all that is reserved or committed under it."""
        found = ledger.budgets(self._connection, accounts, unit)
        return list(zip(found, ledger.counts(self._connection, [b.policy for b in found]), strict=True))

    def missed_head(self) -> int | None:
        """Return the number of a ledger's event that a device has seen and that is not here, if any."""
        return ledger.missed(self._connection)

    def charges(self, run_id: str, states: Iterable[str]) -> list[ChargeRecord]:
        """Return a run's charges in these states."""
        rows = self._connection.execute(ledger.charges_query(run_id, states)).mappings()
        return [ledger.charge(row) for row in rows]

    # what is durable and not in the journal

    def move(self, run_id: str, round_number: int, attempt: int, phase: str) -> bool:
        """Record that an open attempt has come to a phase; False when it is there or further."""
        row = self._connection.execute(_phase_query(run_id, round_number, attempt)).first()
        if row is None or (row.phase in PHASES and PHASES.index(row.phase) >= PHASES.index(phase)):
            return False
        body = {"run_id": run_id, "round": round_number, "attempt": attempt, "phase": phase}
        self.record("round.moved", body)
        return True

    def add_received(self, run_id: str, round_number: int, attempt: int, received: Received) -> None:
        """Name an update that is on the disk; the first one of an attempt moves it to ``collecting``.

        Raises:
            StateConflict: the attempt is not collecting any more, or has one of this device.
        """
        key = {"run_id": run_id, "round": round_number, "attempt": attempt}
        found = self._connection.execute(_phase_query(run_id, round_number, attempt)).first()
        if found is None or found.phase not in ("planned", "offered", "collecting"):
            raise StateConflict(f"Round {round_number}, attempt {attempt} of run {run_id} takes no updates.")
        mine = _received_query(run_id, round_number, attempt).where(
            RECEIVED.c.device_id == received.device_id
        )
        if self._connection.execute(mine).first():
            raise StateConflict(f"There is an update of device {received.device_id} already.")
        self.move(run_id, round_number, attempt, "collecting")
        row = {name: getattr(received, name) for name in ("device_id", "sha256", "num_bytes")}
        self._connection.execute(insert(RECEIVED).values(**key, **row, counted=int(received.counted)))

    def count_received(self, run_id: str, round_number: int, attempt: int, device_ids: Sequence[str]) -> None:
        """Fix whose updates are the ones that count: from now on it is these and no others."""
        here = and_(
            RECEIVED.c.run_id == run_id, RECEIVED.c.round == round_number, RECEIVED.c.attempt == attempt
        )
        for start in range(0, len(device_ids), _CHUNK):
            some = RECEIVED.c.device_id.in_(device_ids[start : start + _CHUNK])
            self._connection.execute(update(RECEIVED).where(here, some).values(counted=1))

    def forget_attempts(self, run_id: str, round_number: int | None = None) -> set[str]:
        """Forget what the attempts of a run, or of a round of it, have heard; returns the files' names."""
        names = set[str]()
        for table, file in _HEARD:
            here = table.c.run_id == run_id
            if round_number is not None:
                here = and_(here, table.c.round == round_number)
            names.update(self._connection.execute(select(table.c[file]).where(here)).scalars())
            self._connection.execute(delete(table).where(here))
        return names - {""}

    def forget_closed(self) -> None:
        """Forget what attempts have heard that are closed: a crash came before :meth:`forget_attempts`."""
        for table, _ in _HEARD:
            same = [table.c[name] == ROUND.c[name] for name in Attempt._fields]
            is_open = select(ROUND.c.state).where(*same, ROUND.c.state == "planned").exists()
            self._connection.execute(delete(table).where(~is_open))

    def _now(self) -> float:
        now = float(self._clock())
        if not math.isfinite(now) or now < 0:
            raise StateError(f"Expected a clock that gives seconds since 1970, got {now}.")
        return now

    def _close(self) -> None:
        if self._head != self._start:
            head = {"seq": self._head.seq, "hash": self._head.hash}
            self._connection.execute(changing(HEAD, (), ("seq", "hash")), head)


class Store:
    """The coordinator's state; open it with :func:`open_store`."""

    def __init__(self, engine: Engine, clock: Callable[[], float], lock_timeout: float) -> None:
        self._engine = engine
        self._clock = clock
        self._lock_timeout = lock_timeout
        self._token: int | None = None  # of the lease; None: an operator's command, which needs none
        self._writer = threading.Lock()  # threads queue here in turn rather than in SQLite's sleep loop

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; idempotent."""
        self._engine.dispose()

    # ------------------------------------------------------------------------------------------- writing

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Record several events atomically. Keep it short: every other writer waits for its end.

        Do not open another one, or call :meth:`record` on the store, inside the block: it would wait for
        itself.

        Raises:
            StateLocked: Another process held the write lock for too long.
            DiskFull: No space was left; nothing was changed.
        """
        with self._writing() as connection:
            change = Transaction(connection, self._clock)
            yield change
            change._close()

    @overload
    def record(self, kind: str, body: BodyLike, /) -> Event: ...
    @overload
    def record(self, kind: str, subject: str, body: BodyLike, /) -> Event: ...
    def record(self, kind: str, subject: str | BodyLike, body: BodyLike | None = None, /) -> Event:
        """Record one event, durably; see :meth:`Transaction.record`."""
        with self.transaction() as change:
            return change.record(kind, _checked(kind, subject, body))

    def ensure_task(self, task: TaskRegistered) -> bool:
        """Register a task version unless it is registered just so; return whether it was new.

        Raises:
            StateConflict: The version is registered with another content.
        """
        with self.transaction() as change:
            known = change.task(task.name, task.version)
            if known is not None and _same_task(known, task):
                return False
            change.record("task.registered", task.name, task)
            return True

    def note_presence(self, seen: Sequence[tuple[str, float, str]]) -> None:
        """Note when devices were last heard of: soft state, not in the journal, newest wins.

        Args:
            seen: ``(device_id, last_seen, status)``; seconds since 1970; the same device may come twice.
        """
        newest: dict[str, tuple[str, float, str]] = {}
        for entry in seen:
            held = newest.get(entry[0])
            if held is None or entry[1] >= held[1]:
                newest[entry[0]] = entry
        if not newest:
            return
        rows = sorted(newest.values())  # one order for all writers, so that two never wait for each other
        with self._writing(soft=True) as connection:
            _upsert_presence(connection, rows)

    def keep(self, attempt: Attempt, record: Kept, *, durable: bool) -> None:
        """Write a record of an open attempt ahead, until :meth:`Transaction.forget_attempts`.

        Args:
            attempt: Of which run, round and attempt.
            record: From ``attempts.following``.
            durable: It is on the disk when this returns, with all that were written before; else a power cut
                may take it, and a crash of this process may not.

        Raises:
            StateError: Somebody else has written a record of this number.
            StateLocked, DiskFull: Nothing was written.
        """
        with self._writing(soft=not durable) as connection:
            attempts.add(connection, attempt, record)

    def kept(self, attempt: Attempt) -> list[Kept]:
        """Return the records of an attempt, in order.

        Raises:
            StateCorrupt: One is missing or damaged.
        """
        with reading(self._engine) as connection:
            return attempts.of(connection, attempt)

    # -------------------------------------------------------------------------------------------- lease

    def take_lease(self, holder: str, life_s: float) -> Lease | None:
        """Become the coordinator that may write, unless another one is; None then.

        From now on every write of this store is refused once somebody else has taken the lease: the token,
        which grows with every holder, is looked at in each transaction.

        Args:
            holder: Names this coordinator; the same one takes its own lease back at once.
            life_s: Seconds for which a lease is good that is not renewed, by the database's clock.
        """
        with self._exclusive(), writing(self._engine, self._lock_timeout) as connection:
            lease = _lease(connection, self._clock)
            if lease.holder not in ("", holder) and lease.age_s < life_s:
                return None
            fresh = lease.token + 1
            values = {"token": fresh, "holder": holder, "renewed": lease.now}
            connection.execute(update(LEASE).values(values))
        self._token = fresh
        return Lease(fresh, holder, lease.now, lease.now)

    def renew_lease(self) -> None:
        """Say that this coordinator lives; raises LeaseLost if another one has taken over."""
        with self._writing() as connection:
            now = _lease(connection, self._clock).now
            connection.execute(update(LEASE).values(renewed=now))

    def drop_lease(self) -> None:
        """Let the next coordinator in at once; nothing more can be written here."""
        with self._writing() as connection:
            connection.execute(update(LEASE).values(holder="", token=LEASE.c.token + 1))

    def lease(self) -> Lease:
        """Return who holds the lease, and since when it was not renewed."""
        with reading(self._engine) as connection:
            return _lease(connection, self._clock)

    @contextlib.contextmanager
    def _writing(self, *, soft: bool = False) -> Iterator[Connection]:
        """A write transaction of this coordinator's, if it may still write."""
        with self._exclusive(), writing(self._engine, self._lock_timeout, soft=soft) as connection:
            if self._token is not None:
                query = select(LEASE.c.token, LEASE.c.holder).with_for_update(read=True)  # PostgreSQL's
                token, holder = connection.execute(query).one()
                if token != self._token:
                    raise LeaseLost(
                        f"Another coordinator ({holder or 'none any more'}) has taken over this database.",
                        hint="This one has stopped; start it again, as a stand-by if the other one goes on.",
                    )
            yield connection

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._writer.acquire(timeout=self._lock_timeout):
            raise StateLocked(
                f"Another thread of this process has been writing for {self._lock_timeout:g} s.",
                hint="Try again; a transaction must be short.",
            )
        try:
            yield
        finally:
            self._writer.release()

    # ------------------------------------------------------------------------------------------- devices

    def devices(
        self,
        *,
        state: str | None = None,
        group: str | None = None,
        after_id: str = "",
        limit: int | None = None,
    ) -> list[Device]:
        """Return devices by id, optionally of one state or group; page with ``after_id`` and ``limit``."""
        query = _DEVICES.where(DEVICE.c.id > after_id).order_by(DEVICE.c.id)
        if state is not None:
            query = query.where(DEVICE.c.state == state)
        if group is not None:
            label = json.dumps(group, ensure_ascii=False)
            query = query.where(DEVICE.c.groups.contains(label, autoescape=True))
        if limit is not None:
            query = query.limit(limit)
        return [_device(row) for row in self._rows(query)]

    def device(self, device_id: str) -> Device:
        """Return one device.

        Raises:
            NotFound: There is none of that id.
        """
        rows = self._rows(_DEVICES.where(DEVICE.c.id == device_id))
        if not rows:
            raise NotFound(f"There is no device {device_id!r}.", hint="`lepton devices list` shows them.")
        return _device(rows[0])

    def device_by_key(self, public_key: bytes) -> Device | None:
        """Return the device, active or revoked, that holds a key (DER SubjectPublicKeyInfo)."""
        encoded = base64.b64encode(public_key).decode("ascii")
        rows = self._rows(_DEVICES.where(DEVICE.c.public_key == encoded))
        return _device(rows[0]) if rows else None

    def active_devices(self) -> list[ActiveDevice]:
        """Return all devices that may take part, light, by id: a snapshot for selection."""
        query = (
            select(
                DEVICE.c.id,
                DEVICE.c.public_key,
                DEVICE.c.cert_serial,
                DEVICE.c.groups,
                DEVICE.c.desired,
                DEVICE.c.reported,
                PRESENCE.c.last_seen,
                PRESENCE.c.status,
                DEVICE.c.quarantined_until,
                DEVICE.c.quarantine_cause,
            )
            .outerjoin_from(DEVICE, PRESENCE, DEVICE.c.id == PRESENCE.c.device_id)
            .where(DEVICE.c.state == "active")
            .order_by(DEVICE.c.id)
        )
        with reading(self._engine) as connection:
            return [
                ActiveDevice(
                    row[0],
                    base64.b64decode(row[1]),
                    row[2],
                    tuple(json.loads(row[3])),
                    json.loads(row[4]),
                    json.loads(row[5]),
                    row[6],
                    row[7] or "",
                    row[8],
                    row[9],
                )
                for row in connection.execute(query)
            ]

    # -------------------------------------------------------------------------------------- other reads

    def tokens(self) -> list[Token]:
        """Return all join tokens, oldest first."""
        return self._tokens(select(TOKEN).order_by(TOKEN.c.created_at, TOKEN.c.id))

    def token_by_secret(self, secret_sha256: str) -> Token | None:
        """Return the token whose secret has that hash."""
        tokens = self._tokens(select(TOKEN).where(TOKEN.c.secret_sha256 == secret_sha256))
        return tokens[0] if tokens else None

    def _tokens(self, query: Select[Any]) -> list[Token]:
        with reading(self._engine) as connection:
            rows = connection.execute(query).mappings().all()
            uses = select(TOKEN_USE.c.token_id, TOKEN_USE.c.device_id).order_by(TOKEN_USE.c.used_at)
            if len(rows) == 1:
                uses = uses.where(TOKEN_USE.c.token_id == rows[0]["id"])
            used_by: dict[str, list[str]] = {}
            for token_id, device_id in connection.execute(uses):
                used_by.setdefault(token_id, []).append(device_id)
        return [_token(row, used_by.get(row["id"], [])) for row in rows]

    def tasks(self) -> list[Task]:
        """Return all task versions, in the order of their registration."""
        return [Task(**row) for row in self._rows(select(TASK).order_by(TASK.c.registered_at, TASK.c.name))]

    def runs(self, *, state: str | None = None) -> list[Run]:
        """Return runs in the order of the queue, optionally of one state."""
        query = select(RUN).order_by(RUN.c.queued_seq)
        if state is not None:
            query = query.where(RUN.c.state == state)
        return [_run(row) for row in self._rows(query)]

    def run(self, run_id: str) -> Run:
        """Return one run.

        Raises:
            NotFound: There is none of that id.
        """
        rows = self._rows(select(RUN).where(RUN.c.id == run_id))
        if not rows:
            raise NotFound(f"There is no run {run_id!r}.", hint="`lepton run list` shows them.")
        return _run(rows[0])

    def rounds(self, run_id: str) -> list[Round]:
        """Return every attempt of every round of a run, in order."""
        query = select(ROUND).where(ROUND.c.run_id == run_id).order_by(ROUND.c.round, ROUND.c.attempt)
        return [Round(**_decoded(row, "plan", "metrics", "evaluated")) for row in self._rows(query)]

    def received(self, run_id: str, round: int, attempt: int) -> list[Received]:
        """Return the updates that an open attempt has been sent, and that their devices know to be here."""
        rows = self._rows(_received_query(run_id, round, attempt).order_by(RECEIVED.c.device_id))
        return [Received(r["device_id"], r["sha256"], r["num_bytes"], bool(r["counted"])) for r in rows]

    def attempt_files(self) -> set[str]:
        """Return the names of all files that open attempts need: what came, and what noise is made of."""
        same = [CHARGE.c[name] == ROUND.c[name] for name in Attempt._fields]
        noise = select(CHARGE.c.state_sha256).join(ROUND, and_(*same))
        noise = noise.where(CHARGE.c.state == "releasing", ROUND.c.state == "planned")
        queries = [select(table.c[file]) for table, file in _HEARD] + [noise]
        return {name for query in queries for (name,) in self._tuples(query) if name}

    def phase(self, run_id: str, round: int, attempt: int) -> str:
        """Return the phase of an attempt; empty where there is none."""
        rows = self._rows(_phase_query(run_id, round, attempt))
        return str(rows[0]["phase"]) if rows else ""

    def participation(self, run_id: str, round: int | None = None) -> list[Part]:
        """Return who took part in a run, or in all attempts of one round of it."""
        query = select(PARTICIPATION).where(PARTICIPATION.c.run_id == run_id)
        if round is not None:
            query = query.where(PARTICIPATION.c.round == round)
        order = (PARTICIPATION.c.round, PARTICIPATION.c.attempt, PARTICIPATION.c.device_id)
        return [Part(**row) for row in self._rows(query.order_by(*order))]

    def contributors(self, run_id: str) -> set[str]:
        """Return the devices of which an update is part of a run's model."""
        same = and_(
            ROUND.c.run_id == PARTICIPATION.c.run_id,
            ROUND.c.round == PARTICIPATION.c.round,
            ROUND.c.attempt == PARTICIPATION.c.attempt,
        )
        query = select(PARTICIPATION.c.device_id).join(ROUND, same).distinct()
        here = and_(PARTICIPATION.c.run_id == run_id, PARTICIPATION.c.outcome == "counted")
        return {row[0] for row in self._tuples(query.where(here, ROUND.c.state == "committed"))}

    def usual_seconds(self) -> dict[str, float]:
        """Return device -> the mean of the times that it took to train, over all runs; 0 = none is known."""
        timed = case((PARTICIPATION.c.seconds > 0, PARTICIPATION.c.seconds))
        query = select(PARTICIPATION.c.device_id, func.coalesce(func.avg(timed), 0.0))
        return {row[0]: row[1] for row in self._tuples(query.group_by(PARTICIPATION.c.device_id))}

    def last_causes(self, run_id: str) -> dict[str, str]:
        """Return device -> why its last answer in a run did not count, of those asked; '' where it did."""
        query = select(
            PARTICIPATION.c.device_id,
            PARTICIPATION.c.cause,
            PARTICIPATION.c.reason,
            PARTICIPATION.c.outcome,
        ).where(PARTICIPATION.c.run_id == run_id)
        order = query.order_by(PARTICIPATION.c.round, PARTICIPATION.c.attempt)
        rows = self._tuples(order)
        return {row[0]: row[1] or row[2] or ("" if row[3] == "counted" else row[3]) for row in rows}

    def faults_in_a_row(self, device_id: str, causes: Collection[str], most: int) -> int:
        """Return how many of a device's last answers, at most ``most``, failed for one of these causes."""
        same = and_(
            ROUND.c.run_id == PARTICIPATION.c.run_id,
            ROUND.c.round == PARTICIPATION.c.round,
            ROUND.c.attempt == PARTICIPATION.c.attempt,
        )
        asked = and_(PARTICIPATION.c.device_id == device_id, PARTICIPATION.c.outcome != "surplus")
        query = select(PARTICIPATION.c.outcome, PARTICIPATION.c.cause).join(ROUND, same).where(asked)
        newest = query.order_by(ROUND.c.closed_at.desc()).limit(most)
        faults = 0
        for outcome, cause in self._tuples(newest):
            if outcome == "counted" or cause not in causes:
                break
            faults += 1
        return faults

    def models(self, run_id: str) -> list[Model]:
        """Return the models of a run by round."""
        query = select(MODEL).where(MODEL.c.run_id == run_id).order_by(MODEL.c.round)
        return [Model(**_decoded(row, "metrics")) for row in self._rows(query)]

    def model_users(self, sha256: str) -> int:
        """Return how many runs have this model among theirs, in any round."""
        query = select(MODEL.c.run_id).where(MODEL.c.sha256 == sha256).distinct()
        return len(self._rows(query))

    def state_users(self, sha256: str) -> int:
        """Return how many runs have this optimiser state among theirs, in any round."""
        query = select(ROUND.c.run_id).where(ROUND.c.state_sha256 == sha256).distinct()
        return len(self._rows(query))

    # ------------------------------------------------------------------------------------------- privacy

    def budgets(self) -> list[tuple[SignedBudget, dict[PrivacyEvent, int]]]:
        """Return every budget's newest version, and what is reserved or committed under it, of one moment."""
        with reading(self._engine) as connection:
            found = ledger.budgets(connection)
            return list(zip(found, ledger.counts(connection, [b.policy for b in found]), strict=True))

    def charges(
        self, run_id: str | None = None, *, states: Iterable[str] | None = None
    ) -> list[ChargeRecord]:
        """Return the privacy ledger's charges by run, round and attempt."""
        return [ledger.charge(row) for row in self._rows(ledger.charges_query(run_id, states))]

    def ledger_head(self) -> Head:
        """Return number and hash of the privacy ledger's newest event; ``(0, 64 zeros)`` for an empty one."""
        with reading(self._engine) as connection:
            return ledger.head(connection)

    def missed_head(self) -> int | None:
        """Return the number of a ledger's event that a device has seen and that is not here, if any."""
        with reading(self._engine) as connection:
            return ledger.missed(connection)

    def participations(self, run_id: str) -> dict[str, tuple[int, int]]:
        """Return device -> the last round that it counted in, and how many there were.

        Of a committed round those count whose updates are in its sum; of one that was left out, after devices
        had agreed on a sum, all that were asked.
        """
        with reading(self._engine) as connection:
            rows = connection.execute(ledger.participations_query(run_id))
            found = {device_id: (last, times) for device_id, last, times in rows}
            left_out = connection.execute(ledger.left_out_query(run_id)).all()
        for number, plan in left_out:
            for device_id in json.loads(plan)["cohort"]:
                last, times = found.get(device_id, (0, 0))
                found[device_id] = max(last, number), times + 1
        return found

    def memory_users(self, sha256: str) -> int:
        """Return how many charges have this sealed memory of a mechanism."""
        return len(self._rows(select(CHARGE.c.run_id).where(CHARGE.c.state_sha256 == sha256)))

    # ------------------------------------------------------------------------------------------ rollouts

    def rollouts(self, *, phases: Iterable[str] | None = None) -> list[Rollout]:
        """Return the rollouts, the oldest first."""
        query = select(ROLLOUT).order_by(ROLLOUT.c.planned_at, ROLLOUT.c.id)
        if phases is not None:
            query = query.where(ROLLOUT.c.phase.in_(list(phases)))
        return [_rollout(row) for row in self._rows(query)]

    def rollout(self, rollout_id: str) -> Rollout:
        """Return one rollout; raises NotFound."""
        for row in self._rows(select(ROLLOUT).where(ROLLOUT.c.id == rollout_id)):
            return _rollout(row)
        raise NotFound(f"There is no rollout {rollout_id}.", hint="`lepton rollout list` shows them.")

    def told(self, rollout_id: str) -> list[Told]:
        """Return the devices that have a release of a rollout."""
        columns = TOLD.c.device_id, TOLD.c.stage, TOLD.c.before, TOLD.c.p95_ms
        query = select(*columns).where(TOLD.c.rollout_id == rollout_id).order_by(TOLD.c.device_id)
        return [Told(**row) for row in self._rows(query)]

    def told_in(self) -> dict[str, str]:
        """Return device -> the open rollout that has told it."""
        is_open = ROLLOUT.c.phase.in_(("running", "paused", "rolling-back"))
        query = select(TOLD.c.device_id, TOLD.c.rollout_id).join(ROLLOUT, ROLLOUT.c.id == TOLD.c.rollout_id)
        return {row["device_id"]: row["rollout_id"] for row in self._rows(query.where(is_open))}

    # ------------------------------------------------------------------------------------------- journal

    def events(
        self,
        after_seq: int = 0,
        *,
        kinds: Iterable[str] | None = None,
        subject: str | None = None,
        limit: int | None = None,
    ) -> list[Event]:
        """Return events after a sequence number, oldest first, optionally of some kinds or one subject."""
        query = select(EVENT).where(EVENT.c.seq > after_seq).order_by(EVENT.c.seq)
        if kinds is not None:
            query = query.where(EVENT.c.kind.in_(list(kinds)))
        if subject is not None:
            query = query.where(EVENT.c.subject == subject)
        if limit is not None:
            query = query.limit(limit)
        return [Event(**_decoded(row, "body")) for row in self._rows(query)]

    def head(self) -> Head:
        """Return sequence number and hash of the newest event; ``(0, 64 zeros)`` for an empty journal."""
        with reading(self._engine) as connection:
            return journal.head(connection)

    def event_hash(self, seq: int) -> str | None:
        """Return the hash of an event by its number, if there is one."""
        with reading(self._engine) as connection:
            return connection.execute(select(EVENT.c.hash).where(EVENT.c.seq == seq)).scalar()

    def head_seq(self) -> int:
        """Return the sequence number of the newest event: one row by key, cheap enough to poll."""
        return self.head().seq

    def follow(
        self, after_seq: int, *, stop: threading.Event, poll: float = 0.5, kinds: Iterable[str] | None = None
    ) -> Iterator[Event]:
        """Yield events after a sequence number as they come, until ``stop`` is set.

        Args:
            after_seq: The last event already known.
            stop: Ends the iteration, at the latest after ``poll`` seconds.
            poll: Seconds between two looks when nothing comes.
            kinds: Only these, when given.
        """
        wanted = None if kinds is None else list(kinds)
        while not stop.is_set():
            head = self.head_seq()
            while after_seq < head and not stop.is_set():
                page = self.events(after_seq, kinds=wanted, limit=_PAGE)
                yield from page
                newest = page[-1].seq if page else head
                # A full page may end before ``head``; a short one has shown everything up to it.
                after_seq = newest if len(page) == _PAGE else max(head, newest)
            stop.wait(poll)

    def verify_journal(self, expected: Head | None = None) -> Head:
        """Check the whole chain, and return its head.

        A chain alone cannot show that its end was cut off together with the head's row; a head that was noted
        elsewhere can.

        Args:
            expected: A head noted earlier that must still be part of the chain.

        Raises:
            StateCorrupt: Names the first event that is missing, altered or out of place.
        """
        with reading(self._engine) as connection:
            return journal.verify(connection, expected)

    @contextlib.contextmanager
    def journal(self) -> Iterator[tuple[Head, Iterator[bytes]]]:
        """Open the whole journal as of now: its head, and each event's ``lepton_fl.files.event_line``.

        The chain is checked as it is read; others may go on writing.

        Raises:
            StateCorrupt: While reading: names the first event that is missing, altered or out of place.
        """
        with reading(self._engine) as connection:
            yield journal.head(connection), journal.lines(connection)

    def rebuild(self, check_only: bool = True) -> RebuildReport:
        """Replay the journal into fresh tables and compare them with the live ones, row by row.

        Args:
            check_only: Change nothing (others may go on writing); else replace the tables, atomically.

        Raises:
            StateCorrupt: The journal itself is damaged; nothing was changed.
        """
        if check_only:
            with reading(self._engine) as connection:
                return journal.rebuild(connection, replace=False)
        with self._writing() as connection:
            return journal.rebuild(connection, replace=True)

    # -------------------------------------------------------------------------------------------- copies

    @contextlib.contextmanager
    def snapshot(self, meanwhile: Callable[[], object] = int) -> Iterator[Snapshot]:
        """Open the whole database as it is at one moment; others go on writing.

        Args:
            meanwhile: is called at that moment, while nobody can write: what the rows name is still there.
                Keep it short.
        """
        with reading(self._engine) as connection:
            with self._writing():
                taken = Snapshot(connection, self._lock_timeout)
                meanwhile()
            yield taken

    def fill(self, source: "Store", *, life_s: float, replace: bool = False, moved: Moved = int) -> None:
        """Become what another store is, in one transaction; nobody holds the lease then.

        Args:
            source: The other one.
            life_s: Of a lease, see :meth:`take_lease`.
            replace: Rows that are here may go (PostgreSQL).
            moved: Told of rows that were copied.

        Raises:
            StateLocked: A coordinator leads this database.
            StateConflict: It is not empty, and ``replace`` is not given.
        """
        with reading(source._engine) as rows, self._writing() as connection:
            lease = _lease(connection, self._clock)
            if lease.holder and lease.age_s < life_s:
                raise StateLocked(
                    f"The coordinator {lease.holder} holds the lease of this database.", hint="Stop it first."
                )
            fill(rows, connection, replace=replace, moved=moved)

    def _tuples(self, query: Select[Any]) -> list[tuple[Any, ...]]:
        with reading(self._engine) as connection:
            return [tuple(row) for row in connection.execute(query)]

    def _rows(self, query: Select[Any]) -> Sequence[RowMapping]:
        with reading(self._engine) as connection:
            return connection.execute(query).mappings().all()


_HEARD = ((RECEIVED, "sha256"), (ATTEMPT_RECORD, "blob"))  # of open attempts; which column names a file
_DEVICES = select(DEVICE, PRESENCE.c.last_seen, PRESENCE.c.status).outerjoin_from(
    DEVICE, PRESENCE, DEVICE.c.id == PRESENCE.c.device_id
)


def _decoded(row: RowMapping, *columns: str) -> dict[str, Any]:
    """Return a row with these columns turned from JSON text into objects."""
    return {**row, **{name: json.loads(row[name]) for name in columns}}


def _device(row: RowMapping) -> Device:
    values = _decoded(row, "groups", "desired", "reported")
    values["groups"] = tuple(values["groups"])
    values["public_key"] = base64.b64decode(values["public_key"])
    values["status"] = values["status"] or ""
    return Device(**values)


def _run(row: RowMapping) -> Run:
    fields = _decoded(row, "spec", "coverage", "flags")
    return Run(**{**fields, "flags": tuple(fields["flags"])})


def _rollout(row: RowMapping) -> Rollout:
    return Rollout(**_decoded(row, "plan") | {"aborting": bool(row["aborting"])})


def _token(row: RowMapping, used_by: Sequence[str]) -> Token:
    return Token(**{**row, "used_by": tuple(used_by), "revoked": bool(row["revoked"])})


def _lease(connection: Connection, clock: Callable[[], float]) -> Lease:
    """The lease, and the time by the database's clock: several machines share it."""
    row = connection.execute(select(LEASE)).one()
    now = clock()
    if connection.dialect.name == "postgresql":
        now = float(connection.exec_driver_sql("SELECT EXTRACT(EPOCH FROM clock_timestamp())").scalar_one())
    return Lease(row.token, row.holder, row.renewed, now)


def _phase_query(run_id: str, number: int, attempt: int) -> Select[Any]:
    here = and_(ROUND.c.run_id == run_id, ROUND.c.round == number, ROUND.c.attempt == attempt)
    return select(ROUND.c.phase).where(here)


def _received_query(run_id: str, number: int, attempt: int) -> Select[Any]:
    here = and_(RECEIVED.c.run_id == run_id, RECEIVED.c.round == number, RECEIVED.c.attempt == attempt)
    return select(RECEIVED).where(here)


def _task_query(name: str, version: str) -> Select[Any]:
    return select(TASK).where(TASK.c.name == name, TASK.c.version == version)


def _same_task(known: Task, task: TaskRegistered) -> bool:
    return (known.reference, known.layout_digest, known.num_parameters) == (
        task.reference,
        task.layout_digest,
        task.num_parameters,
    )


def _upsert_presence(connection: Connection, rows: Sequence[tuple[str, float, str]]) -> None:
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(_PRESENCE.format(source="VALUES (?, ?, ?)"), list(rows))
        return
    # One statement with three arrays: a batch is one round trip.
    source = "SELECT * FROM unnest(%s::text[], %s::float8[], %s::text[])"
    columns = tuple(list(column) for column in zip(*rows, strict=True))
    connection.exec_driver_sql(_PRESENCE.format(source=source), columns)


_PRESENCE = """
    INSERT INTO presence (device_id, last_seen, status) {source}
    ON CONFLICT (device_id) DO UPDATE SET last_seen = excluded.last_seen, status = excluded.status
    WHERE excluded.last_seen >= presence.last_seen
"""


def open_store(
    url_or_path: str | os.PathLike[str],
    *,
    clock: Callable[[], float] = time.time,
    lock_timeout: float = LOCK_TIMEOUT,
) -> Store:
    """Open the coordinator's state, making or migrating its schema.

    Args:
        url_or_path: A path (SQLite), ``sqlite:///path`` or ``postgresql://user:password@host/name``.
        clock: Seconds since 1970, UTC: the times of events.
        lock_timeout: Seconds to wait for another writer.

    Raises:
        ConfigError: Not a path or URL of that form.
        ConnectionFailed: PostgreSQL does not answer or does not let us in.
        StateTooNew: Newer code wrote it.
        StateLocked: Another process holds it.
        StateCorrupt: It is no database, or not one of Lepton's.
        DiskFull: No space was left.
    """
    engine = make_engine(parse_url(url_or_path), lock_timeout)
    try:
        prepare(engine, lock_timeout)
    except BaseException:
        engine.dispose()
        raise
    return Store(engine, clock, lock_timeout)
