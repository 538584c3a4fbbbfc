"""The ASGI application: a guard of our own around Flower's fleet router.

A request passes in this order, and nothing of a body is read before the second step:

1. the path is one of the seven that a node of ours uses; every other is 404;
2. the headers carry a fresh signature of an admitted key, else 401, and the node calls at its pace, else 429;
3. the body arrives within its size and time, else 413 or 408;
4. what it asks concerns this node (its own reply, an object of its own message), else 403, 409 or 410;
5. a reply gets a slot of its mailbox's gate, else 503 with Retry-After; so does a large response; the request
   that completes a reply which must be durable is answered when it is;
6. Flower's own middlewares and handlers do the work, and authenticate once more. What rounds are made of goes
   past the middlewares, which cost more than the work: messages straight to Flower's handlers, with small
   objects in them (``wire.along``), objects straight to its state, where nothing copies them (``frames``).

Refusals are JSON: ``{"code": "late", "message": "..."}``.
"""

import asyncio
import base64
import binascii
import datetime
import json
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Final, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI, Request
from flwr.common.constant import (
    SUPERLINK_NODE_ID,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
)
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import (
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import is_valid_sha256_hash, iterate_object_tree
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware, get_protobuf_request
from flwr.superlink.dependencies.linkstate import get_linkstate
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import get_enable_supernode_auth
from flwr.superlink.routers.fleet.router import router as fleet_router
from flwr.superlink.servicer.fleet import fleet_handlers
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtoMessage
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.types import Receive, Scope, Send

from lepton_fl.crashpoints import reached
from lepton_fl.wire.along import add_along, read_along
from lepton_fl.wire.downlink import ACCEPT, FORM, FORM_OF, HELD, MAX_HELD
from lepton_server.admission import Pace
from lepton_server.flower.frames import cut_content, pull_response
from lepton_server.flower.gate import Gate
from lepton_server.flower.state import State

if TYPE_CHECKING:
    from lepton_server.flower.link import FlowerLink

log = logging.getLogger(__name__)

PREFIX: Final = "/v1/fleet/"
PATHS: Final = frozenset(
    PREFIX + name
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "push-object",
        "pull-object",
    )
)
SMALL_BODY: Final = 64 * 1024  # bytes; all requests but the two that push
ANNOUNCE_BODY: Final = 1024 * 1024  # bytes; a reply's tree of object ids
SLICE: Final = 16 * 1024  # bytes of a response written at a time: what a slow reader may leave with us
DRAIN_S: Final = 2.0  # how long a refused body is read and thrown away, so that the refusal is seen

Headers = list[tuple[bytes, bytes]]
T = TypeVar("T", bound=ProtoMessage)


@dataclass(frozen=True)
class Limits:
    """Sizes, times and numbers of the fleet API.

    Attributes:
        max_body_bytes: One request. Flower splits arrays into chunks of 5 MiB.
        max_reply_bytes: All objects of one reply together, and what its arrays unpack to.
        upload_timeout_s: For one request body, and between two objects of a reply; a device that died
            holds its slot no longer.
        slot_wait_s: How long an announced reply waits for a slot before it is told to come back.
        max_pulls: Objects being sent at a time; the others wait.
        calls_per_s: Of one node, in the long run; a reply takes one call for each of its objects.
        call_burst: Of one node at once, after a rest.
    """

    max_body_bytes: int = 8 * 1024 * 1024
    max_reply_bytes: int = 512 * 1024 * 1024
    upload_timeout_s: float = 60.0
    slot_wait_s: float = 15.0
    max_pulls: int = 4
    calls_per_s: float = 200.0
    call_burst: int = 4000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"Expected {name}={value} > 0.")


