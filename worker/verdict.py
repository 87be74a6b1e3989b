"""What a job's figures come to, in words that claim no more than is shown."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, log10

from scipy.special import ndtri

from service.core.spec import MOST_PROMPTED
from service.ml.evidence import POWER, SIGNIFICANCE, PairedComparison, rows_to_exclude
from worker.choice import Choice, as_good, choose, falls_short
from worker.compare import COST_ORDER, PLAIN_NAMES, Answers, MethodAnswers, rows_of, shares_right

# What may be said of a dearer method, the least first, and how it goes on after "neither … nor …".
_GAINS = {
    "is not shown to pay off": "is shown to pay off",
    "gains too little here": "gains enough here",
    "buys nothing here": "buys anything here",
}


@dataclass(frozen=True)
class Recommendation:
    """`recommendation` in a job's summary: the method to take, and why in plain words."""

    method: str
    reason: str
    margin: float


def judge(
    answers: Answers, comparisons: Sequence[PairedComparison], margin: float, n_labels: int, seed: int,
    test_share: float,
) -> tuple[str, Recommendation]:  # fmt: skip
    """The headline, one sentence for somebody who reads nothing else, and what is recommended; both of one `choose`.

    Nothing is praised that is not shown to beat a constant answer. LoRA is called better than another method only where
    a verdict of `comparisons`, corrected by `holm`, says so, and no such verdict is denied.

    `answers` go by names of `COST_ORDER`, `comparisons` are `compare_all`'s of them; `margin` is the accuracy, 0 to
    0.5, that may be given up for less cost; `test_share` is the share of the usable rows that are test rows.
    """
    choice = choose(answers, comparisons, margin, n_labels, seed)
    reason = " ".join(map(_capitalised, _reasons(choice, answers, margin, test_share)))
    said = _capitalised(_headline(choice, answers, comparisons, margin))
    return said, Recommendation(choice.method, reason, margin)


def _reasons(choice: Choice, answers: Answers, margin: float, test_share: float) -> Iterator[str]:
    """Sentences."""
    method, own, name, best = (
        choice.method,
        answers[choice.method],
        PLAIN_NAMES[choice.method],
        PLAIN_NAMES[choice.best],
    )
    lead = None if choice.lead and choice.lead.candidate == choice.best else choice.lead
    rest = "; no cheaper one is shown to be as good" + f", give or take {_points(margin)}" * bool(margin)
    rest *= bool(choice.cheaper)
    if choice.against_best:
        loss = f"no more than {_points(margin)} of accuracy" if margin else "nothing"
        which = "most accurate one on all test rows" if lead else "best one"
        seen = _side_by_side(choice.against_best, answers)
        yield f"{name} is the cheapest method shown to lose {loss} against the {which}, {best}: {seen}."
    elif len(answers) == 1:
        yield f"{name} is the only method run, right on {_right(own)}."
    elif choice.lead and not lead:
        beaten = f"{PLAIN_NAMES[choice.lead.baseline]}, the most accurate method on all test rows"
        yield f"{name} is shown to be better than {beaten}: {_side_by_side(choice.lead, answers)}{rest}."
    else:
        prompted = own.test_ids is not None and any(other.test_ids is None for other in answers.values())
        part = prompted and len(own.subset_true_ids) < len(own.test_true_ids)
        there = f", and {_right(replace(own, test_ids=None))} that were prompted" * part
        rows = f"on {'all test' if lead else 'the same'} rows " * prompted
        yield f"no method is right more often {rows}than {name} ({_right(own)}{there}){rest}."
    told = choice.lead and choice.lead.baseline
    hopes = [trial for trial in choice.cheaper if trial.candidate != told and not falls_short(trial, margin)]
    if lead and lead not in (*hopes, choice.against_best):
        ahead = f"{PLAIN_NAMES[lead.candidate]} is ahead of {best} where both were run, and not shown to be better"
        more = "; more rows prompted (`baseline.sample_size`) may show it" * (lead.n < MOST_PROMPTED)
        yield f"{ahead}: {_side_by_side(lead, answers)}{more}."
    if hopes:
        first = min(hopes, key=lambda trial: (trial != lead, _rows_needed(trial, margin), -trial.accuracy_delta))
        yield _too_few_rows(first, margin, answers, test_share)
    trial, _ = choice.dearer.get("lora", (None, None))
    if trial and not as_good(trial, margin) and trial.accuracy_delta_ci95[0] <= 0:
        yield _too_few_rows(trial, margin, answers, test_share)
    if method == "majority":
        yield "it gives every row the same label: where the rarer labels matter, look at macro-F1 first."
    elif method not in choice.proven:
        yield f"it is not shown to beat {PLAIN_NAMES['majority']}, so do not rely on it yet."


