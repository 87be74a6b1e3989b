"""The verdict as one HTML page that needs nothing but itself: no script, no request."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from service.ml.calibration import wilson_interval
from worker import plots
from worker.compare import COST_ORDER, PLAIN_NAMES

MOST_CONFUSED = 15
MOST_FLIPS = 20
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


def render(
    metrics: Mapping[str, Any],
    summary: Mapping[str, Any],
    notes: Mapping[str, Any],
    flips: Sequence[Mapping[str, str]] = (),
) -> str:
    """The report of one job.

    Args:
        metrics: The contract's `metrics.json`.
        summary: The job's `headline`, `recommendation` and `methods`.
        notes: `job_name`, `dataset_name`, `warnings` (each `code`, `message`, `count`, `rows`), `messages`, `spec`,
            `unproven` (methods not shown to beat a constant answer).
        flips: The rows of `flips.csv`.
    """
    methods = metrics["methods"]
    ladder = [(method, *_widest(methods[method])) for method in COST_ORDER if method in methods]
    intervals = {method: _interval(figures) for method, _rows, figures in ladder}
    recommended = summary["recommendation"]["method"]
    rows, figures = _widest(methods[recommended])
    pair = _counterpart(recommended, metrics["comparison"], methods)
    other, label_part = pair or (None, rows)
    cheaper, dearer = sorted((recommended, other or recommended), key=COST_ORDER.index)
    calibrated = {
        method: figures for method, _rows, figures in ladder if figures["n"] and "temperature" in figures
    }  # fmt: skip
    return _TEMPLATES.get_template("report.html").render(
        metrics=metrics,
        summary=summary,
        notes=notes,
        flips=_shown_flips(flips, dearer, cheaper),  # as everywhere, the dearer one is the candidate
        names=PLAIN_NAMES,
        ladder=ladder,
        intervals=intervals,
        asks=any("prompt_tokens" in figures for _method, _rows, figures in ladder),
        recommended=recommended,
        rows=rows,
        figures=figures,
        other=other,
        cheaper=cheaper,
        dearer=dearer,
        most_flips=MOST_FLIPS,
        columns=[*metrics["labels"], NO_ANSWER_LABEL],
        shows_matrix=len(metrics["labels"]) <= MATRIX_LIMIT,
        shade=_shade,
        confused=most_confused(figures["confusion_matrix"], metrics["labels"]),
        label_part=label_part,
        least_rows_of_a_bin=plots.LEAST_ROWS_OF_A_BIN,
        label_rows=methods[recommended][label_part]["n"],
        per_label=_per_label(methods, recommended, other, label_part),
        overtaking=_overtaking(metrics) if metrics["learning_curve"] else None,
        plots=_plots(metrics, ladder, intervals, recommended, calibrated),
        calibration_errors=[(method, of["expected_calibration_error"]) for method, of in calibrated.items()],
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


def _interval(figures: Mapping[str, Any]) -> tuple[float, float]:
    """Wilson's 95 % interval of the accuracy."""
    if figures["accuracy"] is None:
        return 0.0, 1.0
    return wilson_interval(round(figures["accuracy"] * figures["n"]), figures["n"])


def _counterpart(
    recommended: str, comparisons: Sequence[Mapping[str, Any]], methods: Mapping[str, Any]
) -> tuple[str, str] | None:
    """What the recommended method is set against in detail, and on which rows: a prompt, else the best other one."""
    pairs = [
        (c["baseline"] if c["candidate"] == recommended else c["candidate"], c["on"])
        for c in comparisons
        if recommended in (c["candidate"], c["baseline"])
    ]
    return max(
        pairs, key=lambda pair: (pair[0].endswith("_prompt"), methods[pair[0]][pair[1]]["accuracy"] or 0), default=None
    )


def _per_label(
    methods: Mapping[str, Any], method: str, other: str | None, part: str
) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """`(label, figures, figures of the other method)`: what changed most first, or the weakest where there is none."""
    own = methods[method][part]["per_label"]
    if other is None:
        return sorted(((label, of, {}) for label, of in own.items()), key=lambda row: row[1]["f1"])
    before = methods[other][part]["per_label"]
    rows = [(label, of, before[label]) for label, of in own.items()]
    return sorted(rows, key=lambda row: -abs(row[1]["f1"] - row[2]["f1"]))


def _shown_flips(flips: Sequence[Mapping[str, str]], after: str, before: str | None) -> list[Mapping[str, str]]:
    """The first fixed and the first broken rows of the pair."""
    of_pair = [flip for flip in flips if (flip["candidate"], flip["baseline"]) == (after, before)]
    return [flip for kind in ("fixed", "broken") for flip in [f for f in of_pair if f["flip"] == kind][:MOST_FLIPS]]


def _overtaking(metrics: Mapping[str, Any]) -> str:
    """Where training passes prompting, in words; by the accuracies measured, without a test."""
    prompts = _prompts(metrics)
    if not prompts:
        return "No prompt was run, so there is nothing for training to overtake."
    found = metrics["overtakes"]
    if found is None:
        best = max(prompts, key=lambda method: prompts[method])
        return f"On no share of the train rows did a trained method pass {PLAIN_NAMES[best]} ({prompts[best]:.1%})."
    first = found["n_train"] == metrics["learning_curve"][0]["n_train"]
    return (
        f"{PLAIN_NAMES[found['method']]} passes {PLAIN_NAMES[found['prompt']]} ({found['prompt_accuracy']:.1%} of "
        f"{found['n']:,} rows) with {'at most ' if first else ''}{found['n_train']:,} train rows. {found['caveat']}"
    )


def _prompts(metrics: Mapping[str, Any]) -> dict[str, float]:
    methods = metrics["methods"]
    return {m: parts["baseline_subset"]["accuracy"] for m, parts in methods.items() if m.endswith("_prompt")}


def _plots(
    metrics: Mapping[str, Any],
    ladder: Sequence[tuple[str, str, Mapping[str, Any]]],
    intervals: Mapping[str, tuple[float, float]],
    recommended: str,
    calibrated: Mapping[str, Mapping[str, Any]],
) -> dict[str, str]:
    estimates = [
        plots.Estimate(PLAIN_NAMES[method], figures["accuracy"], *intervals[method], method == recommended)
        for method, _rows, figures in ladder
        if figures["accuracy"] is not None
    ]
    drawn = {"ladder": plots.ladder(estimates)}
    if metrics["learning_curve"]:
        drawn["learning_curve"] = plots.learning_curve(metrics["learning_curve"], PLAIN_NAMES, _prompts(metrics))
    if calibrated:
        bins = {method: figures["calibration"]["bins"] for method, figures in calibrated.items()}
        drawn["reliability"] = plots.reliability(bins, PLAIN_NAMES)
        curves = {method: figures["coverage"] for method, figures in calibrated.items()}
        drawn["coverage"] = plots.coverage(curves, PLAIN_NAMES)
    return drawn


def _shade(count: int, of: int) -> int:
    """Depth of a cell, 0 to 5: the share of its true label's rows in fifths, rounded up."""
    return -(-5 * count // of) if of else 0
