"""The device's Flower node: the one place of this process that touches Flower's internals.

It speaks Flower 1.41's fleet API over TLS with the device's own key (P-256), and nothing of Flower that
exits or signals the process is used: neither its connection loop nor its retry helper. Every failure is one
of ours: ``ConnectionFailed`` (try later), ``TrustError`` (the key is not or no longer admitted) or
``UpdateRejected`` (the answer does not count, by reason).

    with FlowerNode("host:8443", ca_pem, key) as node:
        node.activate()
        work = node.pull()                       # None when there is nothing to do
        if work:
            handle, records = work
            node.push(handle, train(records))    # or node.push_error(handle, Rejection.FAILED, "why")

What is in ``kept`` from earlier rounds is not fetched again, and what comes may come packed, as the
difference to it (``lepton_fl.wire.downlink``); everything is held against its SHA-256 before it is used.

An answer is sent again until the coordinator has acknowledged it or has refused it, and counts once however
often it is sent. A message that has not been answered is delivered again by the next ``pull``: a caller that
has been told that its answer is refused may meet the message again and should answer with ``push_error``.
"""

import logging
import os
import random
import secrets
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, Self, TypeVar

# Read by Flower when it is imported: no telemetry, no update check, no package installation.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID, TIMESTAMP_HEADER
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient

from lepton_client.objects import KeptObjects
from lepton_fl.errors import ConnectionFailed, LeptonError, Rejection, TrustError, UpdateRejected
from lepton_fl.files import sha256_hex
from lepton_fl.wire.along import MOST_ALONG, add_along, read_along
from lepton_fl.wire.downlink import ACCEPT, FORM, FORM_OF, HELD, MAX_HELD, unpack
from lepton_fl.wire.records import Records
from lepton_strategies.records import from_record_dict, to_record_dict

HEARTBEAT_S: Final = 10.0  # the coordinator gives a device up that lets two of them pass and has no stream
FIRST_WAIT_S: Final = 0.2  # before the second attempt; doubled each time
LONGEST_WAIT_S: Final = 10.0
SALT_BYTES: Final = 16
DEVICE_ERROR: Final = 1  # Flower's error number; ours are words, in the text
MAX_REASON: Final = 500  # characters
CLOCK_HEADER: Final = "lepton-server-time"
_CHUNK: Final = ArrayChunk.__qualname__.encode(
    "ascii"
)  # what an object that holds a part of an array begins with

log = logging.getLogger(__name__)

A = TypeVar("A")


@dataclass(frozen=True)
class Handle:
    """What is needed to answer one message."""

    message_id: str
    message_type: str
    run_id: int  # Flower's transport run
    group_id: str
    created_at: float  # by the coordinator's clock; the answer repeats it, so ours does not matter
    ttl: float


class _StartOver(Exception):
    """The coordinator has dropped an upload that took too long; announce the reply again."""


