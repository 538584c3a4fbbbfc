"""Connections that send too slowly or too much, or are too many; with both of uvicorn's parsers."""

import asyncio
import contextlib
import fcntl
import http.client
import importlib
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest
import uvicorn
from uvicorn.protocols.http import auto
from uvicorn.protocols.http.h11_impl import H11Protocol

from lepton_server import connections
from lepton_server.authority import Authority
from lepton_server.config import LimitsSection
from lepton_server.tls import ServerTls

pytestmark = pytest.mark.network
PATIENCE = 60.0
SLOW_S = 1.0  # longer than a head takes on a machine that does other things as well


def parsers():
    yield H11Protocol
    if "httptools" in sys.modules or importlib.util.find_spec("httptools"):
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

        yield HttpToolsProtocol


async def app(scope, receive, send):
    """Answers with the length of the body; /slow does so later than a head may come."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    if scope["path"] == "/slow":
        await asyncio.sleep(1.2 * SLOW_S)
    body = str(size).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(params=parsers(), ids=lambda parser: parser.__name__)
def serve(request, monkeypatch):
    """Start a server with at most so many connections; its port."""
    monkeypatch.setattr(auto, "AutoHTTPProtocol", request.param)
    module = importlib.reload(connections)
    started = []

    def start(most=100, of_address=None, tls=None, head_s=PATIENCE):
        monkeypatch.setattr(module, "HEAD_S", head_s)
        config = uvicorn.Config(
            app,
            loop=module.LOOP,
            http=module.BoundedHttp,
            ws="none",
            lifespan="off",
            log_level="error",
            ssl_context_factory=tls and (lambda *_: tls),
        )
        listener = module.BoundedListener(socket.AF_INET, most, of_address or most)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.005)
        started.append((server, thread, listener))
        return listener.getsockname()[1]

    yield start
    for server, thread, listener in started:
        server.should_exit = True
        thread.join(PATIENCE)
        listener.close()
    monkeypatch.undo()
    importlib.reload(connections)


def connect(port, source="127.0.0.1"):
    return socket.create_connection(("127.0.0.1", port), PATIENCE, source_address=(source, 0))


def rest(connection):
    """Everything until the other side hangs up."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def ask(connection, path="/", body=b""):
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    answer = b""
    while b"\r\n\r\n" not in answer or not answer.partition(b"\r\n\r\n")[2]:
        part = connection.recv(4096)
        if not part:
            raise ConnectionError(answer)
        answer += part
    return answer


def serves(port, wrap=contextlib.nullcontext):
    """Whether there is room again: the other side hears of an end a moment later."""
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends:
        with contextlib.suppress(OSError), connect(port) as plain, wrap(plain) as again:
            return ask(again)
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n", b"G"])
def test_a_head_that_does_not_come_is_waited_for_so_long(serve, sent):
    with connect(serve(head_s=0.3)) as slow:
        slow.sendall(sent)
        assert rest(slow).startswith(b"HTTP/1.1 408 ")


def test_a_head_that_dribbles_gains_nothing(serve):
    with connect(serve(head_s=0.3)) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\n")
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < PATIENCE:
                slow.sendall(b"a: b\r\n")
                time.sleep(0.05)
        assert time.monotonic() - began < PATIENCE


def test_the_second_head_of_a_kept_connection_is_waited_for_as_well(serve):
    with connect(serve(head_s=SLOW_S)) as kept:
        assert ask(kept, body=b"abc").endswith(b"3")
        kept.sendall(b"GET / HTT")
        assert rest(kept).startswith(b"HTTP/1.1 408 ")


def test_a_head_without_end_is_refused(serve):
    with connect(serve()) as loud:
        loud.sendall(b"GET / HTTP/1.1\r\n")
        try:
            for n in range(10_000):
                loud.sendall(f"header-{n}: {'x' * 1000}\r\n".encode())
        except ConnectionError:
            return
        assert b" 200 " not in rest(loud)


def test_large_bodies_and_slow_answers_are_nothing_of_ours(serve):
    with connect(serve(head_s=SLOW_S)) as good:
        assert ask(good, body=b"x" * 1_000_000).endswith(b"1000000")
        assert ask(good, "/slow").endswith(b"0")  # longer than a head may take
        time.sleep(1.2 * SLOW_S)  # so is this rest between two requests
        assert ask(good, body=b"x").endswith(b"1")


def test_a_body_may_come_slowly_as_far_as_we_are_concerned(serve):
    with connect(serve(head_s=SLOW_S)) as good:
        good.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\na")
        time.sleep(1.2 * SLOW_S)
        good.sendall(b"bc")
        assert b" 200 " in good.recv(4096)


def test_one_connection_too_many_is_closed_and_the_others_live(serve):
    port = serve(2)
    with connect(port) as first, connect(port) as second:
        assert ask(first)
        assert ask(second)
        with connect(port) as third:
            assert rest(third) == b""
        assert ask(first)
    assert serves(port)


def test_one_address_leaves_room_for_others(serve):
    port = serve(5, of_address=2)
    with connect(port) as first, connect(port) as second:
        assert ask(first)
        for _ in range(20):
            with connect(port) as third:
                assert rest(third) == b""
        with connect(port, "127.0.0.2") as other, connect(port, "127.0.0.2"):
            assert ask(other)
        assert ask(second)
    assert serves(port)


