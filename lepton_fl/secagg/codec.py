"""The byte layout of ``flsa/1``: strict, with exactly one encoding for every value.

Integers are big-endian; field elements and ring elements are little-endian, as :mod:`numpy` stores them.
A reader refuses what is cut off, left over, too long or not in its one form, before it allocates anything
of the size that a message claims.

    writer = Writer().u16(7).text("d-abc")
    reader = Reader(bytes(writer))
    reader.u16(), reader.text()
    reader.finish()
"""

import struct
from collections.abc import Iterable
from typing import Self

from lepton_fl.wire.messages import malformed

MAX_TEXT = 255  # bytes
MAX_BLOB = 65_535  # bytes


class Writer:
    """Collects the bytes of a message."""

    def __init__(self, start: bytes = b"") -> None:
        self._parts: list[bytes] = [start]

    def raw(self, data: bytes) -> Self:
        """Bytes of a length that both sides know."""
        self._parts.append(bytes(data))
        return self

    def _pack(self, form: str, value: int) -> Self:
        try:
            return self.raw(struct.pack(form, value))
        except struct.error as error:
            raise ValueError(f"{value} does not fit the field {form}.") from error

    def u8(self, value: int) -> Self:
        """An integer of [0, 2**8)."""
        return self._pack(">B", value)

    def u16(self, value: int) -> Self:
        """An integer of [0, 2**16)."""
        return self._pack(">H", value)

    def u32(self, value: int) -> Self:
        """An integer of [0, 2**32)."""
        return self._pack(">I", value)

    def u64(self, value: int) -> Self:
        """An integer of [0, 2**64)."""
        return self._pack(">Q", value)

    def blob(self, data: bytes) -> Self:
        """At most 65,535 bytes, their length first."""
        return self.u16(len(data)).raw(data)

    def text(self, value: str) -> Self:
        """At most 255 bytes of UTF-8, their length first.

        Raises:
            ValueError: it is longer, or not Unicode.
        """
        data = value.encode("utf-8")
        if len(data) > MAX_TEXT:
            raise ValueError(f"Expected a text of at most {MAX_TEXT} bytes, got {len(data)}.")
        return self.u8(len(data)).raw(data)

    def __bytes__(self) -> bytes:
        return b"".join(self._parts)


class Reader:
    """Takes a message apart; every method raises ``UpdateRejected`` (MALFORMED) for what it cannot read."""

    def __init__(self, data: bytes) -> None:
        self._data = bytes(data)
        self._at = 0

    def raw(self, length: int) -> bytes:
        """The next ``length`` bytes."""
        end = self._at + length
        if length < 0 or end > len(self._data):
            left = len(self._data) - self._at
            raise malformed(f"{length} bytes expected, {left} left")
        part = self._data[self._at : end]
        self._at = end
        return part

    def u8(self) -> int:
        """An integer of [0, 2**8)."""
        return self.raw(1)[0]

    def u16(self) -> int:
        """An integer of [0, 2**16)."""
        return int.from_bytes(self.raw(2), "big")

    def u32(self) -> int:
        """An integer of [0, 2**32)."""
        return int.from_bytes(self.raw(4), "big")

    def u64(self) -> int:
        """An integer of [0, 2**64)."""
        return int.from_bytes(self.raw(8), "big")

    def blob(self, limit: int = MAX_BLOB) -> bytes:
        """Bytes whose length comes first; one above ``limit`` is refused."""
        length = self.u16()
        if length > limit:
            raise malformed(f"a part of {length} bytes, at most {limit}")
        return self.raw(length)

    def text(self) -> str:
        """A UTF-8 text whose length comes first."""
        try:
            return self.raw(self.u8()).decode("utf-8")
        except UnicodeDecodeError as error:
            raise malformed("a text is not UTF-8") from error

    def bitmap(self, count: int) -> frozenset[int]:
        """A set of positions below ``count``; padding bits that are set are refused."""
        return read_bitmap(self.raw(bitmap_bytes(count)), count)

    def finish(self) -> None:
        """Refuse bytes that are left over."""
        if self._at != len(self._data):
            raise malformed(f"{len(self._data) - self._at} bytes left over")


def bitmap_bytes(count: int) -> int:
    """Bytes of a bitmap of ``count`` positions."""
    return (count + 7) // 8


def to_bitmap(positions: Iterable[int], count: int) -> bytes:
    """A set of positions below ``count`` as bits; position 0 is the lowest bit of the first byte.

    Raises:
        ValueError: a position is outside.
    """
    bits = 0
    for position in positions:
        if not 0 <= position < count:
            raise ValueError(f"Expected positions of [0, {count}), got {position}.")
        bits |= 1 << position
    return bits.to_bytes(bitmap_bytes(count), "little")


def read_bitmap(data: bytes, count: int) -> frozenset[int]:
    """The set that :func:`to_bitmap` wrote.

    Raises:
        UpdateRejected: MALFORMED, a bit at or above ``count`` is set.
    """
    bits = int.from_bytes(data, "little")
    if bits >> count:
        raise malformed(f"a bitmap names a position of {count} or more")
    return frozenset(i for i in range(count) if bits >> i & 1)
