"""What devices do for a private sum, what is refused of it, and what is refused of a run."""

import json
from dataclasses import replace
from math import sqrt
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_array_equal
from pydantic import ValidationError

from lepton_fl.contribution import check_tail, contributions, shrink, tails
from lepton_fl.errors import ConfigError, Rejection, UpdateRejected
from lepton_fl.plan import PrivatePart, RoundPlan, RunSpec
from lepton_fl.privacy.noise import simulation_key
from lepton_fl.rounds.accumulator import Accumulator, Subtotal, UpdateBatch
from lepton_fl.rounds.campaign import RunState, Work, plan_round
from lepton_fl.rounds.collect import Collected
from lepton_fl.rounds.ledger import MemoryLedger
from lepton_fl.rounds.private import PrivateRounds, PrivateState, budget_of, prepared, refuse_run
from lepton_fl.rounds.secure_sum import (
    encode_answer,
    encode_reply,
    encoding_of,
    least_multiplier,
    noise_share,
)
from lepton_fl.secagg.encoding import Rotated
from lepton_fl.secagg.quantised import Quantised
from lepton_fl.tasks.metrics import TrainingLoss
from lepton_fl.vector import vector_digest
from lepton_fl.wire.messages import Request, Ticket, TrainReply

SIZE = 40
WORK = Work("pkg:task", "1", "ab" * 32, SIZE, TrainingLoss())
FLEET = tuple(f"d{i:02}" for i in range(20))
SKELLAM = {"trust": "distributed", "mechanism": "skellam", "epsilon": 30.0, "delta": 1e-3}
CENTRAL = {"mechanism": "independent", "noise_multiplier": 0.5, "delta": 1e-3}
EVERYTHING = {"adaptive_clip": {"bit_noise": 6.0}, "metrics": {}, "weight_cap": 50}


def spec(privacy, mode="required", **more) -> RunSpec:
    given = {"task": "pkg:task", "rounds": 5, "evaluate_every": 0, "cohort": {"size": 20}}
    return RunSpec.model_validate({**given, "privacy": privacy, **({"secure_aggregation": mode} | more)})


def rounds_of(run: RunSpec) -> PrivateRounds:
    ready = prepared(run, SIZE)
    ledger = MemoryLedger(budget_of(run, ready, "run"))
    key = simulation_key("test")
    return PrivateRounds(run, "run", ready, ledger, sealing_key=key, noise_key=lambda plan: key)


def shaped(run: RunSpec) -> RoundPlan:
    state = RunState(np.zeros(SIZE, np.float32), attempt=1)
    return rounds_of(run).shaped(plan_round(run, "run", WORK, "train", 1, state, FLEET, 20, "00"))


# --- any vector, any tail -------------------------------------------------------------------------------

any_float = st.one_of(
    st.floats(width=32),  # NaN and infinities among them
    st.sampled_from([0.0, -0.0, 1e-45, 1e38, -3.4e38, float("nan"), float("inf"), 1.0]),
)
PLANS = [
    shaped(spec({**kind, **EVERYTHING}, secure={"bits": bits}))
    for kind, bits in (
        (SKELLAM, 32),
        (SKELLAM, 16),
        (SKELLAM, 20),
        ({**SKELLAM, "mechanism": "ddgauss"}, 16),
        ({**SKELLAM, "mechanism": "ddgauss"}, 24),
        (CENTRAL, 32),
    )
]
# The norm that the accountant took for the rotated ones.
ROTATED_L2 = {
    (kind, bits): prepared(
        spec({**SKELLAM, "mechanism": kind, **EVERYTHING}, secure={"bits": bits}), SIZE
    ).distributed.l2
    for kind, bits in (("skellam", 16), ("skellam", 20), ("ddgauss", 16), ("ddgauss", 24))
}