def test_half_a_handshake_is_counted_and_given_up(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "HANDSHAKE_S", 1.0)
    authority = Authority.open(tmp_path / "keys", ("127.0.0.1",))
    port = serve(2, tls=ServerTls(authority.server_path).context)
    trust = ssl.create_default_context(cadata=authority.ca_pem.decode())
    with connect(port) as silent, connect(port) as begun:
        begun.sendall(bytes.fromhex("16030100"))  # the first bytes of a TLS record
        with connect(port) as third:
            assert rest(third) == b""  # two handshakes are all that there is room for
        assert rest(silent) == rest(begun) == b""  # they are given up, ...
    assert serves(
        port, lambda plain: trust.wrap_socket(plain, server_hostname="127.0.0.1")
    )  # ... and make room


def test_a_flood_is_one_line_of_the_log(serve, caplog):
    port = serve(1)
    with connect(port) as first:
        assert ask(first)
        for _ in range(50):
            with connect(port) as more:
                assert rest(more) == b""
    assert caplog.text.count("too many connections") == 1


class Accepting:
    """A port whose accepting is nothing of ours, as gRPC's."""

    def __init__(self, family=socket.AF_INET, host="127.0.0.1"):
        self.listener = socket.create_server((host, 0), family=family)
        self.port, self.ends = self.listener.getsockname()[1], []

    def dial(self, count, source="127.0.0.1"):
        """Connections, the near ends; the oldest first."""
        near = []
        for _ in range(count):
            near.append(
                socket.create_connection(
                    self.listener.getsockname()[:2], PATIENCE, source_address=(source, 0)
                )
            )
            self.ends += [near[-1], self.listener.accept()[0]]
        return near

    def close(self):
        for end in (*self.ends, self.listener):
            end.close()


@pytest.fixture
def accepting():
    made = []

    def start(*arguments):
        made.append(Accepting(*arguments))
        return made[-1]

    yield start
    for one in made:
        one.close()


def is_open(near):
    near.setblocking(False)
    try:
        return near.recv(1) != b""
    except BlockingIOError:
        return True


def test_a_crowd_of_one_address_loses_its_youngest(accepting):
    one, two = accepting(), accepting()
    crowd = connections.Crowd({one.port: 3, two.port: 2})
    old = one.dial(3)
    elsewhere = two.dial(2)
    assert crowd.thin() == 0
    young, others = one.dial(4), one.dial(3, "127.0.0.2")
    assert crowd.thin() == 4
    assert all(map(is_open, [*old, *others, *elsewhere]))
    assert not any(map(is_open, young))
    assert crowd.thin() == 4  # they are still in the hands of whoever accepted them: nothing else is cut
    assert all(map(is_open, [*old, *others, *elsewhere]))


def test_a_crowd_leaves_files_and_their_locks_alone(accepting, tmp_path):
    port = accepting()
    near = port.dial(5)
    pair, other_end = socket.socketpair()
    with open(tmp_path / "file", "wb") as file, pair, other_end:
        fcntl.lockf(file, fcntl.LOCK_EX)
        connections.Crowd({port.port: 1}).thin()
        script = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'wb'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        other = subprocess.run([sys.executable, "-c", script, file.name], capture_output=True, check=False)
        assert b"BlockingIOError" in other.stderr
        file.write(b"still open")
        pair.setblocking(False)
        with pytest.raises(BlockingIOError):
            pair.recv(1)
    assert sum(map(is_open, near)) == 1


def test_addresses():
    assert connections.address_of("192.0.2.7") == "192.0.2.7"
    assert connections.address_of("::ffff:192.0.2.7") == "192.0.2.7"
    assert connections.address_of("2001:db8::1:2") == connections.address_of("2001:db8::9") == "2001:db8::/64"
    assert connections.address_of("fe80::1%eth0") == "fe80::/64"
    assert connections.address_of("not: an address") == "not: an address"


@pytest.mark.parametrize("files", [64, 256, 1024, 4096, 20_000, 1_048_576])
def test_all_connections_together_leave_files_for_the_coordinator(monkeypatch, files):
    monkeypatch.setattr(connections, "_raise_file_limit", lambda: files)
    room = connections.Room.of(LimitsSection())
    assert min(room.device, room.fleet, room.enrolment, room.ops) >= 1
    assert room.device + room.fleet + room.enrolment + room.ops <= files - min(512, files // 4)
    assert all(1 <= room.of_address(most) <= max(1, most // 2) for most in (room.device, room.fleet, 1, 2))


def test_what_is_configured_is_not_exceeded(monkeypatch):
    monkeypatch.setattr(connections, "_raise_file_limit", lambda: 10**6)
    limits = LimitsSection(max_connections=7, max_device_connections=9, max_connections_per_address=3)
    room = connections.Room.of(limits)
    assert (room.device, room.fleet, room.of_address(9)) == (9, 7, 3)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_request_that_a_shutdown_cuts_off_leaves_no_traceback(wrapped, caplog):
    came = threading.Event()

    async def endless(scope, receive, send):
        came.set()
        await asyncio.Event().wait()

    app = connections.leaving_in_order(endless) if wrapped else endless
    settings = {"ws": "none", "lifespan": "off", "log_config": None, "timeout_graceful_shutdown": 0}
    server = uvicorn.Server(uvicorn.Config(app, **settings))
    answers = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()

        def ask():
            connection = http.client.HTTPConnection("127.0.0.1", listener.getsockname()[1], timeout=PATIENCE)
            connection.request("GET", "/")
            answers.append(connection.getresponse().status)
            connection.close()

        caller = threading.Thread(target=ask)
        caller.start()
        assert came.wait(PATIENCE)
        server.should_exit = True
        thread.join(PATIENCE)
        caller.join(PATIENCE)
    assert answers == [503 if wrapped else 500]
    assert ("Traceback" in caplog.text) is not wrapped
