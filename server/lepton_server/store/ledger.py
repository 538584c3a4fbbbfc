"""Reading the privacy ledger's tables: which budgets a charge falls under, and what is spent there.

All functions take a connection in a transaction, so that a reservation is judged by what it is added to.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import BindParameter, Connection, RowMapping, Select, and_, bindparam, func, or_, select

from lepton_fl.files import GENESIS
from lepton_fl.privacy.events import Event, from_json
from lepton_fl.privacy.record import ANYBODY, SUBJECT, TRUSTS, Policy, reads
from lepton_server.store.tables import BUDGET, CHARGE, EVENT, PARTICIPATION, ROUND, RUN, TOTAL
from lepton_server.store.views import ChargeRecord, Head, SignedBudget

_event = lru_cache(maxsize=4096)(from_json)  # a reservation reads the same few again and again
_CHUNK = 500  # accounts in one IN (…)
_PLACE = (BUDGET.c.account, BUDGET.c.unit, BUDGET.c.trust)
# Statements are made once: building one costs more than running it.
_NEWEST = (
    select(EVENT.c.seq, EVENT.c.hash).where(EVENT.c.subject == SUBJECT).order_by(EVENT.c.seq.desc()).limit(1)
)
_MISSED = select(EVENT.c.body).where(EVENT.c.kind == "ledger.missed").order_by(EVENT.c.seq.desc()).limit(1)
_ACCOUNTS: BindParameter[list[str]] = bindparam("accounts", expanding=True)
_GROUPS = and_(BUDGET.c.account >= "group:", BUDGET.c.account < "group;")  # ';' follows ':'
_BUDGETS = select(BUDGET).order_by(*_PLACE, BUDGET.c.version)
_NAMED_BUDGETS = _BUDGETS.where(BUDGET.c.account.in_(_ACCOUNTS))
_GROUPS_TOO = _BUDGETS.where(or_(BUDGET.c.account.in_(_ACCOUNTS), _GROUPS))
_TOTALS = select(TOTAL.c.account, TOTAL.c.unit, TOTAL.c.trust, TOTAL.c.event, TOTAL.c.count).where(
    TOTAL.c.account.in_(_ACCOUNTS), TOTAL.c.count != 0
)


def head(connection: Connection) -> Head:
    """Number and hash of the ledger's newest event; ``(0, GENESIS)`` of an empty one."""
    found = connection.execute(_NEWEST).first()
    return Head(0, GENESIS) if found is None else Head(*found)


def missed(connection: Connection) -> int | None:
    """The number of the newest event that a device has seen and that is not here; None: all are."""
    body = connection.execute(_MISSED).scalar()
    return None if body is None else int(json.loads(body)["seq"])


def budgets(
    connection: Connection, accounts: Sequence[str] | None = None, unit: str | None = None
) -> list[SignedBudget]:
    """The newest version of the budgets of these accounts, of all when None; by account."""
    if accounts is None:
        found = connection.execute(_BUDGETS)
    else:
        query = _GROUPS_TOO if ANYBODY in accounts else _NAMED_BUDGETS
        found = connection.execute(query, {"accounts": accounts})
    rows = [row for row in found.mappings() if unit in (None, row["unit"])]
    newest = {(row["account"], row["unit"], row["trust"]): row for row in rows}
    return [_budget(row) for row in newest.values()]


def counts(connection: Connection, policies: Sequence[Policy]) -> list[dict[Event, int]]:
    """What is charged to each budget, counted; the cost is per distinct event, however long the ledger is."""
    wanted = sorted({account for policy in policies for account in reads(policy.account)})
    totals: dict[tuple[str, str, str], list[tuple[Event, int]]] = {}
    for start in range(0, len(wanted), _CHUNK):
        here = {"accounts": wanted[start : start + _CHUNK]}
        for account, unit, trust, event, count in connection.execute(_TOTALS, here):
            totals.setdefault((account, unit, trust), []).append((_event(event), int(count)))
    return [_added(policy, totals) for policy in policies]


def _added(
    policy: Policy, totals: Mapping[tuple[str, str, str], Sequence[tuple[Event, int]]]
) -> dict[Event, int]:
    total: dict[Event, int] = {}
    for account in reads(policy.account):
        for trust in filter(policy.counts, TRUSTS):
            for event, count in totals.get((account, policy.unit, trust), ()):
                total[event] = total.get(event, 0) + count
    return total


def charges_query(run_id: str | None = None, states: Iterable[str] | None = None) -> Select[Any]:
    """Charges by run, round and attempt."""
    query = select(CHARGE).order_by(CHARGE.c.run_id, CHARGE.c.round, CHARGE.c.attempt)
    if run_id is not None:
        query = query.where(CHARGE.c.run_id == run_id)
    if states is not None:
        query = query.where(CHARGE.c.state.in_(list(states)))
    return query


def participations_query(run_id: str) -> Select[Any]:
    """device, the last committed round of the run that it counted in, and how many there were."""
    same = and_(
        ROUND.c.run_id == PARTICIPATION.c.run_id,
        ROUND.c.round == PARTICIPATION.c.round,
        ROUND.c.attempt == PARTICIPATION.c.attempt,
    )
    return (
        select(PARTICIPATION.c.device_id, func.max(PARTICIPATION.c.round), func.count())
        .join_from(PARTICIPATION, ROUND, same)
        .where(
            PARTICIPATION.c.run_id == run_id,
            PARTICIPATION.c.outcome == "counted",
            ROUND.c.state == "committed",
        )
        .group_by(PARTICIPATION.c.device_id)
    )


def left_out_query(run_id: str) -> Select[Any]:
    """Round and plan of the last attempts at rounds that are over without a model."""
    newest = (
        select(ROUND.c.round, func.max(ROUND.c.attempt).label("attempt"))
        .where(ROUND.c.run_id == run_id)
        .group_by(ROUND.c.round)
        .subquery()
    )
    same = and_(ROUND.c.round == newest.c.round, ROUND.c.attempt == newest.c.attempt)
    return (
        select(ROUND.c.round, ROUND.c.plan)
        .join_from(ROUND, newest, same)
        .join(RUN, RUN.c.id == ROUND.c.run_id)
        .where(ROUND.c.run_id == run_id, ROUND.c.state == "abandoned", ROUND.c.round <= RUN.c.committed)
    )


def charge(row: RowMapping) -> ChargeRecord:
    """A row as a record."""
    lists = {name: tuple(json.loads(row[name])) for name in ("events", "extra", "accounts")}
    return ChargeRecord(**{**row, **lists})


def _budget(row: RowMapping) -> SignedBudget:
    values = dict(row)
    key, signature = base64.b64decode(values.pop("key")), values.pop("signature")
    set_at = values.pop("set_at")
    return SignedBudget(Policy(**values), key, signature, set_at)