@given(
    arrays(np.float32, (2, SIZE), elements=any_float),
    st.integers(1, 10**12),
    any_float,
    st.sampled_from(PLANS),
)
@settings(max_examples=150, deadline=None)
def test_any_vector_is_refused_or_within_the_norm_that_the_noise_is_made_for(deltas, examples, loss, plan):
    part = plan.private
    counts, losses = np.array([examples, 1]), np.array([loss, loss], np.float64)
    found = contributions(part, deltas, plan.grid_step, plan.clip_norm, counts, losses)
    bound = part.norm_bound(plan.clip_norm / plan.grid_step)
    encoding = encoding_of(plan)
    for row, update in enumerate(found.updates):
        if row in found.refused:
            assert not np.isfinite(deltas[row]).all()
            assert not update.any()
            continue
        head, tail = update[:SIZE], update[SIZE:]
        check_tail(part, tail)
        squares = [int(x) ** 2 for x in update]
        assert sum(int(x) ** 2 for x in head) <= (plan.clip_norm / plan.grid_step) ** 2
        assert sqrt(sum(squares)) <= bound * (1 + 1e-12)
        if isinstance(encoding, Rotated):  # what the ring sees, rotated and rounded
            whole = encoding._round(encoding._scaled(update, 1), Random(row).randbytes)
            assert sum(int(x) ** 2 for x in whole) <= encoding.norm_bound**2
            assert encoding.norm_bound <= ROTATED_L2[part.noise, encoding.bits]
            assert int(np.abs(whole).max()) <= part.limit


@given(
    arrays(np.float32, (3, SIZE), elements=st.floats(-3, 3, width=32)),
    st.lists(st.integers(1, 200), min_size=3, max_size=3),
    st.sampled_from(PLANS),
)
@settings(max_examples=30, deadline=None)
def test_one_pass_adds_the_integers_that_single_devices_send(deltas, examples, plan):
    counts, losses = np.array(examples, np.int64), np.array([0.5, np.nan, 9.0])
    single, fused = Accumulator(plan), Accumulator(plan)
    found = contributions(plan.private, deltas, plan.grid_step, plan.clip_norm, counts, losses)
    single.add(UpdateBatch(found.updates, counts))
    fused.add_deltas(deltas, counts, (), losses)
    assert_array_equal(single.subtotal().total, fused.subtotal().total)


def test_what_the_tail_says():
    part = PrivatePart(bit=10, metrics=1000, most_examples=50, most_loss=4.0)
    norms, examples, losses = (
        np.array([0.5, 1.0, 1.5, 2.0]),
        np.array([25, 50, 99, 5]),
        np.array([1, 4, 9, np.nan]),
    )
    found = tails(part, 1.0, norms, examples, losses)
    assert found.tolist() == [[10, 500, 125], [10, 1000, 1000], [-10, 1000, 1000], [-10, 100, 100]]


def test_a_device_with_few_examples_counts_less_and_none_counts_more():
    plan = shaped(spec({**CENTRAL, "weight_cap": 50}, "off", grid_step=2.0**-20))
    delta = np.full((4, SIZE), 0.01, np.float32)
    counts = np.array([1, 25, 50, 10**9])
    found = contributions(plan.private, delta, plan.grid_step, plan.clip_norm, counts, np.zeros(4))
    per_device = found.updates[:, 0] / found.updates[2, 0]
    assert per_device.tolist() == pytest.approx([0.02, 0.5, 1.0, 1.0], abs=1e-3)
    assert shrink(None, counts) is None
    # Within the clip: a long update of a device with few examples is shrunk first, then cut if need be.
    huge = contributions(plan.private, 100 * delta, plan.grid_step, plan.clip_norm, counts, np.zeros(4))
    norms = np.sqrt((huge.updates.astype(float) ** 2).sum(axis=1)) * plan.grid_step
    assert norms.tolist() == pytest.approx([0.1265, 1.0, 1.0, 1.0], rel=1e-3)


# --- what a coordinator refuses, and a device -----------------------------------------------------------


def reply(plan: RoundPlan, update) -> TrainReply:
    sums = {"loss_sum": np.array([1.0]), "examples": np.array([2])}
    return TrainReply(Ticket.of(plan), plan.task_version, 7, update, sums, 0.1)


