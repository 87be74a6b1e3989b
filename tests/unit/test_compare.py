import json
import re
import time
from dataclasses import asdict, replace
from functools import partial
from unittest import mock

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.metrics import f1_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from service.core.spec import JobSpec
from service.ml.evidence import (
    beats,
    compare,
    holm,
    minimum_detectable_difference,
    rows_to_exclude,
    same_texts,
)
from worker.choice import choose
from worker.compare import COST_ORDER, MethodAnswers, compare_all
from worker.verdict import judge

K = 4
MARGIN = 0.02


def paired(n, n_fixed, n_broken, n_both_wrong=0, on="test"):
    """A comparison of N rows of which exactly so many are right on one side only."""
    true_ids = np.arange(n) % K
    wrong = (true_ids + 1) % K
    position = np.arange(n)
    candidate_wrong = (position < n_broken) | (position >= n - n_both_wrong)
    baseline_wrong = ((position >= n_broken) & (position < n_broken + n_fixed)) | (position >= n - n_both_wrong)
    candidate_ids = np.where(candidate_wrong, wrong, true_ids)
    return compare("lora", "majority", on, true_ids, candidate_ids, np.where(baseline_wrong, wrong, true_ids), K, 0)


def noisy(accuracy, true_ids, seed, n_labels=K):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(len(true_ids)) < accuracy, true_ids, rng.integers(-1, n_labels, len(true_ids)))


def answers_of(n_wrong, n=1000, n_subset=300, on_subset_only=()):
    """Answers of methods that are wrong on the first so many of N rows: who errs more errs on all of the other's."""
    true_ids = np.arange(n) % K
    # The subset is spread over the rows, so that shares hold there too.
    subset = np.linspace(0, n - 1, n_subset).astype(int)
    found = {}
    for method, wrong in n_wrong.items():
        ids = np.where(np.arange(n) < wrong, (true_ids + 1) % K, true_ids)
        whole = None if method in on_subset_only else ids
        found[method] = MethodAnswers(true_ids, true_ids[subset], whole, ids[subset])
    return found


def random_answers(accuracies, n, seed=0, on_subset_only=()):
    """Answers that err independently of each other; the subset is the first 300 rows."""
    true_ids = np.random.default_rng(seed).integers(0, K, n)
    found = {}
    for i, (method, accuracy) in enumerate(accuracies.items()):
        ids = np.zeros(n, dtype=np.int64) if method == "majority" else noisy(accuracy, true_ids, seed + i + 1)
        found[method] = MethodAnswers(true_ids, true_ids[:300], None if method in on_subset_only else ids, ids[:300])
    return found


def told(answers, margin=MARGIN, test_share=0.1):
    sentence, recommendation = judge(answers, compare_all(answers, K, seed=1), margin, K, seed=1, test_share=test_share)
    return recommendation, sentence


def best_method(answers, margin=MARGIN):
    return choose(answers, compare_all(answers, K, seed=1), margin, K, seed=1).best


# Paired comparison


@pytest.mark.parametrize(("n_fixed", "n_broken"), [(0, 0), (1, 0), (6, 0), (5, 5), (40, 21), (3, 90)])
def test_mcnemars_p_agrees_with_statsmodels(n_fixed, n_broken):
    comparison = paired(400, n_fixed, n_broken)
    expected = mcnemar([[0, n_fixed], [n_broken, 0]], exact=True).pvalue
    assert comparison.mcnemar_p == pytest.approx(expected, abs=1e-9)
    assert (comparison.n_fixed, comparison.n_broken) == (n_fixed, n_broken)


def test_intervals_agree_with_scipys_paired_bootstrap():
    true_ids = np.random.default_rng(3).integers(0, K, 250)
    candidate_ids, baseline_ids = noisy(0.8, true_ids, 4), noisy(0.7, true_ids, 5)
    found = compare("lora", "tfidf_logreg", "test", true_ids, candidate_ids, baseline_ids, K, seed=7)

    def accuracy_delta(true, candidate, baseline, axis=-1):
        return (candidate == true).mean(axis) - (baseline == true).mean(axis)

    def macro_f1(true, predicted):
        terms = [
            (2 * ((true == k) & (predicted == k)).sum(), (true == k).sum() + (predicted == k).sum()) for k in range(K)
        ]
        return np.mean([hits / max(total, 1) for hits, total in terms])

    def macro_f1_delta(true, candidate, baseline):
        return macro_f1(true, candidate) - macro_f1(true, baseline)

    data = (true_ids, candidate_ids, baseline_ids)
    options = {"paired": True, "method": "percentile", "rng": np.random.default_rng(0)}
    accuracy = scipy.stats.bootstrap(data, accuracy_delta, n_resamples=9999, vectorized=True, **options)
    macro = scipy.stats.bootstrap(data, macro_f1_delta, n_resamples=2000, vectorized=False, **options)
    assert found.accuracy_delta_ci95 == pytest.approx(tuple(accuracy.confidence_interval), abs=0.01)
    assert found.macro_f1_delta_ci95 == pytest.approx(tuple(macro.confidence_interval), abs=0.01)


