"""What there is to tell about a table's rows: reasons to refuse its labels or its split, and warnings."""

import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.core.errors import InvalidLabels, InvalidSplit, RareLabels, TooFewLabels
from service.ml.columns import shown
from service.ml.table import BadRows

Integers = NDArray[np.int64]

PART_IDS = {"train": 0, "validation": 1, "test": 2}
MIN_DISTINCT_TEXTS = 3  # one for each of train, validation and test
ID_LIKE = 0.9  # rare labels for each row: no class, but numbers of tickets or customers
IMBALANCE = 10  # times the smallest label
LISTED_ROWS = 20
LISTED_LABELS = 20

# Invisible, but not of category Cf: joiners, fillers and variation selectors (Unicode's Default_Ignorable_Code_Point).
_FILLERS = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")


@dataclass(frozen=True)
class DatasetWarning:
    """`count` rows are concerned; the first 20 of them are listed."""

    code: str
    message: str
    count: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Scan:
    """What the checks need to know of N rows.

    Args:
        digests: `(N,)`, equal where folded texts are. They have 64 bits: a million texts collide with a chance of 3e-8.
        lengths: `(N,)`, characters; 0 for a blank text.
        label_ids: `(N,)`, positions in `labels`; -1 for an empty label, 0 throughout where labels are not needed.
        part_ids: `(N,)`, values of `PART_IDS`; empty where the file has no split of its own.
        quoted: the rows that hold literal quotes.
        labels: K labels in order of appearance.
    """

    digests: Integers
    lengths: Integers
    label_ids: Integers
    part_ids: Integers
    quoted: Integers
    labels: tuple[str, ...]


def fold(text: str) -> str:
    """Case and white space folded: the key under which texts count as equal. Empty for a blank text."""
    return " ".join(text.casefold().split())


def warn(code: str, message: str, rows: Integers) -> DatasetWarning:
    return DatasetWarning(code, message, rows.size, tuple(rows[:LISTED_ROWS].tolist()))


def refuse_unclear_labels(scan: Scan) -> None:
    """Raise `InvalidLabels` for labels that break the line, cannot be seen, or look like another."""
    unclear: dict[int, str] = {}
    seen: dict[str, str] = {}
    for label_id, label in enumerate(scan.labels):
        twin = seen.setdefault(_visible(label), label)
        if len(label.splitlines()) > 1:
            unclear[label_id] = f"{shown(label)!a} has a line break inside"
        elif not _visible(label):
            unclear[label_id] = f"{shown(label)!a} holds nothing visible"
        elif twin != label:
            unclear[label_id] = f"{shown(label)!a} looks like {shown(twin)!a}"
    bad = BadRows()
    for row in np.flatnonzero(np.isin(scan.label_ids, list(unclear))).tolist():
        bad.add(row, f"label {unclear[int(scan.label_ids[row])]}")
    found = "; ".join(list(unclear.values())[:LISTED_LABELS])
    bad.refuse(InvalidLabels, f"Expected labels of one line that can be told apart, found: {found}. Correct them.")


