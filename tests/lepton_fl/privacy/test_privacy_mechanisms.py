"""Mechanisms on integers: the stream is the matrix, the memory survives, nothing is charged too little."""

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fl.contribution import shrink, tails
from lepton_fl.errors import ConfigError, StateConflict, StateCorrupt
from lepton_fl.plan import PrivatePart
from lepton_fl.privacy.accounting import GdpExact
from lepton_fl.privacy.clipping import AdaptiveClip
from lepton_fl.privacy.events import Gaussian, PoissonGaussian
from lepton_fl.privacy.mechanisms import Correlated, Independent
from lepton_fl.privacy.noise import DiscreteGaussian, Keystream, simulation_key
from lepton_fl.privacy.sealing import seal, unseal

RUN = {"rounds": 40, "min_separation": 5, "max_participations": 8, "noise_multiplier": 3.0}
KINDS = {"blt": Correlated.blt, "banded": Correlated.banded}


def fixed(label: object) -> Keystream:
    return Keystream(simulation_key("mechanism", str(label)))


def run(mechanism, totals, stream):
    """Release a whole run; (rounds, P) in, (rounds, P) out."""
    released = []
    for number, total in enumerate(totals, start=1):
        out = total.copy()
        mechanism = mechanism.release(out, number, stream).following
        released.append(out)
    return np.array(released)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_bound", [2.0**10, 2.0**24])
def test_the_stream_is_the_dense_matrix(kind, norm_bound):
    mechanism = KINDS[kind](**RUN, norm_bound=norm_bound, coordinates=11)
    rounds, bits = RUN["rounds"], mechanism.finer_bits
    assert (bits > 0) == (norm_bound < 2.0**20)  # a fine grid needs no finer one for the noise
    rng = np.random.default_rng(0)
    totals = rng.integers(-(10**6), 10**6, (rounds, 11))
    released = run(mechanism, totals, fixed(kind))
    source, stream = DiscreteGaussian(mechanism.sigma), fixed(kind)
    fresh = np.array([source.draw(11, stream) for _ in range(rounds)]) / 2.0**bits
    row = mechanism.factorization.coefficients(rounds)
    matrix = np.array([[row[t - s] if t >= s else 0.0 for s in range(rounds)] for t in range(rounds)])
    # Only the rounding to whole grid steps differs: half a step a round, through the inverse.
    slack = 0.51 * np.abs(np.linalg.inv(matrix)).sum(axis=1).max()
    assert np.abs(released - totals - np.linalg.solve(matrix, fresh)).max() < slack < norm_bound / 100


