"""Sums add up over devices to what one evaluation over all rows would give."""

import warnings

import numpy as np
import pytest

from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.tasks import Classification, NextToken, Regression, TrainingLoss

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(200, 4)).astype(np.float32)
LABELS = RNG.integers(0, 3, 200)  # class 3 is predicted but never true
CASES = {
    "classification": (Classification(4), LOGITS, LABELS),
    "regression": (Regression(80.0, 20.0), LOGITS[:, 0], LOGITS[:, 1]),
    "next": (NextToken(), LOGITS.reshape(50, 4, 4), LABELS.reshape(50, 4)),
    "training": (TrainingLoss(), np.abs(LOGITS[:, 0]), LABELS),
}
each = pytest.mark.parametrize(("metrics", "outputs", "targets"), CASES.values(), ids=CASES)


@each
@pytest.mark.parametrize("cut", [0, 1, 13, 49])
def test_sums_add_up(metrics, outputs, targets, cut):
    parts = [metrics.count(outputs[:cut], targets[:cut]), metrics.count(outputs[cut:], targets[cut:])]
    total = metrics.add(metrics.zero(), metrics.add(*parts))
    whole = metrics.count(outputs, targets)
    metrics.validate(total)
    for name in metrics.fields:
        np.testing.assert_allclose(total[name], whole[name], rtol=1e-12)
    assert metrics.summarise(total) == pytest.approx(metrics.summarise(whole))


@each
def test_no_rows(metrics, outputs, targets):
    metrics.validate(metrics.zero())
    assert metrics.summarise(metrics.zero()) == {"examples": 0.0}


def test_classification_agrees_with_scikit_learn():
    from sklearn import metrics as sk

    figures = Classification(4).summarise(Classification(4).count(LOGITS, LABELS))
    predicted = LOGITS.argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of the class without labels
        expected = {
            "loss": sk.log_loss(
                LABELS, np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True), labels=range(4)
            ),
            "examples": 200,
            "accuracy": sk.accuracy_score(LABELS, predicted),
            "balanced_accuracy": sk.balanced_accuracy_score(LABELS, predicted),
            "precision": sk.precision_score(LABELS, predicted, average="macro", zero_division=0),
            "recall": sk.recall_score(LABELS, predicted, average="macro", zero_division=0),
            "f1": sk.f1_score(LABELS, predicted, average="macro", zero_division=0),
        }
    assert figures == pytest.approx(expected, rel=1e-5)


def test_per_class_by_hand():
    logits = np.eye(2)[[0, 0, 1, 1, 1]].astype(np.float32)
    per_class = Classification(2).per_class(Classification(2).count(logits, np.array([0, 1, 1, 1, 0])))
    np.testing.assert_allclose(per_class["precision"], [1 / 2, 2 / 3])
    np.testing.assert_allclose(per_class["recall"], [1 / 2, 2 / 3])
    np.testing.assert_allclose(per_class["f1"], [1 / 2, 2 / 3])


def test_regression_agrees_with_scikit_learn_in_real_units():
    from sklearn import metrics as sk

    metrics, outputs, targets = CASES["regression"]
    figures = metrics.summarise(metrics.count(outputs, targets))
    truth, predicted = targets * 80.0 + 20.0, outputs * 80.0 + 20.0
    assert figures["r2"] == pytest.approx(sk.r2_score(truth, predicted), rel=1e-5)
    assert figures["rmse"] == pytest.approx(sk.root_mean_squared_error(truth, predicted), rel=1e-5)
    assert figures["mae"] == pytest.approx(sk.mean_absolute_error(truth, predicted), rel=1e-5)


def test_r2_is_left_out_where_the_target_does_not_vary():
    figures = Regression().summarise(Regression().count(np.array([1.0, 2.0]), np.array([5.0, 5.0])))
    assert "r2" not in figures
    assert figures["mae"] == 3.5


def test_next_token_known_answer():
    logits = np.zeros((1, 2, 4), np.float32)
    logits[0, 0, 3] = 100
    figures = NextToken().summarise(NextToken().count(logits, np.array([[3, 3]])))
    assert figures["accuracy"] == 0.5
    assert figures["loss"] == pytest.approx(np.log(4) / 2)
    assert figures["perplexity"] == pytest.approx(2)


def test_perplexity_stays_finite():
    sums = NextToken().zero() | {
        "loss_sum": np.array([1e9]),
        "tokens": np.array([1]),
        "examples": np.array([1]),
    }
    assert np.isfinite(NextToken().summarise(sums)["perplexity"])


def test_huge_logits_give_a_finite_loss():
    sums = Classification(2).count(np.array([[1e30, -1e30]], np.float32), np.array([1]))
    Classification(2).validate(sums)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["classification", "regression", "next"])
def test_a_diverged_model_is_refused_not_warned_about(kind, bad):
    metrics, outputs, targets = CASES[kind]
    outputs = outputs.copy()
    outputs[3] = bad
    with pytest.raises(UpdateRejected) as caught:
        metrics.validate(metrics.count(outputs, targets))
    assert caught.value.reason is Rejection.NON_FINITE


@each
def test_refusals_common_to_all(metrics, outputs, targets):
    good = metrics.count(outputs, targets)
    real = next(name for name, (dtype, _) in metrics.fields.items() if dtype == "float64")
    cases = [
        ({**good, "extra": np.zeros(1)}, Rejection.MALFORMED),
        ({k: v for k, v in good.items() if k != "examples"}, Rejection.MALFORMED),
        ({**good, "examples": np.zeros(2, np.int64)}, Rejection.WRONG_SHAPE),
        ({**good, "examples": np.zeros(1)}, Rejection.WRONG_SHAPE),
        ({**good, "examples": np.array([-1])}, Rejection.OUT_OF_RANGE),
        ({**good, "examples": np.array([2**62])}, Rejection.OUT_OF_RANGE),
        ({**good, real: np.array([np.nan])}, Rejection.NON_FINITE),
        ({**good, real: np.array([np.inf])}, Rejection.NON_FINITE),
        ({**good, real: np.array([1e300])}, Rejection.OUT_OF_RANGE),
        ({}, Rejection.MALFORMED),
    ]
    for sums, reason in cases:
        with pytest.raises(UpdateRejected) as caught:
            metrics.validate(sums)
        assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("kind", "lie"),
    [
        ("classification", {"examples": np.array([5])}),
        ("classification", {"loss_sum": np.array([-1.0])}),
        ("next", {"correct": np.array([10_000])}),
        ("regression", {"squared_error": np.array([-1.0])}),
    ],
)
def test_contradicting_sums_are_refused(kind, lie):
    metrics, outputs, targets = CASES[kind]
    with pytest.raises(UpdateRejected) as caught:
        metrics.validate({**metrics.count(outputs, targets), **lie})
    assert caught.value.reason is Rejection.MALFORMED
