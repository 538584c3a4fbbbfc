"""Fewer bytes for the same file: compressed, or as the difference to a file that the device has.

Measured (``docs/benchmarks.md``): tools for binaries find nothing in weights. What pays is to subtract number
from number, and that works on the bytes of a file when the graph and the scales are those of the earlier
release: the same tensors then stand at the same places. The difference is small, and small numbers compress.

==========  =================================================  ============
transform   a byte of the difference                           pays for
==========  =================================================  ============
``plain``   the byte itself                                    anything sparse
``sub8``    new - old, modulo 256                              int8
``sub4``    the same for each half of a byte, modulo 16        int4
``xor4``    new xor old, then all first bytes of four, all     float32
            second bytes, …
==========  =================================================  ============

The codec is LZMA of the standard library: within 1 % of zstd -19 on such differences, and nothing to install.
A pack needs no trust: what comes out is held against the signed hash of the file.
"""

import lzma
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import Fault, ReleaseRefused

Transform = Literal["plain", "sub8", "sub4", "xor4"]
DIFFERENCES: Final[tuple[Transform, ...]] = ("sub8", "sub4", "xor4")
_PRESET: Final = 6  # a dictionary of 8 MiB: what decoding costs in memory
_MEMORY: Final = 32 * 2**20  # bytes that decoding may take
_LOW, _HIGH = np.uint8(0x0F), np.uint8(0xF0)
Raw = NDArray[np.uint8]


def pack(data: bytes, base: bytes | None, transform: Transform) -> bytes:
    """Compress ``data``, or its difference to ``base``, which must be as long."""
    return lzma.compress(_difference(data, base, transform), preset=_PRESET)


def unpack(packed: bytes, base: bytes | None, transform: Transform, size: int) -> bytes:
    """Undo :func:`pack`.

    Args:
        packed: As fetched.
        base: The file that the device has.
        transform: As the manifest says.
        size: Bytes of the file; no more are ever made.

    Raises:
        ReleaseRefused: it does not decode to so many bytes.
    """
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MEMORY)
    try:
        plain = decoder.decompress(packed, max_length=size + 1)
    except (lzma.LZMAError, MemoryError) as error:
        raise ReleaseRefused(Fault.TAMPERED, f"A compressed file does not decode: {error}.") from error
    if len(plain) != size or not decoder.eof or decoder.unused_data:
        raise ReleaseRefused(Fault.TAMPERED, f"A compressed file does not decode to its {size} bytes.")
    if base is None:
        return plain
    if len(base) != size:
        raise ReleaseRefused(Fault.TAMPERED, f"A difference of {size} bytes is to a file of {len(base)}.")
    return _sum(np.frombuffer(plain, np.uint8), np.frombuffer(base, np.uint8), transform)


def _difference(data: bytes, base: bytes | None, transform: Transform) -> bytes:
    if base is None or transform == "plain":
        return data
    new, old = np.frombuffer(data, np.uint8), np.frombuffer(base, np.uint8)
    if transform == "sub8":
        change: Raw = new - old
    elif transform == "sub4":
        change = ((new & _HIGH) - (old & _HIGH)) | (((new & _LOW) - (old & _LOW)) & _LOW)
    else:
        change = _shuffle(new ^ old)
    return change.tobytes()


def _sum(plain: Raw, old: Raw, transform: Transform) -> bytes:
    if transform == "sub8":
        new: Raw = plain + old
    elif transform == "sub4":
        new = ((plain & _HIGH) + (old & _HIGH)) | (((plain & _LOW) + (old & _LOW)) & _LOW)
    else:
        new = _unshuffle(plain) ^ old
    return new.tobytes()


def _shuffle(raw: Raw) -> Raw:
    """All first bytes of four, then all second ones, …; what is left over stays at the end."""
    whole = len(raw) // 4 * 4
    return np.concatenate([raw[:whole].reshape(-1, 4).T.ravel(), raw[whole:]])


def _unshuffle(raw: Raw) -> Raw:
    whole = len(raw) // 4 * 4
    return np.concatenate([raw[:whole].reshape(4, -1).T.ravel(), raw[whole:]])
