"""Who contributed, and what their updates count."""

from itertools import pairwise
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.plan import CORRECTION_SCALE, RunSpec
from lepton_fl.rounds.campaign import RunState, Work, plan_round
from lepton_fl.rounds.collect import collect_training
from lepton_fl.rounds.coverage import Correction, Coverage, History, Share, coverage
from lepton_fl.rounds.exchange import Answer
from lepton_fl.tasks.metrics import TrainingLoss
from lepton_fl.wire.messages import Ticket, TrainReply


def test_the_share_of_the_fleet_of_groups_and_of_each_tenth_by_speed():
    registered = {f"d{i:02}": ("ward",) if i < 5 else ("ward", "icu") for i in range(20)}
    seconds = {f"d{i:02}": float(i) for i in range(18)} | {"d18": inf}  # of d19 nothing is known
    counted = {f"d{i:02}" for i in range(10)} | {"d19", "gone long ago"}
    found = coverage(registered, counted, seconds, {"d18": "slow", "d10": "gone"})
    assert found.fleet == Share(11, 20)
    assert found.groups == {"icu": Share(6, 15), "ward": Share(11, 20)}
    assert len(found.deciles) == 10
    assert sum(share.registered for share in found.deciles) == 19
    assert found.deciles[0] == Share(2, 2)
    assert found.deciles[-1] == Share(0, 1)  # the slowest: it never came in time
    assert found.unknown == Share(1, 1)
    assert found.left_out == {"gone": 1, "not-asked": 7, "slow": 1}
    assert found.sentence() == "11 of 20 devices contributed; left out: 7 not asked, 1 gone, 1 slow"
    assert found.flags(0.0) == []
    flags = found.flags(0.5)
    assert flags[0] == "coverage of group icu: 6 of 15, below the floor of 0.5"
    assert any(flag.startswith("coverage of speed decile 10: 0 of 1") for flag in flags)
    assert Coverage.from_json(found.to_json()) == found


def test_edge_cases_of_coverage():
    nobody = coverage({}, {"d1"}, {}, {})
    assert nobody.fleet == Share(0, 0)
    assert nobody.fleet.value == 1.0
    assert nobody.sentence() == "0 of 0 devices contributed"
    few = coverage({"a": (), "b": ()}, {"a"}, {"a": 1.0, "b": 2.0}, {})
    assert [s.registered for s in few.deciles] == [1, 1] + [0] * 8
    assert few.flags(1.0) == [
        "coverage of fleet: 1 of 2, below the floor of 1",
        "coverage of speed decile 2: 0 of 1, below the floor of 1",
    ]


def heard(**rates):
    history = History()
    for device, (asked, answered) in rates.items():
        for i in range(asked):
            history.heard(device, i < answered, 1.0)
    return history


def test_weights_are_sixteenths_of_one_over_the_rate_within_their_bound():
    correction = Correction(bound=8)
    assert correction.factors(["a", "b"], History()) == (16, 16)
    history = heard(a=(100, 100), b=(100, 50), c=(100, 0), new=(0, 0))
    a, b, c, new = correction.factors(["a", "b", "c", "new"], history)
    assert a == CORRECTION_SCALE
    assert b == pytest.approx(2 * CORRECTION_SCALE, abs=1)
    assert c == 8 * CORRECTION_SCALE  # the bound
    assert new == pytest.approx(2 * CORRECTION_SCALE, abs=1)  # as the fleet on average


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 500), st.floats(0, 1)), min_size=1, max_size=20), st.integers(2, 64))
def test_weights_stay_in_bounds_and_who_answers_more_counts_no_more(rates, bound):
    history = heard(**{f"d{i}": (n, int(n * share)) for i, (n, share) in enumerate(rates)})
    names = list(map("d{}".format, range(len(rates))))
    factors = Correction(bound).factors(names, history)
    assert all(CORRECTION_SCALE <= f <= CORRECTION_SCALE * bound for f in factors)
    by_rate = sorted(zip(names, factors, strict=True), key=lambda nf: history.answered[nf[0]])
    for (one, more), (other, less) in pairwise(by_rate):
        if history.asked[one] == history.asked[other]:
            assert more >= less


def test_the_mean_over_many_rounds_is_that_of_all_devices():
    """Horvitz-Thompson: uncorrected, who seldom answers hardly counts; corrected, it counts as all do."""
    rng, history = np.random.default_rng(1), History()
    values, rates = np.array([0.0, 0.0, 0.0, 1.0]), np.array([1.0, 1.0, 1.0, 0.25])
    names, plain, corrected = list("abcd"), [], []
    for _ in range(6000):
        came = rng.random(4) < rates
        factors = np.array(Correction(8).factors(names, history), np.float64)
        plain.append(values[came].mean())
        # Not normalised by those who came: that would be unbiased only for large cohorts.
        corrected.append((factors * values)[came].sum() / CORRECTION_SCALE / 4)
        for name, here in zip(names, came, strict=True):
            history.heard(name, bool(here), 1.0)
    assert np.mean(plain) == pytest.approx(0.25 * 0.25, abs=0.01)
    assert np.mean(corrected[1000:]) == pytest.approx(0.25, abs=0.02)