def _headline(choice: Choice, answers: Answers, comparisons: Sequence[PairedComparison], margin: float) -> str:
    method, lead = choice.method, choice.lead
    score = f"{PLAIN_NAMES[method]} is right on {_right(answers[method])}"
    if method != "majority" and method not in choice.proven:
        known = f"; {PLAIN_NAMES[choice.proven[-1]]} is shown to be" if choice.proven else ""
        unproven = f"{score}, which is not shown to be better than {PLAIN_NAMES['majority']}"
        return f"{'little' if known else 'nothing'} is proven yet: {unproven}{known}."
    if len(answers) == 1:
        return f"{score}; no other method was run to compare it with."
    if method == "lora":
        won = {c.baseline: c for c in comparisons if c.candidate == c.winner == "lora"}
        if rest := " or ".join(PLAIN_NAMES[m] for m in COST_ORDER[:-1] if m in answers and m not in won):
            on = " on all test rows" * bool(lead)
            ahead = lead and f"; {PLAIN_NAMES[lead.candidate]} is ahead on the {lead.n:,} rows it was asked about"
            said = f"fine-tuning comes out first{on}, but not clearly: {score}, not shown to be better than {rest}"
            return f"{said}{ahead or ''}."
        clear = all(c.accuracy_delta_ci95[0] >= margin for c in won.values())
        opening = "fine-tuning is worth it" if clear else "fine-tuning comes out first"
        return f"{opening}: {score}, shown to be better than every cheaper method run."
    gains = {other: _gain(trial, winner, margin) for other, (trial, winner) in choice.dearer.items()}
    if method == "majority" and all(gains.values()):
        gain = f"to gain more than {_points(margin)} over that" if margin else "to be better"
        return f"no method pays off here: {score}, and none is shown {gain}."
    if choice.against_best:
        place = f"at most {_points(margin)} behind" if margin else "no worse than"
        place = f"shown to be {place} {PLAIN_NAMES[choice.best]}"
    elif lead and lead.candidate == method:
        place = f"shown to be better than {PLAIN_NAMES[lead.baseline]}"
    else:
        place = f"and no other method run{' on all test rows' * bool(lead)} is more accurate"
    served = "; its model is published and ready to be served" * (method == "embedding_logreg" and "lora" in answers)
    return f"{_opening(method, gains)}{score}, {place}{served}."


def _gain(trial: PairedComparison, winner: str | None, margin: float) -> str | None:
    """What is shown of the dearer method of a pair, a key of `_GAINS`; None where it may be worth its cost."""
    wins = winner == trial.baseline
    if as_good(trial, margin):
        return "gains too little here" if wins or trial.accuracy_delta_ci95[1] < 0 else "buys nothing here"
    return None if wins or falls_short(trial, margin) else "is not shown to pay off"


def _opening(method: str, gains: Mapping[str, str | None]) -> str:
    """What dearer methods are for, beside the one recommended; of several prompts what holds for all."""
    prompts = {gain for other, gain in gains.items() if other.endswith("_prompt") and not method.endswith("_prompt")}
    prompting = next((gain for gain in (None, *_GAINS) if gain in prompts), None)
    tuning = gains.get("lora")
    if prompting and prompting == tuning:
        return f"neither prompting nor fine-tuning {_GAINS[tuning]}: "
    said = [f"{subject} {gain}" for subject, gain in (("fine-tuning", tuning), ("prompting", prompting)) if gain]
    return " and ".join(said) + ": " * bool(said)


