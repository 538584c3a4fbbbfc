"""What the sessions of open attempts have heard: rows written ahead, until the attempt is closed."""

import hashlib

from sqlalchemy import ColumnElement, Connection, insert, select

from lepton_fl.errors import StateCorrupt
from lepton_fl.files import GENESIS, canonical_json
from lepton_server.store.tables import ATTEMPT_RECORD
from lepton_server.store.views import Attempt, Kept


def following(attempt: Attempt, last: Kept | None, body: bytes, blob: str = "") -> Kept:
    """The record after ``last``; see ``Kept``."""
    number = (last.number if last else 0) + 1
    return Kept(number, body, blob, _hash(attempt, last.hash if last else GENESIS, number, body, blob))


def add(connection: Connection, attempt: Attempt, record: Kept) -> None:
    """Write one; of two processes that write the same number, one is refused."""
    values = {"number": record.number, "body": record.body, "blob": record.blob, "hash": record.hash}
    connection.execute(insert(ATTEMPT_RECORD), attempt._asdict() | values)


def of(connection: Connection, attempt: Attempt) -> list[Kept]:
    """All records of an attempt, in order.

    Raises:
        StateCorrupt: one is missing before the last, altered or out of place.
    """
    found, last = list[Kept](), GENESIS
    query = select(ATTEMPT_RECORD).where(*_here(attempt)).order_by(ATTEMPT_RECORD.c.number)
    for row in connection.execute(query).mappings():
        number, body = len(found) + 1, bytes(row["body"])
        last = _hash(attempt, last, number, body, row["blob"])
        if row["number"] != number or row["hash"] != last:
            where = f"run {attempt.run_id}, round {attempt.round}, attempt {attempt.attempt}"
            raise StateCorrupt(f"Record {number} of {where} is missing or damaged.")
        found.append(Kept(number, body, row["blob"], last))
    return found


def _here(attempt: Attempt) -> list[ColumnElement[bool]]:
    return [ATTEMPT_RECORD.c[name] == value for name, value in attempt._asdict().items()]


def _hash(attempt: Attempt, before: str, number: int, body: bytes, blob: str) -> str:
    head = canonical_json([*attempt, before, number, blob])
    return hashlib.sha256(len(head).to_bytes(8, "big") + head + body).hexdigest()
