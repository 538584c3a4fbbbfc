"""Why a device did not contribute, who is in quarantine, and who a run was made of."""

import sqlalchemy as sa
from alembic import op

revision = "v0005"
down_revision = "v0004"
branch_labels = None
depends_on = None

_TEXTS = (
    ("participation", "cause", ""),
    ("participation", "detail", ""),
    ("device", "quarantine_cause", ""),
    ("run", "coverage", "{}"),
    ("run", "flags", "[]"),
)


def upgrade() -> None:
    """Add columns; no event of an older journal would fill them."""
    for table, name, empty in _TEXTS:
        with op.batch_alter_table(table) as change:
            change.add_column(sa.Column(name, sa.Text(), nullable=False, server_default=empty))
    with op.batch_alter_table("device") as change:
        column = sa.Column("quarantined_until", sa.Float(precision=53), nullable=False, server_default="0")
        change.add_column(column)