def test_deltas_are_candidate_minus_baseline_and_agree_with_scikit_learn():
    true_ids = np.random.default_rng(3).integers(0, K - 1, 120)  # one label without a row
    candidate_ids, baseline_ids = noisy(0.6, true_ids, 4), noisy(0.8, true_ids, 5)
    found = compare("lora", "tfidf_logreg", "test", true_ids, candidate_ids, baseline_ids, K, 0, resamples=10)
    options = {"labels": range(K), "average": "macro", "zero_division": 0}
    expected = f1_score(true_ids, candidate_ids, **options) - f1_score(true_ids, baseline_ids, **options)
    assert found.macro_f1_delta == pytest.approx(expected)
    assert found.accuracy_delta == pytest.approx(np.mean(candidate_ids == true_ids) - np.mean(baseline_ids == true_ids))
    assert found.accuracy_delta < 0


@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_swapping_the_sides_mirrors_everything(seed, n):
    true_ids = np.random.default_rng(seed).integers(0, K, n)
    ours, theirs = noisy(0.7, true_ids, seed + 1), noisy(0.5, true_ids, seed + 2)
    there = compare("lora", "majority", "test", true_ids, ours, theirs, K, seed, resamples=200)
    back = compare("majority", "lora", "test", true_ids, theirs, ours, K, seed, resamples=200)
    assert there.accuracy_delta == -back.accuracy_delta
    for interval, mirrored in (
        (there.accuracy_delta_ci95, back.accuracy_delta_ci95),
        (there.macro_f1_delta_ci95, back.macro_f1_delta_ci95),
    ):
        assert interval == pytest.approx((-mirrored[1], -mirrored[0]))
    assert there.mcnemar_p == back.mcnemar_p
    assert (there.n_fixed, there.n_broken) == (back.n_broken, back.n_fixed)


def test_the_same_seed_gives_the_same_intervals_whatever_the_step(monkeypatch):
    before = paired(200, 20, 10)
    assert paired(200, 20, 10) == before
    monkeypatch.setattr("service.ml.evidence.COUNTS_AT_A_TIME", 5000)
    assert paired(200, 20, 10) == before


def test_no_answer_on_either_side_is_wrong_and_belongs_to_no_label():
    true_ids = np.array([0, 1, 2, 3])
    silent = np.full(4, -1)
    comparison = compare("lora", "zero_shot_prompt", "test", true_ids, true_ids, silent, K, 0, resamples=50)
    assert (comparison.accuracy_delta, comparison.macro_f1_delta) == (1.0, 1.0)


def test_seventy_seven_labels_and_thirteen_hundred_rows_take_seconds_at_most():
    true_ids = np.random.default_rng(0).integers(0, 77, 1300)
    started = time.process_time()
    compare("lora", "majority", "test", true_ids, noisy(0.9, true_ids, 1, 77), noisy(0.8, true_ids, 2, 77), 77, 0)
    assert time.process_time() - started < 6  # CPU seconds of all threads; about 1 on an idle machine


def test_rows_and_answers_must_be_as_many_and_at_least_one():
    one, two = np.zeros(1, dtype=np.int64), np.zeros(2, dtype=np.int64)
    for triple in ((one, two, one), (one, one, two), (one[:0], one[:0], one[:0])):
        with pytest.raises(ValueError, match="as many answers as rows"):
            compare("lora", "majority", "test", *triple, K, 0)


def test_a_comparison_is_the_contracts_block():
    block = json.loads(json.dumps(asdict(paired(50, 9, 0)), allow_nan=False))
    intervals = {"accuracy_delta_ci95", "macro_f1_delta_ci95"}
    whole = {"n", "n_texts", "n_fixed", "n_broken"}
    shares = {"accuracy_delta", "macro_f1_delta", "mcnemar_p", "mcnemar_p_texts", "mcnemar_p_holm"}
    shares |= {"minimum_detectable_difference"}
    assert set(block) == {"candidate", "baseline", "on", "verdict"} | intervals | whole | shares
    assert all(len(block[name]) == 2 for name in intervals)
    assert all(isinstance(block[name], int) for name in whole)
    assert all(isinstance(block[name], float) for name in shares)
    assert block["verdict"] == "candidate_wins"


# Texts that repeat


