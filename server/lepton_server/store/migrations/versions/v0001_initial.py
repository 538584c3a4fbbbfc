"""The first schema: the journal, its head, seven projections and presence."""

import sqlalchemy as sa
from alembic import op

revision = "v0001"
down_revision = None
branch_labels = None
depends_on = None

_ONLY_ADDED = "the journal is append-only"
_SQLITE_TRIGGERS = (
    f"""CREATE TRIGGER event_no_update BEFORE UPDATE ON event
        BEGIN SELECT RAISE(ABORT, '{_ONLY_ADDED}'); END""",
    f"""CREATE TRIGGER event_no_delete BEFORE DELETE ON event
        BEGIN SELECT RAISE(ABORT, '{_ONLY_ADDED}'); END""",
    # INSERT OR REPLACE deletes without the delete trigger, so the next number is demanded, too.
    f"""CREATE TRIGGER event_in_order BEFORE INSERT ON event
        WHEN NEW.seq <> (SELECT COALESCE(MAX(seq), 0) + 1 FROM event)
        BEGIN SELECT RAISE(ABORT, '{_ONLY_ADDED}'); END""",  # noqa: S608 - constant
)
_POSTGRES_TRIGGERS = (
    f"""CREATE FUNCTION event_is_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION '{_ONLY_ADDED}'; END $$""",
    """CREATE TRIGGER event_no_change BEFORE UPDATE OR DELETE ON event
        FOR EACH ROW EXECUTE FUNCTION event_is_append_only()""",
    """CREATE TRIGGER event_no_truncate BEFORE TRUNCATE ON event
        FOR EACH STATEMENT EXECUTE FUNCTION event_is_append_only()""",
    f"""CREATE FUNCTION event_is_next() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
          IF NEW.seq <> (SELECT COALESCE(MAX(seq), 0) + 1 FROM event) THEN
            RAISE EXCEPTION '{_ONLY_ADDED}';
          END IF;
          RETURN NEW;
        END $$""",  # noqa: S608 - constant
    """CREATE TRIGGER event_in_order BEFORE INSERT ON event
        FOR EACH ROW EXECUTE FUNCTION event_is_next()""",
)


def upgrade() -> None:
    """Make all tables, the empty journal's head, and the triggers that keep the journal append-only."""
    _create_tables()
    op.execute(f"INSERT INTO journal_head (id, seq, hash) VALUES (1, 0, '{'0' * 64}')")  # noqa: S608 - constant
    postgres = op.get_bind().dialect.name == "postgresql"
    for statement in _POSTGRES_TRIGGERS if postgres else _SQLITE_TRIGGERS:
        op.execute(statement)


def _create_tables() -> None:

