"""The node's side of secure aggregation in any Flower app: a mod.

    app = ClientApp(mods=[secure_mod()])

    @app.train()
    def train(message, context): ...     # as ever: one ArrayRecord in, one and a MetricRecord out

The node's owner says in its own configuration which key it has and whom it trusts:

    flower-supernode ... --node-config 'secagg-key="/etc/node.key" secagg-peers="/etc/keys.txt"'

A node with this mod answers no plain training message: its update leaves it masked, or not at all. Messages
to evaluate pass through, and what its function reports there is seen by the server.
"""

import logging
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from lepton_fl.errors import ConfigError, LeptonError, Rejection, TrustError, UpdateRejected
from lepton_fl.rounds.secure_device import Offer, check_request
from lepton_fl.secagg.context import DEFAULT_COHORT
from lepton_fl.secagg.context import request_digest as plan_digest
from lepton_fl.secagg.masks import byte_view, ring_type
from lepton_fl.wire.messages import Fields
from lepton_fl.wire.messages import Request as PlanRequest
from lepton_fl.wire.records import Records
from lepton_strategies.keeper import Beside, Here, Keeper, NodeKeys
from lepton_strategies.records import from_record_dict, to_record_dict
from lepton_strategies.secure_wire import (
    MASKED,
    RECORD,
    Settings,
    arrays_digest,
    only_arrays,
    request_digest,
    vector_of,
)

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict

log = logging.getLogger(__name__)

FAILED: Final = 0  # Flower's code of an error without a kind
Next = Callable[["Message", "Context"], "Message"]
Mod = Callable[["Message", "Context", Next], "Message"]
KeysFor = Callable[["Context"], NodeKeys]


def secure_mod(keys: KeysFor | None = None, *, keep: Literal["beside", "here"] = "beside") -> Mod:
    """A mod that answers ``SecureAggregation``.

    Args:
        keys: finds a node's keys; None = as its configuration says (``configured_keys``).
        keep: where secrets live from one message to the next. "beside": in a process of their own, because
            Flower starts a process for every message. "here": in this process, for nodes that live in it.
    """
    find = keys or configured_keys

    def mod(message: "Message", context: "Context", call_next: Next) -> "Message":
        if RECORD not in message.content:
            if message.metadata.message_type.partition(".")[0] == "train":
                return _error(message, "This node trains only with secure aggregation.")
            return call_next(message, context)
        try:
            keeper = _keeper(find(context), keep)
            return _answer(message, context, call_next, keeper)
        except UpdateRejected as refusal:
            return _refuse(message, refusal.reason, refusal)
        except TrustError as refusal:
            return _refuse(message, Rejection.MALFORMED, refusal)
        except LeptonError as error:
            return _refuse(message, Rejection.FAILED, error)

    return mod


def configured_keys(context: "Context") -> NodeKeys:
    """The keys that a node's configuration names: secagg-key, secagg-peers, and what else it demands.

    Where it says nothing, as in Flower's simulation, LEPTON_SECAGG_KEY, _PEERS and _COHORT of the
    environment do, in which ``{partition-id}`` stands for the node's.

    Raises:
        ConfigError: it names none.
    """
    node = context.node_config
    key, peers = _setting(context, "secagg-key"), _setting(context, "secagg-peers")
    if not key or not peers:
        raise ConfigError(
            "This node's configuration names no keys for secure aggregation.",
            hint='Start it with --node-config \'secagg-key="/path/node.key" secagg-peers="/path/keys.txt"\'.',
        )
    return NodeKeys(
        Path(key),
        Path(peers),
        str(node.get("secagg-deployment", "flower")),
        int(_setting(context, "secagg-cohort") or DEFAULT_COHORT),
        node.get("secagg-hidden-graph", False) is True,
    )


def _setting(context: "Context", name: str) -> str:
    node = context.node_config
    if name in node:
        return str(node[name])
    told = os.environ.get("LEPTON_" + name.upper().replace("-", "_"), "")
    return told.replace("{partition-id}", str(node.get("partition-id", "")))


def _keeper(keys: NodeKeys, keep: str) -> Keeper:
    return _here(keys) if keep == "here" else Beside(keys)


