import json
from itertools import pairwise

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from worker.calibration import CALIBRATION_BINS
from worker.metrics import confidences, score
from worker.predictions import NO_ANSWER, Predictions


@st.composite
def answers(draw):
    """Labels, truth and predictions for 1 to 40 rows; some rows without an answer, some labels without a row."""
    K = draw(st.integers(2, 6))
    n = draw(st.integers(1, 40))
    true_ids = draw(st.lists(st.integers(0, K - 1), min_size=n, max_size=n))
    predicted_ids = draw(st.lists(st.integers(NO_ANSWER, K - 1), min_size=n, max_size=n))
    return [f"label {i}" for i in range(K)], np.array(true_ids), np.array(predicted_ids)


def with_probabilities(n, K, seed=0):
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(K), n)
    return Predictions(probabilities.argmax(axis=1), probabilities)


@given(answers())
def test_the_figures_agree_with_scikit_learn(case):
    labels, true_ids, predicted_ids = case
    K = len(labels)
    figures = score(Predictions(predicted_ids), true_ids, labels)
    every = {"labels": range(K), "zero_division": 0}
    assert figures["n"] == len(true_ids)
    assert figures["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(true_ids, predicted_ids))
    for average in ("macro", "weighted"):
        expected = sklearn.metrics.f1_score(true_ids, predicted_ids, average=average, **every)
        assert figures[f"{average}_f1"] == pytest.approx(expected)
    expected = sklearn.metrics.precision_recall_fscore_support(true_ids, predicted_ids, **every)
    found = [list(of_label.values()) for of_label in figures["per_label"].values()]
    np.testing.assert_allclose(np.array(found).T, expected)
    assert list(figures["per_label"]) == labels


@given(answers())
def test_the_confusion_matrix_holds_every_row_and_answers_missing_stand_last(case):
    labels, true_ids, predicted_ids = case
    K = len(labels)
    matrix = np.array(score(Predictions(predicted_ids), true_ids, labels)["confusion_matrix"])
    expected = sklearn.metrics.confusion_matrix(true_ids, predicted_ids, labels=[*range(K), NO_ANSWER])[:K]
    np.testing.assert_array_equal(matrix, expected)
    assert matrix.shape == (K, K + 1)
    assert matrix.sum() == len(true_ids)


@given(answers())
def test_the_figures_are_plain_json_without_nan(case):
    labels, true_ids, predicted_ids = case
    K, n = len(labels), len(true_ids)
    outcomes = tuple("empty" if i == NO_ANSWER else "valid" for i in predicted_ids)
    answered = Predictions(predicted_ids, np.full((n, K), 1 / K), ("",) * n, outcomes, np.float64(0.1))
    figures = score(answered, true_ids, labels)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_a_label_without_rows_counts_as_zero_in_macro_f1():
    figures = score(Predictions(np.array([0, 1])), np.array([0, 1]), ["a", "b", "c", "d"])
    assert figures["macro_f1"] == 0.5
    assert figures["weighted_f1"] == 1.0


def test_log_loss_agrees_with_scikit_learn_and_needs_the_true_labels_probability_alone():
    true_ids = np.random.default_rng(1).integers(0, 4, 50)
    predictions = with_probabilities(50, 4)
    found = score(predictions, true_ids, list("abcd"))["log_loss"]
    assert found == pytest.approx(sklearn.metrics.log_loss(true_ids, predictions.probabilities, labels=range(4)))
    assert found == pytest.approx(-np.log(predictions.probabilities[np.arange(50), true_ids]).mean())


def test_a_true_label_given_no_probability_costs_as_much_as_in_scikit_learn():
    predictions = Predictions(np.array([0, 1]), np.array([[1.0, 0.0], [0.0, 1.0]]))
    found = score(predictions, np.array([1, 1]), ["a", "b"])["log_loss"]
    assert found == pytest.approx(sklearn.metrics.log_loss([1, 1], predictions.probabilities, labels=[0, 1]))


def test_calibration_error_is_the_mean_gap_of_ten_equal_bins():
    true_ids = np.random.default_rng(2).integers(0, 3, 400)
    predictions = with_probabilities(400, 3)
    confidence, correct = predictions.probabilities.max(axis=1), predictions.label_ids == true_ids
    edges, gap = np.linspace(0, 1, CALIBRATION_BINS + 1), 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert score(predictions, true_ids, list("abc"))["expected_calibration_error"] == pytest.approx(gap)


def test_certain_and_right_is_perfectly_calibrated_and_certain_and_wrong_the_worst():
    certain = Predictions(np.zeros(5, dtype=np.int64), np.tile([1.0, 0.0], (5, 1)))
    for true_id, error in ((0, 0.0), (1, 1.0)):
        figures = score(certain, np.full(5, true_id), ["a", "b"])
        assert figures["expected_calibration_error"] == error


def test_rows_without_an_answer_have_no_confidence_and_do_not_touch_calibration():
    probabilities = np.array([[0.75, 0.25], [0.1, 0.9]])
    label_ids = np.array([0, NO_ANSWER])
    np.testing.assert_array_equal(confidences(probabilities, label_ids), [0.75, np.nan])
    figures = score(Predictions(label_ids, probabilities), np.array([0, 0]), ["a", "b"])
    assert figures["expected_calibration_error"] == 0.25
    assert figures["coverage"][-1] == {"threshold": 0.0, "coverage": 1.0, "accuracy": 0.5}


def test_generated_answers_are_counted_by_how_they_parsed():
    label_ids = np.array([0, 1, NO_ANSWER, NO_ANSWER, NO_ANSWER, NO_ANSWER])
    outcomes = ("valid", "valid", "invalid", "invalid", "ambiguous", "empty")
    figures = score(Predictions(label_ids, None, ("",) * 6, outcomes), np.zeros(6, dtype=np.int64), ["a", "b"])
    counts = {name: figures[name] for name in ("n_invalid", "n_ambiguous", "n_empty", "accuracy_on_valid")}
    assert counts == {"n_invalid": 2, "n_ambiguous": 1, "n_empty": 1, "accuracy_on_valid": 0.5}
    assert figures["invalid_rate"] == pytest.approx(4 / 6)
    assert figures["accuracy"] == pytest.approx(figures["accuracy_on_valid"] * (1 - figures["invalid_rate"]))


def test_accuracy_on_valid_answers_is_null_where_no_answer_is_valid():
    predictions = Predictions(np.array([NO_ANSWER]), None, ("?",), ("invalid",))
    figures = score(predictions, np.array([0]), ["a", "b"])
    assert figures["accuracy_on_valid"] is None
    assert figures["accuracy"] == 0.0


def test_probabilities_and_parsing_stand_only_where_a_method_has_them():
    figures = score(Predictions(np.array([0])), np.array([0]), ["a", "b"])
    assert not {"log_loss", "expected_calibration_error", "n_invalid", "invalid_rate"} & set(figures)


def test_a_part_without_rows_has_null_means_and_an_empty_matrix():
    nothing = np.zeros(0, dtype=np.int64)
    figures = score(Predictions(nothing, np.zeros((0, 2)), (), ()), nothing, ["a", "b"])
    means = ("accuracy", "macro_f1", "weighted_f1", "log_loss", "expected_calibration_error", "invalid_rate")
    assert [figures[name] for name in means] == [None] * len(means)
    assert figures["confusion_matrix"] == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(("predicted", "true"), [([0, 1], [0]), ([2], [0]), ([-2], [0]), ([0], [2]), ([0], [-1])])
def test_answers_that_do_not_fit_the_rows_or_the_labels_are_refused(predicted, true):
    with pytest.raises(ValueError, match=r"answers|label ids"):
        score(Predictions(np.array(predicted)), np.array(true), ["a", "b"])
