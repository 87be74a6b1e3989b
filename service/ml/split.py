"""Train, validation and test: stratified, grouped by equal text, and the same whatever the order of the rows."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.core.errors import InvalidData
from service.ml.dataset import TableFormat, read_frame
from service.ml.findings import fold
from service.ml.labels import LabelSet
from service.ml.table import TextSource

ALGORITHM = "stratified-grouped-sha256-v1"
Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Positions of the rows of each part, ascending; every row stands in exactly one."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]

    def part(self, name: Part) -> NDArray[np.int64]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


@dataclass(frozen=True)
class Table:
    """The usable rows of a dataset, N of them, in file order.

    Args:
        row_ids: `(N,)` 0-based data rows of the upload.
        texts: N texts.
        label_ids: `(N,)`.
        labels: All of the dataset's.
        dropped_row_ids: Rows of labels dropped as rare.
    """

    row_ids: NDArray[np.int64]
    texts: tuple[str, ...]
    label_ids: NDArray[np.int64]
    labels: LabelSet
    dropped_row_ids: NDArray[np.int64]


def read_split(
    file: TextSource, table_format: TableFormat, shares: Mapping[Part, float], seed: int
) -> tuple[Table, Split, str]:
    """The usable rows of a file, their parts, and the name of the way they were dealt out.

    Raises:
        InvalidData: there are no labels, or the rows cannot be split as asked.
    """
    if not table_format.needs_label:
        raise InvalidData("The dataset has no labels.", hint="Upload it again with labelled=true and a label column.")
    frame = read_frame(file, table_format)
    kept = frame[~frame["dropped"].to_numpy(bool)]
    texts, names = tuple(kept["text"].tolist()), kept["label"].tolist()
    labels = LabelSet.of(names)
    dropped = frame["row_id"].to_numpy(np.int64)[frame["dropped"].to_numpy(bool)]
    table = Table(kept["row_id"].to_numpy(np.int64), texts, labels.ids(names), labels, dropped)
    if table_format.split_column is None:
        split, algorithm = split_rows(texts, table.label_ids, shares, seed), ALGORITHM
    else:
        split, algorithm = split_as_given(texts, table.label_ids, kept["split"].tolist(), shares, seed), "as-given"
    for part in PARTS:
        if len(split.part(part)) == 0:
            raise InvalidData(f"No row is left for the {part} part.", hint="Upload more rows, or ask for other shares.")
    if len(np.unique(table.label_ids[split.train])) < 2:
        raise InvalidData("All train rows have the same label.", hint="Give the train part rows of two labels or more.")
    return table, split, algorithm


def split_rows(texts: Sequence[str], label_ids: NDArray[np.int64], shares: Mapping[Part, float], seed: int) -> Split:
    """Deals N rows out to the three parts.

    Texts that are equal once case and white space are folded form a group and stand in one part only. The groups of
    a label are put in the order of sha256(seed, text) and dealt out by largest remainder, one to each part at least
    where there are three; what rounding owes a part at one label, it is given at the next. A group with several
    labels counts for the rarest of them.

    Args:
        texts: N texts.
        label_ids: `(N,)`.
        shares: By part, summing to 1.
        seed: Another seed, another split.
    """
    rows_of: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        rows_of.setdefault(fold(text), []).append(row)
    groups_of_label = _groups_by_label(rows_of, label_ids)
    chosen: dict[Part, list[int]] = {part: [] for part in PARTS}
    owed = dict.fromkeys(PARTS, 0.0)
    for label in sorted(groups_of_label):
        groups = sorted(groups_of_label[label], key=lambda text: _digest(seed, "split", text))
        counts = _deal(len(groups), shares, owed)
        start = 0
        # Test and validation first: what a growing file adds then goes to train alone.
        for part in ("test", "validation", "train"):
            stop = start + counts[part]
            chosen[part] += [row for text in groups[start:stop] for row in rows_of[text]]
            start = stop
    return Split(*(np.array(sorted(chosen[part]), dtype=np.int64) for part in PARTS))


def split_as_given(
    texts: Sequence[str], label_ids: NDArray[np.int64], given: Sequence[str], shares: Mapping[Part, float], seed: int
) -> Split:
    """The file's own split. Where it has no validation rows, they are cut from its train rows, in proportion."""
    named = np.asarray(given, dtype=object)
    train, validation, test = (np.flatnonzero(named == part) for part in PARTS)
    if len(validation) == 0:
        part = shares["validation"] / (shares["train"] + shares["validation"])
        cut: dict[Part, float] = {"train": 1 - part, "validation": part, "test": 0.0}
        inner = split_rows([texts[i] for i in train.tolist()], label_ids[train], cut, seed)
        train, validation = train[inner.train], train[inner.validation]
    return Split(train, validation, test)


