"""Which of a job's methods is the best, and which to take: each pair judged on the largest rows both were run on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

from service.ml.evidence import PairedComparison, rows_to_exclude
from worker.compare import COST_ORDER, Answers, compare_methods, shares_right, unproven


@dataclass(frozen=True)
class Choice:
    """The method to take, and what there is to say for and against it; the candidate of a pair stands first here."""

    method: str
    best: str
    shown: PairedComparison | None
    """`method` against `best`, from which it is shown to lose no more than the margin; None where they are one."""
    ahead: PairedComparison | None
    """The method furthest ahead of `best` where both were run, against it; None where there is none."""
    open: tuple[PairedComparison, ...]
    """Cheaper methods, each against the one that it is not shown to be as good as; a hopeless one is left out."""
    against_lora: PairedComparison | None
    """`method` against LoRA, where that is run and `method` neither wins over it nor is shown to be as good."""
    outdone: frozenset[str]
    """Dearer methods that win over `method` by the verdicts of `compare_all`. Where `method` is not `best`, they are
    shown to gain no more than the margin; where it is, `ahead` is one that is right more often."""
    proven: tuple[str, ...]
    """Methods shown to beat a constant answer, the cheapest first."""


def choose(
    answers: Answers, comparisons: Sequence[PairedComparison], margin: float, n_labels: int, seed: int
) -> Choice:
    """The cheapest method that is as good as the best one and shown to be worse than none, else the best one.

    As good: `as_good`. Worse: another one wins (uncorrected), or its gain is shown to reach the margin, and the method
    is not shown to be as good as that one.

    The best is the method that no other is ahead of where both were run; of equals the cheapest. On different rows
    there may be none: then it is the first on the whole test part that is shown to be worse than none, if there is one.
    """
    against = cache(partial(compare_methods, answers, n_labels=n_labels, seed=seed))
    methods = sorted(answers, key=COST_ORDER.index)

    def worse(method: str) -> PairedComparison | None:
        for trial in (against(method, other) for other in _ahead_of(method, answers)):
            if (trial.winner == trial.baseline or falls_short(trial, margin)) and not as_good(trial, margin):
                return trial
        return None

    accurate = sorted(methods, key=lambda m: (answers[m].test_ids is None, -shares_right(answers[m])[0]))
    ranked = [method for method in methods if not _ahead_of(method, answers)] or accurate
    best = next((method for method in ranked if not worse(method)), ranked[0])
    trials = [(against(method, best), worse(method)) for method in methods[: methods.index(best)]]
    shown = next((trial for trial, outdone in trials if as_good(trial, margin) and not outdone), None)
    method, lead = shown.candidate if shown else best, _ahead_of(best, answers)
    doubts = [
        outdone if as_good(trial, margin) else None if falls_short(outdone or trial, margin) else trial
        for trial, outdone in trials[: methods.index(method)]
    ]
    winners = {c.candidate: c.winner for c in comparisons if c.baseline == method}
    pair = against(method, "lora") if "lora" in answers and method != "lora" else None
    constant = {"majority"} | unproven(answers, comparisons)
    return Choice(
        method, best, shown, proven=tuple(method for method in methods if method not in constant),
        ahead=against(lead[0], best) if lead else None, open=tuple(trial for trial in doubts if trial),
        against_lora=None if pair and (winners["lora"] == method or as_good(pair, margin)) else pair,
        outdone=frozenset(other for other, winner in winners.items() if other == winner),
    )  # fmt: skip


def as_good(trial: PairedComparison, margin: float) -> bool:
    """Whether the candidate is shown to lose no more than `margin`: never with a margin of 0.

    The paired 95 % interval of its accuracy minus the baseline's lies above -margin, and the distinct texts are enough
    for that to mean something (`rows_to_exclude`).
    """
    return trial.accuracy_delta_ci95[0] > -margin and trial.n_texts >= rows_to_exclude(margin)


def falls_short(trial: PairedComparison, margin: float) -> bool:
    """Whether the candidate is shown to lose at least `margin`, or anything where that is 0."""
    return trial.accuracy_delta_ci95[1] < 0 and trial.accuracy_delta_ci95[1] <= -margin


def _ahead_of(method: str, answers: Answers) -> list[str]:
    """The methods that are right more often where both were run, the furthest ahead first."""
    pairs = {other: shares_right(answers[other], answers[method]) for other in answers}
    leads = {other: theirs - mine for other, (theirs, mine) in pairs.items() if theirs > mine}
    return sorted(leads, key=lambda other: -leads[other])