@lru_cache(maxsize=4096)
def _here(keys: NodeKeys) -> Here:
    return Here(keys)


def _answer(message: "Message", context: "Context", call_next: Next, keeper: Keeper) -> "Message":
    told = Fields(message.content.config_records.get(RECORD, {}))
    stage, name = told.text("stage"), told.text("name")
    frame = told.take("frame")
    if not isinstance(frame, bytes):
        raise UpdateRejected(Rejection.MALFORMED, "The frame of a secure aggregation is not bytes.")
    if name.partition(".")[0] != str(message.metadata.run_id):
        raise TrustError(f"A round of run {message.metadata.run_id} is named {name[:60]!r}.")
    if stage == "adverts":
        return _reply(message, keeper.call("advert", name)[0])
    if stage == "shares":
        offer = told.take("offer")
        _check_name(str(offer), name)
        return _reply(message, keeper.call("shares", name, str(offer).encode(), frame)[0])
    if stage == "uploads":
        return _train(message, context, call_next, keeper, name, frame)
    if stage in ("consents", "reveals"):
        return _reply(message, *keeper.call(stage[:-1], name, frame))
    raise UpdateRejected(Rejection.MALFORMED, f"There is no stage {stage[:20]!r}.")


def _check_name(text: str, name: str) -> None:
    offer = Offer.from_json(text)
    if name != f"{offer.run}/{offer.round}/{offer.attempt}":
        raise TrustError(f"The round {name[:60]!r} is offered as another one.")


def _train(
    message: "Message", context: "Context", call_next: Next, keeper: Keeper, name: str, frame: bytes
) -> "Message":
    """Hold the request against the offer, let the node's own function train, and mask what it returns."""
    from flwr.app import Message, RecordDict

    began = time.monotonic()
    offer = Offer.from_json(bytes(keeper.call("deliver", name, frame)[0]).decode())
    settings = Settings.from_json(str(message.content.config_records[RECORD]["settings"]))
    asked = RecordDict({k: v for k, v in message.content.items() if k != RECORD})
    _check(offer, asked, settings)
    plain = Message(content=asked, metadata=message.metadata)  # type: ignore[call-overload]  # undocumented, used by Flower itself
    reply = call_next(plain, context)
    if reply.has_error():
        raise UpdateRejected(Rejection.FAILED, f"The node's function failed: {reply.error.reason}")
    vector = vector_of(asked, reply.content, settings, offer.encoding, os.urandom)
    tail, masked = keeper.call("mask", name, byte_view(vector))
    whole = offer.encoding.bits in (16, 32)  # else packed, and only bytes
    array = np.frombuffer(masked, ring_type(offer.encoding.bits) if whole else np.uint8)
    return _reply(message, tail, masked=array, seconds=time.monotonic() - began)


def _check(offer: Offer, asked: "RecordDict", settings: Settings) -> None:
    if settings.lepton:
        request = PlanRequest.read(from_record_dict(asked))  # verifies the model's hash
        check_request(offer, plan_digest(request), bytes.fromhex(request.model_sha256))
        return
    check_request(offer, request_digest(asked, settings), arrays_digest(only_arrays(asked)))


def _reply(
    message: "Message",
    frame: bytes | memoryview,
    prekey: bytes | memoryview = b"",
    *,
    masked: np.ndarray[tuple[int], np.dtype[Any]] | None = None,
    seconds: float = 0.0,
) -> "Message":
    from flwr.app import Message

    arrays = {} if masked is None else {MASKED: masked}
    records = Records(arrays, {"frame": bytes(frame), "prekey": bytes(prekey)}, {"seconds": seconds})
    return Message(content=to_record_dict(records), reply_to=message)


def _refuse(message: "Message", reason: Rejection, error: LeptonError) -> "Message":
    from flwr.app import Message

    log.warning("secure aggregation: %s", error)
    records = Records({}, {"refused": reason.value, "text": str(error)[:500]}, {})
    return Message(content=to_record_dict(records, salt=os.urandom(16)), reply_to=message)


def _error(message: "Message", reason: str) -> "Message":
    from flwr.app import Error, Message

    return Message(Error(FAILED, reason), reply_to=message)
