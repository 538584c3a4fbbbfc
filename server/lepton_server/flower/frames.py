"""Flower's frames without copies: what is sent and received in bulk stays where it is.

A model is sent to a whole cohort from the array that the round holds, an update is decoded as a view of the
bytes that came. The frames are Flower's own (``supercore.inflatable``, ``message.proto``); only the way to
them is ours, because each of its steps copies the whole content once or twice.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.proto.message_pb2 import PullObjectResponse, PushObjectRequest
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_children_ids_from_object_content,
    get_object_type_from_object_content,
)
from google.protobuf.message import DecodeError
from numpy.lib import format as npy
from numpy.typing import NDArray

from lepton_strategies.records import NUMPY_STYPE

MAX_ARRAY_FRAME: Final = 64 * 1024  # bytes of an array's list of chunks; 64 GiB of array fit in
_CONTENT: Final = PushObjectRequest.DESCRIPTOR.fields_by_name["object_content"].number
_FOUND: Final = PullObjectResponse(object_found=True, object_available=True).SerializeToString()
_FOUND_CONTENT: Final = PullObjectResponse.DESCRIPTOR.fields_by_name["object_content"].number


@dataclass(frozen=True)
class Rope:
    """Bytes in several pieces; stands in Flower's object store where it keeps bytes."""

    pieces: tuple[bytes | memoryview, ...]

    def __len__(self) -> int:
        return sum(len(piece) for piece in self.pieces)

    def __bytes__(self) -> bytes:
        return b"".join(self.pieces)


class _Chunk(InflatableObject):
    """An array chunk that refers to its data."""

    def __init__(self, pieces: tuple[bytes | memoryview, ...]) -> None:
        body = Rope(pieces)
        head = f"{ArrayChunk.__qualname__}  {len(body)}".encode() + HEAD_BODY_DIVIDER
        self._rope = Rope((head, *pieces))
        digest = hashlib.sha256()
        for piece in self._rope.pieces:
            digest.update(piece)
        self._name = digest.hexdigest()

    @property
    def object_id(self) -> str:
        """SHA-256 of the frame."""
        return self._name

    def deflate(self) -> Any:  # noqa: ANN401 - Flower says bytes
        """The frame, not joined."""
        return self._rope


def shared_arrays(arrays: Mapping[str, NDArray[Any]], seams: Mapping[str, int] | None = None) -> ArrayRecord:
    """Encode arrays as views of their memory: they must not change while the record is in use.

    Args:
        arrays: By name.
        seams: Name -> number of the first element that no chunk shares with elements before it. What
            changes and what does not are then in chunks of their own.
    """
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = _shared(array, (seams or {}).get(name, 0))  # the constructor would copy it
    return record


def chunks_of(record: ArrayRecord) -> dict[tuple[str, int], tuple[str, Any]]:
    """The chunks of arrays that ``shared_arrays`` made: (array, number) -> object id and frame."""
    return {
        (name, number): (object_id, chunk.deflate())
        for name, array in record.items()
        for number, (object_id, chunk) in enumerate(array.__dict__["_chunks"])
    }


def _shared(array: NDArray[Any], seam: int) -> Array:
    array = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    stream = BytesIO()
    npy.write_array_header_1_0(stream, npy.header_data_from_array_1_0(array))
    header, data = stream.getvalue(), array.reshape(-1).view(np.uint8).data.toreadonly()
    encoded = Array(dtype=str(array.dtype), shape=tuple(array.shape), stype=NUMPY_STYPE, data=b"")
    size, first, cut = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, [header], seam * array.itemsize
    ends = [*range(size - len(header), cut, size), cut] if 0 < cut < len(data) else []
    ends += [*range((cut if ends else -len(header)) + size, len(data), size), len(data)]
    chunks = []
    for start, end in zip([0, *ends], ends, strict=False):
        chunks.append(_Chunk((*first, data[start:end])))
        first = []
    encoded.__dict__["_chunks"] = [(chunk.object_id, chunk) for chunk in chunks]  # where Flower keeps them
    return encoded


