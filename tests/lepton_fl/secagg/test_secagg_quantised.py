"""Few bits: unbiased, exact sums or none, a bound that holds, and a ring that is found out where not."""

import os
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fl.errors import ConfigError, Rejection, UpdateRejected
from lepton_fl.packing import packed_size
from lepton_fl.secagg.context import RoundContext, Rules
from lepton_fl.secagg.encoding import WEIGHT, Counter, Exact, Rotated, from_wire, to_wire, wire_bytes
from lepton_fl.secagg.masks import ring_type
from lepton_fl.secagg.quantised import (
    SURE,
    TUNED,
    Quantised,
    deviations,
    from_message,
    ring_bits,
    to_message,
)
from lepton_fl.secagg.rehearsal import ideal, rehearse
from lepton_fl.secagg.server import Stage
from lepton_fl.secagg.uploads import Intake, MemorySpool, elements

SEED = "5a" * 32


def updates_of(n, d, seed=0, size=20_000):
    return (np.random.default_rng(seed).normal(size=(n, d)) * size).astype(np.int32)


def encoding_for(updates, bits, *, weight=1, slack=1.0, **more):
    """With a reach that just holds the sum of these updates."""
    reach = max(1.0, float(np.linalg.norm(updates.sum(axis=0, dtype=np.int64)))) * slack
    return Quantised(updates.shape[1], len(updates), weight, reach, SEED, bits, **more)


def added(encoding, vectors):
    total = np.zeros(encoding.length, ring_type(encoding.bits))
    for vector in vectors:
        total += vector
    return total


# --- what is learnt -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 20),
    d=st.integers(1, 40),
    bits=st.integers(7, 20).filter(lambda b: b != 16),
    weights=st.data(),
)
def test_the_sum_is_exactly_that_of_the_integers(n, d, bits, weights):
    updates = updates_of(n, d, seed=n * d)
    counters = (Counter(WEIGHT, 50), Counter("examples", 2**40))
    encoding = encoding_for(updates, bits, weight=50, slack=4.0, counters=counters)
    given = weights.draw(st.lists(st.integers(1, 50), min_size=n, max_size=n))
    coins = [os.urandom(4 * d) for _ in updates]
    whole = [encoding.integers(u, w, lambda k, c=c: c) for u, w, c in zip(updates, given, coins, strict=True)]
    vectors = [
        encoding.encode(u, w, lambda k, c=c: c, {"examples": 7})
        for u, w, c in zip(updates, given, coins, strict=True)
    ]
    exact = np.sum(whole, axis=0)
    total = added(encoding, vectors)
    found = encoding.decode(total)
    inside = bool((np.abs(exact) < 2 ** (bits - 1)).all())
    assert found.counters == {WEIGHT: sum(given), "examples": 7 * n}
    assert np.array_equal(found.update, exact) == inside == (not encoding.has_left_ring(total, found))


def test_the_estimate_is_unbiased_and_its_error_as_computed():
    updates = updates_of(20, 300)
    encoding, true = encoding_for(updates, 7), updates.sum(axis=0, dtype=np.int64)
    found = []
    for _ in range(80):
        total = added(encoding, [encoding.encode(u, 1, os.urandom) for u in updates])
        sums = encoding.decode(total)
        assert not encoding.has_left_ring(total, sums)
        found.append(encoding.restore(sums) - true)
    errors = np.array(found) * encoding.scale  # ring steps
    assert abs(errors.mean(axis=0)).max() < 5.5 * sqrt(20 / 6 / 80)  # 5.5 deviations of a mean of 80
    assert errors.var() == pytest.approx(20 / 6, rel=0.05)


def test_weights_count_in_proportion():
    updates = updates_of(10, 500)
    weights = np.arange(1, 11)
    true = (updates.astype(np.int64) * weights[:, None]).sum(axis=0)
    encoding = Quantised(500, 10, 10, float(np.linalg.norm(true)) / 10, SEED, 14)
    total = added(
        encoding, [encoding.encode(u, int(w), os.urandom) for u, w in zip(updates, weights, strict=True)]
    )
    restored = encoding.restore(encoding.decode(total))
    assert np.linalg.norm(restored - true) < 0.005 * np.linalg.norm(true)
    assert encoding.norm(encoding.decode(total)) == pytest.approx(np.linalg.norm(true) / 10, rel=1e-3)


