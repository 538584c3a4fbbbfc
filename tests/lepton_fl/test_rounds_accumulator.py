"""The streaming sum is exact, whatever the order and the batching, up to its bounds."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from lepton_fl.errors import Rejection, RunError, UpdateRejected
from lepton_fl.plan import LocalPlan, RoundPlan, RunSpec
from lepton_fl.rounds import accumulator as module
from lepton_fl.rounds.accumulator import Accumulator, UpdateBatch
from lepton_fl.vector import check_norm, encode

INT32 = 2**31 - 1


def plan(size: int, **changes) -> RoundPlan:
    fields = {
        "run_id": "r",
        "round": 1,
        "attempt": 1,
        "kind": "train",
        "task": "m:t",
        "task_version": "1",
        "layout_digest": "0" * 64,
        "num_coordinates": size,
        "model_sha256": "0" * 64,
        "cohort": ("a",),
        "wanted_reports": 1,
        "min_reports": 1,
        "deadline_s": 1.0,
        "local": LocalPlan(),
        "weighting": "examples",
        "max_weight": 2**20,
        "grid_step": 2.0**-24,
        "nonce": "n",
    }
    return RoundPlan(**fields | changes)


def batch(updates, counts) -> UpdateBatch:
    return UpdateBatch(np.asarray(updates, np.int32), np.asarray(counts, np.int64))


def mean_of(batches, the_plan) -> np.ndarray:
    accumulator = Accumulator(the_plan)
    for each in batches:
        accumulator.add(each)
    return accumulator.finalize()


@st.composite
def cohorts(draw):
    reports, size = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    coordinate = st.integers(-INT32, INT32)
    updates = draw(
        st.lists(st.lists(coordinate, min_size=size, max_size=size), min_size=reports, max_size=reports)
    )
    counts = draw(st.lists(st.integers(1, 2**40), min_size=reports, max_size=reports))
    order = draw(st.permutations(range(reports)))
    cut = draw(st.integers(0, reports))
    return updates, counts, order, cut


@given(cohorts(), st.sampled_from(["examples", "equal"]))
@settings(deadline=None)
def test_the_mean_is_the_rational_one_whatever_order_and_batching(cohort, weighting):
    updates, counts, order, cut = cohort
    the_plan = plan(len(updates[0]), weighting=weighting)
    all_at_once = mean_of([batch(updates, counts)], the_plan)
    one_by_one = mean_of([batch([updates[i]], [counts[i]]) for i in order], the_plan)
    in_two = mean_of(
        [
            batch([updates[i] for i in part], [counts[i] for i in part])
            for part in (order[:cut], order[cut:])
            if part
        ],
        the_plan,
    )
    assert_array_equal(one_by_one, all_at_once)
    assert_array_equal(in_two, all_at_once)
    weights = [min(c, 2**20) if weighting == "examples" else 1 for c in counts]
    for column, value in enumerate(all_at_once):
        total = sum(w * u[column] for w, u in zip(weights, updates, strict=True))
        # One rounding of the integer to float64, one of the factor, one of the product.
        exact = Fraction(total, sum(weights)) / 2**24
        assert abs(Fraction(float(value)) - exact) <= abs(exact) * Fraction(4, 2**53)


def test_the_largest_allowed_cohort_does_not_overflow():
    spec = RunSpec(task="m:t", max_weight=2**24, cohort={"size": 255})
    accumulator = Accumulator(plan(2, max_weight=spec.max_weight))
    extreme = batch([[INT32, -INT32]] * 255, [2**40] * 255)
    accumulator.add(extreme)
    assert_array_equal(accumulator.finalize(), [INT32 * 2.0**-24, -INT32 * 2.0**-24])


def test_a_cohort_whose_sum_could_overflow_is_refused_before_it_starts():
    with pytest.raises(ValueError, match="exact sum could overflow; lower max_weight to"):
        RunSpec(task="m:t", max_weight=2**24, cohort={"size": 300})
    RunSpec(task="m:t", max_weight=2**24, cohort={"size": 300}, weighting="equal")  # weight 1 each: fits


def test_weights_above_the_bound_count_as_the_bound():
    heavy = mean_of([batch([[0], [4]], [1, 10**9])], plan(1, max_weight=3, grid_step=1.0))
    assert_array_equal(heavy, [3.0])


def test_blocks_do_not_matter(monkeypatch):
    rng = np.random.default_rng(0)
    updates, counts = rng.integers(-INT32, INT32, (3, 100)), [1, 5, 2]
    whole = mean_of([batch(updates, counts)], plan(100))
    monkeypatch.setattr(module, "BLOCK", 7)
    assert_array_equal(mean_of([batch(updates, counts)], plan(100)), whole)


@pytest.mark.parametrize(
    ("updates", "counts", "message"),
    [
        (np.zeros((1, 3), np.int32), [1], r"shape \(1, 2\)"),
        (np.zeros((2, 2), np.int32), [1], r"shape \(1, 2\)"),
        (np.zeros((1, 2), np.int64), [1], "int64"),
        (np.zeros((1, 2), np.float32), [1], "float32"),
        (np.zeros((2, 2), np.int32), [1, 0], "num_examples is 0"),
        (np.zeros((2, 2), np.int32), [-5, 1], "num_examples is -5"),
    ],
)
def test_what_is_refused_changes_nothing(updates, counts, message):
    accumulator = Accumulator(plan(2, grid_step=1.0))
    accumulator.add(batch([[2, 4]], [1]))
    with pytest.raises(UpdateRejected, match=message):
        accumulator.add(UpdateBatch(updates, np.asarray(counts, np.int64)))
    assert (accumulator.reports, accumulator.weight) == (1, 1)
    assert_array_equal(accumulator.finalize(), [2.0, 4.0])


def test_nothing_to_average():
    with pytest.raises(RunError, match="nothing to average"):
        Accumulator(plan(2)).finalize()


# --- encoding and adding in one pass ---------------------------------------------------------------------


def deltas_of(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Updates of very different length, so that some are clipped and some are not."""
    rng = np.random.default_rng(seed)
    lengths = 10.0 ** rng.uniform(-4, 1, (count, 1))
    return (rng.standard_normal((count, size)) * lengths / size**0.5).astype(np.float32)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 7.0, 300.0])