class _Busy(ConnectionFailed):
    """The coordinator is there and asks to come back."""

    def __init__(self, message: str, wait_s: float) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class FlowerNode:
    """One device's connection to the fleet API. Calls may come from one thread at a time.

    Args:
        address: ``host:port`` of the coordinator's fleet API.
        root_certificate_pem: The only certificate authority that is believed.
        private_key: The device's enrolled key. Any NIST curve works; ours is P-256.
        retry_for_s: How long an upload or a download is repeated when the coordinator is away or busy.
        heartbeat_s: Seconds between signs of life while active, at least 10.
        kept: Parts of models from earlier rounds; None = everything is fetched, and as it is.
    """

    def __init__(
        self,
        address: str,
        root_certificate_pem: bytes,
        private_key: ec.EllipticCurvePrivateKey,
        *,
        retry_for_s: float = 300.0,
        heartbeat_s: float = HEARTBEAT_S,
        kept: KeptObjects | None = None,
    ) -> None:
        self._address = address
        self._retry_for_s = retry_for_s
        self._heartbeat_s = heartbeat_s
        self._signer = _Signer(private_key)
        self._kept, self._packs = kept, _Packs()
        self._node: Node | None = None
        self._moving_since: float | None = None  # monotonic seconds: the first part of what is under way
        self._moves = False
        self._closed = threading.Event()
        self._resting = threading.Event()  # set while no heartbeat is wanted
        self._heart: threading.Thread | None = None
        try:
            self._client = FleetHttpClient.from_server_address(
                address, False, root_certificate_pem, [self._signer, self._packs]
            )
        except (ssl.SSLError, ValueError) as error:
            raise TrustError(
                "The coordinator's CA certificate cannot be read.", hint="Enrol again, or restore the file."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- life --------------------------------------------------------------------------------------------

    def activate(self) -> int:
        """Announce this node and start its heartbeat; the node id.

        Raises:
            TrustError: The key is not admitted, or the server's certificate is not of the given CA.
            ConnectionFailed: The coordinator cannot be reached or did not answer as expected.
        """
        request = ActivateNodeRequest(
            public_key=self._signer.public_key, heartbeat_interval=self._heartbeat_s
        )
        node_id = self._call(self._client.ActivateNode, request).node_id
        self._node = Node(node_id=node_id)
        self._resting.clear()
        if self._heart is None or not self._heart.is_alive():
            self._heart = threading.Thread(target=self._beat, name="flower-heartbeat", daemon=True)
            self._heart.start()
        return int(node_id)

    def deactivate(self) -> None:
        """Say goodbye and stop the heartbeat; a coordinator that is away is no error."""
        node, self._node = self._node, None
        self._resting.set()
        if node is not None:
            try:
                self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=node.node_id))
            except LeptonError:
                return  # it will notice by itself

    def close(self) -> None:
        """Deactivate and close the connections; ends waits of a running ``push``. May be repeated."""
        if not self._closed.is_set():
            self.deactivate()
        self._closed.set()
        self._resting.set()
        if self._heart is not None:
            self._heart.join()
        self._client.close()

    # --- work --------------------------------------------------------------------------------------------

    def pull(self) -> tuple[Handle, Records] | None:
        """The oldest message that this node has not answered, or None.

        One request when there is nothing to do; how often to ask is the caller's affair.

        Raises:
            TrustError, ConnectionFailed: See ``activate``.
            UpdateRejected: MALFORMED: the message does not decode; ``push_error`` cannot tell, its
                deadline will.
        """
        node = self._active()
        response = self._call(self._client.PullMessages, PullMessagesRequest(node=node))
        if not response.messages_list:
            return None
        metadata, tree = response.messages_list[0].metadata, response.message_object_trees[0]
        self._moving_since, came = None, read_along(response)
        try:
            contents = {
                name: came[name] if name in came else self._object(metadata.run_id, name)
                for name in (item.object_id for item in iterate_object_tree(tree))
            }
        except UpdateRejected as refusal:
            if refusal.reason is Rejection.MALFORMED:
                raise
            return None  # withdrawn in this moment
        handle = Handle(
            metadata.message_id,
            metadata.message_type,
            metadata.run_id,
            metadata.group_id,
            metadata.created_at,
            metadata.ttl,
        )
        return handle, _decode(tree.object_id, contents)

    def push(self, handle: Handle, records: Records) -> None:
        """Answer a message; returns when the coordinator has all of it.

        Raises:
            UpdateRejected: LATE, DUPLICATE, NOT_SELECTED, OUT_OF_RANGE (larger than the coordinator takes)
                or MALFORMED. The answer does not count.
            TrustError, ConnectionFailed: See ``activate``; the latter after ``retry_for_s`` seconds.
        """
        content = to_record_dict(records, salt=secrets.token_bytes(SALT_BYTES))
        self._push(self._reply(handle, content=content))

    def push_error(self, handle: Handle, reason: Rejection, message: str) -> None:
        """Answer that there will be no result, and why; raises like ``push``.

        Args:
            handle: Of the message.
            reason: FAILED, DATA_CONTRACT or WRONG_VERSION; the coordinator reads others as FAILED.
            message: At most 500 characters are sent. It must not contain data.
        """
        text = f"{reason.value}\n{message[:MAX_REASON]}"
        self._push(self._reply(handle, error=Error(code=DEVICE_ERROR, reason=text)))

    # --- inside ------------------------------------------------------------------------------------------

    def _active(self) -> Node:
        if self._node is None:
            raise ConnectionFailed("The Flower node is not active.", hint="Call activate() first.")
        return self._node

    def _reply(
        self, handle: Handle, content: RecordDict | None = None, error: Error | None = None
    ) -> Message:
        metadata = Metadata(
            run_id=handle.run_id,
            message_id="",
            src_node_id=self._active().node_id,
            dst_node_id=SUPERLINK_NODE_ID,
            reply_to_message_id=handle.message_id,
            group_id=handle.group_id,
            created_at=handle.created_at,
            ttl=handle.ttl,
            message_type=handle.message_type,
        )
        metadata.delivered_at = ""
        reply = make_message(metadata=metadata, content=content, error=error)
        metadata.__dict__["_message_id"] = reply.object_id  # Flower's own way: the field has no setter
        return reply

    def _push(self, reply: Message) -> None:
        objects = get_all_nested_objects(reply)
        tree = get_object_tree(reply)
        bare = reply if reply.has_error() else make_message(metadata=reply.metadata, content=RecordDict())
        announcement = PushMessagesRequest(
            node=self._active(),
            messages_list=[message_to_proto(bare)],
            message_object_trees=[tree],
            clientapp_runtime_list=[0.0],
        )
        add_along(announcement, [item.deflate() for item in objects.values() if not _is_bulk(item)])
        self._retry(lambda: self._push_once(announcement, objects, reply.metadata.run_id))

    def _push_once(
        self, announcement: PushMessagesRequest, objects: dict[str, InflatableObject], run_id: int
    ) -> None:
        response = self._call(self._client.PushMessages, announcement)
        self._moving_since = None
        for object_id in response.objects_to_push:
            request = PushObjectRequest(
                node=announcement.node,
                run_id=run_id,
                object_id=object_id,
                object_content=objects[object_id].deflate(),
                session_id=response.session_id,
            )
            if not self._moving(self._client.PushObject, request).stored:
                raise _StartOver

    def _object(self, run_id: int, object_id: str) -> bytes:
        """An object of a message: kept from an earlier round, packed, or as it is."""
        kept = self._kept
        if kept is None:
            return self._retry(partial(self._pull_object, run_id, object_id))
        if (found := kept.get(object_id)) is not None:
            return found
        content = self._retry(partial(self._fetched, run_id, object_id, kept))
        if content.startswith(_CHUNK):
            kept.put(object_id, content)
        return content

    def _fetched(self, run_id: int, object_id: str, kept: KeptObjects) -> bytes:
        """Fetch an object in as few bytes as will do: a packed one that does not restore comes otherwise."""
        for held in (kept.names()[:MAX_HELD], []):
            try:
                return self._pull_object(run_id, object_id, held)
            except UpdateRejected as refusal:
                if refusal.reason is not Rejection.MALFORMED:
                    raise
                log.warning("A part of a message is fetched again: %s", refusal)
        return self._pull_object(run_id, object_id)

    def _pull_object(self, run_id: int, object_id: str, held: list[str] | None = None) -> bytes:
        """Fetch an object; packed, if ``held`` says what this device has. Verified in any case."""
        request = PullObjectRequest(node=self._active(), run_id=run_id, object_id=object_id)
        self._packs.held = held
        response = self._moving(self._client.PullObject, request)
        if not response.object_found:
            raise UpdateRejected(Rejection.LATE, "The message was withdrawn.")
        content: bytes = response.object_content
        if self._packs.form == FORM and self._kept is not None:
            return self._unpacked(content, object_id, self._kept)
        if sha256_hex(content) != object_id:
            raise UpdateRejected(Rejection.MALFORMED, "Malformed message: a part of it is not what it says.")
        return content

    def _unpacked(self, packed: bytes, object_id: str, kept: KeptObjects) -> bytes:
        used: list[str] = []

        def held(name: str) -> bytes | None:
            used.append(name)
            return kept.get(name)

        content = unpack(packed, object_id, held)
        for name in used:  # it has a successor
            kept.drop(name)
        return content

    def _retry(self, step: Callable[[], A]) -> A:
        """Repeat a step while the coordinator is away or busy: exponential waits with jitter, bounded."""
        ends = time.monotonic() + self._retry_for_s
        wait_s = FIRST_WAIT_S
        while True:
            try:
                return step()
            except (ConnectionFailed, _StartOver) as error:
                pause = random.uniform(0.5, 1.0) * wait_s  # noqa: S311 - spreads load, protects nobody
                if isinstance(error, _Busy):
                    pause = max(pause, error.wait_s)
                if time.monotonic() + pause > ends or self._closed.wait(pause):
                    if isinstance(error, ConnectionFailed):
                        raise
                    raise ConnectionFailed("The coordinator kept dropping the upload.") from error
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _moving(self, method: Callable[[Any], A], request: object) -> A:
        """A call that carries a part of a model, under the clock; waiting for a turn is not counted."""
        if self._moving_since is None:
            self._moving_since = time.monotonic()
        self._moves = True
        try:
            return self._call(method, request)
        finally:
            self._moves = False

    @property
    def moving_s(self) -> float:
        """Seconds since the message or the answer under way began to move; 0 when none does."""
        since = self._moving_since
        return time.monotonic() - since if since is not None and self._moves else 0.0

    def _call(self, method: Callable[[Any], A], request: object) -> A:
        """One request; errors are ours, and a wrong clock is put right once."""
        for attempt in range(2):
            try:
                return method(request)
            except httpx.HTTPStatusError as error:
                if attempt or not self._signer.set_clock(error.response):
                    raise self._translate(error.response) from error
            except httpx.TransportError as error:
                raise self._unreachable(error) from error
            except (ValueError, RuntimeError) as error:  # no protobuf in the answer; the client is closed
                raise ConnectionFailed(f"{self._address} does not answer as a coordinator does.") from error
        raise AssertionError("the second attempt returns or raises")

    def _unreachable(self, error: httpx.TransportError) -> LeptonError:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return TrustError(
                f"The certificate of {self._address} is not accepted: {error}",
                hint="The address may belong to another coordinator; enrol with a token of this one.",
            )
        return ConnectionFailed(f"{self._address} cannot be reached: {error or type(error).__name__}")

    def _translate(self, response: httpx.Response) -> LeptonError:
        status = response.status_code
        code, text = _refusal(response)
        if status == httpx.codes.UNAUTHORIZED:
            return TrustError(
                f"{self._address} refuses this device's key: {text}",
                hint="Check the enrolment, and the clock.",
            )
        if code == "no-upload":
            return ConnectionFailed("The coordinator has dropped the upload.")  # announcing it again helps
        reason = _REASONS.get(code)
        if reason is not None:
            return UpdateRejected(reason, text)
        wait = response.headers.get("retry-after", "")
        if status in (httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.TOO_MANY_REQUESTS) and wait.isdigit():
            return _Busy(f"{self._address} is busy: {text}", min(float(wait), LONGEST_WAIT_S))
        return ConnectionFailed(f"{self._address} answers {status}: {text}")

    def _beat(self) -> None:
        while not self._resting.wait(self._heartbeat_s):
            node = self._node
            if node is None:
                return
            request = SendNodeHeartbeatRequest(node=node, heartbeat_interval=self._heartbeat_s)
            try:
                self._call(self._client.SendNodeHeartbeat, request)
            except LeptonError:
                continue  # the next call of the caller reports it