def repeated(times, seed=0, n=120):
    """Truth, two sides' answers and text ids of N texts with so many rows each, side by side or all alike."""
    rng = np.random.default_rng(seed)
    text_ids = np.repeat(np.arange(n), times)
    true_ids = rng.integers(0, K, n)[text_ids]
    return true_ids, noisy(0.8, true_ids, seed + 1), noisy(0.65, true_ids, seed + 2), text_ids


@pytest.mark.parametrize("times", [2, 7])
def test_repeating_every_row_of_a_file_shows_no_more_than_the_file(times):
    true_ids, ours, theirs, text_ids = repeated(1)
    once = compare("lora", "majority", "test", true_ids, ours, theirs, K, 0, text_ids=text_ids)
    rows = [np.repeat(ids, times) for ids in (true_ids, ours, theirs)]
    many = compare("lora", "majority", "test", *rows, K, 0, text_ids=np.repeat(text_ids, times))
    counted_by_row = {"n": times * once.n, "n_fixed": times * once.n_fixed, "n_broken": times * once.n_broken}
    assert many.mcnemar_p < once.mcnemar_p == once.mcnemar_p_texts
    changed = counted_by_row | {name: getattr(many, name) for name in ("mcnemar_p", "mcnemar_p_holm")}
    for interval in ("accuracy_delta_ci95", "macro_f1_delta_ci95"):
        assert getattr(many, interval) == pytest.approx(getattr(once, interval))
        changed[interval] = getattr(many, interval)
    assert many == replace(once, **changed)


def test_a_verdict_needs_the_texts_as_well_as_the_rows():
    text_ids = np.repeat([0, 1, 2], [10, 10, 300])
    true_ids, ours = np.zeros(320, dtype=np.int64), np.zeros(320, dtype=np.int64)
    theirs = np.where(text_ids < 2, 1, 0)
    found = compare("lora", "tfidf_logreg", "test", true_ids, ours, theirs, K, 0, text_ids=text_ids)
    assert (found.n_fixed, found.n_texts, found.mcnemar_p_texts) == (20, 3, 0.5)
    assert found.mcnemar_p < 1e-5
    assert found.verdict == holm([found])[0].verdict == "inconclusive"
    by_row = compare("lora", "tfidf_logreg", "test", true_ids, ours, theirs, K, 0)
    assert by_row.verdict == "candidate_wins"
    assert beats(true_ids, ours, theirs)
    assert not beats(true_ids, ours, theirs, text_ids)


def test_texts_that_point_the_other_way_than_the_rows_show_nothing():
    text_ids = np.concatenate([np.arange(20), np.full(90, 20)])  # twenty texts for one side, a long one for the other
    true_ids = np.zeros(110, dtype=np.int64)
    ours, theirs = np.where(text_ids < 20, 0, 1), np.where(text_ids < 20, 1, 0)
    found = compare("lora", "tfidf_logreg", "test", true_ids, ours, theirs, K, 0, text_ids=text_ids)
    assert found.mcnemar_p < 1e-6
    assert (found.mcnemar_p_texts, found.verdict) == (1.0, "inconclusive")
    assert not beats(true_ids, theirs, ours, text_ids)


def test_the_p_of_texts_agrees_with_statsmodels_on_one_vote_a_text():
    true_ids, ours, theirs, text_ids = repeated(3)
    found = compare("lora", "majority", "test", true_ids, ours, theirs, K, 0, text_ids=text_ids)
    votes = ((ours == true_ids).astype(int) - (theirs == true_ids)).reshape(-1, 3).sum(1)
    expected = mcnemar([[0, (votes > 0).sum()], [(votes < 0).sum(), 0]], exact=True).pvalue
    assert found.mcnemar_p_texts == pytest.approx(expected, abs=1e-9)
    discordance = np.mean(votes != 0)
    assert found.minimum_detectable_difference == minimum_detectable_difference(120, discordance)


