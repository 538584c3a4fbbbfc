"""Connections with the bounds that uvicorn and gRPC lack: on number, handshakes and heads of requests.

    room = Room.of(config.limits)                                  # what the open files allow
    listener = BoundedListener(socket.AF_INET, room.fleet, room.of_address(room.fleet))
    uvicorn.Config(app, loop=LOOP, http=BoundedHttp, ws="none")    # serves on the listener
    crowd = Crowd({9441: 2048})                                    # a port of gRPC, which accepts by itself
    crowd.thin()                                                   # now and then

One address is one of IPv4, or a /64 of IPv6, which one household or host has to itself. Bodies of requests
are the application's business.
"""

import asyncio
import contextlib
import ipaddress
import logging
import os
import resource
import socket
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from lepton_server.admission import Door
from lepton_server.config import LimitsSection

HANDSHAKE_S: Final = 20.0  # for TLS, at every port
HEAD_S: Final = 20.0  # for the head of a request, from the connection or its first byte on
HEAD_BYTES: Final = 32 * 1024
ENROLMENT_CONNECTIONS: Final = 1024  # to the enrolment port at a time
OPS_CONNECTIONS: Final = 256  # to the operator's endpoints
OWN_FILES: Final = 512  # that the coordinator has open besides connections
REFUSED_AT_ONCE: Final = 100  # connections, before others have their turn
QUIET_S: Final = 60.0  # between two lines of the log about the same
LOOP: Final = "lepton_server.connections:Loop"  # for uvicorn
log = logging.getLogger(__name__)

T = TypeVar("T")
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# uvicorn has two parsers, and takes the one that is installed; both keep to this.
if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as _Protocol
else:
    _Protocol = AutoHTTPProtocol