@pytest.mark.parametrize("d", [1, 2, 3, 7, 64, 65, 127])
def test_any_number_of_coordinates(d):
    updates = updates_of(5, d)
    encoding = encoding_for(updates, 14, slack=1.2)
    total = added(encoding, [encoding.encode(u, 1, os.urandom) for u in updates])
    restored = encoding.restore(encoding.decode(total))
    assert np.allclose(restored, updates.sum(axis=0), atol=25 / encoding.scale)


def test_zero_updates_and_the_largest_ones():
    encoding = Quantised(10, 4, 1, 2.0**33, SEED, 9)
    zero = [encoding.encode(np.zeros(10, np.int32), 1, os.urandom) for _ in range(4)]
    assert not encoding.decode(added(encoding, zero)).update.any()
    for value in (2**31 - 1, -(2**31)):
        vectors = [encoding.encode(np.full(10, value, np.int32), 1, os.urandom) for _ in range(4)]
        found = encoding.decode(added(encoding, vectors))
        assert np.allclose(encoding.restore(found), 4.0 * value, atol=30 / encoding.scale)


# --- the bound ------------------------------------------------------------------------------------------


def test_the_bound_holds_for_the_worst_direction_and_is_not_slack_by_much():
    """All the energy in one coordinate, all devices alike, and rounding that always has a half to decide."""
    d, n, risk = 256, 10, 3
    update = np.zeros(d, np.int32)
    update[5] = 2**20
    left = 0
    for attempt in range(120):
        seed = f"{attempt:064x}"
        encoding = Quantised(d, n, 1, float(n * 2**20), seed, 8, risk)
        total = added(encoding, [encoding.encode(update, 1, os.urandom) for _ in range(n)])
        left += encoding.has_left_ring(total, encoding.decode(total))
    assert left <= 120 * 2**-risk  # a flat vector cannot even leave it
    gaussian = np.random.default_rng(0).normal(size=d)
    update = (gaussian / np.linalg.norm(gaussian) * 2**20).astype(np.int32)
    left = 0
    for attempt in range(120):
        encoding = Quantised(d, n, 1, float(n * 2**20), f"{attempt:064x}", 8, risk)
        total = added(encoding, [encoding.encode(update, 1, os.urandom) for _ in range(n)])
        left += encoding.has_left_ring(total, encoding.decode(total))
    assert left <= 120 * 2**-risk


@settings(max_examples=60, deadline=None)
@given(
    resolution=st.sampled_from([2, 4, 8]),
    cohort=st.integers(1, 1000),
    d=st.integers(1, 10**7),
    risk=st.sampled_from([TUNED, SURE]),
)
def test_the_ring_is_as_wide_as_it_must_be_and_no_wider(resolution, cohort, d, risk):
    bits = ring_bits(resolution, cohort, d, risk)
    deviation = sqrt(cohort * (4.0 ** (resolution - 3) + 0.25))
    assert 2 ** (bits - 1) - 1 >= deviations(d, risk) * deviation * (1 - 1e-9)
    assert bits in (2, 17) or 2 ** (bits - 2) - 1 < deviations(d, risk) * deviation
    encoding = Quantised(d, cohort, 1, 1e6, SEED, bits, risk)
    assert encoding.scale > 0
    assert encoding.checks * (ring_type(bits).itemsize * 8 - bits) >= 48


def test_bits_that_do_not_suffice_are_refused_with_numbers():
    with pytest.raises(
        ConfigError, match="7 bits are too few: rounding the updates of 1000 devices"
    ) as caught:
        Quantised(100_000, 1000, 1, 1.0, SEED, 7)
    assert "9 bits or more" in caught.value.hint


