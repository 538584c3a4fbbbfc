"""The noise has the law on paper, comes from a cryptographic stream, and leaves no residue of the data."""

import os
from math import exp, pi, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lepton_fl.errors import ConfigError
from lepton_fl.privacy import noise
from lepton_fl.privacy.noise import (
    BLOCK,
    SMOOTH,
    AliasTable,
    DiscreteGaussian,
    Keystream,
    Skellam,
    gaussian_weights,
    simulation_key,
    skellam_weights,
    split_sigma,
)

DRAWS = 1_000_000
KEY = bytes(range(32))


def fixed(label: str) -> Keystream:
    return Keystream(simulation_key("test", label))


def chi_square(drawn, probability, reach: int) -> float:
    """p-value of the draws against a law; rare values share one cell at either end."""
    values = np.arange(-reach, reach + 1)
    expected = len(drawn) * probability(values)
    seen = np.bincount(np.clip(drawn, -reach, reach) + reach, minlength=2 * reach + 1).astype(float)
    expected[[0, -1]] += (len(drawn) - expected.sum()) / 2
    # Cells of at least ten expected draws, merged from the left.
    cells = np.cumsum(expected) // 10
    expected, seen = np.bincount(cells.astype(int), expected), np.bincount(cells.astype(int), seen)
    keep = expected > 0
    return float(stats.chisquare(seen[keep], expected[keep] * seen.sum() / expected[keep].sum()).pvalue)


def gaussian_law(sigma):
    def probability(x):
        support = np.arange(-int(40 * sigma) - 40, int(40 * sigma) + 41)
        return np.exp(-(x**2) / (2 * sigma**2)) / np.exp(-(support**2) / (2 * sigma**2)).sum()

    return probability


# --------------------------------------------------------------------------------------------------- the law


@pytest.mark.parametrize("sigma", [1, 3, 10, 100, 1000])
def test_the_discrete_gaussian_has_its_law(sigma):
    drawn = DiscreteGaussian(sigma).draw(DRAWS, fixed(f"gaussian {sigma}"))
    assert chi_square(drawn, gaussian_law(sigma), 5 * sigma) > 1e-4
    assert drawn.std() == pytest.approx(sigma, rel=4e-3)


@pytest.mark.parametrize("sigma", [1, 3, 10, 100, 1000])
def test_skellam_noise_has_its_law(sigma):
    drawn = Skellam(sigma**2).draw(DRAWS, fixed(f"skellam {sigma}"))
    half = sigma**2 / 2
    assert chi_square(drawn, lambda x: stats.skellam.pmf(x, half, half), 5 * sigma) > 1e-4
    assert drawn.std() == pytest.approx(sigma, rel=4e-3)


@pytest.mark.parametrize("sigma", [1201.0, 2.0**14, 2.0**24 * 1.3, 2.0**40])
def test_a_wide_gaussian_has_its_law(sigma):
    """Too wide to count values: compared in cells, and in the low bits, which must be uniform."""
    drawn = DiscreteGaussian(sigma).draw(DRAWS, fixed(f"wide {sigma}"))
    assert stats.kstest(drawn / sigma, "norm").pvalue > 1e-4
    assert drawn.std() == pytest.approx(sigma, rel=4e-3)
    for modulus in (2, 3, 256):
        assert stats.chisquare(np.bincount(drawn % modulus, minlength=modulus)).pvalue > 1e-4


def test_the_sum_of_two_scales_is_a_discrete_gaussian_to_the_last_digit():
    """The exact convolution of the two tables against the law it replaces, value by value."""
    sigma = 40.0  # a small copy of what split_sigma does: k with t >= 1.75
    low = 12.0
    k = int(low * sqrt(1 - (low / sigma) ** 2) / SMOOTH)
    high = sqrt(sigma**2 - low**2) / k
    x1, x2 = np.arange(-200, 201), np.arange(-60, 61)
    p1, p2 = gaussian_law(low)(x1), gaussian_law(high)(x2)
    stretched = np.zeros(2 * 60 * k + 1)
    stretched[::k] = p2
    both = np.convolve(p1, stretched)
    at = np.arange(-150, 151)
    ratio = both[at + 200 + 60 * k] / gaussian_law(sigma)(at)
    assert np.abs(ratio - 1).max() < 1e-12  # float64 sees no difference; the bound is 2**-86


