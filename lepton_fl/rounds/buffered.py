"""A training run without rounds that wait: buffered asynchronous aggregation, FedBuff.

Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation". So many devices as
``concurrency`` says are at work at any time; whoever is done is replaced at once by one that starts from the
newest model. As soon as ``size`` updates are in, the server makes one step,

    model <- model + server step of sum_i w_i * s_i * update_i / sum_i w_i,    s_i = (1 + staleness_i)^-a,

where an update's staleness counts the steps made since its device was started. Every step is a committed
round with the records, limits and evaluation of a synchronous run; s_i is a multiple of 1/256, so the sum is
exact, too, and does not depend on the order of arrival within a step.

    verdict = BufferedCampaign(spec, ..., dispatcher=dispatcher).run(state)

Rules. One plan per step is recorded before any of its devices is asked; it names those that may be started
while its model is the newest, in that order. A device works on one thing at a time, and trains from one model
at most once. The committed state names the devices at work; whoever restarts passes it, and they are started
again for what they were at work on, as of the moment at which they had begun.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError, Rejection, RunError, UpdateRejected
from lepton_fl.plan import STALENESS_SCALE, RoundPlan, RunSpec
from lepton_fl.rounds.accumulator import Accumulator, UpdateBatch
from lepton_fl.rounds.campaign import AtWork, Campaign, Committed, RunState, Verdict, advance
from lepton_fl.rounds.cohort import draw, eligible
from lepton_fl.rounds.collect import ACCEPTED, TRAINING, Collected, Participation
from lepton_fl.rounds.exchange import Answer
from lepton_fl.wire.messages import Request, TrainReply

LOOK_S = 1.0  # how often a waiting run asks whether it should stop


class Dispatcher(Protocol):
    """Carries requests to single devices, and answers back as they come."""

    def start(
        self, plan: RoundPlan, request: Request, device_id: str, started_s: float | None = None
    ) -> None:
        """Send one device of ``plan.cohort`` the plan's request; does not wait.

        Args:
            plan: what it trains for.
            request: of the plan.
            device_id: whom.
            started_s: after a restart, when it had begun, by the campaign's clock; None = it begins now.
        """
        ...

    def next(self, timeout_s: float) -> Answer | None:
        """The answer that came first of those not yet given; None = none within ``timeout_s``.

        Every device that was started is answered for exactly once: with its records, or with an
        ``UpdateRejected``, OFFLINE at the latest ``plan.deadline_s`` after it was started.
        """
        ...

    def tell(self, plan: RoundPlan, device_id: str, refusal: UpdateRejected | None) -> None:
        """Tell a device what became of its answer: accepted (None) or refused."""
        ...

    def withdraw(self) -> None:
        """Nobody waits any more for those that are at work; may be called again."""
        ...


def staleness_factor(staleness: int, exponent: float) -> int:
    """How much an update counts that is so many steps old, in units of 1/``STALENESS_SCALE``; at least 1."""
    factor: float = (1.0 + staleness) ** -exponent
    return max(1, round(STALENESS_SCALE * factor))


class Buffer:
    """The updates of one step, each weighted by its examples and its age."""

    def __init__(self, plan: RoundPlan, spec: RunSpec) -> None:
        """Start empty.

        Args:
            plan: of the step.
            spec: of the run.
        """
        self._spec = spec
        scaled = {"weighting": "examples", "max_weight": spec.max_weight * STALENESS_SCALE}
        self._sum = Accumulator(plan.model_copy(update=scaled))
        self._weight = 0  # of the updates, had they no age
        self.reports = 0

    def add(self, update: NDArray[np.int32], num_examples: int, staleness: int) -> None:
        """Add one update.

        Args:
            update: (P,) in grid steps.
            num_examples: of its device.
            staleness: steps made since the device was started.

        Raises:
            UpdateRejected: wrong shape or type, or an example count below 1.
        """
        equal = self._spec.weighting == "equal"
        weight = 1 if equal else min(num_examples, self._spec.max_weight)
        scaled = weight * staleness_factor(staleness, self._spec.buffer.staleness)
        self._sum.add(UpdateBatch(update[None, :], np.array([scaled], np.int64)))
        self._weight += weight
        self.reports += 1

    def finalize(self) -> NDArray[np.float64]:
        """The step's update, (P,): old updates make it shorter, as in the paper; the buffer is used up."""
        share = self._sum.weight / (self._weight * STALENESS_SCALE)
        mean = self._sum.finalize()
        mean *= share
        return mean


@dataclass
class _Step:
    """One attempt at one step of the server."""

    plan: RoundPlan
    request: Request
    buffer: Buffer
    collected: Collected
    waiting: Iterator[str]  # devices that may be started from this step's model


