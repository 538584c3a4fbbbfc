"""The exchange of a simulation: a round in virtual time, computed by a backend.

The world says, before anything is trained, when each device's answer arrives and what is wrong with it.
Answers are taken in that order until enough have come; whoever would arrive later is not trained at all.
Ordinary devices are trained in chunks and only their exact sum comes back; a device whose reply must be
looked at singly answers with records, as on a real fleet.
"""

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from math import fsum
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import UpdateRejected
from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.accumulator import Accumulator, UpdateBatch
from lepton_fl.rounds.collect import Collected
from lepton_fl.rounds.exchange import AddedUp, Answer, Report
from lepton_fl.rounds.quantised import compressed
from lepton_fl.rounds.secure_sum import rounded_loss
from lepton_fl.secagg.field import Random
from lepton_fl.tasks.metrics import Sums
from lepton_fl.wire.messages import UPDATE, Request
from lepton_fl.wire.records import Records
from lepton_simulations.backend import Backend, Outcome
from lepton_simulations.fleet import CENTRAL, VirtualFleet
from lepton_simulations.world import Fate

ENVELOPE = 512  # bytes of a reply besides its update, about

Progress = Callable[[int, int], None]  # devices done, devices wanted


class Interrupted(Exception):
    """Somebody wants the simulation to stop in the midst of a round; nothing of the round is kept."""


class CoordinatorCrash(Exception):
    """The coordinator of the scenario dies in the midst of a round."""

    def __init__(self, plan: RoundPlan) -> None:
        super().__init__(f"The coordinator dies in round {plan.round}, as the scenario says.")
        self.plan = plan


