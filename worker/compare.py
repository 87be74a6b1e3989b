"""Two methods on the same rows: is the difference real, how large may it be, and which method to take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from math import ceil, inf, log, log10, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

Ids = NDArray[np.int64]
Rows = Literal["test", "baseline_subset"]
Verdict = Literal["candidate_wins", "baseline_wins", "inconclusive"]

SIGNIFICANCE = 0.05
POWER = 0.8
# Bounds the memory of one step of the bootstrap to about 100 MB.
COUNTS_AT_A_TIME = 2**21

# Cheapest first.
PLAIN_NAMES = {
    "majority": "always answering the most common label",
    "tfidf_logreg": "TF-IDF with logistic regression",
    "embedding_logreg": "embeddings with logistic regression",
    "zero_shot_similarity": "similarity to the label names",
    "zero_shot_prompt": "zero-shot prompting",
    "few_shot_prompt": "few-shot prompting",
    "lora": "LoRA fine-tuning",
}
COST_ORDER = tuple(PLAIN_NAMES)


@dataclass(frozen=True)
class PairedComparison:
    """One entry of `comparison` in `metrics.json`. Deltas are candidate minus baseline, as shares of 1."""

    candidate: str
    baseline: str
    on: Rows
    n: int
    accuracy_delta: float
    accuracy_delta_ci95: tuple[float, float]
    macro_f1_delta: float
    macro_f1_delta_ci95: tuple[float, float]
    n_fixed: int
    n_broken: int
    mcnemar_p: float
    mcnemar_p_holm: float
    minimum_detectable_difference: float
    verdict: Verdict


@dataclass(frozen=True)
class MethodAnswers:
    """One method's answers beside the truth: label ids of the N test rows and of the M rows of the baseline subset.

    `test_ids` is None where the method was run on the subset only.
    """

    test_true_ids: Ids
    subset_true_ids: Ids
    test_ids: Ids | None
    subset_ids: Ids


@dataclass(frozen=True)
class Recommendation:
    """`recommendation` in a job's summary: the method to take, and why in plain words."""

    method: str
    reason: str
    margin: float


def compare(
    candidate: str,
    baseline: str,
    on: Rows,
    true_ids: Ids,
    candidate_ids: Ids,
    baseline_ids: Ids,
    n_labels: int,
    seed: int,
    resamples: int = 10_000,
) -> PairedComparison:
    """Candidate against baseline on the same N rows; `mcnemar_p_holm` is the raw p until `holm` corrects it.

    `true_ids`, `candidate_ids` and `baseline_ids` are `(N,)` label ids, 0 to n_labels-1; -1 is no answer, and wrong.

    The intervals are paired percentile bootstraps (Efron & Tibshirani 1993, section 13.3); swapping the two sides
    mirrors them. The p is McNemar's, exact and two-sided: how likely so uneven a share of the rows that only one side
    has right would be, were both equally good (McNemar 1947).

    Raises:
        ValueError: there are no rows, or the three differ in length.
    """
    n = len(true_ids)
    if not 0 < n == len(candidate_ids) == len(baseline_ids):
        raise ValueError(f"expected as many answers as rows, got {len(candidate_ids)}, {len(baseline_ids)} for {n}")
    n_fixed, n_broken, p = _mcnemar(true_ids, candidate_ids, baseline_ids)
    accuracy, macro_f1 = _bootstrap(true_ids, candidate_ids, baseline_ids, n_labels, seed, resamples)
    return PairedComparison(
        candidate=candidate,
        baseline=baseline,
        on=on,
        n=n,
        accuracy_delta=float(accuracy[0]),
        accuracy_delta_ci95=_interval(accuracy[1:]),
        macro_f1_delta=float(macro_f1[0]),
        macro_f1_delta_ci95=_interval(macro_f1[1:]),
        n_fixed=n_fixed,
        n_broken=n_broken,
        mcnemar_p=p,
        mcnemar_p_holm=p,
        minimum_detectable_difference=minimum_detectable_difference(n, (n_fixed + n_broken) / n),
        verdict=_verdict(p, n_fixed - n_broken),
    )