@pytest.mark.parametrize("wrong", ["bit", "examples", "negative", "short", "long"])
def test_a_tail_that_no_honest_device_makes_is_refused(wrong):
    plan = shaped(spec({**CENTRAL, **EVERYTHING}, "off"))
    part, update = plan.private, np.zeros(plan.update_size, np.int32)
    update[SIZE] = part.bit
    TrainReply.read(reply(plan, update).to_records(), plan)
    if wrong == "bit":
        update[SIZE] = part.bit - 1
    elif wrong == "examples":
        update[SIZE + 1] = part.metrics + 1
    elif wrong == "negative":
        update[SIZE + 2] = -1
    elif wrong == "short":
        update = update[:-1]
    else:
        update[:SIZE] = int(plan.clip_norm / plan.grid_step)  # beyond the clip, though within all room
    with pytest.raises(UpdateRejected) as refused:
        TrainReply.read(reply(plan, update).to_records(), plan)
    assert refused.value.reason in (Rejection.OUT_OF_RANGE, Rejection.WRONG_SHAPE)


def test_a_request_carries_what_devices_do_and_nothing_else_is_taken():
    plan = shaped(spec({**SKELLAM, **EVERYTHING}))
    request = Request.of(plan, np.zeros(SIZE, np.float32))
    records = replace(request, model_sha256=request.model_sha256).to_records()
    sent = json.loads(records.config["private"])
    assert PrivatePart.model_validate(sent) == plan.private
    for wrong in ('{"noise": "none"', '{"bit": -1}', '{"more": 1}', '{"share_variance": NaN}'):
        with pytest.raises(UpdateRejected, match=r"does not validate|SHA-256"):
            Request.read(replace(records, config={**records.config, "private": wrong}))


def test_a_device_adds_no_noise_to_a_sum_that_fewer_may_make():
    """The share is made for fourteen; a coordinator that asks for it in a sum of any size is refused."""
    plan = shaped(spec(SKELLAM))
    honest = encoding_of(plan)
    assert honest.survivors == plan.private.survivors == 14
    encode_reply(plan, honest, reply(plan, np.zeros(SIZE, np.int32)), Random(0).randbytes)
    with pytest.raises(UpdateRejected, match="made for 14"):
        noise_share(plan.private, replace(honest, survivors=13), SIZE)


def test_a_device_leaves_out_no_noise_because_of_the_encoding():
    """A request that promises noise, and an offer of the ring that has none."""
    plan = shaped(spec(SKELLAM))
    ring = Quantised(plan.update_size, 20, 1, 20 * plan.clip_norm / plan.grid_step, "0" * 64, 20)
    with pytest.raises(UpdateRejected, match="no place for it"):
        encode_reply(plan, ring, reply(plan, np.zeros(SIZE, np.int32)), Random(0).randbytes)


@pytest.mark.parametrize("bits", [32, 16])
def test_a_device_may_demand_noise_whatever_the_run_says(bits):
    """Against a coordinator that plans too little, or none."""
    plan = shaped(spec({**SKELLAM, **EVERYTHING}, secure={"bits": bits}))
    request, encoding = Request.of(plan, np.zeros(SIZE, np.float32)), encoding_of(plan)
    multiplier = rounds_of(spec({**SKELLAM, **EVERYTHING}, secure={"bits": bits}))._ready.noise_multiplier
    assert least_multiplier(request, encoding) == pytest.approx(multiplier, rel=0.01)
    request = replace(request, model_sha256=vector_digest(request.model))
    update = np.zeros(plan.update_size, np.int32)
    update[SIZE] = plan.private.bit
    asked, answered = request.to_records(), reply(plan, update).to_records()
    encode_answer(asked, answered, encoding, Random(0).randbytes, 0.9 * multiplier)
    with pytest.raises(UpdateRejected, match="demands"):
        encode_answer(asked, answered, encoding, Random(0).randbytes, 1.1 * multiplier)
    silent = replace(request, private=None).to_records()
    with pytest.raises(UpdateRejected, match="demands"):
        encode_answer(silent, answered, encoding, Random(0).randbytes, 0.1)


