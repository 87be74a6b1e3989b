"""The files an experiment leaves: split.csv, predictions.csv, flips.csv, metrics.json."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from service.ml.evidence import PairedComparison
from service.ml.split import PARTS, Split, Table
from worker.metrics import confidences, label_probabilities
from worker.predictions import NO_ANSWER, Predictions

FLIP_COLUMNS = ("candidate", "baseline", "row_id", "text", "label", "candidate_answer", "baseline_answer", "flip")


READABLE_LABELS = 100


def write_split(path: Path, table: Table, split: Split) -> None:
    """`row_id,split` for every usable row and every dropped one, by row id."""
    named: list[tuple[int, str]] = [(int(table.row_ids[i]), part) for part in PARTS for i in split.part(part)]
    named += [(int(row), "dropped") for row in table.dropped_row_ids]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("row_id", "split"))
        writer.writerows(sorted(named))


def write_predictions(
    path: Path, table: Table, split: Split, subset: NDArray[np.int64], answers: Mapping[str, Mapping[str, Predictions]]
) -> None:
    """The validation and test rows with every method's answer.

    Args:
        path: Where to.
        table: The rows.
        split: Their parts.
        subset: Positions of the baseline subset within the test part.
        answers: By method, by part (`validation`, `test`, or `baseline_subset` alone where it was run on no more).
    """
    in_subset = set(split.test[subset].tolist())
    columns: dict[str, list[dict[int, str]]] = {}
    header = ["row_id", "split", "in_baseline_subset", "text", "label"]
    for method, parts in answers.items():
        columns[method] = _method_columns(parts, table, split, subset)
        suffixes = ["", "_confidence", "_label_probability", "_raw"]
        header += [method + suffix for suffix, column in zip(suffixes, columns[method], strict=True) if column]
    with path.open("w", encoding="utf-8", newline="") as file:
        write = csv_writer(file)
        write(header)
        for part in ("validation", "test"):
            for i in split.part(part):
                label = table.labels.names[table.label_ids[i]]
                known = [str(table.row_ids[i]), part, str(int(i in in_subset)), table.texts[i], label]
                given = [column.get(int(i), "") for method in answers for column in columns[method] if column]
                write(known + given)


def flips(
    table: Table, split: Split, subset: NDArray[np.int64], answers: Mapping[str, Mapping[str, Predictions]],
    comparisons: Sequence[PairedComparison],
) -> list[dict[str, str]]:  # fmt: skip
    """The rows that one side of a comparison has right and the other wrong, comparison by comparison, by row."""
    names = [*table.labels.names, ""]  # the last for NO_ANSWER, -1
    found = []
    for pair in comparisons:
        rows = split.test if pair.on == "test" else split.test[subset]
        ours, others = (answers[method][pair.on].label_ids for method in (pair.candidate, pair.baseline))
        right = ours == table.label_ids[rows]
        for at in np.flatnonzero(right != (others == table.label_ids[rows])):
            i, kind = rows[at], "fixed" if right[at] else "broken"
            known = (str(table.row_ids[i]), table.texts[i], names[table.label_ids[i]])
            row = (pair.candidate, pair.baseline, *known, names[ours[at]], names[others[at]], kind)
            found.append(dict(zip(FLIP_COLUMNS, row, strict=True)))
    return found


def write_flips(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        write = csv_writer(file)
        write(FLIP_COLUMNS)
        for row in rows:
            write([row[column] for column in FLIP_COLUMNS])


def csv_writer(file: TextIO) -> Callable[[Sequence[str]], object]:
    """Writes one row; Python's own leaves a lone carriage return unquoted, and would read it as the row's end."""
    plain, quoted = (csv.writer(file, lineterminator="\n", quoting=how) for how in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    return lambda row: (quoted if any("\r" in cell for cell in row) else plain).writerow(row)


def write_json(path: Path, body: Mapping[str, Any]) -> None:
    # A number a line is for reading; the matrices of a thousand labels would be 100 MB so, and 25 without.
    indent = 1 if len(body.get("labels", ())) <= READABLE_LABELS else None
    path.write_text(json.dumps(body, indent=indent, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _method_columns(
    parts: Mapping[str, Predictions], table: Table, split: Split, subset: NDArray[np.int64]
) -> list[dict[int, str]]:
    """Label, confidence, probability of the true label, raw answer: each by row position; empty where there is none."""
    label: dict[int, str] = {}
    confidence: dict[int, str] = {}
    probability: dict[int, str] = {}
    raw: dict[int, str] = {}
    for part, predictions in parts.items():
        if part == "baseline_subset" and "test" in parts:
            continue  # the same answers, already among the test rows
        rows = (
            split.test[subset] if part == "baseline_subset" else {"validation": split.validation}.get(part, split.test)
        )
        for i, label_id in zip(rows, predictions.label_ids, strict=True):
            label[int(i)] = "" if label_id == NO_ANSWER else table.labels.names[label_id]
        if predictions.probabilities is not None:
            given = confidences(predictions.probabilities, predictions.label_ids)
            true = label_probabilities(predictions.probabilities, table.label_ids[rows])
            confidence |= _written(rows, given)
            probability |= _written(rows, true)
        if predictions.raw is not None:
            raw |= {int(i): text for i, text in zip(rows, predictions.raw, strict=True)}
    return [label, confidence, probability, raw]


def _written(rows: NDArray[np.int64], values: Sequence[float] | NDArray[np.float64]) -> dict[int, str]:
    return {int(i): repr(float(value)) for i, value in zip(rows, values, strict=True)}