def stratified_subset(texts: Sequence[str], label_ids: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Positions, ascending, of `min(size, N)` rows in which labels stand as they do in all N.

    Best effort where `size` is under the number of labels: the most frequent ones get a row.
    """
    if size >= len(texts):
        return np.arange(len(texts), dtype=np.int64)
    labels, counts = np.unique(label_ids, return_counts=True)
    quotas = counts * (size / len(texts))
    wanted = np.floor(quotas).astype(np.int64)
    if size >= len(labels):
        wanted = np.maximum(wanted, 1)
    while wanted.sum() != size:  # a step per row of rounding, at most as many as there are labels
        gap = quotas - wanted
        if wanted.sum() < size:
            wanted[np.argmax(gap)] += 1
        else:
            wanted[np.argmin(np.where(wanted > 1, gap, np.inf))] -= 1
    chosen: list[int] = []
    for label, n in zip(labels, wanted, strict=True):
        rows = np.flatnonzero(label_ids == label)
        chosen += sorted(rows.tolist(), key=lambda row: _digest(seed, "subset", texts[row]))[:n]
    return np.array(sorted(chosen), dtype=np.int64)


def growing_order(texts: Sequence[str], label_ids: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Positions of all N rows such that labels stand in every beginning of them as they do in all N.

    One row of each label comes first, the most frequent label's before the others.
    """
    keys: list[tuple[float, int, int]] = []
    for label in np.unique(label_ids):
        rows = sorted(np.flatnonzero(label_ids == label).tolist(), key=lambda row: _digest(seed, "grow", texts[row]))
        keys += [(place and (place + 0.5) / len(rows), -len(rows), row) for place, row in enumerate(rows)]
    return np.array([row for _share, _size, row in sorted(keys)], dtype=np.int64)


def _groups_by_label(rows_of: Mapping[str, list[int]], label_ids: NDArray[np.int64]) -> dict[int, list[str]]:
    labels_of = {text: {int(label_ids[row]) for row in rows} for text, rows in rows_of.items()}
    n_groups: dict[int, int] = {}
    for labels in labels_of.values():
        for label in labels:
            n_groups[label] = n_groups.get(label, 0) + 1
    groups: dict[int, list[str]] = {}
    for text, labels in labels_of.items():
        groups.setdefault(min(labels, key=lambda label: (n_groups[label], label)), []).append(text)
    return groups


def _deal(n_groups: int, shares: Mapping[Part, float], owed: dict[Part, float]) -> dict[Part, int]:
    """Counts by part, summing to `n_groups`; `owed` carries what rounding owes each part from label to label."""
    wanted = {part: n_groups * shares[part] for part in PARTS}
    counts = {part: int(wanted[part]) for part in PARTS}
    for _ in range(n_groups - sum(counts.values())):
        most = max(PARTS, key=lambda part: (wanted[part] - counts[part] + owed[part], shares[part]))
        counts[most] += 1
    asked = [part for part in PARTS if shares[part] > 0]
    for part in asked:
        if counts[part] == 0 and n_groups >= len(asked):
            counts[max(counts, key=lambda p: counts[p])] -= 1
            counts[part] = 1
    for part in PARTS:
        owed[part] += wanted[part] - counts[part]
    return counts


def _digest(seed: int, purpose: str, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{purpose}\0{text}".encode("utf-8", "surrogatepass")).digest()
