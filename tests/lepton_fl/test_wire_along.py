"""Small objects that travel with the message they belong to."""

import hashlib

from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from lepton_fl.wire.along import MOST_ALONG, add_along, read_along
from lepton_fl.wire.v1.device_pb2 import Along, Verdict


def carrier(objects) -> Message:
    message = Verdict(run_id="r1", round=3)
    add_along(message, objects)
    return message


@given(st.lists(st.binary(max_size=9_000), max_size=9))
def test_the_smallest_come_back_by_their_names_and_the_message_stays_what_it_is(objects):
    message = Verdict.FromString(carrier(objects).SerializeToString())
    came = read_along(message)
    assert all(hashlib.sha256(content).hexdigest() == name for name, content in came.items())
    assert set(came.values()) <= set(objects) - {b""}
    assert sum(map(len, came.values())) <= MOST_ALONG
    left = [content for content in objects if content and content not in came.values()]
    assert not left or min(map(len, left)) >= max(map(len, came.values()), default=0)
    if sum(map(len, objects)) <= MOST_ALONG:
        assert not left
    assert (message.run_id, message.round) == ("r1", 3)


def test_more_than_there_may_be_is_nothing():
    message = Verdict(run_id="r1")
    message.MergeFromString(Along(objects=[b"x" * MOST_ALONG, b"y"]).SerializeToString())
    assert read_along(message) == {}
    assert read_along(Verdict(run_id="r1")) == {}