@dataclass(frozen=True)
class Offer:
    """The link's decision on an announced reply: counted before, or to be uploaded; see ``offer``."""

    gate: Gate | None  # to wait at, or None when the upload has its slot
    repeat: bool = False


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(
        self, status: int, code: str, message: str, headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, tuple(headers)


class Disconnected(Exception):
    """The client has gone; nobody reads an answer."""


class Guard:
    """An ASGI application; see the module."""

    def __init__(self, link: "FlowerLink", state: State, limits: Limits) -> None:
        self._link = link
        self._state = state
        self._limits = limits
        self._fleet = _fleet_app(state)
        self._pulls = Gate(limits.max_pulls)
        self._pace = Pace(limits.calls_per_s, limits.call_burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive)
        try:
            if scope["path"] not in PATHS or scope["method"] != "POST":
                raise Refusal(404, "not-found", "There is no such path.")
            if self._link.closed:
                raise _busy()
            headers = dict(scope["headers"])
            node_id = self._authenticate(headers)
            if wait_s := self._pace.take(str(node_id)):
                later = [(b"retry-after", str(ceil(wait_s)).encode("ascii"))]
                raise Refusal(429, "too-often", "This device calls too often.", later)
            self._link.mark_seen(node_id)
            handle = self._handlers.get(scope["path"], Guard._plain)
            await handle(self, scope, headers, body, send, node_id)
        except Refusal as refusal:
            if not body.complete:
                await body.drain(self._limits.max_body_bytes)
            await _send_refusal(send, refusal, close=not body.complete)
        except Disconnected:
            return

    # --- who ---------------------------------------------------------------------------------------------

    def _authenticate(self, headers: dict[bytes, bytes]) -> int:
        """The node that signed the headers; Flower's signature covers the time only."""
        try:
            pem = base64.b64decode(headers[_PUBLIC_KEY], validate=True)
            signature = base64.b64decode(headers[_SIGNATURE], validate=True)
            timestamp = headers[_TIMESTAMP]
            signed_at = datetime.datetime.fromisoformat(timestamp.decode("ascii"))
            now = datetime.datetime.now(datetime.UTC)
            age = (now - signed_at).total_seconds()
        except (KeyError, ValueError, TypeError, binascii.Error) as error:
            raise _unknown_key() from error
        known = self._link.find_key(pem)
        if known is None:
            raise _unknown_key()
        try:
            known[1].verify(signature, timestamp, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature as error:
            raise _unknown_key() from error
        if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            stamp = now.isoformat().encode("ascii")
            raise Refusal(
                401, "clock", f"The request is {age:.0f} s old by the server's clock.", [(_CLOCK, stamp)]
            )
        return known[0]

    # --- what --------------------------------------------------------------------------------------------

    async def _plain(
        self, scope: Scope, headers: dict[bytes, bytes], body: "_Body", send: Send, node_id: int
    ) -> None:
        content = await body.read(headers, SMALL_BODY, self._limits.upload_timeout_s)
        await _send_response(send, *await self._call(scope, content))

    async def _pull_messages(
        self, scope: Scope, headers: dict[bytes, bytes], body: "_Body", send: Send, node_id: int
    ) -> None:
        request = _parse(
            PullMessagesRequest, await body.read(headers, SMALL_BODY, self._limits.upload_timeout_s)
        )
        if request.node.node_id != node_id:
            raise _unknown_key()
        response = fleet_handlers.pull_messages(request, self._state, self._state.object_store)
        ids = {n.object_id for tree in response.message_object_trees for n in iterate_object_tree(tree)}
        before = response.ByteSize()
        add_along(response, [self._state.get_object(self._state.run_id, name) or b"" for name in ids])
        for tree in response.message_object_trees[:1]:  # one message at a time
            self._link.sent(node_id, tree.object_id, response.ByteSize() - before)
        await _send_response(send, 200, _PROTOBUF, response.SerializeToString())

    async def _pull_object(
        self, scope: Scope, headers: dict[bytes, bytes], body: "_Body", send: Send, node_id: int
    ) -> None:
        content = await body.read(headers, SMALL_BODY, self._limits.upload_timeout_s)
        request = _parse(PullObjectRequest, content)
        self._check_bulk(request, node_id)
        if not self._link.may_fetch(node_id, request.object_id):
            raise Refusal(410, "late", "The object belongs to no open message of this node.")
        if not await self._wait(self._pulls, body):
            raise _busy()
        try:
            async with asyncio.timeout(self._limits.upload_timeout_s):  # a reader that stalls loses its turn
                await self._send_object(send, request.object_id, headers, node_id)
        except TimeoutError as error:
            raise Disconnected from error
        finally:
            self._pulls.release()

    async def _push_object(
        self, scope: Scope, headers: dict[bytes, bytes], body: "_Body", send: Send, node_id: int
    ) -> None:
        if not self._link.may_upload(node_id):
            raise Refusal(409, "no-upload", "No upload of this node is open; announce the reply first.")
        data = await body.collect(headers, self._limits.max_body_bytes, self._limits.upload_timeout_s)
        try:
            request, content = cut_content(data)
        except DecodeError as error:
            raise Refusal(400, "malformed", "The body is no PushObjectRequest.") from error
        self._check_bulk(request, node_id)
        self._link.check_object(node_id, request.session_id, len(content))
        if len(content) > SMALL_BODY:
            stored = await run_in_threadpool(self._store, request, content)
        else:
            stored = self._store(request, content)
        whole = self._link.whole(request.session_id)
        if whole:
            await run_in_threadpool(self._link.keep, whole)
        response = PushObjectResponse(stored=stored)
        await _send_response(send, 200, _PROTOBUF, response.SerializeToString())
        if whole:
            reached("update.acknowledged")

    async def _send_object(
        self, send: Send, object_id: str, headers: dict[bytes, bytes], node_id: int
    ) -> None:
        content = self._state.get_object(self._state.run_id, object_id)
        if content:
            packed = self._packed(object_id, headers)
            form, content = ([_PACKED], packed) if packed else ([], content)
            self._link.sent(node_id, object_id, len(content))
            await _send_response(send, 200, _PROTOBUF + form, *pull_response(content))
        else:  # gone in this moment
            response = PullObjectResponse(object_found=content is not None)
            await _send_response(send, 200, _PROTOBUF, response.SerializeToString())

    def _packed(self, object_id: str, headers: dict[bytes, bytes]) -> bytes | None:
        """An object's smallest form for a device that can unpack it; a device says what it has for that."""
        if headers.get(_ACCEPT) != _PACKED[1]:
            return None
        held = headers.get(_HELD, b"").decode("ascii", "replace").split(",")
        return self._link.forms.smallest(object_id, held[:MAX_HELD])

    def _store(self, request: PushObjectRequest, content: bytearray) -> bool:
        return self._state.store_object(request.run_id, request.session_id, request.object_id, content)

    def _check_bulk(self, request: PullObjectRequest | PushObjectRequest, node_id: int) -> None:
        """What Flower's middleware would check, were these two not called directly."""
        if request.node.node_id != node_id:
            raise Refusal(403, "forged-sender", "The request names another node.")
        if request.run_id != self._state.run_id:
            raise Refusal(410, "late", "The object belongs to another run.")

    async def _push_messages(
        self, scope: Scope, headers: dict[bytes, bytes], body: "_Body", send: Send, node_id: int
    ) -> None:
        limit = min(ANNOUNCE_BODY, self._limits.max_body_bytes)
        content = await body.read(headers, limit, self._limits.upload_timeout_s)
        request = _parse(PushMessagesRequest, content)
        message_id, reply_id = self._check_announcement(request, node_id)
        if not await self._admit_reply(node_id, message_id, reply_id, body):
            answer = PushMessagesResponse(results={reply_id: 0})  # counted before: nothing is left to push
            await _send_response(send, 200, _PROTOBUF, answer.SerializeToString())
            return
        try:
            if len(content) > SMALL_BODY:
                answer = await run_in_threadpool(fleet_handlers.push_messages, request, self._state)
            else:
                answer = fleet_handlers.push_messages(request, self._state)
        except Exception as error:
            log.exception("An announcement of node %d was not taken.", node_id)
            raise Refusal(422, "refused", "The reply was not accepted.") from error
        finally:
            stored = self._link.settle(message_id, reply_id)
        if not stored:
            self._link.offer(node_id, message_id, reply_id)  # says why, when the message was withdrawn
            raise Refusal(422, "refused", "The reply was not accepted.")
        self._take_along(request, answer, node_id)
        whole = self._link.whole(answer.session_id)
        if whole:  # nothing is left to push
            await run_in_threadpool(self._link.keep, whole)
        if await body.is_gone():  # hung up while it waited: the slot is for one that is there
            self._link.abandon(message_id, reply_id)
            raise Disconnected
        await _send_response(send, 200, _PROTOBUF, answer.SerializeToString())
        if whole:
            reached("update.acknowledged")

    def _take_along(self, request: PushMessagesRequest, answer: PushMessagesResponse, node_id: int) -> None:
        """Store what came with an announcement, so that it need not be pushed."""
        came, session_id = read_along(request), answer.session_id
        for name in [name for name in answer.objects_to_push if name in came]:
            self._link.check_object(node_id, session_id, len(came[name]))
            if self._state.store_object(self._state.run_id, session_id, name, came[name]):
                answer.objects_to_push.remove(name)

    async def _admit_reply(self, node_id: int, message_id: str, reply_id: str, body: "_Body") -> bool:
        """Get a slot for a reply; False when it has been counted before."""
        for _ in range(3):  # again when another request of the same node came in between
            offer = self._link.offer(node_id, message_id, reply_id)
            if offer.repeat:
                return False
            if offer.gate is not None and not await self._wait(offer.gate, body):
                raise _busy()
            if self._link.begin(message_id, reply_id, offer.gate):
                return True
        raise _busy()

    def _check_announcement(self, request: PushMessagesRequest, node_id: int) -> tuple[str, str]:
        """The ids of the message and of the reply, when the announcement is this node's own and sound."""
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise Refusal(400, "malformed", "Expected exactly one message and one object tree.")
        metadata, tree = request.messages_list[0].metadata, request.message_object_trees[0]
        if metadata.src_node_id != node_id or request.node.node_id != node_id:
            raise Refusal(403, "forged-sender", "The message names another node as its sender.")
        if (
            metadata.dst_node_id != SUPERLINK_NODE_ID
            or not _is_sound(tree)
            or tree.object_id != metadata.message_id
        ):
            raise Refusal(400, "malformed", "The message's address or its object tree is not valid.")
        if metadata.run_id != self._state.run_id:
            # The message of a server that has been restarted since; the link counts it.
            self._link.offer(node_id, metadata.reply_to_message_id, "")
            raise Refusal(410, "late", "The message belongs to another run.")
        return metadata.reply_to_message_id, metadata.message_id

    async def _wait(self, gate: Gate, body: "_Body") -> bool:
        """Wait at a gate unless the client goes away."""
        turn = asyncio.ensure_future(gate.acquire(self._limits.slot_wait_s))
        gone = asyncio.ensure_future(body.disconnected())
        try:
            await asyncio.wait((turn, gone), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if turn.done() and turn.result():  # the slot came in the moment that the server gave up
                gate.release()
            raise
        else:
            if turn.done():
                return turn.result()
            raise Disconnected
        finally:
            gone.cancel()
            turn.cancel()  # of no effect when it is done; gives a slot back that was on its way

    async def _call(self, scope: Scope, body: bytes) -> tuple[int, Headers, bytes]:
        """Let Flower answer a request whose body has been read."""
        status, headers, parts = 500, Headers(), list[bytes]()
        given = False

        async def receive() -> dict[str, Any]:
            nonlocal given
            if given:
                return {"type": "http.disconnect"}
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:  # noqa: ANN401 - ASGI's message type
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message["headers"])
            elif message.get("body"):
                parts.append(message["body"])

        await self._fleet(scope, receive, send)
        return status, headers, parts[0] if len(parts) == 1 else b"".join(parts)

    _handlers: Final = {
        PREFIX + "pull-messages": _pull_messages,
        PREFIX + "pull-object": _pull_object,
        PREFIX + "push-object": _push_object,
        PREFIX + "push-messages": _push_messages,
    }


class _Body:
    """A request's body, read once, within bounds."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.complete = False

    async def read(self, headers: dict[bytes, bytes], limit: int, timeout_s: float) -> bytes:
        """All of a small one; raises like ``collect``."""
        return bytes(await self.collect(headers, limit, timeout_s))

    async def collect(self, headers: dict[bytes, bytes], limit: int, timeout_s: float) -> bytearray:
        """All of it, in memory that is taken once.

        Raises:
            Refusal: 413 as soon as it is longer than ``limit`` bytes, 408 when it takes too long.
            Disconnected: The client has gone.
        """
        too_large = Refusal(
            413, "too-large", f"The request is larger than {limit} bytes, which is the limit."
        )
        claimed = headers.get(b"content-length", b"0")
        if not claimed.isdigit() or int(claimed) > limit:
            raise too_large
        content, size = bytearray(int(claimed)), 0  # untouched memory costs nothing until it is written
        try:
            async with asyncio.timeout(timeout_s):
                while not self.complete:
                    part = await self._next()
                    if size + len(part) > limit:
                        raise too_large
                    content[size : size + len(part)] = part  # beyond its end it grows
                    size += len(part)
        except TimeoutError as error:
            raise Refusal(408, "slow", f"The request took longer than {timeout_s} s.") from error
        del content[size:]
        return content

    async def drain(self, limit: int) -> None:
        """Throw away what comes, for a moment: a client that is still sending would not see the refusal."""
        try:
            async with asyncio.timeout(DRAIN_S):
                while not self.complete and limit > 0:
                    limit -= len(await self._next())
        except (TimeoutError, Disconnected):
            return

    async def disconnected(self) -> None:
        """Return when the client has gone; the body must have been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def is_gone(self) -> bool:
        """Whether the client has gone already; does not wait."""
        task = asyncio.ensure_future(self.disconnected())
        await asyncio.wait((task,), timeout=0)
        if task.done():
            return True
        task.cancel()
        return False

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        self.complete = not message.get("more_body", False)
        part: bytes = message.get("body", b"")
        return part


def _fleet_app(state: State) -> FastAPI:
    """Flower's fleet router with the middlewares it needs, and neither documentation nor other routers."""
    app = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
        ],
    )
    app.state.linkstate_factory = _Factory(state)
    app.state.enable_supernode_auth = True
    app.state.fleet_event_log_plugin = None
    app.include_router(fleet_router)

    # Flower's dependencies are plain functions, each a hop to a thread; these do the same without.
    async def parsed(request: Request) -> ProtoMessage:
        return get_protobuf_request(request)

    app.dependency_overrides[get_protobuf_request] = parsed
    app.dependency_overrides[get_linkstate] = _constant(state)
    app.dependency_overrides[get_enable_supernode_auth] = _constant(True)
    for depends in fleet_router.dependencies:  # compares versions and only logs
        if depends.dependency is not None:
            app.dependency_overrides[depends.dependency] = _constant(None)
    return app


