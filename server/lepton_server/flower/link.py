"""The public face of Flower in this process: nodes, mailboxes and the replies that arrive in them.

Threads: every method may be called from any thread. One lock guards the book of open messages; it is never
taken while one of Flower's locks is held, and callbacks run outside it. Of the process's global state only
the level of Flower's logger is set; Flower's ``TaskIdentity`` is not needed, so links do not get in each
other's way.

A message is OPEN until a device announces a reply, UPLOADING while that reply's objects come in (the reply
holds a slot of its mailbox's gate), WHOLE while it is being made durable (where its message asks for that),
READY until the round takes it, ANSWERED afterwards. A device that dies while uploading loses its slot after
``Limits.upload_timeout_s`` and its message is OPEN again.

The device hears that its reply has come when the last of its requests is answered, and that is after WHOLE:
whatever it was told is on the disk. A durable reply leaves memory, and its slot, at once.
"""

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NoReturn, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from lepton_fl.errors import LeptonError, Rejection, StateConflict, StateError, TrustError, UpdateRejected
from lepton_fl.wire.records import Records
from lepton_server.flower.forms import Forms
from lepton_server.flower.frames import chunks_of, inflate_arrays, shared_arrays
from lepton_server.flower.gate import Gate
from lepton_server.flower.guard import Guard, Limits, Offer, Refusal
from lepton_server.flower.state import Encoded, State
from lepton_strategies.records import from_record_dict, to_record_dict

log = logging.getLogger(__name__)

CLOSED_MESSAGES: Final = 10_000  # remembered, so that a late or repeated answer is named as such
MAX_REASON: Final = 500  # characters of a device's own report
DEVICE_REASONS: Final = frozenset(
    {
        Rejection.DATA_CONTRACT,
        Rejection.WRONG_VERSION,
        Rejection.FAILED,
        Rejection.OUT_OF_MEMORY,
        Rejection.DISK_FULL,
        Rejection.INTERRUPTED,
        Rejection.SIGNED_BEFORE,
    }
)


@dataclass(frozen=True)
class Reply:
    """What became of one message.

    Attributes:
        message_id: What ``Mailbox.post`` returned.
        node_id: The node it was posted to; also when the answer is a failure.
        content: The device's records, or why there are none: one of ``DEVICE_REASONS`` as the device
            reports it, MALFORMED, OFFLINE (no complete answer within ``ttl_s``), REVOKED.
        num_bytes: Size of the answer on the wire.
    """

    message_id: str
    node_id: int
    content: Records | UpdateRejected
    num_bytes: int = 0


@dataclass(frozen=True)
class Refused:
    """An answer that was not accepted; the device has been told."""

    node_id: int
    message_id: str
    reason: Rejection  # LATE, DUPLICATE, NOT_SELECTED or OUT_OF_RANGE (too large)


Contents = dict[str, Any]  # object id -> bytes or bytearray
Reread = Callable[[], Contents]  # the same again, from the disk
Keep = Callable[[Mapping[str, bytes], int], Reread]  # (contents, bytes on the wire): durable on return


class _Stage(Enum):
    OPEN = 1
    UPLOADING = 2
    WHOLE = 3
    READY = 4
    ANSWERED = 5


@dataclass
class _Post:
    """One message to one node, until its mailbox lets it go."""

    message_id: str
    node_id: int
    box: "Mailbox"
    expires: float  # monotonic seconds
    object_ids: frozenset[str]  # what its node may fetch, besides the message itself
    stage: _Stage = _Stage.OPEN
    reply_id: str | None = None
    session_id: str = ""
    tree: ObjectTree | None = None
    missing: set[str] = field(default_factory=set)
    num_bytes: int = 0
    idle_until: float = 0.0  # monotonic seconds; while UPLOADING
    holds_slot: bool = False
    keep: Keep | None = None  # makes a reply durable
    kept: Reread | None = None  # once it is