def inflate_arrays(contents: dict[str, Any], max_bytes: int) -> dict[str, InflatableObject]:
    """Take the arrays out of a reply's objects, as read-only views of what came.

    Args:
        contents: Object id -> frame; the chunks of arrays are removed from it.
        max_bytes: What all arrays together may unpack to.

    Returns:
        The array records among the objects, by id.

    Raises:
        ValueError, KeyError, IndexError, TypeError: The frames are not sound, or it would be more.
    """
    for name, content in contents.items():
        if isinstance(content, Rope):  # a device that sends our own array back
            contents[name] = bytes(content)
    kinds = {name: get_object_type_from_object_content(content) for name, content in contents.items()}
    frames = {name: contents[name] for name, kind in kinds.items() if kind == Array.__qualname__}
    if sum(_unpacked(contents, frame) for frame in frames.values()) > max_bytes:
        raise ValueError(f"the arrays unpack to more than {max_bytes} bytes")
    found: dict[str, InflatableObject] = {}
    arrays = {name: _inflate(contents, frame) for name, frame in frames.items()}
    for name, kind in kinds.items():
        if kind == ArrayRecord.__qualname__:
            found[name] = record = ArrayRecord()
            for key, array_id in _json(contents[name]).items():
                record[key] = arrays[array_id]  # the constructor would copy it
    for name in [name for name, kind in kinds.items() if kind == ArrayChunk.__qualname__]:
        del contents[name]
    return found


def _chunks(contents: Mapping[str, Any], frame: Any) -> list[Any]:  # noqa: ANN401 - bytes or bytearray
    """The chunks of an array, in order; a frame names them by number and may repeat them."""
    if len(frame) > MAX_ARRAY_FRAME:
        raise ValueError(f"an array's frame has {len(frame)} bytes")
    children = get_object_children_ids_from_object_content(frame)
    return [contents[children[index]] for index in _json(frame)["arraychunk_ids"]]


def _unpacked(contents: Mapping[str, Any], frame: Any) -> int:  # noqa: ANN401 - bytes or bytearray
    return sum(len(chunk) for chunk in _chunks(contents, frame))


def _inflate(contents: Mapping[str, Any], frame: Any) -> Array:  # noqa: ANN401 - bytes or bytearray
    fields = _json(frame)
    array = Array(dtype=fields["dtype"], shape=tuple(fields["shape"]), stype=fields["stype"], data=b"")
    array.data = _joined([_chunk_body(chunk) for chunk in _chunks(contents, frame)])
    return array


def _json(content: Any) -> Any:  # noqa: ANN401 - bytes or bytearray; what JSON holds
    return json.loads(bytes(_body(content)))


def _body(content: Any) -> memoryview:  # noqa: ANN401 - bytes or bytearray
    return memoryview(content).toreadonly()[content.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER) :]


def _chunk_body(content: Any) -> memoryview:  # noqa: ANN401 - bytes or bytearray
    if get_object_type_from_object_content(content) != ArrayChunk.__qualname__:
        raise ValueError("an array's chunk is of another type")
    return _body(content)


def _joined(pieces: list[memoryview]) -> Any:  # noqa: ANN401 - Flower says bytes
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


# --- the two bulk messages -----------------------------------------------------------------------------


def pull_response(content: Any) -> Iterable[bytes | memoryview]:  # noqa: ANN401 - bytes, bytearray or Rope
    """The pieces of a ``PullObjectResponse`` that carries an object."""
    yield _FOUND + bytes([_FOUND_CONTENT << 3 | 2]) + _varint(len(content))
    if isinstance(content, Rope):
        yield from content.pieces
    else:
        yield memoryview(content)


def cut_content(body: bytearray) -> tuple[PushObjectRequest, bytearray]:
    """Split a ``PushObjectRequest`` into the message without its content, and the content.

    Args:
        body: The message's bytes; what is left of them is the content.

    Raises:
        DecodeError: The bytes are no such message, or hold two contents.
    """
    start = end = len(body)  # of the content
    first, at = len(body), 0  # of the field with its tag
    while at < len(body):
        field_at = at
        tag, at = _read_varint(body, at)
        value, at = _read_varint(body, at)
        if tag & 7 == 2:  # a length and so many bytes
            if tag >> 3 == _CONTENT:
                if first != len(body):
                    raise DecodeError("two contents")
                first, start, end = field_at, at, at + value
            at += value
        elif tag & 7 != 0:
            raise DecodeError(f"wire type {tag & 7}")
    if at != len(body):
        raise DecodeError("truncated")
    request = PushObjectRequest.FromString(bytes(body[:first]) + bytes(body[end:]))
    del body[end:], body[:start]  # neither moves what stays
    return request, body


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytearray, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise DecodeError("truncated")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise DecodeError("a number of more than ten bytes")
