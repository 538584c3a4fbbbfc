"""Accountants against published and independent numbers; events as JSON; epsilon to noise and back."""

import json
from math import inf, log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr

from lepton_fl.errors import ConfigError, StateCorrupt
from lepton_fl.privacy.accounting import (
    ORDERS,
    GdpExact,
    PldReport,
    RdpGate,
    best_accountant,
    between_whole_orders,
    calibrate,
    gaussian_multiplier,
    poisson_amplified,
    renyi,
)
from lepton_fl.privacy.events import (
    DistributedGaussian,
    Gaussian,
    PoissonGaussian,
    Skellam,
    Zcdp,
    composed_multiplier,
    counted,
    from_json,
    quantised,
    to_json,
)

# sampling, multiplier, rounds, delta, epsilon on the finest PLD grid, as estimated by another library (PRV),
# and by Rényi divergences
ROWS = [
    (0.01, 1.0, 1000, 1e-5, 1.8282, 1.8282, 2.1014),
    (0.01, 0.6, 1000, 1e-5, 7.4336, 7.4338, 8.6804),
    (0.001, 1.0, 10_000, 1e-6, 0.5554, 0.5552, 0.9795),
    (0.02, 4.0, 10_000, 1e-5, 2.0377, 2.0377, 2.2156),
    (0.1, 1.0, 100, 1e-5, 7.0466, 7.0473, 7.9039),
    (1.0, 5.0, 100, 1e-6, 10.99715, 10.997, 11.6886),
    (0.01, 1.0, 1, 1e-5, 0.1995, 0.1995, 0.9556),
]


def sampled(q: float, z: float):
    return Gaussian(z) if q == 1 else PoissonGaussian(q, z)


@pytest.mark.parametrize(("q", "z", "rounds", "delta", "tight", "independent", "loose"), ROWS)
def test_the_seven_settings(q, z, rounds, delta, tight, independent, loose):
    events = {sampled(q, z): rounds}
    step = 1e-4 if rounds == 10_000 else 1e-3  # many rounds of a tiny loss need the finer grid
    told = PldReport(step=step).epsilon(events, delta)
    assert told == pytest.approx(tight, abs=1e-3)
    assert told == pytest.approx(independent, abs=1e-3)
    found = RdpGate().epsilon(events, delta)
    assert found == pytest.approx(loose, abs=1e-3)
    assert found >= tight


def test_the_exact_accountant_agrees_with_the_distributions():
    assert GdpExact().epsilon({Gaussian(5.0): 100}, 1e-6) == pytest.approx(10.99715, abs=1e-4)
    mixed = {Gaussian(5.0 + i / 4): 1 for i in range(50)}
    exact = GdpExact().epsilon(mixed, 1e-6)
    assert PldReport(step=1e-3).epsilon(mixed, 1e-6) == pytest.approx(exact, abs=2e-4)


@given(st.floats(0.3, 30), st.floats(-20, -2))
@settings(max_examples=60, deadline=None)
def test_the_exact_epsilon_solves_the_gaussian_trade_off(multiplier, exponent):
    """delta(eps) = N(mu/2 - eps/mu) - e^eps N(-mu/2 - eps/mu), Balle and Wang 2018, in logarithms."""
    delta = 10**exponent
    epsilon = GdpExact().epsilon({Gaussian(multiplier): 1}, delta)
    mu = 1 / multiplier

    def log_delta(eps):
        first, second = log_ndtr(mu / 2 - eps / mu), eps + log_ndtr(-mu / 2 - eps / mu)
        return first + np.log1p(-np.exp(second - first))

    if epsilon > 1e-6:
        assert log_delta(epsilon) <= log(delta) + 1e-3
        assert log_delta(epsilon * (1 - 1e-3)) >= log(delta) - 1e-3


@pytest.mark.parametrize(("rho", "published"), [(0.15, 3.42), (0.0144, 0.994)])
def test_the_published_keyboard_models(rho, published):
    """rho-zCDP to epsilon at delta 1e-10, as published with the matrices of a production keyboard."""
    multiplier = 1 / sqrt(2 * rho)
    assert GdpExact().epsilon({Gaussian(multiplier): 1}, 1e-10) == pytest.approx(published, rel=2e-3)
    assert RdpGate().epsilon({Zcdp(rho): 1}, 1e-10) > published


