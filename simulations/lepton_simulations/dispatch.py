"""Single virtual devices that answer in virtual time: what a buffered run needs of a simulation.

The world says when a device's answer arrives, counted from the moment it was started; answers are given in
that order, devices of one moment in the order in which they were started, and the clock moves with them. A
device is trained when somebody wants its answer, together with all others that wait to train from its model.

    dispatcher = VirtualDispatcher(fleet, backend)
    BufferedCampaign(spec, ..., clock=fleet.world.clock, dispatcher=dispatcher).run(state)
"""

import heapq
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from math import inf

from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.exchange import Answer
from lepton_fl.wire.messages import Request
from lepton_fl.wire.records import Records
from lepton_simulations.backend import Backend, Outcome
from lepton_simulations.exchange import ENVELOPE, CoordinatorCrash, Interrupted
from lepton_simulations.fleet import VirtualFleet
from lepton_simulations.world import Fate


@dataclass(frozen=True, order=True)
class _Work:
    """A device at work; the one whose answer comes first sorts first."""

    arrives_s: float  # virtual time
    number: int  # of all that were started
    plan: RoundPlan = field(compare=False)
    request: Request = field(compare=False)
    fate: Fate = field(compare=False)


class VirtualDispatcher:
    """Implements ``rounds.buffered.Dispatcher``."""

    def __init__(
        self, fleet: VirtualFleet, backend: Backend, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Nobody is at work.

        Args:
            fleet: the devices.
            backend: computes; whoever made it closes it.
            should_stop: asked after each device; True ends the run with ``Interrupted``.
        """
        self._fleet, self._backend, self._should_stop = fleet, backend, should_stop
        self._queue: list[_Work] = []
        self._outcomes: dict[int, Outcome] = {}  # trained, and not yet arrived
        self._started = 0

    def start(
        self, plan: RoundPlan, request: Request, device_id: str, started_s: float | None = None
    ) -> None:
        """Let a device begin now, or have begun at ``started_s``.

        Raises:
            CoordinatorCrash: as the scenario says; everything under way is lost.
        """
        world, clock = self._fleet.world, self._fleet.world.clock
        if world.crashes(plan):
            self.withdraw()
            clock.advance(world.downtime_s(plan))
            raise CoordinatorCrash(plan)
        began = clock() if started_s is None else started_s
        (fate,) = world.fates(
            plan.model_copy(update={"cohort": (device_id,)}),
            lambda device: self._fleet.examples(plan, device),
            4 * plan.down_size + ENVELOPE,
            4 * plan.update_size + ENVELOPE,
            began,
        )
        self._started += 1
        late = fate.arrives_s > plan.deadline_s
        arrives_s = began + (plan.deadline_s if late else fate.arrives_s)
        if late:  # nothing comes in time: it is given up at the deadline
            silent = f"Device {device_id} did not answer within {plan.deadline_s:g} s."
            fate = Fate(device_id, inf, stage="offline", refusal=Rejection.OFFLINE.value, detail=silent)
        heapq.heappush(self._queue, _Work(arrives_s, self._started, plan, request, fate))

    def next(self, timeout_s: float) -> Answer | None:
        """The answer that arrives next; virtual time passes until then, however long ``timeout_s`` is."""
        if not self._queue:
            return None
        work = heapq.heappop(self._queue)
        outcome = self._outcome(work)
        self._fleet.world.clock.advance_to(work.arrives_s)
        if isinstance(outcome, UpdateRejected):
            return Answer(work.fate.device_id, outcome)
        size = sum(array.nbytes for array in outcome.arrays.values()) + ENVELOPE
        return Answer(work.fate.device_id, outcome, size)

    def tell(self, plan: RoundPlan, device_id: str, refusal: UpdateRejected | None) -> None:
        """Virtual devices do not mind."""

    def withdraw(self) -> None:
        """Forget all that are at work; those not yet trained never are."""
        self._queue.clear()
        self._outcomes.clear()

    def _outcome(self, work: _Work) -> Outcome:
        if not work.fate.answers:
            return work.fate.word()
        if work.number not in self._outcomes:
            self._train(work)
        outcome = self._outcomes.pop(work.number)
        if not isinstance(outcome, Records):
            return outcome
        if "seconds" in outcome.metrics:  # a failure reports none
            timed = {**outcome.metrics, "seconds": work.fate.seconds}
            outcome = Records(outcome.arrays, outcome.config, timed)
        return self._fleet.world.spoil(work.fate, outcome)

    def _train(self, first: _Work) -> None:
        """Train everybody who waits to train from the same model, in one call of the backend."""
        same = [w for w in self._queue if w.plan is first.plan and w.number not in self._outcomes]
        batch = [first, *sorted(w for w in same if w.fate.answers)]
        self._backend.begin(first.plan, first.request)
        with closing(self._backend.answer([w.fate.device_id for w in batch])) as answers:
            for work, (_, outcome) in zip(batch, answers, strict=True):
                self._outcomes[work.number] = outcome
                if self._should_stop():
                    raise Interrupted
