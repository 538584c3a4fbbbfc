"""What devices say of a release: private, unbiased, and enough to find a bad one."""

import math
from dataclasses import replace
from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lepton_fl.delivery.rollout import Health, Known, RolloutPlan, Stage, Standing, Told, decide
from lepton_fl.delivery.trial import (
    CLEARED,
    LOOKS_BAD,
    WORDS,
    Question,
    Trial,
    counted,
    doubt,
    needed,
    probabilities,
    said,
    shares,
    tail_bound,
    truth,
    upper_tail,
)

OLD, NEW = "a" * 64, "b" * 64
EPSILONS = (0.1, 0.5, 1.0, 3.0, 6.0, 20.0)


def chance(word, found, epsilon):
    p, q = probabilities(epsilon)
    return p if word == found else q


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_no_word_is_more_than_e_to_the_epsilon_times_as_likely(epsilon):
    ratios = [chance(w, a, epsilon) / chance(w, b, epsilon) for w, a, b in product(WORDS, repeat=3)]
    assert max(ratios) == pytest.approx(math.exp(epsilon))  # and not less: the answer is worth its price
    assert sum(chance(w, "fine", epsilon) for w in WORDS) == pytest.approx(1)


@pytest.mark.parametrize("found", WORDS)
def test_words_are_drawn_with_these_probabilities(found):
    rng, n = Random(7), 20_000
    counts = counted(said(found, 1.0, rng) for _ in range(n))
    for word in WORDS:
        r = chance(word, found, 1.0)
        assert abs(counts[word] - n * r) < 5 * math.sqrt(n * r * (1 - r))


@given(st.sampled_from(EPSILONS), st.lists(st.sampled_from(WORDS), min_size=1, max_size=30))
def test_the_estimate_is_unbiased(epsilon, found):
    expected = {w: sum(chance(w, f, epsilon) for f in found) for w in WORDS}
    estimate = shares(expected, epsilon)
    for word in WORDS:
        assert estimate[word] == pytest.approx(found.count(word) / len(found), abs=1e-9)
    assert sum(estimate.values()) == pytest.approx(1)


@pytest.mark.parametrize(("n", "k", "r"), [(5, 4, 0.2), (50, 30, 0.5), (1000, 250, 0.212), (10, 0, 0.1)])
def test_the_tail_is_the_binomial_one(n, k, r):
    from scipy.stats import binom

    assert upper_tail(n, k, r) == pytest.approx(binom.sf(k - 1, n, r), rel=1e-9)
    assert upper_tail(n, k, r) != pytest.approx(binom.sf(k + 1, n, r), rel=1e-3)


@pytest.mark.parametrize(("n", "r"), [(1, 0.01), (40, 0.2), (1000, 0.01), (1000, 0.999)])
def test_the_quick_bound_is_one_and_not_far_from_the_tail(n, r):
    from scipy.stats import binom

    for k in range(math.ceil(n * r), n + 1):
        exact = binom.sf(k - 1, n, r)
        assert exact <= tail_bound(n, k, r) * (1 + 1e-9)
        if exact > 1e-300:
            assert math.log(tail_bound(n, k, r)) <= math.log(exact) + math.log(8 * n**0.5)
    assert tail_bound(n, n, r) == pytest.approx(r**n)


def test_the_quick_bound_at_its_edges():
    assert [tail_bound(10, 1, 0.0), tail_bound(10, 0, 0.0), tail_bound(0, 0, 0.5)] == [0.0, 1.0, 1.0]
    assert tail_bound(10, 10, 1.0) == 1.0
    assert tail_bound(2.0**60, 2.0**59, 0.01) == 0.0


@pytest.mark.parametrize("epsilon", EPSILONS[1:])
def test_so_many_answers_as_are_needed_find_a_release_that_is_bad_everywhere(epsilon):
    trial, rng = Trial(epsilon=epsilon, min_answers=1), Random(3)
    n, tries = needed(trial), 300
    for found, low, high in (("worse", 0.95, 1.0), ("drifts", 0.95, 1.0), ("fine", 0.0, LOOKS_BAD + 0.03)):
        seen = [doubt(trial, counted(said(found, epsilon, rng) for _ in range(n))) for _ in range(tries)]
        share = sum(value < LOOKS_BAD for value in seen) / tries
        assert low <= share <= high, (epsilon, n, found, share)


def test_less_epsilon_needs_more_answers():
    assert [needed(Trial(epsilon=e, min_answers=1)) for e in (0.5, 1.0, 3.0)] == [176, 42, 6]
    assert needed(Trial(epsilon=3.0, min_answers=40)) == 40


