"""Packed objects: nothing is lost, nothing is believed, and weights really become smaller."""

import hashlib
import struct
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.wire import downlink
from lepton_fl.wire.downlink import pack, unpack

RNG = np.random.default_rng(0)
OLD = RNG.normal(0, 0.05, 50_000).astype(np.float32)
NEW = OLD + RNG.normal(0, 0.0005, 50_000).astype(np.float32)


def sha(data):
    return hashlib.sha256(data).hexdigest()


def refused(packed, name, held=None):
    with pytest.raises(UpdateRejected) as error:
        unpack(packed, name, (held or {}).get)
    assert error.value.reason is Rejection.MALFORMED
    return str(error.value)


@given(st.binary(max_size=70), st.data())
def test_whatever_it_is_comes_back_bit_for_bit(data, draw):
    base = draw.draw(st.binary(min_size=len(data), max_size=len(data)))
    assert unpack(pack(data), sha(data), {}.get) == data
    assert unpack(pack(data, sha(base), base), sha(data), {sha(base): base}.get) == data


@pytest.mark.parametrize("odd", [0, 1, 2, 3])
def test_weights_become_smaller_wherever_their_words_begin(odd):
    """NaN, infinities, zeros of both signs and subnormal numbers are bits like others."""
    new, old = NEW.copy(), OLD.copy()
    new[:6] = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40]
    new, old = b"x" * odd + new.tobytes(), b"y" * odd + old.tobytes()
    whole, change = pack(new), pack(new, sha(old), old)
    assert len(change) < 0.75 * len(new) < 0.87 * len(new) > len(whole)
    assert unpack(whole, sha(new), {}.get) == new == unpack(change, sha(new), {sha(old): old}.get)


def test_the_same_bytes_always_pack_the_same():
    assert pack(NEW.tobytes()) == pack(NEW.tobytes())


def test_a_difference_needs_its_base():
    new, old = NEW.tobytes(), OLD.tobytes()
    change = pack(new, sha(old), old)
    assert "does not have" in refused(change, sha(new))
    assert "does not have" in refused(change, sha(new), {sha(old): old[:-4]})
    assert "asked for" in refused(change, sha(new), {sha(old): bytes(len(old))})  # a store that lies
    with pytest.raises(ValueError, match="same length"):
        pack(new, sha(old), old[:-4])
    with pytest.raises(ValueError, match="at most"):
        pack(bytes(downlink.MOST + 1))


def test_what_is_not_the_object_that_was_asked_for_is_refused():
    packed = pack(NEW.tobytes())
    assert "asked for" in refused(packed, sha(OLD.tobytes()))
    for at in (0, 5, 9, 60, len(packed) // 2, len(packed) - 1):
        broken = bytearray(packed)
        broken[at] ^= 1
        refused(bytes(broken), sha(NEW.tobytes()))
    for end in (0, 3, 39, 41, len(packed) - 1):
        refused(packed[:end], sha(NEW.tobytes()))
    refused(packed + b"\0", sha(NEW.tobytes()))


def frame(size, body):
    return struct.pack("<4sI32s", b"LPD1", size, bytes(32)) + body


@pytest.mark.parametrize(
    "bomb",
    [
        frame(2**31, zstandard.compress(bytes(2**25))),  # says so itself
        frame(1000, zstandard.compress(bytes(2**25))),  # the frame says so
        frame(1000, zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**25))),  # nobody does
        frame(1000, zstandard.compress(bytes(1000)) + zstandard.compress(bytes(2**25))),  # behind a good one
    ],
)
def test_a_bomb_takes_no_memory(bomb):
    name = sha(bytes(2**25))
    tracemalloc.start()
    refused(bomb, name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
