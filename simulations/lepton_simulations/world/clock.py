"""Virtual time: it costs nothing and never runs backwards.

clock = VirtualClock()
campaign = Campaign(..., clock=clock)
clock.advance_to(clock.now_s + 12.5)
"""

from math import isfinite


class VirtualClock:
    """Seconds since the start of the simulation; calling it returns them."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = _checked(now_s)

    @property
    def now_s(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def __call__(self) -> float:
        """Virtual seconds: a campaign's clock."""
        return self._now_s

    def advance_to(self, moment_s: float) -> None:
        """Jump; a moment that is past changes nothing.

        Raises:
            ValueError: the moment is not finite, or before 0.
        """
        self._now_s = max(self._now_s, _checked(moment_s))

    def advance(self, seconds: float) -> None:
        """Jump by so much."""
        self.advance_to(self._now_s + max(0.0, seconds))


def _checked(moment_s: float) -> float:
    if not (isfinite(moment_s) and moment_s >= 0):
        raise ValueError(f"Expected a moment of [0, infinity), got {moment_s}.")
    return float(moment_s)