class FlowerLink:
    """Flower's fleet API, embedded.

    Args:
        limits: Sizes, times and numbers; see ``Limits``.
        max_unread_replies: Default for each mailbox.
        on_refused: Told of every answer that was not accepted; must not block. Called on server threads.

    Attributes:
        app: The ASGI application to serve under TLS. It needs no lifespan, and one event loop.
        refused: How many answers were refused, by reason.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        max_unread_replies: int = 2,
        on_refused: Callable[[Refused], None] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self._max_unread = max_unread_replies
        self._on_refused = on_refused
        self._lock = threading.RLock()
        self._posts: dict[str, _Post] = {}  # by message id
        self._by_node: dict[int, dict[str, _Post]] = {}
        self._sessions: dict[str, _Post] = {}  # by upload session
        self._closed: OrderedDict[str, tuple[int, str | None]] = OrderedDict()  # id -> node, counted reply
        self._keys: dict[bytes, tuple[int, ec.EllipticCurvePublicKey]] = {}  # PEM -> node and key
        self._seen: dict[int, float] = {}  # node id -> monotonic seconds of its last request
        self.refused: dict[Rejection, int] = {}
        self.forms = Forms()
        self._stop = threading.Event()
        self._keeper: threading.Thread | None = None
        self._state = State(self._registered, self._stored)
        logging.getLogger("flwr").setLevel(logging.WARNING)  # Flower logs every request
        self.app = Guard(self, self._state, self.limits)

    @property
    def run_id(self) -> int:
        """Flower's number of the transport run; no run of ours."""
        return self._state.run_id

    # --- life -------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start the thread that ends overdue messages and uploads."""
        if self._keeper is None:
            self._keeper = threading.Thread(target=self._keep, name="flower-keeper", daemon=True)
            self._keeper.start()
        return self

    def close(self) -> None:
        """Withdraw everything and stop; devices are told to come back later."""
        self._stop.set()
        if self._keeper is not None:
            self._keeper.join()
        with self._lock:
            boxes = {post.box for post in self._posts.values()}
        for box in boxes:
            box.close()

    @property
    def closed(self) -> bool:
        """Whether ``close`` has been called."""
        return self._stop.is_set()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- nodes ------------------------------------------------------------------------------------------

    def admit(self, public_key_der: bytes) -> int:
        """Let the holder of this key in and return its node id; again for a known key.

        Raises:
            TrustError: The bytes are no elliptic-curve public key.
        """
        key, pem = _load_key(public_key_der)
        with self._lock:
            known = self._keys.get(pem)
            if known is not None:
                return known[0]
            if self._stop.is_set():
                raise StateError("The Flower link is closed.")
            node_id = self._state.add_node(pem)
            self._keys[pem] = node_id, key
            return node_id

    def expel(self, public_key_der: bytes) -> bool:
        """Shut the holder of this key out, at once; its open messages fail as REVOKED.

        Returns:
            Whether the key had been admitted.

        Raises:
            TrustError: The bytes are no elliptic-curve public key.
        """
        _, pem = _load_key(public_key_der)
        with self._lock:
            known = self._keys.pop(pem, None)
            if known is None:
                return False
            node_id = known[0]
            posts = list(self._by_node.get(node_id, {}).values())
            for post in posts:
                self._fail(post, Rejection.REVOKED, "The device lost its enrolment.")
            self._seen.pop(node_id, None)
            self._state.forget_node(node_id)
        return True

    def idle_s(self, node_id: int) -> float | None:
        """Seconds since a node's last authenticated request; None when it has made none."""
        seen = self._seen.get(node_id)
        return None if seen is None else time.monotonic() - seen

    def mailbox(
        self,
        max_unread_replies: int | None = None,
        *,
        packs_for: str = "",
        seams: Mapping[str, int] | None = None,
    ) -> "Mailbox":
        """Open a mailbox: one for each round, so that rounds at the same time do not mix.

        Args:
            max_unread_replies: Answers that it holds at a time; None = the link's default.
            packs_for: The run whose arrays are packed for devices that can unpack them; empty = they are not.
            seams: Array -> its first element that does not change from round to round.
        """
        return Mailbox(self, max_unread_replies or self._max_unread, packs_for, seams or {})

    # --- what the guard asks ----------------------------------------------------------------------------

    def find_key(self, pem: bytes) -> tuple[int, ec.EllipticCurvePublicKey] | None:
        """The node and the key object of an admitted key."""
        return self._keys.get(pem)

    def mark_seen(self, node_id: int) -> None:
        """Note an authenticated request."""
        self._seen[node_id] = time.monotonic()

    def may_fetch(self, node_id: int, object_id: str) -> bool:
        """Whether an object belongs to an open message to this node."""
        with self._lock:
            posts = self._by_node.get(node_id, {})
            return object_id in posts or any(object_id in post.object_ids for post in posts.values())

    def sent(self, node_id: int, object_id: str, num_bytes: int) -> None:
        """Note what a node was sent of a message."""
        with self._lock:
            for post in self._by_node.get(node_id, {}).values():
                if object_id == post.message_id or object_id in post.object_ids:
                    post.box.sent[post.message_id] = post.box.sent.get(post.message_id, 0) + num_bytes
                    return

    def may_upload(self, node_id: int) -> bool:
        """Whether a node holds a slot."""
        with self._lock:
            return any(post.holds_slot for post in self._by_node.get(node_id, {}).values())

    def check_object(self, node_id: int, session_id: str, num_bytes: int) -> None:
        """Refuse an object that is not of this node's announced reply, or one too many.

        Raises:
            Refusal: 409 when the upload has ended and must start over, 413 when the reply is too large.
        """
        with self._lock:
            post = self._sessions.get(session_id)
            if post is None or post.node_id != node_id or post.stage is not _Stage.UPLOADING:
                raise Refusal(409, "no-upload", "No upload of this node is open; announce the reply again.")
            if post.num_bytes + num_bytes <= self.limits.max_reply_bytes:
                return
            self._reopen(post)
        self._count(node_id, post.message_id, Rejection.OUT_OF_RANGE)
        limit = self.limits.max_reply_bytes
        raise Refusal(413, "too-large", f"The reply is larger than {limit} bytes, which is the limit.")

    def offer(self, node_id: int, message_id: str, reply_id: str) -> Offer:
        """Decide on an announced reply without changing anything.

        Returns:
            Whether it has been counted already (a repeat), may go on with the slot it has, or needs one.

        Raises:
            Refusal: 410 too late, 403 another node's message, 409 another answer has been counted.
        """
        with self._lock:
            post = self._posts.get(message_id)
            if post is not None and post.node_id == node_id:
                if post.stage is _Stage.OPEN:
                    return Offer(post.box.gate)
                if post.stage in (_Stage.UPLOADING, _Stage.WHOLE):
                    return Offer(None)
                if post.reply_id == reply_id:
                    return Offer(None, repeat=True)
                reason = Rejection.DUPLICATE
            elif post is not None:
                reason = Rejection.NOT_SELECTED
            elif reply_id and self._closed.get(message_id) == (node_id, reply_id):
                return Offer(None, repeat=True)
            else:
                reason = Rejection.LATE
        self._count(node_id, message_id, reason)
        raise Refusal(*_REFUSALS[reason])

    def begin(self, message_id: str, reply_id: str, gate: Gate | None) -> bool:
        """Start or resume an upload; False when a slot came too late, which is then given back."""
        with self._lock:
            post = self._posts.get(message_id)
            wanted = _Stage.OPEN if gate is not None else _Stage.UPLOADING
            if post is None or post.stage is not wanted:
                if gate is not None:
                    gate.release()
                return False
            if post.reply_id not in (None, reply_id):  # the device started over and has another answer
                self._drop_reply(post)
            post.stage, post.reply_id, post.holds_slot = _Stage.UPLOADING, reply_id, True
            post.idle_until = time.monotonic() + self.limits.upload_timeout_s
            return True

    def settle(self, message_id: str, reply_id: str) -> bool:
        """Whether the announced reply was stored; if not, its slot is free again."""
        with self._lock:
            post = self._posts.get(message_id)
            if post is None or post.reply_id != reply_id:
                return False
            if post.stage is _Stage.UPLOADING and not post.session_id:
                self._reopen(post)
                return False
            return True

    def whole(self, session_id: str) -> str:
        """The message whose reply is complete and not durable yet; empty if it is no such session."""
        with self._lock:
            post = self._sessions.get(session_id)
            return post.message_id if post is not None and post.stage is _Stage.WHOLE else ""

    def keep(self, message_id: str) -> None:
        """Make a complete reply durable, if that is asked for and nobody else does so; takes a while.

        Raises:
            Refusal: 503 it could not be kept now, 410 the round takes none any more.
        """
        with self._lock:
            post = self._posts.get(message_id)
            if post is None or post.stage is not _Stage.WHOLE or post.keep is None:
                return
            if self._sessions.pop(post.session_id, None) is None:
                return  # another thread is at it
            contents, keep, num_bytes = self._contents(post), post.keep, post.num_bytes
        try:
            kept = keep(contents, num_bytes)
        except Exception as error:  # noqa: BLE001 - whatever it is, the message must not hang in between
            self._not_kept(post, error)
        with self._lock:
            if post.stage is not _Stage.WHOLE:
                return  # withdrawn in this moment; the device has done its part
            post.kept = kept
            self._ready(post)
            self._state.discard_reply(post.message_id, post.reply_id)
            self._free_slot(post)

    def _not_kept(self, post: _Post, error: Exception) -> NoReturn:
        with self._lock:
            if post.stage is _Stage.WHOLE:
                self._reopen(post)
        if isinstance(error, StateConflict):
            self._count(post.node_id, post.message_id, Rejection.LATE)
            raise Refusal(*_REFUSALS[Rejection.LATE]) from error
        log.error("The answer of node %d cannot be kept: %s", post.node_id, error)
        retry = [(b"retry-after", b"2")]
        raise Refusal(503, "busy", "The answer cannot be kept at this time.", retry) from error

    def abandon(self, message_id: str, reply_id: str) -> None:
        """The device that announced this reply has gone: free its slot."""
        with self._lock:
            post = self._posts.get(message_id)
            if post is not None and post.reply_id == reply_id and post.stage is _Stage.UPLOADING:
                self._reopen(post)

    # --- what Flower's state reports --------------------------------------------------------------------

    def _registered(self, reply: Message, tree: ObjectTree, session_id: str, missing: list[str]) -> None:
        metadata = reply.metadata
        with self._lock:
            post = self._posts.get(metadata.reply_to_message_id)
            if post is None or post.stage is not _Stage.UPLOADING or post.reply_id != metadata.message_id:
                stale = True
            else:
                stale = False
                self._sessions.pop(post.session_id, None)
                self._sessions[session_id] = post
                post.session_id, post.tree, post.missing = session_id, tree, set(missing)
                if not missing:
                    self._complete(post)
        if stale:  # withdrawn in this moment
            self._state.discard_reply(metadata.reply_to_message_id, metadata.message_id)

    def _stored(self, session_id: str, object_id: str, num_bytes: int) -> None:
        with self._lock:
            post = self._sessions.get(session_id)
            if post is None:
                return
            post.missing.discard(object_id)
            post.num_bytes += num_bytes
            post.idle_until = time.monotonic() + self.limits.upload_timeout_s
            if not post.missing:
                self._complete(post)

    # --- stages (the lock is held) ----------------------------------------------------------------------

    def _complete(self, post: _Post) -> None:
        if post.keep is None:
            self._ready(post)
        else:
            post.stage = _Stage.WHOLE  # the guard calls ``keep`` before it answers

    def _contents(self, post: _Post) -> Contents:
        if post.tree is None:
            return {}
        nodes = iterate_object_tree(post.tree)
        return {node.object_id: self._state.object_store.get(node.object_id) or b"" for node in nodes}

    def _ready(self, post: _Post) -> None:
        post.stage = _Stage.READY
        self._sessions.pop(post.session_id, None)
        self._state.hide(post.node_id, post.message_id)
        post.box.ready.put(post)

    def _drop_reply(self, post: _Post) -> None:
        self._sessions.pop(post.session_id, None)
        self._state.discard_reply(post.message_id, post.reply_id)
        post.reply_id, post.session_id, post.tree, post.num_bytes = None, "", None, 0
        post.missing = set()

    def _free_slot(self, post: _Post) -> None:
        if post.holds_slot:
            post.holds_slot = False
            post.box.gate.release()

    def _reopen(self, post: _Post) -> None:
        self._drop_reply(post)
        post.stage = _Stage.OPEN
        self._free_slot(post)

    def _remove(self, post: _Post, counted: str | None) -> None:
        """Forget a message; ``counted`` is the reply that was taken, if any."""
        self._sessions.pop(post.session_id, None)
        self._posts.pop(post.message_id, None)
        mine = self._by_node.get(post.node_id, {})
        mine.pop(post.message_id, None)
        if not mine:
            self._by_node.pop(post.node_id, None)
        self._closed[post.message_id] = post.node_id, counted
        if len(self._closed) > CLOSED_MESSAGES:
            self._closed.popitem(last=False)
        self._state.discard(post.node_id, post.message_id, post.reply_id)
        post.stage = _Stage.ANSWERED
        self._free_slot(post)

    def _fail(self, post: _Post, reason: Rejection, message: str) -> None:
        if post.stage in (_Stage.WHOLE, _Stage.READY) and reason is not Rejection.REVOKED:
            return  # a complete answer counts, even when it is fetched late
        self._remove(post, None)
        post.box.failed(post, UpdateRejected(reason, message))

    # --- what mailboxes do ------------------------------------------------------------------------------

    def add_post(
        self,
        box: "Mailbox",
        node_id: int,
        message_type: str,
        encoded: Encoded,
        ttl_s: float,
        keep: Keep | None = None,
    ) -> str:
        """Send a message on a mailbox's behalf."""
        with self._lock:  # no answer can come before the message is in the book
            if self._stop.is_set():
                raise StateError("The Flower link is closed.")
            message_id = self._state.send(node_id, message_type, encoded)
            expires = time.monotonic() + ttl_s
            post = _Post(message_id, node_id, box, expires, encoded.object_ids, keep=keep)
            self._posts[message_id] = post
            self._by_node.setdefault(node_id, {})[message_id] = post
            return message_id

    def take(self, post: _Post) -> Reply | None:
        """Move a complete reply out of the store and decode it; None when it was withdrawn."""
        with self._lock:
            if post.stage is not _Stage.READY or post.reply_id is None:
                return None
            reply_id, kept = post.reply_id, post.kept
            contents = self._contents(post) if kept is None else {}
            held, post.holds_slot = post.holds_slot, False  # kept while the round works on the reply
            self._remove(post, reply_id)
            post.box.taken += held
        content = self.decode(contents) if kept is None else self.reread(kept)
        return Reply(post.message_id, post.node_id, content, post.num_bytes)

    def reread(self, kept: Reread) -> Records | UpdateRejected:
        """What a durable reply holds; a file that is lost loses this one device's answer."""
        try:
            return self.decode(kept())
        except LeptonError as error:
            log.error("A kept answer is lost: %s", error)
            return UpdateRejected(Rejection.OFFLINE, f"Its answer is lost: {error}")

    def decode(self, contents: Contents) -> Records | UpdateRejected:
        """The records of a reply's objects, of which the last one is the reply itself."""
        return _decode(next(reversed(contents), ""), contents, self.limits.max_reply_bytes)

    def done_with(self, box: "Mailbox") -> int:
        """How many slots a mailbox's earlier replies held; they are free from now on."""
        with self._lock:
            taken, box.taken = box.taken, 0
            return taken

    def withdraw(self, box: "Mailbox", message_ids: Iterable[str]) -> None:
        """Cancel messages of a mailbox, and what answers they have."""
        with self._lock:
            for message_id in list(message_ids):
                post = self._posts.get(message_id)
                if post is not None and post.box is box:
                    self._remove(post, None)

    def open_messages(self, box: "Mailbox") -> list[str]:
        """The ids of a mailbox's messages that have no outcome yet."""
        with self._lock:
            return [post.message_id for post in self._posts.values() if post.box is box]

    # --- upkeep -----------------------------------------------------------------------------------------

    def _keep(self) -> None:
        tick = min(1.0, self.limits.upload_timeout_s / 4)  # seconds
        while not self._stop.wait(tick):
            self._end_overdue(time.monotonic())

    def _end_overdue(self, now: float) -> None:
        with self._lock:
            for post in list(self._posts.values()):
                if post.expires <= now:
                    self._fail(post, Rejection.OFFLINE, "No complete answer came in time.")
                elif post.stage is _Stage.UPLOADING and post.idle_until <= now:
                    log.info("Node %d stopped in the middle of an upload.", post.node_id)
                    self._reopen(post)

    def _count(self, node_id: int, message_id: str, reason: Rejection) -> None:
        with self._lock:
            self.refused[reason] = self.refused.get(reason, 0) + 1
        if self._on_refused is not None:
            try:
                self._on_refused(Refused(node_id, message_id, reason))
            except Exception:
                log.exception("The callback for refused answers failed.")


