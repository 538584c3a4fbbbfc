"""Collect one attempt at one round over an exchange.

Each answer is decoded, held against the plan, added and forgotten. A refused answer is named, the device is
told, and the round goes on. The attempt closes when the wanted number of reports is in, or at the deadline.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lepton_fl.crashpoints import reached
from lepton_fl.errors import Cause, Rejection, RunError, UpdateRejected
from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.accumulator import Accumulator, Aggregator, UpdateBatch
from lepton_fl.rounds.exchange import AddedUp, Answer, Exchange
from lepton_fl.rounds.quantised import FewBits, QuantisedSum
from lepton_fl.rounds.robust import RobustAggregator
from lepton_fl.tasks.metrics import Metrics, Sums, TrainingLoss
from lepton_fl.vector import Vector
from lepton_fl.wire.messages import EvaluateReply, Request, TrainReply
from lepton_fl.wire.records import Records

ACCEPTED = "accepted"
SURPLUS = "surplus"  # asked, but the round closed with enough others before it answered
Clock = Callable[[], float]  # seconds since some moment
Finish = Callable[[Aggregator], NDArray[np.float64]]  # makes one update of those of a round
TRAINING = TrainingLoss()  # what every training reports, whatever the task


class Participation(NamedTuple):
    """What became of one device of the cohort."""

    device_id: str
    outcome: str  # accepted, surplus, or a Rejection
    detail: str = ""
    num_examples: int = 0
    seconds: float = 0.0  # the device's own
    num_bytes: int = 0  # of its answer
    arrived_s: float | None = None  # since the attempt began, by the coordinator's clock; None: nothing came
    cause: Cause | None = None  # where more is known than the outcome says


@dataclass
class Collected:
    """What one attempt brought; ``sums`` are the devices' added counts."""

    plan: RoundPlan
    participation: dict[str, Participation] = field(default_factory=dict)
    sums: Sums = field(default_factory=dict)
    reports: int = 0
    bytes_up: int = 0
    burnt: bool = False  # a survivor set went out for signing, now or before: nobody signs another one
    elapsed_s: Callable[[], float] = lambda: 0.0  # since the attempt began
    few_bits: FewBits | None = None  # of a sum of quantised updates
    down: Mapping[str, int] | None = None  # bytes that were sent to each device, where it is known

    def bytes_to(self, device_id: str) -> int:
        """Bytes that a device was sent: those that are known, else the model and the auxiliary vector."""
        return 4 * self.plan.down_size if self.down is None else self.down.get(device_id, 0)

    @property
    def bytes_down(self) -> int:
        """Bytes that were sent to the cohort."""
        return sum(map(self.bytes_to, self.plan.cohort))

    def in_few_bits(self, mean: NDArray[np.float64], found: FewBits) -> NDArray[np.float64] | None:
        """Note what a sum tells of itself; its mean, unless it has left its ring."""
        self.few_bits = found
        return None if found.wrapped else mean

    @property
    def forgotten(self) -> bool:
        """Whether devices have signed in this round, which the coordinator has lost: it was restored."""
        return any(e.outcome == Rejection.SIGNED_BEFORE for e in self.participation.values())

    @property
    def wrapped(self) -> bool:
        """Whether the sum has left its ring, and was thrown away."""
        return self.few_bits is not None and self.few_bits.wrapped

    def figures(self) -> dict[str, float]:
        """What the sum tells of itself, as the round reports it."""
        return self.few_bits.figures() if self.few_bits else {}

    @cached_property
    def asked(self) -> frozenset[str]:
        """The cohort."""
        return frozenset(self.plan.cohort)

    @property
    def enough(self) -> bool:
        """Whether the attempt counts."""
        return self.reports >= self.plan.min_reports

    @property
    def accepted(self) -> list[str]:
        """Devices whose updates have come."""
        return [d for d, entry in self.participation.items() if entry.outcome == ACCEPTED]

    def summary(self) -> str:
        """As in '3 of 5 reports: 1 offline, 1 non-finite'."""
        others: dict[str, int] = {}
        for entry in self.participation.values():
            if entry.outcome != ACCEPTED:
                others[entry.outcome] = others.get(entry.outcome, 0) + 1
        head = f"{self.reports} of {len(self.plan.cohort)} reports"
        rule = "secure aggregation" if self.plan.secure else self.plan.aggregation.name
        if not self.enough and (self.plan.secure or not self.plan.aggregation.is_sum):
            head += f" ({rule} needs {self.plan.min_reports})"
        if self.few_bits is not None and self.wrapped:
            head += f" (their sum has left its ring of {self.few_bits.bits} bits)"
        causes = ", ".join(f"{n} {name.replace('-', ' ')}" for name, n in sorted(others.items()))
        return f"{head}: {causes}" if causes else head


