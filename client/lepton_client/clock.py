"""Time as the agent sees it: intervals that count sleep, and a wall clock that nobody trusts.

Deadlines and back-off use the boot clock, which runs on while a laptop sleeps and never jumps. The wall
clock is used for time windows, certificates and people only, and ``Watch`` notices when it moved.
"""

import time
from typing import Final, Protocol

JUMP: Final = 5.0  # seconds by which the two clocks may drift apart between two looks
MAX_SKEW: Final = 60.0  # seconds off the coordinator's clock before it is worth a word


class Clock(Protocol):
    """What the agent asks of time."""

    def now(self) -> float:
        """Seconds since boot, sleep included; never goes back."""
        ...

    def wall(self) -> float:
        """UTC seconds as this machine believes."""
        ...


class SystemClock:
    """The operating system's clocks."""

    def now(self) -> float:
        """Seconds since boot, sleep included."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall(self) -> float:
        """UTC seconds."""
        return time.time()


class Watch:
    """Notices a wall clock that jumps, or that is not the coordinator's."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset = clock.wall() - clock.now()
        self.skew = 0.0  # seconds that this machine is ahead of the coordinator, as last heard
        self._server_boot: float | None = None  # UTC seconds of our boot by the coordinator's clock

    def jumped(self) -> float:
        """Seconds by which the wall clock was moved since the last call; 0 when it was not."""
        offset = self._clock.wall() - self._clock.now()
        moved, self._offset = offset - self._offset, offset
        return moved if abs(moved) > JUMP else 0.0

    def heard(self, server_time: float) -> str:
        """Compare with the coordinator's clock; returns what to tell the owner when that changed, else ''."""
        before, self.skew = self.skew, self._clock.wall() - server_time
        self._server_boot = server_time - self._clock.now()
        wrong = abs(self.skew) > MAX_SKEW
        if wrong == (abs(before) > MAX_SKEW):
            return ""
        if not wrong:
            return "This machine's clock agrees with the coordinator's again."
        side = "ahead of" if self.skew > 0 else "behind"
        return f"This machine's clock is {abs(self.skew):.0f} s {side} the coordinator's; set it right."

    def server_now(self) -> float:
        """UTC seconds by the coordinator's clock, by which certificates are judged.

        Once it was heard the boot clock carries it on, so that nothing that moves the wall clock counts.
        """
        return self._clock.wall() if self._server_boot is None else self._server_boot + self._clock.now()
