"""Flower's in-memory state, with what a coordinator of its own needs changed.

* One long-lived Flower run is the transport. It never expires: Flower ends a run after 60 s without a
  heartbeat by the wall clock, which a clock jump or a laptop's sleep would trigger.
* A message is delivered again until it is answered, so that a device which crashed gets it back; messages
  are found by node instead of by a scan over all of them.
* A node may activate at any time: Flower refuses a device that came back within a minute.
* Objects are verified before locks are taken; registering and deleting trees exclude each other.
"""

import logging
import secrets
from collections.abc import Callable
from typing import Final, cast

from flwr.app import Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import HEARTBEAT_MAX_INTERVAL, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    UnexpectedObjectContentError,
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.federation import NoOpFederationManager

from lepton_fl.errors import StateError

log = logging.getLogger(__name__)

FOREVER_S: Final = 10 * 365 * 86400.0  # Flower's own time to live; ours is enforced by the link


class Store(InMemoryObjectStore):
    """Flower's object store; whole trees are registered and deleted under one lock."""

    def __init__(self) -> None:
        super().__init__(verify=False)  # ``State.store_object`` verifies, outside the locks

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        """Register a tree; without the lock a shared child could be deleted in between."""
        with self.lock_store:
            return super().preregister(run_id, object_tree)


class _Named(RecordDict):
    """Stands for a content that has been serialised: it keeps the id and lets the data go."""

    def __init__(self, object_id: str) -> None:
        super().__init__()
        self.__dict__["_name"] = object_id

    @property
    def object_id(self) -> str:
        """The id of the content."""
        return str(self.__dict__["_name"])


class Encoded:
    """One content, serialised once for any number of recipients."""

    def __init__(self, content: RecordDict) -> None:
        self.content = _Named(content.object_id)
        self.tree = get_object_tree(content)
        self.objects = {name: item.deflate() for name, item in get_all_nested_objects(content).items()}
        self.object_ids = frozenset(self.objects)