Brought = tuple[Collected, NDArray[np.float64] | None]  # what happened, and the mean update if there is one


def collect_training(
    plan: RoundPlan,
    model: Vector,
    exchange: Exchange,
    auxiliary: Vector | None = None,
    clock: Clock = time.monotonic,
    finish: Finish | None = None,
    closed: Callable[["Collected"], None] = lambda collected: None,
) -> Brought:
    """One attempt at a training round.

    Args:
        plan: of the attempt.
        model: (P,) the global one.
        exchange: carries the request and the answers.
        auxiliary: (A,) what else devices need; None where ``plan.auxiliary`` is 0.
        clock: says when each answer came.
        finish: makes the update of what was aggregated, if enough have answered; None = as it is.
        closed: told then whose updates these are, before anything is made of them.

    Returns:
        What happened, and the (P + A,) mean update, or None if fewer than ``plan.min_reports`` came.
    """
    aggregator, counts = make_aggregator(plan), _counts(plan)

    def take(answer: Answer) -> TrainReply:
        reply = TrainReply.read(_records(answer), plan)
        TRAINING.validate(reply.sums)
        count = counts(answer.device_id, reply.num_examples)
        aggregator.add(UpdateBatch(reply.update[None, :], np.array([count], np.int64)))
        return reply

    def take_many(part: AddedUp) -> None:
        TRAINING.validate(part.sums)
        aggregator.merge(part.subtotal)

    request = Request.of(plan, model, auxiliary)
    collected = collect(plan, request, exchange, TRAINING, take, take_many, clock)
    if not collected.enough:
        return collected, None
    closed(collected)
    if isinstance(aggregator, QuantisedSum):
        return collected, collected.in_few_bits(*aggregator.decode())
    return collected, (finish(aggregator) if finish else aggregator.finalize())


def _counts(plan: RoundPlan) -> Callable[[str, int], int]:
    """The example count that stands for an update's weight: with corrections, their product."""
    if not plan.corrections:
        return lambda device_id, num_examples: num_examples
    factors = dict(zip(plan.cohort, plan.corrections, strict=True))

    def corrected(device_id: str, num_examples: int) -> int:
        weight = 1 if plan.weighting == "equal" else min(num_examples, plan.max_weight)
        return weight * factors[device_id]

    return corrected


def make_aggregator(plan: RoundPlan) -> Aggregator:
    """What makes one update of those of a round.

    Raises:
        RunError: a robust rule would need more memory than this machine can spare.
    """
    if plan.quantisation is not None:
        return QuantisedSum(plan)
    if plan.corrections:
        most = plan.max_weight * max(plan.corrections)
        plan = plan.model_copy(update={"weighting": "examples", "max_weight": most})
    return Accumulator(plan) if plan.aggregation.is_sum else RobustAggregator(plan)


def collect_evaluation(
    plan: RoundPlan, model: Vector, exchange: Exchange, metrics: Metrics, clock: Clock = time.monotonic
) -> Collected:
    """One federated evaluation: the devices' counts are added, nothing else leaves them."""

    def take(answer: Answer) -> EvaluateReply:
        reply = EvaluateReply.read(_records(answer), plan)
        metrics.validate(reply.sums)
        return reply

    return collect(plan, Request.of(plan, model), exchange, metrics, take, _refuse_sum, clock)


def _refuse_sum(part: AddedUp) -> None:
    raise RunError("An exchange added up evaluations; only training answers can be.")


