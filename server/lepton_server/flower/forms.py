"""Smaller forms of what many devices fetch: packed, and packed as the difference to the round before.

Made once when a message is posted, handed out as often as devices ask; see ``lepton_fl.wire.downlink``. What
is not here, a device gets as it is.

Memory: for each run the arrays that were posted last (which the run holds while they are the newest, and lets
go a round later), and the packed forms, all together at most ``BUDGET`` bytes; the oldest go first.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from lepton_fl.wire.downlink import LEAST, MOST, pack

BUDGET: Final = 128 * 2**20  # bytes
WORTH_IT: Final = 0.97  # a form that is not smaller by so much is not made

Chunks = Mapping[tuple[str, int], tuple[str, Any]]  # (array, number) -> object id and frame


@dataclass
class _Last:
    """What a run has sent last."""

    chunks: Chunks
    ids: Mapping[tuple[str, int], str]
    size: int  # bytes


@dataclass
class _Packed:
    """The forms of one object."""

    run: str
    by_base: dict[str, bytes] = field(default_factory=dict)  # id of the base, or "" -> packed

    @property
    def size(self) -> int:
        return sum(map(len, self.by_base.values()))


class Forms:
    """The forms of the objects of open messages; any thread may call."""

    def __init__(self, budget: int = BUDGET) -> None:
        """Nothing is there yet.

        Args:
            budget: bytes that forms, and what they are differences to, may take together.
        """
        self._budget = budget
        self._lock = threading.Lock()
        self._last: dict[str, _Last] = {}  # by run
        self._packed: OrderedDict[str, _Packed] = OrderedDict()  # by object id, oldest first

    def make(self, run: str, chunks: Chunks) -> None:
        """Pack what a run is about to send; what is packed already stays.

        Arrays that would not find room are left as they are.
        """
        ids = {place: name for place, (name, _) in chunks.items()}
        size = sum(len(frame) for _, frame in chunks.values())
        with self._lock:
            before = self._last.get(run)
        if 3 * size > self._budget or (before and before.ids == ids):
            return
        for place, (name, frame) in chunks.items():
            if LEAST <= len(frame) <= MOST and name not in self._packed:
                base = before.chunks.get(place) if before else None
                self._add(name, _forms(run, frame, base))
        with self._lock:
            self._last[run] = _Last(chunks, ids, size)
            self._make_room()

    def smallest(self, object_id: str, held: Collection[str]) -> bytes | None:
        """The smallest form of an object for a device that has these others; None = as it is."""
        with self._lock:
            packed = self._packed.get(object_id)
            forms = packed.by_base if packed else {}
            fitting = [form for base, form in forms.items() if not base or base in held]
            return min(fitting, key=len, default=None)

    def forget(self, run: str) -> None:
        """A run is over."""
        with self._lock:
            self._last.pop(run, None)
            for name in [name for name, packed in self._packed.items() if packed.run == run]:
                del self._packed[name]

    def _add(self, name: str, packed: _Packed) -> None:
        with self._lock:
            self._packed[name] = packed
            self._make_room()

    def _make_room(self) -> None:
        taken = sum(last.size for last in self._last.values()) + sum(p.size for p in self._packed.values())
        while taken > self._budget and self._packed:
            _, dropped = self._packed.popitem(last=False)
            taken -= dropped.size


def _forms(run: str, frame: Any, base: tuple[str, Any] | None) -> _Packed:  # noqa: ANN401 - bytes or a Rope
    packed, data = _Packed(run), bytes(frame)
    whole = pack(data)
    if len(whole) <= WORTH_IT * len(data):
        packed.by_base[""] = whole
    if base is not None and len(base[1]) == len(data):
        change = pack(data, base[0], bytes(base[1]))
        if len(change) <= WORTH_IT * min(len(whole), len(data)):
            packed.by_base[base[0]] = change
    return packed
