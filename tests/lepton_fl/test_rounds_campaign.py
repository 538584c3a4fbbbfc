"""One attempt, and a whole run, over scripted devices: a bad answer is named, the others are unaffected."""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.plan import CohortSpec, EarlyStop, RoundPlan, RunSpec, ServerOptimizerSpec
from lepton_fl.rounds.campaign import Campaign, RunState, Verdict, Work
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.rounds.collect import (
    ACCEPTED,
    SURPLUS,
    Participation,
    collect_evaluation,
    collect_training,
)
from lepton_fl.rounds.exchange import Answer
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.tasks.metrics import TrainingLoss
from lepton_fl.vector import to_grid, vector_digest
from lepton_fl.wire.messages import EvaluateReply, Failure, Request, Ticket, TrainReply
from lepton_fl.wire.records import Records

SIZE = 4
METRICS = TrainingLoss()  # a task's metrics may be as simple as this
WORK = Work("pkg:task", "1", "ab" * 32, SIZE, METRICS)
FLEET = tuple(f"d{i}" for i in range(5))


def honest(device_id: str, plan: RoundPlan, request: Request) -> Records:
    """Moves towards the device's own point; the loss is the squared distance to it."""
    point = np.full(SIZE, float(device_id[1:]), np.float32)
    distance = float(((request.model - point) ** 2).sum())
    sums = {"loss_sum": np.array([distance * 2]), "examples": np.array([2])}
    ticket = Ticket.of(plan)
    if plan.kind == "evaluate":
        return EvaluateReply(ticket, plan.task_version, 2, sums, 0.1).to_records()
    update = to_grid(plan.local.learning_rate * (point - request.model), plan.grid_step)
    return TrainReply(ticket, plan.task_version, 2, update, sums, 0.1).to_records()


Script = Callable[[str, RoundPlan, Request], Records | UpdateRejected | None]


@dataclass
class Recorded:
    """An exchange that answers from a script; None = silence."""

    script: Script = honest
    extra: list[Answer] = field(default_factory=list)  # come before the cohort's own
    told: list[tuple[str, Rejection | None]] = field(default_factory=list)
    asked: list[RoundPlan] = field(default_factory=list)
    closed: int = 0

    def ask(self, plan: RoundPlan, request: Request) -> Generator[Answer, None, None]:
        self.asked.append(plan)
        try:
            yield from self.extra
            for device_id in plan.cohort:
                records = self.script(device_id, plan, request)
                if records is not None:
                    yield Answer(device_id, records, 100)
        finally:
            self.closed += 1

    def tell(self, plan: RoundPlan, device_id: str, refusal: UpdateRejected | None) -> None:
        self.told.append((device_id, refusal.reason if refusal else None))


def make_plan(kind="train", cohort=FLEET, **changes) -> RoundPlan:
    campaign = Campaign(RunSpec(task="pkg:task"), "run", WORK, Recorded(), Roster(), Book(), Random(0))
    plan = campaign._plan(kind, 1, RunState(np.zeros(SIZE, np.float32)), cohort, len(cohort))
    return plan.model_copy(update=changes)


@dataclass
class Roster:
    candidates_now: list[Candidate] = field(default_factory=lambda: [Candidate(d, "eligible") for d in FLEET])
    waited: list[float] = field(default_factory=list)
    on_wait: Callable[["Roster"], None] = lambda roster: None

    def candidates(self):
        return self.candidates_now

    def wait(self, seconds):
        self.waited.append(seconds)
        self.on_wait(self)


@dataclass
class Book:
    events: list[tuple] = field(default_factory=list)
    states: list[RunState] = field(default_factory=list)
    evaluations: list = field(default_factory=list)

    def planned(self, plan):
        self.events.append(("planned", plan.kind, plan.round, plan.attempt))

    def abandoned(self, collected, cause):
        self.events.append(("abandoned", collected.plan.round, cause))

    def committed(self, round_):
        self.events.append(("committed", round_.state.round))
        self.states.append(round_.state)

    def evaluated(self, evaluation):
        self.events.append(("evaluated", evaluation.state.round))
        self.evaluations.append(evaluation)
        self.states.append(evaluation.state)

    def waiting(self, cause, seconds):
        self.events.append(("waiting", cause))


