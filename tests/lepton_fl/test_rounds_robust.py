"""A minority of bad updates does not steer a round; the rules are the papers', in any order of arrival."""

from collections.abc import Generator
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from pydantic import ValidationError
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

from lepton_fl.errors import RunError, UpdateRejected
from lepton_fl.plan import AggregationSpec, LocalPlan, RoundPlan, RunSpec
from lepton_fl.rounds import robust
from lepton_fl.rounds.accumulator import Accumulator, Subtotal, UpdateBatch
from lepton_fl.rounds.campaign import Campaign, RunState, Work, plan_round
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.rounds.collect import collect_training, make_aggregator
from lepton_fl.rounds.exchange import AddedUp, Answer, Report
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.rounds.robust import RobustAggregator
from lepton_fl.tasks.metrics import TrainingLoss
from lepton_fl.wire.messages import Request, Ticket, TrainReply

INT32 = 2**31 - 1
RULES = tuple(robust.RULES)


def plan(size: int, name: str = "median", reports: int = 50, step: float = 1.0, **rule) -> RoundPlan:
    return RoundPlan(
        run_id="r",
        round=1,
        attempt=1,
        kind="train",
        task="m:t",
        task_version="1",
        layout_digest="0" * 64,
        num_coordinates=size,
        model_sha256="0" * 64,
        cohort=("a",),
        wanted_reports=reports,
        min_reports=1,
        deadline_s=1.0,
        local=LocalPlan(),
        weighting="equal",
        max_weight=2**20,
        grid_step=step,
        aggregation=AggregationSpec(name=name, **rule),
        nonce="n",
    )


def aggregate(updates, name: str, step: float = 1.0, **rule) -> np.ndarray:
    rows = np.asarray(updates, np.int32)
    aggregator = RobustAggregator(plan(rows.shape[1], name, len(rows), step, **rule))
    for row in rows:
        aggregator.add(UpdateBatch(row[None], np.array([3], np.int64)))
    return aggregator.finalize()


# --- known answers -----------------------------------------------------------------------------------------


def test_the_median_of_an_odd_and_of_an_even_number():
    assert_array_equal(aggregate([[1, 9], [2, -5], [30, 4]], "median"), [2, 4])
    assert_array_equal(aggregate([[1, 9], [2, -5], [30, 4], [5, 5]], "median", step=0.5), [1.75, 2.25])


def test_the_median_of_the_largest_integers_does_not_overflow():
    assert_array_equal(aggregate([[INT32]] * 3 + [[INT32 - 1]] * 3, "median"), [INT32 - 0.5])


def test_the_trimmed_mean_leaves_out_the_extremes():
    updates = [[100], [1], [2], [3], [-100]]
    assert_array_equal(aggregate(updates, "trimmed_mean", trim=0.2), [2])
    assert_array_equal(aggregate(updates, "trimmed_mean", trim=0.0), [1.2])
    # A share is rounded up to whole reports: one of five would be too few for 21 %.
    assert_array_equal(aggregate(updates, "trimmed_mean", trim=0.21), [2])


def test_krum_takes_one_update_of_the_crowd():
    crowd = [[0, 0], [1, 0], [0, 1], [1, 1], [2, 2]]
    far = [[100, 100], [-100, 50]]
    # n = 7, f = 2: the sum over the three nearest others is 4 for each corner of the square, 12 for (2, 2).
    result = aggregate([*crowd, *far], "krum", malicious=0.2)
    assert result.tolist() in ([0, 0], [1, 0], [0, 1], [1, 1])
    assert_array_equal(aggregate([*far, *crowd[::-1]], "krum", malicious=0.2), result)


def test_multi_krum_is_the_mean_of_all_but_the_worst():
    crowd = [[0, 0], [1, 0], [0, 1], [1, 1], [3, 3]]
    far = [[100, 100], [-100, 50]]
    assert_allclose(aggregate([*crowd, *far], "multi_krum", malicious=0.2), [1, 1])


def test_colluders_that_stand_together_are_not_taken_by_krum():
    """Three equal updates have no distance between them, but each needs more neighbours than that."""
    rng = np.random.default_rng(1)
    honest = rng.integers(-100, 100, (12, 6))
    together = np.tile([[10_000] * 6], (3, 1))
    result = aggregate([*honest, *together], "krum", malicious=0.2)
    assert np.abs(result).max() < 100