def _records(answer: Answer) -> Records:
    if isinstance(answer.records, UpdateRejected):
        raise answer.records
    return answer.records


Take = Callable[[Answer], TrainReply | EvaluateReply]


def collect(
    plan: RoundPlan,
    request: Request,
    exchange: Exchange,
    metrics: Metrics,
    take: Take,
    take_many: Callable[[AddedUp], None],
    clock: Clock,
    full: Callable[[Collected], bool] = lambda collected: collected.reports >= collected.plan.wanted_reports,
) -> Collected:
    """Take the answers of one attempt, whatever is made of them.

    Args:
        plan: of the attempt.
        request: what the devices are asked.
        exchange: carries it.
        metrics: how the devices' counts are added.
        take: reads and counts one answer, or raises why it does not count.
        take_many: counts answers that were added up.
        clock: says when each answer came.
        full: whether no more answers are wanted.
    """
    began = clock()
    collected = Collected(plan, elapsed_s=lambda: max(0.0, clock() - began))
    with closing(exchange.ask(plan, request)) as answers:
        for answer in answers:
            if isinstance(answer, AddedUp):
                _handle_many(collected, answer, metrics, take_many)
            else:
                _handle(collected, answer, exchange, metrics, take)
            del answer  # it may be large: not while waiting for the next one
            if full(collected):
                break
    closed_by = SURPLUS if collected.reports >= plan.wanted_reports else Rejection.OFFLINE.value
    heard = collected.participation
    collected.participation = {d: heard.get(d) or Participation(d, closed_by) for d in plan.cohort}
    return collected


def _handle_many(
    collected: Collected, part: AddedUp, metrics: Metrics, take_many: Callable[[AddedUp], None]
) -> None:
    """A sum cannot be taken apart, so what is wrong with a part of it is a defect of the exchange."""
    if len(part.reports) != part.subtotal.reports:
        raise RunError(f"{len(part.reports)} reports came with a sum of {part.subtotal.reports} updates.")
    heard, asked = collected.participation, collected.asked
    for report in part.reports:
        device_id, examples, seconds, num_bytes, arrived_s = report
        if device_id not in asked or device_id in heard:
            _check_sender(collected, device_id)
        heard[device_id] = Participation(device_id, ACCEPTED, "", examples, seconds, num_bytes, arrived_s)
        collected.bytes_up += num_bytes
    collected.sums = metrics.add(collected.sums, part.sums) if collected.sums else dict(part.sums)
    take_many(part)
    collected.reports += len(part.reports)


def _handle(
    collected: Collected,
    answer: Answer,
    exchange: Exchange,
    metrics: Metrics,
    take: Take,
) -> None:
    plan, device_id = collected.plan, answer.device_id
    collected.bytes_up += answer.num_bytes
    try:
        _check_sender(collected, device_id)
        reply = take(answer)
    except UpdateRejected as refusal:
        exchange.tell(plan, device_id, refusal)
        if refusal.reason not in (Rejection.DUPLICATE, Rejection.NOT_SELECTED):
            collected.participation[device_id] = Participation(
                device_id,
                refusal.reason.value,
                str(refusal),
                num_bytes=answer.num_bytes,
                arrived_s=collected.elapsed_s(),
                cause=refusal.cause,
            )
        return
    collected.reports += 1
    collected.sums = metrics.add(collected.sums, reply.sums) if collected.sums else dict(reply.sums)
    collected.participation[device_id] = Participation(
        device_id,
        ACCEPTED,
        num_examples=reply.num_examples,
        seconds=reply.seconds,
        num_bytes=answer.num_bytes,
        arrived_s=collected.elapsed_s(),
    )
    exchange.tell(plan, device_id, None)
    if plan.kind == "train":
        reached("update.added")


def _check_sender(collected: Collected, device_id: str) -> None:
    if device_id not in collected.asked:
        raise UpdateRejected(Rejection.NOT_SELECTED, f"Device {device_id} is not in the cohort.")
    if device_id in collected.participation:
        outcome = collected.participation[device_id].outcome
        raise UpdateRejected(Rejection.DUPLICATE, f"Device {device_id} has answered already: {outcome}.")