# --- one attempt --------------------------------------------------------------------------------------


def but(reply: Records, family: str, **changes) -> Records:
    named = {name.replace("_", "-"): value for name, value in changes.items()}
    return replace(reply, **{family: {**getattr(reply, family), **named}})


def overflow(plan: RoundPlan) -> UpdateRejected:
    return UpdateRejected(Rejection.OUT_OF_RANGE, "too far")


BAD = {
    "replayed": (lambda d, p, r: but(honest(d, p, r), "config", round=p.round - 1), Rejection.REPLAYED),
    "other attempt": (lambda d, p, r: but(honest(d, p, r), "config", attempt=9), Rejection.REPLAYED),
    "other run": (lambda d, p, r: but(honest(d, p, r), "config", run_id="x"), Rejection.REPLAYED),
    "wrong version": (
        lambda d, p, r: but(honest(d, p, r), "config", task_version="2"),
        Rejection.WRONG_VERSION,
    ),
    "wrong protocol": (lambda d, p, r: but(honest(d, p, r), "config", protocol=2), Rejection.WRONG_VERSION),
    "too short": (
        lambda d, p, r: but(honest(d, p, r), "arrays", update=np.zeros(SIZE - 1, np.int32)),
        Rejection.WRONG_SHAPE,
    ),
    "floats": (
        lambda d, p, r: but(honest(d, p, r), "arrays", update=np.zeros(SIZE, np.float32)),
        Rejection.WRONG_SHAPE,
    ),
    "nan loss": (
        lambda d, p, r: replace(
            honest(d, p, r), metrics={**honest(d, p, r).metrics, "sum.loss_sum": [float("nan")]}
        ),
        Rejection.NON_FINITE,
    ),
    "unknown metric": (
        lambda d, p, r: replace(honest(d, p, r), metrics={**honest(d, p, r).metrics, "sum.x": [1.0]}),
        Rejection.MALFORMED,
    ),
    "negative count": (
        lambda d, p, r: replace(honest(d, p, r), metrics={**honest(d, p, r).metrics, "sum.examples": [-1]}),
        Rejection.OUT_OF_RANGE,
    ),
    "no examples": (
        lambda d, p, r: replace(honest(d, p, r), metrics={**honest(d, p, r).metrics, "num-examples": 0}),
        Rejection.OUT_OF_RANGE,
    ),
    "nothing": (lambda d, p, r: Records(), Rejection.MALFORMED),
    "its own words": (
        lambda d, p, r: Failure(Ticket.of(p), Rejection.DATA_CONTRACT, "row 3 is NaN").to_records(),
        Rejection.DATA_CONTRACT,
    ),
    "the transport's": (
        lambda d, p, r: UpdateRejected(Rejection.REVOKED, "certificate revoked"),
        Rejection.REVOKED,
    ),
    "silence": (lambda d, p, r: None, Rejection.OFFLINE),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_is_named_and_the_others_count(name):
    bad, reason = BAD[name]
    exchange = Recorded(lambda d, p, r: bad(d, p, r) if d == "d2" else honest(d, p, r))
    collected, mean = collect_training(make_plan(), np.zeros(SIZE, np.float32), exchange)
    others = [d for d in FLEET if d != "d2"]
    assert collected.participation["d2"].outcome == reason.value
    assert [collected.participation[d].outcome for d in others] == [ACCEPTED] * 4
    assert collected.reports == 4
    updates = [to_grid(np.float32([0.1]) * np.float32(d[1:]), 2.0**-24)[0] for d in others]
    assert_array_equal(mean, np.full(SIZE, sum(map(int, updates)) * 2.0**-24 / 4))
    assert collected.sums["examples"] == 8
    told = dict(exchange.told)
    assert told.get("d2") == (None if name == "silence" else reason)
    assert ("d2" in told) == (name != "silence")
    assert [told[d] for d in others] == [None] * 4


@pytest.mark.parametrize("first", ["good", "bad"])
def test_a_second_answer_of_a_device_is_a_duplicate(first):
    plan = make_plan()
    request = Request.of(plan, np.zeros(SIZE, np.float32))
    good = honest("d1", plan, request)
    answer = Answer("d1", good if first == "good" else Records(), 100)
    exchange = Recorded(extra=[answer])
    collected, _ = collect_training(plan, request.model, exchange)
    assert exchange.told[:1] == [("d1", None if first == "good" else Rejection.MALFORMED)]
    assert ("d1", Rejection.DUPLICATE) in exchange.told
    assert collected.participation["d1"].outcome == (ACCEPTED if first == "good" else "malformed")
    assert collected.reports == (5 if first == "good" else 4)
    assert collected.bytes_up == 600


def test_a_stranger_does_not_count_and_takes_no_ones_place():
    plan = make_plan()
    request = Request.of(plan, np.zeros(SIZE, np.float32))
    exchange = Recorded(extra=[Answer("d9", honest("d9", plan, request), 100)])
    collected, _ = collect_training(plan, request.model, exchange)
    assert exchange.told[0] == ("d9", Rejection.NOT_SELECTED)
    assert collected.reports == 5
    assert "d9" not in collected.participation


def test_the_round_closes_when_enough_have_come():
    exchange = Recorded()
    collected, mean = collect_training(make_plan(wanted_reports=3), np.zeros(SIZE, np.float32), exchange)
    outcomes = [collected.participation[d].outcome for d in FLEET]
    assert outcomes == [ACCEPTED] * 3 + [SURPLUS] * 2
    assert exchange.closed == 1
    assert mean is not None


def test_too_few_reports_give_no_mean_and_say_why():
    bad = BAD["nan loss"][0]
    exchange = Recorded(lambda d, p, r: {"d0": honest, "d1": bad}.get(d, lambda *_: None)(d, p, r))
    collected, mean = collect_training(make_plan(min_reports=2), np.zeros(SIZE, np.float32), exchange)
    assert mean is None
    assert collected.summary() == "1 of 5 reports: 1 non finite, 3 offline"


def test_an_exchange_is_closed_when_collecting_fails():
    class Broken(Exception):
        pass

    def script(device_id, plan, request):
        raise Broken

    exchange = Recorded(script)
    with pytest.raises(Broken):
        collect_training(make_plan(), np.zeros(SIZE, np.float32), exchange)
    assert exchange.closed == 1


def test_an_evaluation_adds_counts_and_refuses_the_rest():
    bad = BAD["unknown metric"][0]
    exchange = Recorded(lambda d, p, r: bad(d, p, r) if d == "d0" else honest(d, p, r))
    collected = collect_evaluation(make_plan("evaluate"), np.zeros(SIZE, np.float32), exchange, METRICS)
    assert collected.participation["d0"].outcome == "malformed"
    assert collected.sums["loss_sum"] == 2 * SIZE * (1 + 4 + 9 + 16)
    assert collected.reports == 4


# --- a whole run --------------------------------------------------------------------------------------


class Clock:
    """Goes forward when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def campaign(
    spec: RunSpec, exchange=None, roster=None, book=None, rng=None, work=WORK, clock=None
) -> Campaign:
    clock = clock or Clock()
    roster = roster or Roster()
    before = roster.on_wait

    def on_wait(it: Roster) -> None:
        clock.now += it.waited[-1]
        before(it)

    roster.on_wait = on_wait
    return Campaign(
        spec, "run", work, exchange or Recorded(), roster, book or Book(), rng or Random(7), clock=clock
    )


def start(spec: RunSpec) -> RunState:
    return RunState(np.zeros(SIZE, np.float32), ServerState.initial(spec.server, SIZE))


def spec_of(**changes) -> RunSpec:
    fields = {"task": "pkg:task", "rounds": 4, "cohort": CohortSpec(size=3, min_reports=2, max_attempts=3)}
    return RunSpec(**fields | changes)


def test_a_run_plans_before_it_asks_and_commits_every_round():
    book, exchange = Book(), Recorded()
    verdict = campaign(spec_of(evaluate_every=2), exchange, book=book).run(start(spec_of()))
    assert verdict == Verdict("completed", "All 4 rounds are done.")
    trained = [e for e in book.events if e[0] in ("planned", "committed") and e[1] != "evaluate"]
    assert trained == [e for r in range(1, 5) for e in (("planned", "train", r, 1), ("committed", r))]
    assert [e for e in book.events if e[0] == "evaluated"] == [("evaluated", 2), ("evaluated", 4)]
    assert all(len(plan.cohort) == 3 and set(plan.cohort) <= set(FLEET) for plan in exchange.asked)
    assert len({plan.nonce for plan in exchange.asked}) == 6
    assert exchange.closed == 6


def test_an_abandoned_round_is_tried_again_with_another_cohort():
    seen: list[int] = []

    def flaky(device_id, plan, request):
        if plan.kind == "train" and plan.round == 2 and plan.attempt < 3:
            seen.append(plan.attempt)
            return None
        return honest(device_id, plan, request)

    book, exchange = Book(), Recorded(flaky)
    verdict = campaign(spec_of(evaluate_every=0), exchange, book=book).run(start(spec_of()))
    assert verdict.outcome == "completed"
    assert [e for e in book.events if e[0] == "abandoned"] == [
        ("abandoned", 2, "0 of 3 reports: 3 offline")
    ] * 2
    assert [(p.round, p.attempt) for p in exchange.asked] == [(1, 1), (2, 1), (2, 2), (2, 3), (3, 1), (4, 1)]


def test_a_round_that_fails_too_often_ends_the_run_with_the_cause():
    def failing(device_id, plan, request):
        return None if plan.round == 2 else honest(device_id, plan, request)

    book = Book()
    verdict = campaign(spec_of(evaluate_every=0), Recorded(failing), book=book).run(start(spec_of()))
    assert verdict.outcome == "failed"
    assert (
        "Round 2 was abandoned 3 times in a row; the last time: 0 of 3 reports: 3 offline." in verdict.reason
    )
    assert book.states[-1].round == 1


def test_no_quorum_ends_the_run_with_the_cause():
    standings = ["eligible", "offline", "offline", "data-contract", "wrong-version"]
    roster = Roster([Candidate(d, s) for d, s in zip(FLEET, standings, strict=True)])
    spec = spec_of(cohort=CohortSpec(size=3, min_reports=2, quorum_wait_s=30))
    clock, book = Clock(), Book()
    verdict = campaign(spec, roster=roster, book=book, clock=clock).run(start(spec))
    cause = "1 of 5 eligible (2 needed): 2 offline, 1 data contract, 1 wrong version"
    assert verdict.outcome == "failed"
    assert f"No quorum within 30 s: {cause}." in verdict.reason
    assert book.events == [("waiting", cause)]
    assert 30 <= clock.now < 32


def test_a_quorum_that_comes_late_is_enough():
    roster = Roster([Candidate(d, "offline") for d in FLEET])

    def arrive(it: Roster) -> None:
        if len(it.waited) == 3:
            it.candidates_now = [Candidate(d, "eligible") for d in FLEET]

    roster.on_wait = arrive
    book = Book()
    spec = spec_of(rounds=1)
    assert campaign(spec, roster=roster, book=book).run(start(spec)).outcome == "completed"
    assert book.events[0] == ("waiting", "0 of 5 eligible (2 needed): 5 offline")
    assert book.events[1] == ("waiting", "")


def test_fewer_than_wanted_start_after_the_fill_wait():
    roster = Roster([Candidate("d1", "eligible"), Candidate("d2", "eligible"), Candidate("d3", "offline")])
    spec = spec_of(rounds=1, evaluate_every=0, cohort=CohortSpec(size=3, min_reports=2, fill_wait_s=5))
    exchange, clock = Recorded(), Clock()
    assert campaign(spec, exchange, roster, clock=clock).run(start(spec)).outcome == "completed"
    assert clock.now == pytest.approx(5, abs=1)
    assert set(exchange.asked[0].cohort) == {"d1", "d2"}


def test_over_selection_asks_more_and_keeps_as_many_as_wanted():
    spec = spec_of(rounds=1, evaluate_every=0, cohort=CohortSpec(size=3, over_selection=1.5))
    exchange, book = Recorded(), Book()
    campaign(spec, exchange, book=book).run(start(spec))
    assert len(exchange.asked[0].cohort) == 5
    assert exchange.asked[0].wanted_reports == 3


def test_a_request_to_stop_is_heard_between_rounds_and_while_waiting():
    book = Book()
    spec = spec_of(evaluate_every=0)
    verdict = campaign(spec, book=book).run(start(spec), lambda: len(book.states) == 2)
    assert verdict == Verdict("stopped", "Stopped on request after round 2.")
    roster = Roster([])
    verdict = campaign(spec, roster=roster).run(start(spec), lambda: len(roster.waited) >= 2)
    assert verdict == Verdict("stopped", "Stopped on request in round 1.")


def test_the_best_round_is_kept_and_patience_ends_a_run():
    # The fleet's mean loss falls until the model passes the middle of the fleet, then it rises.
    spec = spec_of(
        rounds=50,
        cohort=CohortSpec(size=5),
        local={"learning_rate": 0.5},
        server=ServerOptimizerSpec(name="fedavgm", momentum=0.9),
        early_stop=EarlyStop(metric="loss", mode="min", patience=2),
    )
    book = Book()
    verdict = campaign(spec, book=book).run(start(spec))
    losses = [e.metrics["loss"] for e in book.evaluations]
    best = int(np.argmin(losses)) + 1
    assert verdict == Verdict("completed", f"No better loss for 2 evaluations; best in round {best}.")
    assert len(losses) == best + 2
    state = book.states[-1]
    assert (state.best.round, state.best.value, state.stale) == (best, min(losses), 2)
    models = {s.round: s.model for s in book.states}
    assert state.best.model_sha256 == vector_digest(models[best])
    assert [e.improved for e in book.evaluations] == [True] * best + [False] * 2


@pytest.mark.parametrize(("mode", "target"), [("min", 20.0), ("max", 10.0)])
def test_a_target_ends_a_run(mode, target):
    spec = spec_of(
        rounds=50, cohort=CohortSpec(size=5), early_stop=EarlyStop(metric="loss", mode=mode, target=target)
    )
    book = Book()
    verdict = campaign(spec, book=book).run(start(spec))
    assert verdict.reason.startswith("Reached loss ")
    last = book.evaluations[-1].metrics["loss"]
    assert last <= target if mode == "min" else last >= target


def test_a_metric_that_the_task_does_not_report_is_named():
    spec = spec_of(early_stop=EarlyStop(metric="beauty"))
    verdict = campaign(spec).run(start(spec))
    assert verdict.outcome == "failed"
    assert "early_stop.metric is 'beauty'; this task reports examples, loss." in verdict.reason


def test_a_fleet_that_is_silent_at_an_evaluation_does_not_end_the_run():
    def silent(device_id, plan, request):
        return None if plan.kind == "evaluate" else honest(device_id, plan, request)

    work = replace(
        WORK, evaluate_centrally=lambda model: {"loss_sum": np.array([1.0]), "examples": np.array([1])}
    )
    book = Book()
    spec = spec_of(early_stop=EarlyStop(metric="loss", patience=1))
    assert campaign(spec, Recorded(silent), book=book, work=work).run(start(spec)).outcome == "completed"
    assert [dict(e.metrics) for e in book.evaluations] == [{"central_loss": 1.0, "central_examples": 1.0}] * 4


@pytest.mark.parametrize("on_devices", [True, False])
def test_central_evaluation_is_judged_where_devices_do_not_evaluate(on_devices):
    work = replace(
        WORK,
        evaluate_on_devices=on_devices,
        evaluate_centrally=lambda model: {
            "loss_sum": np.array([float(model.sum())]),
            "examples": np.array([1]),
        },
    )
    book = Book()
    spec = spec_of(early_stop=EarlyStop(metric="loss", mode="max"))
    campaign(spec, book=book, work=work).run(start(spec))
    name = "loss" if on_devices else "central_loss"
    assert book.states[-1].best.value == max(e.metrics[name] for e in book.evaluations)


def test_a_model_that_leaves_the_finite_numbers_ends_the_run_and_is_not_kept():
    spec = spec_of(
        server=ServerOptimizerSpec(learning_rate=3e38), evaluate_every=0, local={"learning_rate": 10}
    )
    book = Book()
    verdict = campaign(spec, book=book).run(start(spec))
    assert verdict.outcome == "failed"
    assert "non-finite weights; it is not kept" in verdict.reason
    assert not any(np.isinf(s.model).any() for s in book.states)


class Killed(BaseException):
    """As abrupt as kill -9, seen from inside."""


@pytest.mark.parametrize("server", ["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"])
@pytest.mark.parametrize("kill_at", [("train", 2), ("evaluate", 2), ("train", 3)])
def test_a_run_that_was_killed_continues_bit_for_bit(server, kill_at):
    spec = spec_of(rounds=5, server=ServerOptimizerSpec(name=server, learning_rate=0.1))
    undisturbed = Book()
    campaign(spec, book=undisturbed).run(start(spec))

    saved = {}

    class Saving(Book):
        def committed(self, round_):
            super().committed(round_)
            saved["state"], saved["rng"] = round_.state, rng.getstate()

        def evaluated(self, evaluation):
            super().evaluated(evaluation)
            saved["state"], saved["rng"] = evaluation.state, rng.getstate()

    def dying(device_id, plan, request):
        if (plan.kind, plan.round) == kill_at and device_id == plan.cohort[1]:
            raise Killed
        return honest(device_id, plan, request)

    rng = Random(7)
    with pytest.raises(Killed):
        campaign(spec, Recorded(dying), book=Saving(), rng=rng).run(start(spec))

    rng.setstate(saved["rng"])
    book = Book()
    assert campaign(spec, book=book, rng=rng).run(saved["state"]).outcome == "completed"
    last, expected = book.states[-1], undisturbed.states[-1]
    assert_array_equal(last.model, expected.model)
    assert (last.round, last.best, last.stale) == (expected.round, expected.best, expected.stale)
    for name, slot in expected.server.slots.items():
        assert_array_equal(last.server.slots[name], slot)
    first = saved["state"].round + 1
    assert [e[1] for e in book.events if e[0] == "committed"] == list(range(first, 6))


def test_the_schedule_reaches_the_devices():
    spec = spec_of(
        rounds=3,
        evaluate_every=0,
        schedule={"kind": "exponential", "decay": 0.5},
        local={"learning_rate": 0.8},
    )
    exchange = Recorded()
    campaign(spec, exchange).run(start(spec))
    assert [p.local.learning_rate for p in exchange.asked] == [0.8, 0.4, 0.2]


def test_closing_is_enough_to_withdraw():
    exchange = Recorded()
    plan = make_plan()
    with closing(exchange.ask(plan, Request.of(plan, np.zeros(SIZE, np.float32)))) as answers:
        next(answers)
    assert exchange.closed == 1


def test_a_cohort_that_another_run_takes_is_drawn_again_within_the_quorums_bound():
    now = [0.0]

    def pass_time(roster):
        now[0] += roster.waited[-1]

    spec = RunSpec(task="pkg:task", rounds=1, cohort=CohortSpec(size=2, quorum_wait_s=30.0))
    for lost_claims, outcome in ((3, "completed"), (10**9, "failed")):
        claims = []
        roster = Roster(on_wait=pass_time)

        def claim(cohort, claims=claims, lost_claims=lost_claims):
            claims.append(cohort)
            return len(claims) > lost_claims

        campaign = Campaign(
            spec, "run", WORK, Recorded(), roster, Book(), Random(0), claim=claim, clock=lambda: now[0]
        )
        verdict = campaign.run(RunState(np.zeros(SIZE, np.float32)))
        assert verdict.outcome == outcome, verdict
        assert len(roster.waited) >= min(lost_claims, 20)  # it never spins


def test_a_cohort_that_another_run_took_meanwhile_costs_no_attempt():
    roster, claims = Roster(), []

    def claim(cohort):
        claims.append(cohort)
        taken = len(claims) < 3  # somebody was faster, twice
        roster.candidates_now = [Candidate(d, "busy" if taken and d in cohort else "eligible") for d in FLEET]
        return not taken

    book = Book()
    made = campaign(spec_of(rounds=1, evaluate_every=0), roster=roster, book=book)
    made.claim = claim
    assert made.run(start(spec_of())).outcome == "completed"
    assert len(claims) == 3
    assert [e for e in book.events if e[0] == "planned"] == [("planned", "train", 1, 1)]


def test_a_cause_that_keeps_changing_is_shown_now_and_then_and_the_last_one_stays():
    roster = Roster([Candidate(d, "offline") for d in FLEET])

    def flap(it: Roster) -> None:
        seconds = len(it.waited)
        standing = ("offline", "busy")[min(seconds, 7) % 2]
        it.candidates_now = [Candidate(d, standing) for d in FLEET]

    roster.on_wait = flap
    book, spec = Book(), spec_of(cohort=CohortSpec(size=3, quorum_wait_s=30))
    campaign(spec, roster=roster, book=book).run(start(spec))
    shown = [e[1] for e in book.events]
    assert len(shown) == 2
    assert shown[-1].endswith("5 busy")


@dataclass
class Hides:
    """Secure rounds of which some give no sum after signatures were asked for."""

    burnt: set[int]
    word: Rejection = Rejection.OFFLINE  # of the devices that bring nothing
    plans: list[RoundPlan] = field(default_factory=list)

    def collect(self, plan, request, exchange, clock, finish=None):
        self.plans.append(plan)
        collected, mean = collect_training(plan, request.model, exchange)
        if plan.round in self.burnt:
            collected.burnt = True
            first = plan.cohort[0]
            collected.participation[first] = Participation(first, self.word.value)
            return collected, None
        return collected, mean


def secret_spec(**changes):
    secure = {"secure_aggregation": "required", "secure": {"min_cohort": 4}, "weighting": "equal"}
    return spec_of(**secure, clip_norm=100.0, cohort=CohortSpec(size=5, min_reports=4), **changes)


def test_a_round_whose_survivors_have_signed_is_never_tried_again():
    secure = Hides({2})
    book = Book()
    run = campaign(secret_spec(rounds=4), book=book)
    run.secure = secure
    verdict = run.run(start(run.spec))
    assert verdict.outcome == "completed"
    assert [(p.round, p.attempt) for p in secure.plans] == [(1, 1), (2, 1), (3, 1), (4, 1)]
    assert [e for e in book.events if e[0] == "committed"] == [("committed", n) for n in (1, 3, 4)]
    assert secure.plans[2].model_sha256 == secure.plans[1].model_sha256  # nothing was learnt in round 2


def test_rounds_that_keep_giving_nothing_end_the_run():
    run = campaign(secret_spec(rounds=100))
    run.secure = Hides(set(range(100)))
    verdict = run.run(start(run.spec))
    assert verdict.outcome == "failed"
    assert "rounds in a row gave no sum" in verdict.reason
    assert len(run.secure.plans) == run.spec.cohort.max_attempts


def test_a_restored_run_passes_over_any_number_of_rounds_that_it_has_lost():
    run = campaign(secret_spec(rounds=20))
    run.secure = Hides(set(range(2, 20)), Rejection.SIGNED_BEFORE)
    assert run.run(start(run.spec)).outcome == "completed"
    assert [(p.round, p.attempt) for p in run.secure.plans] == [(n, 1) for n in range(1, 21)]
    assert len({p.model_sha256 for p in run.secure.plans}) == 2


def test_an_attempt_that_a_restart_cut_off_is_gone_on_with_and_not_planned_again():
    spec = secret_spec(rounds=2)
    plan = campaign(spec)._plan("train", 1, start(spec).on(attempt=3), FLEET, 5)
    book = Book()
    run = campaign(spec, book=book)
    run.secure, run.unfinished = Hides(set()), plan
    assert run.run(start(spec).on(attempt=3)).outcome == "completed"
    assert run.secure.plans[0] == plan
    assert [e[2:] for e in book.events if e[0] == "planned"] == [(2, 1)]
