"""Encodings: bit-identical to the plain path, never a silent overflow, never a norm above its bound."""

import os
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fl.errors import ConfigError, Rejection, UpdateRejected
from lepton_fl.secagg.encoding import (
    WEIGHT,
    Counter,
    Exact,
    Rotated,
    fit,
    largest_magnitude,
    limit_update,
    noise_room,
)
from lepton_fl.secagg.masks import ring_type
from lepton_fl.secagg.rotation import hadamard, rotate, rotation_width, unrotate
from lepton_fl.vector import to_grid

SEED = "5a" * 32

# --- exact ----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(data=st.data(), devices=st.integers(1, 12), d=st.integers(1, 20), bits=st.sampled_from([16, 32]))
def test_the_sum_is_that_of_the_plain_path(data, devices, d, bits):
    cohort = data.draw(st.integers(devices, 20))
    max_weight = data.draw(st.integers(1, 40 if bits == 16 else 5000))
    room = (2 ** (bits - 1) - 1) // (cohort * max_weight)
    bound = data.draw(st.integers(1, room))
    counters = (Counter(WEIGHT, max_weight), Counter("examples", 2**53), Counter("one", 1))
    encoding = Exact(d, cohort, max_weight, bound, counters, bits=bits)
    extremes = st.sampled_from([-bound, bound, 0])
    total = np.zeros(encoding.length, ring_type(bits))
    plain, weights, examples = np.zeros(d, np.int64), 0, 0
    for _ in range(devices):
        coordinates = data.draw(
            st.lists(st.one_of(extremes, st.integers(-bound, bound)), min_size=d, max_size=d)
        )
        update = np.array(coordinates, np.int32)
        weight, count = data.draw(st.integers(1, max_weight)), data.draw(st.integers(0, 2**53))
        total += encoding.encode(update, weight, {"examples": count, "one": 1})
        plain += update.astype(np.int64) * weight
        weights, examples = weights + weight, examples + count
    decoded = encoding.decode(total)
    assert (decoded.update == plain).all()
    assert decoded.weight == weights
    assert dict(decoded.counters) == {WEIGHT: weights, "examples": examples, "one": devices}


def test_the_proof_is_tight():
    Exact(1, 2, 1, 2**30 - 1)
    with pytest.raises(ConfigError, match="does not fit") as caught:
        Exact(1, 2, 1, 2**30)
    assert "1073741823 grid steps" in caught.value.hint
    with pytest.raises(ConfigError):
        Exact(1, 2, 1, 2**30 - 1, noise=2)


def test_what_is_outside_the_plan_is_refused():
    encoding = Exact(3, 10, 5, 100)
    good = np.array([100, -100, 0], np.int32)
    encoding.encode(good, 5)
    cases = [
        (good * 2, 1, Rejection.OUT_OF_RANGE),
        (np.array([-(2**31), 0, 0], np.int32), 1, Rejection.OUT_OF_RANGE),
        (good, 0, Rejection.OUT_OF_RANGE),
        (good, 6, Rejection.OUT_OF_RANGE),
        (good[:2], 1, Rejection.WRONG_SHAPE),
        (good.astype(np.int64), 1, Rejection.WRONG_SHAPE),
    ]
    for update, weight, reason in cases:
        with pytest.raises(UpdateRejected) as caught:
            encoding.encode(update, weight)
        assert caught.value.reason is reason
    with pytest.raises(ConfigError, match="counters"):
        encoding.encode(good, 1, {"unknown": 1})
    counted = Exact(3, 10, 5, 100, (Counter(WEIGHT, 5), Counter("loss", 7)))
    for value in (-1, 8):
        with pytest.raises(UpdateRejected, match="loss"):
            counted.encode(good, 1, {"loss": value})


@pytest.mark.parametrize(
    "build",
    [
        lambda: Exact(0, 10, 1, 1),
        lambda: Exact(1, 0, 1, 1),
        lambda: Exact(1, 1, 0, 1),
        lambda: Exact(1, 1, 1, 0),
        lambda: Exact(1, 1, 1, 1, noise=-1),
        lambda: Exact(1, 1, 1, 1, (Counter(WEIGHT, 1), Counter(WEIGHT, 1))),
        lambda: Counter("", 1),
        lambda: Counter("x", 0),
        lambda: fit(1, 10, 1, float("nan")),
        lambda: fit(1, 10, 1, 1.0, finest=0.3),
        lambda: fit(1, 10, 2**31, 1.0),
        lambda: Rotated(1, 1, 1, float("inf"), SEED),
        lambda: Rotated(1, 1, 0, 5.0, SEED),
        lambda: Rotated(1, 1, 1, 5.0, "5a"),
        lambda: Rotated(100, 1000, 1, 5.0, SEED, noise=32_000),
    ],
)
def test_impossible_plans_are_refused(build):
    with pytest.raises(ConfigError):
        build()


