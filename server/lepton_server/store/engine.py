"""Connections to SQLite and PostgreSQL, and their errors in our words.

Two ways to begin a transaction: *read* is a snapshot that never waits, *write* takes the one write lock, so
that the events of several processes form one chain. Only a begun write may change anything.
"""

import contextlib
import os
import resource
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from lepton_fl.errors import (
    ConfigError,
    ConnectionFailed,
    DiskFull,
    LeptonError,
    StateCorrupt,
    StateError,
    StateLocked,
)

_MODE = "lepton_mode"  # execution option: how the next transaction of a connection begins
_LOCK_KEY = 0x6C6570746F6E  # "lepton": the advisory lock of the journal's writers on PostgreSQL
_BEGIN = {
    "read": ("BEGIN",),
    # A commit must be on disk before anybody acts on it …
    "write": ("PRAGMA synchronous=FULL", "BEGIN IMMEDIATE"),
    # … while soft state may be lost with the power.
    "soft": ("PRAGMA synchronous=NORMAL", "BEGIN IMMEDIATE"),
}


def parse_url(url_or_path: str | os.PathLike[str]) -> URL:
    """Return the database's URL: a path is an SQLite file.

    Raises:
        ConfigError: Neither a path, ``sqlite:///path`` nor ``postgresql://…``.
    """
    text = os.fspath(url_or_path)
    if "://" not in text:
        if not text or text == ":memory:":
            raise ConfigError(f"Expected the path or URL of a database, got {text!r}.")
        return URL.create("sqlite", database=str(Path(text).absolute()))
    try:
        url = make_url(text)
    except ArgumentError as error:  # the text may hold a password: keep it out of the message
        raise ConfigError("Expected a database URL such as postgresql://user@host/name.") from error
    if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg")
    if url.drivername == "sqlite" and url.database and url.database != ":memory:":
        return parse_url(url.database)
    raise ConfigError(
        f"Expected a database URL that starts with sqlite:/// or postgresql://, got {url.drivername!r}."
    )


def file_of(url_or_path: str | os.PathLike[str]) -> Path | None:
    """The file of an SQLite database; None for PostgreSQL. Raises ConfigError as :func:`parse_url`."""
    url = parse_url(url_or_path)
    return Path(str(url.database)) if url.get_backend_name() == "sqlite" else None


def make_engine(url: URL, lock_timeout: float) -> Engine:
    """Make an engine whose transactions begin as this module says.

    Args:
        url: From :func:`parse_url`.
        lock_timeout: Seconds to wait for another process' write.
    """
    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(url, lock_timeout)
    return create_engine(
        url,
        pool_size=8,
        max_overflow=8,
        pool_pre_ping=True,  # a restarted database is noticed before a transaction, not in it
        hide_parameters=True,
        connect_args={"connect_timeout": max(2, int(lock_timeout)), "application_name": "lepton"},
    )


