"""The mask engine: AES-256 keystream, added to ring elements at the speed of memory.

A seed stretches to any length in segments of 128 KiB. Segment s is the AES-256-CTR keystream from the initial
block ``LE96(s) || BE32(2)``. The same bytes are what AES-256-GCM makes of zeros under the nonce ``LE96(s)``
(NIST SP 800-38D starts its counter there), and OpenSSL has the faster code for GCM on processors with
vector AES. Which of the two is faster here is measured once, for a millisecond; the bytes are the same.

    add_masks(vector, [(seed, +1), (other, -1)])    # in place, modulo 2**16 or 2**32

Rings of other widths are added in these lanes, too: what is right modulo ``2**32`` is right modulo ``2**20``,
and the low 20 bits of a uniform mask are uniform.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from lepton_fl.packing import lane_bits

SEGMENT = 1 << 17  # bytes; all of one segment's buffers stay in the second-level cache
SEED_BYTES = 32
_TAG = 16  # bytes that GCM appends
_ZEROS = memoryview(bytes(SEGMENT))
_FIRST = (2).to_bytes(4, "big")  # GCM keeps counter 1 for its tag
_BATCH = 256  # seeds whose ciphers are alive at a time
_TRIAL_S = 0.001  # per engine

Ring = NDArray[np.unsignedinteger[Any]]  # little-endian uint16 or uint32
Kind = Literal["gcm", "ctr"]
Mask = tuple[bytes | bytearray, int]  # seed, +1 or -1
Fill = Callable[[int, memoryview, memoryview], None]  # segment number, zeros, room for them and 16 bytes


def ring_type(bits: int) -> np.dtype[Any]:
    """The numpy type of the lanes in which elements of 2 to 32 bits are added: 16 or 32 bits wide."""
    return np.dtype(f"<u{lane_bits(bits) // 8}")


def _gcm(seed: bytes | bytearray) -> Fill:
    cipher = AESGCM(seed)

    def fill(segment: int, zeros: memoryview, out: memoryview) -> None:
        cipher.encrypt_into(segment.to_bytes(12, "little"), zeros, None, out)

    return fill


def _ctr(seed: bytes | bytearray) -> Fill:
    encryptor = Cipher(algorithms.AES(seed), modes.CTR(bytes(12) + _FIRST)).encryptor()

    def fill(segment: int, zeros: memoryview, out: memoryview) -> None:
        encryptor.reset_nonce(segment.to_bytes(12, "little") + _FIRST)
        encryptor.update_into(zeros, out)

    return fill


_ENGINES: dict[Kind, Callable[[bytes | bytearray], Fill]] = {"gcm": _gcm, "ctr": _ctr}


def _buffer() -> NDArray[np.uint8]:
    """Room for a segment and a tag, on a cache line's border: adding is twice as fast from there."""
    raw = np.empty(SEGMENT + _TAG + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + SEGMENT + _TAG]


def byte_view(array: NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array, not copied."""
    return memoryview(array.view(np.uint8).data)


def measure(kind: Kind, seconds: float = _TRIAL_S, clock: Callable[[], float] = time.perf_counter) -> float:
    """Best seconds for one segment of keystream within ``seconds`` of trying."""
    fill, out = _ENGINES[kind](bytes(SEED_BYTES)), byte_view(_buffer())
    best, began = float("inf"), clock()
    while True:
        start = clock()
        fill(0, _ZEROS, out)
        end = clock()
        best = min(best, end - start)
        if end - began >= seconds:
            return best


@lru_cache(maxsize=1)
def fastest() -> Kind:
    """The faster engine of this machine, found by trying each for a millisecond; asked once per process."""
    return "gcm" if measure("gcm") <= measure("ctr") else "ctr"


def keystream(seed: bytes | bytearray, num_bytes: int, kind: Kind | None = None) -> bytes:
    """The first ``num_bytes`` of a seed's mask; for tests and small lengths."""
    out = bytearray()
    buffer = byte_view(_buffer())
    fill = _ENGINES[kind or fastest()](seed)
    while len(out) < num_bytes:
        fill(len(out) // SEGMENT, _ZEROS, buffer)
        out += buffer[: min(SEGMENT, num_bytes - len(out))]
    return bytes(out)


def add_masks(vector: Ring, masks: Sequence[Mask], kind: Kind | None = None, workers: int = 1) -> None:
    """Add or subtract masks in place, modulo the ring.

    Args:
        vector: (d,) contiguous, little-endian uint16 or uint32.
        masks: Seeds of 32 bytes, each with +1 (add) or -1 (subtract).
        kind: The engine; the faster one by default. Results are equal.
        workers: Threads; each takes a share of the segments (OpenSSL and numpy let go of the interpreter).

    Raises:
        ValueError: a wrong type, a seed of another length, or a sign other than +1 and -1.
    """
    if vector.ndim != 1 or vector.dtype.str not in ("<u2", "<u4") or not vector.flags.c_contiguous:
        raise ValueError(f"Expected a flat <u2 or <u4 vector, got {vector.dtype.str} {vector.shape}.")
    if any(len(seed) != SEED_BYTES or sign not in (1, -1) for seed, sign in masks):
        raise ValueError(f"Expected seeds of {SEED_BYTES} bytes with sign +1 or -1.")
    engine = _ENGINES[kind or fastest()]
    segments = -(-vector.nbytes // SEGMENT)
    workers = max(1, min(workers, segments))
    if workers == 1:
        _add(vector, masks, engine, range(segments))
        return
    ranges = [range(i * segments // workers, (i + 1) * segments // workers) for i in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(_add, vector, masks, engine, part) for part in ranges]:
            done.result()


def _add(
    vector: Ring, masks: Sequence[Mask], engine: Callable[[bytes | bytearray], Fill], segments: range
) -> None:
    """Segment by segment, so that one stays in cache while all masks are added to it."""
    buffer = _buffer()
    out, stream = byte_view(buffer), buffer[:SEGMENT].view(vector.dtype)
    for batch in _batches(masks):
        ciphers = [(engine(seed), np.add if sign > 0 else np.subtract) for seed, sign in batch]
        for segment in segments:
            target = vector[segment * len(stream) : (segment + 1) * len(stream)]
            part, zeros, room = stream[: len(target)], _ZEROS[: target.nbytes], out[: target.nbytes + _TAG]
            for fill, operation in ciphers:
                fill(segment, zeros, room)
                operation(target, part, out=target)
    buffer.fill(0)


def _batches(masks: Sequence[Mask]) -> Iterator[Sequence[Mask]]:
    for start in range(0, len(masks), _BATCH):
        yield masks[start : start + _BATCH]