@pytest.mark.parametrize("slack", [0.5, 0.2, 0.02, 1e-4])
def test_a_sum_that_has_left_its_ring_is_found_out(slack):
    updates, caught, left = updates_of(8, 200), 0, 0
    for attempt in range(40):
        encoding = Quantised(
            200, 8, 1, slack * float(np.linalg.norm(updates.sum(axis=0))), f"{attempt:064x}", 7
        )
        coins = [os.urandom(800) for _ in updates]
        exact = sum(encoding.integers(u, 1, lambda k, c=c: c) for u, c in zip(updates, coins, strict=True))
        total = added(
            encoding, [encoding.encode(u, 1, lambda k, c=c: c) for u, c in zip(updates, coins, strict=True)]
        )
        found = encoding.decode(total)
        wrapped = not np.array_equal(found.update, exact)
        left += wrapped
        caught += encoding.has_left_ring(total, found)
    assert caught == left
    assert left == 40 or slack == 0.5


@pytest.mark.parametrize("bits", [7, 12, 15, 20, 31])
def test_one_coordinate_that_wraps_once_is_enough(bits):
    updates = updates_of(4, 50)
    encoding = encoding_for(updates, bits, slack=2.0)
    vectors = [encoding.encode(u, 1, os.urandom) for u in updates]
    good = added(encoding, vectors)
    assert not encoding.has_left_ring(good, encoding.decode(good))
    moved = good.copy()
    moved[7:8] += moved.dtype.type(2 ** (bits - 1))  # as a sum that is half a ring further would look
    assert encoding.has_left_ring(moved, encoding.decode(moved))


# --- what goes in ---------------------------------------------------------------------------------------


def test_what_is_no_update_of_this_plan_is_refused():
    encoding = Quantised(4, 10, 5, 100.0, SEED, 8)
    good = np.zeros(4, np.int32)
    cases = [
        (np.zeros(5, np.int32), 1, Rejection.WRONG_SHAPE),
        (np.zeros(4, np.float32), 1, Rejection.WRONG_SHAPE),
        (np.full(4, np.nan), 1, Rejection.WRONG_SHAPE),
        (good, 0, Rejection.OUT_OF_RANGE),
        (good, 6, Rejection.OUT_OF_RANGE),
    ]
    for update, weight, reason in cases:
        with pytest.raises(UpdateRejected) as caught:
            encoding.encode(update, weight, os.urandom)
        assert caught.value.reason is reason
    tiny = Quantised(4, 10, 5, 1e-30, SEED, 8)
    with pytest.raises(UpdateRejected) as caught:
        tiny.encode(np.full(4, 10**6, np.int32), 5, os.urandom)
    assert caught.value.reason is Rejection.OUT_OF_RANGE


@pytest.mark.parametrize(
    "more",
    [
        {"num_coordinates": 0},
        {"cohort": 0},
        {"max_weight": 0},
        {"reach": 0.0},
        {"reach": float("nan")},
        {"reach": float("inf")},
        {"seed": "5a"},
        {"risk": 0},
        {"survivors": 3},
        {"counters": (Counter(WEIGHT, 1), Counter(WEIGHT, 1))},
    ],
)
def test_parameters_that_make_no_sense(more):
    good = {"num_coordinates": 4, "cohort": 10, "max_weight": 5, "reach": 100.0, "seed": SEED, "bits": 8}
    Quantised(**good)
    with pytest.raises(ConfigError):
        Quantised(**good | more)


# --- on the wire ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(2, 32), st.data())
def test_vectors_travel_packed_and_come_in_pieces_of_any_size(d, bits, data):
    encoding = Exact(d, 1, 1, 1, (Counter(WEIGHT, 1), Counter("more", 2**20)), bits=bits)
    rng = np.random.default_rng(d * bits)
    vector = rng.integers(0, 2**16, encoding.length).astype(ring_type(bits))
    wire = to_wire(encoding, vector)
    assert len(wire) == wire_bytes(encoding)
    head = (1 << bits) - 1
    again = from_wire(encoding, wire)
    assert (again[:d] == vector[:d] & again.dtype.type(head)).all()
    assert (again[d:] == vector[d:]).all()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=6)))
    pieces = [bytes(part) for part in np.split(wire, cuts)]
    assert np.array_equal(np.concatenate(list(elements(iter(pieces), encoding))), again)
    with pytest.raises(ValueError, match="Expected"):
        from_wire(encoding, wire[:-1])


