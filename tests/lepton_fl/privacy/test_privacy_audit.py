"""The real encoding and noise, run many times: the claim is not refuted, and every planted fault is."""

import numpy as np
import pytest

from lepton_fl.errors import ConfigError
from lepton_fl.privacy.audit import (
    clopper_pearson_upper,
    gdp_lower_bound,
    noise_interval,
    one_run_lower_bound,
    release_scores,
)
from lepton_fl.privacy.mechanisms import Correlated, Independent
from lepton_fl.privacy.noise import Keystream, simulation_key
from lepton_fl.vector import encode

STEP, CLIP = 2.0**-16, 1.0
TENSORS = (slice(0, 48), slice(48, 56), slice(56, 64))  # a small model: three tensors


def canaries() -> dict[str, np.ndarray]:
    """Devices as loud as they can be: spread over all coordinates, or all in one tensor."""
    loud = {"spread": np.full(64, 5.0, np.float32)}
    for number, tensor in enumerate(TENSORS):
        loud[f"tensor {number}"] = np.zeros(64, np.float32)
        loud[f"tensor {number}"][tensor] = -7.0
    return loud


def encoded(update: np.ndarray) -> np.ndarray:
    return encode(update[None], STEP, CLIP).updates[0].astype(np.int64)


def encoded_per_tensor(update: np.ndarray) -> np.ndarray:
    """The fault: every tensor is clipped by itself."""
    return np.concatenate([encoded(update[tensor]) for tensor in TENSORS])


def bound(multiplier, *, trials=100_000, factor=1.0, bare=None, encoding=encoded) -> float:
    """The best lower bound on mu over all canaries, of a release that may be faulty."""
    grid = CLIP / STEP

    def release(total):
        keep = total.reshape(-1, 64)[:, bare].copy() if bare else None
        stream = Keystream(simulation_key("audit", str(multiplier), str(factor), str(bare)))
        Independent(multiplier * factor, grid).release(total, 1, stream)
        if bare:
            total.reshape(-1, 64)[:, bare] = keep

    return max(
        gdp_lower_bound(*release_scores(release, encoding(canary), trials)) for canary in canaries().values()
    )


@pytest.mark.parametrize("multiplier", [1.0, 2.0])
def test_the_real_mechanism_is_not_refuted_and_the_bound_is_close(multiplier):
    found = bound(multiplier)
    assert 0.93 / multiplier < found <= 1 / multiplier


@pytest.mark.parametrize("multiplier", [1.0, 2.0])
@pytest.mark.parametrize("fault", ["10 % low", "halved", "bare tensor", "clip per tensor"])
def test_every_planted_fault_is_found(multiplier, fault):
    faults = {
        "10 % low": {"factor": 0.9},
        "halved": {"factor": 0.5, "trials": 10_000},
        "bare tensor": {"bare": TENSORS[1], "trials": 10_000},
        "clip per tensor": {"encoding": encoded_per_tensor, "trials": 10_000},
    }
    assert bound(multiplier, **faults[fault]) > 1 / multiplier


@pytest.mark.parametrize("kind", ["blt", "banded"])
def test_correlated_noise_is_worth_what_is_charged(kind):
    """A device that comes as often as it may; the best guess looks at C times everything released."""
    rounds, separation, trials, grid = 6, 2, 100_000, CLIP / STEP
    make = Correlated.blt if kind == "blt" else Correlated.banded
    scores = []
    for present in (True, False):
        mechanism = make(
            rounds=rounds,
            min_separation=separation,
            noise_multiplier=2.0,
            norm_bound=grid,
            coordinates=trials,
        )
        stream, released = Keystream(simulation_key("audit", kind, int(present))), []
        for number in range(1, rounds + 1):
            comes = present and (number - 1) % separation == 0
            total = np.full(trials, int(grid) if comes else 0, np.int64)
            mechanism = mechanism.release(total, number, stream).following
            released.append(total)
        row = mechanism.factorization.coefficients(rounds)
        matrix = np.array([[row[t - s] if t >= s else 0.0 for s in range(rounds)] for t in range(rounds)])
        looked_for = matrix @ (np.arange(rounds) % separation == 0)
        scores.append(looked_for @ (matrix @ np.array(released)))
    claimed = 1 / mechanism.event.noise_multiplier
    assert 0.9 * claimed < gdp_lower_bound(*scores) <= claimed


