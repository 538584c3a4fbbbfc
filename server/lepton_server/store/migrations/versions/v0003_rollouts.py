"""Staged rollouts, and the devices that each of them has told."""

import sqlalchemy as sa
from alembic import op

revision = "v0003"
down_revision = "v0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make two projections; an older journal has no event that would fill them."""
    op.create_table(
        "rollout",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        sa.Column("since", sa.Float(precision=53), nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("suspect", sa.Text(), nullable=False),
        sa.Column("suspect_since", sa.Float(precision=53), nullable=False),
        sa.Column("aborting", sa.Integer(), nullable=False),
        sa.Column("planned_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "rollout_device",
        sa.Column("rollout_id", sa.Text(), nullable=False),
        sa.Column("device_id", sa.Text(), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        sa.Column("before", sa.Text(), nullable=False),
        sa.Column("p95_ms", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(["rollout_id"], ["rollout.id"], name="told_rollout"),
        sa.ForeignKeyConstraint(["device_id"], ["device.id"], name="told_device"),
        sa.PrimaryKeyConstraint("rollout_id", "device_id"),
    )
    op.create_index("rollout_device_device", "rollout_device", ["device_id"], unique=False)
