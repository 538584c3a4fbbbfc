"""Private rounds: the contract in the draw, the charge, the noise, the public denominator, what is kept."""

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from lepton_fl.errors import BudgetRefused, ConfigError, NotFound, RunError, StateConflict, StateCorrupt
from lepton_fl.plan import AggregationSpec, RoundPlan, RunSpec
from lepton_fl.privacy.accounting import GdpExact
from lepton_fl.privacy.audit import gdp_lower_bound
from lepton_fl.privacy.budget import Budget
from lepton_fl.privacy.events import Gaussian
from lepton_fl.privacy.noise import simulation_key
from lepton_fl.rounds.accumulator import Accumulator, Subtotal
from lepton_fl.rounds.campaign import Campaign, RunState, Work, plan_round
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.rounds.exchange import Answer
from lepton_fl.rounds.ledger import MemoryLedger
from lepton_fl.rounds.private import PrivateRounds, PrivateState, budget_of, prepared, refuse_run, scaled
from lepton_fl.rounds.robust import RobustAggregator
from lepton_fl.tasks.metrics import TrainingLoss
from lepton_fl.vector import to_grid
from lepton_fl.wire.messages import Request, Ticket, TrainReply

SIZE, CLIP, DELTA = 4, 1.0, 1e-3
WORK = Work("pkg:task", "1", "ab" * 32, SIZE, TrainingLoss())
FLEET = tuple(f"d{i:02}" for i in range(12))
KEY = simulation_key("test")
BANDED = {"mechanism": "banded", "noise_multiplier": 1.0, "min_separation": 3, "max_participations": 2}
INDEPENDENT = {"mechanism": "independent", "noise_multiplier": 1.0}


def spec(privacy=None, **changes) -> RunSpec:
    given = {"clip_norm": CLIP, "delta": DELTA, **(BANDED if privacy is None else privacy)}
    settings = {"task": "pkg:task", "rounds": 6, "evaluate_every": 0, "cohort": {"size": 4}, "privacy": given}
    return RunSpec.model_validate({**settings, **changes})


@dataclass
class Fleet:
    """Devices that all move by the same step; those in ``silent`` say nothing in these attempts."""

    silent: dict[tuple[int, int], int] = field(default_factory=dict)  # (round, attempt) -> how many
    asked: list[RoundPlan] = field(default_factory=list)
    step: float = 0.25

    def ask(self, plan: RoundPlan, request: Request) -> Generator[Answer, None, None]:
        self.asked.append(plan)
        update = to_grid(np.full(SIZE, self.step, np.float32), plan.grid_step, plan.clip_norm)
        sums = {"loss_sum": np.array([1.0]), "examples": np.array([2])}
        for device_id in plan.cohort[self.silent.get((plan.round, plan.attempt), 0) :]:
            reply = TrainReply(Ticket.of(plan), plan.task_version, 7, update, sums, 0.1)
            yield Answer(device_id, reply.to_records(), 100)

    def tell(self, plan, device_id, refusal):
        assert refusal is None

    def candidates(self):
        return [Candidate(d, "eligible") for d in FLEET]

    def wait(self, seconds):
        pass


@dataclass
class Book:
    committed_: list = field(default_factory=list)
    abandoned_: list = field(default_factory=list)

    def planned(self, plan):
        pass

    def abandoned(self, collected, cause):
        self.abandoned_.append((collected, cause))

    def committed(self, round_):
        self.committed_.append(round_)

    def waiting(self, cause, seconds):
        pass


def guard(run: RunSpec, ledger: MemoryLedger | None = None, key: bytes = KEY) -> PrivateRounds:
    ready = prepared(run, SIZE)
    return PrivateRounds(
        run,
        "run",
        ready,
        ledger or MemoryLedger(budget_of(run, ready, "run")),
        sealing_key=key,
        noise_key=lambda plan: simulation_key("test", plan.round, plan.attempt),
    )


def train(run: RunSpec, fleet=None, private=None, state=None, until=0):
    """A run, or the part of it up to a round."""
    fleet, book = fleet or Fleet(), Book()
    state = state or RunState(np.zeros(SIZE, np.float32))
    campaign = Campaign(run, "run", WORK, fleet, fleet, book, Random(0), clock=lambda: 0.0, private=private)
    verdict = campaign.run(state, lambda: bool(until and len(book.committed_) >= until))
    return verdict, book, fleet


def attempt(run: RunSpec, number=1, tries=1) -> RoundPlan:
    state = RunState(np.zeros(SIZE, np.float32), attempt=tries)
    return plan_round(run, "run", WORK, "train", number, state, FLEET[:4], 4, "00")


# --- what a run says ------------------------------------------------------------------------------------