def test_the_geometric_median_of_points_on_a_line_is_the_middle_one():
    assert_allclose(aggregate([[0], [1_000], [50_000]], "geometric_median"), [1_000], atol=1e-3)


def test_the_geometric_median_of_a_triangle_is_its_fermat_point():
    corners = 1000 * np.array([[0, 0], [2, 0], [1, np.sqrt(3)]])
    assert_allclose(aggregate(np.round(corners), "geometric_median"), [1000, 1000 / np.sqrt(3)], atol=0.5)


# --- wrong answers that a slip would give ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("median", [4, 13]),  # the mean
        ("trimmed_mean", [4, 13]),  # nothing trimmed
        ("krum", [40, 100]),  # the outlier
        ("multi_krum", [4, 13]),
        ("geometric_median", [4, 13]),
    ],
)
def test_no_rule_gives_the_mean_where_one_of_ten_is_far_away(name, wrong):
    updates = [[0, 3], [0, 4], [0, 3], [0, 3], [0, 4], [0, 3], [0, 3], [0, 4], [0, 3], [40, 100]]
    assert np.linalg.norm(aggregate(updates, name) - wrong) > 5


# --- against other implementations -------------------------------------------------------------------------

small = st.integers(-(2**20), 2**20)
matrices = st.integers(5, 15).flatmap(
    lambda n: st.integers(1, 6).flatmap(
        lambda p: st.lists(st.lists(small, min_size=p, max_size=p), min_size=n, max_size=n)
    )
)


@given(matrices)
@settings(deadline=None)
def test_the_median_is_that_of_numpy(updates):
    assert_array_equal(aggregate(updates, "median"), np.median(updates, axis=0))


@given(matrices, st.sampled_from([0.0, 0.1, 0.2, 0.3]))
@settings(deadline=None)
def test_the_trimmed_mean_is_that_of_sorted_columns(updates, trim):
    cut = int(np.ceil(trim * len(updates) - 1e-9))
    inner = np.sort(updates, axis=0)[cut : len(updates) - cut]
    assert_allclose(aggregate(updates, "trimmed_mean", trim=trim), inner.mean(axis=0), rtol=1e-15, atol=1e-9)


def krum_scores(rows: np.ndarray, bad: int) -> np.ndarray:
    """As the paper writes it."""
    square = cdist(rows, rows, "sqeuclidean")
    return np.array([np.sort(np.delete(row, i))[: len(rows) - bad - 2].sum() for i, row in enumerate(square)])


@given(matrices, st.sampled_from([0.0, 0.1]))
@settings(deadline=None)
def test_krum_takes_a_lowest_score_and_multi_krum_the_mean_of_the_lowest(updates, malicious):
    rows = np.asarray(updates, np.float64)
    bad = int(np.ceil(malicious * len(rows) - 1e-9))
    scores = krum_scores(rows, bad)
    best = np.flatnonzero(scores <= scores.min() * (1 + 1e-12))
    assert aggregate(updates, "krum", malicious=malicious).tolist() in rows[best].tolist()
    order = np.argsort(scores)
    kept = len(rows) - bad
    if kept == len(rows) or scores[order[kept]] > scores[order[kept - 1]] * (1 + 1e-12):  # no tie at the cut
        expected = rows[order[:kept]].mean(axis=0)
        assert_allclose(aggregate(updates, "multi_krum", malicious=malicious), expected, atol=1e-6)


def distances(point: np.ndarray, rows: np.ndarray) -> float:
    return float(np.linalg.norm(rows - point, axis=1).sum())


@given(matrices)
@settings(deadline=None, max_examples=40)
def test_no_point_has_a_smaller_sum_of_distances_than_the_geometric_median(updates):
    rows = np.asarray(updates, np.float64)
    ours = aggregate(updates, "geometric_median")
    found = minimize(distances, rows.mean(axis=0), args=(rows,), method="Nelder-Mead", tol=1e-9)
    best = min(float(found.fun), *(distances(row, rows) for row in rows))
    assert distances(ours, rows) <= best * (1 + 1e-4) + 1e-3


