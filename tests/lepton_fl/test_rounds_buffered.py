"""FedBuff over scripted devices in virtual time: a step is exact, stale updates count less, nothing waits."""

import heapq
from collections import Counter
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from lepton_fl.errors import ConfigError, Rejection, UpdateRejected
from lepton_fl.plan import BufferSpec, RoundPlan, RunSpec
from lepton_fl.rounds.buffered import Buffer, BufferedCampaign, staleness_factor
from lepton_fl.rounds.campaign import Campaign, RunState, Work, plan_round
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.rounds.collect import ACCEPTED
from lepton_fl.rounds.exchange import Answer
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.tasks.metrics import TrainingLoss
from lepton_fl.vector import to_grid
from lepton_fl.wire.messages import Ticket, TrainReply
from lepton_fl.wire.records import Records

SIZE = 4
WORK = Work("pkg:task", "1", "ab" * 32, SIZE, TrainingLoss(), evaluate_on_devices=False)


def honest(device_id, plan, model):
    """Moves halfway to the device's own point; the heavier, the larger its number."""
    point = np.full(SIZE, float(device_id[1:]), np.float32)
    sums = {"loss_sum": np.array([1.0]), "examples": np.array([2])}
    update = to_grid(0.5 * (point - model), plan.grid_step)
    return TrainReply(
        Ticket.of(plan), plan.task_version, 1 + int(device_id[1:]), update, sums, 0.1
    ).to_records()


@dataclass
class Fleet:
    """A dispatcher, an exchange, a roster and a clock in virtual time."""

    delays: dict[str, float]  # device -> seconds it takes; beyond the deadline: silence
    script: object = honest
    now: float = 0.0
    number: int = 0
    queue: list = field(default_factory=list)
    started: list = field(default_factory=list)  # (device, version it trains from)
    most: int = 0  # at work at one time
    told: list = field(default_factory=list)
    withdrawn: int = 0

    def start(self, plan, request, device_id, started_s=None):
        assert device_id in plan.cohort
        self.number += 1
        took = min(self.delays[device_id], plan.deadline_s)
        late = self.delays[device_id] > plan.deadline_s
        records = (
            UpdateRejected(Rejection.OFFLINE, "silent")
            if late
            else self.script(device_id, plan, request.model)
        )
        began = self.now if started_s is None else started_s
        heapq.heappush(self.queue, (began + took, self.number, Answer(device_id, records, 10)))
        self.started.append((device_id, plan.round - 1))
        self.most = max(self.most, len(self.queue))

    def next(self, timeout_s):
        if not self.queue:
            return None
        arrives, _, answer = heapq.heappop(self.queue)
        self.now = max(self.now, arrives)
        return answer

    def tell(self, plan, device_id, refusal):
        self.told.append((device_id, refusal.reason if refusal else None))

    def withdraw(self):
        self.queue.clear()
        self.withdrawn += 1

    def ask(self, plan, request):
        began = self.now
        for device_id in sorted(plan.cohort, key=lambda d: self.delays[d]):
            self.now = began + self.delays[device_id]
            yield Answer(device_id, self.script(device_id, plan, request.model), 10)

    def candidates(self):
        return [Candidate(device_id, "eligible") for device_id in self.delays]

    def wait(self, seconds):
        self.now += seconds

    def clock(self):
        return self.now


class Book:
    def __init__(self):
        self.committed_rounds, self.plans, self.causes = [], [], []

    def planned(self, plan):
        self.plans.append(plan)

    def abandoned(self, collected, cause):
        self.causes.append(cause)

    def committed(self, round_):
        self.committed_rounds.append(round_)

    def evaluated(self, evaluation): ...

    def waiting(self, cause, seconds): ...


def spec_of(*, size=2, concurrency=4, staleness=0.5, rounds=3, **fields):
    buffer = BufferSpec(size=size, concurrency=concurrency, staleness=staleness)
    fields = {"evaluate_every": 0, "cohort": {"fill_wait_s": 0.0, "quorum_wait_s": 5.0}, **fields}
    return RunSpec(task="pkg:task", mode="buffered", buffer=buffer, rounds=rounds, **fields)


def run(fleet, spec, *, state=None, seed=0, should_stop=lambda: False):
    book = Book()
    campaign = BufferedCampaign(
        spec, "run", WORK, fleet, fleet, book, Random(seed), clock=fleet.clock, dispatcher=fleet
    )
    if state is None:
        state = RunState(np.zeros(SIZE, np.float32), ServerState.initial(spec.server, SIZE))
    book.verdict = campaign.run(state, should_stop)
    return book