def test_rings_of_sixteen_and_thirty_two_bits_travel_as_they_always_have():
    for bits in (16, 32):
        encoding = Exact(9, 3, 1, 100, bits=bits)
        vector = encoding.encode(np.arange(9, dtype=np.int32), 1)
        assert bytes(to_wire(encoding, vector)) == vector.tobytes()
        assert wire_bytes(encoding) == encoding.length * bits // 8


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.sampled_from([6, 7, 9, 12, 17, 32]))
def test_a_plain_round_sends_no_more_bits_than_the_integers_have(d, bits):
    updates = updates_of(3, d)
    encoding = encoding_for(updates, bits, slack=2.0)
    for update in updates:
        vector = encoding.encode(update, 1, os.urandom)
        message = to_message(encoding, vector)
        again = from_message(encoding, message)
        assert ((again - vector).astype(np.uint64) & np.uint64(2**bits - 1))[:d].max() == 0
        assert np.array_equal(again[d:], vector[d:])
        assert len(message) <= 1 + wire_bytes(encoding)


def test_messages_that_are_none():
    encoding = Quantised(10, 4, 1, 1e5, SEED, 8)
    good = to_message(encoding, encoding.encode(np.full(10, 900, np.int32), 1, os.urandom))
    from_message(encoding, good)
    wider, narrower = good.copy(), good.copy()
    wider[0], narrower[0] = 9, 0
    for bad in (good[:-1], np.append(good, good[:1]), good[:0], wider, narrower):
        with pytest.raises(UpdateRejected) as caught:
            from_message(encoding, bad)
        assert caught.value.reason is Rejection.WRONG_SHAPE


@pytest.mark.parametrize("encoding", [
    Quantised(203, 6, 3, 5e5, SEED, 7),
    Quantised(203, 6, 3, 5e5, SEED, 13),
    Quantised(203, 6, 3, 5e5, SEED, 20),
    Exact(203, 6, 3, 30_000, bits=24),
    Rotated(203, 6, 3, 5e5, SEED, bits=12),
], ids=lambda e: f"{type(e).__name__}-{e.bits}")  # fmt: skip
def test_the_real_protocol_brings_the_sum_that_was_sent(encoding):
    """Masks are added in lanes of 16 or 32 bits, vectors travel in fewer, one device leaves in mid-round."""
    updates, names = updates_of(6, 203, size=3000), [f"d{i}" for i in range(6)]
    context = RoundContext("lab", "run", 1, 1, bytes(32), bytes(32), encoding, Rules(min_cohort=4))
    made = {
        name: encoding.encode(update, 1 + i % 3, *(() if isinstance(encoding, Exact) else (os.urandom,)))
        for i, (name, update) in enumerate(zip(names, updates, strict=True))
    }
    vectors = {name: vector.copy for name, vector in made.items()}
    outcome = rehearse(context, vectors, os.urandom, drops={"d4": Stage.UPLOADS})
    expected = ideal(context, vectors, outcome.survivors)
    assert outcome.survivors == ("d0", "d1", "d2", "d3", "d5")
    d, mask = encoding.num_coordinates, (1 << encoding.bits) - 1
    assert ((outcome.total ^ expected)[:d] & expected.dtype.type(mask)).max() == 0
    assert np.array_equal(outcome.total[d:], expected[d:])
    assert np.array_equal(encoding.decode(outcome.total).update, encoding.decode(expected).update)
    assert (
        context.upload_bytes
        == packed_size(d, encoding.bits) + (encoding.length - d) * ring_type(encoding.bits).itemsize
    )


def test_a_packed_sum_goes_on_from_its_checkpoint():
    encoding = Quantised(100, 4, 1, 1e5, SEED, 7)
    context = RoundContext("lab", "run", 1, 1, bytes(32), bytes(32), encoding, Rules(min_cohort=4))
    spool, vectors = MemorySpool(), []
    intake = Intake(context, spool)
    for i, update in enumerate(updates_of(4, 100)):
        vectors.append(encoding.encode(update, 1, os.urandom))
        intake.chunk(f"d{i}", 0, bytes(to_wire(encoding, vectors[-1])))
    intake.add("d0")
    intake.add("d1")
    head, body = intake.checkpoint()
    resumed = Intake(context, spool, head + bytes(body))
    resumed.settle({"d1", "d2", "d3"})
    assert np.array_equal(
        encoding.decode(resumed.total).update, encoding.decode(added(encoding, vectors[1:])).update
    )
