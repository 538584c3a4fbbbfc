"""Faults of virtual devices, drawn from a seed: who drops out, and whose update is corrupt.

A fault depends on (seed, device, round, attempt) alone, so a simulation with faults is as reproducible as one
without, whatever the number of workers.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from math import nan

from lepton_fl.plan import RoundPlan
from lepton_fl.wire.records import Records


@dataclass(frozen=True)
class Faults:
    """How often virtual devices misbehave."""

    drop_out: float = 0.0  # probability per device and attempt: no answer comes
    corrupt: float = 0.0  # probability per device: every reply of it is damaged, each device in its own way
    seed: int = 0

    def drops(self, plan: RoundPlan, device_id: str) -> bool:
        """Whether the device stays silent in this attempt."""
        return self._uniform("drop", device_id, plan.kind, plan.round, plan.attempt) < self.drop_out

    def damage(self, device_id: str, reply: Records) -> Records:
        """The reply as it arrives: unchanged unless the device is corrupt."""
        if self._uniform("corrupt", device_id) >= self.corrupt:
            return reply
        return DAMAGES[int(self._uniform("kind", device_id) * len(DAMAGES))](reply)

    def _uniform(self, *about: object) -> float:
        """A number of [0, 1) that depends on the seed and what it is about."""
        text = "|".join(map(str, ("lepton-fl fault v1", self.seed, *about)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _non_finite(reply: Records) -> Records:
    return Records(reply.arrays, reply.config, {**reply.metrics, "seconds": nan})


def _cut_short(reply: Records) -> Records:
    if not reply.arrays:  # an evaluation has nothing else to cut
        return Records({}, reply.config, {})
    return Records({name: array[:-1] for name, array in reply.arrays.items()}, reply.config, reply.metrics)


def _replayed(reply: Records) -> Records:
    return Records(reply.arrays, {**reply.config, "nonce": "0" * 32}, reply.metrics)


def _other_version(reply: Records) -> Records:
    return Records(reply.arrays, {**reply.config, "task-version": "0-other"}, reply.metrics)


def _surplus_field(reply: Records) -> Records:
    return Records(reply.arrays, {**reply.config, "surprise": 1}, reply.metrics)


DAMAGES: tuple[Callable[[Records], Records], ...] = (
    _non_finite,
    _cut_short,
    _replayed,
    _other_version,
    _surplus_field,
)