def test_privacy_implies_clip_and_weights_and_a_contradiction_is_named():
    run = spec()
    assert (run.clip_norm, run.weighting) == (CLIP, "equal")
    assert attempt(run).clip_norm == CLIP
    assert RunSpec.model_validate_json(run.model_dump_json()) == run
    refuse_run(run, central_evaluation=False)
    wrong = spec(weighting="examples", clip_norm=2.0)
    with pytest.raises(ConfigError, match=r"weighting.*clip_norm=2 differs"):
        refuse_run(wrong, central_evaluation=False)


def test_without_privacy_nothing_is_implied_nor_refused():
    run = RunSpec(task="pkg:task")
    assert (run.clip_norm, run.weighting) == (0.0, "examples")
    refuse_run(run, central_evaluation=False, also=["anything"])


@pytest.mark.parametrize(
    ("privacy", "word"),
    [
        ({"mechanism": "skellam", "trust": "distributed", "epsilon": 5.0}, "secure aggregation"),
        ({**INDEPENDENT, "sampling": "poisson", "population": 20, "always_reachable": True}, "poisson"),
    ],
)
def test_what_rounds_cannot_keep_is_refused_by_name(privacy, word):
    with pytest.raises(ConfigError, match=word):
        refuse_run(spec(privacy), central_evaluation=True)


def test_all_conflicts_are_named_at_once():
    wrong = spec(evaluate_every=1, weighting="examples", local={"control_variates": True})
    with pytest.raises(ConfigError) as caught:
        refuse_run(wrong, central_evaluation=False, also=["no ledger"])
    for word in ("weighting", "evaluate_every", "proximal_mu", "no ledger"):
        assert word in str(caught.value)


def test_a_campaign_does_not_run_a_private_run_in_the_clear():
    verdict, book, fleet = train(spec())
    assert verdict.outcome == "failed"
    assert "privacy" in verdict.reason
    assert not book.committed_
    assert not fleet.asked


# --- a whole run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("privacy", [BANDED, INDEPENDENT, {**INDEPENDENT, "min_separation": 3}])
def test_every_round_says_what_it_has_cost_and_the_last_what_was_planned(privacy):
    run = spec(privacy)
    verdict, book, _ = train(run, private=guard(run))
    assert verdict.outcome == "completed"
    spent = [round_.metrics["epsilon"] for round_ in book.committed_]
    assert spent == sorted(spent)
    ready = prepared(run, SIZE)
    assert spent[-1] == pytest.approx(GdpExact().epsilon(ready.planned, DELTA), rel=1e-9)
    assert book.committed_[-1].metrics["epsilon_charged"] == pytest.approx(ready.epsilon, rel=1e-9)
    assert book.committed_[0].metrics["clip_norm"] == CLIP
    if privacy is not INDEPENDENT:  # the whole run is charged before its first round
        charged = [round_.metrics["epsilon_charged"] for round_ in book.committed_]
        assert charged == [charged[0]] * 6
        assert spent[0] < charged[0]


def test_nobody_takes_part_too_soon_or_too_often():
    run = spec(rounds=6)
    _, _, fleet = train(run, private=guard(run))
    rounds = {d: [p.round for p in fleet.asked if d in p.cohort] for d in FLEET}
    assert all(len(seen) == 2 for seen in rounds.values())  # 6 rounds of 4 of 12: each twice, no more
    assert all(b - a >= 3 for seen in rounds.values() for a, b in pairwise(seen))


def test_a_contract_that_leaves_nobody_ends_with_a_verdict():
    run = spec({**BANDED, "max_participations": 1}, cohort={"size": 4, "quorum_wait_s": 0.001})
    fleet = Fleet()
    now = iter(range(10_000))
    private, book = guard(run), Book()
    campaign = Campaign(
        run, "run", WORK, fleet, fleet, book, Random(0), clock=lambda: next(now), private=private
    )
    verdict = campaign.run(RunState(np.zeros(SIZE, np.float32)))
    assert verdict.outcome == "failed"
    assert "12 resting" in verdict.reason
    assert len(book.committed_) == 3


def test_what_devices_say_of_themselves_is_not_kept():
    run = spec()
    _, book, _ = train(run, private=guard(run), fleet=Fleet(silent={(2, 1): 4}))
    for collected in [round_.collected for round_ in book.committed_] + [c for c, _ in book.abandoned_]:
        assert not collected.sums
        entries = collected.participation.values()
        assert {(e.num_examples, e.seconds, e.detail) for e in entries} == {(0, 0.0, "")}
    assert all("loss" not in round_.metrics for round_ in book.committed_)


