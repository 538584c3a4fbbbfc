"""The coordinator from the inside: start, the operator's pages, renewal of certificates, doctor, end."""

import contextlib
import logging
import os
import random
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request

import pytest

from lepton_fl.cli.doctor import examine
from lepton_fl.errors import ConnectionFailed, Rejection, StateLocked
from lepton_server.authority import Authority
from lepton_server.commands import load
from lepton_server.connections import BoundedListener
from lepton_server.coordinator import Coordinator, _bind
from lepton_server.store import open_store

pytestmark = [
    pytest.mark.network,
    # uvicorn's websocket support imports a module that says it is old.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:websockets"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:uvicorn"),
]

FUZZ_INPUTS = 100  # benchmarks/noise.py sends a million
PORTS = ("enrolment_port", "device_port", "fleet_port", "ops_port")


def config_file(folder, **ports):
    chosen = dict.fromkeys(PORTS, 0) | ports
    listen = "\n".join(f"{name} = {port}" for name, port in chosen.items())
    path = folder / "server.toml"
    path.write_text(
        f'[server]\nstate_dir = "{folder / "state"}"\n'
        f'[listen]\nhost = "127.0.0.1"\npublic_names = ["127.0.0.1"]\n{listen}\n'
    )
    return path


@pytest.fixture
def path(tmp_path):
    return config_file(tmp_path)


@pytest.fixture
def coordinator(path):
    with Coordinator(load(path, {})) as made:
        yield made


def get(port, page):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_operators_pages(coordinator):
    port = coordinator.ops_port
    assert get(port, "/healthz") == (200, "ok\n")
    assert get(port, "/readyz") == (200, "ready\n")
    status, text = get(port, "/metrics")
    assert status == 200
    assert 'lepton_devices{standing="registered"} 0.0' in text
    assert 'lepton_runs{state="active"} 0.0' in text
    assert get(port, "/secrets")[0] == 404


def test_readiness_names_what_is_missing(coordinator):
    coordinator._listeners["listen.fleet_port"] = threading.Thread()
    assert get(coordinator.ops_port, "/readyz") == (503, "nothing listens on listen.fleet_port\n")
    assert get(coordinator.ops_port, "/healthz")[0] == 200


def test_late_answers_are_counted(coordinator):
    from lepton_server.flower import Refused

    coordinator._refused(Refused(7, "m", Rejection.LATE))
    assert 'lepton_refused_replies_total{reason="late"} 1.0' in get(coordinator.ops_port, "/metrics")[1]


def served_certificate(coordinator):
    port = int(coordinator.endpoints.fleet.rpartition(":")[2])
    context = ssl.create_default_context(cafile=coordinator.config.server.state_dir / "keys" / "ca.pem")
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        return secure.getpeercert(binary_form=True)


def test_the_fleet_port_serves_a_renewed_certificate_without_a_restart(coordinator):
    before = served_certificate(coordinator)
    assert served_certificate(coordinator) == before
    authority = Authority.open(coordinator.config.server.state_dir / "keys", ["127.0.0.1"])
    assert authority.refresh_server(["127.0.0.1", "new.example"])
    after = served_certificate(coordinator)
    assert after != before
    authority.server_path.write_bytes(b"half a file")
    assert served_certificate(coordinator) == after  # the log says why


def test_whatever_comes_to_the_http_ports_is_answered_or_cut_off(coordinator, caplog):
    rng, context = random.Random(0), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the service is what is tested here
    fleet = int(coordinator.endpoints.fleet.rpartition(":")[2])
    seed = b"POST /metrics HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\nconnection: close\r\n\r\nabc"
    nasty = (
        b"",
        b"\x00",
        b"\r\n\r\n",
        b"\xff",
        b"transfer-encoding: chunked\r\n",
        b"content-length: 9" * 9,
        b"%00",
    )
    statuses = set()
    for _ in range(FUZZ_INPUTS):
        data = bytearray(seed)
        for _ in range(rng.choice((1, 2, 4))):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.choice((0, 1, 8))] = rng.choice((*nasty, rng.randbytes(5)))
        with socket.create_connection(("127.0.0.1", rng.choice((fleet, coordinator.ops_port))), 10) as plain:
            tls = plain.getpeername()[1] == fleet and rng.random() < 0.8
            connection = context.wrap_socket(plain) if tls else plain
            connection.settimeout(0.2)  # what is not finished is waited for; not here
            answer = b""
            with contextlib.suppress(OSError):
                connection.sendall(data)
                while part := connection.recv(4096):
                    answer += part
            connection.close()
        assert b"Traceback" not in answer
        if answer.startswith(b"HTTP/1.1 "):
            statuses.add(int(answer.split()[1]))
    assert {400, 404} <= statuses
    assert not {status for status in statuses if status >= 500}, statuses
    assert "Traceback" not in caplog.text
    assert get(coordinator.ops_port, "/readyz")[0] == 200