def test_counts_of_devices_are_not_in_a_private_sum():
    assert [c.name for c in encoding_of(shaped(spec(SKELLAM))).counters] == ["weight"]
    assert [c.name for c in encoding_of(shaped(spec(CENTRAL))).counters] == ["weight"]


def test_noise_is_fresh_for_every_vector():
    plan = shaped(spec(SKELLAM))
    zero = reply(plan, np.zeros(SIZE, np.int32))
    first, second = (encode_reply(plan, encoding_of(plan), zero, Random(0).randbytes) for _ in range(2))
    assert (first[:SIZE] != second[:SIZE]).any()
    assert_array_equal(first[SIZE:], second[SIZE:])  # nothing on the counter


# --- the mean -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reports", [20, 15])
def test_the_denominator_is_the_planned_cohort_however_many_answer(reports):
    run = spec({**SKELLAM, "epsilon": 1e4}, grid_step=2.0**-20)
    private = rounds_of(run)
    plan = private.shaped(shaped(run))
    aggregator = Accumulator(plan)
    each = int(0.1 / plan.grid_step)
    aggregator.merge(Subtotal(np.full(SIZE, reports * each, np.int64), reports, reports))
    private.reserve(plan)
    mean = private.release(plan, aggregator)
    assert mean.shape == (SIZE,)
    assert mean[0] == pytest.approx(reports * each * plan.grid_step / 20)


def test_the_clip_of_a_round_is_that_of_its_noise_and_the_next_one_counts_later():
    run = spec({**CENTRAL, "adaptive_clip": {"bit_noise": 6.0, "rate": 1.0}}, "off")
    private = rounds_of(run)
    base = shaped(run)
    plan = private.shaped(base)
    private.reserve(plan)
    aggregator = Accumulator(plan)
    total = np.zeros(plan.update_size, np.int64)
    total[SIZE] = -20 * plan.private.bit  # nobody within the clip
    aggregator.merge(Subtotal(total, 20, 20))
    private.release(plan, aggregator)
    again = private.shaped(base)  # not committed: nothing has moved
    assert again.clip_norm == plan.clip_norm
    state = private.commit(plan, FLEET)
    assert private.metrics()["clip_norm"] == plan.clip_norm
    assert private.metrics()["clip_within"] < 0.5
    assert state.clip > plan.clip_norm
    assert private.shaped(base).clip_norm > plan.clip_norm
    assert PrivateState.from_bytes(state.to_bytes()) == state
    other = rounds_of(run)
    other.resume(state, 1)
    assert other.shaped(base) == private.shaped(base)


def test_a_broken_contract_of_added_noise_is_charged_on_top():
    run = spec({**SKELLAM, "min_separation": 2, "max_participations": 2})
    private = rounds_of(run)
    noise = private._ready.distributed
    for number in (1, 2, 3):
        state = RunState(np.zeros(SIZE, np.float32), attempt=1)
        plan = private.shaped(plan_round(run, "run", WORK, "train", number, state, FLEET, 20, "00"))
        private.reserve(plan)
        aggregator = Accumulator(plan)
        aggregator.merge(Subtotal(np.zeros(SIZE, np.int64), 20, 20))
        private.release(plan, aggregator)
        last = private.commit(plan, FLEET)
    assert last.charged == {noise.event_of(2): 1, noise.planned_event: 1}
    assert private.metrics()["epsilon_charged"] > 30.0


# --- the words of a run ---------------------------------------------------------------------------------


