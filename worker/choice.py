"""Which of a job's methods is the best, and which to take: each pair judged on the largest rows both were run on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

from service.ml.evidence import PairedComparison, rows_to_exclude
from worker.compare import COST_ORDER, Answers, compare_methods, shares_right, unproven


@dataclass(frozen=True)
class Choice:
    """The method to take, and what there is to say for and against it; the candidate of a pair stands first here."""

    method: str
    best: str
    lead: PairedComparison | None
    """The prompt that is the best, or else the one furthest ahead, against the most accurate on the whole test part."""
    against_best: PairedComparison | None
    """`method` against `best`, as which it is shown to be as good; None where they are one."""
    cheaper: tuple[PairedComparison, ...]
    """Methods cheaper than `method`, each against `best`; none is shown to be as good."""
    dearer: Mapping[str, tuple[PairedComparison, str | None]]
    """`method` against each dearer one, and who wins: corrected by Holm where the pair is of `compare_all`'s family."""
    proven: tuple[str, ...]
    """Methods shown to beat a constant answer, the cheapest first."""


def choose(
    answers: Answers, comparisons: Sequence[PairedComparison], margin: float, n_labels: int, seed: int
) -> Choice:
    """The cheapest method that is shown to be as good as the best one (`as_good`), else the best one.

    The best is the most accurate on the whole test part, of equals the cheapest. A prompt that was run on a part of
    those rows takes its place where it wins over that one there; where all were run on a part, that part decides.
    """
    against = cache(partial(compare_methods, answers, n_labels=n_labels, seed=seed))
    corrected = {frozenset((c.candidate, c.baseline)): c.winner for c in comparisons}

    def winner(trial: PairedComparison) -> str | None:
        return corrected.get(frozenset((trial.candidate, trial.baseline)), trial.winner)

    methods = sorted(answers, key=COST_ORDER.index)
    whole = [method for method in methods if answers[method].are_of_all] or methods
    best = max(whole, key=lambda method: shares_right(answers[method])[0])
    ahead = [t for m in methods if m not in whole and (t := against(m, best)).accuracy_delta > 0]
    lead = max(ahead, key=lambda trial: (winner(trial) is not None, trial.accuracy_delta), default=None)
    best = (lead and winner(lead)) or best
    trials = [against(method, best) for method in methods[: methods.index(best)]]
    shown = next((trial for trial in trials if as_good(trial, margin)), None)
    method = shown.candidate if shown else best
    at, constant = methods.index(method), {"majority"} | unproven(answers, comparisons)
    dearer = {other: against(method, other) for other in methods[at + 1 :]}
    return Choice(
        method, best, lead, shown, tuple(trials[:at]), {other: (t, winner(t)) for other, t in dearer.items()},
        tuple(method for method in methods if method not in constant),
    )  # fmt: skip


def as_good(trial: PairedComparison, margin: float) -> bool:
    """Whether the candidate is shown to lose no more than `margin`: it wins, or cannot lose more.

    The paired 95 % interval of its accuracy minus the baseline's then lies above -margin, and the distinct texts are
    enough for that to mean something (`rows_to_exclude`). With a margin of 0 nothing but a win shows it.
    """
    above = trial.accuracy_delta_ci95[0] > -margin and trial.n_texts >= rows_to_exclude(margin)
    return above or trial.winner == trial.candidate


def falls_short(trial: PairedComparison, margin: float) -> bool:
    """Whether the candidate is shown to lose at least `margin`, or anything where that is 0."""
    return trial.accuracy_delta_ci95[1] < 0 and trial.accuracy_delta_ci95[1] <= -margin
