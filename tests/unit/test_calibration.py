"""Temperature, bins and thresholds, held to torch, scikit-learn, scipy and to counting."""

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from service.ml.calibration import softmax, threshold_for, wilson_interval
from worker.calibration import (
    MAX_THRESHOLDS,
    TEMPERATURES,
    coverage_curve,
    expected_calibration_error,
    fit_temperature,
    precision_points,
    reliability_bins,
)
from worker.metrics import score
from worker.predictions import Predictions


def drawn(n, K, temperature, seed=0):
    """Logits, and labels drawn from softmax(logits / temperature): the temperature that calibrates them is known."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (n, K)).astype(np.float32)
    probabilities = scipy.special.softmax(logits.astype(np.float64) / temperature, axis=1)
    return logits, np.array([rng.choice(K, p=p) for p in probabilities])


def by_lbfgs(logits, label_ids):
    """Platt's targets and torch's optimizer: 1 − ε on the true label, ε on all others together."""
    doubt = 1 / (len(logits) + 2)
    x, y = torch.tensor(logits, dtype=torch.float64), torch.tensor(label_ids)
    log_t = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def closure():
        optimizer.zero_grad()
        p = torch.softmax(x / log_t.exp(), 1).gather(1, y[:, None])[:, 0]
        loss = -((1 - doubt) * p.log() + doubt * (1 - p).log()).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_t.detach().exp())


# The temperature -----------------------------------------------------------------------------------
@pytest.mark.parametrize("K", [2, 5, 40])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_is_the_one_that_torch_finds(K, temperature):
    logits, label_ids = drawn(300, K, temperature)
    assert fit_temperature(logits, label_ids) == pytest.approx(by_lbfgs(logits, label_ids), rel=2e-3)


@pytest.mark.parametrize("temperature", [0.4, 2.5])
def test_with_many_rows_it_is_the_lowest_log_loss_and_the_temperature_the_labels_were_drawn_at(temperature):
    logits, label_ids = drawn(20_000, 5, temperature)
    grid = temperature * np.linspace(0.8, 1.2, 81)
    losses = [log_loss(label_ids, scipy.special.softmax(logits.astype(float) / t, axis=1)) for t in grid]
    found = fit_temperature(logits, label_ids)
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=0.01)
    assert found == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("n", [1, 5, 100])
@pytest.mark.parametrize("K", [2, 77])
def test_rows_that_are_all_right_are_given_no_certainty(n, K):
    logits, label_ids = np.full((n, K), -3.0, np.float32), np.arange(n) % K
    logits[np.arange(n), label_ids] = 5
    confidence = softmax(logits, fit_temperature(logits, label_ids)).max(1)
    np.testing.assert_allclose(confidence, (n + 1) / (n + 2), atol=1e-3)  # the rule of succession


def test_rows_that_are_all_wrong_ask_for_as_much_doubt_as_there_is():
    logits = np.tile(np.array([8.0, 0.0, 0.0], np.float32), (50, 1))
    assert fit_temperature(logits, np.full(50, 1)) == pytest.approx(TEMPERATURES[1], rel=1e-3)


@pytest.mark.parametrize(
    "logits", [np.zeros((4, 3)), np.zeros((0, 3)), np.full((4, 3), np.nan)], ids=["level", "no rows", "NaN"]
)
def test_rows_that_tell_nothing_leave_the_logits_as_they_are(logits):
    assert fit_temperature(logits.astype(np.float32), np.zeros(len(logits), dtype=np.int64)) == 1.0


rows_of_logits = st.tuples(st.integers(1, 12), st.integers(2, 5)).flatmap(
    lambda shape: st.tuples(
        arrays(np.float32, shape, elements=st.floats(-1e4, 1e4, width=32)),
        arrays(np.int64, shape[:1], elements=st.integers(0, shape[1] - 1)),
    )
)


@given(rows_of_logits)
def test_whatever_the_rows_it_is_within_bounds(case):
    temperature = fit_temperature(*case)
    assert TEMPERATURES[0] <= temperature <= TEMPERATURES[1]


@given(rows_of_logits, st.floats(*TEMPERATURES))
def test_no_temperature_changes_a_label(case, temperature):
    logits = case[0].round(1)  # nearer than that in a thousand may be equal probabilities, which go by order
    probabilities = softmax(logits, temperature)
    np.testing.assert_array_equal(probabilities.argmax(1), logits.argmax(1))
    np.testing.assert_allclose(probabilities, scipy.special.softmax(logits.astype(float) / temperature, axis=1))


# What stands in metrics.json -----------------------------------------------------------------------
def test_figures_before_and_after_are_those_of_logits_without_and_with_the_temperature():
    logits, label_ids = drawn(400, 4, 3.0)
    labels = list("abcd")
    temperature = fit_temperature(logits, label_ids)
    after = score(Predictions.of_logits(logits, temperature, 0.1), label_ids, labels)
    before = score(Predictions(logits.argmax(1), softmax(logits)), label_ids, labels)
    assert after["temperature"] == temperature
    for name in ("log_loss", "expected_calibration_error"):
        assert after[f"{name}_uncalibrated"] == pytest.approx(before[name], rel=1e-9)
        assert after[name] < before[name]
    assert after["accuracy"] == before["accuracy"]
    assert not {"temperature", "log_loss_uncalibrated"} & set(before)


@given(st.integers(1, 200), st.integers(0, 99))
def test_bins_hold_every_row_once_and_agree_with_scikit_learn(n, seed):
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.01, 1, n)
    correct = rng.uniform(size=n) < confidence
    bins = reliability_bins(confidence, correct)
    assert sum(b["n"] for b in bins) == n
    assert sum(b["n"] * b["accuracy"] for b in bins if b["n"]) == pytest.approx(correct.sum())
    accuracy, mean = calibration_curve(correct, confidence, n_bins=10)
    filled = [b for b in bins if b["n"]]
    np.testing.assert_allclose([b["accuracy"] for b in filled], accuracy)
    np.testing.assert_allclose([b["mean_confidence"] for b in filled], mean)
    assert all(b["low"] < b["mean_confidence"] <= b["high"] for b in filled)


def test_no_rows_have_ten_empty_bins_no_error_and_no_curve():
    nothing = np.zeros(0)
    bins = reliability_bins(nothing, nothing.astype(bool))
    assert [b["n"] for b in bins] == [0] * 10
    assert expected_calibration_error(bins) is None
    assert coverage_curve(nothing, nothing.astype(bool)) == []


@given(st.integers(1, 100), st.integers(1, 30), st.integers(0, 99))
def test_the_coverage_curve_ends_with_all_rows_and_each_point_is_what_counting_gives(n, distinct, seed):
    rng = np.random.default_rng(seed)
    confidence, correct = rng.integers(1, distinct + 1, n) / distinct, rng.uniform(size=n) < 0.7
    curve = coverage_curve(confidence, correct)
    assert 1 <= len(curve) <= 20
    assert curve[-1] == {"threshold": confidence.min(), "coverage": 1.0, "accuracy": pytest.approx(correct.mean())}
    coverages = [point["coverage"] for point in curve]
    assert coverages == sorted(set(coverages))
    for point in curve:
        kept = confidence >= point["threshold"]
        assert (point["coverage"], point["accuracy"]) == pytest.approx((kept.mean(), correct[kept].mean()))


# Thresholds ----------------------------------------------------------------------------------------
@given(st.integers(1, 80), st.integers(1, 30), st.integers(0, 99), st.floats(0.5, 1))
def test_the_threshold_is_the_lowest_confidence_that_reached_the_target(n, distinct, seed, target):
    rng = np.random.default_rng(seed)
    confidence, correct = rng.integers(1, distinct + 1, n) / distinct, rng.uniform(size=n) < 0.7
    tried = [0.0, *sorted(set(confidence))]
    reached = [t for t in tried if correct[confidence >= t].sum() / (confidence >= t).sum() >= target]
    found = threshold_for(target, {"rows": n, "points": precision_points(confidence, correct)})
    assert found.validation_rows == n
    if not reached:
        assert (found.min_confidence, found.validation_precision, found.validation_coverage) == (None, None, 0.0)
        assert f"{target:g}" in found.note
        assert "abstains" in found.note
        return
    kept = confidence >= reached[0]
    # 0 stands for every confidence up to the lowest: all rows are kept.
    assert found.min_confidence == (0.0 if kept.all() else reached[0])
    assert (found.note is None) == (kept.sum() >= 30)
    assert found.validation_precision == pytest.approx(correct[kept].mean())
    assert found.validation_coverage == pytest.approx(kept.mean())
    assert found.validation_precision_ci95 == wilson_interval(int(correct[kept].sum()), int(kept.sum()))


def test_thresholds_are_thinned_to_a_few_that_still_hold_what_they_promise():
    rng = np.random.default_rng(3)
    confidence = rng.uniform(0.3, 1, 20_000)
    correct = rng.uniform(size=20_000) < confidence
    points = precision_points(confidence, correct)
    assert len(points) == MAX_THRESHOLDS
    assert points[0] == [0.0, 20_000, correct.sum()]
    for target in (0.7, 0.8, 0.9, 0.95):
        found = threshold_for(target, {"rows": 20_000, "points": points})
        kept = confidence >= found.min_confidence
        assert found.validation_precision == pytest.approx(correct[kept].mean())
        assert target <= found.validation_precision < target + 0.02


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_scipys(case):
    right, n = case
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson_interval(right, n) == pytest.approx((expected.low, expected.high), abs=1e-9)
