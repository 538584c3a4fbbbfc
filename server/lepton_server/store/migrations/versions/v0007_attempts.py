"""Masked vectors are where devices' updates are: records of secure rounds name them no more."""

import hashlib
import json

import sqlalchemy as sa
from alembic import op

revision = "v0007"
down_revision = "v0006"
branch_labels = None
depends_on = None

_KEY = ("run_id", "round", "attempt")


def upgrade() -> None:
    """Drop the names, and chain the records of open attempts anew, where the chain was whole."""
    connection = op.get_bind()
    table = sa.Table("attempt_record", sa.MetaData(), autoload_with=connection)
    before: dict[tuple[object, ...], tuple[str, str]] = {}
    for row in connection.execute(sa.select(table).order_by(*_KEY, "number")).mappings().all():
        key = tuple(row[name] for name in _KEY)
        old, new = before.get(key, ("0" * 64, "0" * 64))
        digest = _hash([*key, old, row["number"], row["blob"], row["spooled"]], row["body"])
        if digest == row["hash"]:
            digest = _hash([*key, new, row["number"], row["blob"]], row["body"])
            here = [table.c[name] == row[name] for name in (*_KEY, "number")]
            connection.execute(sa.update(table).where(*here).values(hash=digest))
        before[key] = row["hash"], digest
    with op.batch_alter_table("attempt_record") as change:
        change.drop_column("spooled")


def _hash(head: list[object], body: bytes) -> str:
    encoded = json.dumps(head, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()
    return hashlib.sha256(len(encoded).to_bytes(8, "big") + encoded + bytes(body)).hexdigest()
