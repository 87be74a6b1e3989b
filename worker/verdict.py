"""Which method to take, and why, in words that claim no more than is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import ceil, inf, log10

import numpy as np

from service.ml.evidence import Ids, PairedComparison, rows_to_exclude
from worker.compare import (
    COST_ORDER,
    PLAIN_NAMES,
    MethodAnswers,
    compare_methods,
    own_rows,
    shared_rows,
    unproven,
)


@dataclass(frozen=True)
class Recommendation:
    """`recommendation` in a job's summary: the method to take, and why in plain words."""

    method: str
    reason: str
    margin: float


def best_method(answers: Mapping[str, MethodAnswers]) -> str:
    """The most accurate method; of equals the cheapest.

    Methods with answers for the whole test part are ranked on it. The first of them and the first of those run on the
    subset only are then ranked on the subset, the rows they share.
    """
    methods = sorted(answers, key=COST_ORDER.index)
    whole = [method for method in methods if answers[method].test_ids is not None]
    part = [method for method in methods if answers[method].test_ids is None]
    # `max` keeps the first of equals, and the cheaper stand first.
    finalists = [max(group, key=lambda m: _share_right(*own_rows(answers[m])[:2])) for group in (whole, part) if group]
    finalists.sort(key=COST_ORDER.index)
    return max(finalists, key=lambda m: _share_right(answers[m].subset_true_ids, answers[m].subset_ids))


def recommend(
    answers: Mapping[str, MethodAnswers], comparisons: Sequence[PairedComparison], margin: float, n_labels: int,
    seed: int, test_share: float,
) -> Recommendation:  # fmt: skip
    """The cheapest method shown to be not worse than the best one by more than `margin`, else the best one.

    Shown: the paired 95 % interval of its accuracy minus the best's, on the largest rows both were run on, lies above
    -margin, and the distinct texts are enough for that to mean something (`rows_to_exclude`).

    `answers` go by names of `COST_ORDER`, `comparisons` are `compare_all`'s of them; `margin` is the accuracy, 0 to
    0.5, that may be given up for less cost; `test_share` is the share of the usable rows that are test rows.
    """
    best = best_method(answers)
    cheaper = [method for method in COST_ORDER[: COST_ORDER.index(best)] if method in answers]
    trials = [compare_methods(answers, method, best, n_labels, seed) for method in cheaper]
    shown = next((t for t in trials if _shown(t.accuracy_delta_ci95[0], t.n_texts, margin)), None)
    method = shown.candidate if shown else best
    undecided = [t for t in takewhile(lambda t: t is not shown, trials) if t.accuracy_delta_ci95[1] > -margin]
    if shown:
        reason = f"{PLAIN_NAMES[method]} is the cheapest method shown to lose no more than {_points(margin)} of "
        reason += f"accuracy against the best one, {PLAIN_NAMES[best]}: {_side_by_side(shown, answers)}."
    else:
        reason = f"{PLAIN_NAMES[best]} is the only method run, right on {_right(answers[best])}."
        if len(answers) > 1:
            reason = f"No method is right more often than {PLAIN_NAMES[best]} ({_right(answers[best])})"
            reason += f"; no cheaper one is shown to come within {_points(margin)} of it." if cheaper else "."
    if undecided:
        nearest = min(undecided, key=lambda trial: (_rows_needed(trial, margin), -trial.accuracy_delta))
        reason += f" {_too_few_rows(nearest, margin, answers, test_share)}"
    if "lora" in answers and best != "lora":
        trial = compare_methods(answers, method, "lora", n_labels, seed)
        if trial.verdict != "candidate_wins" and not _shown(trial.accuracy_delta_ci95[0], trial.n_texts, margin):
            reason += f" {_too_few_rows(trial, margin, answers, test_share)}"
    if method == "majority":
        reason += " It gives every row the same label: where the rarer labels matter, look at macro-F1 first."
    elif method in unproven(answers, comparisons):
        reason += f" It is not shown to beat {PLAIN_NAMES['majority']}, so do not rely on it yet."
    return Recommendation(method, _capitalised(reason), margin)


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
    if method in unproven(answers, comparisons):
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
    against_lora = [c for c in comparisons if c.candidate == "lora"]
    if any(c.winner == c.baseline or _shown(-c.accuracy_delta_ci95[1], c.n_texts, margin) for c in against_lora):
        prompting = " and prompting is not shown to pay off" * bool(dearer_prompts)
        opening = f"fine-tuning buys nothing here{prompting}: "
    is_best = method == best_method(answers)
    place = (
        "no other method run is right on more of those"
        if is_best
        else f"shown to be at most {_points(margin)} behind the best"
    )
    served = "; its model is published and ready to be served" * (method == "embedding_logreg" and "lora" in answers)
    return _capitalised(f"{opening}{score}, {place}{served}.")


