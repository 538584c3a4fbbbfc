"""Connections that send too slowly or too much, or are too many; with both of uvicorn's parsers."""

import asyncio
import contextlib
import http.client
import importlib
import socket
import sys
import threading
import time

import pytest
import uvicorn
from uvicorn.protocols.http import auto
from uvicorn.protocols.http.h11_impl import H11Protocol

from lepton_server import connections

pytestmark = pytest.mark.network
PATIENCE = 10.0


def parsers():
    yield H11Protocol
    if "httptools" in sys.modules or importlib.util.find_spec("httptools"):
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

        yield HttpToolsProtocol


async def app(scope, receive, send):
    """Answers with the length of the body; /slow answers after a second."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    if scope["path"] == "/slow":
        await asyncio.sleep(1.0)
    body = str(size).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(params=parsers(), ids=lambda parser: parser.__name__)
def serve(request, monkeypatch):
    """Start a server with at most so many connections; its port."""
    monkeypatch.setattr(auto, "AutoHTTPProtocol", request.param)
    module = importlib.reload(connections)
    monkeypatch.setattr(module, "HEAD_S", 0.3)
    started = []

    def start(most=100):
        config = uvicorn.Config(
            app, http=module.bounded_http(most), ws="none", lifespan="off", log_level="error"
        )
        listener = socket.create_server(("127.0.0.1", 0))
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


def connect(port):
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


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
        assert part, answer
        answer += part
    return answer


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n", b"G"])
def test_a_head_that_does_not_come_is_waited_for_so_long(serve, sent):
    with connect(serve()) as slow:
        slow.sendall(sent)
        assert rest(slow).startswith(b"HTTP/1.1 408 ")


def test_a_head_that_dribbles_gains_nothing(serve):
    with connect(serve()) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\n")
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < PATIENCE:
                slow.sendall(b"a: b\r\n")
                time.sleep(0.05)
        assert time.monotonic() - began < PATIENCE


def test_the_second_head_of_a_kept_connection_is_waited_for_as_well(serve):
    with connect(serve()) as kept:
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
    with connect(serve()) as good:
        assert ask(good, body=b"x" * 1_000_000).endswith(b"1000000")
        assert ask(good, "/slow").endswith(b"0")  # longer than a head may take
        time.sleep(0.5)  # so is this rest between two requests
        assert ask(good, body=b"x").endswith(b"1")


def test_a_body_may_come_slowly_as_far_as_we_are_concerned(serve):
    with connect(serve()) as good:
        good.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\na")
        time.sleep(0.5)
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
    with connect(port) as again:
        assert ask(again)


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
