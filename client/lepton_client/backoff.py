"""How long to wait after a failure: exponential with full jitter, so that a fleet does not return as one."""

import secrets
from collections.abc import Callable

_SYSTEM = secrets.SystemRandom()


class Backoff:
    """Waits drawn uniformly from [0, bound]; the bound doubles with each failure up to a maximum.

    Cited as "full jitter" in M. Brooker, "Exponential Backoff And Jitter" (2015). A tenth of the bound is
    the least wait, so that no draw near zero turns into a busy loop.
    """

    def __init__(
        self, minimum: float, maximum: float, draw: Callable[[float, float], float] = _SYSTEM.uniform
    ) -> None:
        self._minimum, self._maximum, self._draw = minimum, maximum, draw
        self._failures = 0

    def next(self) -> float:
        """Seconds to wait after one more failure."""
        bound = min(self._maximum, self._minimum * 2.0 ** min(self._failures, 60))
        self._failures += 1
        return max(bound / 10, self._draw(0.0, bound))

    def reset(self) -> None:
        """After a success."""
        self._failures = 0