# --- the sum ------------------------------------------------------------------------------------------

CORRECTED = {"size": 3, "correction": "inverse-probability"}


class Given:
    def __init__(self, replies):
        self.replies = replies

    def ask(self, plan, request):
        yield from self.replies(plan)

    def tell(self, plan, device_id, refusal):
        assert refusal is None, refusal


@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_the_corrected_mean_is_exact(weighting):
    spec = RunSpec(task="pkg:task", cohort=CORRECTED, weighting=weighting, max_weight=50)
    work = Work("pkg:task", "1", "ab" * 32, 4, TrainingLoss())
    state = RunState(np.zeros(4, np.float32))
    plan = plan_round(spec, "r1", work, "train", 1, state, ["a", "b", "c"], 3, "ab" * 16)
    plan = plan.model_copy(update={"corrections": (16, 40, 128)})
    assert not plan.adds_up
    rng = np.random.default_rng(0)
    updates = rng.integers(-(2**31) + 1, 2**31 - 1, (3, 4)).astype(np.int32)
    examples = [10, 60, 3]

    def replies(plan):
        for device, update, count in zip("abc", updates, examples, strict=True):
            sums = {"loss_sum": np.array([1.0]), "examples": np.array([count])}
            reply = TrainReply(Ticket.of(plan), "1", count, update, sums, 0.1)
            yield Answer(device, reply.to_records())

    collected, mean = collect_training(plan, state.model, Given(replies))
    assert collected.reports == 3
    assert collected.participation["b"].num_examples == 60  # what it said, not what it counts
    own = [10, 50, 3] if weighting == "examples" else [1, 1, 1]
    weights = [w * f for w, f in zip(own, (16, 40, 128), strict=True)]
    whole = [sum(w * int(u[i]) for w, u in zip(weights, updates, strict=True)) for i in range(4)]
    assert mean.tolist() == [np.float64(t) * (plan.grid_step / sum(weights)) for t in whole]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"privacy": {"noise_multiplier": 1.0}}, "noise is made for devices that all count alike"),
        (
            {"secure_aggregation": "required", "clip_norm": 1.0, "weighting": "equal"},
            "sees no single update",
        ),
        ({"aggregation": {"name": "median"}, "weighting": "equal"}, "counts every report the same"),
        ({"quantisation": {}, "clip_norm": 1.0}, "whose ring is made"),
        ({"mode": "buffered"}, "nobody waits for a deadline"),
        ({"local": {"control_variates": True}}, "the plain mean"),
        ({"max_weight": 2**24, "cohort": CORRECTED | {"size": 100}}, "exact sum could overflow"),
    ],
)
def test_a_correction_is_refused_where_it_would_break_a_promise(changes, words):
    cohort = CORRECTED | ({"size": 20} if "secure_aggregation" in changes else {})
    with pytest.raises(ValidationError, match=words):
        RunSpec(**{"task": "pkg:task", "cohort": cohort} | changes)


def test_example_level_privacy_may_be_corrected():
    """There each device's answer is private by itself; what is made of it costs nothing."""
    local = {"unit": "example", "trust": "local", "mechanism": "dp-sgd", "noise_multiplier": 1.0}
    assert RunSpec(task="pkg:task", cohort=CORRECTED, privacy=local).cohort.is_corrected


def test_a_refusal_carries_its_cause_to_the_record():
    from lepton_fl.errors import Cause

    spec = RunSpec(task="pkg:task", cohort={"size": 1})
    work = Work("pkg:task", "1", "ab" * 32, 4, TrainingLoss())
    plan = plan_round(spec, "r1", work, "train", 1, RunState(np.zeros(4, np.float32)), ["a"], 1, "ab" * 16)

    class Silent(Given):
        def tell(self, plan, device_id, refusal):
            pass

    gone = UpdateRejected(Rejection.OFFLINE, "It fell silent.", cause=Cause.HALF_OPEN)
    collected, mean = collect_training(
        plan, np.zeros(4, np.float32), Silent(lambda plan: [Answer("a", gone)])
    )
    assert mean is None
    entry = collected.participation["a"]
    assert (entry.outcome, entry.cause, entry.detail) == ("offline", Cause.HALF_OPEN, "It fell silent.")
