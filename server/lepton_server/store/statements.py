"""Statements that are written again and again, made once: building one costs more than running it.

``execute(adding(EVENT), row)``, ``execute(finding(RUN, "id"), {"id": run_id})``.
"""

from functools import cache

from sqlalchemy import Insert, Select, Table, Update, bindparam, insert, select, update
from sqlalchemy.sql.elements import ColumnElement

_OF_KEY = "key_"  # a name of its own, for an update may set what it is found by


@cache
def adding(table: Table) -> Insert:
    """A row, given as the parameters."""
    return insert(table)


@cache
def finding(table: Table, *key: str) -> Select[tuple[object, ...]]:
    """The rows whose columns ``key`` are the parameters of these names; none of them null."""
    return select(table).where(*_are(table, {name: name for name in key}))


@cache
def changing(table: Table, key: tuple[str, ...], values: tuple[str, ...]) -> Update:
    """Set the columns ``values`` of such rows; the parameters are :func:`changes`."""
    found = _are(table, {name: _OF_KEY + name for name in key})
    return update(table).where(*found).values({name: bindparam(name) for name in values})


def changes(key: dict[str, object], values: dict[str, object]) -> dict[str, object]:
    """The parameters of :func:`changing`."""
    return {_OF_KEY + name: value for name, value in key.items()} | values


def _are(table: Table, names: dict[str, str]) -> list[ColumnElement[bool]]:
    return [table.c[column] == bindparam(name) for column, name in names.items()]
