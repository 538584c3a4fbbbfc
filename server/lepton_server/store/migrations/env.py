"""Run by Alembic, inside the transaction that the store has begun and locked (see ``schema.py``)."""

from alembic import context

from lepton_server.store.schema import VERSION_TABLE
from lepton_server.store.tables import METADATA


def _run() -> None:
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=METADATA,
        version_table=VERSION_TABLE,
    )
    with context.begin_transaction():
        context.run_migrations()


if __name__ == "env_py":  # the name under which Alembic loads this file; a plain import does nothing
    _run()