def test_too_few_reports_release_nothing_and_cost_nothing():
    run = spec(cohort={"size": 4, "min_reports": 3})
    quiet, private = Fleet(silent={(1, 1): 2, (4, 1): 2}), guard(run)
    verdict, book, _ = train(run, fleet=quiet, private=private)
    assert verdict.outcome == "completed"
    assert [round_.collected.plan.attempt for round_ in book.committed_] == [2, 1, 1, 2, 1, 1]
    assert book.committed_[-1].metrics["epsilon_charged"] == pytest.approx(prepared(run, SIZE).epsilon)
    assert len(book.abandoned_) == 2


def test_the_denominator_is_the_planned_cohort():
    """Two of four answer with 0.25: the mean is an eighth, and the noise is that of four."""
    run = spec({**INDEPENDENT, "noise_multiplier": 1e-6}, rounds=1, cohort={"size": 4})
    private = guard(run, MemoryLedger(Budget("b", 1e15, DELTA)))
    _, book, _ = train(run, fleet=Fleet(silent={(1, 1): 2}), private=private)
    assert_allclose(book.committed_[0].state.model, 0.125, atol=1e-5)


def test_almost_no_noise_gives_the_run_without_privacy():
    """Up to the noise that is left: 1.75 grid steps and a millionth of the clip."""
    run = spec({**INDEPENDENT, "noise_multiplier": 1e-6}, rounds=3)
    _, private, _ = train(run, private=guard(run, MemoryLedger(Budget("b", 1e15, DELTA))))
    bare = run.model_copy(update={"privacy": None})
    _, plain, _ = train(bare)
    assert_allclose(private.committed_[-1].state.model, plain.committed_[-1].state.model, atol=1e-5)


# --- the budget -----------------------------------------------------------------------------------------


def test_a_spent_budget_ends_the_run_and_keeps_the_last_model():
    run = spec(INDEPENDENT)
    three = GdpExact().epsilon({Gaussian(1.0): 3}, DELTA)
    ledger = MemoryLedger(Budget("small", three, DELTA))
    verdict, book, fleet = train(run, private=guard(run, ledger))
    assert verdict.outcome == "exhausted"
    assert "'small'" in verdict.reason
    assert len(book.committed_) == len(fleet.asked) == 3  # nobody was asked for what could not be paid
    assert book.committed_[-1].state.round == 3
    assert ledger.account.spent == pytest.approx(three)


def test_a_run_that_does_not_fit_asks_nobody():
    run = spec()
    verdict, book, fleet = train(run, private=guard(run, MemoryLedger(Budget("small", 0.1, DELTA))))
    assert (verdict.outcome, book.committed_, fleet.asked) == ("exhausted", [], [])


@pytest.mark.parametrize("privacy", [BANDED, INDEPENDENT])
def test_an_attempt_in_doubt_is_charged_again(privacy):
    run = spec(privacy)
    ledger = MemoryLedger(Budget("large", 1e3, DELTA))
    first = guard(run, ledger)
    first.reserve(attempt(run))  # and then the coordinator dies
    assert ledger.in_doubt("run", 1) == 1
    again = guard(run, ledger)
    again.reserve(attempt(run, tries=2))
    mechanism = prepared(run, SIZE).mechanism
    both = {mechanism.charge(1): 1}
    repeated = mechanism.charge(1, repeat=True)
    both[repeated] = both.get(repeated, 0) + 1
    assert ledger.account.spent == pytest.approx(GdpExact().epsilon(both, DELTA))


def test_a_broken_contract_is_charged_upward():
    """The charges together are those of the run as it went, and the next round is refused."""
    run = spec()
    ledger = MemoryLedger(budget_of(run, prepared(run, SIZE), "run"))
    private = guard(run, ledger)
    for number in (1, 2):
        plan = attempt(run, number)
        private.reserve(plan)
        total = Accumulator(plan)
        private.release(plan, total)
        state = private.commit(plan, FLEET[:4])  # the same devices in the very next round
    assert (state.separation, state.times) == (1, 2)
    worse = prepared(run, SIZE).mechanism.event_of(6, 1, 2)
    assert ledger.account.spent == pytest.approx(GdpExact().epsilon({worse: 1}, DELTA), rel=1e-6)
    assert private.metrics()["epsilon_charged"] == pytest.approx(ledger.account.spent)
    with pytest.raises(BudgetRefused, match="more than was planned"):
        private.reserve(attempt(run, 3))


def test_a_ledger_settles_an_attempt_once():
    ledger = MemoryLedger(Budget("b", 10.0, DELTA))
    ledger.reserve("run", 1, 1, Gaussian(2.0))
    with pytest.raises(StateConflict, match="run/1/1"):
        ledger.reserve("run", 1, 1, None)
    ledger.void("run", 1, 1, "nobody came")
    assert ledger.account.events == {}
    with pytest.raises(NotFound, match="run/1/1"):
        ledger.commit("run", 1, 1)
    ledger.reserve("run", 1, 2, Gaussian(2.0))
    ledger.commit("run", 1, 2)
    assert ledger.account.events == {Gaussian(2.0): 1}
    assert not ledger.account.entries  # what is settled is counted, and does not grow