@pytest.mark.parametrize(("count", "size"), [(1, 3), (1, 40_000), (3, 4096), (33, 9000)])
def test_one_pass_gives_the_same_sum_as_encoding_first(clip_norm, count, size):
    deltas, counts = deltas_of(count, size), np.arange(1, count + 1) * 1000
    the_plan = plan(size, max_weight=2**16, clip_norm=clip_norm)
    one, two = Accumulator(the_plan), Accumulator(the_plan)
    found = one.add_deltas(deltas, counts)
    encoded = encode(deltas, the_plan.grid_step, clip_norm)
    two.add(UpdateBatch(encoded.updates, counts))
    assert not found.refused
    assert_array_equal(found.norms, encoded.norms)
    assert (one.reports, one.weight) == (two.reports, two.weight)
    assert_array_equal(one.finalize(), two.finalize())


def test_heavy_devices_are_added_exactly_too():
    deltas, counts = deltas_of(4, 50), np.full(4, 2**22)
    the_plan = plan(50, max_weight=2**22, clip_norm=0.5)
    one, two = Accumulator(the_plan), Accumulator(the_plan)
    one.add_deltas(deltas, counts, leave_out=[1])
    kept = [0, 2, 3]
    two.add(UpdateBatch(encode(deltas, the_plan.grid_step, 0.5).updates[kept], counts[kept]))
    assert one.weight == two.weight == 3 * 2**22
    assert_array_equal(one.finalize(), two.finalize())


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e4])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_is_refused_and_the_others_are_added(clip_norm, bad):
    deltas, counts = deltas_of(5, 5000), np.full(5, 10)
    the_plan = plan(5000, clip_norm=clip_norm)
    expected = Accumulator(the_plan)
    expected.add_deltas(deltas[[0, 2, 4]], counts[:3])
    deltas[1, 4999] = bad
    accumulator = Accumulator(the_plan)
    found = accumulator.add_deltas(deltas, counts, leave_out=[3])
    assert list(found.refused) == [1]
    assert found.refused[1].reason is Rejection.NON_FINITE
    assert "4999" in str(found.refused[1])
    assert (accumulator.reports, accumulator.weight) == (3, 30)
    assert_array_equal(accumulator.finalize(), expected.finalize())


def test_what_the_grid_cannot_hold_is_refused_unless_it_is_clipped():
    deltas = np.array([[200.0, 0.0], [1.0, 1.0]], np.float32)  # the grid ends at 128
    unclipped = Accumulator(plan(2)).add_deltas(deltas, np.array([1, 1]))
    assert unclipped.refused[0].reason is Rejection.OUT_OF_RANGE
    assert not Accumulator(plan(2, clip_norm=1.0)).add_deltas(deltas, np.array([1, 1])).refused


def test_what_is_added_in_one_pass_is_checked():
    with pytest.raises(UpdateRejected, match="shape"):
        Accumulator(plan(2)).add_deltas(np.zeros((1, 3), np.float32), np.array([1]))
    with pytest.raises(UpdateRejected, match="float64"):
        Accumulator(plan(2)).add_deltas(np.zeros((1, 2)), np.array([1]))
    with pytest.raises(UpdateRejected, match="num_examples"):
        Accumulator(plan(2)).add_deltas(np.zeros((1, 2), np.float32), np.array([0]))


def test_a_device_that_did_not_clip_is_refused_exactly():
    bound = int(0.5 * 2**24)
    check_norm(np.array([bound, 0], np.int32), 2.0**-24, 0.5)
    with pytest.raises(UpdateRejected, match="L2 norm"):
        check_norm(np.array([bound, 1], np.int32), 2.0**-24, 0.5)
    long = 2**31 - 1
    check_norm(np.array([long, 0], np.int32), 2.0**-24, long * 2.0**-24)  # beyond what float64 adds exactly
    with pytest.raises(UpdateRejected, match="L2 norm"):
        check_norm(np.array([long, 1], np.int32), 2.0**-24, long * 2.0**-24)
