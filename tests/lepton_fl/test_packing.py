"""Integers of any width on the wire."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fl.packing import BLOCK, lane_bits, pack, packed_size, signed, unpack, width_of


def by_hand(values, bits):
    """The definition: element i is at bits i * b and up of one large little-endian integer."""
    whole = sum((int(v) & ((1 << bits) - 1)) << bits * i for i, v in enumerate(values))
    return whole.to_bytes(packed_size(len(values), bits), "little")


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(2, 32), st.integers(0, 70))
def test_elements_are_where_the_definition_says(data, bits, count):
    values = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=count, max_size=count))
    for lane in {lane_bits(bits), 32}:
        elements = np.array(values, np.uint64).astype(f"<u{lane // 8}")
        packed = pack(elements, bits)
        assert bytes(packed) == by_hand(elements, bits)
        again = unpack(packed, count, bits, lane)
        assert again.dtype == elements.dtype
        assert again.tolist() == [int(v) & ((1 << bits) - 1) for v in elements]


@pytest.mark.parametrize("bits", [2, 7, 9, 12, 13, 20, 31])
@pytest.mark.parametrize("count", [BLOCK - 1, BLOCK, BLOCK + 9])
def test_blocks_join_without_a_seam(bits, count):
    rng = np.random.default_rng(bits)
    elements = rng.integers(0, 2**bits, count, np.uint64).astype(f"<u{lane_bits(bits) // 8}")
    assert np.array_equal(unpack(pack(elements, bits), count, bits), elements)
    assert bytes(pack(elements[:64], bits)) == by_hand(elements[:64], bits)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20))
def test_the_width_holds_all_and_no_narrower_one_does(values):
    width = width_of(np.array(values, np.int64))
    half = 2 ** (width - 1)
    assert all(-half <= v < half for v in values)
    assert width == 2 or any(not -half // 2 <= v < half // 2 for v in values)


@given(st.integers(2, 32), st.data())
def test_twos_complement_of_any_width(bits, data):
    half = 2 ** (bits - 1)
    values = np.array(data.draw(st.lists(st.integers(-half, half - 1), min_size=1)), np.int64)
    for lane in {lane_bits(bits), 32}:
        elements = values.astype(f"<u{lane // 8}")
        assert signed(elements, bits).tolist() == values.tolist()
        masked = (elements.astype(np.uint64) & np.uint64(2**bits - 1)).astype(elements.dtype)
        assert signed(masked, bits).tolist() == values.tolist()


@pytest.mark.parametrize("bits", [0, 1, 33])
def test_widths_that_there_are_not(bits):
    with pytest.raises(ValueError, match="2 to 32"):
        lane_bits(bits)


def test_bytes_too_many_or_too_few():
    packed = pack(np.arange(10, dtype="<u2"), 7)
    for wrong in (packed[:-1], np.append(packed, packed[:1])):
        with pytest.raises(ValueError, match="Expected 9 bytes"):
            unpack(wrong, 10, 7)