class _Factory:
    """What Flower asks for its link state."""

    def __init__(self, state: State) -> None:
        self._state = state

    def state(self) -> State:
        """The one there is."""
        return self._state


def _constant(value: object) -> Callable[[], Awaitable[object]]:
    async def get() -> object:
        return value

    return get


def _is_sound(tree: ObjectTree) -> bool:
    return all(
        is_valid_sha256_hash(node.object_id) and node.object_id == node.object_id.lower()
        for node in iterate_object_tree(tree)
    )


def _parse(kind: type[T], content: bytes) -> T:
    message = kind()
    try:
        message.ParseFromString(content)
    except DecodeError as error:
        raise Refusal(400, "malformed", f"The body is no {kind.__name__}.") from error
    return message


def _unknown_key() -> Refusal:
    return Refusal(401, "unknown-key", "The request is not signed by an admitted key.")


def _busy() -> Refusal:
    return Refusal(503, "busy", "Too many transfers at this time.", [(b"retry-after", b"1")])


async def _send_refusal(send: Send, refusal: Refusal, *, close: bool = False) -> None:
    content = json.dumps({"code": refusal.code, "message": str(refusal)}).encode()
    headers = [(b"content-type", b"application/json"), *refusal.headers]
    if close:
        headers.append((b"connection", b"close"))
    await _send_response(send, refusal.status, headers, content)


async def _send_response(send: Send, status: int, headers: Headers, *pieces: bytes | memoryview) -> None:
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    kept.append((b"content-length", str(sum(map(len, pieces))).encode("ascii")))
    await send({"type": "http.response.start", "status": status, "headers": kept})
    for piece in pieces:
        for start in range(0, len(piece), SLICE):
            part = piece[start : start + SLICE]  # a view of a view: no copy
            await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


_PUBLIC_KEY: Final = FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode("ascii")
_SIGNATURE: Final = FLEET_HTTP_SIGNATURE_HEADER.lower().encode("ascii")
_TIMESTAMP: Final = TIMESTAMP_HEADER.lower().encode("ascii")
_CLOCK: Final = b"lepton-server-time"
_ACCEPT: Final = ACCEPT.encode("ascii")
_HELD: Final = HELD.encode("ascii")
_PACKED: Final = (FORM_OF.encode("ascii"), FORM.encode("ascii"))
_PROTOBUF: Final[Headers] = [(b"content-type", PROTOBUF_MEDIA_TYPE.encode("ascii"))]
