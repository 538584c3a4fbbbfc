"""Whom a model was made of: the share of the fleet that contributed, and what to do about who did not.

    found = coverage(registered, counted, seconds, left_out)
    found.sentence(), found.flags(floor=0.5)
    factors = Correction(bound=8).factors(cohort, history)     # integers for a plan

A run that closes its rounds with the first reports, or at a deadline, is made of fast devices. That is said
(coverage), and can be corrected: an update of a device that answers with probability p counts 1/p times as
much, so that in expectation all devices count alike (Horvitz and Thompson 1952), bounded, because few
answers of rare devices would carry all the noise. p comes from public history only: who was asked, and whose
answer counted; never from data. Weights are integers, sixteenths, so the sum stays exact.
"""

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import median
from typing import Any

import numpy as np

from lepton_fl.errors import Rejection
from lepton_fl.plan import CORRECTION_SCALE

PRIOR = 2.0  # askings that a device's own history is worth less than: it is drawn towards the fleet's rate
TENTHS = 10
KEEP_TIMES = 32  # of each device
MOST_LEFT_OUT = 20  # devices named in a report


@dataclass(frozen=True)
class Share:
    """Some devices of all."""

    contributed: int = 0
    registered: int = 0

    @property
    def value(self) -> float:
        """Between 0 and 1; 1 of nobody."""
        return self.contributed / self.registered if self.registered else 1.0

    def __str__(self) -> str:
        """As in '7 of 10'."""
        return f"{self.contributed} of {self.registered}"


@dataclass(frozen=True)
class Coverage:
    """Who contributed to a run at least once.

    Attributes:
        fleet: Of all registered devices that the run could ask.
        groups: The same by label.
        deciles: The same by speed: the fastest tenth of those of whom a time is known first.
        unknown: Of those of whom no time is known.
        left_out: Cause -> how many did not contribute for it; ``not-asked`` where nobody asked them.
        named: Device -> cause, of the first ``MOST_LEFT_OUT`` of them.
    """

    fleet: Share
    groups: Mapping[str, Share] = field(default_factory=dict)
    deciles: tuple[Share, ...] = ()
    unknown: Share = Share()
    left_out: Mapping[str, int] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)

    def sentence(self) -> str:
        """As in '7 of 10 devices contributed; left out: 2 gone, 1 data contract'."""
        causes = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        words = ", ".join(f"{n} {cause.replace('-', ' ')}" for cause, n in causes)
        head = f"{self.fleet} devices contributed"
        return f"{head}; left out: {words}" if words else head

    def flags(self, floor: float) -> list[str]:
        """Every part of the fleet of which less than ``floor`` contributed; none where floor is 0."""
        parts = [("fleet", self.fleet)]
        parts += [(f"group {name}", share) for name, share in self.groups.items()]
        parts += [(f"speed decile {i}", share) for i, share in enumerate(self.deciles, 1)]
        return [
            f"coverage of {name}: {share}, below the floor of {floor:g}"
            for name, share in parts
            if share.value < floor
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""

        def pair(share: Share) -> list[int]:
            return [share.contributed, share.registered]

        return {
            "fleet": pair(self.fleet),
            "groups": {name: pair(share) for name, share in self.groups.items()},
            "deciles": [pair(share) for share in self.deciles],
            "unknown": pair(self.unknown),
            "left_out": dict(self.left_out),
            "named": dict(self.named),
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Coverage":
        """Read back what ``to_json`` wrote."""
        return cls(
            Share(*body["fleet"]),
            {name: Share(*pair) for name, pair in body["groups"].items()},
            tuple(Share(*pair) for pair in body["deciles"]),
            Share(*body["unknown"]),
            body["left_out"],
            body["named"],
        )


def coverage(
    registered: Mapping[str, Sequence[str]],
    counted: Collection[str],
    seconds: Mapping[str, float],
    left_out: Mapping[str, str],
) -> Coverage:
    """Report who contributed.

    Args:
        registered: Device -> its labels, of all that the run could ask.
        counted: Devices of which at least one update counted.
        seconds: Device -> its usual time for the work; inf = it never came in time.
        left_out: Device -> why it did not contribute, as last known.
    """
    contributed = set(counted) & set(registered)
    missing = sorted(set(registered) - contributed)
    causes = {device_id: left_out.get(device_id, "not-asked") for device_id in missing}
    groups: dict[str, list[str]] = {}
    for device_id, labels in registered.items():
        for label in labels:
            groups.setdefault(label, []).append(device_id)
    timed = sorted((seconds[d], d) for d in registered if d in seconds)
    tenths = np.array_split(np.arange(len(timed)), TENTHS) if timed else []
    return Coverage(
        fleet=Share(len(contributed), len(registered)),
        groups={name: _share(members, contributed) for name, members in sorted(groups.items())},
        deciles=tuple(_share([timed[i][1] for i in tenth], contributed) for tenth in tenths),
        unknown=_share([d for d in registered if d not in seconds], contributed),
        left_out=dict(sorted(Counter(causes.values()).items())),
        named=dict(list(causes.items())[:MOST_LEFT_OUT]),
    )


def _share(members: Sequence[str], contributed: Collection[str]) -> Share:
    return Share(sum(d in contributed for d in members), len(members))


@dataclass
class History:
    """Who was asked, whose answer counted, and how long it took: all of it public."""

    asked: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    times: dict[str, deque[float]] = field(default_factory=dict)  # the latest
    causes: dict[str, str] = field(default_factory=dict)  # of the last answer that did not count
    blamed: set[str] = field(default_factory=set)  # broke the protocol: not asked again

    def heard(self, device_id: str, counted: bool, seconds: float, cause: str = "") -> None:
        """Note what became of one asking; ``seconds`` is 0 where no time is known."""
        self.asked[device_id] += 1
        self.answered[device_id] += counted
        if seconds > 0:
            self.times.setdefault(device_id, deque(maxlen=KEEP_TIMES)).append(seconds)
        if not counted:
            self.causes[device_id] = cause or "failed"
        if cause == Rejection.BLAMED:
            self.blamed.add(device_id)

    def seconds(self) -> dict[str, float]:
        """Device -> the median of its times; inf of one that was asked and never came."""
        usual = {d: median(times) for d, times in self.times.items()}
        return {d: usual.get(d, inf) for d in self.asked}


@dataclass(frozen=True)
class Correction:
    """Inverse-probability weights, from 1 to ``bound``."""

    bound: int

    def factors(self, cohort: Iterable[str], history: History) -> tuple[int, ...]:
        """The weight of each device of a cohort, in sixteenths.

        A device's rate is drawn towards that of the whole fleet by ``PRIOR`` askings, so that one unlucky
        round does not make a device count eightfold.
        """
        asked, answered = history.asked.total(), history.answered.total()
        usual = (answered + 1) / (asked + 1)  # 1 before anybody was asked
        return tuple(self._factor(d, usual, history) for d in cohort)

    def _factor(self, device_id: str, usual: float, history: History) -> int:
        rate = (history.answered[device_id] + PRIOR * usual) / (history.asked[device_id] + PRIOR)
        most = CORRECTION_SCALE * self.bound
        return min(most, max(CORRECTION_SCALE, round(CORRECTION_SCALE / rate)))