def _too_few_rows(trial: PairedComparison, margin: float, answers: Answers, test_share: float) -> str:
    """One sentence: why the pair is undecided, and what would decide it (test rows, and the file that has so many)."""
    cheaper, dearer = PLAIN_NAMES[trial.candidate], PLAIN_NAMES[trial.baseline]
    seen = _side_by_side(trial, answers)
    if margin <= 0 <= trial.accuracy_delta:
        equal = "with a margin of 0, a method that is equally good can never be shown to be so"
        rest = "more rows could show it to be better" if trial.accuracy_delta else equal
        return f"{cheaper} is not shown to be as good as {dearer}: {seen}; {rest}."
    if falls_short(trial, margin):
        return f"{cheaper} is shown to fall short of {dearer}: {seen}."
    if trial.accuracy_delta <= -margin:
        return f"so far {cheaper} falls short of {dearer}: {seen}; do not expect more rows to make it good enough."
    if trial.n_fixed == trial.n_broken == 0:
        seen = f"on {_rows_of(trial)} the two never differed in what they had right, which says little"
    text = f"show that {cheaper} is at most {_points(margin)} behind {dearer}"
    text = f"be sure of {cheaper}, which is ahead of {dearer}" if trial.accuracy_delta > 0 else text
    text = f"there are too few rows to {text}: {seen}"
    needed, prompts = _rows_needed(trial, margin), trial.on == "baseline_subset"
    if needed > 100 * trial.n:
        return f"{text}; to show it would take more than a hundred times as many."
    if prompts and needed > MOST_PROMPTED:
        return f"{text}; to show it would take about {needed:,.0f}, and a job prompts {MOST_PROMPTED:,} at most."
    text += f"; with figures like these, about {needed:,.0f} test rows would settle it"
    if needed <= len(answers[trial.candidate].test_true_ids):
        return f"{text}, and this file has them: set `baseline.sample_size`, the rows prompted, to {needed:.0f}."
    asked = f", with `baseline.sample_size`, the rows prompted, at {needed:.0f} or more" * prompts
    return f"{text}, a file of about {_two_figures(needed / test_share):,.0f} rows{asked}."


def _rows_needed(trial: PairedComparison, margin: float) -> float:
    """Rows at which the interval lies above -margin four times in five, were delta and spread to stay as they are.

    The half-width shrinks with √n; infinite where the delta itself is at or below -margin. Rounded up to two figures.
    """
    spare, half_width = trial.accuracy_delta + margin, trial.accuracy_delta - trial.accuracy_delta_ci95[0]
    if spare <= 0 or margin <= 0:
        return inf
    widths = 1 + ndtri(POWER) / ndtri(1 - SIGNIFICANCE / 2)
    rows_per_text = trial.n / trial.n_texts
    needed = max(trial.n * (widths * half_width / spare) ** 2, rows_to_exclude(margin) * rows_per_text, trial.n + 1)
    return _two_figures(needed)


def _two_figures(rows: float) -> float:
    """Rounded up."""
    unit = 10 ** max(0, int(log10(rows)) - 1)
    return float(ceil(round(rows / unit, 9)) * unit)


def _side_by_side(trial: PairedComparison, answers: Answers) -> str:
    mine, theirs = shares_right(answers[trial.candidate], answers[trial.baseline])
    return f"{100 * mine:.1f} % against {100 * theirs:.1f} % of {_rows_of(trial)}{_may_be(trial)}"


def _rows_of(trial: PairedComparison) -> str:
    return f"{trial.n:,} test rows" + f" ({trial.n_texts:,} distinct texts)" * (trial.n_texts < trial.n)


def _may_be(trial: PairedComparison) -> str:
    """The interval in words; nothing where it has no width, which would read as certainty."""
    low, high = (round(100 * end, 1) for end in trial.accuracy_delta_ci95)
    if low == high:
        return ""
    if low >= 0 or high <= 0:
        near, far = sorted((abs(low), abs(high)))
        span = f"{near:.1f} to {far:.1f} points {'better' if low >= 0 else 'worse'}"
    else:
        span = f"anything from {-low:.1f} points worse to {high:.1f} better"
    return f", in truth perhaps {span} (95 % interval)"


def _right(own: MethodAnswers) -> str:
    return f"{100 * shares_right(own)[0]:.1f} % of {len(rows_of(own)[1]):,} test rows"


def _points(share: float) -> str:
    return f"{100 * share:g} percentage point{'' if share == 0.01 else 's'}"


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]
