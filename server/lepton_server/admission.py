"""Who may call just now: bounds that hold before a byte of a request is read.

    pace = Pace(rate=10, burst=100)
    wait_s = pace.take("device-7")          # 0 = go on; else come again after so many seconds
    door = Door(most=256, per_caller=16)
    if door.enter("device-7"): ...; door.leave("device-7")

Neither is locked: each belongs to one event loop.
"""

import time
from collections import Counter
from collections.abc import Callable

ROUNDING_S = 1e-6  # of differences of large clock readings
MAX_CALLERS = 10_000  # remembered before those who have been quiet are forgotten


class Pace:
    """So many calls a second for each caller, and some at once: ITU-T I.371's generic cell rate algorithm.

    A caller costs one number, as long as it has called more often than it may in the long run.
    """

    def __init__(self, rate: float, burst: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Nobody has called yet.

        Args:
            rate: Calls a second, in the long run.
            burst: Calls that may come at once after a rest.
            clock: Seconds.
        """
        self._gap, self._slack, self._clock = 1 / rate, burst / rate, clock
        self._due: dict[str, float] = {}  # when the caller would be within its rate again

    def take(self, caller: str) -> float:
        """Count a call; returns the seconds to wait if it comes too soon, and is not counted."""
        now = self._clock()
        due = max(self._due.get(caller, now), now) + self._gap
        if (wait := due - now - self._slack) > ROUNDING_S:
            return wait
        if len(self._due) >= MAX_CALLERS and caller not in self._due:
            self._due = {c: d for c, d in self._due.items() if d > now}
        self._due[caller] = due
        return 0.0


class Door:
    """Bounds the calls in hand, of all callers together and of each."""

    def __init__(self, most: int, per_caller: int) -> None:
        self._most, self._per_caller = most, per_caller
        self._inside: Counter[str] = Counter()
        self._counted = 0

    def enter(self, caller: str, *, counted: bool = True) -> bool:
        """Let a call in, or not; ``counted``: it is one of those that share the bound of all callers."""
        if self._inside[caller] >= self._per_caller or (counted and self._counted >= self._most):
            return False
        self._inside[caller] += 1
        self._counted += counted
        return True

    def leave(self, caller: str, *, counted: bool = True) -> None:
        """A call that was let in has ended."""
        self._counted -= counted
        self._inside[caller] -= 1
        if not self._inside[caller]:
            del self._inside[caller]
