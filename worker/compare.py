"""Which of a job's methods are compared, on which rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from service.ml.evidence import Ids, PairedComparison, Rows, beats, compare, holm, withhold

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
class MethodAnswers:
    """One method's answers beside the truth: label ids of the N test rows and of the M rows of the baseline subset.

    `test_ids` is None where the method was run on the subset only. The text ids are equal where the texts are; None
    where no text repeats.
    """

    test_true_ids: Ids
    subset_true_ids: Ids
    test_ids: Ids | None
    subset_ids: Ids
    test_text_ids: Ids | None = None
    subset_text_ids: Ids | None = None

    @property
    def are_of_all(self) -> bool:
        """Whether every test row was answered: a subset may be the whole part."""
        return self.test_ids is not None or len(self.subset_true_ids) == len(self.test_true_ids)


Answers: TypeAlias = Mapping[str, MethodAnswers]


def compare_all(answers: Answers, n_labels: int, seed: int) -> list[PairedComparison]:
    """The dearest method against every cheaper one, and every method against `majority`; Holm over all of them.

    Fixed before any answer is seen, and few, so that the correction costs little power. Each pair is compared on the
    largest rows both were run on; the dearer one is the candidate. What is not shown to beat `majority` wins over
    nothing else.
    """
    methods = sorted(answers, key=COST_ORDER.index)
    pairs = [(methods[-1], cheaper) for cheaper in methods[:-1]]
    if methods[0] == "majority":
        pairs += [(dearer, "majority") for dearer in methods[1:-1]]
    found = holm([compare_methods(answers, dearer, cheaper, n_labels, seed) for dearer, cheaper in pairs])
    return withhold(found, unproven(answers, found))


def compare_methods(answers: Answers, candidate: str, baseline: str, n_labels: int, seed: int) -> PairedComparison:
    on, true_ids, text_ids, (ids, other_ids) = rows_of(answers[candidate], answers[baseline])
    return compare(candidate, baseline, on, true_ids, ids, other_ids, n_labels, seed, text_ids=text_ids)


def rows_of(*sides: MethodAnswers) -> tuple[Rows, Ids, Ids | None, list[Ids]]:
    """The largest rows that all of these were run on: which those are, the truth, the texts, the answers of each."""
    own, whole = sides[0], [side.test_ids for side in sides if side.test_ids is not None]
    if len(whole) == len(sides):
        return "test", own.test_true_ids, own.test_text_ids, whole
    return "baseline_subset", own.subset_true_ids, own.subset_text_ids, [side.subset_ids for side in sides]


def shares_right(*sides: MethodAnswers) -> list[float]:
    """Of each, on the rows that all of these were run on."""
    _, true_ids, _, given = rows_of(*sides)
    return [float(np.mean(true_ids == ids)) for ids in given]


def unproven(answers: Answers, comparisons: Sequence[PairedComparison]) -> set[str]:
    """Methods not shown to beat a constant answer: by the verdicts against `majority`.

    Where that was not run, the constant is the most common true label of a method's own rows (exact McNemar, 0.05).
    """
    if "majority" in answers:
        return {c.candidate for c in comparisons if c.baseline == "majority" and c.verdict != "candidate_wins"}
    alone = {method: rows_of(own) for method, own in answers.items()}
    return {m for m, (_, true_ids, texts, ids) in alone.items() if not beats(true_ids, ids[0], text_ids=texts)}
