"""A device tries a release on its own rows: what it finds, what it says, and what that costs."""

import json

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from lepton_client import trial
from lepton_client.config import ClientConfig
from lepton_client.state import StateDir
from lepton_client.trials import Trials, asked_about
from lepton_fl.delivery.slots import Record
from lepton_fl.delivery.trial import Question
from lepton_fl.errors import StateCorrupt
from lepton_fl.tasks.images import digits

GOOD, BAD = "a" * 64, "b" * 64
ASKED = Question(epsilon=1.0)


def config_of(tmp_path, **section):
    """A device with labelled digits that may answer."""
    raw = digits.data(None).test
    np.savez(tmp_path / "rows.npz", x=raw.x, y=raw.y)
    given = {"data": {"kind": "npz", "path": str(tmp_path / "rows.npz")}, "budget": 3.0} | section
    return ClientConfig.model_validate(
        {"client": {"state_dir": str(tmp_path)}, "delivery": {"task": "digits"}, "trial": given}
    )


@pytest.fixture(scope="module")
def matrix():
    """A linear model of digits, by least squares: about 90 % accurate."""
    raw = digits.data(None).train
    x = raw.x.reshape(len(raw), -1) / 16
    found, *_ = np.linalg.lstsq(x, np.eye(10)[raw.y], rcond=None)
    return found.astype(np.float32)