def rare_labels(scan: Scan, usable: Integers, policy: Literal["refuse", "drop"], column: str) -> Integers:
    """Ids of the labels with too few distinct texts, where they may be dropped.

    Args:
        scan: of N rows.
        usable: `(U,)`, row numbers.
        policy: what to do about rare labels.
        column: the labels', for the message.

    Raises:
        TooFewLabels: fewer than two labels, or fewer than two that are not rare.
        RareLabels: some are, and may not be dropped.
    """
    first = _first_equal(scan.digests[usable])
    label_and_text = np.unique(scan.label_ids[usable] * usable.size + first)
    n_texts = np.bincount(label_and_text // usable.size, minlength=len(scan.labels))
    rare = np.flatnonzero(n_texts < MIN_DISTINCT_TEXTS)
    listed = ", ".join(f"{shown(scan.labels[i])} ({n_texts[i]})" for i in rare[:LISTED_LABELS])
    listed += ", …" if rare.size > LISTED_LABELS else ""
    expected = f"at least {MIN_DISTINCT_TEXTS} distinct texts for every label"
    if len(scan.labels) < 2:
        raise TooFewLabels(
            f"Expected at least 2 labels in column {shown(column)}, found {len(scan.labels)}. Pass another "
            "label_column."
        )
    if rare.size > ID_LIKE * usable.size and policy == "refuse":
        raise RareLabels(
            f"Expected {expected}, found that nearly every row has a label of its own ({len(scan.labels):,} labels in "
            f"{usable.size:,} rows): this looks like a column of ids. Pass another label_column."
        )
    if rare.size and policy == "refuse":
        raise RareLabels(
            f"Expected {expected}, found {rare.size} with fewer: {listed}. Add rows, or pass rare_labels=drop."
        )
    if len(scan.labels) - rare.size < 2:
        raise TooFewLabels(f"Expected 2 labels with {expected}, found fewer once rare ones are dropped: {listed}.")
    return rare


def refuse_missing_parts(parts: Integers) -> None:
    """Raise `InvalidSplit` where the file's own split has no train or no test rows."""
    if missing := [name for name in ("train", "test") if PART_IDS[name] not in parts]:
        raise InvalidSplit(
            f"Expected usable rows of train and test in the file's own split, found none of {' and '.join(missing)}. "
            "Add them, or leave split_column out to have the rows split."
        )


def label_variants(scan: Scan) -> DatasetWarning:
    """Labels that differ only in case or inner white space."""
    variants: dict[str, list[int]] = defaultdict(list)
    for label_id, label in enumerate(scan.labels):
        variants[fold(label)].append(label_id)
    groups = [ids for ids in variants.values() if len(ids) > 1]
    named = "; ".join(", ".join(repr(shown(scan.labels[i])) for i in ids) for ids in groups[:LISTED_LABELS])
    rows = np.flatnonzero(np.isin(scan.label_ids, [i for ids in groups for i in ids]))
    return warn("label_variants", f"Labels that differ only in case or white space count as different: {named}.", rows)


def repetitions(scan: Scan, usable: Integers) -> list[DatasetWarning]:
    """Texts that stand more than once: at all, with different labels, in different parts of the file's own split."""
    first = _first_equal(scan.digests[usable])
    repeated = usable[first != np.arange(usable.size)]
    conflicting = usable[_mixed(first, scan.label_ids[usable])]
    warnings = [
        warn("duplicate_text", "Rows repeat the text of an earlier row (case and white space folded).", repeated),
        warn("conflicting_labels", "Rows have the same text and different labels; they are used.", conflicting),
    ]
    if scan.part_ids.size:
        across = usable[_mixed(first, scan.part_ids[usable])]
        message = "Rows of different parts of the file's own split have the same text; test figures will flatter."
        warnings.append(warn("duplicate_across_split", message, across))
    return warnings


def imbalance(scan: Scan, usable: Integers) -> DatasetWarning:
    """Labels that are outnumbered by the largest more than `IMBALANCE` times."""
    label_ids, counts = np.unique(scan.label_ids[usable], return_counts=True)
    small = label_ids[counts * IMBALANCE < counts.max()]
    message = f"The largest label has {counts.max()} rows, the smallest {counts.min()}; accuracy alone will flatter."
    return warn("imbalanced", message, usable[np.isin(scan.label_ids[usable], small)])


def _first_equal(digests: Integers) -> Integers:
    """`(N,)`: for each row the position of the first row with the same digest."""
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    return first[group]


def _mixed(first: Integers, values: Integers) -> NDArray[np.bool_]:
    """`(N,)`: whether the rows with the same `first` differ in their values."""
    return np.isin(first, first[values != values[first]])


def _visible(label: str) -> str:
    """What is seen of a label: NFKC without invisible characters."""
    kept = (c for c in _FILLERS.sub("", label) if c.isspace() or unicodedata.category(c) not in {"Cc", "Cf"})
    return unicodedata.normalize("NFKC", "".join(kept)).strip()
