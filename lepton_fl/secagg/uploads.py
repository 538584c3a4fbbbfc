"""Masked vectors at the coordinator: chunks into a spool, verified whole, added one at a time.

Memory is one sum, whatever the number of devices. A vector waits in the spool (the caller's: files in
production, memory in a simulation) until its signed digest has come; only then is it added. Vectors stay in
the spool until the survivor set is certified, because a device may still have to be taken out of the sum.

    intake = Intake(context, spool)
    intake.chunk("d-abc", 0, data)              # as they come, in order
    intake.verify("d-abc", digest)              # the session does this,
    intake.add("d-abc")                         # and this
"""

import hashlib
from collections.abc import Collection, Iterator
from itertools import chain
from typing import Protocol

import numpy as np

from lepton_fl.errors import Rejection, StateCorrupt, UpdateRejected
from lepton_fl.packing import packed_size, unpack
from lepton_fl.secagg.codec import Reader, Writer
from lepton_fl.secagg.context import VERSION, RoundContext
from lepton_fl.secagg.encoding import Encoding
from lepton_fl.secagg.masks import Ring, byte_view, ring_type
from lepton_fl.wire.messages import malformed

BLOCK = 1 << 18  # bytes handled at a time
_HEAD = VERSION + b" sum\0"


class Spool(Protocol):
    """Keeps devices' bytes until they are added; in production on disk, outliving the process."""

    def append(self, device: str, data: bytes | memoryview) -> None:
        """Add to the end of a device's bytes, durably."""
        ...

    def size(self, device: str) -> int:
        """How many bytes are there."""
        ...

    def read(self, device: str) -> Iterator[bytes | memoryview]:
        """Its bytes in order, in pieces of any size."""
        ...

    def discard(self, device: str) -> None:
        """Forget its bytes; nothing happens if there are none."""
        ...


class MemorySpool:
    """A spool for simulations and tests."""

    def __init__(self) -> None:
        self._data: dict[str, list[bytes | memoryview]] = {}

    def append(self, device: str, data: bytes | memoryview) -> None:
        """See :class:`Spool`; keeps the buffer it is given."""
        self._data.setdefault(device, []).append(data)

    def size(self, device: str) -> int:
        """See :class:`Spool`."""
        return sum(len(part) for part in self._data.get(device, ()))

    def read(self, device: str) -> Iterator[bytes | memoryview]:
        """See :class:`Spool`."""
        yield from self._data.get(device, ())

    def discard(self, device: str) -> None:
        """See :class:`Spool`."""
        self._data.pop(device, None)


