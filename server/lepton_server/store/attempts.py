"""What open attempts have heard: rows written ahead, which go with the event that closes the attempt."""

import hashlib
import json
from collections.abc import Mapping

from sqlalchemy import ColumnElement, Connection, delete, insert, select

from lepton_fl.errors import StateCorrupt
from lepton_fl.files import GENESIS, canonical_json
from lepton_server.store.tables import ATTEMPT_RECORD
from lepton_server.store.views import Attempt, Kept

CLOSING = frozenset({"round.committed", "round.abandoned", "run.finished"})  # kinds of events


def following(
    attempt: Attempt,
    last: Kept | None,
    body: bytes,
    blob: str = "",
    spooled: Mapping[str, tuple[str, ...]] | None = None,
) -> Kept:
    """The record after ``last``; see ``Kept``."""
    number, named = (last.number if last else 0) + 1, dict(spooled or {})
    digest = _hash(attempt, last.hash if last else GENESIS, number, body, blob, _spooled(named))
    return Kept(number, body, blob, named, digest)


def add(connection: Connection, attempt: Attempt, record: Kept) -> None:
    """Write one; of two processes that write the same number, one is refused."""
    values = {
        "number": record.number,
        "body": record.body,
        "blob": record.blob,
        "spooled": _spooled(record.spooled),
        "hash": record.hash,
    }
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
        last = _hash(attempt, last, number, body, row["blob"], row["spooled"])
        if row["number"] != number or row["hash"] != last:
            where = f"run {attempt.run_id}, round {attempt.round}, attempt {attempt.attempt}"
            raise StateCorrupt(f"Record {number} of {where} is missing or damaged.")
        spooled = {device: tuple(names) for device, names in json.loads(row["spooled"]).items()}
        found.append(Kept(number, body, row["blob"], spooled, last))
    return found


def forget(connection: Connection, run_id: str) -> None:
    """Delete the records of a run's attempts: none is open any more."""
    connection.execute(delete(ATTEMPT_RECORD).where(ATTEMPT_RECORD.c.run_id == run_id))


def _here(attempt: Attempt) -> list[ColumnElement[bool]]:
    return [ATTEMPT_RECORD.c[name] == value for name, value in attempt._asdict().items()]


def _spooled(named: Mapping[str, tuple[str, ...]]) -> str:
    return canonical_json(dict(named)).decode()


def _hash(attempt: Attempt, before: str, number: int, body: bytes, blob: str, spooled: str) -> str:
    head = canonical_json([*attempt, before, number, blob, spooled])
    return hashlib.sha256(len(head).to_bytes(8, "big") + head + body).hexdigest()