def test_intervals_of_texts_agree_with_scipys_bootstrap_of_texts():
    true_ids, ours, theirs, text_ids = repeated(4)
    # Answers that hang together within a text: what makes rows count for less than they seem.
    ours, theirs = ours.reshape(-1, 4)[:, [0, 0, 0, 3]].ravel(), theirs.reshape(-1, 4)[:, [0, 0, 0, 3]].ravel()
    found = compare("lora", "majority", "test", true_ids, ours, theirs, K, 0, text_ids=text_ids)
    gained = ((ours == true_ids).astype(int) - (theirs == true_ids)).reshape(-1, 4).mean(1)
    options = {"method": "percentile", "n_resamples": 9999, "rng": np.random.default_rng(0)}
    expected = scipy.stats.bootstrap((gained,), np.mean, **options).confidence_interval
    assert found.accuracy_delta_ci95 == pytest.approx(tuple(expected), abs=0.01)
    rows = [ids.reshape(-1, 4) for ids in (true_ids, ours, theirs)]

    def macro_f1_delta(texts):
        truth, ours, theirs = (ids[texts.astype(int)].ravel() for ids in rows)
        options = {"labels": range(K), "average": "macro", "zero_division": 0}
        return f1_score(truth, ours, **options) - f1_score(truth, theirs, **options)

    options["n_resamples"] = 1000
    expected = scipy.stats.bootstrap((np.arange(120),), macro_f1_delta, vectorized=False, **options)
    assert found.macro_f1_delta_ci95 == pytest.approx(tuple(expected.confidence_interval), abs=0.015)
    by_row = compare("lora", "majority", "test", true_ids, ours, theirs, K, 0)
    widths = [np.diff(c.accuracy_delta_ci95)[0] for c in (found, by_row)]
    assert widths[0] > 1.3 * widths[1]


def test_texts_are_the_same_once_case_and_white_space_are_folded():
    assert same_texts(["A  card", "fee", "a card ", "FEE", "cards"]).tolist() == [0, 1, 0, 1, 2]


# Correction and power

NO_DIFFERENCE = paired(100, 0, 0)


@given(st.lists(st.integers(0, 999) | st.integers(0, 60), min_size=1, max_size=8), st.booleans())
def test_corrected_p_and_verdicts_agree_with_statsmodels(thousandths, candidate_is_ahead):
    p_values = [thousandth / 1000 for thousandth in thousandths]
    split = {"n_fixed": 1, "n_broken": 0} if candidate_is_ahead else {"n_fixed": 0, "n_broken": 1}
    corrected = holm([replace(NO_DIFFERENCE, mcnemar_p=p, mcnemar_p_texts=p, **split) for p in p_values])
    with mock.patch("gc.collect"):  # statsmodels collects garbage at every call: seconds in a process as large as this
        expected = multipletests(p_values, method="holm")[1]
    assert [c.mcnemar_p_holm for c in corrected] == pytest.approx(list(expected), abs=1e-9)
    verdict = "candidate_wins" if candidate_is_ahead else "baseline_wins"
    assert all(c.verdict == (verdict if c.mcnemar_p_holm < 0.05 else "inconclusive") for c in corrected)


def test_a_win_alone_may_be_inconclusive_among_many():
    comparison = paired(100, 7, 0)
    assert comparison.verdict == "candidate_wins"
    assert {c.verdict for c in holm([comparison] * 5)} == {"inconclusive"}


@pytest.mark.parametrize(("n", "discordance"), [(300, 0.1), (300, 0.4), (3080, 0.05)])
def test_the_detectable_difference_gives_back_connors_number_of_rows(n, discordance):
    difference = minimum_detectable_difference(n, discordance)
    z_alpha, z_beta = scipy.stats.norm.ppf([0.975, 0.8])
    rows = ((z_alpha * discordance**0.5 + z_beta * (discordance - difference**2) ** 0.5) / difference) ** 2
    assert rows == pytest.approx(n)