@given(matrices, st.sampled_from([1.0, 2.0**11]))
@settings(deadline=None)
def test_inner_products_are_exact(updates, scale):
    """Small integers go through one product, large ones through three; both are checked against Python's."""
    rows = (np.asarray(updates) * scale).clip(-INT32, INT32).astype(np.int32)
    exact = [[sum(int(a) * int(b) for a, b in zip(r, s, strict=True)) for s in rows] for r in rows]
    assert_allclose(robust._inner_products(rows), np.array(exact, np.float64), rtol=1e-15)


# --- properties --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("scale", [1.0, 2.0**12])
def test_the_order_of_arrival_does_not_matter_to_the_last_bit(name, scale):
    rng = np.random.default_rng(3)
    updates = (rng.standard_normal((21, 333)) * 2**18 * scale).clip(-INT32, INT32).astype(np.int32)
    updates[4] = updates[9]  # equal updates, too
    first = aggregate(updates, name, 2.0**-24)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(updates))
        assert_array_equal(aggregate(updates[order], name, 2.0**-24), first)


@pytest.mark.parametrize("name", RULES)
def test_blocks_and_batches_do_not_matter(name, monkeypatch):
    rng = np.random.default_rng(5)
    updates = rng.integers(-(2**20), 2**20, (13, 1000), np.int32)
    whole = aggregate(updates, name)
    monkeypatch.setattr(robust, "_ELEMENTS", 1)  # the narrowest blocks
    aggregator = RobustAggregator(plan(1000, name, 13))
    for part in (slice(0, 4), slice(4, 4), slice(4, 13)):
        aggregator.add(UpdateBatch(updates[part], np.ones(len(updates[part]), np.int64)))
    assert_allclose(aggregator.finalize(), whole, rtol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_equal_updates_come_out_as_they_are(name):
    update = np.array([5, -7, 2**20, 0])
    assert_allclose(aggregate(np.tile(update, (9, 1)), name), update, rtol=1e-14)


@pytest.mark.parametrize("name", RULES)
def test_moving_all_updates_moves_the_result(name):
    rng = np.random.default_rng(8)
    updates, shift = rng.integers(-1000, 1000, (11, 7)), np.array([3, -5, 0, 10**6, 1, 2, 7])
    moved = aggregate(updates + shift, name) - shift
    assert_allclose(moved, aggregate(updates, name), atol=0.05)


# --- the breakdown point -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("attack", [INT32, -INT32, 50_000])
@pytest.mark.parametrize("reports", [10, 25])
def test_a_fifth_of_bad_updates_breaks_the_mean_and_no_rule(name, attack, reports):
    rng = np.random.default_rng(reports)
    honest = rng.normal(1000, 100, (reports, 40)).astype(np.int32)
    bad = honest.copy()
    bad[: reports // 5] = attack
    rule = {"trim": 0.2} if name == "trimmed_mean" else {}
    clean, attacked = aggregate(honest, name, **rule), aggregate(bad, name, **rule)
    mean = honest.mean(axis=0)
    spread = np.linalg.norm(honest - mean, axis=1).mean()
    assert np.linalg.norm(bad.mean(axis=0) - mean) > 10 * spread  # what the mean becomes
    assert np.linalg.norm(attacked - mean) < 1.5 * spread
    # Without attackers all but Krum, which takes one single update, are close to the mean.
    assert np.linalg.norm(clean - mean) < (1.5 if name == "krum" else 0.6) * spread


@pytest.mark.parametrize("name", ["median", "geometric_median"])
def test_a_median_breaks_at_one_half_and_not_before(name):
    for bad, holds in ((10, True), (11, False)):
        updates = np.full((21, 3), 7, np.int32)
        updates[:bad] = INT32
        assert (np.abs(aggregate(updates, name)).max() < 10_000) == holds


def test_trimming_breaks_above_its_share():
    for bad, holds in ((4, True), (5, False)):
        updates = np.full((20, 3), 7, np.int32)
        updates[:bad] = INT32
        result = aggregate(updates, "trimmed_mean", trim=0.2)
        assert (np.abs(result).max() < 10_000) == holds


# --- bounds ------------------------------------------------------------------------------------------------


def holds(spec: AggregationSpec, reports: int) -> bool:
    """What the papers ask for."""
    bad = spec.withstands(reports)
    return reports > 2 * bad + (2 if "krum" in spec.name else 0)


@given(st.sampled_from(["trimmed_mean", "krum", "multi_krum"]), st.floats(0, 0.49))
@settings(deadline=None)
def test_the_least_number_of_reports_is_enough_and_so_is_every_larger_one(name, share):
    spec = AggregationSpec(name=name, trim=share, malicious=share)
    least = spec.least_reports
    assert all(holds(spec, reports) for reports in range(least, least + 300))
    assert least == 1 or not holds(spec, least - 1)
    assert -1e-6 < spec.withstands(100) - share * 100 < 1 + 1e-6


@pytest.mark.parametrize(("share", "least"), [(0.0, 3), (0.1, 5), (0.2, 7), (0.3, 9)])
def test_krum_needs_more_than_two_f_plus_two(share, least):
    assert AggregationSpec(name="krum", malicious=share).least_reports == least


def test_too_few_reports_are_refused_and_named():
    aggregator = RobustAggregator(plan(2, "krum", 20))
    aggregator.add(UpdateBatch(np.ones((6, 2), np.int32), np.ones(6, np.int64)))
    with pytest.raises(RunError, match="6 reports came, 'krum' needs at least 7"):
        aggregator.finalize()


def test_a_sum_is_refused():
    with pytest.raises(RunError, match="A sum of 3 updates came, but 'median' needs each one"):
        RobustAggregator(plan(2)).merge(Subtotal(np.zeros(2, np.int64), 3, 3))


@pytest.mark.parametrize(
    ("updates", "counts", "message"),
    [
        (np.zeros((1, 3), np.int32), [1], r"shape \(1, 2\)"),
        (np.zeros((1, 2), np.float32), [1], "float32"),
        (np.zeros((2, 2), np.int32), [1, 0], "num_examples is 0"),
    ],
)
def test_what_is_refused_changes_nothing(updates, counts, message):
    aggregator = RobustAggregator(plan(2))
    aggregator.add(UpdateBatch(np.full((3, 2), 5, np.int32), np.ones(3, np.int64)))
    with pytest.raises(UpdateRejected, match=message):
        aggregator.add(UpdateBatch(updates, np.asarray(counts, np.int64)))
    assert aggregator.reports == 3
    assert_array_equal(aggregator.finalize(), [5, 5])


def test_more_reports_than_planned_are_refused():
    aggregator = RobustAggregator(plan(2, reports=3))
    with pytest.raises(RunError, match="4 reports came, the plan wants 3"):
        aggregator.add(UpdateBatch(np.zeros((4, 2), np.int32), np.ones(4, np.int64)))


def test_what_does_not_fit_half_of_the_memory_is_refused_before_anybody_is_asked(monkeypatch):
    monkeypatch.setattr(robust, "machine_memory", lambda: 2**20)
    RobustAggregator(plan(1000, reports=100))  # 0.4 of a mebibyte
    with pytest.raises(RunError, match=r"keeps 200 updates of 1000 coordinates: 1 MiB; half .* is 0 MiB"):
        RobustAggregator(plan(1000, reports=200))


def test_krum_counts_its_table_of_distances():
    assert (
        robust.memory_needed(plan(10, "krum", 1000)) > 24e6 > robust.memory_needed(plan(10, "median", 1000))
    )


def test_this_machine_has_memory():
    assert 2**26 < robust.machine_memory() < 2**50


def test_the_plan_says_which_aggregator():
    assert isinstance(make_aggregator(plan(2, "krum")), RobustAggregator)
    assert isinstance(make_aggregator(plan(2, "mean")), Accumulator)


# --- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_example_counts_do_not_go_with_a_robust_rule(name):
    with pytest.raises(ValidationError, match="set weighting='equal'"):
        RunSpec(task="m:t", aggregation={"name": name})
    RunSpec(task="m:t", aggregation={"name": name}, weighting="equal")


def test_a_cohort_that_could_never_do_is_refused():
    with pytest.raises(ValidationError, match=r"'krum' needs 7 reports, cohort.size=5"):
        RunSpec(task="m:t", aggregation={"name": "krum"}, weighting="equal", cohort={"size": 5})


# --- in a round --------------------------------------------------------------------------------------------

SIZE = 4
WORK = Work("pkg:task", "1", "ab" * 32, SIZE, TrainingLoss())
FLEET = tuple(f"d{i}" for i in range(10))


class Fleet:
    """Everybody moves by +1 but the attackers, who say -1000, and those who stay silent."""

    def __init__(self, attackers: int = 0, silent: int = 0, added_up: bool = False) -> None:
        self.attackers, self.silent, self.added_up = attackers, silent, added_up

    def candidates(self) -> list[Candidate]:
        return [Candidate(d, "eligible") for d in FLEET]

    def wait(self, seconds: float) -> None: ...

    def ask(self, plan: RoundPlan, request: Request) -> Generator[Answer | AddedUp, None, None]:
        sums = {"loss_sum": np.array([1.0]), "examples": np.array([1])}
        if self.added_up:
            report = Report(plan.cohort[0], 1, 0.1, 10)
            yield AddedUp((report,), sums, Subtotal(np.zeros(SIZE, np.int64), 1, 1))
        for device_id in plan.cohort:
            if int(device_id[1:]) < self.silent:
                continue
            bad = int(device_id[1:]) >= len(FLEET) - self.attackers
            update = np.full(SIZE, int((-1000 if bad else 1) / plan.grid_step), np.int64)
            update = update.clip(-INT32, INT32).astype(np.int32)
            reply = TrainReply(Ticket.of(plan), plan.task_version, 1, update, sums, 0.1)
            yield Answer(device_id, reply.to_records(), 100)

    def tell(self, plan: RoundPlan, device_id: str, refusal: UpdateRejected | None) -> None: ...


class Notes:
    """A book that keeps the last state and the causes."""

    def __init__(self) -> None:
        self.state: RunState | None = None
        self.causes: list[str] = []

    def committed(self, round_) -> None:
        self.state = round_.state

    def abandoned(self, collected, cause) -> None:
        self.causes.append(cause)

    def planned(self, plan) -> None: ...
    def evaluated(self, evaluation) -> None: ...
    def waiting(self, cause, seconds) -> None: ...


def run(fleet: Fleet, rule: str, trim: float = 0.2, **cohort) -> tuple[str, Notes]:
    spec = RunSpec(
        task="pkg:task",
        rounds=1,
        aggregation={"name": rule, "trim": trim},
        weighting="equal",
        evaluate_every=0,
        cohort={"size": 10, "max_attempts": 2, **cohort},
    )
    notes = Notes()
    campaign = Campaign(spec, "r", WORK, fleet, fleet, notes, Random(0))
    state = RunState(np.zeros(SIZE, np.float32), ServerState.initial(spec.server, SIZE))
    return campaign.run(state).outcome, notes


@pytest.mark.parametrize("rule", RULES)
def test_a_round_withstands_attackers(rule):
    outcome, notes = run(Fleet(attackers=2), rule)
    assert outcome == "completed"
    assert_allclose(notes.state.model, np.ones(SIZE), atol=1e-3)
    _, notes = run(Fleet(attackers=2), "mean")
    assert notes.state.model.max() < -20


@pytest.mark.parametrize(("rule", "needed"), [("krum", 7), ("median", 3)])
def test_too_few_reports_abandon_the_round_by_name(rule, needed):
    outcome, notes = run(Fleet(silent=11 - needed), rule)
    assert outcome == "failed"
    assert notes.state is None
    there = needed - 1
    assert notes.causes == [f"{there} of 10 reports ({rule} needs {needed}): {10 - there} offline"] * 2
    assert run(Fleet(silent=10 - needed), rule)[0] == "completed"


def test_a_sum_ends_a_robust_run():
    outcome, notes = run(Fleet(added_up=True), "median")
    assert (outcome, notes.state) == ("failed", None)


def test_an_evaluation_needs_no_more_reports_than_before():
    spec = RunSpec(task="pkg:task", aggregation={"name": "krum"}, weighting="equal")
    state = RunState(np.zeros(SIZE, np.float32))
    plans = [plan_round(spec, "r", WORK, k, 1, state, FLEET[:2], 2, "n") for k in ("train", "evaluate")]
    assert [p.min_reports for p in plans] == [7, 1]
    collected, update = collect_training(plans[0], state.model, Fleet())
    assert (collected.reports, update) == (2, None)