# -- how many -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Room:
    """Connections to each port at a time; together they leave the process files enough for its own."""

    device: int
    fleet: int
    enrolment: int
    ops: int
    per_address: int

    @classmethod
    def of(cls, limits: LimitsSection) -> Self:
        """What is configured, less where the process may not open so many files: the hard RLIMIT_NOFILE."""
        files = _raise_file_limit()
        own, fleet = min(OWN_FILES, files // 4), min(limits.max_connections, files // 4)
        enrolment, ops = min(ENROLMENT_CONNECTIONS, files // 16), min(OPS_CONNECTIONS, files // 64)
        left = files - own - fleet - enrolment - ops
        device, per_address = min(limits.max_device_connections, left), limits.max_connections_per_address
        return cls(device, fleet, enrolment, ops, per_address)

    def of_address(self, most: int) -> int:
        """Of those to one port, how many one address may have: half of them at most."""
        return max(1, min(self.per_address, most // 2))


def _raise_file_limit() -> int:
    """Allow as many open files, here connections, as the hard limit does; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return 2**20 if soft == resource.RLIM_INFINITY else soft


def address_of(host: str) -> str:
    """The address that counts as one caller."""
    if ":" not in host:
        return host
    with contextlib.suppress(ValueError):
        address = ipaddress.IPv6Address(host.partition("%")[0])
        return str(address.ipv4_mapped or ipaddress.IPv6Network((address, 64), strict=False))
    return host


class BoundedListener(socket.socket):
    """A socket to listen with that hangs up on connections beyond a bound before a byte is exchanged."""

    def __init__(self, family: int, most: int, of_address: int) -> None:
        """A TCP socket, not bound yet.

        Args:
            family: AF_INET or AF_INET6.
            most: Connections at a time, those in their handshake included.
            of_address: The same, of one address.
        """
        # With the protocol named asyncio sets TCP_NODELAY; without it every small answer waits for an ACK.
        super().__init__(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._door, self._note = Door(most, of_address), _Note()

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection that there is room for; as of ``socket``, for one event loop."""
        for _ in range(REFUSED_AT_ONCE):
            plain, peer = super().accept()
            address = address_of(peer[0])
            if self._door.enter(address):
                return _Counted(plain, partial(self._door.leave, address)), peer
            plain.close()
            self._note.warn(f"too many connections, of {address} or of all: one was closed")
        raise BlockingIOError  # the event loop has others to serve, and comes again


class _Counted(socket.socket):
    """A connection that tells when it is closed."""

    def __init__(self, plain: socket.socket, closed: Callable[[], None]) -> None:
        super().__init__(plain.family, plain.type, plain.proto, fileno=plain.detach())
        self._on_close: Callable[[], None] | None = closed

    def close(self) -> None:
        super().close()
        told, self._on_close = self._on_close, None
        if told is not None:
            told()


class Crowd:
    """Hangs up on the youngest connections of an address that has too many, at ports of gRPC.

    gRPC accepts by itself, bounds only the number of all connections to a port, and tells nobody of one
    before its first call; so this looks at the sockets of the process. On Linux, and only once many are open.
    """

    def __init__(self, bounds: Mapping[int, int]) -> None:
        """Nobody is known yet.

        Args:
            bounds: Of each port, how many connections one address may have there.
        """
        self._bounds, self._note = dict(bounds), _Note()
        self._age: dict[tuple[object, ...], int] = {}  # of connections, in the order in which they were seen
        self._seen = 0

    def thin(self) -> int:
        """Look once; returns how many connections were closed."""
        try:
            files = [int(name) for name in os.listdir("/proc/self/fd")]
        except FileNotFoundError:
            return 0
        if len(files) <= min(self._bounds.values()):
            self._age.clear()
            return 0
        crowds: dict[tuple[int, str], list[tuple[int, int]]] = defaultdict(list)  # ages and files
        ages: dict[tuple[object, ...], int] = {}
        for file in files:
            port, peer = _borrowing(file, _ends) or (0, ())
            if port in self._bounds:
                self._seen += 1
                age = ages[port, *peer] = self._age.get((port, *peer), self._seen)
                crowds[port, address_of(peer[0])].append((age, file))
        self._age = ages
        return sum(self._cut(port, address, crowd) for (port, address), crowd in crowds.items())

    def _cut(self, port: int, address: str, crowd: list[tuple[int, int]]) -> int:
        excess = sorted(crowd)[self._bounds[port] :]
        for _, file in excess:
            _borrowing(file, lambda connection: _hang_up(connection, address))
        if excess:
            self._note.warn(f"{len(excess)} connections too many of {address} to port {port} were closed")
        return len(excess)


def _borrowing(file: int, use: Callable[[socket.socket], T | None]) -> T | None:
    """Use a socket of somebody else in this process; None if the file is none, or not any more.

    It is left open: to close any descriptor of a database's file, even a copy, would give up its locks.
    """
    try:
        borrowed = socket.socket(fileno=file)
    except OSError:
        return None
    try:
        return use(borrowed)
    except OSError:
        return None
    finally:
        borrowed.detach()


def _ends(connection: socket.socket) -> tuple[int, tuple[Any, ...]] | None:
    """The local port of a connection, and its peer."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    return connection.getsockname()[1], connection.getpeername()


def _hang_up(connection: socket.socket, address: str) -> None:
    """End a connection, unless its number is another one's by now."""
    if (ends := _ends(connection)) is not None and address_of(ends[1][0]) == address:
        connection.shutdown(socket.SHUT_RDWR)


class _Note:
    """A warning that does not fill the log."""

    def __init__(self) -> None:
        self._next = 0.0

    def warn(self, words: str) -> None:
        """Log it, unless there was one lately."""
        if (now := time.monotonic()) >= self._next:
            self._next = now + QUIET_S
            log.warning("%s", words)


# -- HTTP ---------------------------------------------------------------------------------------------------


class Loop(asyncio.SelectorEventLoop):
    """asyncio's own, with less patience for handshakes.

    uvloop would keep 0.4 MB of TLS buffers for each connection, and accept past a :class:`BoundedListener`.
    """

    async def create_server(self, *args: Any, **options: Any) -> asyncio.Server:  # noqa: ANN401 - as there
        """As asyncio's."""
        if options.get("ssl") is not None:
            options.setdefault("ssl_handshake_timeout", HANDSHAKE_S)
        return await super().create_server(*args, **options)


def leaving_in_order(app: Any) -> App:  # noqa: ANN401 - every framework has its own types for the same
    """The application, whose requests a shutdown may cut off: 503 to the caller, no traceback in the log."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        began = False

        async def noting(message: dict[str, Any]) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await app(scope, receive, noting)
        except asyncio.CancelledError:  # uvicorn's, whose patience is over; the task ends with this answer
            if scope["type"] == "http" and not began:
                headers = [(b"retry-after", b"1"), (b"content-length", b"0")]
                await send({"type": "http.response.start", "status": 503, "headers": headers})
                await send({"type": "http.response.body", "body": b""})

    return answer


class BoundedHttp(_Protocol):
    """One connection, whose requests must have a head in time and of bounded size."""

    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401 - as in uvicorn
        """Called by uvicorn's loop, like the next two."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes."""
        if self._in_head():
            self._expect_head()
            self._head_bytes += len(data)
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._head_came()
        elif self._head_bytes > HEAD_BYTES:
            self._close(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n")

    def _in_head(self) -> bool:
        """Whether what comes now belongs to the head of a request: there is none whose body is on its way."""
        return self.cycle is None or self.cycle.response_complete or not self.cycle.more_body

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(
                HEAD_S, self._close, b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\n\r\n"
            )

    def _head_came(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self, last_words: bytes) -> None:
        if not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(last_words)
            self.transport.close()