def test_the_bound_holds_as_often_as_it_says():
    """Perfect Gaussian scores: the bound must stay below mu = 1 in every one of many repetitions."""
    rng = np.random.default_rng(0)
    found = [
        gdp_lower_bound(rng.normal(1.0, 1.0, 4000), rng.normal(0.0, 1.0, 4000), confidence=0.99)
        for _ in range(60)
    ]
    assert max(found) <= 1.0
    assert min(found) > 0.6
    assert gdp_lower_bound(rng.normal(size=1000), rng.normal(size=1000)) == 0.0


def test_clopper_pearson_is_the_exact_interval():
    from scipy.stats import binom

    hits = np.array([0, 3, 40])
    for hit, rate in zip(hits, clopper_pearson_upper(hits, 100, 0.01), strict=True):
        assert binom.cdf(hit, 100, rate) == pytest.approx(0.01)
    assert clopper_pearson_upper(np.array([100]), 100, 0.01)[0] == 1.0


def test_the_one_run_bound():
    """No guesses better than chance prove nothing; all right at once proves much; delta weakens the proof."""
    assert one_run_lower_bound(500, 1000, 1e-5, 1000) == 0.0
    strong = one_run_lower_bound(100, 100, 0.0, 1000)
    assert strong == pytest.approx(-np.log(0.05 ** (-1 / 100) - 1), abs=1e-3)  # rate**100 = 0.05
    assert one_run_lower_bound(100, 100, 1e-5, 1000) < strong
    assert one_run_lower_bound(90, 100, 1e-5, 1000) < one_run_lower_bound(95, 100, 1e-5, 1000)
    with pytest.raises(ConfigError, match="right <= guesses"):
        one_run_lower_bound(2, 1, 1e-5, 10)


@pytest.mark.parametrize(("multiplier", "least", "claimed"), [(1.0, 0.7, 4.38), (0.5, 2.0, 10.0)])
def test_one_release_with_many_canaries(multiplier, least, claimed):
    """A thousand devices in or out by a coin, one release, guesses where the score is clear (delta 1e-5)."""
    rng, count, size = np.random.default_rng(5), 1000, 20_000
    directions = rng.normal(size=(count, size)).astype(np.float32)
    directions *= 10 / np.linalg.norm(directions, axis=1)[:, None]
    updates = encode(directions, STEP, CLIP).updates
    taking_part = rng.random(count) < 0.5
    total = updates[taking_part].sum(axis=0, dtype=np.int64)
    stream = Keystream(simulation_key("audit", "one run", str(multiplier)))
    Independent(multiplier, CLIP / STEP).release(total, 1, stream)
    scores = updates @ total.astype(np.float64)
    order = np.argsort(scores)
    clear = 50  # guess the highest and the lowest, abstain on the rest
    right = int(taking_part[order[-clear:]].sum() + (~taking_part[order[:clear]]).sum())
    assert least < one_run_lower_bound(right, 2 * clear, 1e-5, count) < claimed


def test_too_few_scores_are_refused():
    with pytest.raises(ConfigError, match="100 scores"):
        gdp_lower_bound(np.zeros(99), np.zeros(200))


def test_the_noise_of_a_million_coordinates_is_known_to_half_a_percent():
    total = np.zeros(10**6, np.int64)
    Independent(3.0, 2.0**20).release(total, 1, Keystream(simulation_key("audit", "interval")))
    low, high = noise_interval(total)
    assert low < 3.0 * 2.0**20 < high < low * 1.01
