"""Bad input at the door of the real commands: one clear block, the documented exit code, state unharmed."""

import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lepton_fl import crypto
from lepton_server.authority import Authority
from lepton_server.store import open_store

pytestmark = [pytest.mark.network, pytest.mark.slow]

LEPTON = Path(sys.executable).parent / "lepton"


def refused(done, code, *words):
    """One error block with these words and a hint; no traceback."""
    text = " ".join(done.stderr.split())
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in text, text
    return text


def unharmed(folder):
    with open_store(folder / "server" / "lepton.db") as store:
        store.verify_journal()
        assert store.rebuild().equal
        return store.head_seq()


def serve(fleet, *options):
    return fleet.run("server", "--config", str(fleet.config), *options, check=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[server]\nnaem = 'x'\n", ["server.naem", "name"]),
        ("[listen]\nops_port = 70000\n", ["listen.ops_port", "65535"]),
        ("[server\nname = ", ["server.toml"]),
        ("[check_in]\ninterval_s = nan\n", ["check_in.interval_s"]),
    ],
)
def test_a_wrong_or_truncated_configuration(tmp_path, text, words):
    path = tmp_path / "server.toml"
    path.write_text(text)
    command = [str(LEPTON), "server", "--config", str(path), "--state-dir", str(tmp_path / "state")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    refused(done, 3, *words)
    assert not (tmp_path / "state").exists()


def expired_token(fleet):
    """Made by hand: the command's shortest life is 36 s."""
    secret, keys = crypto.new_secret(), Authority.open(fleet.folder / "server" / "keys", ["127.0.0.1"])
    with open_store(fleet.folder / "server" / "lepton.db") as store:
        ends = time.time() + 0.5
        body = {"token_id": "t-short", "secret_sha256": crypto.secret_sha256(secret), "expires_at": ends}
        store.record("token.created", body)
    port = re.search(r"enrolment_port = (\d+)", fleet.config.read_text())[1]
    time.sleep(max(0.0, ends - time.time()))
    return crypto.make_join_token(f"127.0.0.1:{port}", keys.ca_der, secret)


def test_tokens_folders_and_ports(real_fleet):
    """One server for all of it: starting one takes seconds."""
    fleet = real_fleet
    fleet.start_server()
    token = fleet.lepton("token", "create")["token"]

    def enroll(name, token):
        words = ("client", "enroll", "--token", token, "--name", name, "--state-dir", str(fleet.state(name)))
        return fleet.run(*words, check=False)

    assert enroll("a", token).returncode == 0
    refused(enroll("b", token), 6, "used")
    refused(enroll("c", expired_token(fleet)), 6, "expired")
    last = "A" if token[-1] != "A" else "B"
    refused(enroll("d", token[:-8] + last * 8), 6)
    refused(enroll("e", token[: len(token) // 2]), 6)
    assert [d["name"] for d in fleet.lepton("devices", "list")] == ["a"]

    process = fleet.processes["server"].pid
    refused(serve(fleet), 7, f"process {process}", "state_dir")
    other = ["--state-dir", str(fleet.folder / "other")]
    text = refused(serve(fleet, *other), 5, "listen.")
    assert re.search(r"listen\.\w+_port", text)

    refused(
        fleet.run("run", "start", "--task", "nosuch", "--config", str(fleet.config), check=False), 4, "nosuch"
    )
    fleet.kill("server", 15)
    unharmed(fleet.folder)
    log = fleet.log("server")
    assert "Traceback" not in log


def test_a_database_that_cannot_be_used(real_fleet):
    fleet = real_fleet
    fleet.lepton("token", "create")
    state = fleet.folder / "server"
    before = unharmed(fleet.folder)
    kept = fleet.folder / "kept"
    shutil.copytree(state, kept)

    with sqlite3.connect(state / "lepton.db") as connection:
        connection.execute("UPDATE lepton_version SET version_num = 'v9999'")
    connection.close()
    refused(serve(fleet), 7, "v9999", "newer")
    (state / "lepton.db").write_bytes(b"holiday pictures " * 1000)
    refused(serve(fleet), 7, "lepton.db", "not an intact SQLite database")
    assert (state / "lepton.db").read_bytes().startswith(b"holiday pictures")

    shutil.rmtree(state)
    shutil.copytree(kept, state)
    assert unharmed(fleet.folder) == before

    with sqlite3.connect(state / "lepton.db", isolation_level=None) as connection:
        connection.execute("BEGIN IMMEDIATE")  # another process writes, and does not end
        done = fleet.run("token", "create", "--config", str(fleet.config), check=False)
        refused(done, 7, "locked", "process")
        connection.execute("ROLLBACK")
    connection.close()
    assert unharmed(fleet.folder) == before


def test_no_space_left(real_fleet, small_files):
    fleet = real_fleet
    fleet.lepton("token", "create")
    before = unharmed(fleet.folder)
    with small_files(1):  # inherited by the command
        done = fleet.run("token", "create", "--config", str(fleet.config), check=False)
    refused(done, 7, "No space")
    assert unharmed(fleet.folder) == before
    assert fleet.lepton("token", "create")["token"]


def test_a_port_that_is_taken_by_another_program(real_fleet):
    fleet = real_fleet
    with socket.create_server(("127.0.0.1", fleet.ops)):
        refused(serve(fleet), 5, f"127.0.0.1:{fleet.ops}", "listen.ops_port", "free one")
    assert unharmed(fleet.folder) == 0