def test_what_a_device_finds():
    question = Question(max_drop=0.05, min_score=0.7, max_drift=0.3)
    assert truth(question, score=0.9, before=0.92, drift=0.1) == "fine"
    assert truth(question, score=0.9, before=0.96, drift=0.0) == "worse"
    assert truth(question, score=0.69, before=None, drift=0.0) == "worse"
    assert truth(question, score=0.9, before=0.9, drift=0.31) == "drifts"
    assert truth(question, score=0.1, before=0.9, drift=1.0) == "worse"
    assert truth(question, score=float("nan"), before=None, drift=0.0) == "worse"
    loss = Question(max_drop=0.1, min_score=1.0)
    assert truth(loss, score=0.5, before=0.45, drift=0.0, lower_is_better=True) == "fine"
    assert truth(loss, score=0.7, before=0.5, drift=0.0, lower_is_better=True) == "worse"
    assert truth(loss, score=1.1, before=1.1, drift=0.0, lower_is_better=True) == "worse"


@pytest.mark.parametrize("bad", [{"epsilon": 0}, {"epsilon": math.inf}, {"max_drift": 2}, {"max_bad": 0}])
def test_impossible_trials_are_refused(bad):
    with pytest.raises(ValidationError):
        Trial(**bad)


# --- in a rollout -------------------------------------------------------------------------------------


def plan(trial, **health):
    limits = Health(window_s=0, min_devices=1, settle_s=30, trial=trial, **health)
    stages = (Stage(share=0.1), Stage(share=1.0))
    return RolloutPlan(id="r", task="pkg.mod:task", releases={"phone": NEW}, stages=stages, health=limits)


def standing(devices, **fields):
    return Standing("running", told={d.id: Told(0, OLD) for d in devices}, **fields)


def fleet(words):
    return [
        Known(f"d{i:04}", "phone", wanted=NEW, serving=NEW, trials=True, answer=word)
        for i, word in enumerate(words)
    ]


def judge(words, trial, now=100.0, **fields):
    devices = fleet(words)
    every = replace_stages(plan(trial))
    return decide(every, standing(devices, **fields), devices, now)


def replace_stages(made):
    return made.model_copy(update={"stages": (Stage(share=1.0),)})


def test_a_bad_release_is_found_under_strong_randomisation_and_a_good_one_is_not():
    trial, rng = Trial(epsilon=1.0), Random(11)
    bad = [said("worse", 1.0, rng) for _ in range(500)]
    act = judge(bad, trial)
    assert act.kind == "breach"
    assert "on their own rows" in act.cause
    good = [said("fine", 1.0, rng) for _ in range(500)]
    assert judge(good, trial).kind == "finish"


def test_a_stage_waits_for_answers():
    trial = Trial(epsilon=3.0)
    act = judge(["fine"] * 5, trial)
    assert (act.kind, needed(trial)) == ("wait", 6)
    assert "5 devices have answered, 6 must" in act.cause
    assert judge(["fine"] * 6, trial).kind == "finish"
    assert judge(["", ""] * 3, trial).kind == "wait"  # who says nothing is not counted as fine


def test_what_looks_bad_may_settle_and_a_suspicion_does_not_flicker():
    trial = Trial(epsilon=3.0, min_answers=3)
    worse = ["worse"] * 3 + [""]  # 1.8 % by chance; one has not said anything yet, and six must
    act = judge(worse, trial)
    assert act.kind == "suspect"
    assert judge(worse, trial, suspect=act.cause, suspect_since=90.0).kind == "wait"
    assert judge(worse, trial, suspect=act.cause, suspect_since=60.0).kind == "breach"
    assert judge(worse[:-1], trial).kind == "breach"  # all have answered: there is nothing to wait for
    milder = ["worse"] * 3 + ["fine"] * 4  # 27 %: no reason for a suspicion, and none to drop one
    assert judge(milder, trial).kind == "finish"
    assert judge(milder, trial, suspect=act.cause, suspect_since=60.0).kind == "breach"
    cleared = ["worse"] * 3 + ["fine"] * 20
    assert doubt(trial, counted(cleared)) > CLEARED
    assert judge(cleared, trial, suspect=act.cause, suspect_since=60.0).kind == "suspect"


def test_as_many_answers_as_are_needed_decide_at_once():
    trial, words = Trial(epsilon=3.0), ["worse"] * 5 + ["fine"]  # 0.6 %
    assert needed(trial) == len(words)
    assert judge([*words, ""], trial).kind == "breach"
    assert judge([*words[1:], ""], trial).kind == "suspect"  # one less is no sample


def test_beyond_doubt_needs_no_patience():
    trial = Trial(epsilon=6.0, min_answers=5)
    assert judge(["worse"] * 5, trial).kind == "breach"


def test_a_few_devices_that_lie_decide_nothing():
    trial = Trial(epsilon=6.0)
    assert judge(["worse"] * 10 + ["fine"] * 90, trial).kind == "finish"


def test_answers_of_devices_that_serve_something_else_do_not_count():
    trial, devices = Trial(epsilon=6.0, min_answers=5), fleet(["worse"] * 5)
    elsewhere = [replace(device, serving=OLD) for device in devices]
    made = replace_stages(plan(trial))
    assert decide(made, standing(elsewhere), elsewhere, 100.0).kind == "wait"
