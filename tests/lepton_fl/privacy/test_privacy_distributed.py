"""Noise that devices add themselves: published rows, drop-outs, colluders, and no wrap-around."""

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lepton_fl.errors import ConfigError
from lepton_fl.privacy.accounting import RdpGate, poisson_amplified, rdp_to_epsilon, skellam_renyi
from lepton_fl.privacy.distributed import (
    plan_distributed,
    ring_scale,
    rounded_norms,
    truncated_norms,
)
from lepton_fl.privacy.events import DistributedGaussian, Gaussian, Skellam
from lepton_fl.privacy.noise import Keystream, simulation_key

PLAN = {
    "clip_norm": 1.0,
    "coordinates": 10_000,
    "cohort": 100,
    "survivors": 70,
    "colluders": 10,
    "bits": 20,
    "events": 10,
    "epsilon": 8.0,
    "delta": 1e-6,
}


def test_the_published_skellam_row():
    """EMNIST of both papers at epsilon 10 and 16 bits: scale 303712.3, local noise 814.3533 grid steps."""
    coordinates, clip, cohort, rounds, fleet = 2**20, 0.03, 100, 1500, 3400
    scale, local = 303712.3, 814.3533
    l1, l2 = rounded_norms(clip * scale, coordinates)
    event = Skellam(l1, l2, cohort * local**2)
    orders = tuple(range(2, 65))
    curve = skellam_renyi(event, np.array(orders, float))
    amplified = poisson_amplified(lambda a: float(curve[a - 2]), cohort / fleet, orders)
    assert rdp_to_epsilon(orders, rounds * amplified, 1 / fleet) == pytest.approx(10.0, abs=1e-4)
    # The rule for the ring gives this scale back.
    found = ring_scale(
        lambda s: (local * s / scale) ** 2, clip_norm=clip, coordinates=coordinates, cohort=cohort, bits=16
    )
    assert found == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize(
    ("bits", "rounding", "truncation"), [(14, 7.833, 7.828), (12, 7.904, 7.828), (10, 8.815, 7.828)]
)
def test_truncation_costs_nothing_where_rounding_does(bits, rounding, truncation):
    """A million coordinates, T = 50, z = 5, delta 1e-6; the exact central Gaussian is 7.286."""
    grid = 2.0**bits
    for norms, expected in ((rounded_norms, rounding), (truncated_norms, truncation)):
        l1, l2 = norms(grid, 10**6)
        event = Skellam(l1, l2, (5 * grid) ** 2)
        assert RdpGate().epsilon({event: 50}, 1e-6) == pytest.approx(expected, abs=2e-3)


def test_where_nothing_fits_nothing_is_returned():
    with pytest.raises(ConfigError, match="No scale fits 4 bits"):
        ring_scale(lambda s: s * s, clip_norm=1.0, coordinates=10, cohort=1000, bits=4)
    with pytest.raises(ConfigError, match="No grid fits 6 bits"):
        plan_distributed(**{**PLAN, "bits": 6})


@pytest.mark.parametrize("kind", ["skellam", "ddgauss"])
def test_a_plan_meets_its_target_with_the_fewest_honest_devices(kind):
    noise = plan_distributed(kind=kind, **PLAN)
    spent = RdpGate().epsilon({noise.planned_event: 10}, 1e-6)
    assert 7.99 < spent <= 8.0
    more = RdpGate().epsilon({noise.event(100): 10}, 1e-6)
    assert more < spent
    assert np.log2(1 / noise.step).is_integer()
    honest = PLAN["survivors"] - PLAN["colluders"]
    assert noise.planned_event.variance == pytest.approx(honest * noise.share_variance)
    assert isinstance(noise.planned_event, Skellam if kind == "skellam" else DistributedGaussian)


def test_below_the_survivors_nothing_may_be_unmasked():
    noise = plan_distributed(**PLAN)
    with pytest.raises(ConfigError, match="at least 70 survivors, got 69"):
        noise.event(69)


@pytest.mark.parametrize("kind", ["skellam", "ddgauss"])
@pytest.mark.parametrize("survivors", [70, 85, 100])
def test_the_sum_has_at_least_the_planned_noise(kind, survivors):
    """Drop-outs up to the limit, and the colluders' shares taken away again."""
    noise = plan_distributed(kind=kind, **PLAN)
    total, stream = np.zeros(20_000, np.int64), Keystream(simulation_key("shares", kind, survivors))
    share = noise.share()
    for _ in range(survivors - noise.colluders):
        share.add_to(total, stream)
    planned = noise.planned_event.variance
    low = stats.chi2.ppf(1e-6, len(total)) / len(total)
    assert np.mean(total.astype(float) ** 2) >= planned * low
    assert np.mean(total.astype(float) ** 2) == pytest.approx(
        planned * (survivors - 10) / (70 - 10), rel=0.06
    )


def test_the_ring_does_not_wrap():
    """All devices push the same coordinate as far as they can, and add their noise."""
    noise = plan_distributed(**PLAN)
    total = np.full(50_000, int(100 * noise.l2), np.int64)
    share, stream = noise.share(), Keystream(simulation_key("ring"))
    for _ in range(100):
        share.add_to(total, stream)
    assert np.mean(np.abs(total) < 2 ** (noise.bits - 1)) > 1 - 2e-4  # four standard deviations


@given(st.integers(12, 40), st.integers(2, 300), st.floats(0.5, 20), st.integers(1, 60))
@settings(max_examples=12, deadline=None)
def test_every_plan_keeps_its_promises(bits, cohort, epsilon, events):
    survivors = max(1, 2 * cohort // 3)
    try:
        noise = plan_distributed(
            clip_norm=0.5,
            coordinates=1000,
            cohort=cohort,
            survivors=survivors,
            bits=bits,
            events=events,
            epsilon=epsilon,
            delta=1e-6,
        )
    except ConfigError:
        return
    assert RdpGate().epsilon({noise.planned_event: events}, 1e-6) <= epsilon
    assert cohort * noise.l2 + 4 * sqrt(cohort * noise.share_variance) < 2.0 ** (bits - 1)
    assert noise.l2 == 0.5 / noise.step
    worst = RdpGate().epsilon({Gaussian(sqrt(noise.planned_event.variance) / noise.l2): events}, 1e-6)
    assert worst <= RdpGate().epsilon({noise.planned_event: events}, 1e-6) + 1e-9


@pytest.mark.parametrize(
    "wrong",
    [
        {"survivors": 0},
        {"survivors": 101},
        {"colluders": 70},
        {"colluders": -1},
        {"bits": 1},
        {"bits": 63},
        {"events": 0},
        {"coordinates": 0},
        {"clip_norm": 0.0},
        {"clip_norm": float("nan")},
        {"epsilon": 0.0},
        {"delta": 1.0},
    ],
)
def test_contradictions_are_refused(wrong):
    with pytest.raises(ConfigError):
        plan_distributed(**{**PLAN, **wrong})