class State(InMemoryLinkState):
    """Link state of one transport run.

    Args:
        on_registered: Called with (reply, tree, session id, missing object ids) when a reply is announced.
        on_stored: Called with (session id, object id, number of bytes) when one of its objects has come.
    """

    def __init__(
        self,
        on_registered: Callable[[Message, ObjectTree, str, list[str]], None],
        on_stored: Callable[[str, str, int], None],
    ) -> None:
        super().__init__(NoOpFederationManager(), Store())
        self._on_registered = on_registered
        self._on_stored = on_stored
        self._inbox: dict[int, dict[str, Message]] = {}  # node id -> message id -> message, oldest first
        self.run_id = self._open_run()

    # --- the transport run ------------------------------------------------------------------------------

    def _open_run(self) -> int:
        run_id = self.create_run(
            "lepton/transport",
            "1",
            "0" * 64,  # no app bundle exists and none is ever fetched
            {},
            NOOP_FEDERATION_ID,
            None,
            NOOP_FLWR_AID,
            TaskType.SERVER_APP,
        )
        task_id = self.get_run_info(run_ids=[run_id])[0].primary_task_id
        if task_id is None or self.claim_task(task_id) is None or not self.activate_task(task_id):
            raise StateError("Flower's transport run could not be started.", hint="Restart the server.")
        return run_id

    def _cleanup_expired_task_tokens_locked(self) -> None:
        """Nothing expires: the only task is the transport run, which lives as long as the process."""

    # --- nodes ------------------------------------------------------------------------------------------

    def add_node(self, public_key_pem: bytes) -> int:
        """Register a node that can be sent messages from now on, before it has shown up."""
        node_id = self.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key_pem, HEARTBEAT_MAX_INTERVAL)
        # Flower takes messages only for a node that has been activated once.
        if not (
            node_id and self.activate_node(node_id, HEARTBEAT_MAX_INTERVAL) and self.deactivate_node(node_id)
        ):
            raise StateError(
                "Flower did not register the node.", hint="Try again; restart the server if it lasts."
            )
        return node_id

    def forget_node(self, node_id: int) -> None:
        """Remove a node without trace, so that its key could be registered anew."""
        with self.lock:
            node = self.nodes.pop(node_id, None)
            if node is not None:
                self.node_public_key_to_node_id.pop(node.public_key, None)
                self.owner_to_node_ids.get(node.owner_aid, set()).discard(node_id)

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """Activate; a device that restarted without a farewell may do so at once."""
        with self.lock:
            return super().activate_node(node_id, heartbeat_interval) or (
                self.deactivate_node(node_id) and super().activate_node(node_id, heartbeat_interval)
            )

    # --- messages to devices ----------------------------------------------------------------------------

    def send(self, node_id: int, message_type: str, encoded: Encoded) -> str:
        """Store a message and make it visible to its node once all its objects are there."""
        metadata = Metadata(
            run_id=self.run_id,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=node_id,
            reply_to_message_id="",
            group_id=secrets.token_hex(16),  # no two messages are alike
            created_at=now().timestamp(),
            ttl=FOREVER_S,
            message_type=message_type,
        )
        metadata.delivered_at = ""
        full = make_message(metadata=metadata, content=encoded.content)
        root = full.deflate()
        message_id = get_object_id(root)
        metadata.__dict__["_message_id"] = message_id  # Flower's own way: the field has no setter
        message = make_message(metadata=metadata, content=RecordDict())
        tree = ObjectTree(object_id=message_id, children=[encoded.tree])
        session_id = self.start_session(self.run_id)
        stored, missing = self.store_message_and_object_tree(message, tree, session_id)
        if not stored:
            raise StateError(
                f"Flower did not take a message for node {node_id}.", hint="Admit the node first."
            )
        for object_id in missing:
            content = root if object_id == message_id else encoded.objects[object_id]
            super().store_object(self.run_id, session_id, object_id, content)
        with self.lock:
            self._inbox.setdefault(node_id, {})[message_id] = message
        return message_id

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        """The oldest messages of a node that are not answered yet, again and again."""
        with self.lock:
            return list(self._inbox.get(node_id, {}).values())[:limit]

    def hide(self, node_id: int, message_id: str) -> None:
        """Stop delivering a message."""
        with self.lock:
            messages = self._inbox.get(node_id, {})
            messages.pop(message_id, None)
            if not messages:
                self._inbox.pop(node_id, None)

    def discard(self, node_id: int, message_id: str, reply_id: str | None) -> None:
        """Drop a message, its reply, and all objects that nothing else refers to."""
        self.hide(node_id, message_id)
        self.discard_reply(message_id, reply_id)
        self.delete_messages({message_id})
        self.object_store.delete(message_id)

    def discard_reply(self, message_id: str, reply_id: str | None) -> None:
        """Drop a reply, complete or not; its message stays open."""
        with self.lock, self._lock_object_push_sessions:
            if reply_id is None:
                return
            if self.message_ins_id_to_message_res_id.get(message_id) == reply_id:
                del self.message_ins_id_to_message_res_id[message_id]
            self.message_res_store.pop(reply_id, None)
            session_id = self._object_push_session_by_root.get(reply_id)
            if session_id is not None:
                self._cleanup_push_session(session_id, cleanup_messages=False)
            self.object_store.delete(reply_id)

    # --- replies from devices ---------------------------------------------------------------------------

    def store_message_and_object_tree(
        self, message: Message, object_tree: ObjectTree, session_id: str
    ) -> tuple[bool, list[str]]:
        """Store a message; the link hears of replies."""
        stored, missing = super().store_message_and_object_tree(message, object_tree, session_id)
        if message.metadata.reply_to_message_id:
            if stored:
                self._on_registered(message, object_tree, session_id, missing)
            else:
                self._cleanup_push_session(session_id, cleanup_messages=False)
        return stored, missing

    def store_object(
        self, run_id: int, session_id: str, object_id: str, object_content: bytes | bytearray
    ) -> bool:
        """Store an object that a device sent; its hash and its frame are verified first."""
        content = cast("bytes", object_content)  # any bytes will do; Flower only looks at them and keeps them
        if get_object_id(content) != object_id:
            return False
        try:
            validate_object_content(content)
        except UnexpectedObjectContentError as error:
            log.info("An object was refused: %s", error)
            return False
        with self.lock:  # Flower takes this lock inside the next one when a session expires: keep one order
            stored = super().store_object(run_id, session_id, object_id, content)
        if stored:
            self._on_stored(session_id, object_id, len(content))
        return stored