def release(folder, matrix, make_variant):
    """A slot with a model of one 8 by 8 image."""
    from lepton_fl.compression.card import CARD, MODEL, Card

    make_variant(folder)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["input"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["output"]),
        ],
        "digits",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(matrix, "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / MODEL).write_bytes(made.SerializeToString())
    body = json.loads((folder / CARD).read_bytes())
    body["input"]["shape"] = [None, 1, 8, 8]
    (folder / CARD).write_bytes(Card.model_validate(body, strict=False).to_bytes())
    return folder


@pytest.fixture
def slots(tmp_path, matrix, make_variant):
    """Where the good release serves and the bad one did not yet."""
    state = StateDir(tmp_path)
    folder = state.delivery / "slots"
    release(folder / GOOD, matrix, make_variant)
    release(folder / BAD, -matrix, make_variant)

    class Two:
        def record(self):
            return Record(current=BAD, previous=GOOD)

        def has(self, name):
            return (folder / name).exists()

        def path(self, name):
            return folder / name

    return Two()


def desired(question=ASKED, release=BAD):
    return json.dumps({"release": {"manifest": release, "serial": 1, "trial": question.to_json()}})


def test_what_is_found(tmp_path, slots):
    config, good, bad = config_of(tmp_path), slots.path(GOOD), slots.path(BAD)
    assert trial.examine(config, ASKED, bad, good) == "worse"
    assert trial.examine(config, ASKED, good, bad) == "drifts"  # better, and far from the one before
    assert trial.examine(config, ASKED, good, good) == "fine"
    assert trial.examine(config, ASKED, good, None) == "fine"
    assert trial.examine(config, Question(min_score=0.5), bad, None) == "worse"  # with nothing before it


def test_rows_that_cannot_be_used_say_nothing_of_the_release(tmp_path, slots):
    config = config_of(tmp_path)
    (tmp_path / "rows.npz").write_bytes(b"no archive")
    assert trial.examine(config, ASKED, slots.path(BAD), slots.path(GOOD)) == "fine"
    nothing = config.model_copy(update={"trial": config.trial.model_copy(update={"data": {}})})
    assert trial.examine(nothing, ASKED, slots.path(BAD), slots.path(GOOD)) == "fine"


def test_a_release_that_fails_on_rows_that_fit_is_worse(tmp_path, slots, make_variant):
    flat = make_variant(tmp_path / "flat")  # takes rows of another shape
    assert trial.examine(config_of(tmp_path), ASKED, flat, slots.path(GOOD)) == "worse"


@pytest.mark.slow
def test_the_answer_is_said_once_and_paid_for(tmp_path, slots, monkeypatch):
    state, config = StateDir(tmp_path), config_of(tmp_path)
    trial.answer(config, state, slots, desired(Question(epsilon=0.5)))
    trials = Trials(state.trials, config.trial)
    asked = asked_about(desired(Question(epsilon=0.5)))
    first = trials.word(BAD, asked.digest)
    assert first in ("fine", "drifts", "worse")
    assert trials.spent == 0.5
    monkeypatch.setattr(trial, "_find", None)  # and it is not looked at again
    trial.answer(config, state, slots, desired(Question(epsilon=0.5)))
    assert (trials.word(BAD, asked.digest), trials.spent) == (first, 0.5)


def test_an_answer_is_the_truth_as_often_as_it_should_be(tmp_path, slots, monkeypatch):
    state, config = StateDir(tmp_path), config_of(tmp_path, budget=1000)
    monkeypatch.setattr(trial, "_find", lambda *_: "worse")
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    words = []
    for number in range(300):
        question = Question(epsilon=1.0, max_drop=number / 1000)
        trial.answer(config, state, slots, desired(question))
        words.append(Trials(state.trials, config.trial).word(BAD, asked_about(desired(question)).digest))
    assert 0.45 < words.count("worse") / 300 < 0.70  # e / (e + 2) = 0.576
    assert min(words.count("fine"), words.count("drifts")) > 30


@pytest.mark.parametrize(
    ("section", "epsilon", "why"),
    [
        ({"budget": 0}, 1.0, "trial.budget"),
        ({}, 1.5, "trial.epsilon allows 1"),
        ({"epsilon": 10}, 3.5, "trial.budget = 3"),
    ],
)
def test_what_the_owner_does_not_allow_is_not_looked_at(tmp_path, slots, monkeypatch, section, epsilon, why):
    state, config = StateDir(tmp_path), config_of(tmp_path, **section)
    monkeypatch.setattr(trial, "_find", None)
    trial.answer(config, state, slots, desired(Question(epsilon=epsilon)))
    assert not state.trials.exists()
    assert why in Trials(state.trials, config.trial).may_answer(epsilon)


def test_the_budget_is_never_passed(tmp_path, slots, monkeypatch):
    state, config = StateDir(tmp_path), config_of(tmp_path, budget=1.0)
    monkeypatch.setattr(trial, "_find", lambda *_: "fine")
    for number in range(20):
        trial.answer(config, state, slots, desired(Question(epsilon=0.1, max_drop=number / 100)))
    trials = Trials(state.trials, config.trial)
    assert trials.spent == pytest.approx(1.0)
    assert trials.account("digits")["rounds"] == 10


def test_a_damaged_file_ends_all_answers(tmp_path, slots, monkeypatch):
    state, config = StateDir(tmp_path), config_of(tmp_path)
    monkeypatch.setattr(trial, "_find", lambda *_: "fine")
    trial.answer(config, state, slots, desired())
    state.trials.write_bytes(state.trials.read_bytes()[:-3])
    damaged = state.trials.read_bytes()
    with pytest.raises(StateCorrupt):
        trial.answer(config, state, slots, desired(Question(epsilon=0.5)))
    assert state.trials.read_bytes() == damaged


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"release": {"manifest": "x", "trial": 3}}', '{"release": {"trial": {}}}', "{" * 10**5],
)
def test_what_is_no_question_is_none(text):
    assert asked_about(text) is None


def test_a_question_of_a_later_version_is_not_answered(tmp_path, slots, monkeypatch):
    monkeypatch.setattr(trial, "_find", None)
    text = json.dumps({"release": {"manifest": BAD, "trial": {"epsilon": 1.0, "fairness": True}}})
    trial.answer(config_of(tmp_path), StateDir(tmp_path), slots, text)
    assert not StateDir(tmp_path).trials.exists()