def _sqlite_engine(url: URL, lock_timeout: float) -> Engine:
    engine = create_engine(
        url,
        pool_size=8,
        max_overflow=-1,  # threads wait for the write lock, never for a connection
        hide_parameters=True,
        connect_args={"timeout": lock_timeout, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, see _on_begin
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA synchronous=FULL")

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        for statement in _BEGIN[connection.get_execution_options().get(_MODE, "read")]:
            connection.exec_driver_sql(statement)

    return engine


@contextlib.contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Open a snapshot: all reads inside see one state of the database."""
    with translated(engine.url), engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection = connection.execution_options(isolation_level="REPEATABLE READ")
        with connection.begin():
            yield connection


@contextlib.contextmanager
def writing(engine: Engine, lock_timeout: float, *, soft: bool = False) -> Iterator[Connection]:
    """Open a write transaction; it commits at the end of the block and rolls back on any error.

    Args:
        engine: The database.
        lock_timeout: Seconds to wait for another process' write.
        soft: May be lost with the power, and on PostgreSQL waits for nobody.
    """
    with translated(engine.url), engine.connect() as connection:
        connection = connection.execution_options(**{_MODE: "soft" if soft else "write"})
        with connection.begin():
            if engine.dialect.name == "postgresql":
                _begin_postgres(connection, lock_timeout, soft)
            yield connection


def _begin_postgres(connection: Connection, lock_timeout: float, soft: bool) -> None:
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(lock_timeout * 1000)}")
    if soft:
        connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
    else:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK_KEY})")


# -------------------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def translated(url: URL) -> Iterator[None]:
    """Raise the database's errors as ours."""
    try:
        yield
    except DBAPIError as error:
        raise translate(error.orig, url) from error
    except PoolTimeout as error:
        raise StateLocked(
            f"No connection to {_shown(url)} became free in time: too many threads wait for it."
        ) from error
    except sqlite3.Error as error:
        raise translate(error, url) from error


def translate(error: BaseException | None, url: URL) -> LeptonError:
    """Return a driver's error as one of ours; the transaction it came from was rolled back."""
    if isinstance(error, sqlite3.Error):
        return _from_sqlite(error, url)
    return _from_postgres(error, url)


def _shown(url: URL) -> str:
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    return url.render_as_string(hide_password=True)


def _from_sqlite(error: sqlite3.Error, url: URL) -> LeptonError:
    extended: int = getattr(error, "sqlite_errorcode", 0)
    code, path = extended & 0xFF, str(url.database)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StateLocked(f"{path} is locked by {_holders(path)}.", hint="Try again, or end that process.")
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _no_room(path)):
        return DiskFull(
            f"No space was left while writing {path}; the transaction was undone.",
            hint="Free some space or raise the limit, then try again.",
        )
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return StateCorrupt(
            f"{path} is not an intact SQLite database ({error}).",
            hint="Restore it from a copy; it has not been changed.",
        )
    if code == sqlite3.SQLITE_CONSTRAINT:
        return StateError(f"The database refused the change: {error}.")
    return StateError(
        f"Cannot use {path}: {error}.",
        hint="Check that its folder exists and that this user may write there.",
    )


def _no_room(path: str) -> bool:
    """Return whether a failed write is one for want of space; SQLite reports a size limit as an I/O error."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    with contextlib.suppress(OSError):
        if limit != resource.RLIM_INFINITY and limit < _biggest(path) + (1 << 20):
            return True
        free = os.statvfs(os.path.dirname(path))
        return free.f_bavail * free.f_frsize < (1 << 20)
    return False


def _biggest(path: str) -> int:
    files = (path, path + "-wal", path + "-shm")
    return max(os.path.getsize(name) for name in files if os.path.exists(name))


def _holders(path: str) -> str:
    """Name the other processes that have the file open, as far as this user may see them."""
    names, own = [], str(os.getpid())
    with contextlib.suppress(OSError):
        real = os.path.realpath(path)
        for process in (entry for entry in os.listdir("/proc") if entry.isdigit() and entry != own):
            with contextlib.suppress(OSError):
                links = (os.readlink(f"/proc/{process}/fd/{fd}") for fd in os.listdir(f"/proc/{process}/fd"))
                if real in links:
                    title = Path(f"/proc/{process}/comm").read_text(encoding="utf-8").strip()
                    names.append(f"process {process} ({title})")
    return ", ".join(names) or "another process or thread"


def _from_postgres(error: BaseException | None, url: URL) -> LeptonError:
    state: Any = getattr(error, "sqlstate", None)
    shown, first = _shown(url), str(error).strip().splitlines()[0] if str(error).strip() else "no details"
    if state in ("55P03", "40P01", "57014"):  # lock not available, deadlock, cancelled
        return StateLocked(
            f"{shown} is locked by another process ({first}).",
            hint="Try again; `SELECT * FROM pg_stat_activity` shows who holds it.",
        )
    if state == "53100":
        return DiskFull(
            f"No space was left at {shown}; the transaction was undone.", hint="Free some space there."
        )
    if state in ("XX001", "XX002"):
        return StateCorrupt(f"{shown} is damaged ({first}).", hint="Restore it from a copy.")
    if state is None or state[:2] in (
        "08",
        "57",
        "53",
        "28",
        "3D",
    ):  # connection, shutdown, login, no database
        return ConnectionFailed(
            f"Cannot use {shown}: {first}.",
            hint="Check the URL, that PostgreSQL runs there, and that the user may log in.",
        )
    return StateError(f"The database at {shown} refused the change: {first}.")