def test_a_folder_in_use_and_a_port_in_use_are_named_and_nothing_is_left_open(path, tmp_path):
    with Coordinator(load(path, {})) as first:
        with pytest.raises(StateLocked, match=f"process {os.getpid()}"):
            Coordinator(load(path, {})).start()
        (other := tmp_path / "other").mkdir()
        for name in PORTS:
            taken = config_file(other, **{name: first.ops_port})
            with pytest.raises(ConnectionFailed, match=name.partition("_")[0]):
                Coordinator(load(taken, {})).start()
        with Coordinator(load(config_file(other), {})):  # nothing of the failed starts is in the way
            pass
    with open_store(tmp_path / "state" / "lepton.db") as store:
        assert [e.kind for e in store.events()] == ["server.started", "server.stopped"]
        store.verify_journal()


def test_it_ends_within_seconds_though_somebody_holds_a_connection(path):
    with Coordinator(load(path, {})) as made:
        held = socket.create_connection(("127.0.0.1", made.ops_port))
        held.sendall(b"GET /healthz HTTP/1.1\r\n")  # never finishes
        time.sleep(0.1)
        made.close()  # within the 30 s after which a thread would be left behind
        held.close()
    assert not [t for t in threading.enumerate() if t.name.startswith(("listen.", "run", "fleet", "flower"))]


# --- doctor -------------------------------------------------------------------------------------------


def failed(checks):
    return {check.name: (check.detail, check.hint) for check in checks if not check.ok}


def test_doctor_knows_a_coordinator_that_runs(tmp_path, free_ports):
    path = config_file(tmp_path, **dict(zip(PORTS, free_ports(len(PORTS)), strict=True)))
    assert failed(examine("server", path)) == {}
    assert not (tmp_path / "state").exists()  # it looks and changes nothing
    with Coordinator(load(path, {})):
        checks = {check.name: check for check in examine("server", path, rebuild=True)}
        assert failed(checks.values()) == {}
        assert checks["coordinator"].detail == f"running, process {os.getpid()}"
        assert "coordinator's" in checks["listen.fleet_port"].detail
        assert "events verified" in checks["journal"].detail
        assert checks["ca.pem"].detail.startswith("until ")
    assert {c.name: c for c in examine("server", path)}["coordinator"].detail == "not running"


def test_doctor_finds_what_was_altered(path, tmp_path):
    import sqlite3

    with Coordinator(load(path, {})):
        pass
    database = tmp_path / "state" / "lepton.db"
    with open_store(database) as store:
        body = {"run_id": "r1", "name": "a", "spec": {"rounds": 1}}
        store.record("run.queued", body)
        store.record("run.started", {"run_id": "r1"})
        store.record("model.created", {"run_id": "r1", "round": 0, "model_sha256": "ab" * 32})
    assert failed(examine("server", path))["models"][0] == "missing: abababababab of run r1"
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE run SET name = 'b'")
    connection.close()
    assert "projections" not in failed(examine("server", path))
    found = failed(examine("server", path, rebuild=True))
    assert found["projections"][0] == "1 rows differ: run r1: name differs"
    with sqlite3.connect(database) as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute("UPDATE event SET body = '{}' WHERE seq = 1")
    connection.close()
    assert "event 1 (server.started) was altered" in str(failed(examine("server", path, rebuild=True)))
    database.write_bytes(b"no database" * 1000)
    for leftover in database.parent.glob("lepton.db-*"):
        leftover.unlink()
    assert "not an intact SQLite database" in failed(examine("server", path))["database"][0]


@pytest.fixture(autouse=True)
def quiet():
    yield
    logging.getLogger("uvicorn.error").handlers.clear()


def test_a_listener_names_its_protocol():
    """asyncio sets TCP_NODELAY by it: without, each small answer waits for an acknowledgement (40 ms)."""
    with BoundedListener(socket.AF_INET, 1, 1) as listener:
        _bind(listener, "127.0.0.1", 0, "listen.fleet_port")
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert listener.proto == accepted.proto == socket.IPPROTO_TCP
