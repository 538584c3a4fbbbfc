"""The schema on disk: made, brought up to date, or refused, in one locked transaction.

A database is looked at read-only first, so that one we cannot use is left byte for byte as it was.
"""

import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, inspect, select, table
from sqlalchemy import column as sql_column

from lepton_fl.errors import StateCorrupt, StateError, StateTooNew
from lepton_server.store.engine import reading, translate, writing
from lepton_server.store.tables import METADATA

if TYPE_CHECKING:
    from alembic.config import Config

VERSION_TABLE = "lepton_version"
SCHEMA = "v0008"  # the newest revision in migrations/versions; a test compares
_VERSION = table(VERSION_TABLE, sql_column("version_num"))


def prepare(engine: Engine, lock_timeout: float) -> None:
    """Make or migrate the schema; several processes may do so at once.

    Raises:
        StateTooNew: Newer code wrote it.
        StateCorrupt: It is no database, or somebody else's.
        StateLocked: Another process holds it.
        DiskFull: No space was left; it is as it was.
    """
    if engine.dialect.name == "sqlite":
        _prepare_file(engine, lock_timeout)
    with reading(engine) as connection:
        if _version(connection, str(engine.url.database)) == SCHEMA:
            return
    with writing(engine, lock_timeout) as connection:
        if _version(connection, str(engine.url.database)) != SCHEMA:  # nobody else did it meanwhile
            _upgrade(connection)


def _prepare_file(engine: Engine, lock_timeout: float) -> None:
    """Refuse a file that is not ours, before any statement that could write to it; then switch to WAL."""
    path = Path(str(engine.url.database))
    if not path.parent.is_dir():
        raise StateError(f"There is no folder {path.parent} for the database.", hint="Make it first.")
    try:
        if path.exists() and path.stat().st_size:
            _look(path, lock_timeout)
        else:
            path.touch(mode=0o600)  # hashes of secrets and everybody's participation: private
        connection = sqlite3.connect(path, timeout=lock_timeout, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        finally:
            connection.close()
    except OSError as error:
        raise StateError(f"Cannot use {path}: {error.strerror}.") from error
    except sqlite3.Error as error:
        raise translate(error, engine.url) from error


def _look(path: Path, lock_timeout: float) -> None:
    uri = f"{path.as_uri()}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=lock_timeout, isolation_level=None)
    try:
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")}
        if names and VERSION_TABLE not in names:
            raise _not_ours(str(path))
        if names:
            row = connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()  # noqa: S608 - constant
            _check_known(None if row is None else row[0], str(path))
    finally:
        connection.close()


def _version(connection: Connection, name: str) -> str | None:
    """Return the revision of the schema, ``None`` when there is none yet."""
    tables = set(inspect(connection).get_table_names())
    if VERSION_TABLE not in tables:
        if tables & set(METADATA.tables):
            raise _not_ours(name)
        return None
    version = connection.execute(select(_VERSION.c.version_num)).scalar()
    _check_known(version, name)
    return version


def _check_known(version: str | None, name: str) -> None:
    if version is None or version == SCHEMA:
        return
    from alembic.script import ScriptDirectory

    known = {revision.revision for revision in ScriptDirectory.from_config(_config()).walk_revisions()}
    if version not in known:
        raise StateTooNew(
            f"{name} has schema {version!r}; this version of lepton-fl knows up to {SCHEMA!r}.",
            hint="Install a newer lepton-fl; the database has not been changed.",
        )


def _not_ours(name: str) -> StateCorrupt:
    return StateCorrupt(
        f"{name} is a database, but not one of Lepton's.",
        hint="Choose another path or URL; it has not been changed.",
    )


def _upgrade(connection: Connection) -> None:
    from alembic import command

    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _config() -> "Config":
    from alembic.config import Config

    config = Config()
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "migrations")
    config.set_main_option("script_location", folder.replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
