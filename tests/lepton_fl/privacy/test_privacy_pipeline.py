"""The integer pipeline keeps the sensitivity that all noise is made for: refused, or within the bound."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.plan import LocalPlan, PrivacySpec, RoundPlan
from lepton_fl.privacy.audit import noise_interval
from lepton_fl.privacy.mechanisms import Independent
from lepton_fl.privacy.noise import Keystream, simulation_key
from lepton_fl.privacy.planning import prepare
from lepton_fl.rounds.accumulator import Accumulator, UpdateBatch
from lepton_fl.vector import check_norm, encode

STEPS = st.integers(-30, 6).map(lambda e: 2.0**e)
CLIPS = st.floats(1e-6, 1e6)
NASTY = st.sampled_from(
    [float("nan"), float("inf"), -float("inf"), 1e38, -3.4e38, 1e-45, -1e-40, 0.0, -0.0, 1.0, 1e-3]
)
FLOATS = st.one_of(NASTY, st.floats(width=32))
MATRICES = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=24), elements=FLOATS)


def square(row) -> int:
    return sum(int(x) ** 2 for x in row)


@given(MATRICES, STEPS, CLIPS)
@example(np.full((1, 4), 3e38, np.float32), 2.0**-24, 1.0)
@example(np.full((1, 4), 1e-45, np.float32), 2.0**-24, 1.0)
@example(np.array([[np.nan, 1e6, 1e6]], np.float32), 2.0**-24, 1.0)
@example(np.zeros((2, 3), np.float32), 2.0**-24, 1.0)
@settings(max_examples=150, deadline=None)
def test_any_vector_is_refused_or_within_the_bound(deltas, step, clip):
    encoded = encode(deltas, step, clip)
    for row, delta in enumerate(deltas):
        integers = encoded.updates[row]
        if not np.isfinite(delta).all():
            assert encoded.refused[row].reason is Rejection.NON_FINITE
        if row in encoded.refused:
            assert not integers.any()  # nothing of a refused update is left
            continue
        assert Fraction(square(integers)) <= Fraction(clip / step) ** 2
        check_norm(integers, step, clip)


@given(MATRICES, STEPS, CLIPS)
@settings(max_examples=60, deadline=None)
def test_the_integers_are_the_clipped_update_to_one_step(deltas, step, clip):
    encoded = encode(deltas, step, clip)
    for row, delta in enumerate(deltas):
        if row in encoded.refused:
            continue
        exact = delta.astype(np.float64)
        norm = float(np.linalg.norm(exact))
        clipped = exact * min(1.0, clip / norm) if norm else exact
        error = np.abs(encoded.updates[row] * step - clipped)
        # A clipped one may be half a millionth shorter, so that no rounding can make it longer.
        assert np.all(error <= step * (1 + 1e-6) + 4.8e-7 * np.abs(clipped))
        assert np.all(np.abs(encoded.updates[row] * step) <= np.abs(clipped) * (1 + 1e-9))


@given(MATRICES, STEPS, CLIPS, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_a_row_does_not_depend_on_the_others_nor_on_the_order_of_tensors(deltas, step, clip, random):
    whole = encode(deltas, step, clip)
    for row in range(len(deltas)):
        alone = encode(deltas[row : row + 1], step, clip)
        assert np.array_equal(alone.updates[0], whole.updates[row])
    order = list(range(deltas.shape[1]))
    random.shuffle(order)
    shuffled = encode(np.ascontiguousarray(deltas[:, order]), step, clip)
    assert set(shuffled.refused) == set(whole.refused)
    # The norm may differ in its last bit, and an integer with it by one.
    difference = shuffled.updates.astype(np.int64) - whole.updates[:, order]
    assert np.abs(difference).max(initial=0) <= 1


@given(arrays(np.int32, st.integers(1, 30), elements=st.integers(-(2**31), 2**31 - 1)), STEPS, CLIPS)
@settings(max_examples=200, deadline=None)
def test_the_exact_check_forgives_nothing(update, step, clip):
    within = Fraction(square(update)) <= Fraction(clip / step) ** 2
    if within:
        check_norm(update, step, clip)
    else:
        with pytest.raises(UpdateRejected) as refused:
            check_norm(update, step, clip)
        assert refused.value.reason is Rejection.OUT_OF_RANGE


def finer(values, step):
    """How many are no multiples of a step: what an attacker looks for in the last bits of a release."""
    return np.count_nonzero(np.mod(np.asarray(values, np.float64), step))


def test_the_attack_on_floating_point_noise_finds_nothing():
    """Haney et al. 2022: a sum in floating point shows in its last bits whether there was something to add.

    The attack is tried on float32 noise first, where one coordinate gives a device away; then on a release.
    """
    draws = 400_000
    noise = np.random.default_rng(0).normal(0, 1, draws).astype(np.float32)
    absent, present = (finer(np.float32(value) + noise, 2.0**-24) for value in (0, 1))
    assert absent > 0.15 * draws
    assert present == 0

    step, clip = 2.0**-24, 1.0
    lowest = []
    for name, value in enumerate((0.0, clip)):
        encoded = encode(np.array([[value]], np.float32), step, clip)
        total = np.full(draws, encoded.updates[0, 0], np.int64)
        Independent(1.0, clip / step).release(total, 1, Keystream(simulation_key("attack", name)))
        assert finer(total * step, step) == 0
        lowest.append(total & -total)  # the lowest bit that is set
    for exponent in range(12):
        counts = np.array([np.count_nonzero(found == 1 << exponent) for found in lowest])
        expected = draws / 2 ** (exponent + 1)
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected), exponent


def test_from_updates_to_a_private_mean():
    """What a round does: encode on the device, add exactly, add noise, divide by the public cohort."""
    step, clip, size, cohort = 2.0**-24, 0.5, 20_000, 50
    spec = PrivacySpec(mechanism="independent", clip_norm=clip, noise_multiplier=2.0, delta=1e-6)
    ready = prepare(spec, rounds=1, cohort=cohort, coordinates=size, grid_step=step)
    plan = RoundPlan(
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
        wanted_reports=cohort,
        min_reports=1,
        deadline_s=1.0,
        local=LocalPlan(),
        weighting="equal",
        max_weight=1,
        grid_step=step,
        clip_norm=clip,
        nonce="n",
    )
    accumulator, rng = Accumulator(plan), np.random.default_rng(0)
    deltas = rng.normal(0, 1, (cohort - 10, size)).astype(np.float32)  # ten devices do not answer
    updates = encode(deltas, step, clip).updates
    accumulator.add(UpdateBatch(updates, np.ones(len(updates), np.int64)))
    total = accumulator.subtotal().total
    exact = total.copy()
    ready.mechanism.release(total, 1, Keystream(simulation_key("round")))
    low, high = noise_interval(total - exact)
    assert low * step < 2.0 * clip < high * step
    clipped = deltas * (clip / np.linalg.norm(deltas, axis=1, keepdims=True))
    mean = total * step / cohort
    assert np.abs(mean - clipped.sum(axis=0) / cohort).std() < 2.0 * clip / cohort