def test_replacing_a_device_is_twice_the_sensitivity():
    for multiplier in (0.7, 1.0, 4.0):
        halved = GdpExact().epsilon({Gaussian(multiplier / 2): 3}, 1e-6)
        for accountant in (GdpExact("replace-one"), PldReport("replace-one", 1e-3)):
            assert accountant.epsilon({Gaussian(multiplier): 3}, 1e-6) == pytest.approx(halved, rel=1e-3)
    both = RdpGate("replace-one").epsilon({Gaussian(2.0): 3, Zcdp(0.1): 1}, 1e-6)
    assert both == RdpGate().epsilon({Gaussian(1.0): 3, Zcdp(0.4): 1}, 1e-6)
    assert GdpExact("replace-one").epsilon({Gaussian(1.0): 1}, 1e-6) == pytest.approx(10.997, abs=1e-3)


def test_what_an_accountant_cannot_read_it_refuses():
    with pytest.raises(ConfigError, match="gdp accountant cannot read 'zcdp'"):
        GdpExact().epsilon({Zcdp(0.1): 1}, 1e-6)
    for accountant in (RdpGate("replace-one"), PldReport("replace-one")):
        with pytest.raises(ConfigError, match="poisson-gaussian"):
            accountant.epsilon({PoissonGaussian(0.1, 1.0): 1}, 1e-6)
    with pytest.raises(ConfigError, match="count >= 0"):
        GdpExact().epsilon({Gaussian(1.0): -1}, 1e-6)
    for delta in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="delta"):
            RdpGate().epsilon({}, delta)
    with pytest.raises(ConfigError, match="adjacency"):
        GdpExact("add-remove")


def test_nothing_spent_is_nothing():
    for accountant in (GdpExact(), RdpGate(), PldReport()):
        assert accountant.epsilon({}, 1e-6) == 0
        assert accountant.epsilon({Gaussian(1.0): 0}, 1e-6) == 0


def test_a_vanishing_sampled_event_is_not_free():
    """The library reads a rounding error below zero as no cost at all."""
    assert RdpGate().epsilon({PoissonGaussian(1e-3, 1e7): 10**9}, 1e-6) > 0
    assert all(np.all(renyi(PoissonGaussian(0.01, 10.0**e)) > 0) for e in range(8))


@given(st.floats(0.5, 20), st.floats(1.001, 3), st.integers(1, 200), st.sampled_from([1.0, 0.01]))
@settings(max_examples=25, deadline=None)
def test_epsilon_is_monotone(multiplier, more, count, q):
    accountant = RdpGate()
    base = accountant.epsilon({sampled(q, multiplier): count}, 1e-6)
    assert accountant.epsilon({sampled(q, multiplier * more): count}, 1e-6) <= base + 1e-9
    assert accountant.epsilon({sampled(q, multiplier): count + 1}, 1e-6) >= base - 1e-9
    assert accountant.epsilon({sampled(q, multiplier): count}, 1e-5) <= base + 1e-9


# ------------------------------------------------------------------------------------------ discrete noise


def test_skellam_costs_a_little_more_than_a_gaussian_and_less_on_a_finer_grid():
    gaussian = RdpGate().epsilon({Gaussian(5.0): 50}, 1e-6)
    coarse, fine = (
        RdpGate().epsilon({Skellam(1e3 * grid, float(grid), (5.0 * grid) ** 2): 50}, 1e-6)
        for grid in (2**4, 2**14)
    )
    assert gaussian <= fine < coarse
    assert fine == pytest.approx(gaussian, rel=1e-2)  # its bound is proven at whole orders


def test_a_bound_between_whole_orders_is_one():
    """Checked with a curve whose value between the orders is known: the Gaussian's."""
    orders = np.array(ORDERS)
    bound = between_whole_orders(lambda a: a / 50, orders)
    assert np.all(bound >= orders / 50 - 1e-12)
    whole = (orders == np.floor(orders)) & (orders > 1)
    assert np.allclose(bound[whole], orders[whole] / 50)


def test_a_sum_of_discrete_gaussians_is_nearly_one():
    event = DistributedGaussian(1e6, 1000.0, 5000.0**2, 100.0, 1e6)
    assert np.allclose(renyi(event), renyi(Gaussian(5.0)), rtol=1e-9)
    narrow = DistributedGaussian(1e6, 1000.0, 50.0, 100.0, 1e6)  # shares of a fraction of a grid step
    assert np.all(renyi(narrow) > renyi(Gaussian(sqrt(50.0) / 1000)))


def test_amplification_of_any_mechanism_is_looser_than_the_gaussian_one():
    orders = tuple(range(2, 33))
    general = poisson_amplified(lambda a: a / 2, 0.01, orders)
    tight = renyi(PoissonGaussian(0.01, 1.0))[[ORDERS.index(float(a)) for a in orders]]
    assert np.all(general >= tight)
    assert np.all(general <= np.array(orders) / 2 + 1)
    assert np.allclose(poisson_amplified(lambda a: a / 2, 1.0, orders), np.array(orders) / 2)


