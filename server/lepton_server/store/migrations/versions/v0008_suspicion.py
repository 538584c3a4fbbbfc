"""What looks bad of a rollout is held against the predictions that come after."""

import sqlalchemy as sa
from alembic import op

revision = "v0008"
down_revision = "v0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a column; an older journal says nothing of it."""
    with op.batch_alter_table("rollout") as change:
        change.add_column(sa.Column("suspect_requests", sa.BigInteger(), nullable=False, server_default="0"))