def test_a_ring_of_another_size_is_refused():
    with pytest.raises(ValueError, match="2 to 32"):
        Exact(1, 1, 1, 1, bits=64)


@settings(max_examples=100, deadline=None)
@given(cohort=st.integers(1, 1000), weight=st.integers(1, 1000), largest=st.floats(2.0**-12, 100.0))
def test_the_finest_grid_that_fits(cohort, weight, largest):
    encoding, step = fit(10, cohort, weight, largest)
    assert step >= 2.0**-24
    assert encoding.coordinate_bound <= (2**31 - 1) // (cohort * weight)
    assert encoding.coordinate_bound >= largest / step - 1
    if step > 2.0**-24:
        assert int(largest / (step / 2)) > (2**31 - 1) // (cohort * weight)


def test_equal_weights_and_unit_clips_fit_the_usual_grid():
    encoding, step = fit(10, 100, 1, 1.0)
    assert step == 2.0**-24
    update = to_grid(np.linspace(-1, 1, 10, dtype=np.float32), step)
    assert encoding.encode(update, 1) is not None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=30), st.integers(1, 2**31 - 1))
def test_limiting_keeps_directions_and_bounds(values, bound):
    update = np.array(values, np.int32)
    limited = limit_update(update, bound)
    assert largest_magnitude(limited) <= bound
    assert (np.abs(limited.astype(np.int64)) <= np.abs(update.astype(np.int64))).all()
    peak = largest_magnitude(update)
    if peak > bound:
        expected = [(abs(v) * bound // peak) * (1 if v > 0 else -1) for v in values]
        assert limited.tolist() == expected
    else:
        assert limited is update


@pytest.mark.parametrize("bits", [16, 32])
def test_noise_is_added_modulo_the_ring(bits):
    encoding = Exact(2, 4, 1, 10, noise=100, bits=bits)
    noise = np.array([-100, 50, -3], np.int64)
    total = encoding.encode(np.array([5, -5], np.int32), 1, noise=noise)
    assert encoding.decode(total).update.tolist() == [-95, 45]
    with pytest.raises(ConfigError, match="noise of shape"):
        encoding.encode(np.array([5, -5], np.int32), 1, noise=noise[:2])
    assert noise_room(10.0, 10**6) == pytest.approx(11 * sqrt(2 * np.log(2) * 60.93), rel=0.01)


# --- rotation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3, 5, 64, 100, 1000, 4096, 5000])
def test_rotation_keeps_the_norm_and_comes_back(d):
    x = np.random.default_rng(d).normal(size=d)
    rotated = rotate(x, bytes(32))
    assert np.dot(rotated, rotated) == pytest.approx(np.dot(x, x))
    assert unrotate(rotated, bytes(32)) == pytest.approx(x)
    assert (rotate(x, b"1" * 32) != rotated).any() or d < 64


def test_the_transform_is_that_of_walsh_and_hadamard():
    x = np.random.default_rng(0).normal(size=256)
    matrix = np.array([rotate(row, bytes(32)) for row in np.eye(256)])
    flips = np.sign(matrix[:, 0])
    assert matrix == pytest.approx(flips[:, None] * hadamard(256))
    assert rotate(x, bytes(32)) == pytest.approx((x * flips) @ hadamard(256))


@pytest.mark.parametrize("d", [3000, 4096])
def test_rotation_spreads_a_single_coordinate(d):
    x = np.zeros(d)
    x[[7, d - 1]] = 100.0
    assert np.abs(rotate(x, bytes(32))).max() < 6 * 142 / sqrt(rotation_width(d))


# --- rotated ----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    d=st.integers(4, 300),
    kind=st.sampled_from(["random", "spike", "flat", "huge", "zero"]),
    cohort=st.integers(1, 100),
    seed=st.integers(0, 1000),
)
def test_rounding_never_raises_the_norm_above_its_bound(d, kind, cohort, seed):
    encoding = Rotated(d, cohort, 3, 50_000.0, SEED)
    random = np.random.default_rng(seed)
    update = {
        "random": random.integers(-4000, 4000, d),
        "spike": np.eye(d, dtype=np.int64)[0] * (2**31 - 1),
        "flat": np.full(d, 50_000 / sqrt(d)),
        "huge": np.full(d, -(2**31)),
        "zero": np.zeros(d),
    }[kind].astype(np.int32)
    encoded = encoding.encode(update, 3, random.bytes)
    values = encoding.decode(encoded).update.astype(np.int64)
    assert int((values**2).sum()) <= encoding.norm_bound**2
    assert encoding.norm_bound <= encoding.clip_norm * encoding.scale
    assert np.abs(values).max() <= encoding.limit
    assert cohort * encoding.limit <= 2**15 - 1


def test_even_dice_of_the_worst_kind_keep_the_norm():
    encoding = Rotated(64, 2, 1, 5000.0, SEED)
    update = np.full(64, 625, np.int32)
    encoded = encoding.encode(update, 1, lambda count: bytes(count))  # always up
    values = encoding.decode(encoded).update.astype(np.int64)
    assert int((values**2).sum()) <= encoding.norm_bound**2


def test_the_worst_sum_does_not_wrap():
    """All devices send the same vector, at the clip: the worst case of the plan."""
    encoding = Rotated(1024, 100, 1, 10_000.0, SEED)
    update = np.full(1024, 10_000 / 32, np.int32)
    total, plain = np.zeros(encoding.length, "<u2"), np.zeros(1024, np.int64)
    for _ in range(100):
        vector = encoding.encode(update, 1, os.urandom)
        total += vector
        plain += encoding.decode(vector).update
    decoded = encoding.decode(total)
    assert (decoded.update == plain).all()
    assert decoded.weight == 100
    error = encoding.restore(decoded) / 100 - update
    # One device's rounding has a variance of at most 1/4 a coordinate.
    assert np.sqrt((error**2).mean()) < 1.5 * sqrt(0.25 / 100) / encoding.scale + 0.002 * 312


def test_rounding_is_unbiased():
    encoding = Rotated(256, 4, 1, 300.0, SEED)
    update = np.arange(-128, 128, dtype=np.int32) // 8
    mean = np.zeros(256)
    for _ in range(400):
        mean += encoding.restore(encoding.decode(encoding.encode(update, 1, os.urandom))) / 400
    assert np.abs(mean - update).max() < 6 * 0.5 / sqrt(400) / encoding.scale


def test_weights_count_within_the_clip():
    encoding = Rotated(512, 8, 4, 20_000.0, SEED)
    update = np.random.default_rng(3).integers(-500, 500, 512).astype(np.int32)
    for weight in (1, 4):
        decoded = encoding.decode(encoding.encode(update, weight, os.urandom))
        assert decoded.weight == weight
        assert encoding.restore(decoded) == pytest.approx(update * weight, abs=40 / encoding.scale)
    for bad in (0, 5):
        with pytest.raises(UpdateRejected):
            encoding.encode(update, bad, os.urandom)
    with pytest.raises(UpdateRejected):
        encoding.encode(update[1:], 1, os.urandom)


def test_an_upload_of_a_million_at_16_bits():
    encoding = Rotated(1_000_000, 100, 2**20, 2.0**24, SEED)
    protocol = 100 * (80 + 32) + 64 + 100 * 32 + 1000  # shares, reveal, signatures and heads
    assert encoding.length * 2 + protocol <= 2.1 * 2**20


def test_all_parameters_are_in_the_digest():
    base = {"num_coordinates": 9, "cohort": 5, "max_weight": 2, "clip_norm": 900.0, "seed": SEED}
    variants = [
        {},
        {"num_coordinates": 8},
        {"cohort": 6},
        {"max_weight": 3},
        {"clip_norm": 901.0},
        {"seed": "5b" * 32},
        {"spread": 5.0},
        {"noise": 1},
        {"bits": 32},
        {"counters": (Counter(WEIGHT, 2), Counter("x", 1))},
    ]
    digests = {Rotated(**(base | v)).digest for v in variants}
    assert len(digests) == len(variants)
    assert Exact(9, 5, 2, 3).digest not in digests
    assert Exact(9, 5, 2, 3).digest == Exact(9, 5, 2, 3).digest