@given(st.floats(1200.1, 2.0**48))
@settings(max_examples=200, deadline=None)
def test_every_split_is_smooth_and_adds_up(sigma):
    sigmas, factors = split_sigma(sigma)
    assert all(s <= noise.MAX_TABLE_SIGMA for s in sigmas)
    total = sigmas[-1]
    for narrow, factor in zip(reversed(sigmas[:-1]), reversed(factors), strict=True):
        wide = factor * total
        whole = sqrt(narrow**2 + wide**2)
        assert narrow * total / whole >= SMOOTH * (1 - 1e-9)
        total = whole
    assert total == pytest.approx(sigma, rel=1e-12)
    assert sigmas[-1] >= 1


def test_the_exact_weights_are_the_functions_they_stand_for():
    from mpmath import besseli, mp, mpf

    with mp.workdps(60):
        gaussian, one = gaussian_weights(7.25), mpf(2) ** 320
        for x in (0, 1, 13, 90):
            assert abs(gaussian[x] / one / mp.exp(-(mpf(x) ** 2) / (2 * mpf(7.25) ** 2)) - 1) < mpf(10) ** -40
        skellam = skellam_weights(30.5)
        for x in (1, 2, 17, 60):
            expected = besseli(x, mpf(30.5)) / besseli(0, mpf(30.5))
            assert abs(mpf(skellam[x]) / skellam[0] / expected - 1) < mpf(10) ** -30


def test_the_weights_of_a_table_add_up_to_all_words():
    """The alias columns hold every weight exactly: nothing is lost and nothing invented."""
    table = AliasTable(gaussian_weights(2.5))
    capacity = 1 << (128 - table._bits)
    mass: dict[int, int] = {}
    for column, (own, other) in enumerate(table._choices.reshape(-1, 2).tolist()):
        kept = (int(table._high[column]) << 64) + int(table._low[column])
        mass[own] = mass.get(own, 0) + kept
        mass[other] = mass.get(other, 0) + capacity - kept
    assert sum(mass.values()) == 1 << 128
    assert all(mass[x] == mass[-x] for x in range(1, 30))
    total = sum(exp(-(x**2) / 12.5) for x in range(-80, 81))
    for x in range(30):
        assert mass[x] / 2**128 == pytest.approx(exp(-(x**2) / 12.5) / total, rel=1e-12)


def test_a_tie_of_the_first_word_is_settled_by_a_second():
    table = AliasTable(gaussian_weights(2.5))
    column = next(i for i, high in enumerate(table._high) if high > 0 and 0 < table._low[i] < 2**64 - 1)
    own, other = table._choices.reshape(-1, 2)[column].tolist()
    assert own != other
    tie = (column << (64 - table._bits)) | int(table._high[column])

    class Words:
        def __init__(self, *words):
            self.left = list(words)

        def words(self, count):
            taken, self.left = self.left[:count], self.left[count:]
            return np.array(taken, np.uint64)

    low = int(table._low[column])
    assert table.draw(1, Words(tie, low - 1))[0] == own
    assert table.draw(1, Words(tie, low))[0] == other
    assert table.draw(1, Words(tie - 1))[0] == own
    assert table.draw(1, Words(tie + 1))[0] == other


# ------------------------------------------------------------------------------------------ sums and residues


@pytest.mark.parametrize("law", ["skellam", "gaussian"])
def test_shares_add_up_to_the_law_of_their_sum(law):
    """Twenty shares: Skellam exactly, discrete Gaussians to what a chi-square can see."""
    shares, variance = 20, 9.0
    source = Skellam(variance) if law == "skellam" else DiscreteGaussian(sqrt(variance))
    stream, total = fixed(f"shares {law}"), np.zeros(300_000, np.int64)
    for _ in range(shares):
        source.add_to(total, stream)
    half = shares * variance / 2
    expected = (lambda x: stats.skellam.pmf(x, half, half)) if law == "skellam" else gaussian_law(sqrt(180.0))
    assert chi_square(total, expected, 60) > 1e-4


