"""Who could take part, who is drawn, and, if too few could, why.

drawn = draw(candidates, wanted=10, rng=SystemRandom())
print(Shortfall.of(candidates, needed=5))   # 3 of 10 eligible: 5 offline, 2 data contract
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

Standing = Literal[
    "eligible",
    "offline",
    "not-eligible",
    "data-contract",
    "task-missing",
    "wrong-version",
    "busy",
    "not-certified",  # a run with secure aggregation: the device has no certified signing key
    "resting",  # a private run: it would take part too soon again, or too often
    "quarantined",  # it failed too often in a row; until a while has passed, or it is readmitted
    "other-group",
    "revoked",
]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One registered device as seen before a round."""

    device_id: str
    standing: Standing
    reason: str = ""  # the device's own words, if it gave any


@dataclass(frozen=True)
class Shortfall:
    """Why there is no quorum."""

    eligible: int
    total: int
    needed: int
    causes: tuple[tuple[str, int], ...]  # standing and count, most frequent first

    @classmethod
    def of(cls, candidates: Iterable[Candidate], needed: int) -> "Shortfall":
        """Count the standings."""
        counts = Counter(c.standing for c in candidates)
        total, eligible = counts.total(), counts.pop("eligible", 0)
        return cls(eligible, total, needed, tuple((s, n) for s, n in counts.most_common()))

    def __str__(self) -> str:
        """As in '3 of 10 eligible (5 needed): 5 offline, 2 data contract'."""
        head = f"{self.eligible} of {self.total} eligible ({self.needed} needed)"
        causes = ", ".join(f"{n} {s.replace('-', ' ')}" for s, n in self.causes)
        return f"{head}: {causes}" if causes else head


def eligible(candidates: Iterable[Candidate]) -> list[str]:
    """Ids of the eligible devices, sorted so that a draw depends on the generator alone."""
    return sorted(c.device_id for c in candidates if c.standing == "eligible")


def draw(device_ids: Sequence[str], count: int, rng: Random) -> tuple[str, ...]:
    """A uniform sample without replacement of at most ``count`` devices.

    Production passes ``random.SystemRandom()``: nobody who sees earlier cohorts can predict the next.
    """
    return tuple(rng.sample(device_ids, min(count, len(device_ids))))