# --- what is committed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("privacy", [BANDED, INDEPENDENT, {**INDEPENDENT, "min_separation": 3}])
def test_a_resumed_run_gives_the_same_bits(privacy):
    run = spec(privacy)
    ready, state, model = prepared(run, SIZE), None, None
    _, whole, _ = train(run, private=guard(run))
    rng = Random(0)
    for _ in range(6):  # one round, then from bytes again
        spent = state.private.charged if state else {}
        private = guard(run, MemoryLedger(budget_of(run, ready, "run"), spent))
        fleet, book = Fleet(), Book()
        campaign = Campaign(run, "run", WORK, fleet, fleet, book, rng, clock=lambda: 0.0, private=private)
        before = state or RunState(np.zeros(SIZE, np.float32))
        campaign.run(before, lambda book=book: bool(book.committed_))
        state = book.committed_[0].state
        state = state.on(private=PrivateState.from_bytes(state.private.to_bytes()))
        model = state.model
    assert_array_equal(model, whole.committed_[-1].state.model)
    assert state.private.took_part == whole.committed_[-1].state.private.took_part
    assert book.committed_[0].metrics == whole.committed_[-1].metrics


def test_who_has_rested_is_forgotten():
    run = spec({**INDEPENDENT, "min_separation": 3}, rounds=30)
    _, book, _ = train(run, private=guard(run))
    kept = [len(round_.state.private.took_part) for round_ in book.committed_]
    assert max(kept) == 8  # those of the last two rounds


def test_remembered_noise_is_sealed_and_bound_to_run_round_and_key():
    run = spec()
    _, book, _ = train(run, private=guard(run), until=2)
    state = book.committed_[-1].state.private
    guard(run).resume(state, 2)
    for wrong, number in ((guard(run), 1), (guard(run, key=simulation_key("other")), 2)):
        with pytest.raises(StateCorrupt, match="does not open"):
            wrong.resume(state, number)
    with pytest.raises(StateCorrupt, match="without a state"):
        guard(run).resume(None, 2)
    assert "noise=" not in repr(state)


@pytest.mark.parametrize(
    "data", [b"", b"{}\n", b'{"format":"other"}\n', b"[]\n", b'{"format":"lepton private rounds 1"}\n']
)
def test_bytes_that_are_no_state_are_refused(data):
    with pytest.raises(StateCorrupt, match="private rounds"):
        PrivateState.from_bytes(data)


# --- the audit ------------------------------------------------------------------------------------------


TRIALS, LENGTH = 20_000, 8


def audited(divisor) -> float:
    """A lower bound on mu of one round: three devices against the canary, with and without it.

    The denominator tells how many have answered if it is not the planned one.
    """
    run = spec({**INDEPENDENT, "noise_multiplier": 2.0}, rounds=1)
    wide = replace(WORK, num_coordinates=TRIALS * LENGTH)
    state = RunState(np.zeros(1, np.float32))
    plan = plan_round(run, "run", wide, "train", 1, state, FLEET[:4], 4, "00")
    canary = np.full(LENGTH, CLIP / run.grid_step / LENGTH**0.5).astype(np.int64)
    scores = []
    for reports, total in ((4, -2 * canary), (3, -3 * canary)):
        added, private = Accumulator(plan), guard(run)
        added.merge(Subtotal(np.tile(total, TRIALS), reports, reports))
        private._noise_key = lambda plan, reports=reports: simulation_key("audit", reports)
        private.reserve(plan)
        mean = divisor(private, plan, added, reports)
        scores.append(mean.reshape(TRIALS, LENGTH) @ (canary / np.linalg.norm(canary)))
    return gdp_lower_bound(*scores)


def test_the_audit_does_not_refute_the_planned_denominator_and_finds_a_wrong_one():
    honest = audited(lambda private, plan, added, reports: private.release(plan, added))
    assert 0.8 / 2 < honest <= 1 / 2

    def by_replies(private, plan, added, reports):
        mean = private.release(plan, added) * 4 / plan.grid_step
        return mean * plan.grid_step / reports

    assert audited(by_replies) > 1 / 2


def test_noise_is_added_to_exact_sums_only():
    run = spec()
    plan = attempt(run)
    median = plan.model_copy(update={"aggregation": AggregationSpec(name="median")})
    with pytest.raises(RunError, match="exact sums"):
        guard(run).release(median, RobustAggregator(median))
    total = np.array([1, -2, 3], np.int64)
    assert_array_equal(scaled(total, 0.5), [0.5, -1.0, 1.5])