class Mailbox:
    """The messages of one round and their answers; made by ``FlowerLink.mailbox``.

    At most ``max_unread_replies`` answers are held for it at a time; other devices wait with theirs.
    """

    def __init__(
        self, link: FlowerLink, max_unread_replies: int, packs_for: str, seams: Mapping[str, int]
    ) -> None:
        self._link, self._packs_for, self._seams = link, packs_for, seams
        self.sent: dict[str, int] = {}  # message id -> bytes that its node has fetched, closed ones included
        self.gate = Gate(max_unread_replies)
        self.taken = 0  # slots of the replies that ``get`` has returned and the round may still hold
        self.ready: queue.SimpleQueue[_Post | Reply | None] = queue.SimpleQueue()
        self._last: tuple[Records, Encoded] | None = None

    def post(
        self, node_id: int, records: Records, *, message_type: str, ttl_s: float, keep: Keep | None = None
    ) -> str:
        """Send records to a node and return the message's id.

        With ``keep`` the answer is made durable by it before the device hears that it has come.

        Posting the same ``records`` object to many nodes encodes and stores it once; do not change it
        between the calls. Equal arrays are stored once in any case.

        Raises:
            ValueError: ``ttl_s`` is not positive.
            StateError: The node is not admitted, or the link is closed.
        """
        if not ttl_s > 0:
            raise ValueError(f"Expected ttl_s={ttl_s} > 0.")
        last = self._last  # one read: another thread may post other records
        if last is None or last[0] is not records:
            shared = shared_arrays(records.arrays, self._seams)
            if self._packs_for and records.arrays:
                self._link.forms.make(self._packs_for, chunks_of(shared))
            content = to_record_dict(records, arrays=shared)
            last = self._last = records, Encoded(content)
        return self._link.add_post(self, node_id, message_type, last[1], ttl_s, keep)

    def get(self, timeout_s: float | None = None) -> Reply | None:
        """The next outcome, decoded in this thread; None after ``timeout_s`` seconds without one.

        An arrival wakes the caller at once. The next call says that the caller is done with this reply, and
        lets another device in: a caller that keeps replies keeps more of them than ``max_unread_replies``.
        """
        self._let_in()
        ends = None if timeout_s is None else time.monotonic() + max(timeout_s, 0.0)
        while True:
            left = None if ends is None else max(ends - time.monotonic(), 0.0)
            try:
                item = self.ready.get(timeout=left) if left is None or left > 0 else self.ready.get_nowait()
            except queue.Empty:
                return None
            if item is None:  # closed, for every caller
                self.ready.put(None)
                return None
            reply = item if isinstance(item, Reply) else self._link.take(item)
            if reply is not None:
                return reply

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Cancel messages that have no outcome yet; a late answer is refused, counted and reported."""
        self._link.withdraw(self, message_ids)

    def open_messages(self) -> list[str]:
        """The ids of the messages that have no outcome yet."""
        return self._link.open_messages(self)

    def close(self) -> None:
        """Withdraw all that is open and wake a waiting ``get``, which returns None."""
        self.withdraw(self.open_messages())
        self._let_in()
        self._last = None
        self.ready.put(None)

    def _let_in(self) -> None:
        """Give the slots of earlier replies to the devices that wait."""
        for _ in range(self._link.done_with(self)):
            self.gate.release()

    def failed(self, post: _Post, why: UpdateRejected) -> None:
        """Report a message that will have no answer; for the link."""
        self.ready.put(Reply(post.message_id, post.node_id, why))


_REFUSALS: Final = {
    Rejection.LATE: (410, "late", "The message is closed or unknown; the answer does not count."),
    Rejection.NOT_SELECTED: (403, "not-selected", "The message went to another node."),
    Rejection.DUPLICATE: (409, "duplicate", "Another answer of this node has been counted."),
}


def _load_key(der: bytes) -> tuple[ec.EllipticCurvePublicKey, bytes]:
    """The key and its PEM form, by which Flower knows a node."""
    try:
        key = serialization.load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TrustError("Expected a public key in DER, got bytes that are none.") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise TrustError(f"Expected an elliptic-curve public key, got {type(key).__name__}.")
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return key, pem


def _decode(reply_id: str, contents: Contents, max_bytes: int) -> Records | UpdateRejected:
    try:
        arrays = inflate_arrays(contents, max_bytes)
        rest = {name: bytes(content) for name, content in contents.items()}
        message = inflate_object_from_contents(reply_id, rest, objects=arrays)
        if not isinstance(message, Message):
            raise TypeError(f"the root is a {type(message).__name__}")
        if message.has_error():
            return _device_report(message.error.reason)
        return from_record_dict(message.content)
    except UpdateRejected as rejected:
        return rejected
    except Exception as error:  # noqa: BLE001 - whatever one device sent, the round goes on
        log.info("A reply does not decode: %s", error)
        return UpdateRejected(Rejection.MALFORMED, "Malformed message: the reply does not decode.")


def _device_report(text: str | None) -> UpdateRejected:
    """A device's own words: its reason on the first line, if it is one that a device may give."""
    word, _, detail = (text or "").partition("\n")
    try:
        reason = Rejection(word)
    except ValueError:
        reason, detail = Rejection.FAILED, text or ""
    if reason not in DEVICE_REASONS:
        reason = Rejection.FAILED
    clean = "".join(c if c.isprintable() else " " for c in detail[:MAX_REASON]).strip()
    return UpdateRejected(reason, clean or "The device gave no reason.")