@pytest.mark.parametrize("kind", KINDS)
def test_the_release_depends_on_the_data_only_through_their_sum(kind):
    """Whole data go through rounding unchanged: what is added is the same whatever the data are."""
    mechanism = KINDS[kind](**RUN, norm_bound=2.0**12, coordinates=5)
    some = np.random.default_rng(1).integers(-(10**9), 10**9, (40, 5))
    none = np.zeros((40, 5), np.int64)
    assert np.array_equal(run(mechanism, some, fixed(1)) - some, run(mechanism, none, fixed(1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gone", [{1}, {3}, {1, 2, 3}, {2, 3, 7}])
def test_the_noise_of_rounds_that_were_left_out_comes_with_the_next_release(kind, gone):
    """Sums over time are those of the whole matrix, with zeros for the data of those rounds."""
    mechanism = whole = KINDS[kind](**RUN, norm_bound=2.0**12, coordinates=5)
    some, stream, words = np.random.default_rng(1).integers(-(10**6), 10**6, (9, 5)), fixed(1), fixed(1)
    owed = np.zeros(5, np.int64)
    for number in range(1, 10):
        left_out = number in gone
        total, expected = some[number - 1].copy(), some[number - 1] * (not left_out)
        whole = whole.release(expected, number, words).following
        owed += expected
        if not left_out:
            mechanism = mechanism.release(total, number, stream).following
            assert np.array_equal(total, owed)
            owed[:] = 0
            assert np.array_equal(mechanism.memory, whole.memory)
            assert mechanism.next_round == whole.next_round == number + 1
            mechanism = KINDS[kind](**RUN, norm_bound=2.0**12, coordinates=5).restored(mechanism.state())


def test_many_blocks_are_one_vector():
    from lepton_fl.privacy.noise import BLOCK

    size = 2 * BLOCK + 3
    mechanism = Correlated.blt(**RUN, norm_bound=2.0**20, coordinates=size)
    total = np.zeros(size, np.int64)
    following = mechanism.release(total, 1, fixed("blocks")).following
    assert total.std() == pytest.approx(3 * 2.0**20, rel=0.02)
    assert following.memory.shape == (len(mechanism.factorization.decay), size)
    assert np.array_equal(following.memory[0], total)  # the first buffer after the first round


def test_the_noise_of_the_model_is_what_the_plan_says():
    from lepton_fl.privacy.factorization import error

    bound = 2.0**16
    mechanism = Correlated.blt(**RUN, norm_bound=bound, coordinates=4000)
    released = run(mechanism, np.zeros((40, 4000), np.int64), fixed("model"))
    planned = error(mechanism.factorization, 40, 5, 8).final * bound / mechanism.event.noise_multiplier**-1
    assert released.sum(axis=0).std() == pytest.approx(planned, rel=0.05)


def test_what_rounding_costs_is_paid_for():
    """The claimed multiplier holds for the real, slightly larger shift; and it is slight."""
    mechanism = Correlated.blt(
        rounds=2000,
        min_separation=100,
        max_participations=20,
        noise_multiplier=7.4,
        norm_bound=2.0**14,
        coordinates=1_000_000,
    )
    shift = mechanism.norm_bound * mechanism.sensitivity + mechanism._rounding
    continuous = sqrt(mechanism.sigma**2 - 1.75**2) / 2.0**mechanism.finer_bits
    assert continuous / shift >= mechanism.event.noise_multiplier * (1 - 1e-12)
    assert mechanism._rounding / shift < 2e-5


def test_the_whole_run_is_charged_once_and_repeats_on_top():
    mechanism = Correlated.blt(**RUN, norm_bound=2.0**20, coordinates=3)
    assert mechanism.charge(1) == mechanism.event == Gaussian(3.0 / mechanism.sensitivity)
    assert mechanism.charge(2) is None
    repeat = mechanism.charge(2, repeat=True)
    assert isinstance(repeat, Gaussian)
    assert mechanism.event.noise_multiplier < repeat.noise_multiplier < 3.0


def test_an_actual_run_is_charged_for_what_it_was():
    mechanism = Correlated.blt(**RUN, norm_bound=2.0**20, coordinates=3)
    planned = mechanism.event.noise_multiplier
    assert mechanism.event_of(40, 5, 8).noise_multiplier == pytest.approx(planned)
    assert mechanism.event_of(20, 5, 4).noise_multiplier > planned  # closed early
    assert mechanism.event_of(40, 4, 9).noise_multiplier < planned  # a device came back too soon
    with pytest.raises(ConfigError, match="1 to 40 rounds"):
        mechanism.event_of(41, 5, 8)


def test_independent_noise_is_charged_by_round_by_contract_or_by_sample():
    assert Independent(2.0, 100.0).charge(7) == Gaussian(2.0)
    contract = Independent(2.0, 100.0, participations=16)
    assert contract.charge(1) == Gaussian(0.5)
    assert contract.charge(2) is None
    assert contract.charge(2, repeat=True) == Gaussian(2.0)
    drawn = Independent(2.0, 100.0, sampling_probability=0.1)
    assert drawn.charge(3) == PoissonGaussian(0.1, 2.0)
    assert drawn.charge(3, repeat=True) == Gaussian(2.0)
    with pytest.raises(ConfigError, match="sampling"):
        Independent(2.0, 100.0, participations=3, sampling_probability=0.1)


def test_every_attempt_draws_fresh_noise_from_the_same_memory():
    mechanism = Correlated.blt(**RUN, norm_bound=2.0**20, coordinates=50)
    mechanism = mechanism.release(np.zeros(50, np.int64), 1).following
    first, second, before = np.zeros(50, np.int64), np.zeros(50, np.int64), mechanism.state()
    mechanism.release(first, 2)
    mechanism.release(second, 2)
    assert not np.array_equal(first, second)
    assert mechanism.state() == before
    independent = Independent(1.0, 2.0**20)
    independent.release(first, 1)
    independent.release(second, 1)
    assert not np.array_equal(first, second)


def test_rounds_come_in_order_and_sums_have_the_right_shape():
    mechanism = Correlated.blt(**{**RUN, "rounds": 2}, norm_bound=2.0**20, coordinates=3)
    total = np.zeros(3, np.int64)
    for wrong in (0, 3):
        with pytest.raises(StateConflict, match="Expected round 1 to 2"):
            mechanism.release(total, wrong)
    assert not total.any()
    following = mechanism.release(total, 1).following.release(total, 2).following
    for wrong in (1, 2, 3):
        with pytest.raises(StateConflict, match="Expected round 3 to 2"):
            following.release(total, wrong)
    with pytest.raises(ValueError, match="int64"):
        mechanism.release(np.zeros(4, np.int64), 1)
    with pytest.raises(ValueError, match="int64"):
        mechanism.release(np.zeros(3, np.int32), 1)


@pytest.mark.parametrize("name", ["noise_multiplier", "norm_bound"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_noise_without_a_meaning_is_refused(name, value):
    values = {"noise_multiplier": 1.0, "norm_bound": 100.0, name: value}
    with pytest.raises(ConfigError, match=name):
        Independent(**values)
    with pytest.raises(ConfigError, match=name):
        Correlated.blt(**{**RUN, **values}, coordinates=3)


def test_the_noise_is_not_printed():
    mechanism = Correlated.blt(**RUN, norm_bound=2.0**20, coordinates=3)
    release = mechanism.release(np.zeros(3, np.int64), 1)
    for text in (repr(release), repr(release.following)):
        assert "array" not in text
        assert "memory" not in text


# ------------------------------------------------------------------------------------------ the state at rest


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_goes_on_where_it_was(kind):
    fresh = KINDS[kind](**RUN, norm_bound=2.0**20, coordinates=7)
    totals, stream, released = np.zeros((40, 7), np.int64), fixed("restart"), []
    mechanism = fresh
    for number in range(1, 41):
        mechanism = fresh.restored(mechanism.state())  # a restart before every round
        out = totals[number - 1].copy()
        mechanism = mechanism.release(out, number, stream).following
        released.append(out)
    assert np.array_equal(released, run(fresh, totals, fixed("restart")))


def test_a_state_of_another_run_or_a_damaged_one_is_refused():
    mechanism = Correlated.blt(**RUN, norm_bound=2.0**20, coordinates=7)
    state = mechanism.release(np.zeros(7, np.int64), 1).following.state()
    for other in (
        replace(mechanism, noise_multiplier=2.0),
        replace(mechanism, norm_bound=2.0**19),
        replace(mechanism, coordinates=8),
        Correlated.banded(**RUN, norm_bound=2.0**20, coordinates=7),
    ):
        with pytest.raises(StateCorrupt, match="another run"):
            other.restored(state)
    line, _, body = state.partition(b"\n")
    nan = np.full(len(body) // 8, np.nan, "<f8").tobytes()
    for damaged in (b"", state[:-1], state + b"\0", state[1:], b"[]\n" + body, line + b"\n" + nan):
        with pytest.raises(StateCorrupt):
            mechanism.restored(damaged)


def test_a_sealed_state_opens_for_its_run_and_round_only():
    key, state = bytes(range(32)), b"noise" * 100
    box = seal(state, key, run_id="r-1", round_number=7)
    assert unseal(box, key, run_id="r-1", round_number=7) == state
    assert state not in box
    assert seal(state, key, run_id="r-1", round_number=7) != box
    flipped = bytes([*box[:20], box[20] ^ 1, *box[21:]])
    for wrong, run_id, number, other in (
        (flipped, "r-1", 7, key),
        (box[:-1], "r-1", 7, key),
        (b"", "r-1", 7, key),
        (box, "r-2", 7, key),
        (box, "r-1", 6, key),
        (box, "r-1", 7, bytes(32)),
    ):
        with pytest.raises(StateCorrupt, match="does not open"):
            unseal(wrong, other, run_id=run_id, round_number=number)
    with pytest.raises(ConfigError, match="32 bytes"):
        seal(state, b"short", run_id="r-1", round_number=7)


# ------------------------------------------------------------------------------------------ adaptive clipping


def quantile_bits(norms, clip_norm, height):
    part = PrivatePart(bit=height)
    return tails(part, clip_norm, norms, np.ones(len(norms), np.int64), np.zeros(len(norms)))[:, 0]


def tail_of(clip, grid_norm, multiplier):
    """(height, norm of update and tail): as a round has them."""
    part = clip.part(multiplier)
    height = max(1, int(grid_norm * part / np.sqrt(1 - part**2)))
    return height, PrivatePart(bit=height).norm_bound(grid_norm)


@pytest.mark.parametrize("start", [0.01, 1.0, 100.0])
def test_the_clip_finds_the_median_from_anywhere(start):
    """The sign, and noise with it: fails for the update that runs away from the quantile."""
    rng, step, devices, z = np.random.default_rng(0), 2.0**-20, 100, 1.0
    clip = AdaptiveClip(start, bit_noise=devices / 20)
    history = []
    for number in range(100):
        norms = rng.lognormal(0.0, 1.0, devices)
        height, bound = tail_of(clip, clip.clip_norm / step, z)
        total = np.array([quantile_bits(norms, clip.clip_norm, height).sum()], np.int64)
        Independent(z, bound).release(total, number, fixed(f"{start} {number}"))
        clip = clip.updated(int(total[0]), height, devices)
        history.append(clip.clip_norm)
    assert 0.75 < float(np.exp(np.mean(np.log(history[-40:])))) < 1.33


def test_other_quantiles_are_followed_too():
    clip, norms = AdaptiveClip(1.0, bit_noise=5.0, target=0.9), np.linspace(0.01, 1.0, 100)
    for _ in range(400):
        bits = quantile_bits(norms, clip.clip_norm, 1000)
        clip = clip.updated(int(bits.sum()), 1000, 100)
    assert clip.clip_norm == pytest.approx(0.9, abs=0.03)


@given(st.floats(0.1, 10), st.floats(6, 500), st.floats(2.0**10, 2.0**30))
@settings(deadline=None)
def test_the_bit_has_its_noise_and_the_round_its_price(multiplier, bit_noise, grid_norm):
    """One vector, one event: the paper's split of z between update and bit."""
    clip = AdaptiveClip(1.0, bit_noise)
    try:
        height, bound = tail_of(clip, grid_norm, multiplier)
    except ConfigError:
        assert multiplier > 1.4 * bit_noise
        return
    sigma = multiplier * bound
    on_the_count = sigma / (2 * height)  # of one device more or less within the clip
    assert on_the_count == pytest.approx(bit_noise, rel=1 / height)  # a whole number of steps
    update_multiplier = sigma / grid_norm
    if height > 1000:
        paper = (multiplier**-2 - (2 * bit_noise) ** -2) ** -0.5
        assert update_multiplier == pytest.approx(paper, rel=1e-3)


def test_a_round_costs_the_same_whatever_the_clip():
    for clip_norm in (0.01, 1.0, 50.0):
        grid = clip_norm * 2.0**20
        _, bound = tail_of(AdaptiveClip(clip_norm, 5.0), grid, 2.0)
        charged = Independent(2.0, bound).charge(1)
        assert GdpExact().epsilon({charged: 1}, 1e-6) == GdpExact().epsilon({Gaussian(2.0): 1}, 1e-6)


def test_clips_without_a_meaning_are_refused():
    for wrong in (
        {"clip_norm": 0.0},
        {"clip_norm": float("nan")},
        {"bit_noise": 0.0},
        {"target": 1.0},
        {"rate": 0.0},
    ):
        with pytest.raises(ConfigError, match="Expected"):
            AdaptiveClip(**{"clip_norm": 1.0, "bit_noise": 5.0, **wrong})
    with pytest.raises(ConfigError, match="so few devices"):
        AdaptiveClip(1.0, bit_noise=0.5).part(2.0)


def test_the_clip_stays_within_its_bounds():
    clip = AdaptiveClip(1.0, 5.0, lowest=0.5, highest=2.0)
    for _ in range(100):
        clip = clip.updated(-(10**9), 10, 10)
    assert clip.clip_norm == 2.0
    for _ in range(100):
        clip = clip.updated(10**9, 10, 10)
    assert clip.clip_norm == 0.5


def test_a_capped_weight_never_exceeds_one():
    examples = np.array([1, 25, 50, 10**9])
    assert shrink(PrivatePart(weight_cap=50), examples).tolist() == [0.02, 0.5, 1.0, 1.0]
    assert shrink(PrivatePart(), examples) is None
