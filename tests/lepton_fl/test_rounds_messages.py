"""The codec of a round: what goes in comes out, and everything else is refused by its right name."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.plan import LocalPlan, RoundPlan
from lepton_fl.vector import vector_digest
from lepton_fl.wire.messages import (
    MAX_DETAIL,
    MAX_SUMS,
    EvaluateReply,
    Failure,
    Request,
    Ticket,
    TrainReply,
)
from lepton_fl.wire.records import Records

MODEL = np.array([1.0, -2.0, 0.5], np.float32)


def plan(kind="train", **changes) -> RoundPlan:
    fields = {
        "run_id": "run",
        "round": 3,
        "attempt": 2,
        "kind": kind,
        "task": "pkg:task",
        "task_version": "7",
        "layout_digest": "ab" * 32,
        "num_coordinates": 3,
        "model_sha256": vector_digest(MODEL),
        "cohort": ("a", "b"),
        "wanted_reports": 2,
        "min_reports": 1,
        "deadline_s": 10.0,
        "local": LocalPlan(epochs=2),
        "weighting": "examples",
        "max_weight": 100,
        "grid_step": 2.0**-20,
        "nonce": "cd" * 16,
    }
    return RoundPlan(**fields | changes)


def train_reply(**changes) -> TrainReply:
    sums = {"loss_sum": np.array([2.5]), "examples": np.array([4])}
    reply = TrainReply(Ticket.of(plan()), "7", 4, np.array([1, -2, 3], np.int32), sums, 0.25)
    return replace(reply, **changes)


def evaluate_reply() -> EvaluateReply:
    return EvaluateReply(Ticket.of(plan("evaluate")), "7", 4, {"hits": np.array([3, 1])}, 0.25)


def changed(records: Records, family: str, name: str, value) -> Records:
    fields = dict(getattr(records, family))
    if value is MISSING:
        del fields[name]
    else:
        fields[name] = value
    return replace(records, **{family: fields})


MISSING = object()


def refusal(read, *arguments) -> UpdateRejected:
    with pytest.raises(UpdateRejected) as caught:
        read(*arguments)
    assert str(caught.value)
    return caught.value


# --- round trips --------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(min_size=1, max_size=10)
sums_of = st.dictionaries(
    names,
    st.one_of(
        st.lists(finite, min_size=1, max_size=4).map(lambda v: np.array(v, np.float64)),
        st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=4).map(lambda v: np.array(v, np.int64)),
    ),
    max_size=4,
)


@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3),
    sums_of,
    st.integers(1, 2**53),
    st.floats(0, 1e9),
)
@settings(deadline=None)
def test_a_training_reply_comes_back_as_it_was(update, sums, examples, seconds):
    sent = train_reply(update=np.array(update, np.int32), sums=sums, num_examples=examples, seconds=seconds)
    got = TrainReply.read(sent.to_records(), plan())
    assert (got.ticket, got.task_version, got.num_examples, got.seconds) == (
        sent.ticket,
        "7",
        examples,
        seconds,
    )
    assert_array_equal(got.update, update)
    assert got.sums.keys() == sums.keys()
    for name, values in sums.items():
        assert got.sums[name].dtype == values.dtype
        assert_array_equal(got.sums[name], values)


@given(
    st.lists(st.floats(width=32, allow_nan=False), max_size=20),
    st.builds(
        LocalPlan,
        optimizer=st.sampled_from(["sgd", "adam"]),
        learning_rate=st.floats(1e-9, 10),
        epochs=st.integers(1, 10),
        proximal_mu=st.floats(0, 10),
    ),
    names,
)
@settings(deadline=None)
def test_a_request_comes_back_as_it_was(coordinates, local, run_id):
    model = np.array(coordinates, np.float32)
    sent = Request.of(plan(local=local, run_id=run_id, model_sha256=vector_digest(model)), model)
    got = Request.read(sent.to_records())
    assert_array_equal(got.model, model)
    assert replace(got, model=sent.model) == sent


def test_an_evaluation_comes_back_as_it_was():
    got = EvaluateReply.read(evaluate_reply().to_records(), plan("evaluate"))
    assert (got.num_examples, got.seconds) == (4, 0.25)
    assert_array_equal(got.sums["hits"], [3, 1])


@pytest.mark.parametrize("reason", list(Rejection))
def test_a_device_may_say_in_one_word_why_it_failed(reason):
    words = Failure(Ticket.of(plan()), reason, "x" * 9999).to_records()
    refused = refusal(TrainReply.read, words, plan())
    assert refused.reason is reason
    assert str(refused) == "x" * MAX_DETAIL


# --- every field, missing or wrong --------------------------------------------------------------------

M, V, N, R, S, X = (
    Rejection.MALFORMED,
    Rejection.WRONG_VERSION,
    Rejection.NON_FINITE,
    Rejection.REPLAYED,
    Rejection.WRONG_SHAPE,
    Rejection.OUT_OF_RANGE,
)

TICKET_CASES = [
    ("config", "protocol", 2, V),
    ("config", "protocol", "1", M),
    ("config", "protocol", True, M),
    ("config", "protocol", -1, M),
    ("config", "kind", "predict", M),
    ("config", "kind", 3, M),
    ("config", "run-id", b"run", M),
    ("config", "run-id", "x" * 10_001, M),
    ("config", "round", 3.0, M),
    ("config", "round", 2**63, M),
    ("config", "attempt", None, M),
    ("config", "nonce", 5, M),
    ("config", "surprise", 1, M),
]

REPLY_CASES = [
    *TICKET_CASES,
    ("config", "run-id", "other", R),
    ("config", "round", 2, R),
    ("config", "attempt", 1, R),
    ("config", "nonce", "0" * 32, R),
    ("config", "kind", "evaluate", R),
    ("config", "task-version", "8", V),
    ("config", "task-version", 7, M),
    ("config", "failed", "because", M),
    ("config", "failed", 1, M),
    ("metrics", "num-examples", 0, X),
    ("metrics", "num-examples", 2**53 + 1, X),
    ("metrics", "seconds", -1.0, X),
    ("metrics", "seconds", 1e300, X),
    ("metrics", "num-examples", -3, M),
    ("metrics", "num-examples", 4.0, M),
    ("metrics", "num-examples", [4], M),
    ("metrics", "seconds", float("nan"), N),
    ("metrics", "seconds", float("inf"), N),
    ("metrics", "seconds", 10**400, M),
    ("metrics", "seconds", "fast", M),
    ("metrics", "seconds", True, M),
    ("metrics", "sum.loss_sum", [float("nan")], N),
    ("metrics", "sum.loss_sum", [float("-inf")], N),
    ("metrics", "sum.loss_sum", [2**70], M),
    ("metrics", "sum.loss_sum", 2.5, M),
    ("metrics", "sum.loss_sum", [], M),
    ("metrics", "sum.loss_sum", ["a"], M),
    ("metrics", "sum.loss_sum", [True], M),
    ("metrics", "surprise", 1, M),
    ("arrays", "update", np.zeros(4, np.int32), S),
    ("arrays", "update", np.zeros(0, np.int32), S),
    ("arrays", "update", np.zeros((3, 1), np.int32), S),
    ("arrays", "update", np.zeros(3, np.int64), S),
    ("arrays", "update", np.zeros(3, np.float32), S),
    ("arrays", "more", np.zeros(3, np.int32), M),
]


@pytest.mark.parametrize(("family", "name", "value", "reason"), REPLY_CASES)
def test_a_reply_that_is_wrong_in_one_field(family, name, value, reason):
    records = changed(train_reply().to_records(), family, name, value)
    assert refusal(TrainReply.read, records, plan()).reason is reason


def fields_of(records: Records) -> list[tuple[str, str]]:
    return [(family, name) for family in ("arrays", "config", "metrics") for name in getattr(records, family)]


@pytest.mark.parametrize(("family", "name"), fields_of(train_reply().to_records()))
def test_a_reply_that_lacks_one_field(family, name):
    records = changed(train_reply().to_records(), family, name, MISSING)
    if name.startswith("sum."):  # which sums there must be is the task's to say
        assert name.removeprefix("sum.") not in TrainReply.read(records, plan()).sums
    else:
        assert refusal(TrainReply.read, records, plan()).reason is M


@pytest.mark.parametrize(("family", "name"), fields_of(Request.of(plan(), MODEL).to_records()))
def test_a_request_that_lacks_one_field(family, name):
    records = changed(Request.of(plan(), MODEL).to_records(), family, name, MISSING)
    assert refusal(Request.read, records).reason is M


@pytest.mark.parametrize(
    ("family", "name", "value", "reason"),
    [
        *TICKET_CASES,
        ("config", "task", 1, M),
        ("config", "model-sha256", "0" * 64, M),
        ("config", "local", "{", M),
        ("config", "local", '{"learning_rate": -1}', M),
        ("config", "local", '{"exec": "code"}', M),
        ("config", "local", '{"learning_rate": NaN}', M),
        ("config", "weighting", "votes", M),
        ("config", "max-weight", 0, M),
        ("config", "grid-step", 0.0, M),
        ("config", "grid-step", -1.0, M),
        ("config", "grid-step", float("nan"), N),
        ("arrays", "model", MODEL.astype(np.float64), S),
        ("arrays", "model", MODEL[None, :], S),
        ("arrays", "model", MODEL + 1, M),
        ("arrays", "second", MODEL, M),
    ],
)
def test_a_request_that_is_wrong_in_one_field(family, name, value, reason):
    records = changed(Request.of(plan(), MODEL).to_records(), family, name, value)
    assert refusal(Request.read, records).reason is reason


def test_an_evaluation_must_not_carry_arrays():
    records = changed(evaluate_reply().to_records(), "arrays", "update", np.zeros(3, np.int32))
    assert refusal(EvaluateReply.read, records, plan("evaluate")).reason is M


def test_too_many_sums():
    many = {f"s{i}": np.array([1]) for i in range(MAX_SUMS + 1)}
    assert refusal(TrainReply.read, train_reply(sums=many).to_records(), plan()).reason is M


def test_a_training_reply_is_no_evaluation():
    assert refusal(EvaluateReply.read, train_reply().to_records(), plan("evaluate")).reason is R


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_flipped_bits_are_refused_or_change_numbers_only(data):
    """Whatever a broken sender makes of a reply, reading it gives a reply or an UpdateRejected."""
    body = bytearray(
        json.dumps([train_reply().to_records().config, train_reply().to_records().metrics]).encode()
    )
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        config, metrics = json.loads(body.decode("utf-8", "replace"))
    except (ValueError, TypeError):
        return
    if not isinstance(config, dict) or not isinstance(metrics, dict):
        return
    try:
        got = TrainReply.read(Records(train_reply().to_records().arrays, config, metrics), plan())
    except UpdateRejected:
        return
    assert got.ticket == Ticket.of(plan())
    assert got.num_examples >= 1


def test_a_flipped_bit_in_the_model_is_noticed():
    for bit in range(8 * MODEL.nbytes):
        body = bytearray(MODEL.tobytes())
        body[bit // 8] ^= 1 << bit % 8
        records = Request.of(plan(), MODEL).to_records()
        flipped = changed(records, "arrays", "model", np.frombuffer(bytes(body), np.float32))
        assert refusal(Request.read, flipped).reason is M
