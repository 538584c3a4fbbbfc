"""What goes wrong around the store: locks, versions, damage, full disks, kill -9. The state is unharmed."""

import hashlib
import signal
import sqlite3
import stat
import subprocess
import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from lepton_fl.errors import (
    ConfigError,
    ConnectionFailed,
    DiskFull,
    StateCorrupt,
    StateError,
    StateLocked,
    StateTooNew,
)
from lepton_server.store import open_store, schema
from lepton_server.store.tables import METADATA


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def path(tmp_path):
    """A closed SQLite database with three events in it."""
    path = tmp_path / "lepton.db"
    with open_store(path) as store:
        for _ in range(3):
            store.record("server.started", {})
    return path


class TestSchema:
    def test_the_migrations_make_what_the_tables_say(self, database):
        with open_store(database) as store, store._engine.connect() as connection:
            options = {"version_table": schema.VERSION_TABLE, "compare_type": True}
            context = MigrationContext.configure(connection, opts=options)
            assert compare_metadata(context, METADATA) == []

    def test_the_newest_revision_is_the_one_the_code_names(self):
        assert ScriptDirectory.from_config(schema._config()).get_heads() == [schema.SCHEMA]

    def test_newer_state_is_refused(self, database):
        with open_store(database) as store:
            store.record("server.started", {})
            with store._engine.begin() as connection:
                connection.execute(text("UPDATE lepton_version SET version_num = 'v9999'"))
        with pytest.raises(StateTooNew, match="v9999") as caught:
            open_store(database)
        assert "newer lepton-fl" in caught.value.hint

    def test_newer_file_is_left_byte_for_byte(self, path):
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE lepton_version SET version_num = 'v9999'")
        connection.close()
        before = digest(path)
        with pytest.raises(StateTooNew):
            open_store(path)
        assert digest(path) == before

    def test_the_file_is_private_durable_and_in_wal_mode(self, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with open_store(path) as store, store._engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


class TestNotOurs:
    @pytest.mark.parametrize(
        "content", [b"this is not a database" * 100, b"SQLite format 3\x00" + bytes(4096)]
    )
    def test_no_database(self, tmp_path, content):
        path = tmp_path / "lepton.db"
        path.write_bytes(content)
        with pytest.raises(StateCorrupt, match=r"lepton\.db"):
            open_store(path)
        assert path.read_bytes() == content

    def test_somebody_elses_database(self, tmp_path):
        path = tmp_path / "lepton.db"
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE photos (id)")
        connection.close()
        before = digest(path)
        with pytest.raises(StateCorrupt, match="not one of Lepton's"):
            open_store(path)
        assert digest(path) == before

    @pytest.mark.postgres
    def test_somebody_elses_schema(self, postgres_url):
        with open_store(postgres_url) as store, store._engine.begin() as connection:
            connection.execute(text("DROP TABLE lepton_version"))
        with pytest.raises(StateCorrupt, match="not one of Lepton's"):
            open_store(postgres_url)

    @pytest.mark.parametrize("url", ["", ":memory:", "mysql://u:hunter2@h/db", "sqlite://", "://hunter2"])
    def test_no_url(self, url):
        with pytest.raises(ConfigError) as caught:
            open_store(url)
        assert "hunter2" not in str(caught.value)

    def test_missing_folder(self, tmp_path):
        with pytest.raises(StateError, match="no folder"):
            open_store(tmp_path / "nowhere" / "lepton.db")

    def test_a_folder_in_its_place(self, tmp_path):
        with pytest.raises(StateError):
            open_store(tmp_path)

    def test_no_postgres_there(self, tmp_path):
        with pytest.raises(ConnectionFailed) as caught:
            open_store(f"postgresql://lepton:hunter2@/x?host={tmp_path}")
        assert "hunter2" not in str(caught.value)

    def test_damaged_pages_are_found(self, path):
        data = bytearray(path.read_bytes())
        data[4096:] = bytes(len(data) - 4096)
        path.write_bytes(data)
        with pytest.raises((StateCorrupt, StateError)):
            open_store(path)
        assert path.read_bytes() == data


HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""


class TestLocked:
    def test_says_who_holds_it(self, path):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with holder:
            assert holder.stdout.readline() == b"held\n"
            with open_store(path, lock_timeout=0.05) as store:
                assert store.head_seq() == 3  # readers do not wait
                with pytest.raises(StateLocked, match=f"process {holder.pid} "):
                    store.record("server.started", {})
            holder.stdin.close()
        with open_store(path) as store:
            assert store.record("server.started", {}).seq == 4

    def test_an_open_transaction_of_another_store(self, database):
        with open_store(database) as one, open_store(database, lock_timeout=0.05) as two:
            with one.transaction() as change:
                change.record("server.started", {})
                with pytest.raises(StateLocked):
                    two.record("server.started", {})
            assert two.record("server.started", {}).seq == 2
            assert one.verify_journal().seq == 2

    def test_a_transaction_that_waits_for_itself(self, database):
        with open_store(database, lock_timeout=0.05) as store, store.transaction() as change:
            with pytest.raises(StateLocked):
                store.record("server.started", {})
            change.record("server.started", {})


def fill(store):
    for _ in range(10):
        store.record("server.started", {"info": {"x": "y" * 30_000}})


class TestDiskFull:
    def test_when_writing(self, path, small_files):
        with open_store(path) as store:
            limit = max(p.stat().st_size for p in path.parent.iterdir()) + 20_000
            with small_files(limit), pytest.raises(DiskFull, match="undone"):
                fill(store)
            seq = store.head_seq()
            assert store.verify_journal().seq == seq
            assert store.record("server.started", {}).seq == seq + 1
            assert store.rebuild().equal

    def test_when_making_it(self, tmp_path, small_files):
        path = tmp_path / "lepton.db"
        with small_files(20_000), pytest.raises(DiskFull):
            open_store(path)
        with open_store(path) as store:
            assert store.record("server.started", {}).seq == 1


WRITER = """
import sys
from lepton_server.store import open_store
with open_store(sys.argv[1]) as store:
    while True:
        with store.transaction() as change:
            seqs = [change.record("server.started", {"version": "x" * 500}).seq for _ in range(3)]
        print(seqs[-1], flush=True)
"""


def test_kill_in_mid_write_loses_nothing_that_was_confirmed(database):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, database], stdout=subprocess.PIPE, text=True)
    try:
        confirmed = [int(writer.stdout.readline()) for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
        confirmed += [int(line) for line in writer.stdout if line.endswith("\n")]
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    with open_store(database) as store:
        head = store.verify_journal()
        assert head.seq >= confirmed[-1]
        assert head.seq % 3 == 0  # a transaction is there or it is not
        assert store.rebuild().equal
        assert store.record("server.started", {}).seq == head.seq + 1