def holm(comparisons: Sequence[PairedComparison]) -> list[PairedComparison]:
    """The comparisons with p corrected for their number, and the verdicts that p decides. Source: Holm 1979."""
    corrected, largest = list(comparisons), 0.0
    for rank, i in enumerate(sorted(range(len(corrected)), key=lambda i: corrected[i].mcnemar_p)):
        c = corrected[i]
        largest = max(largest, min(1.0, c.mcnemar_p * (len(corrected) - rank)))
        corrected[i] = replace(c, mcnemar_p_holm=largest, verdict=_verdict(largest, c.n_fixed - c.n_broken))
    return corrected


def compare_all(answers: Mapping[str, MethodAnswers], n_labels: int, seed: int) -> list[PairedComparison]:
    """The dearest method against every cheaper one, and every method against `majority`; Holm over all of them.

    Fixed before any answer is seen, and few, so that the correction costs little power. Each pair is compared on the
    largest rows both were run on; the dearer one is the candidate.
    """
    methods = sorted(answers, key=COST_ORDER.index)
    pairs = [(methods[-1], cheaper) for cheaper in methods[:-1]]
    if methods[0] == "majority":
        pairs += [(dearer, "majority") for dearer in methods[1:-1]]
    return holm([_compare_methods(answers, dearer, cheaper, n_labels, seed) for dearer, cheaper in pairs])


def minimum_detectable_difference(n: int, discordance: float) -> float:
    """The smallest true accuracy difference that n paired rows show with power 0.8 at two-sided 0.05, at most 1.

    Connor's n = (z_α √ψ + z_β √(ψ − δ²))² / δ², solved for δ, is δ = c·√ψ. A difference of δ needs at least that
    discordance ψ; where fewer rows differ, the floor is δ = ψ = c², all of them going one way (about 7.9 rows).

    Args:
        n: Paired rows.
        discordance: ψ, the share of rows that exactly one of the two methods has right.

    Source: Connor 1987, Biometrics 43(1), 207–211.
    """
    z_alpha, z_beta = norm.ppf(1 - SIGNIFICANCE / 2), norm.ppf(POWER)
    if n + z_beta**2 < z_alpha**2:
        return 1.0  # three rows or fewer: no difference solves the formula
    c = (z_alpha * sqrt(n) + z_beta * sqrt(n + z_beta**2 - z_alpha**2)) / (n + z_beta**2)
    return float(min(1.0, c * max(sqrt(discordance), c)))


def best_method(answers: Mapping[str, MethodAnswers]) -> str:
    """The most accurate method; of equals the cheapest.

    Methods with answers for the whole test part are ranked on it. The first of them and the first of those run on the
    subset only are then ranked on the subset, the rows they share.
    """
    methods = sorted(answers, key=COST_ORDER.index)
    whole = [method for method in methods if answers[method].test_ids is not None]
    part = [method for method in methods if answers[method].test_ids is None]
    # `max` keeps the first of equals, and the cheaper stand first.
    finalists = [max(group, key=lambda m: _share_right(*_own_rows(answers[m]))) for group in (whole, part) if group]
    finalists.sort(key=COST_ORDER.index)
    return max(finalists, key=lambda m: _share_right(answers[m].subset_true_ids, answers[m].subset_ids))