class _Signer:
    """Signs each request's time with the device's key, by the coordinator's clock once it is known."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self._ahead = timedelta()
        self.public_key = public_key_to_bytes(key.public_key())
        self._header = _base64(self.public_key)

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add Flower's three authentication headers."""
        timestamp = (datetime.now(UTC) + self._ahead).isoformat()
        signature = sign_message(self._key, timestamp.encode("ascii"))
        add_headers(
            context.request,
            {
                FLEET_HTTP_PUBLIC_KEY_HEADER: self._header,
                TIMESTAMP_HEADER: timestamp,
                FLEET_HTTP_SIGNATURE_HEADER: _base64(signature),
            },
        )
        return call_next(context)

    def set_clock(self, response: httpx.Response) -> bool:
        """Take over the coordinator's time when it says that ours is off."""
        if response.status_code != httpx.codes.UNAUTHORIZED or CLOCK_HEADER not in response.headers:
            return False
        try:
            self._ahead = datetime.fromisoformat(response.headers[CLOCK_HEADER]) - datetime.now(UTC)
        except (ValueError, TypeError):
            return False
        return True


class _Packs:
    """Says what this device can unpack and has, and hears how an object comes; one call at a time."""

    def __init__(self) -> None:
        self.held: list[str] | None = None  # None: as it is, please
        self.form = ""  # of the object that came last

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add our two headers to a request for an object, and read that of the answer."""
        if not isinstance(context.message, PullObjectRequest):  # a heartbeat, of another thread
            return call_next(context)
        if self.held is not None:
            add_headers(context.request, {ACCEPT: FORM, HELD: ",".join(self.held)})
        response = call_next(context)
        self.form = response.headers.get(FORM_OF, "")
        return response


_REASONS: Final = {
    "late": Rejection.LATE,
    "duplicate": Rejection.DUPLICATE,
    "not-selected": Rejection.NOT_SELECTED,
    "too-large": Rejection.OUT_OF_RANGE,
    "malformed": Rejection.MALFORMED,
    "forged-sender": Rejection.LATE,  # it knows us as another node: it was restarted in mid-upload
    "refused": Rejection.MALFORMED,
}


def _is_bulk(item: InflatableObject) -> bool:
    return isinstance(item, ArrayChunk) and len(item.data) > MOST_ALONG


def _base64(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def _refusal(response: httpx.Response) -> tuple[str, str]:
    """The code and the text of a refusal; Flower's own have neither in our form."""
    try:
        body = response.json()
        return str(body["code"]), str(body["message"])[:MAX_REASON]
    except (ValueError, KeyError, TypeError):
        return "", response.reason_phrase


def _decode(object_id: str, contents: dict[str, bytes]) -> Records:
    try:
        message = inflate_object_from_contents(object_id, contents)
        if not isinstance(message, Message):
            raise TypeError("the root is no message")
        return from_record_dict(message.content)
    except UpdateRejected:
        raise
    except Exception as error:
        raise UpdateRejected(Rejection.MALFORMED, f"Malformed message: {error}.") from error