EVEN = {f"d{i}": 1.0 for i in range(8)}
MIXED = {f"d{i}": 1.0 + i for i in range(8)}


def test_with_everybody_fresh_it_is_federated_averaging_to_the_bit():
    spec = spec_of(size=8, concurrency=8, rounds=4)
    buffered = run(Fleet(EVEN), spec)
    together = Book()
    fleet = Fleet(EVEN)
    synchronous = spec.model_copy(
        update={"mode": "synchronous", "cohort": spec.cohort.model_copy(update={"size": 8})}
    )
    Campaign(synchronous, "run", WORK, fleet, fleet, together, Random(0)).run(
        RunState(np.zeros(SIZE, np.float32))
    )
    for ours, theirs in zip(buffered.committed_rounds, together.committed_rounds, strict=True):
        assert_array_equal(ours.state.model, theirs.state.model)


def test_a_step_is_the_weighted_sum_of_the_paper():
    """Equal weights: sum of (1 + s)^-1/2 * update, over their number."""
    spec = spec_of(weighting="equal")
    plan = plan_round(spec, "run", WORK, "train", 9, RunState(np.zeros(SIZE, np.float32)), ("d0",), 1, "00")
    buffer = Buffer(plan, spec)
    for staleness, value in ((0, 1.0), (3, 1.0), (0, -2.0)):
        buffer.add(to_grid(np.full(SIZE, value, np.float32), spec.grid_step), 5, staleness)
    assert_allclose(buffer.finalize(), np.full(SIZE, (1.0 + 0.5 - 2.0) / 3), rtol=1e-15)


def test_the_order_of_arrival_does_not_matter():
    rng = np.random.default_rng(0)
    spec = spec_of(size=20, max_weight=2**19)
    plan = plan_round(spec, "run", WORK, "train", 9, RunState(np.zeros(SIZE, np.float32)), ("d0",), 1, "00")
    updates = [
        (rng.integers(-(2**31) + 1, 2**31, SIZE, dtype=np.int32), int(rng.integers(1, 2**40)), int(s))
        for s in rng.integers(0, 50, 20)
    ]
    results = []
    for order in (range(20), rng.permutation(20), range(19, -1, -1)):
        buffer = Buffer(plan, spec)
        for i in order:
            buffer.add(*updates[i])
        results.append(buffer.finalize())
    assert_array_equal(results[0], results[1])
    assert_array_equal(results[0], results[2])


@pytest.mark.parametrize(
    ("staleness", "exponent", "factor"),
    [(0, 0.5, 256), (3, 0.5, 128), (1, 0.5, 181), (10**9, 5, 1), (7, 0, 256)],
)
def test_the_factor_of_an_age(staleness, exponent, factor):
    assert staleness_factor(staleness, exponent) == factor


def test_devices_are_replaced_at_once_and_stale_ones_are_counted():
    fleet = Fleet(MIXED)
    book = run(fleet, spec_of(size=2, concurrency=4, rounds=6))
    assert book.verdict.outcome == "completed"
    assert fleet.most == 4
    assert [len(r.collected.participation) for r in book.committed_rounds] == [2] * 6
    ages = Counter()
    for done in book.committed_rounds:
        assert done.collected.reports == 2
        for device_id in done.collected.participation:
            versions = [v for d, v in fleet.started if d == device_id]
            ages[max(v for v in versions if v < done.state.round)] += 1
    assert any(version > 0 for version in ages)  # replacements train from newer models
    for device_id, count in Counter(fleet.started).items():  # no device twice from one model
        assert count == 1, device_id
    assert fleet.withdrawn == 1


def test_a_straggler_holds_up_a_synchronous_round_and_not_a_buffered_run():
    delays = {**{f"d{i}": 1.0 for i in range(7)}, "d7": 100.0}
    fleet = Fleet(delays)
    run(fleet, spec_of(size=4, concurrency=8, rounds=10))
    waiting = Fleet(delays)
    spec = spec_of(rounds=10).model_copy(update={"mode": "synchronous"})
    everybody = spec.cohort.model_copy(update={"size": 8})
    spec = spec.model_copy(update={"cohort": everybody})
    Campaign(spec, "run", WORK, waiting, waiting, Book(), Random(0), clock=waiting.clock).run(
        RunState(np.zeros(SIZE, np.float32))
    )
    assert waiting.now >= 1000
    assert fleet.now <= 50


