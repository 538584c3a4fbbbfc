"""Lower bounds on the privacy loss, from running the real code: what a claim is compared with.

An accountant says what a mechanism costs if the code is right. The audit runs the code many times with and
without one canary device, guesses from the output which it was, and turns the guesses' error rates into a
lower bound on mu of Gaussian differential privacy that holds with the given confidence (Nasr et al. 2023). A
bound above ``1 / noise_multiplier`` proves a fault: noise too small, a tensor left bare, a clip per tensor
instead of one.

    scores_in, scores_out = release_scores(release, canary, trials=50_000)
    assert gdp_lower_bound(scores_in, scores_out) <= 1 / noise_multiplier
"""

from collections.abc import Callable
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError

Floats = NDArray[np.float64]
Release = Callable[[NDArray[np.int64]], None]  # adds noise to (trials * P,) sums in place

_SHARE = 10  # one score in ten chooses the threshold, the others judge it
_QUANTILES = np.linspace(0.01, 0.99, 64)  # where a threshold may be


def release_scores(release: Release, canary: NDArray[np.int64], trials: int) -> tuple[Floats, Floats]:
    """How much the release looks like the canary, with and without it: two times (trials,) scores.

    Args:
        release: the code under audit; sums of all trials are one long vector to it.
        canary: (P,) the integers of one device, as encoded.
        trials: of either kind.
    """
    direction = canary / np.linalg.norm(canary)
    scores = []
    for total in (np.tile(canary, trials), np.zeros(trials * len(canary), np.int64)):
        release(total)
        scores.append(np.asarray(total.reshape(trials, len(canary)) @ direction, np.float64))
    return scores[0], scores[1]


def gdp_lower_bound(scores_in: Floats, scores_out: Floats, confidence: float = 0.999) -> float:
    """The largest mu that the scores rule out from below, zero if none.

    A tenth of the scores picks a threshold; on the others, Clopper-Pearson bounds both error rates there. A
    mu-GDP mechanism allows no test with ``quantile(1 - false positives) - quantile(false negatives) > mu``.

    Args:
        scores_in: with the canary, higher where it seems present.
        scores_out: without it.
        confidence: that the bound holds.

    Raises:
        ConfigError: fewer than a hundred scores of either kind.
    """
    if min(len(scores_in), len(scores_out)) < 100:
        raise ConfigError(f"Expected 100 scores or more, got {len(scores_in)} and {len(scores_out)}.")
    chance = (1 - confidence) / 2  # of either rate's bound
    cuts = np.quantile(np.concatenate([scores_in[::_SHARE], scores_out[::_SHARE]]), _QUANTILES)
    rough = _mu_at(cuts, scores_in[::_SHARE], scores_out[::_SHARE], chance)
    chosen = cuts[[int(np.argmax(rough))]]
    rest = np.arange(len(scores_in)) % _SHARE > 0, np.arange(len(scores_out)) % _SHARE > 0
    return max(0.0, float(_mu_at(chosen, scores_in[rest[0]], scores_out[rest[1]], chance)[0]))


def _mu_at(cuts: Floats, present: Floats, absent: Floats, chance: float) -> Floats:
    """What guessing at each of these thresholds proves."""
    from scipy.stats import norm

    missed = np.searchsorted(np.sort(present), cuts, side="right")
    alarms = len(absent) - np.searchsorted(np.sort(absent), cuts, side="right")
    false_positives = clopper_pearson_upper(alarms, len(absent), chance)
    false_negatives = clopper_pearson_upper(missed, len(present), chance)
    proven: Floats = norm.isf(false_positives) - norm.ppf(false_negatives)
    return proven


def clopper_pearson_upper(hits: NDArray[np.int64], trials: int, chance: float) -> Floats:
    """An upper bound on a rate that fails with probability ``chance`` (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    bound = beta.isf(chance, hits + 1.0, np.maximum(trials - hits, 0) + 1e-300)
    return np.where(hits >= trials, 1.0, bound)


def one_run_lower_bound(
    right: int, guesses: int, delta: float, canaries: int, confidence: float = 0.95
) -> float:
    """The epsilon that one training run with many canaries rules out.

    Steinke, Nasr and Jagielski 2023, Theorem 5.2. Every canary was in or out by a fair coin; ``right`` of
    ``guesses`` were guessed right, the auditor abstained on the others.

    Args:
        right: correct guesses.
        guesses: how many were made.
        delta: of the claim.
        canaries: how many there were.
        confidence: that the bound holds.
    """
    if not 0 <= right <= guesses <= canaries:
        raise ConfigError(f"Expected right <= guesses <= canaries, got {right}, {guesses}, {canaries}.")
    low, high = 0.0, 20.0
    if _one_run_p_value(right, guesses, low, delta, canaries) >= 1 - confidence:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        refuted = _one_run_p_value(right, guesses, middle, delta, canaries) < 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


def _one_run_p_value(right: int, guesses: int, epsilon: float, delta: float, canaries: int) -> float:
    """How likely so many right guesses are if the claim is true."""
    from scipy.stats import binom

    rate = 1 / (1 + np.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, rate))
    below = (
        binom.sf(np.arange(right - 1, -1, -1) - 1, guesses, rate) - tail
    )  # P(right - i <= X < right), i >= 1
    slope = float(np.max(below / np.arange(1, right + 1), initial=0.0))
    return min(1.0, tail + slope * delta * 2 * canaries)


def noise_interval(draws: NDArray[np.int64], chance: float = 1e-6) -> tuple[float, float]:
    """An interval for the standard deviation of normal draws that is wrong with probability ``chance``."""
    from scipy.stats import chi2

    total, count = float(np.sum(draws.astype(np.float64) ** 2)), len(draws)
    return sqrt(total / chi2.isf(chance / 2, count)), sqrt(total / chi2.ppf(chance / 2, count))
