"""Small objects that travel with the message they belong to, between our coordinator and our devices.

Flower names the objects of a message and moves each by a request of its own: of a message of a few hundred
bytes that is three requests down and five up. Ours add the small ones to the first, in a field that Flower
skips (``Along`` in ``device.proto``), so either end works with Flower's own.
"""

import hashlib
from collections.abc import Iterable
from typing import Any, Final

from google.protobuf.message import Message

from lepton_fl.wire.v1.device_pb2 import Along

MOST_ALONG: Final = 16 * 1024  # bytes; what a request that waits for its turn may hold


def add_along(message: Message, objects: Iterable[Any]) -> None:
    """Add the smallest objects, as many as there is room for.

    Args:
        message: is extended.
        objects: contents, bytes of any kind; an empty one is not there yet.
    """
    along, size = Along(), 0
    for content in sorted(filter(len, objects), key=len):
        size += len(content)
        if size > MOST_ALONG:
            break
        along.objects.append(bytes(content))
    message.MergeFromString(along.SerializeToString())


def read_along(message: Message) -> dict[str, bytes]:
    """The objects that came with a message, by their true names; none if there are more than there may be."""
    objects = Along.FromString(message.SerializeToString()).objects
    if sum(map(len, objects)) > MOST_ALONG:
        return {}
    return {hashlib.sha256(content).hexdigest(): content for content in objects}