@pytest.mark.parametrize(("n", "discordance"), [(300, 0.15), (1000, 0.1), (300, 0.0)])
def test_the_exact_test_finds_the_detectable_difference_about_four_times_in_five(n, discordance):
    difference = minimum_detectable_difference(n, discordance)
    discordance = max(discordance, difference)
    shares = [(discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance]
    draws = np.random.default_rng(0).multinomial(n, shares, 2000)
    found = np.mean([scipy.stats.binomtest(b, b + c).pvalue < 0.05 if b + c else False for b, c, _ in draws])
    assert 0.7 < found < 0.87  # the exact test is a little stricter than the formula


@given(st.integers(1, 5000), st.floats(0, 1))
def test_the_detectable_difference_is_a_share_and_falls_with_more_rows(n, discordance):
    difference = minimum_detectable_difference(n, discordance)
    assert 0 < difference <= 1
    assert minimum_detectable_difference(n + 1, discordance) <= difference


# Which comparisons are made


def test_the_dearest_meets_every_method_and_every_method_meets_majority():
    answers = random_answers(
        {"lora": 0.9, "majority": 0, "zero_shot_prompt": 0.5, "tfidf_logreg": 0.7},
        500,
        on_subset_only=("zero_shot_prompt",),
    )
    pairs = {(c.candidate, c.baseline): c.on for c in compare_all(answers, K, 0)}
    assert pairs == {
        ("lora", "majority"): "test",
        ("lora", "tfidf_logreg"): "test",
        ("lora", "zero_shot_prompt"): "baseline_subset",
        ("tfidf_logreg", "majority"): "test",
        ("zero_shot_prompt", "majority"): "baseline_subset",
    }
    assert compare_all({"lora": answers["lora"]}, K, 0) == []


# The recommendation


def test_the_best_method_is_the_most_accurate_and_of_equals_the_cheapest():
    assert best_method(answers_of({"majority": 700, "tfidf_logreg": 100, "lora": 90})) == "lora"
    assert best_method(answers_of({"majority": 700, "tfidf_logreg": 90, "lora": 90})) == "tfidf_logreg"


def test_a_prompt_run_on_the_subset_is_the_best_only_if_it_is_better_there():
    worse = answers_of({"tfidf_logreg": 300, "zero_shot_prompt": 120, "lora": 90}, on_subset_only=("zero_shot_prompt",))
    better = answers_of({"tfidf_logreg": 300, "zero_shot_prompt": 60, "lora": 90}, on_subset_only=("zero_shot_prompt",))
    assert best_method(worse) == "lora"
    assert best_method(better) == "zero_shot_prompt"


def test_the_cheapest_method_shown_to_be_within_the_margin_is_recommended():
    answers = answers_of({"majority": 700, "tfidf_logreg": 88, "embedding_logreg": 84, "lora": 80})
    recommendation, sentence = told(answers)
    assert recommendation.method == "tfidf_logreg"
    assert recommendation.margin == MARGIN
    assert (
        "TF-IDF with logistic regression is the cheapest method shown to lose no more than 2 percentage points"
        in recommendation.reason
    )
    assert "91.2 % against 92.0 % of 1,000 test rows, in truth perhaps 0.3 to 1.4 points worse" in recommendation.reason
    assert sentence.startswith("Fine-tuning gains too little here: TF-IDF with logistic regression is right on 91.2 %")


def test_a_difference_that_is_not_significant_is_not_read_as_equal():
    answers = random_answers({"majority": 0, "tfidf_logreg": 0.86, "lora": 0.88}, 200, seed=4)
    comparison = next(c for c in compare_all(answers, K, 0) if c.baseline == "tfidf_logreg")
    assert comparison.verdict == "inconclusive"
    assert comparison.accuracy_delta > 0
    recommendation, sentence = told(answers)
    assert recommendation.method == "lora"
    assert "TF-IDF with logistic regression falls short of LoRA fine-tuning" in recommendation.reason
    assert "; do not expect more rows to make it good enough" in recommendation.reason
    assert sentence.startswith("Fine-tuning comes out first, but not clearly")


def test_at_the_number_of_rows_said_to_be_needed_four_experiments_in_five_show_it(monkeypatch):
    monkeypatch.setattr("worker.compare.compare", partial(compare, resamples=500))
    rng, n, fixed, broken = np.random.default_rng(0), 400, 14, 10
    shares = [fixed / n, broken / n, 1 - (fixed + broken) / n]

    def answers(counts):
        side = np.repeat([0, 1, 2], counts)  # right on LoRA's side alone, on the cheaper one's alone, on both
        true_ids = np.zeros(len(side), dtype=np.int64)
        methods = {"tfidf_logreg": 1 * (side == 0), "lora": 1 * (side == 1)}
        return {m: MethodAnswers(true_ids, true_ids[:50], ids, ids[:50]) for m, ids in methods.items()}

    reason = told(answers([fixed, broken, n - fixed - broken]))[0].reason
    needed = int(re.findall(r"about ([\d,]+) test rows would settle it", reason)[0].replace(",", ""))
    shown = sum(told(answers(counts))[0].method == "tfidf_logreg" for counts in rng.multinomial(needed, shares, 120))
    assert 0.7 < shown / 120 < 0.95  # where the cheaper one comes out first, it is recommended as well


def test_no_more_prompted_rows_are_recommended_than_a_job_may_have():
    wrong = {"zero_shot_prompt": 23, "lora": 18}
    answers = answers_of(wrong, n=300, n_subset=300, on_subset_only=("zero_shot_prompt",))
    reason = told(answers)[0].reason
    assert "with `baseline.sample_size` at" not in reason
    found = re.findall(r"to show it would take about ([\d,]+), and a job prompts 10,000 at most\.", reason)
    assert 10_000 < int(found[0].replace(",", "")) <= 30_000
    JobSpec.model_validate({"baseline": {"sample_size": 10_000}})
    with pytest.raises(ValidationError):
        JobSpec.model_validate({"baseline": {"sample_size": 10_001}})


def test_the_number_of_rows_said_to_be_needed_is_enough_for_the_same_figures():
    answers = answers_of({"tfidf_logreg": 13, "lora": 10}, n=200, n_subset=50)
    recommendation, _ = told(answers)
    assert recommendation.method == "lora"
    test_rows, file_rows = re.findall(
        r"about ([\d,]+) test rows would settle it, a file of about ([\d,]+)", recommendation.reason
    )[0]
    needed = int(test_rows.replace(",", ""))
    assert int(file_rows.replace(",", "")) == 10 * needed
    times = -(-needed // 200)
    assert 1 < times < 40
    grown = answers_of({"tfidf_logreg": 13 * times, "lora": 10 * times}, n=200 * times)
    assert told(grown)[0].method == "tfidf_logreg"


def test_no_number_of_rows_is_promised_where_the_loss_already_reaches_the_margin():
    answers = random_answers({"tfidf_logreg": 0.82, "lora": 0.86}, 150, seed=3)
    recommendation, _ = told(answers)
    assert recommendation.method == "lora"
    assert "So far TF-IDF with logistic regression falls short of LoRA fine-tuning: " in recommendation.reason
    assert "; do not expect more rows to make it good enough" in recommendation.reason
    assert "too few" not in recommendation.reason
    assert "enough, a file" not in recommendation.reason


def test_a_clear_gap_is_called_worth_it_and_speaks_of_no_missing_rows():
    recommendation, sentence = told(answers_of({"majority": 700, "tfidf_logreg": 300, "lora": 50}))
    assert recommendation.method == "lora"
    assert "no cheaper one is shown to be as good" in recommendation.reason
    assert "too few" not in recommendation.reason
    assert sentence == (
        "Fine-tuning is worth it: LoRA fine-tuning is right on 95.0 % of 1,000 test rows, "
        "shown to be better than every cheaper method run."
    )


def test_a_gain_that_may_be_under_the_margin_is_not_called_worth_it():
    _, sentence = told(answers_of({"majority": 700, "tfidf_logreg": 65, "lora": 50}))
    assert sentence.startswith("Fine-tuning comes out first: ")


def test_with_a_margin_of_nothing_the_best_stands_and_equality_is_called_what_cannot_be_shown():
    recommendation, sentence = told(answers_of({"tfidf_logreg": 40, "lora": 40}, 400), margin=0.0)
    assert recommendation.method == "tfidf_logreg"
    assert recommendation.reason == (
        "No method is right more often than TF-IDF with logistic regression (90.0 % of 400 test rows). TF-IDF with "
        "logistic regression is not shown to be as good as LoRA fine-tuning: 90.0 % against 90.0 % of 400 test rows; "
        "with a margin of 0, a method that is equally good can never be shown to be so."
    )
    assert sentence.startswith("Fine-tuning is not shown to pay off: ")


def test_with_a_margin_of_nothing_a_lead_is_said_to_be_what_more_rows_could_show():
    recommendation, _ = told(answers_of({"majority": 300, "tfidf_logreg": 40, "lora": 42}, 400), margin=0.0)
    assert recommendation.method == "tfidf_logreg"
    assert "is not shown to be as good as LoRA fine-tuning: " in recommendation.reason
    assert recommendation.reason.endswith("; more rows could show it to be better.")


def test_with_a_margin_of_nothing_no_sentence_speaks_of_0_points():
    for wrong in (38, 40, 42):
        recommendation, sentence = told(answers_of({"majority": 300, "tfidf_logreg": wrong, "lora": 40}), margin=0.0)
        assert " 0 percentage" not in recommendation.reason + sentence


def test_ten_rows_answered_alike_show_nothing():
    answers = answers_of(
        {"tfidf_logreg": 1, "zero_shot_prompt": 0, "lora": 6}, n=40, on_subset_only=("zero_shot_prompt",)
    )
    same = answers["zero_shot_prompt"].subset_true_ids[:10]
    few = {
        method: MethodAnswers(of.test_true_ids, same, of.test_ids, same if method != "lora" else (same + 1) % K)
        for method, of in answers.items()
    }
    few["embedding_logreg"] = replace(
        few["tfidf_logreg"], test_ids=few["tfidf_logreg"].test_true_ids, subset_ids=same - 1
    )
    assert best_method(few) == "zero_shot_prompt"
    recommendation, _ = told(few)
    assert recommendation.method == "zero_shot_prompt"
    assert (
        "about 190 test rows would settle it, a file of about 1,900 rows, with `baseline.sample_size`, the rows "
        "prompted, at 190" in recommendation.reason
    )
    assert rows_to_exclude(MARGIN) == pytest.approx(182.6, abs=0.1)


def test_one_text_a_thousand_times_shows_nothing():
    answers = answers_of({"majority": 700, "tfidf_logreg": 88, "lora": 80})
    one = {
        m: replace(a, test_text_ids=np.arange(1000) % 100, subset_text_ids=np.arange(300)) for m, a in answers.items()
    }
    assert told(answers)[0].method == "tfidf_logreg"
    recommendation = told(one)[0]
    assert recommendation.method == "lora"
    assert "of 1,000 test rows (100 distinct texts)" in recommendation.reason


def test_a_few_rows_without_a_difference_are_said_to_say_little_and_no_interval_without_width_is_shown():
    recommendation, _ = told(answers_of({"embedding_logreg": 1, "lora": 1}, n=26, n_subset=26))
    assert recommendation.reason == (
        "No method is right more often than embeddings with logistic regression (96.2 % of 26 test rows). There are "
        "too few rows to show that embeddings with logistic regression is at most 2 percentage points behind LoRA "
        "fine-tuning: on 26 test rows the two never differed in what they had right, which says little; with figures "
        "like these, about 190 test rows would settle it, a file of about 1,900 rows."
    )


def test_a_file_with_test_rows_enough_needs_only_more_of_them_prompted():
    answers = answers_of({"zero_shot_prompt": 40, "lora": 40}, n_subset=100, on_subset_only=("zero_shot_prompt",))
    assert told(answers)[0].reason.endswith(
        "about 190 test rows would settle it, and this file has them: set `baseline.sample_size`, the rows "
        "prompted, to 190."
    )


@pytest.mark.parametrize(("test_share", "file_rows"), [(0.1, "1,900"), (0.2, "950"), (0.3, "640")])
def test_the_file_it_takes_follows_from_the_share_of_test_rows(test_share, file_rows):
    answers = answers_of({"tfidf_logreg": 0, "lora": 0}, n=26, n_subset=26)
    reason = told(answers, test_share=test_share)[0].reason
    assert f"about 190 test rows would settle it, a file of about {file_rows} rows." in reason


def test_the_model_of_the_cheaper_method_is_said_to_be_there_to_serve():
    answers = answers_of({"majority": 700, "embedding_logreg": 84, "lora": 80})
    recommendation, sentence = told(answers)
    assert recommendation.method == "embedding_logreg"
    assert sentence == (
        "Fine-tuning gains too little here: embeddings with logistic regression is right on 91.6 % of 1,000 test rows, "
        "shown to be at most 2 percentage points behind LoRA fine-tuning; its model is published and ready to be "
        "served."
    )
    _, without_training = told(answers_of({"majority": 700, "tfidf_logreg": 300, "embedding_logreg": 84}))
    assert "served" not in without_training


def test_a_cheaper_method_that_comes_out_first_unproven_is_told_with_the_rows_it_would_take():
    answers = random_answers({"majority": 0, "tfidf_logreg": 0.88, "lora": 0.87}, 60, seed=0)
    recommendation, sentence = told(answers)
    assert recommendation.method == best_method(answers) == "tfidf_logreg"
    assert (
        "too few rows to be sure of TF-IDF with logistic regression, which is ahead of LoRA fine-tuning: "
        in recommendation.reason
    )
    assert "about 920 test rows would settle it, a file of about 9,200 rows" in recommendation.reason
    assert sentence.startswith("Fine-tuning is not shown to pay off: ")


def test_few_rows_are_enough_where_the_cheaper_method_clearly_wins():
    answers = random_answers({"majority": 0, "tfidf_logreg": 0.95, "lora": 0.5}, 100)
    recommendation, sentence = told(answers)
    assert recommendation.method == "tfidf_logreg"
    assert "too few" not in recommendation.reason
    assert sentence.startswith("Fine-tuning buys nothing here: ")


def test_a_cheaper_method_still_open_is_named_beside_the_one_recommended():
    rng = np.random.default_rng(5)
    answers = answers_of({"embedding_logreg": 50, "lora": 48})
    true_ids = answers["lora"].test_true_ids
    ids = np.where(rng.random(1000) < 0.06, (true_ids + 1) % K, true_ids)
    answers["tfidf_logreg"] = replace(answers["lora"], test_ids=ids, subset_ids=ids[:300])
    recommendation, _ = told(answers)
    assert recommendation.method == "embedding_logreg"
    assert "So far TF-IDF with logistic regression falls short of LoRA fine-tuning: " in recommendation.reason


def test_at_chance_nothing_is_praised_and_lora_does_not_win():
    for seed in range(3):
        accuracies = {"majority": 0, "tfidf_logreg": 0, "zero_shot_prompt": 0, "lora": 0.02}
        recommendation, sentence = told(random_answers(accuracies, 400, seed, on_subset_only=("zero_shot_prompt",)))
        assert sentence.startswith(("Nothing is proven yet", "No method pays off here"))
        if recommendation.method != "majority":
            assert "not shown to beat always answering the most common label" in recommendation.reason


def test_lora_that_beats_a_silent_prompt_but_not_majority_is_not_called_better():
    answers = random_answers({"majority": 0, "lora": 0.05}, 400)
    silent = np.full(300, -1)
    answers["zero_shot_prompt"] = replace(answers["lora"], test_ids=None, subset_ids=silent)
    against = next(c for c in compare_all(answers, K, 0) if c.baseline == "zero_shot_prompt")
    assert against.mcnemar_p_holm < 0.001
    assert against.verdict == "inconclusive"
    without_majority = {method: answers[method] for method in ("zero_shot_prompt", "lora")}
    assert [c.verdict for c in compare_all(without_majority, K, 0)] == ["inconclusive"]
    _, sentence = told(answers)
    assert sentence.startswith("Nothing is proven yet")


def test_without_majority_a_constant_answer_stands_in():
    recommendation, sentence = told(random_answers({"zero_shot_prompt": 0.0, "lora": 0.0}, 400))
    assert "not shown to beat" in recommendation.reason
    assert sentence.startswith("Nothing is proven yet")


def test_majority_is_recommended_where_the_rest_gains_too_little_with_a_word_on_rare_labels():
    true_ids = (np.arange(2000) % 100 == 0).astype(np.int64)
    same = MethodAnswers(true_ids, true_ids[:300], np.zeros_like(true_ids), np.zeros_like(true_ids[:300]))
    answers = {"majority": same, "lora": replace(same, test_ids=true_ids, subset_ids=true_ids[:300])}
    recommendation, sentence = told(answers)
    assert recommendation.method == "majority"
    assert "look at macro-F1 first" in recommendation.reason
    assert sentence.startswith("No method pays off here: always answering the most common label is right on 99.0 %")


def test_a_method_run_alone_is_compared_with_nothing():
    recommendation, sentence = told(answers_of({"lora": 100}))
    assert recommendation.reason == "LoRA fine-tuning is the only method run, right on 90.0 % of 1,000 test rows."
    assert sentence.endswith("no other method was run to compare it with.")


def test_prompting_that_is_better_is_recommended_over_fine_tuning():
    answers = answers_of({"majority": 750, "zero_shot_prompt": 60, "lora": 200}, on_subset_only=("zero_shot_prompt",))
    recommendation, sentence = told(answers)
    assert recommendation.method == "zero_shot_prompt"
    assert sentence.startswith("Fine-tuning buys nothing here: zero-shot prompting is right on 94.0 % of 300 test rows")


@pytest.mark.parametrize("wrong", [60, 100, 600])
def test_a_similarity_is_never_called_prompting(wrong):
    answers = answers_of({"majority": 700, "tfidf_logreg": 300, "zero_shot_similarity": wrong, "lora": 99})
    recommendation, sentence = told(answers)
    assert "prompt" not in (recommendation.reason + sentence).lower()


def test_every_outcome_is_told_in_whole_sentences(monkeypatch):
    monkeypatch.setattr("worker.compare.compare", partial(compare, resamples=50))
    rng = np.random.default_rng(0)
    for seed in range(150):
        methods = rng.choice(COST_ORDER, rng.integers(1, len(COST_ORDER) + 1), replace=False)
        accuracies = dict(zip(methods.tolist(), rng.choice([0.0, 0.5, 0.9, 0.92, 1.0], len(methods)), strict=True))
        prompts = ("zero_shot_prompt", "few_shot_prompt")
        answers = random_answers(accuracies, rng.choice([1, 12, 400]), seed, on_subset_only=prompts)
        recommendation, sentence = told(answers, rng.choice([0.0, 0.02, 0.1, 0.5]))
        assert recommendation.method in answers
        for text in (recommendation.reason, sentence):
            assert text.endswith(".")
            assert text[0].isupper()
            assert not any(nonsense in text for nonsense in ("nan", "inf ", "None", "{", "-0.0", "e+"))
            assert not re.search(r"\b(\d+\.\d) to \1\b", text), "an interval without width reads as certainty"


def test_what_beats_the_constant_only_before_correction_is_proven_nowhere():
    n = 200
    answers = answers_of({"majority": 100, "tfidf_logreg": 94, "embedding_logreg": 100, "zero_shot_similarity": 100}, n)
    against_majority = next(
        c for c in compare_all(answers, K, seed=1) if (c.candidate, c.baseline) == ("tfidf_logreg", "majority")
    )
    assert against_majority.mcnemar_p < 0.05 < against_majority.mcnemar_p_holm
    recommendation, sentence = told(answers, margin=0.0)
    assert recommendation.method == "tfidf_logreg"
    assert "not shown to beat always answering the most common label" in recommendation.reason
    assert sentence.startswith("Nothing is proven yet")
