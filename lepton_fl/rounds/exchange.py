"""The seam between a round and what carries its messages.

Implementations: over Flower's grid (deployment, and any stock Flower server app), in memory (simulation),
and recorded (tests). Everything that happens in a round is written once, above it.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lepton_fl.errors import UpdateRejected
from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.accumulator import Subtotal
from lepton_fl.tasks.metrics import Sums
from lepton_fl.wire.messages import Request
from lepton_fl.wire.records import Records


@dataclass(frozen=True)
class Answer:
    """What came from one device: records, or the transport's reason why none will come."""

    device_id: str
    records: Records | UpdateRejected
    num_bytes: int = 0  # on the wire, as far as the transport knows


class Report(NamedTuple):
    """What one device reported; its update and its counts are parts of sums."""

    device_id: str
    num_examples: int
    seconds: float  # the device's own
    num_bytes: int
    arrived_s: float | None = None  # since the attempt began


@dataclass(frozen=True)
class AddedUp:
    """Answers of several devices to a training request, checked and added where they were made.

    Only where ``plan.adds_up``; a refused answer comes alone, as an ``Answer``.
    """

    reports: tuple[Report, ...]
    sums: Sums  # the devices' counts, added
    subtotal: Subtotal


class Exchange(Protocol):
    """Carries one plan's request to its cohort and the answers back."""

    def ask(self, plan: RoundPlan, request: Request) -> Generator[Answer | AddedUp, None, None]:
        """Send the request to ``plan.cohort`` and yield answers as they arrive.

        The generator ends when every device has answered or ``plan.deadline_s`` has passed. Closing it early
        withdraws what is open: those devices are told to leave, and a late answer is refused and counted.
        """
        ...

    def tell(self, plan: RoundPlan, device_id: str, refusal: UpdateRejected | None) -> None:
        """Tell a device what became of its answer: accepted (None) or refused."""
        ...
