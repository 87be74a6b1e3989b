"""The verdict as one HTML page that needs nothing but itself: no script, no request."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from worker.compare import COST_ORDER, PLAIN_NAMES

MOST_CONFUSED = 15
# A matrix of more labels is megabytes that nobody reads; the most confused pairs say the same.
MATRIX_LIMIT = 200
NO_ANSWER_LABEL = "(no answer)"

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(metrics: Mapping[str, Any], summary: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    """The report of one job.

    Args:
        metrics: The contract's `metrics.json`.
        summary: The job's `headline`, `recommendation` and `methods`.
        notes: `job_name`, `dataset_name`, `warnings` (each `code`, `message`, `count`, `rows`), `messages`, `spec`.
    """
    ladder = [method for method in COST_ORDER if method in metrics["methods"]]
    recommended = summary["recommendation"]["method"]
    rows, figures = _widest(metrics["methods"][recommended])
    return _TEMPLATES.get_template("report.html").render(
        metrics=metrics,
        summary=summary,
        notes=notes,
        names=PLAIN_NAMES,
        ladder=[(method, *_widest(metrics["methods"][method])) for method in ladder],
        recommended=recommended,
        rows=rows,
        figures=figures,
        columns=[*metrics["labels"], NO_ANSWER_LABEL],
        shows_matrix=len(metrics["labels"]) <= MATRIX_LIMIT,
        shade=_shade,
        confused=most_confused(figures["confusion_matrix"], metrics["labels"]),
        per_label=sorted(figures["per_label"].items(), key=lambda item: item[1]["f1"]),
        unproven=_unproven(metrics["comparison"]),
        spec=json.dumps(notes["spec"], indent=2, ensure_ascii=False),
    )


def most_confused(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> list[tuple[str, str, int, float]]:
    """`(true label, answer, rows, share of the true label's rows)`, most rows first; equals keep label order."""
    columns = [*labels, NO_ANSWER_LABEL]
    pairs = [
        (labels[i], columns[j], count, count / sum(row))
        for i, row in enumerate(matrix)
        for j, count in enumerate(row)
        if count and i != j
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:MOST_CONFUSED]


def _widest(parts: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """A method's figures on the test part, or on the baseline subset where it was run on that only."""
    rows = "test" if "test" in parts else "baseline_subset"
    return rows, parts[rows]


def _shade(count: int, of: int) -> int:
    """Depth of a cell, 0 to 5: the share of its true label's rows in fifths, rounded up."""
    return -(-5 * count // of) if of else 0


def _unproven(comparisons: Sequence[Mapping[str, Any]]) -> set[str]:
    """Methods compared with `majority` and not shown to beat it: no win of theirs counts."""
    return {c["candidate"] for c in comparisons if c["baseline"] == "majority" and c["verdict"] != "candidate_wins"}