def test_a_bad_answer_is_named_and_another_device_takes_its_place():
    def liar(device_id, plan, model):
        reply = honest(device_id, plan, model)
        return reply if device_id != "d3" else Records({}, {**reply.config, "nonce": "0"}, reply.metrics)

    fleet = Fleet(EVEN, script=liar)
    book = run(fleet, spec_of(size=4, concurrency=8, rounds=2))
    assert book.verdict.outcome == "completed"
    outcomes = [e.outcome for r in book.committed_rounds for e in r.collected.participation.values()]
    assert Counter(outcomes)[ACCEPTED] == 8
    assert ("d3", Rejection.REPLAYED) in fleet.told
    assert all(r.collected.reports == 4 for r in book.committed_rounds)


def test_silent_devices_cost_their_place_until_the_deadline_only():
    fleet = Fleet({**EVEN, "d0": 1e9})
    cohort = {"deadline_s": 3.0, "fill_wait_s": 0.0}
    book = run(fleet, spec_of(size=4, concurrency=8, rounds=6, cohort=cohort))
    assert book.verdict.outcome == "completed"
    entries = [e for r in book.committed_rounds for e in r.collected.participation.values()]
    assert {e.outcome for e in entries if e.device_id == "d0"} == {"offline"}


def test_too_few_devices_end_the_run_by_name():
    book = run(Fleet({"d0": 1.0, "d1": 1.0}), spec_of(size=5, concurrency=2))
    assert book.verdict.outcome == "failed"
    assert "No quorum" in book.verdict.reason


def test_too_many_failures_abandon_the_step_and_then_the_run():
    def broken(device_id, plan, model):
        return UpdateRejected(Rejection.FAILED, "out of memory")

    book = run(Fleet(EVEN, script=broken), spec_of(size=4, concurrency=4))
    assert book.verdict.outcome == "failed"
    assert len(book.causes) == 5
    assert "buffer.size" in book.verdict.reason
    assert [p.attempt for p in book.plans] == [1, 2, 3, 4, 5]


def test_the_same_seed_is_the_same_run_and_a_stopped_one_goes_on_from_its_last_step():
    whole, again = (run(Fleet(MIXED), spec_of(rounds=8)) for _ in range(2))
    assert_array_equal(whole.committed_rounds[-1].state.model, again.committed_rounds[-1].state.model)
    stopping = iter([False] * 4 + [True] * 99)
    fleet = Fleet(MIXED)
    part = run(fleet, spec_of(rounds=8), should_stop=lambda: next(stopping))
    assert part.verdict.outcome == "stopped"
    assert fleet.queue == []
    state = part.committed_rounds[-1].state
    rest = run(Fleet(MIXED), spec_of(rounds=8), state=state)
    assert rest.verdict.outcome == "completed"
    assert rest.committed_rounds[-1].state.round == 8
    assert_allclose(rest.committed_rounds[-1].state.model, whole.committed_rounds[-1].state.model, atol=2)


def test_each_plan_is_recorded_before_its_devices_are_asked():
    fleet, book = Fleet(EVEN), Book()
    seen = []
    start = fleet.start
    fleet.start = lambda plan, request, device_id: (
        seen.append(plan in book.plans),
        start(plan, request, device_id),
    )
    campaign = BufferedCampaign(
        spec_of(), "run", WORK, fleet, fleet, book, Random(0), clock=fleet.clock, dispatcher=fleet
    )
    campaign.run(RunState(np.zeros(SIZE, np.float32)))
    assert seen
    assert all(seen)
    assert len({plan.nonce for plan in book.plans}) == len(book.plans)


def test_a_stranger_is_not_counted():
    fleet = Fleet(EVEN)
    plan = RoundPlan.from_json(
        plan_round(
            spec_of(), "run", WORK, "train", 1, RunState(np.zeros(SIZE, np.float32)), ("d9",), 1, "00"
        ).to_json()
    )
    heapq.heappush(fleet.queue, (0.0, -1, Answer("d9", honest("d9", plan, np.zeros(SIZE, np.float32)), 10)))
    book = run(fleet, spec_of())
    assert ("d9", Rejection.NOT_SELECTED) in fleet.told
    assert all("d9" not in r.collected.participation for r in book.committed_rounds)


def test_it_needs_a_dispatcher_and_its_mode():
    fleet = Fleet(EVEN)
    for spec, dispatcher in ((spec_of(), None), (RunSpec(task="pkg:task"), fleet)):
        with pytest.raises(ConfigError, match="dispatcher"):
            BufferedCampaign(spec, "run", WORK, fleet, fleet, Book(), Random(0), dispatcher=dispatcher)


def test_a_state_may_carry_another_optimisers_slots():
    spec = spec_of(server={"name": "fedadam", "learning_rate": 0.1})
    book = run(Fleet(EVEN), spec)
    assert set(book.committed_rounds[-1].state.server.slots) == {"momentum", "variance"}
    assert replace(book.committed_rounds[-1].state, round=0).round == 0