def _shown(lower: float, n_texts: int, margin: float) -> bool:
    """Whether a difference whose interval begins at `lower` is shown to be no loss of more than `margin`."""
    return lower > -margin and n_texts >= rows_to_exclude(margin)


def _share_right(true_ids: Ids, ids: Ids) -> float:
    return float(np.mean(true_ids == ids))


def _too_few_rows(
    trial: PairedComparison, margin: float, answers: Mapping[str, MethodAnswers], test_share: float
) -> str:
    """One sentence: why the pair is undecided, and what would decide it (test rows, and the file that has so many)."""
    cheaper, dearer = PLAIN_NAMES[trial.candidate], PLAIN_NAMES[trial.baseline]
    seen = _side_by_side(trial, answers)
    if margin <= 0:
        return f"With a margin of 0, no number of rows can show that {cheaper} is as good as {dearer}: {seen}."
    if trial.accuracy_delta <= -margin:
        return (
            f"So far {cheaper} falls short of {dearer}: {seen}; that is no less than the margin, so do not count on "
            f"more rows to make it good enough, though {trial.n:,} cannot rule it out."
        )
    if trial.n_fixed == trial.n_broken == 0:
        seen = f"on {_rows_of(trial)} the two never differed in what they had right, which says little"
    text = f"There are too few rows to be sure that {cheaper} is at most {_points(margin)} behind {dearer}: {seen}"
    needed = _rows_needed(trial, margin)
    if needed > 100 * trial.n:
        return f"{text}; to be sure would take more than a hundred times as many."
    text += f"; with figures like these, about {needed:,.0f} test rows would be enough"
    if needed <= len(answers[trial.candidate].test_true_ids):
        return f"{text}, and this file has them: set `baseline.sample_size` to {needed:.0f}."
    asked = f", with `baseline.sample_size` at {needed:.0f}" * (trial.on == "baseline_subset")
    return f"{text}, a file of about {_two_figures(needed / test_share):,.0f} rows{asked}."


def _rows_needed(trial: PairedComparison, margin: float) -> float:
    """Rows at which the interval would lie above -margin, were the delta and the spread to stay as they are.

    The half-width shrinks with √n. Rounded up to two figures; infinite where the delta itself is at or below -margin.
    """
    spare, half_width = trial.accuracy_delta + margin, trial.accuracy_delta - trial.accuracy_delta_ci95[0]
    if spare <= 0 or margin <= 0:
        return inf
    rows_per_text = trial.n / trial.n_texts
    needed = max(trial.n * (half_width / spare) ** 2, rows_to_exclude(margin) * rows_per_text, trial.n + 1)
    return _two_figures(needed)


def _two_figures(rows: float) -> float:
    """Rounded up."""
    unit = 10 ** max(0, int(log10(rows)) - 1)
    return float(ceil(round(rows / unit, 9)) * unit)


def _side_by_side(trial: PairedComparison, answers: Mapping[str, MethodAnswers]) -> str:
    mine, theirs = _shares_right(trial, answers)
    return f"{mine} against {theirs} of {_rows_of(trial)}{_may_be(trial)}"


def _shares_right(trial: PairedComparison, answers: Mapping[str, MethodAnswers]) -> tuple[str, str]:
    rows = shared_rows(answers[trial.candidate], answers[trial.baseline])
    mine, theirs = (100 * _share_right(rows.true_ids, ids) for ids in (rows.ids, rows.other_ids))
    return f"{mine:.1f} %", f"{theirs:.1f} %"


def _rows_of(trial: PairedComparison) -> str:
    return f"{trial.n:,} test rows" + f" ({trial.n_texts:,} distinct texts)" * (trial.n_texts < trial.n)


def _may_be(trial: PairedComparison) -> str:
    """The interval in words; nothing where it has no width, which would read as certainty."""
    low, high = (round(100 * end, 1) for end in trial.accuracy_delta_ci95)
    if low == high:
        return ""
    if low >= 0 or high <= 0:
        near, far = sorted((abs(low), abs(high)))
        span = f"{f'{near:.1f} to' if near else 'up to'} {far:.1f} points {'better' if low >= 0 else 'worse'}"
    else:
        span = f"anything from {-low:.1f} points worse to {high:.1f} better"
    return f", in truth perhaps {span} (95 % interval)"


def _right(own: MethodAnswers) -> str:
    true_ids, ids, _ = own_rows(own)
    return f"{100 * _share_right(true_ids, ids):.1f} % of {len(true_ids):,} test rows"


def _points(share: float) -> str:
    return f"{100 * share:g} percentage point{'' if share == 0.01 else 's'}"


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]
