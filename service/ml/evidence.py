"""Two sides on the same rows: how large is the difference, is it real, and how small a one could have been seen.

The worker compares methods with it, the API models and jobs: the same function, so the same answer.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import inf, log, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.special import betainc, ndtri

from service.ml.findings import fold

Ids = NDArray[np.int64]
Rows = Literal["test", "baseline_subset"]
Verdict = Literal["candidate_wins", "baseline_wins", "inconclusive"]

SIGNIFICANCE = 0.05
POWER = 0.8
# Bounds the memory of one step of the bootstrap to about 100 MB.
COUNTS_AT_A_TIME = 2**21


@dataclass(frozen=True)
class PairedComparison:
    """One entry of `comparison` in `metrics.json`. Deltas are candidate minus baseline, as shares of 1.

    Rows of equal text are no independent evidence: `n_texts` counts the distinct ones among the `n` rows, and
    `mcnemar_p_texts` is the p with each text counted once, 1 where the texts point the other way than the rows do.
    """

    candidate: str
    baseline: str
    on: Rows
    n: int
    n_texts: int
    accuracy_delta: float
    accuracy_delta_ci95: tuple[float, float]
    macro_f1_delta: float
    macro_f1_delta_ci95: tuple[float, float]
    n_fixed: int
    n_broken: int
    mcnemar_p: float
    mcnemar_p_texts: float
    mcnemar_p_holm: float
    minimum_detectable_difference: float
    verdict: Verdict

    @property
    def winner(self) -> str | None:
        return {"candidate_wins": self.candidate, "baseline_wins": self.baseline}.get(self.verdict)


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
    text_ids: Ids | None = None,
) -> PairedComparison:
    """Candidate against baseline on the same N rows; `mcnemar_p_holm` is the raw p until `holm` corrects it.

    `true_ids`, `candidate_ids` and `baseline_ids` are `(N,)` label ids, 0 to n_labels-1; -1 is no answer, and wrong.
    `text_ids` are `(N,)`, at least 0 and equal where the texts are; None where no text repeats.

    The intervals are paired percentile bootstraps of texts, each with all its rows (Efron & Tibshirani 1993, section
    13.3; Davison & Hinkley 1997, section 3.8); swapping the two sides mirrors them. The p is McNemar's, exact and
    two-sided: how likely so uneven a share of the rows that only one side has right would be, were both equally good
    (McNemar 1947).

    Raises:
        ValueError: there are no rows, or the four differ in length.
    """
    n = len(true_ids)
    texts = np.arange(n) if text_ids is None else text_ids
    if not 0 < n == len(candidate_ids) == len(baseline_ids) == len(texts):
        raise ValueError(f"expected as many answers as rows, got {len(candidate_ids)}, {len(baseline_ids)} for {n}")
    rows, once = _discordant(true_ids, candidate_ids, baseline_ids, texts)
    n_texts, p, p_texts = len(np.unique(texts)), _sign_test(rows), _sign_test(once) if _agree(rows, once) else 1.0
    accuracy, macro_f1 = _bootstrap(true_ids, candidate_ids, baseline_ids, texts, n_labels, seed, resamples)
    return PairedComparison(
        candidate=candidate,
        baseline=baseline,
        on=on,
        n=n,
        n_texts=n_texts,
        accuracy_delta=float(accuracy[0]),
        accuracy_delta_ci95=_interval(accuracy[1:]),
        macro_f1_delta=float(macro_f1[0]),
        macro_f1_delta_ci95=_interval(macro_f1[1:]),
        n_fixed=rows[0],
        n_broken=rows[1],
        mcnemar_p=p,
        mcnemar_p_texts=p_texts,
        mcnemar_p_holm=p,
        minimum_detectable_difference=minimum_detectable_difference(n_texts, sum(once) / n_texts),
        verdict=_verdict(max(p, p_texts), rows),
    )


def holm(comparisons: Sequence[PairedComparison]) -> list[PairedComparison]:
    """The comparisons with p corrected for their number, and the verdicts that p decides. Source: Holm 1979.

    A side wins where both p, that of the rows and that of the texts counted once, are below 0.05 when corrected.
    """
    corrected = _corrected([c.mcnemar_p for c in comparisons])
    texts = _corrected([c.mcnemar_p_texts for c in comparisons])
    return [
        replace(c, mcnemar_p_holm=p, verdict=_verdict(max(p, p_texts), (c.n_fixed, c.n_broken)))
        for c, p, p_texts in zip(comparisons, corrected, texts, strict=True)
    ]


def withhold(comparisons: Sequence[PairedComparison], unproven: Collection[str]) -> list[PairedComparison]:
    """No win for an unproven side, however bad the other one is: the caller says what a side has to have shown."""
    return [replace(c, verdict="inconclusive") if c.winner in unproven else c for c in comparisons]


def beats(true_ids: Ids, ids: Ids, other_ids: Ids | None = None, text_ids: Ids | None = None) -> bool:
    """Whether answers are shown to be better than others (exact McNemar, 0.05), all `(N,)` as `compare` takes them.

    The others, where none are given, are always the most common true label.
    """
    others = np.full_like(true_ids, np.bincount(true_ids).argmax()) if other_ids is None else other_ids
    rows, once = _discordant(true_ids, ids, others, np.arange(len(ids)) if text_ids is None else text_ids)
    return _agree(rows, once) and _verdict(max(_sign_test(rows), _sign_test(once)), rows) == "candidate_wins"


def minimum_detectable_difference(n: int, discordance: float) -> float:
    """The smallest true accuracy difference that n paired rows show with power 0.8 at two-sided 0.05, at most 1.

    Connor's n = (z_α √ψ + z_β √(ψ − δ²))² / δ², solved for δ, is δ = c·√ψ. A difference of δ needs at least that
    discordance ψ; where fewer rows differ, the floor is δ = ψ = c², all of them going one way (about 7.9 rows).

    Args:
        n: Paired rows of distinct text.
        discordance: ψ, the share of them that exactly one of the two sides has right.

    Source: Connor 1987, Biometrics 43(1), 207–211.
    """
    z_alpha, z_beta = ndtri(1 - SIGNIFICANCE / 2), ndtri(POWER)
    if n + z_beta**2 < z_alpha**2:
        return 1.0  # three rows or fewer: no difference solves the formula
    c = (z_alpha * sqrt(n) + z_beta * sqrt(n + z_beta**2 - z_alpha**2)) / (n + z_beta**2)
    return float(min(1.0, c * max(sqrt(discordance), c)))


def rows_to_exclude(loss: float) -> float:
    """How many rows without any loss it takes to exclude, at two-sided 95 %, a larger one; infinite for 0.

    An interval on fewer rows shows nothing, however narrow: ten rows that both get right give [0, 0].

    Source: Hanley & Lippman-Hand 1983, "If nothing goes wrong, is everything all right?", JAMA 249(13).
    """
    return log(SIGNIFICANCE / 2) / log(1 - loss) if loss > 0 else inf


def same_texts(texts: Sequence[str]) -> Ids:
    """`(N,)` ids of the texts, equal where these are once case and white space are folded."""
    ids: dict[str, int] = {}
    return np.array([ids.setdefault(fold(text), len(ids)) for text in texts], dtype=np.int64)


def _discordant(
    true_ids: Ids, candidate_ids: Ids, baseline_ids: Ids, texts: Ids
) -> tuple[tuple[int, int], tuple[int, int]]:
    """`(fixed, broken)`: how many rows only the candidate, and only the baseline, has right; and how many texts.

    A text with several rows goes to the side that is right on more of them.
    """
    gained = 1 * (candidate_ids == true_ids) - (baseline_ids == true_ids)
    by_text = np.bincount(texts, gained)
    rows, once = ((int(np.sum(signs > 0)), int(np.sum(signs < 0))) for signs in (gained, by_text))
    return rows, once


def _sign_test(discordant: tuple[int, int]) -> float:
    """Exact and two-sided: P(X ≤ k) of a binomial X with p = 1/2, as an incomplete beta integral, twice."""
    n, k = sum(discordant), min(discordant)
    return min(1.0, 2 * float(betainc(n - k, k + 1, 0.5))) if n else 1.0


def _agree(rows: tuple[int, int], texts: tuple[int, int]) -> bool:
    return (rows[0] - rows[1]) * (texts[0] - texts[1]) >= 0


def _verdict(p: float, discordant: tuple[int, int]) -> Verdict:
    if p >= SIGNIFICANCE:
        return "inconclusive"
    return "candidate_wins" if discordant[0] > discordant[1] else "baseline_wins"


def _corrected(p_values: Sequence[float]) -> list[float]:
    corrected, largest = list(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - rank)))
        corrected[i] = largest
    return corrected


def _bootstrap(
    true_ids: Ids, candidate_ids: Ids, baseline_ids: Ids, texts: Ids, K: int, seed: int, resamples: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Deltas of accuracy and of macro-F1, each `(1 + resamples,)`; the first are those of the rows themselves.

    Texts whose rows have the same truths and the same two answers are of one kind, and both figures depend only on
    how many texts there are of each of the C kinds: those counts are drawn, C instead of N numbers a resample.
    """
    rows_of: dict[int, list[tuple[int, ...]]] = {}
    for text, *row in np.stack([texts, true_ids, candidate_ids, baseline_ids], axis=1).tolist():
        rows_of.setdefault(text, []).append(tuple(row))
    # In the order of their first rows, whichever side is which: swapping the sides gives the same draws.
    counted = Counter(tuple(sorted(rows)) for rows in rows_of.values())
    counts = np.array(list(counted.values()))  # (C,)
    n, C = len(rows_of), len(counts)
    kind = np.repeat(np.arange(C), [len(rows) for rows in counted])
    truth, candidate, baseline = np.array([row for rows in counted for row in rows]).T
    size = np.bincount(kind)
    gained = np.bincount(kind, 1.0 * (candidate == truth) - (baseline == truth))
    sides = [_f1_terms(kind, truth, ids, (C, K)) for ids in (candidate, baseline)]
    rng, step = np.random.default_rng(seed), max(1, COUNTS_AT_A_TIME // max(C, K))
    sizes = (min(step, resamples - start) for start in range(0, resamples, step))
    accuracy, macro_f1 = [], []
    for drawn in chain([counts[None]], (rng.multinomial(n, counts / n, size) for size in sizes)):
        weights = drawn.astype(np.float64)  # (resamples in this step, C)
        accuracy.append(weights @ gained / (weights @ size))
        macro_f1.append(_macro_f1(weights, *sides[0]) - _macro_f1(weights, *sides[1]))
    return np.concatenate(accuracy), np.concatenate(macro_f1)


def _f1_terms(kind: Ids, truth: Ids, predicted: Ids, shape: tuple[int, int]) -> tuple[csr_array, csr_array]:
    """What a text of each kind adds to every label's true positives, and to support + predictions; `(C, K)` each."""
    hit, given = predicted == truth, predicted >= 0
    hits = csr_array((np.ones(hit.sum()), (kind[hit], truth[hit])), shape)
    labels, kinds = np.concatenate([truth, predicted[given]]), np.concatenate([kind, kind[given]])
    return hits, csr_array((np.ones(len(labels)), (kinds, labels)), shape)


def _macro_f1(weights: NDArray[np.float64], hits: csr_array, totals: csr_array) -> NDArray[np.float64]:
    """`(B,)` from `(B, C)` counts; F1 = 2·hits / (support + predictions), 0 for a label with neither."""
    return np.asarray((2 * (weights @ hits) / np.maximum(weights @ totals, 1)).mean(axis=1))


def _interval(deltas: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(deltas, [100 * SIGNIFICANCE / 2, 100 * (1 - SIGNIFICANCE / 2)])
    return float(low), float(high)
