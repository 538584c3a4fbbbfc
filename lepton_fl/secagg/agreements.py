"""The pair masks of all dropped devices at once, on every core.

At 1,000 devices of which 300 are lost, unmasking takes 210,000 key agreements of some 40 microseconds each.
The library that computes them keeps the interpreter to itself meanwhile, so threads do not help: helper
processes do. They are told nothing that the coordinator does not know (recovered one-time keys), over pipes,
never by pickle, and each is a few results ahead at most, whatever the cohort. A helper that fails is no
loss: what it owes is computed here. The results, and their order, are the same however many help.

    work = Agreements(roster, members, dropped)
    for position, masks in work.results(workers=4): ...     # masks: (seed, coin) for every member
"""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Self

from lepton_fl.secagg.codec import Reader, Writer
from lepton_fl.secagg.field import SECRET_BYTES
from lepton_fl.secagg.keys import KEY_BYTES, mask_key, pair_mask

log = logging.getLogger(__name__)

WORTH_HELP = 50_000  # agreements, about two seconds; a helper takes half a second to start
_COIN_BYTES = 8
_PAIR_BYTES = KEY_BYTES + _COIN_BYTES

Pair = tuple[bytes, int]  # a mask's seed, and its coin


def available_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Agreements:
    """What is to be computed: every dropped device with every member of the survivor set.

    Attributes:
        roster: The roster's digest.
        members: Position and public mask key of each survivor.
        dropped: Position and recovered mask secret of each dropped device.
    """

    roster: bytes
    members: Sequence[tuple[int, bytes]]
    dropped: Sequence[tuple[int, bytes]]

    def results(self, workers: int) -> Iterator[tuple[int, list[Pair]]]:
        """For each dropped device, in order, its masks with the members, in order.

        Args:
            workers: Processes that may help; they do where it is worth their start.
        """
        workers = min(workers, len(self.dropped))
        if workers < 2 or len(self.dropped) * len(self.members) < WORTH_HELP:
            for position, secret in self.dropped:
                yield position, self._agree(position, secret)
            return
        helpers = [_Helper(self._part(self.dropped[i::workers])) for i in range(workers)]
        size = _PAIR_BYTES * len(self.members)
        try:
            for i, (position, secret) in enumerate(self.dropped):
                told = helpers[i % workers].read(size)
                yield position, _pairs(told) if told else self._agree(position, secret)
        finally:
            for helper in helpers:
                helper.close()

    def _part(self, dropped: Sequence[tuple[int, bytes]]) -> bytes:
        return Agreements(self.roster, self.members, dropped).encode()

    def _agree(self, position: int, secret: bytes) -> list[Pair]:
        key = mask_key(secret)
        return [pair_mask(key, theirs, self.roster, position, member) for member, theirs in self.members]

    def encode(self) -> bytes:
        """For a helper."""
        writer = Writer().raw(self.roster).u16(len(self.members)).u16(len(self.dropped))
        for position, key in (*self.members, *self.dropped):
            writer.u16(position).raw(key)
        return bytes(writer)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read back."""
        reader = Reader(data)
        roster, members, dropped = reader.raw(32), reader.u16(), reader.u16()
        read = (
            [(reader.u16(), reader.raw(KEY_BYTES)) for _ in range(members)],
            [(reader.u16(), reader.raw(SECRET_BYTES)) for _ in range(dropped)],
        )
        reader.finish()
        return cls(roster, *read)

    def help(self, out: IO[bytes]) -> None:
        """Compute all of it and write it down: what a helper process does."""
        for position, secret in self.dropped:
            pairs = self._agree(position, secret)
            out.write(b"".join(seed + coin.to_bytes(_COIN_BYTES, "big") for seed, coin in pairs))
            out.flush()


def _pairs(told: bytes) -> list[Pair]:
    starts = range(0, len(told), _PAIR_BYTES)
    return [
        (told[i : i + KEY_BYTES], int.from_bytes(told[i + KEY_BYTES : i + _PAIR_BYTES], "big"))
        for i in starts
    ]


class _Helper:
    """A process that computes a part; its pipe holds it back when nobody reads."""

    def __init__(self, work: bytes) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(  # noqa: S603 - this very program; -P: nothing of the folder we are in
                [sys.executable, "-P", "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert self._process.stdin is not None  # a pipe
            with self._process.stdin as given:
                given.write(work)  # it reads all of it before it writes
        except OSError as error:
            log.warning("A helper for unmasking did not start: %s", error)
            self.close()

    def read(self, size: int) -> bytes:
        """The next result; empty if there is none."""
        if self._process is None or self._process.stdout is None:
            return b""
        told = self._process.stdout.read(size)
        if len(told) == size:
            return told
        log.warning("A helper for unmasking ended early; its part is computed without it.")
        self.close()
        return b""

    def close(self) -> None:
        """End it."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            if process.stdout is not None:
                process.stdout.close()
            process.wait()


if __name__ == "__main__":
    Agreements.decode(sys.stdin.buffer.read()).help(sys.stdout.buffer)