def test_the_low_bits_say_nothing_about_the_data():
    """The attack on floating-point noise asks which residues an output has; here all are equally likely."""
    clip = 2**24
    source = DiscreteGaussian(1.0 * clip)
    for value in (0, 1, clip):
        released = np.full(DRAWS, value, np.int64)
        source.add_to(released, fixed(f"residue {value}"))
        for modulus in (2, 3, 4, 8, 1024):
            seen = np.bincount(released % modulus, minlength=modulus)
            assert stats.chisquare(seen).pvalue > 1e-4, (value, modulus)


def test_coordinates_and_calls_are_independent():
    source, stream = DiscreteGaussian(50.0), fixed("lags")
    first, second = source.draw(DRAWS, stream), source.draw(DRAWS, stream)
    for a, b in ((first[1:], first[:-1]), (first[BLOCK:], first[:-BLOCK]), (first, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / sqrt(DRAWS)


# ------------------------------------------------------------------------------------------------- the stream


def test_the_stream_is_aes_256_in_counter_mode():
    """The first block of AES-256 under the key 00 01 .. 1f is the encryption of the zero counter."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    encryptor = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor()
    block = encryptor.update(bytes(16)) + encryptor.update(bytes(15) + b"\x01")
    assert Keystream(KEY).words(4).tobytes() == block


def test_a_stream_of_the_system_is_never_the_same():
    assert not np.array_equal(Keystream().words(8), Keystream().words(8))


def test_a_fixed_stream_repeats_and_blocks_do_not_matter():
    whole = DiscreteGaussian(3e6).draw(3 * BLOCK + 7, Keystream(KEY))
    again = DiscreteGaussian(3e6).draw(3 * BLOCK + 7, Keystream(KEY))
    assert np.array_equal(whole, again)
    assert simulation_key("run", 1) != simulation_key("run", 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_repeat_its_parents_noise():
    stream = Keystream()
    stream.words(4)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, stream.words(4).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reading, 32)
    os.close(reading)
    os.close(writing)
    assert len(theirs) == 32
    assert theirs != stream.words(4).tobytes()


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("sigma", [0.0, -1.0, 0.05, 2.0**49, float("nan"), float("inf")])
def test_a_noise_outside_the_bounds_is_refused(sigma):
    with pytest.raises(ConfigError, match="grid steps"):
        DiscreteGaussian(sigma)


@pytest.mark.parametrize("variance", [0.0, -1.0, 2.0**30, float("nan")])
def test_a_share_outside_the_bounds_is_refused(variance):
    with pytest.raises(ConfigError, match="Skellam share"):
        Skellam(variance)


def test_only_flat_int64_sums_take_noise():
    for wrong in (np.zeros(3, np.int32), np.zeros((2, 2), np.int64), np.zeros(3)):
        with pytest.raises(ValueError, match="flat int64"):
            DiscreteGaussian(3.0).add_to(wrong, Keystream(KEY))


def test_a_key_has_32_bytes():
    with pytest.raises(ConfigError, match="32 bytes"):
        Keystream(b"short")


def test_the_continuous_width_is_just_below():
    assert noise.continuous_sigma(2.0**14) == pytest.approx(2.0**14, rel=1e-8)
    assert noise.continuous_sigma(2.0**14) < 2.0**14
    with pytest.raises(ConfigError):
        noise.continuous_sigma(2.0)
    # What the argument rests on: a sum over whole shifts of a width of 1.75 is flat.
    x = np.arange(-60, 61)
    sums = [np.exp(-((x - c) ** 2) / (2 * SMOOTH**2)).sum() for c in np.linspace(0, 1, 21)]
    assert max(sums) / min(sums) - 1 < 1e-14
    assert 4 * exp(-2 * pi**2 * SMOOTH**2) < 2.0**-84
