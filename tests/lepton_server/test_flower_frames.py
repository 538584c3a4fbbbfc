"""Flower's frames without copies: byte for byte what Flower makes of the same, and nothing else accepted."""

import numpy as np
import pytest
from flwr.app import RecordDict
from flwr.proto.message_pb2 import PullObjectResponse, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from google.protobuf.message import DecodeError

from lepton_fl.wire.records import Records
from lepton_server.flower import frames
from lepton_strategies.records import from_record_dict, to_record_dict

ARRAYS = {
    "small": np.arange(6, dtype=np.int32).reshape(2, 3),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(3.5),
    "chunks": np.random.default_rng(0).integers(0, 2**31, 3_000_000, np.int32),  # 12 MB: three chunks
}


def plain(content: RecordDict) -> dict[str, bytes]:
    """Object id -> frame, as Flower makes them."""
    return {name: bytes(item.deflate()) for name, item in get_all_nested_objects(content).items()}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_shared_array_has_the_same_frames_as_flowers_own(name):
    records = Records({name: ARRAYS[name]}, {"round": 1})
    ours = to_record_dict(records, arrays=frames.shared_arrays(records.arrays))
    assert plain(ours) == plain(to_record_dict(records))


def test_a_shared_array_is_not_copied():
    array = np.zeros(1000, np.float32)
    record = frames.shared_arrays({"model": array})
    (rope,) = [chunk.deflate() for chunk in record["model"].children.values()]
    array[0] = 1
    assert bytes(rope)[-4000:] == array.tobytes()
    assert rope.pieces[-1].readonly


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_arrays_come_out_as_read_only_views(kind):
    content = to_record_dict(Records(ARRAYS, {"round": 1}))
    objects = {name: kind(frame) for name, frame in plain(content).items()}
    arrays = frames.inflate_arrays(objects, 2**25)
    rest = {name: bytes(frame) for name, frame in objects.items()}
    found = from_record_dict(inflate_object_from_contents(content.object_id, rest, objects=arrays))
    assert set(found.arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert array.size == 0 or not found.arrays[name].flags.writeable
    assert found.config == {"round": 1}


def test_arrays_are_bounded_by_what_they_unpack_to():
    content = to_record_dict(Records({"a": np.zeros(6_000_000, np.int32)}))  # 24 MB
    objects = plain(content)  # equal chunks are stored once
    assert sum(map(len, objects.values())) < 15_000_000
    with pytest.raises(ValueError, match="unpack to more than 20000000"):
        frames.inflate_arrays(objects, 20_000_000)


@pytest.mark.parametrize("session_id", ["", "s" * 32])
@pytest.mark.parametrize("size", [0, 1, 127, 128, 70_000])
def test_an_uploads_content_is_cut_out(size, session_id):
    content = np.random.default_rng(size).bytes(size)
    request = PushObjectRequest(
        node=Node(node_id=2**63), run_id=7, object_id="ab" * 32, object_content=content, session_id=session_id
    )
    rest, found = frames.cut_content(bytearray(request.SerializeToString()))
    assert found == content
    request.ClearField("object_content")
    assert rest == request


def test_an_upload_that_is_cut_off_or_doubled_is_refused():
    whole = PushObjectRequest(run_id=7, object_id="ab" * 32, object_content=b"x" * 300).SerializeToString()
    for length in range(1, len(whole)):
        try:
            _, content = frames.cut_content(bytearray(whole[:length]))
        except DecodeError:
            continue
        assert content == b""  # it ends before the content begins
    for bad in (whole + whole, whole + b"\x0b", whole + b"\x80" * 11, b"\x22\xff\xff\xff\xff\x0f"):
        with pytest.raises(DecodeError):
            frames.cut_content(bytearray(bad))


@pytest.mark.parametrize("content", [b"x" * 200, bytearray(b"y" * 70_000), frames.Rope((b"ab", b"cd"))])
def test_a_download_is_flowers_own_message(content):
    response = PullObjectResponse.FromString(b"".join(frames.pull_response(content)))
    assert response.object_found
    assert response.object_available
    assert response.object_content == bytes(content)