@dataclass
class BufferedCampaign(Campaign):
    """One run's spec and seams; ``run`` may be called once. ``exchange`` serves evaluations only."""

    dispatcher: Dispatcher | None = None
    _at_work: dict[str, AtWork] = field(default_factory=dict, init=False)  # by device, as they were started

    def __post_init__(self) -> None:
        if self.spec.mode != "buffered" or self.dispatcher is None:
            raise ConfigError("A buffered run needs mode = 'buffered' and a dispatcher.")

    def run(self, state: RunState, should_stop: Callable[[], bool] = lambda: False) -> Verdict:
        """Train until the last step, an early stop, a request to stop, or a failure."""
        try:
            self._start_again(state.at_work)
            return super().run(state, should_stop)
        finally:
            self._carrier.withdraw()

    @property
    def _carrier(self) -> Dispatcher:
        assert self.dispatcher is not None  # see __post_init__
        return self.dispatcher

    def _asked(self) -> int:
        """Devices that one step may start: enough to fill every place, and to refill it as answers come."""
        return self.spec.buffer.concurrency + self.spec.buffer.size

    def _needed(self) -> int:
        return self.spec.buffer.size

    def _train(self, state: RunState, should_stop: Callable[[], bool]) -> RunState | None:
        number, cause, failures = state.round + 1, "", 0
        while failures < self.spec.cohort.max_attempts:
            cohort = self._cohort(should_stop)
            if cohort is None:
                return None
            state = state.on(attempt=state.attempt + 1)
            began, step = self.clock(), self._open(state, cohort)
            if not self._fill(step, should_stop):
                self.book.abandoned(step.collected, f"Stopped on request: {step.collected.summary()}")
                return None
            if step.buffer.reports < self.spec.buffer.size:
                cause, failures = step.collected.summary(), failures + 1
                self.book.abandoned(step.collected, cause)
                continue
            mean = step.buffer.finalize()
            after = advance(self.spec, self.work, step.plan, state, mean, step.buffer.reports)
            after = after.on(at_work=tuple(self._at_work.values()))
            metrics, seconds = TRAINING.summarise(step.collected.sums), self.clock() - began
            bytes_down = 4 * step.plan.down_size * len(step.collected.participation)
            self.book.committed(Committed(after, step.collected, metrics, seconds, bytes_down))
            return after
        raise RunError(
            f"Step {number} was abandoned {failures} times in a row; the last time: {cause}.",
            hint="Fewer devices answer than buffer.size; lower it, or raise cohort.deadline_s.",
        )

    def _cohort(self, should_stop: Callable[[], bool]) -> tuple[str, ...] | None:
        """Who may be started in this step; waits only if nobody is at work. None: asked to stop."""
        if should_stop():
            return None
        idle = [d for d in eligible(self.roster.candidates()) if d not in self._at_work]
        if self._at_work:
            return draw(idle, min(self._asked(), len(idle)), self.rng) if idle else ()
        return self._quorum(should_stop)

    def _open(self, state: RunState, cohort: tuple[str, ...]) -> _Step:
        size = self.spec.buffer.size
        plan = self._plan("train", state.round + 1, state, cohort, size)
        plan = plan.model_copy(update={"wanted_reports": size, "min_reports": size})
        self.book.planned(plan)
        began = self.clock()
        collected = Collected(plan, elapsed_s=lambda: max(0.0, self.clock() - began))
        buffer = Buffer(plan, self.spec)
        return _Step(plan, Request.of(plan, state.model), buffer, collected, iter(cohort))

    def _fill(self, step: _Step, should_stop: Callable[[], bool]) -> bool:
        """Start devices and take answers until the buffer is full or nobody is left; False: asked to stop."""
        while step.buffer.reports < self.spec.buffer.size:
            self._start_more(step)
            if not self._at_work:
                return True
            answer = self._carrier.next(LOOK_S)
            if answer is not None:
                self._take(step, answer)
            elif should_stop():
                return False
        return True

    def _start_more(self, step: _Step) -> None:
        while len(self._at_work) < self.spec.buffer.concurrency:
            device_id = next(step.waiting, None)
            if device_id is None:
                return
            begun = AtWork(device_id, step.plan, step.request.model, self.clock())
            self._carrier.start(step.plan, step.request, device_id)
            self._at_work[device_id] = begun

    def _start_again(self, at_work: Sequence[AtWork]) -> None:
        """Have devices go on that a restart has cut off."""
        requests: dict[tuple[int, int], Request] = {}  # one for all devices of a plan
        for one in at_work:
            key = one.plan.round, one.plan.attempt
            request = requests.setdefault(key, Request.of(one.plan, one.model))
            self._carrier.start(one.plan, request, one.device_id, one.started_s)
            self._at_work[one.device_id] = one

    def _take(self, step: _Step, answer: Answer) -> None:
        device_id, collected = answer.device_id, step.collected
        begun = self._at_work.pop(device_id, None)
        collected.bytes_up += answer.num_bytes
        if begun is None:
            late = UpdateRejected(Rejection.NOT_SELECTED, f"Device {device_id} was not at work.")
            self._carrier.tell(step.plan, device_id, late)
            return
        plan = begun.plan
        entry = Participation(
            device_id, ACCEPTED, num_bytes=answer.num_bytes, arrived_s=collected.elapsed_s()
        )
        try:
            reply = _read(answer, plan)
            step.buffer.add(reply.update, reply.num_examples, step.plan.round - plan.round)
        except UpdateRejected as refusal:
            self._carrier.tell(plan, device_id, refusal)
            reason = refusal.reason.value
            collected.participation[device_id] = entry._replace(outcome=reason, detail=str(refusal))
            return
        collected.reports += 1
        collected.sums = TRAINING.add(collected.sums, reply.sums) if collected.sums else dict(reply.sums)
        collected.participation[device_id] = entry._replace(
            num_examples=reply.num_examples, seconds=reply.seconds
        )
        self._carrier.tell(plan, device_id, None)


def _read(answer: Answer, plan: RoundPlan) -> TrainReply:
    if isinstance(answer.records, UpdateRejected):
        raise answer.records
    reply = TrainReply.read(answer.records, plan)
    TRAINING.validate(reply.sums)
    return reply