# ------------------------------------------------------------------------------------------ calibration


@given(st.floats(0.05, 60), st.floats(-10, -3), st.integers(1, 5000))
@settings(max_examples=30, deadline=None)
def test_calibration_and_accounting_are_inverse(epsilon, exponent, rounds):
    delta = 10**exponent
    found = calibrate(lambda z: {Gaussian(z): rounds}, epsilon, delta)
    assert GdpExact().epsilon({Gaussian(found): rounds}, delta) <= epsilon
    assert found == pytest.approx(gaussian_multiplier(epsilon, delta) * sqrt(rounds), rel=3e-6)


def test_a_calibrated_whole_run_fits_a_budget_of_the_same_size():
    for epsilon in (0.1, 1.0, 2.8, 8.0, 50.0):
        z = gaussian_multiplier(epsilon, 1e-6)
        assert GdpExact().epsilon({Gaussian(z): 1}, 1e-6) <= epsilon


def test_a_target_that_cannot_be_reached_is_refused():
    with pytest.raises(ConfigError, match="No noise multiplier"):
        calibrate(lambda z: {Gaussian(1.0): 100, Gaussian(z): 1}, 0.5, 1e-6)
    for epsilon in (0.0, -1.0, inf, float("nan")):
        with pytest.raises(ConfigError, match="epsilon"):
            calibrate(lambda z: {Gaussian(z): 1}, epsilon, 1e-6)


def test_the_best_accountant_is_the_exact_one_where_it_applies():
    assert best_accountant({Gaussian(1.0): 3}).name == "gdp"
    assert best_accountant({Gaussian(1.0): 3, Zcdp(0.1): 1}).name == "rdp"


# ------------------------------------------------------------------------------------------ events

EVENTS = [
    Gaussian(1.25),
    PoissonGaussian(0.01, 1.0),
    Zcdp(0.15),
    Skellam(1e6, 16384.0, 1e8),
    DistributedGaussian(1e6, 16384.0, 1e8, 70.0, 1e6),
]


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_survives_the_ledger(event):
    text = to_json(event)
    assert from_json(text) == event
    assert hash(from_json(text)) == hash(event)
    assert to_json(from_json(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        '{"!": "subprocess.run", "args": ["id"]}',
        '{"!": "DpEvent", "module_name": "os", "class_name": "system"}',
        '{"!": "gaussian"}',
        '{"!": "gaussian", "noise_multiplier": 1.0, "more": 1}',
        '{"!": "gaussian", "noise_multiplier": "1.0"}',
        '{"!": "gaussian", "noise_multiplier": NaN}',
        '{"!": "gaussian", "noise_multiplier": 0.0}',
        '{"!": "gaussian", "noise_multiplier": -1.0}',
        '{"!": "gaussian", "noise_multiplier": true}',
        '{"!": "poisson-gaussian", "noise_multiplier": 1.0, "sampling_probability": 1.5}',
        '{"noise_multiplier": 1.0}',
        "[]",
        "null",
        "",
        '{"!": {"a": 1}}',
        "[" * 100_000,
    ],
)
def test_a_tampered_event_is_refused_and_imports_nothing(text):
    with pytest.raises(StateCorrupt, match="privacy event"):
        from_json(text)


@pytest.mark.parametrize("value", [0.0, -1.0, inf, float("nan"), "1", None])
def test_an_event_without_a_meaning_cannot_be_made(value):
    with pytest.raises(ConfigError, match="noise_multiplier"):
        Gaussian(value)


@given(st.floats(1e-3, 1e6))
def test_quantised_multipliers_never_claim_more(multiplier):
    down = quantised(multiplier)
    assert multiplier / 1.0101 <= down <= multiplier
    assert quantised(down) == pytest.approx(down)


def test_gaussians_compose_into_one():
    assert composed_multiplier({Gaussian(2.0): 4}) == pytest.approx(1.0)
    assert composed_multiplier({}) == inf
    with pytest.raises(ConfigError):
        composed_multiplier({Zcdp(0.1): 1})
    assert counted([Gaussian(1.0), Zcdp(0.1), Gaussian(1.0)]) == {Gaussian(1.0): 2, Zcdp(0.1): 1}
    assert json.loads(to_json(Gaussian(1.0))) == {"!": "gaussian", "noise_multiplier": 1.0}
