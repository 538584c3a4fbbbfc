"""The way down in fewer bytes, without loss: an object of a message, packed.

A message travels as objects that are named by their SHA-256. An array of float32 packs well once its bytes
are sorted by significance, for signs and exponents repeat themselves; and better still as the difference to
the object of the round before, if the device has it: the bits of new and old are subtracted as integers,
folded (0, -1, 1, -2, … become 0, 1, 2, 3, …) so that small changes of either sign have high bytes of zero,
and sorted in the same way. Zstandard does the rest, at level 1: the slower ones save 1 % more.

    packed = pack(new)                              # or pack(new, name_of_old, old)
    new = unpack(packed, name, {name_of_old: old}.get)

====================  ==================================================================
bytes                 packed
====================  ==================================================================
0-3                   ``LPD1``
4-7                   bytes of the object, little-endian
8-39                  SHA-256 of the object that this is the difference to, or zeros
40-                   one zstd frame, which says the same number of bytes
====================  ==================================================================

Nothing is believed: sizes are held against a bound before any memory is taken, and what comes out against
the name under which it was asked for.
"""

import hashlib
import struct
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lepton_fl.wire.messages import malformed

FORM: Final = "LPD1"  # how the two sides name this form to each other
ACCEPT: Final = "lepton-accept"  # header of a request: the form that the device can unpack
HELD: Final = "lepton-held"  # the same: names of objects that it has, newest first, between commas
MAX_HELD: Final = 16  # of them
FORM_OF: Final = "lepton-form"  # header of an answer: the form that it has
MOST: Final = 8 * 2**20  # bytes of an object; those of arrays have 5 MiB
LEAST: Final = 1024  # bytes of an object that is worth the trouble
_HEAD: Final = struct.Struct("<4sI32s")
_LEVEL: Final = 1
_NONE: Final = bytes(32)
Bytes = bytes | bytearray | memoryview
Raw = NDArray[np.uint8]


def pack(data: Bytes, base_name: str = "", base: Bytes = b"") -> bytes:
    """An object, or its difference to another one of the same length.

    Args:
        data: of the object, at most ``MOST`` bytes.
        base_name: SHA-256 of the other one; empty = there is none.
        base: its bytes.

    Raises:
        ValueError: it is too long, or the other one is of another length.
    """
    raw = np.frombuffer(data, np.uint8)
    if len(raw) > MOST or (base_name and len(base) != len(raw)):
        raise ValueError(f"Expected at most {MOST} bytes, and a base of the same length, got {len(raw)}.")
    plain = _sorted(raw, np.frombuffer(base, np.uint8) if base_name else None)
    head = _HEAD.pack(FORM.encode(), len(raw), bytes.fromhex(base_name) if base_name else _NONE)
    frame: bytes = _zstd().ZstdCompressor(level=_LEVEL, write_content_size=True).compress(plain.data)
    return head + frame


def unpack(packed: bytes, name: str, held: Callable[[str], bytes | None]) -> bytes:
    """Undo ``pack``, and verify what comes out.

    Args:
        packed: as it came.
        name: SHA-256 of the object, 64 hexadecimal digits.
        held: gives an object that this device has, by its SHA-256; None = it has not.

    Raises:
        UpdateRejected: MALFORMED: it is no packed object, would take more than ``MOST`` bytes, is the
            difference to what this device does not have, or is not the object of that name.
    """
    if len(packed) < _HEAD.size:
        raise malformed(f"a packed object has {len(packed)} bytes")
    magic, size, base_name = _HEAD.unpack_from(packed)
    if magic != FORM.encode():
        raise malformed("a packed object is of another form")
    if size > MOST:
        raise malformed(f"a packed object says that it has {size} bytes, at most {MOST} may be")
    base = None
    if base_name != _NONE:
        base = held(base_name.hex())
        if base is None or len(base) != size:
            raise malformed("a packed object is the difference to one that this device does not have")
    found = _restored(_decompressed(packed[_HEAD.size :], size), base)
    if hashlib.sha256(found).hexdigest() != name:
        raise malformed("a packed object is not the one that was asked for")
    return found


def _decompressed(frame: bytes, size: int) -> Raw:
    zstd = _zstd()
    try:
        # The library takes as much memory as the frame says, so that is read first.
        claimed = zstd.get_frame_parameters(frame).content_size
        if claimed != size:
            raise malformed(f"a packed object of {size} bytes says that it unpacks to {claimed}")
        plain = zstd.ZstdDecompressor(max_window_size=2 * MOST).decompress(
            frame, max_output_size=size, allow_extra_data=False
        )
    except zstd.ZstdError as error:
        raise malformed(f"a packed object does not decompress: {error}") from error
    if len(plain) != size:
        raise malformed(f"a packed object of {size} bytes unpacks to {len(plain)}")
    return np.frombuffer(plain, np.uint8)


def _sorted(raw: Raw, base: Raw | None) -> Raw:
    """Bytes in front of the last whole number of words as they are, then the words' bytes by significance."""
    odd, words = _split(raw)
    if base is not None:
        before, old = _split(base)
        change = (words - old).view(np.int32)
        odd, words = odd - before, ((change << 1) ^ (change >> 31)).view(np.uint32)
    return np.concatenate([odd, words.view(np.uint8).reshape(-1, 4).T.reshape(-1)])


def _restored(plain: Raw, base: Raw | bytes | None) -> bytes:
    odd = plain[: len(plain) % 4]
    words = np.ascontiguousarray(plain[len(odd) :].reshape(4, -1).T).reshape(-1).view("<u4")
    if base is not None:
        before, old = _split(np.frombuffer(base, np.uint8))
        odd = odd + before
        words = old + ((words >> 1) ^ (np.uint32(0) - (words & np.uint32(1))))
    return odd.tobytes() + words.astype("<u4", copy=False).tobytes()


def _split(raw: Raw) -> tuple[Raw, NDArray[np.uint32]]:
    """The bytes before the last whole number of words, and the words: an array's data end its object."""
    odd = len(raw) % 4
    return raw[:odd], np.frombuffer(raw[odd:].tobytes(), "<u4")


def _zstd() -> Any:  # noqa: ANN401 - a module
    import zstandard  # 10 MB that a device which waits does without

    return zstandard
