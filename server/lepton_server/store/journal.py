"""Reading the journal as a whole: is the chain intact, and do the tables say what it says?"""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, RowMapping, Table, create_engine, delete, insert, select
from sqlalchemy.pool import StaticPool

from lepton_fl.errors import LeptonError, StateCorrupt
from lepton_fl.files import GENESIS, event_line, sha256_hex
from lepton_server.store.events import decode_body
from lepton_server.store.projection import When, apply
from lepton_server.store.statements import finding
from lepton_server.store.tables import EVENT, HEAD, PROJECTIONS
from lepton_server.store.views import Head, RebuildReport

_BATCH = 2000  # events read at a time
_SHOWN = 100  # differences spelt out in a report
_EMPTY = Head(0, GENESIS)


def head(connection: Connection) -> Head:
    """Return the newest event's sequence number and hash.

    Raises:
        StateCorrupt: The row that holds it is gone.
    """
    row = connection.execute(finding(HEAD)).first()
    if row is None:
        raise StateCorrupt("The journal's head is missing.", hint="Restore the database from a copy.")
    return Head(row.seq, row.hash)


def checked(connection: Connection) -> Iterator[RowMapping]:
    """Yield all events in order, each after its place in the chain was checked.

    Raises:
        StateCorrupt: Names the first event that is missing, altered or out of place, or the missing tail.
    """
    for row, _ in _linked(connection):
        yield row


def _linked(connection: Connection) -> Iterator[tuple[RowMapping, bytes]]:
    last = _EMPTY
    for row in _all_events(connection):
        if row["seq"] != last.seq + 1:
            raise _damaged(last.seq + 1, f"is missing (the next is {row['seq']})")
        if row["prev"] != last.hash:
            raise _damaged(row["seq"], "does not continue the event before it")
        line = _line(row)
        if line is None or sha256_hex(line) != row["hash"]:
            raise _damaged(row["seq"], f"({row['kind']}) was altered: its hash does not match")
        last = Head(row["seq"], row["hash"])
        yield row, line
    noted = head(connection)
    if last != noted:
        raise _damaged(min(last.seq, noted.seq) + 1, f"is not where the journal's head ({noted.seq}) has it")


def _all_events(connection: Connection) -> Iterator[RowMapping]:
    """Read by pages, so that a long journal does not have to fit into memory."""
    after: int | None = None
    while True:
        query = select(EVENT).order_by(EVENT.c.seq).limit(_BATCH)
        rows = (
            connection.execute(query if after is None else query.where(EVENT.c.seq > after)).mappings().all()
        )
        yield from rows
        if len(rows) < _BATCH:
            return
        after = rows[-1]["seq"]


def _line(row: RowMapping) -> bytes | None:
    try:
        return event_line(row["prev"], row["seq"], row["time"], row["kind"], row["subject"], row["body"])
    except (TypeError, ValueError, OverflowError):  # a column of another type: SQLite lets anything in
        return None


def _damaged(seq: int, what: str) -> StateCorrupt:
    return StateCorrupt(f"Journal: event {seq} {what}.", hint="Restore the database from a copy made before.")


def verify(connection: Connection, expected: Head | None) -> Head:
    """Check the chain; see ``Store.verify_journal``."""
    last, met = _EMPTY, expected is None or expected == _EMPTY
    for row in checked(connection):
        last = Head(row["seq"], row["hash"])
        met = met or last == expected
    if not met and expected is not None:
        raise _damaged(expected.seq, "is not the one that was noted earlier")
    return last


def lines(connection: Connection) -> Iterator[bytes]:
    """Yield every checked event as the bytes that its hash is of; see ``Store.journal``."""
    for _, line in _linked(connection):
        yield line


def rebuild(connection: Connection, *, replace: bool) -> RebuildReport:
    """Replay the journal beside the live tables; see ``Store.rebuild``."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    try:
        with engine.begin() as scratch:
            for table in PROJECTIONS:
                table.create(scratch)
            last = _replay(connection, scratch)
            return _compare(connection, scratch, last, replace)
    finally:
        engine.dispose()


def _replay(connection: Connection, scratch: Connection) -> Head:
    last = _EMPTY
    for row in checked(connection):
        try:
            apply(scratch, When(row["seq"], row["time"]), decode_body(row["kind"], row["body"]))
        except LeptonError as error:
            raise _damaged(row["seq"], f"({row['kind']}) cannot be replayed: {error}") from error
        last = Head(row["seq"], row["hash"])
    return last


def _compare(live: Connection, scratch: Connection, last: Head, replace: bool) -> RebuildReport:
    different, shown, counts = 0, list[str](), dict[str, int]()
    for table in PROJECTIONS:
        key = [column.name for column in table.primary_key]
        have, want = _by_key(live, table, key), _by_key(scratch, table, key)
        counts[table.name] = len(want)
        for name in sorted(have.keys() | want.keys()):
            if have.get(name) != want.get(name):
                different += 1
                if len(shown) < _SHOWN:
                    shown.append(_difference(table.name, name, have.get(name), want.get(name)))
    if replace and different:
        _replace(live, scratch)
    return RebuildReport(last, counts, tuple(shown), different, replace and different > 0)


def _by_key(connection: Connection, table: Table, key: list[str]) -> dict[tuple[Any, ...], dict[str, Any]]:
    rows = connection.execute(select(table)).mappings()
    return {tuple(row[name] for name in key): dict(row) for row in rows}


def _difference(
    table: str, name: tuple[Any, ...], have: dict[str, Any] | None, want: dict[str, Any] | None
) -> str:
    label = f"{table} {'/'.join(map(str, name))}"
    if have is None or want is None:
        return f"{label}: {'missing' if have is None else 'not in the journal'}"
    columns = [column for column in want if have[column] != want[column]]
    return f"{label}: {', '.join(columns)} differ{'s' if len(columns) == 1 else ''}"


def _replace(live: Connection, scratch: Connection) -> None:
    for table in reversed(PROJECTIONS):
        live.execute(delete(table))
    for table in PROJECTIONS:
        rows = [dict(row) for row in scratch.execute(select(table)).mappings()]
        for start in range(0, len(rows), _BATCH):
            live.execute(insert(table), rows[start : start + _BATCH])
