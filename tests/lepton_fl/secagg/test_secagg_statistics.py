"""What a coordinator sees of an upload says nothing about what is in it: statistics over many rounds."""

import os

import numpy as np
import pytest

from lepton_fl.secagg.context import COMPLETE, hidden_odds
from lepton_fl.secagg.keys import has_edge
from lepton_fl.secagg.masks import add_masks

D = 1 << 17


def upload(value, bits):
    """What leaves a device whose vector is constant: its masks are what hides it."""
    vector = np.full(D, value, f"<u{bits // 8}")
    add_masks(vector, [(os.urandom(32), 1), (os.urandom(32), -1)])
    return vector


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("world", ["zero", "max"])
def test_bytes_are_uniform_and_uncorrelated(bits, world):
    vector = upload(0 if world == "zero" else 2**bits - 1, bits)
    data = vector.view(np.uint8)
    for place in range(bits // 8):
        column = data[place :: bits // 8]
        counts = np.bincount(column, minlength=256)
        expected = len(column) / 256
        assert ((counts - expected) ** 2 / expected).sum() < 400  # 255 degrees of freedom: 6.4 sigma
    centred = vector.astype(np.float64) - (2.0**bits - 1) / 2
    variance = (centred**2).mean()
    for lag in (1, 2, 8192, 32768):
        correlation = (centred[:-lag] * centred[lag:]).mean() / variance
        assert abs(correlation) < 6 / np.sqrt(D - lag)


def test_two_worlds_cannot_be_told_apart():
    """A classifier trained on uploads of zeros and of maxima is no better than a coin: AUC 0.5 +- 3 sigma."""
    samples, features = 400, 64

    def world(value):
        out = np.empty((samples, features))
        for i in range(samples):
            vector = np.full(features, value, "<u4")
            add_masks(vector, [(os.urandom(32), 1)])
            out[i] = vector / 2**32 - 0.5
        return out

    zeros, maxima = world(0), world(2**32 - 1)
    half = samples // 2
    direction = maxima[:half].mean(axis=0) - zeros[:half].mean(axis=0)  # the linear classifier of two means
    low, high = zeros[half:] @ direction, maxima[half:] @ direction
    auc = (high[:, None] > low[None, :]).mean()
    sigma = np.sqrt((2 * half + 1) / (12 * half * half))
    assert abs(auc - 0.5) < 4 * sigma


def test_masks_cancel_only_all_together(make):
    """Subsets of the masked vectors look random; the whole set less the self masks is the sum."""
    cohort = make(n=6, d=4096)
    cohort.share()
    cohort.close()
    cohort.deliver()
    uploads = cohort.upload(send=False)
    vectors = [np.frombuffer(body, "<u4") for _, body in uploads.values()]
    for count in range(1, 7):
        partial = sum(vectors[:count], np.zeros_like(vectors[0]))
        counts = np.bincount(partial >> 28, minlength=16)
        assert ((counts - len(partial) / 16) ** 2 / (len(partial) / 16)).sum() < 60


def test_the_degree_of_the_hidden_graph():
    n = 200
    odds = hidden_odds(n)
    coins = np.frombuffer(os.urandom(8 * n * n), "<u8").reshape(n, n)
    edges = np.array([[has_edge(int(c), odds) for c in row] for row in np.triu(coins, 1)])
    edges &= np.triu(np.ones((n, n), bool), 1)
    degrees = edges.sum(axis=0) + edges.sum(axis=1)
    q = odds / COMPLETE
    assert degrees.mean() == pytest.approx((n - 1) * q, abs=6 * np.sqrt(q * (1 - q) * 2 / n) * np.sqrt(n))
    assert degrees.min() > 20


def connected(edges):
    reached, new = np.zeros(len(edges), bool), np.zeros(len(edges), bool)
    new[0] = True
    while new.any():
        reached |= new
        new = edges[new].any(axis=0) & ~reached
    return reached.all()


def test_the_bound_on_falling_apart_holds_where_it_can_be_seen():
    """At sigma = 5 bits, honest survivors' graphs fall apart about as often as the bound says, not more."""
    n, sigma, trials = 100, 5, 3000
    odds = hidden_odds(n, sigma=sigma) / COMPLETE
    honest = 70 - 33
    random = np.random.default_rng(5)
    failures = 0
    for _ in range(trials):
        half = np.triu(random.random((honest, honest)) < odds, 1)
        failures += not connected(half | half.T)
    expected = 2.0**-sigma
    assert failures / trials < expected + 4 * np.sqrt(expected / trials)
    assert failures > 0
