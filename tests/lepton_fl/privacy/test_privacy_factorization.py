"""Correlated noise: the published errors, the parameters of an independent library, and the dense matrix."""

from itertools import combinations, pairwise
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fl.errors import ConfigError
from lepton_fl.privacy.factorization import (
    INDEPENDENT,
    Banded,
    Blt,
    error,
    optimise_banded,
    optimise_blt,
    participations,
    repeat_sensitivity,
    sensitivity,
)
from lepton_fl.privacy.planning import Contract, epsilon_for, multiplier_at_noise

# rounds, separation, participations: error of the final and of the mean model at equal privacy
TABLE = [
    ((500, 100, 5), (50.0, 35.4), (8.3, 6.9), (8.44, 7.53)),
    ((2000, 100, 20), (200.0, 141.0), (26.0, 20.2), (27.02, 21.70)),
    ((2000, 400, 5), (100.0, 71.0), (9.3, 7.8), (9.50, 8.30)),
    ((1000, 1000, 1), (31.6, 22.4), (3.4, 3.0), (3.27, 3.11)),
]


def dense(c, rounds):
    row = c.coefficients(rounds)
    return np.array([[row[t - s] if t >= s else 0.0 for s in range(rounds)] for t in range(rounds)])


@pytest.mark.parametrize(("contract", "independent", "banded", "blt"), TABLE)
def test_the_error_table(contract, independent, banded, blt):
    plain = error(INDEPENDENT, *contract)
    assert (plain.final, plain.mean) == pytest.approx(independent, rel=5e-3)
    found = error(optimise_blt(*contract), *contract)
    assert (found.final, found.mean) == pytest.approx(blt, rel=5e-3)
    wide = error(optimise_banded(*contract), *contract)
    assert wide.final <= banded[0] * 1.005
    assert wide.mean <= banded[1] * 1.05  # ours minimises the final model's error


def test_the_parameters_are_those_of_an_independent_library():
    best = optimise_blt(2000, 100, 20)
    assert best.decay == pytest.approx((0.987944, 0.609933), rel=1e-4)
    assert best.scale == pytest.approx((0.23858, 0.26822), rel=5e-4)


def test_a_whole_fleet_for_less_than_2_80():
    """100,000 devices, 1,000 a round, 2,000 rounds, the final noise of independent noise at z = 1."""
    fleet = Contract(rounds=2000, cohort=1000, population=100_000, min_separation=100)
    z = multiplier_at_noise("blt", fleet, sqrt(2000))
    assert epsilon_for("blt", fleet, z, 1e-6) == pytest.approx(2.78, abs=0.01)
    assert epsilon_for("blt", fleet, z, 1e-6) <= 2.80
    assert epsilon_for("independent", fleet, 1.0, 1e-6) == pytest.approx(30.6, rel=5e-3)
    assert epsilon_for("every-round", fleet, 1.0, 1e-6) == pytest.approx(1211.6, rel=1e-3)


def test_the_independent_one_has_nothing_to_gain_where_devices_come_every_round():
    assert optimise_blt(10, 1) == INDEPENDENT
    assert optimise_blt(1, 1) == INDEPENDENT
    assert optimise_banded(10, 1) == Banded((1.0,))


@pytest.mark.parametrize(
    "c", [Blt((0.9, 0.5), (0.3, 0.2)), Blt(), Banded((1.0, 0.4, 0.2)), Banded((1.0, -0.4))]
)
def test_filters_and_matrices_agree(c):
    matrix = dense(c, 30)
    signal = np.random.default_rng(0).normal(size=30)
    assert np.allclose(c.inverse(signal), np.linalg.solve(matrix, signal), atol=1e-12)
    assert len(c.coefficients(1)) == 1
    # The remembered rows give the same, round by round.
    memory, out = np.zeros((len(c.mix), 1)), []
    for value in signal * 1e6:
        noise = np.array([round(value - float(c.mix @ memory[:, 0]))])
        following = np.empty_like(memory)
        c.remember(memory, noise, following)
        memory = following
        out.append(noise[0] / 1e6)
    assert np.allclose(out, np.linalg.solve(matrix, signal), atol=1e-4)


@given(
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(0, 4),
    st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 0.3)), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_the_sensitivity_is_the_worst_of_all_patterns(rounds, separation, k, buffers):
    c = Blt(tuple(d for d, _ in buffers), tuple(s for _, s in buffers))
    matrix, times, worst = dense(c, rounds), participations(rounds, separation, k), 0.0
    for size in range(1, times + 1):
        for pattern in combinations(range(rounds), size):
            if all(b - a >= separation for a, b in pairwise(pattern)):
                worst = max(worst, float(np.linalg.norm(matrix[:, list(pattern)].sum(axis=1))))
    assert sensitivity(c, rounds, separation, k) == pytest.approx(worst)
    # A repeated round: no pattern moves one row of C x further.
    rows = [
        np.abs(matrix[t, list(p)]).sum()
        for size in range(1, times + 1)
        for p in combinations(range(rounds), size)
        if all(b - a >= separation for a, b in pairwise(p))
        for t in range(rounds)
    ]
    assert repeat_sensitivity(c, rounds, separation, k) == pytest.approx(max(rows))


def test_bands_within_the_separation_may_have_any_sign():
    c = Banded((1.0, -0.5, 0.25))
    assert sensitivity(c, 12, 3, 4) == pytest.approx(2 * sqrt(1 + 0.25 + 0.0625))
    with pytest.raises(ConfigError, match="bands within min_separation"):
        sensitivity(c, 12, 2, 4)


@pytest.mark.parametrize(
    ("decay", "scale"),
    [((1.1,), (0.5,)), ((0.5,), (1.5,)), ((0.5,), (-0.1,)), ((0.5, 0.6), (0.5,)), ((0.5, 0.6), (0.6, 0.6))],
)
def test_buffers_on_which_the_proof_does_not_rest_are_refused(decay, scale):
    with pytest.raises(ConfigError, match="Expected"):
        Blt(decay, scale)
    with pytest.raises(ConfigError, match="Expected"):
        Blt((float("nan"),), (0.5,))


def test_bands_start_with_one():
    for bands in ((), (0.5,), (1.0, float("nan"))):
        with pytest.raises(ConfigError, match="bands"):
            Banded(bands)


def test_a_search_that_would_not_end_is_refused():
    for search in (optimise_blt, optimise_banded):
        with pytest.raises(ConfigError, match="at most 20000 rounds"):
            search(20_001, 10)
