"""Integers of any width, side by side on the wire: a little-endian stream of bits.

    packed = pack(elements, 7)               # (n,) uint16 or uint32 to ceil(7 n / 8) bytes
    unpack(packed, len(elements), 7)         # the same elements, modulo 2**7

Sums are made in lanes of 16 or 32 bits, which is what processors and masks are fast with; only what travels
is packed. Whatever adds up in lanes adds up modulo ``2**bits`` in the bits that are left.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 15  # elements handled at a time, a multiple of 8: temporaries stay in cache
WIDEST = 32

Lanes = NDArray[np.unsignedinteger[Any]]  # little-endian uint16 or uint32


def lane_bits(bits: int) -> int:
    """Of the lanes in which elements of so many bits are added: 16 or 32."""
    if not 2 <= bits <= WIDEST:
        raise ValueError(f"Expected 2 to {WIDEST} bits, got {bits}.")
    return 16 if bits <= 16 else 32


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many elements."""
    return -(-count * bits // 8)


def pack(elements: Lanes, bits: int) -> NDArray[np.uint8]:
    """The low bits of every element; those of a whole lane are not copied.

    Args:
        elements: (n,) contiguous.
        bits: of each that are kept, at most those of a lane.
    """
    if bits == 8 * elements.itemsize:
        return elements.view(np.uint8)
    packed = np.empty(packed_size(len(elements), bits), np.uint8)
    for start in range(0, len(elements), BLOCK):
        part = _packed(elements[start : start + BLOCK], bits)
        packed[start // 8 * bits :][: len(part)] = part
    return packed


def unpack(packed: NDArray[np.uint8], count: int, bits: int, lane: int = 0) -> Lanes:
    """The reverse of ``pack``; bits behind the last element are ignored.

    Args:
        packed: (``packed_size(count, bits)``,).
        count: n.
        bits: of each.
        lane: bits of the result's type; 0 = as ``lane_bits`` has it.

    Raises:
        ValueError: there are more or fewer bytes.
    """
    if len(packed) != packed_size(count, bits):
        raise ValueError(f"Expected {packed_size(count, bits)} bytes, got {len(packed)}.")
    dtype = np.dtype(f"<u{(lane or lane_bits(bits)) // 8}")
    if bits == 8 * dtype.itemsize:
        return np.ascontiguousarray(packed).view(dtype)
    elements = np.empty(count, dtype)
    for start in range(0, count, BLOCK):
        part = elements[start : start + BLOCK]
        part[:] = _unpacked(packed[start // 8 * bits :][: packed_size(len(part), bits)], len(part), bits)
    return elements


def signed(elements: Lanes, bits: int) -> NDArray[np.signedinteger[Any]]:
    """Elements as the two's-complement integers of so many bits that they stand for."""
    lane = 8 * elements.itemsize
    if bits == lane:
        return elements.view(f"<i{lane // 8}")
    shift = elements.dtype.type(lane - bits)
    moved = (elements << shift).view(f"<i{lane // 8}")
    moved >>= moved.dtype.type(lane - bits)
    return moved


def width_of(integers: NDArray[np.signedinteger[Any]]) -> int:
    """The fewest bits, 2 at least, in which two's complement holds all of these."""
    low, high = int(integers.min(initial=0)), int(integers.max(initial=0))
    return max(2, 1 + max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0))


def _packed(elements: Lanes, bits: int) -> NDArray[np.uint8]:
    """Groups of 8 elements are ``bits`` bytes: shift each to its place in words of 64 bits."""
    groups = -(-len(elements) // 8)
    column = np.zeros((groups, 8), np.uint64)
    np.bitwise_and(elements, elements.dtype.type((1 << bits) - 1), out=column.reshape(-1)[: len(elements)])
    words = np.zeros((groups, -(-bits // 8)), "<u8")
    for i in range(8):
        word, shift = divmod(i * bits, 64)
        words[:, word] |= column[:, i] << np.uint64(shift)
        if shift + bits > 64:
            words[:, word + 1] |= column[:, i] >> np.uint64(64 - shift)
    stream = words.view(np.uint8)[:, :bits].reshape(-1)
    return stream[: packed_size(len(elements), bits)]


def _unpacked(packed: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.uint64]:
    groups = -(-count // 8)
    stream = np.zeros(groups * bits, np.uint8)
    stream[: len(packed)] = packed
    words = np.zeros((groups, -(-bits // 8)), "<u8")
    words.view(np.uint8)[:, :bits] = stream.reshape(groups, bits)
    column, mask = np.empty((groups, 8), np.uint64), np.uint64((1 << bits) - 1)
    for i in range(8):
        word, shift = divmod(i * bits, 64)
        column[:, i] = words[:, word] >> np.uint64(shift)
        if shift + bits > 64:
            column[:, i] |= words[:, word + 1] << np.uint64(64 - shift)
    column &= mask
    return column.reshape(-1)[:count]
