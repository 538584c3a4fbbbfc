"""The whole database, of one moment, as one SQLite file, and from there into a database of either engine.

A copy is made row by row through one snapshot: readers and writers go on meanwhile, and what was taken from
PostgreSQL is checked without one and may be put into SQLite, or the other way round.
"""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, delete, insert, select, update

from lepton_fl.errors import StateConflict
from lepton_server.store import journal, ledger
from lepton_server.store.engine import make_engine, parse_url, translated, writing
from lepton_server.store.schema import prepare
from lepton_server.store.tables import EVENT, LEASE, METADATA
from lepton_server.store.views import Head

BATCH: Final = 2000  # rows copied at a time

Moved = Callable[[int], object]  # told how many rows were copied since the last time


class Snapshot:
    """The database at one moment; made by ``Store.snapshot``."""

    def __init__(self, connection: Connection, lock_timeout: float) -> None:
        """Fix the moment.

        Args:
            connection: in a transaction that sees one state of the database.
            lock_timeout: seconds.
        """
        self._connection, self._lock_timeout = connection, lock_timeout
        self.head: Head = journal.head(connection)
        self.ledger: Head = ledger.head(connection)
        self.engine = connection.dialect.name

    def write(self, path: Path, moved: Moved = int) -> None:
        """Write it as a new SQLite database, one file; it is not synced.

        Raises:
            DiskFull: no space was left.
            StateError: the file cannot be written.
        """
        url = parse_url(path)
        engine = make_engine(url, self._lock_timeout)
        try:
            prepare(engine, self._lock_timeout)
            engine.dispose()  # nobody may have it open
            _one_file(path)
            with writing(engine, self._lock_timeout) as target:
                copy(self._connection, target, moved)
        finally:
            engine.dispose()
        with translated(url):
            _one_file(path)


def _one_file(path: Path) -> None:
    """Have all of an SQLite database in its one file, without a write-ahead log beside it."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=DELETE")
    finally:
        connection.close()


def copy(source: Connection, target: Connection, moved: Moved = int) -> None:
    """Make the tables of ``target``, in which there is nothing, what those of ``source`` are."""
    for table in METADATA.sorted_tables:  # in an order in which rows can be inserted
        if table is not EVENT:
            target.execute(delete(table))  # a new schema has the rows of the empty journal and of the lease
        query = select(table).order_by(*table.primary_key)
        for rows in source.execute(query, execution_options={"yield_per": BATCH}).mappings().partitions():
            target.execute(insert(table), [dict(row) for row in rows])
            moved(len(rows))


def fill(source: Connection, target: Connection, *, replace: bool, moved: Moved = int) -> None:
    """Put a snapshot into a database, within its write transaction; nobody holds the lease afterwards.

    Args:
        source: the snapshot.
        target: the database.
        replace: what is there may go.
        moved: see ``Moved``.

    Raises:
        StateConflict: there is something, and it may not go.
    """
    if journal.head(target).seq:
        if not replace:
            raise StateConflict("There is a coordinator's state in the database already.")
        _empty(target)
    held = target.execute(select(LEASE.c.token)).scalar_one()
    copy(source, target, moved)
    token = max(held, target.execute(select(LEASE.c.token)).scalar_one()) + 1  # fences off who still writes
    target.execute(update(LEASE).values(holder="", token=token))


def _empty(target: Connection) -> None:
    """Delete all rows but the lease; only of PostgreSQL, whose tables others have open."""
    target.exec_driver_sql("ALTER TABLE event DISABLE TRIGGER USER")
    for table in reversed(METADATA.sorted_tables):
        if table is not LEASE:
            target.execute(delete(table))
    target.exec_driver_sql("ALTER TABLE event ENABLE TRIGGER USER")