def recommend(answers: Mapping[str, MethodAnswers], margin: float, n_labels: int, seed: int) -> Recommendation:
    """The cheapest method shown to be not worse than the best one by more than `margin`, else the best one.

    Shown: the paired 95 % interval of its accuracy minus the best's, on the largest rows both were run on, lies above
    -margin, and the rows are enough for that to mean something (`rows_to_exclude`).

    `answers` go by names of `COST_ORDER`; `margin` is the accuracy, 0 to 0.5, that may be given up for less cost.
    """
    best = best_method(answers)
    cheaper = [method for method in COST_ORDER[: COST_ORDER.index(best)] if method in answers]
    trials = [_compare_methods(answers, method, best, n_labels, seed) for method in cheaper]
    shown = next((t for t in trials if t.accuracy_delta_ci95[0] > -margin and t.n >= rows_to_exclude(margin)), None)
    method = shown.candidate if shown else best
    undecided = [t for t in takewhile(lambda t: t is not shown, trials) if t.accuracy_delta_ci95[1] > -margin]
    if shown:
        reason = f"{_named(method)} is the cheapest method shown to lose no more than {_points(margin)} of accuracy "
        reason += f"against the best one, {_named(best)}: {_side_by_side(shown, answers)}."
    else:
        place = "has the highest accuracy" if len(answers) > 1 else "is the only method run"
        reason = f"{_named(best)} {place}, right on {_right(answers[best])}"
        reason += f", and no cheaper method is shown to come within {_points(margin)} of it." if cheaper else "."
    if undecided:
        reason += f" {_too_few_rows(undecided, margin, answers)}"
    if method == "majority":
        reason += " It gives every row the same label: where the rarer labels matter, look at macro-F1 first."
    elif not beats_majority(method, answers):
        reason += f" It is not shown to beat {PLAIN_NAMES['majority']}, so do not rely on it yet."
    return Recommendation(method, _capitalised(reason), margin)


def rows_to_exclude(loss: float) -> float:
    """How many rows without any loss it takes to exclude, at two-sided 95 %, a larger one; infinite for 0.

    An interval on fewer rows shows nothing, however narrow: ten rows that both get right give [0, 0].

    Source: Hanley & Lippman-Hand 1983, "If nothing goes wrong, is everything all right?", JAMA 249(13).
    """
    return log(SIGNIFICANCE / 2) / log(1 - loss) if loss > 0 else inf


def beats_majority(method: str, answers: Mapping[str, MethodAnswers]) -> bool:
    """Whether a method is shown to be better than a constant answer (exact McNemar, 0.05).

    Where `majority` was not run, the constant is the most common true label of the method's own rows.
    """
    if "majority" in answers:
        _, true_ids, ids, constant = _shared_rows(answers[method], answers["majority"])
    else:
        true_ids, ids = _own_rows(answers[method])
        constant = np.full_like(true_ids, np.bincount(true_ids).argmax())
    n_fixed, n_broken, p = _mcnemar(true_ids, ids, constant)
    return _verdict(p, n_fixed - n_broken) == "candidate_wins"


def headline(
    recommendation: Recommendation, answers: Mapping[str, MethodAnswers], comparisons: Sequence[PairedComparison]
) -> str:
    """One sentence for somebody who reads nothing else.

    Nothing is praised that is not shown to beat a constant answer, and LoRA is called better than another method only
    where a verdict of `comparisons`, with LoRA as the candidate and corrected by `holm`, says so.
    """
    method, margin = recommendation.method, recommendation.margin
    score = f"{PLAIN_NAMES[method]} is right on {_right(answers[method])}"
    if method == "majority":
        return f"No method pays off here: {score}, and none is shown to gain more than {_points(margin)} over that."
    if not beats_majority(method, answers):
        return f"Nothing is proven yet: {score}, which is not shown to be better than {PLAIN_NAMES['majority']}."
    if len(answers) == 1:
        return _capitalised(f"{score}; no other method was run to compare it with.")
    if method == "lora":
        won = {c.baseline: c for c in comparisons if (c.candidate, c.verdict) == ("lora", "candidate_wins")}
        rest = " or ".join(PLAIN_NAMES[m] for m in COST_ORDER[:-1] if m in answers and m not in won)
        if rest:
            return f"Fine-tuning comes out first, but not clearly: {score}, not shown to be better than {rest}."
        clear = all(c.accuracy_delta_ci95[0] >= margin for c in won.values())
        opening = "Fine-tuning is worth it" if clear else "Fine-tuning comes out first"
        return f"{opening}: {score}, shown to be better than every cheaper method run."
    dearer = [other for other in COST_ORDER[COST_ORDER.index(method) + 1 :] if other in answers]
    dearer_prompts = [other for other in dearer if other.endswith("_prompt") and not method.endswith("_prompt")]
    kinds = ["prompting"] * bool(dearer_prompts) + ["fine-tuning"] * ("lora" in dearer)
    opening = ("", "{} is not shown to pay off: ", "neither {} nor {} is shown to pay off: ")[len(kinds)].format(*kinds)
    is_best = method == best_method(answers)
    place = (
        "the highest of all methods on those rows"
        if is_best
        else f"shown to be at most {_points(margin)} behind the best"
    )
    return _capitalised(f"{opening}{score}, {place}.")