class InMemoryExchange:
    """Lets the cohort's devices answer; implements ``rounds.exchange.Exchange``."""

    def __init__(
        self,
        fleet: VirtualFleet,
        backend: Backend,
        *,
        on_progress: Progress = lambda done, wanted: None,
        should_stop: Callable[[], bool] = lambda: False,
        one_by_one: bool = False,
        random_of: Callable[[RoundPlan, str], Random] | None = None,
    ) -> None:
        """Open an exchange.

        Args:
            fleet: the devices.
            backend: computes; closed with the exchange.
            on_progress: called as devices of a training round are done.
            should_stop: asked after each chunk; True ends the round with ``Interrupted``.
            one_by_one: every device answers with records, because its own update is needed.
            random_of: what a device rounds with where updates are quantised; None = the system's.
        """
        self._fleet = fleet
        self._backend = backend
        self._on_progress = on_progress
        self._should_stop = should_stop
        self._one_by_one, self._random_of = one_by_one, random_of
        # Of the attempt in hand:
        self._accepted = 0  # singly
        self._losses: list[float] = []
        self._seen = 0
        self._request = Records()
        self._exact: Accumulator | None = None  # of what is accepted, where updates are quantised
        self._last: tuple[str, UpdateBatch] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the backend; may be called again."""
        self._backend.close()

    def ask(self, plan: RoundPlan, request: Request) -> Generator[Answer | AddedUp, None, None]:
        """Answers in the order of arrival, and at last the sum of all ordinary ones.

        Raises:
            Interrupted: as asked for.
            CoordinatorCrash: as the scenario says.
        """
        self._backend.begin(plan, request)
        quantised = plan.quantisation is not None
        if quantised:
            self._request = request.to_records()
        self._exact = Accumulator(plan) if quantised else None
        if plan.cohort[0].startswith(CENTRAL):
            for device_id, outcome in self._backend.answer(plan.cohort):
                yield Answer(device_id, outcome)
            return
        world, began = self._fleet.world, self._fleet.world.clock()
        if world.crashes(plan):
            world.clock.advance(world.downtime_s(plan))
            raise CoordinatorCrash(plan)
        fates = self._fates(plan)
        many = plan.kind == "train" and plan.adds_up and not self._one_by_one
        many = many and plan.quantisation is None
        # Of secure rounds it is seen above who else is needed: that depends on who is with whom.
        least = int(plan.kind == "train" and plan.secure is not None and not many)
        counted = dict[str, Report]()
        self._accepted, self._losses, self._seen, at = 0, list[float](), 0, 0
        while at < len(fates) and (wanted := max(least, self._wanted(plan) - len(counted))) > 0:
            # No more than could be accepted: should some be refused, the next ones take their place.
            now, at = _first(fates, at, wanted)
            ordinary = {f.device_id: f for f in now if many and f.answers and f.ordinary}
            yield from self._singly(plan, [f for f in now if f.device_id not in ordinary], began)
            yield from self._together(plan, ordinary, counted)
            world.clock.advance_to(began + now[-1].arrives_s)
        if (least or self._wanted(plan) > len(counted)) and len(fates) < len(plan.cohort):
            world.clock.advance_to(began + plan.deadline_s)
        if counted:
            reports = tuple(counted[device_id] for device_id in plan.cohort if device_id in counted)
            yield AddedUp(reports, self._sums(), self._backend.subtotal())

    def _wanted(self, plan: RoundPlan) -> int:
        return plan.wanted_reports - self._accepted

    def tell(self, plan: RoundPlan, device_id: str, refusal: UpdateRejected | None) -> None:
        """Count who was accepted; who was not forgets what the attempt left behind."""
        self._accepted += refusal is None
        if refusal is None and self._exact and self._last and self._last[0] == device_id:
            self._exact.add(self._last[1])
        self._last = None
        if refusal is not None and plan.kind == "train" and self._fleet.memory:
            self._fleet.memory.refused(device_id)

    def _fates(self, plan: RoundPlan) -> list[Fate]:
        """Of those who are heard of before the deadline, in the order of arrival."""
        train = plan.kind == "train"
        fates = self._fleet.world.fates(
            plan,
            lambda device_id: self._fleet.examples(plan, device_id),
            4 * plan.down_size + ENVELOPE,
            plan.update_bytes + ENVELOPE if train else ENVELOPE,
        )
        return [fate for fate in fates if fate.arrives_s <= plan.deadline_s]

    def measure(self, collected: Collected, mean: NDArray[np.float64]) -> dict[str, float]:
        """How far a mean is from that of the updates as they were before they were quantised."""
        exact, self._exact = self._exact, None
        if exact is None or exact.reports != collected.reports:  # a sum of several was lost
            return {}
        true = exact.finalize()
        return {
            "measured_error": float(np.linalg.norm(mean - true) / max(float(np.linalg.norm(true)), 1e-300))
        }

    def _in_few_bits(self, plan: RoundPlan, device_id: str, reply: Records) -> Records:
        """An answer as it travels; without secure aggregation, which encodes it by itself."""
        if self._exact is None or UPDATE not in reply.arrays:
            return reply
        update, count = reply.arrays[UPDATE], reply.metrics["num-examples"]
        self._last = device_id, UpdateBatch(update[None, :], np.array([count], np.int64))
        random = self._random_of(plan, device_id) if self._random_of else os.urandom
        return compressed(self._request, reply, random)

    def _singly(self, plan: RoundPlan, fates: Sequence[Fate], began: float) -> Generator[Answer, None, None]:
        """Those who answer with records, and those of whom the coordinator hears that they do not."""
        if not fates:
            return
        world = self._fleet.world
        with closing(self._backend.answer([f.device_id for f in fates if f.answers])) as answers:
            for fate in fates:
                outcome: Outcome = next(answers)[1] if fate.answers else fate.word()
                self._check_stop()
                world.clock.advance_to(began + fate.arrives_s)
                if isinstance(outcome, Records):
                    outcome = world.spoil(fate, _timed(outcome, fate.seconds))
                    outcome = self._in_few_bits(plan, fate.device_id, outcome)
                yield Answer(fate.device_id, outcome, _num_bytes(outcome))

    def _together(
        self, plan: RoundPlan, ordinary: Mapping[str, Fate], counted: dict[str, Report]
    ) -> Generator[Answer, None, None]:
        """Train the ordinary ones; yields those who are refused after all, in the order of arrival."""
        if not ordinary:
            return
        size = {d: self._fleet.examples(plan, d) for d in ordinary}
        # Devices of like size together: a chunk takes as long as its longest. The longest first.
        devices = sorted(sorted(ordinary), key=size.__getitem__, reverse=True)
        refused, num_bytes = dict[str, UpdateRejected](), 4 * plan.update_size + ENVELOPE
        with closing(self._backend.train(devices, [size[d] for d in devices])) as parts:
            for part in parts:
                refused |= part.refused
                for device_id, examples, loss_sum, seen in part.trained:
                    fate = ordinary[device_id]
                    counted[device_id] = Report(device_id, examples, fate.seconds, num_bytes, fate.arrives_s)
                    self._losses.append(rounded_loss(loss_sum) if plan.secure else loss_sum)
                    self._seen += seen
                self._on_progress(self._accepted + len(counted), plan.wanted_reports)
                self._check_stop()
        for device_id in ordinary if refused else ():
            if device_id in refused:
                yield Answer(device_id, refused[device_id])

    def _sums(self) -> Sums:
        """Of the training loss; fsum does not depend on the order in which the parts came."""
        return {"loss_sum": np.array([fsum(self._losses)]), "examples": np.array([self._seen], np.int64)}

    def _check_stop(self) -> None:
        if self._should_stop():
            raise Interrupted


def _first(fates: Sequence[Fate], at: int, wanted: int) -> tuple[Sequence[Fate], int]:
    """The next fates, up to ``wanted`` that answer, and where they end."""
    end, answers = at, 0
    while end < len(fates) and answers < wanted:
        answers += fates[end].answers
        end += 1
    return fates[at:end], end


def _timed(reply: Records, seconds: float) -> Records:
    """A reply that reports virtual seconds; a failure reports none."""
    if "seconds" not in reply.metrics:
        return reply
    return Records(reply.arrays, reply.config, {**reply.metrics, "seconds": seconds})


def _num_bytes(outcome: Outcome) -> int:
    """What a reply takes on the wire, without a transport's own framing."""
    if isinstance(outcome, UpdateRejected):
        return 0
    return sum(array.nbytes for array in outcome.arrays.values()) + ENVELOPE