def test_one_word_stands_for_everything():
    run = RunSpec.model_validate_json(
        '{"task": "pkg:task", "rounds": 5, "cohort": {"size": 100}, "privacy": "strong", "evaluate_every": 0}'
    )
    assert run.secure_aggregation == "required"
    assert run.weighting == "equal"
    assert run.server.name == "fedavgm"
    assert (run.privacy.trust, run.privacy.mechanism, run.privacy.epsilon) == ("distributed", "skellam", 8.0)
    assert run.privacy.adaptive_clip is not None
    assert run.min_reports == 70
    assert RunSpec.model_validate_json(run.model_dump_json()) == run
    refuse_run(run, central_evaluation=True)
    changed = RunSpec.model_validate(
        {
            "task": "pkg:task",
            "cohort": {"size": 100},
            "privacy": {"preset": "strong", "epsilon": 20.0, "mechanism": "ddgauss", "adaptive_clip": None},
            "server": {"name": "fedadam"},
        }
    )
    assert (changed.privacy.epsilon, changed.privacy.mechanism) == (20.0, "ddgauss")
    assert changed.privacy.adaptive_clip is None
    assert changed.server.name == "fedadam"
    with pytest.raises(ValidationError, match="strong"):
        RunSpec.model_validate({"task": "pkg:task", "privacy": "weak"})


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"aggregation": {"name": "median"}}, "median"),
        ({"mode": "buffered"}, "buffered"),
        ({"cohort": {"size": 8}}, "min_cohort"),
        ({"privacy": {"preset": "strong", "bits": 24}, "secure": {"bits": 16}}, r"privacy\.bits=24"),
        ({"privacy": CENTRAL, "secure": {"bits": 16}}, r"secure\.bits=32"),
        ({"privacy": {"preset": "strong", "mechanism": "blt"}}, "mechanism='blt'"),
        ({"privacy": {"preset": "strong", "mechanism": "blt", "trust": "central"}}, "adaptive_clip"),
    ],
)
def test_what_cannot_be_strong_is_refused_when_it_is_read(more, word):
    settings = {"task": "pkg:task", "cohort": {"size": 100}, "secure_aggregation": "required"}
    with pytest.raises(ValidationError, match=word):
        RunSpec.model_validate({**settings, "privacy": "strong", **more})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"secure_aggregation": "off"}, ("secure_aggregation='required'",)),
        ({"weighting": "examples", "max_weight": 100}, ("weight_cap",)),
        ({"local": {"control_variates": True}}, ("control_variates", "proximal_mu")),
        ({"evaluate_every": 1, "local": {"personal": ["head.*"]}}, ("personal", "evaluate_every=0")),
        ({"evaluate_every": 1}, ("evaluate_every",)),
    ],
)
def test_what_breaks_the_guarantee_is_refused_with_what_to_do(more, words):
    run = spec("strong", **{"cohort": {"size": 100}, **more})
    with pytest.raises(ConfigError) as caught:
        refuse_run(run, central_evaluation="evaluate_every" in more and "local" in more)
    for word in words:
        assert word in str(caught.value)


def test_a_ring_that_is_too_small_is_refused_with_what_to_do():
    for privacy in ({"bits": 6}, {"bits": 11, "adaptive_clip": {}}):
        with pytest.raises(ConfigError, match="No grid fits") as caught:
            prepared(spec({**SKELLAM, **privacy}), SIZE)
        assert "more bits" in caught.value.hint
    with pytest.raises(ConfigError, match="bits are too few") as caught:
        prepared(spec({**SKELLAM, "epsilon": 0.001}, secure={"bits": 16}), 10**6)
    assert "secure.bits = 32" in caught.value.hint


def test_several_sums_have_their_noise_each():
    run = spec(
        SKELLAM,
        cohort={"size": 90, "min_reports": 20},
        secure={"max_cohort": 40, "min_cohort": 16},
    )
    assert run.noise_survivors == 21  # seven tenths of thirty
    ready = prepared(run, SIZE)
    assert ready.part.asked == 40
    assert ready.distributed.min_survivors == 21


def test_a_summary_says_what_was_missing():
    plan = shaped(spec({**SKELLAM, "min_survivors": 0.95}))
    assert plan.min_reports == 19
    assert "needs 19" in Collected(plan).summary()