def _compare_methods(
    answers: Mapping[str, MethodAnswers], candidate: str, baseline: str, n_labels: int, seed: int
) -> PairedComparison:
    on, true_ids, candidate_ids, baseline_ids = _shared_rows(answers[candidate], answers[baseline])
    return compare(candidate, baseline, on, true_ids, candidate_ids, baseline_ids, n_labels, seed)


def _shared_rows(one: MethodAnswers, other: MethodAnswers) -> tuple[Rows, Ids, Ids, Ids]:
    """The largest rows both were run on: their name, the truth, and both answers."""
    if one.test_ids is not None and other.test_ids is not None:
        return "test", one.test_true_ids, one.test_ids, other.test_ids
    return "baseline_subset", one.subset_true_ids, one.subset_ids, other.subset_ids


def _own_rows(own: MethodAnswers) -> tuple[Ids, Ids]:
    return (own.subset_true_ids, own.subset_ids) if own.test_ids is None else (own.test_true_ids, own.test_ids)


def _share_right(true_ids: Ids, ids: Ids) -> float:
    return float(np.mean(true_ids == ids))


def _mcnemar(true_ids: Ids, candidate_ids: Ids, baseline_ids: Ids) -> tuple[int, int, float]:
    """Rows only the candidate has right, rows only the baseline has right, and the exact two-sided p."""
    candidate_right, baseline_right = candidate_ids == true_ids, baseline_ids == true_ids
    n_fixed, n_broken = int(np.sum(candidate_right & ~baseline_right)), int(np.sum(baseline_right & ~candidate_right))
    p = float(binomtest(n_fixed, n_fixed + n_broken).pvalue) if n_fixed + n_broken else 1.0
    return n_fixed, n_broken, p


def _verdict(p: float, n_gained: int) -> Verdict:
    if p >= SIGNIFICANCE:
        return "inconclusive"
    return "candidate_wins" if n_gained > 0 else "baseline_wins"


