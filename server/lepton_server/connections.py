"""HTTP connections with the bounds that uvicorn lacks: on their number, and on the head of a request.

    uvicorn.Config(app, http=bounded_http(max_connections=4096), ws="none")

Bodies are the application's business; so is what a handshake may take asyncio's (60 s).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_S: Final = 20.0  # for the head of a request, from the connection or its first byte on
HEAD_BYTES: Final = 32 * 1024
log = logging.getLogger(__name__)

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# uvicorn has two parsers, and takes the one that is installed; both keep to this.
if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as _Protocol
else:
    _Protocol = AutoHTTPProtocol


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


def bounded_http(max_connections: int) -> type[asyncio.Protocol]:
    """The protocol class, for at most so many connections at a time; further ones are closed at once."""
    return type("Bounded", (_Bounded,), {"max_connections": max_connections})


class _Bounded(_Protocol):
    """One connection."""

    max_connections: int
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401 - as in uvicorn
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            log.warning("more than %d connections: one was closed", self.max_connections)
            transport.abort()
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
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