class Intake:
    """The streaming sum of one cohort's masked vectors."""

    def __init__(self, context: RoundContext, spool: Spool, checkpoint: bytes | memoryview = b"") -> None:
        """Begin, or go on from a checkpoint.

        Raises:
            StateCorrupt: the checkpoint is damaged or of another context.
        """
        self._context, self._spool = context, spool
        self._included: set[str] = set()
        self.total: Ring = np.zeros(context.length, ring_type(context.bits))
        if len(checkpoint):
            self._restore(memoryview(checkpoint))

    @property
    def included(self) -> frozenset[str]:
        """Whose vectors are in the sum."""
        return frozenset(self._included)

    def chunk(self, device: str, offset: int, data: bytes | memoryview) -> int:
        """Take the next piece of a device's vector; a piece that is there already is skipped.

        Returns:
            How many bytes are there now: where to go on after an interruption.

        Raises:
            UpdateRejected: WRONG_SHAPE, the vector would become too long; MALFORMED, a gap.
        """
        have, limit = self._spool.size(device), self._context.upload_bytes
        if offset < 0 or offset + len(data) > limit:
            raise UpdateRejected(
                Rejection.WRONG_SHAPE,
                f"Expected a vector of {limit} bytes, got {offset + len(data)} or more.",
            )
        if offset > have:
            raise malformed(f"a piece at byte {offset}, expected {have}")
        fresh = memoryview(data)[have - offset :]
        if len(fresh):
            self._spool.append(device, fresh)
        return have + len(fresh)

    def restart(self, device: str) -> None:
        """Forget an unfinished vector, so that the device can send it again; an added one stays."""
        if device not in self._included:
            self._spool.discard(device)

    def verify(self, device: str, digest: bytes) -> None:
        """Check that a whole vector is there and is what was signed.

        Raises:
            UpdateRejected: WRONG_SHAPE, it is not complete; MALFORMED, it is another one.
        """
        have = self._spool.size(device)
        if have != self._context.upload_bytes:
            raise UpdateRejected(
                Rejection.WRONG_SHAPE, f"The vector has {have} bytes, expected {self._context.upload_bytes}."
            )
        hashed = hashlib.sha256()
        for block in self._spool.read(device):
            hashed.update(block)
        if hashed.digest() != digest:
            raise malformed("the vector's SHA-256 is not the one that was signed")

    def add(self, device: str) -> None:
        """Add a verified vector; one that is in the sum already is not added again."""
        if device not in self._included:
            self._apply(device, np.add)
            self._included.add(device)

    def settle(self, members: Collection[str]) -> None:
        """Make the sum that of exactly these devices: take out who is not to be in it, add who is missing."""
        for device in sorted(self._included - set(members)):
            self._apply(device, np.subtract)
            self._included.discard(device)
        for device in sorted(set(members) - self._included):
            self.add(device)

    def discard(self, devices: Collection[str]) -> None:
        """Empty the spool, once the survivor set is certified."""
        for device in devices:
            self._spool.discard(device)

    def checkpoint(self) -> tuple[bytes, memoryview]:
        """The sum and whose vectors are in it: a head and a body, to be written one after the other."""
        body = byte_view(self.total)
        writer = Writer(_HEAD).raw(self._context.digest).u16(len(self._included))
        for device in sorted(self._included):
            writer.text(device)
        return bytes(writer.raw(hashlib.sha256(body).digest())), body

    def _restore(self, stored: memoryview) -> None:
        size = self.total.nbytes
        body = stored[max(0, len(stored) - size) :]
        reader = Reader(bytes(stored[: max(0, len(stored) - size)]))
        try:
            known = reader.raw(len(_HEAD)) == _HEAD and reader.raw(32) == self._context.digest
            included = {reader.text() for _ in range(reader.u16())} if known else set()
            good = known and reader.raw(32) == hashlib.sha256(body).digest()
            reader.finish()
        except UpdateRejected as error:
            raise StateCorrupt("The checkpoint of a masked sum does not decode.") from error
        if not good:
            raise StateCorrupt("The checkpoint of a masked sum is damaged, or of another round.")
        self._included = included
        self.total[:] = np.frombuffer(body, self.total.dtype)

    def _apply(self, device: str, operation: np.ufunc) -> None:
        start, context = 0, self._context
        for values in elements(self._spool.read(device), context.encoding):
            target = self.total[start : start + len(values)]
            operation(target, values, out=target)
            start += len(values)


def elements(pieces: Iterator[bytes | memoryview], encoding: Encoding) -> Iterator[Ring]:
    """A vector's elements out of its bytes on the wire, a bounded number at a time.

    Args:
        pieces: of any size.
        encoding: of the vector.
    """
    dtype, bits, left = ring_type(encoding.bits), encoding.bits, encoding.num_coordinates
    if bits < 8 * dtype.itemsize:
        head, pieces = _cut(pieces, packed_size(left, bits))
        for block in _blocks(head, bits):  # bytes of eight elements
            count = min(left, 8 * len(block) // bits)
            yield unpack(np.frombuffer(block, np.uint8), count, bits, 8 * dtype.itemsize)
            left -= count
    for block in _blocks(pieces, dtype.itemsize):
        yield np.frombuffer(block, dtype)


def _cut(
    pieces: Iterator[bytes | memoryview], size: int
) -> tuple[Iterator[bytes | memoryview], Iterator[bytes | memoryview]]:
    """The first bytes of a stream, and the others once those are read."""
    over: list[memoryview] = []

    def first() -> Iterator[memoryview]:
        need = size
        for piece in pieces:
            view = memoryview(piece)
            yield view[:need]
            if len(view) >= need:
                over.append(view[need:])
                return
            need -= len(view)

    return first(), chain(over, pieces)


def _blocks(pieces: Iterator[bytes | memoryview], item: int) -> Iterator[bytes | memoryview]:
    """Pieces of any size as pieces of whole items, of bounded size, mostly not copied; the rest is last."""
    rest, most = b"", max(item, BLOCK // item * item)
    for piece in pieces:
        view = memoryview(piece)
        if rest:
            need = item - len(rest)
            rest += bytes(view[:need])
            view = view[need:]
            if len(rest) < item:
                continue
            yield rest
            rest = b""
        whole = len(view) // item * item
        for start in range(0, whole, most):
            yield view[start : min(whole, start + most)]
        rest = bytes(view[whole:])
    if rest:
        yield rest
