"""Unary gRPC calls as bytes: what a benchmark can make many of with little processor time.

    line = await Line.dial(port, context, path="/lepton.v1.DeviceService/CheckIn", patience_s=20.0)
    answer = await line.call(message)      # Answer(status=0, retry_s=0.0, ...)
    line.close()

One connection of one device: TLS and HTTP/2 as the device's own stack speaks them (RFC 9113 and gRPC's
"gRPC over HTTP2"), with the headers of a call encoded once. It asks the server for headers that do not lean
on earlier ones (a table of size 0, RFC 7541 section 4.2), so that only the last ones of a call are decoded.
"""

import asyncio
import socket
import ssl
from dataclasses import dataclass
from typing import Self

import hpack

from lepton_fl.wire.status import CODE_KEY, PATIENCE_KEY, RETRY_KEY

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
UNKNOWN = 2  # gRPC's status
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_WINDOW = 2**30  # bytes that the server may send: more than all answers
_SETTINGS = {1: 0, 2: 0, 4: _WINDOW}  # no header table, no push, window of a stream


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a call."""

    status: int  # gRPC's code; 0 = OK
    detail: str = ""
    retry_s: float = 0.0  # when to come again, if that was said
    dropped: bool = False  # the server reset the stream without a word
    ours: bool = False  # it has our code of an error


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    """One frame of HTTP/2."""
    return b"%b%c%c%b%b" % (len(body).to_bytes(3, "big"), kind, flags, stream.to_bytes(4, "big"), body)


def head_of(path: str, patience_s: float, **changes: str) -> bytes:
    """The encoded headers of a call; ``changes`` by their names, with _ for -."""
    names = {
        ":method": "POST", ":scheme": "https", ":path": path, ":authority": "127.0.0.1",
        "te": "trailers", "content-type": "application/grpc", "user-agent": "lepton-bench",
        "grpc-timeout": f"{patience_s * 1000:.0f}m", PATIENCE_KEY: str(patience_s),
    } | {name.replace("_", "-"): value for name, value in changes.items()}  # fmt: skip
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    return encoder.encode([hpack.NeverIndexedHeaderTuple(*name) for name in names.items()])


class Line:
    """A connection; calls may overlap."""

    def __init__(self, connection: ssl.SSLSocket, head: bytes) -> None:
        self._connection, self._head = connection, head
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._next, self._unread, self._unsent = 1, b"", b""
        self.is_open = True
        self.most = 1  # calls under way that the server wants at most, once it has said so
        self._decoder = hpack.Decoder()
        self._decoder.header_table_size = 0
        self._loop.add_reader(connection, self._readable)
        settings = b"".join(
            key.to_bytes(2, "big") + value.to_bytes(4, "big") for key, value in _SETTINGS.items()
        )
        window = frame(8, 0, 0, _WINDOW.to_bytes(4, "big"))
        self._send(_HELLO + frame(SETTINGS, 0, 0, settings) + window)

    @classmethod
    async def dial(cls, port: int, context: ssl.SSLContext, path: str, patience_s: float) -> Self:
        """Connect to a port of this machine; OSError if that fails or takes longer than a call may."""
        plain = socket.socket()
        plain.setblocking(False)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            async with asyncio.timeout(patience_s):
                loop = asyncio.get_running_loop()
                await loop.sock_connect(plain, ("127.0.0.1", port))
                connection = context.wrap_socket(
                    plain, server_hostname="127.0.0.1", do_handshake_on_connect=False
                )
                await _handshake(loop, connection)
        except BaseException:
            plain.close()
            raise
        return cls(connection, head_of(path, patience_s))

    @property
    def under_way(self) -> int:
        """Calls that have no answer yet."""
        return len(self._waiting)

    async def call(self, message: bytes, head: bytes = b"", body: bytes | None = None) -> Answer:
        """Make the call and wait for the server, which knows the patience; OSError if the connection ends.

        Args:
            message: of the call.
            head: its encoded headers; empty = those of the line.
            body: what is sent instead of the message in gRPC's own frame.
        """
        if not self.is_open:
            raise ConnectionResetError("the connection has ended")
        stream, self._next = self._next, self._next + 2
        answer = self._waiting[stream] = self._loop.create_future()
        if body is None:
            body = b"\0" + len(message).to_bytes(4, "big") + message
        head = frame(HEADERS, END_HEADERS, stream, head or self._head)
        self._send(head + frame(DATA, END_STREAM, stream, body))
        return await answer

    def send(self, data: bytes) -> None:
        """Send bytes that are no call."""
        self._send(data)

    def close(self) -> None:
        """Hang up."""
        self._end(ConnectionAbortedError("hung up"))

    def _end(self, error: OSError) -> None:
        if not self.is_open:
            return
        self.is_open = False
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
        self._connection.close()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(error)
        self._waiting.clear()

    # -- bytes ----------------------------------------------------------------------------------------------

    def _send(self, data: bytes) -> None:
        if not self.is_open:
            return
        if not self._unsent:
            self._loop.add_writer(self._connection, self._writable)
        self._unsent += data
        self._writable()

    def _writable(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return
        except OSError as error:
            return self._end(error)
        self._loop.remove_writer(self._connection)

    def _readable(self) -> None:
        try:
            while data := self._connection.recv(65_536):
                self._read(data)
                if not self.is_open:
                    return
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError as error:
            return self._end(error)
        self._end(ConnectionResetError("the server hung up"))

    def _read(self, data: bytes) -> None:
        data, at = self._unread + data, 0
        while len(data) - at >= 9 and self.is_open:
            end = at + 9 + int.from_bytes(data[at : at + 3], "big")
            if end > len(data):
                break
            stream = int.from_bytes(data[at + 5 : at + 9], "big")
            self._frame(data[at + 3], data[at + 4], stream, data[at + 9 : end])
            at = end
        self._unread = data[at:]

    def _frame(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        if kind == HEADERS and flags & END_STREAM:
            self._answered(stream, self._trailers(flags, body))
        elif kind == RST_STREAM:
            self._answered(stream, Answer(1, f"reset, code {int.from_bytes(body, 'big')}", dropped=True))
        elif kind in (SETTINGS, PING) and not flags & ACK:
            if kind == SETTINGS:
                found = {body[at : at + 2]: body[at + 2 : at + 6] for at in range(0, len(body), 6)}
                self.most = int.from_bytes(found.get(b"\0\3", b"\x7f\xff\xff\xff"), "big")
            self._send(frame(kind, ACK, 0, body if kind == PING else b""))
        elif kind == GOAWAY:
            self._end(ConnectionResetError("the server takes no more calls of this connection"))

    def _trailers(self, flags: int, body: bytes) -> Answer:
        assert flags & END_HEADERS, "gRPC's trailers fit a frame"
        raw = self._decoder.decode(body, raw=True)  # the stack may repeat what it was sent
        found = {bytes(key).decode(): bytes(value).decode(errors="replace") for key, value in raw}
        status = int(found.get("grpc-status", UNKNOWN))  # the stack refuses some calls in HTTP's words
        return Answer(
            status, found.get("grpc-message", ""), float(found.get(RETRY_KEY, 0)), ours=CODE_KEY in found
        )

    def _answered(self, stream: int, answer: Answer) -> None:
        waiting = self._waiting.pop(stream, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)


async def _handshake(loop: asyncio.AbstractEventLoop, connection: ssl.SSLSocket) -> None:
    while True:
        try:
            return connection.do_handshake()
        except ssl.SSLWantReadError:
            add, remove = loop.add_reader, loop.remove_reader
        except ssl.SSLWantWriteError:
            add, remove = loop.add_writer, loop.remove_writer
        ready = asyncio.Event()
        add(connection, ready.set)
        try:
            await ready.wait()
        finally:
            remove(connection)