def _bootstrap(
    true_ids: Ids, candidate_ids: Ids, baseline_ids: Ids, K: int, seed: int, resamples: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Deltas of accuracy and of macro-F1, each `(1 + resamples,)`; the first are those of the rows themselves.

    Rows with the same truth and the same two answers are of one kind, and both figures depend only on how many rows
    there are of each of the C kinds: those counts are drawn, C instead of N numbers a resample.
    """
    kinds, first_row, counts = np.unique(
        np.stack([true_ids, candidate_ids, baseline_ids]), axis=1, return_index=True, return_counts=True
    )
    # An order that does not depend on which side is which: swapping them gives the same draws.
    order = np.argsort(first_row)
    (truth, candidate, baseline), counts = kinds[:, order], counts[order]
    n, C = len(true_ids), len(counts)
    gained = 1.0 * (candidate == truth) - (baseline == truth)
    sides = [_f1_terms(truth, candidate, K), _f1_terms(truth, baseline, K)]
    rng, step = np.random.default_rng(seed), max(1, COUNTS_AT_A_TIME // max(C, K))
    sizes = (min(step, resamples - start) for start in range(0, resamples, step))
    accuracy, macro_f1 = [], []
    for drawn in chain([counts[None]], (rng.multinomial(n, counts / n, size) for size in sizes)):
        weights = drawn.astype(np.float64)  # (resamples in this step, C)
        accuracy.append(weights @ gained / n)
        macro_f1.append(_macro_f1(weights, *sides[0]) - _macro_f1(weights, *sides[1]))
    return np.concatenate(accuracy), np.concatenate(macro_f1)


def _f1_terms(truth: Ids, predicted: Ids, K: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What a row of each kind adds to every label's true positives, and to its support + predictions; `(C, K)`."""
    is_true, is_predicted = truth[:, None] == np.arange(K), predicted[:, None] == np.arange(K)
    return 1.0 * (is_true & is_predicted), 1.0 * is_true + is_predicted


def _macro_f1(
    weights: NDArray[np.float64], hits: NDArray[np.float64], totals: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`(B,)` from `(B, C)` counts; F1 = 2·hits / (support + predictions), 0 for a label with neither."""
    return np.asarray((2 * (weights @ hits) / np.maximum(weights @ totals, 1)).mean(axis=1))


def _interval(deltas: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(deltas, [100 * SIGNIFICANCE / 2, 100 * (1 - SIGNIFICANCE / 2)])
    return float(low), float(high)


def _too_few_rows(undecided: Sequence[PairedComparison], margin: float, answers: Mapping[str, MethodAnswers]) -> str:
    """For the method nearest to being shown good enough: how many rows that would take, if more rows can help."""
    trial = min(undecided, key=lambda trial: (_rows_needed(trial, margin), -trial.accuracy_delta))
    needed = _rows_needed(trial, margin)
    text = f"There are too few rows to tell for {_named(trial.candidate)}: {_side_by_side(trial, answers)}; "
    if margin <= 0:
        return text + "with a margin of 0 no number of rows can tell."
    if trial.accuracy_delta <= -margin:
        return text + "it already loses that much or more, so more rows are not expected to make it good enough."
    if needed > 100 * trial.n:
        return text + "telling would take more than a hundred times as many test rows."
    return text + f"telling would take about {needed:,.0f} test rows put to both."


def _rows_needed(trial: PairedComparison, margin: float) -> float:
    """Rows at which the interval would lie above -margin, were the delta and the spread to stay as they are.

    The half-width shrinks with √n. Rounded up to two figures; infinite where the delta itself is at or below -margin.
    """
    spare, half_width = trial.accuracy_delta + margin, trial.accuracy_delta - trial.accuracy_delta_ci95[0]
    if spare <= 0 or margin <= 0:
        return inf
    needed = max(trial.n * (half_width / spare) ** 2, rows_to_exclude(margin), trial.n + 1)
    unit = 10 ** max(0, int(log10(needed)) - 1)
    return float(ceil(needed / unit) * unit)


def _side_by_side(trial: PairedComparison, answers: Mapping[str, MethodAnswers]) -> str:
    _, true_ids, ours, others = _shared_rows(answers[trial.candidate], answers[trial.baseline])
    mine, theirs = 100 * _share_right(true_ids, ours), 100 * _share_right(true_ids, others)
    low, high = (100 * end for end in trial.accuracy_delta_ci95)
    return (
        f"{mine:.1f} % against {theirs:.1f} % of {trial.n:,} test rows, "
        f"a difference of {low:+z.1f} to {high:+z.1f} points (95 % interval)"
    )


def _right(own: MethodAnswers) -> str:
    true_ids, ids = _own_rows(own)
    return f"{100 * _share_right(true_ids, ids):.1f} % of {len(true_ids):,} test rows"


def _points(share: float) -> str:
    return f"{100 * share:g} percentage point{'' if share == 0.01 else 's'}"


def _named(method: str) -> str:
    return f"{PLAIN_NAMES[method]} ({method})"


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]
