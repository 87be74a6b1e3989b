"""An uploaded CSV or TSV: its profile, its rows, its DataFrame.

`profile` finds out how a file is to be read and whether it can be used, in a pass that keeps 17 bytes of a row and none
of its text. What it found out is a `TableFormat`, by which `read_rows` and `read_frame` read the same rows again.
"""

import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from service.core.errors import (
    ColumnNotFound,
    InvalidData,
    InvalidEncoding,
    InvalidSplit,
    MalformedRows,
    NoRows,
    TooManyLabels,
)
from service.ml import columns, findings
from service.ml.columns import shown
from service.ml.findings import PART_IDS, DatasetWarning, Integers, Scan, fold, warn
from service.ml.table import (
    BadRows,
    Cells,
    Dialect,
    TextSource,
    cut_head,
    find_delimiter,
    head_lines,
    quotes_are_data,
    refuse_binary,
    resolve_delimiter,
    resolve_encoding,
)

if TYPE_CHECKING:
    import pandas as pd

_UNCLEAR_HEADER = "The first row is read as {}: say has_header=true (--has-header), or false."
_READ_AS = ("a text, and may be a header", "a header, and may be a text")
_PARTS = {"train": "train", "validation": "validation", "val": "validation", "dev": "validation", "test": "test"}


@dataclass(frozen=True)
class UploadOptions:
    """What the caller says about a file; None is inferred. A column is a name first, then a 0-based index."""

    text_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    delimiter: str | None = None
    has_header: bool | None = None
    encoding: str | None = None
    labelled: bool = True
    rare_labels: Literal["refuse", "drop"] = "refuse"
    max_labels: int = 1000
    usual_text: str | None = None
    """Name of the column to take for the texts where none is said and the file has it."""


@dataclass(frozen=True)
class TableFormat:
    """All it takes to read the same rows again; JSON of its `asdict` makes an equal one."""

    text_column: str
    label_column: str | None
    split_column: str | None
    delimiter: str
    has_header: bool
    encoding: str
    literal_quotes: bool
    dropped_labels: tuple[str, ...] = ()
    labelled: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "dropped_labels", tuple(self.dropped_labels))

    @property
    def needs_label(self) -> bool:
        return self.labelled and self.label_column is not None


@dataclass(frozen=True)
class TextLength:
    """Characters of the usable texts; percentiles by nearest rank."""

    p50_chars: int
    p95_chars: int
    max_chars: int


@dataclass(frozen=True)
class LabelCount:
    """A label and its number of usable rows."""

    label: str
    count: int


@dataclass(frozen=True)
class DatasetProfile:
    """What a file holds and how it is read; `labels` are sorted by code point, `columns` stand as in the file."""

    format: TableFormat
    inferred: tuple[str, ...]
    n_rows: int
    n_usable_rows: int
    labels: tuple[LabelCount, ...]
    text_length: TextLength
    warnings: tuple[DatasetWarning, ...]
    columns: tuple[str, ...] = ()


class Row(NamedTuple):
    """One data row: the text as it is, the label without white space around it, the part by its usual name."""

    row_id: int
    text: str
    label: str | None
    split: str | None


def profile(path: Path, options: UploadOptions) -> DatasetProfile:
    """Find out how to read the file and whether it is a usable table of texts and labels.

    Raises:
        UnsupportedMedia: not a text file.
        InvalidData: by its subclasses, every other reason to refuse the file.
    """
    table, inferred, names, unclear_header = _recognise(path, options)
    try:
        return _profile(path, options, table, inferred, names, unclear_header)
    except (InvalidEncoding, MalformedRows):
        raise
    except InvalidData as error:
        error.columns = list(names)  # the remedy may be another one
        raise


def _profile(
    path: Path, options: UploadOptions, table: TableFormat, inferred: tuple[str, ...], names: tuple[str, ...],
    unclear_header: bool,
) -> DatasetProfile:  # fmt: skip
    scan = _scan(path, table, options.max_labels)
    usable = np.flatnonzero((scan.lengths > 0) & (scan.label_ids >= 0))
    if not usable.size:
        raise NoRows(f"Expected rows with text{' and label' * table.needs_label}, found none of {scan.lengths.size}.")
    warnings = [
        warn("unclear_header", _UNCLEAR_HEADER.format(_READ_AS[table.has_header]), np.flatnonzero([unclear_header])),
        warn("literal_quotes", "Quotes are part of the texts: with quoting the file is no table.", scan.quoted),
        warn("empty_text", "Rows without a text are not used.", np.flatnonzero(scan.lengths == 0)),
        warn("empty_label", "Rows without a label are not used.", np.flatnonzero(scan.label_ids < 0)),
    ]
    if table.needs_label:
        findings.refuse_unclear_labels(scan)
        rare = findings.rare_labels(scan, usable, options.rare_labels, str(table.label_column))
        is_rare = np.isin(scan.label_ids[usable], rare)
        table = replace(table, dropped_labels=tuple(sorted(scan.labels[i] for i in rare)))
        warnings.append(findings.label_variants(scan))
        warnings.append(warn("rare_label_dropped", "Rows of rare labels are left out.", usable[is_rare]))
        usable = usable[~is_rare]
        warnings.append(findings.imbalance(scan, usable))
        if table.split_column is not None:
            findings.refuse_missing_parts(scan.part_ids[usable])
    warnings += findings.repetitions(scan, usable)
    counts = np.bincount(scan.label_ids[usable], minlength=len(scan.labels)).tolist()
    lengths = np.percentile(scan.lengths[usable], [50, 95, 100], method="inverted_cdf")
    return DatasetProfile(
        format=table,
        inferred=inferred,
        n_rows=scan.lengths.size,
        n_usable_rows=usable.size,
        labels=tuple(LabelCount(label, n) for label, n in sorted(zip(scan.labels, counts, strict=False)) if n),
        text_length=TextLength(*(int(length) for length in lengths)),
        warnings=tuple(warning for warning in warnings if warning.count),
        columns=names,
    )


def read_rows(file: TextSource, table: TableFormat) -> Iterator[Row]:
    """Every data row in file order, as a stream.

    Raises:
        InvalidData: the file is not the one that was profiled.
    """
    cells = _cells(file, table)
    yield from _rows(cells, table)
    cells.refuse()


def read_frame(file: TextSource, table: TableFormat) -> "pd.DataFrame":
    """The usable rows and those of dropped labels.

    Returns:
        Columns `row_id` (int64), `text`, `label`, `split` (Python objects; None where there is no such column) and
        `dropped` (bool).
    """
    import pandas as pd  # slow to import, and the API does without

    rows = [row for row in read_rows(file, table) if fold(row.text) and (row.label or not table.needs_label)]
    frame = pd.DataFrame(rows, columns=list(Row._fields), dtype=object).astype({"row_id": "int64"})
    frame["dropped"] = frame["label"].isin(table.dropped_labels)
    return frame


def _recognise(path: Path, options: UploadOptions) -> tuple[TableFormat, tuple[str, ...], tuple[str, ...], bool]:
    """How to read the file, what of that is inferred, the columns there are, and whether its header is in doubt."""
    if not path.stat().st_size:
        raise NoRows("The file is empty: it has 0 bytes. Save it with its rows, and send it again.")
    refuse_binary(path)
    encoding = resolve_encoding(path, options.encoding)
    lines = head_lines(path, encoding)
    delimiter = find_delimiter(lines) if options.delimiter is None else resolve_delimiter(options.delimiter)
    dialect = Dialect(encoding, delimiter, literal_quotes=delimiter == "\t" and quotes_are_data(path, encoding))
    head = cut_head(lines, dialect)
    head = [cells for cells in head if len(cells) == len(head[0])]
    has_header, unclear = bool(options.has_header), False
    try:
        if not any(head):
            raise NoRows("Expected rows, found none.")
        if options.has_header is None:
            asked = (options.text_column, options.label_column, options.split_column)
            has_header, unclear = columns.has_header(head, asked, options.usual_text, labelled=options.labelled)
        text, label, split = _assign_columns(head, has_header, options)
    except InvalidData:
        # Broken or missing rows explain it better than a missing column does.
        cells = Cells(path, dialect, has_header=has_header)
        n_rows = sum(row >= 0 for row, _ in cells)
        cells.refuse()
        if not n_rows:
            raise NoRows("Expected rows below a header, found none.") from None
        raise
    table = TableFormat(
        text_column=text,
        label_column=label,
        split_column=split,
        delimiter=delimiter,
        has_header=has_header,
        encoding=encoding,
        literal_quotes=dialect.literal_quotes,
        labelled=options.labelled,
    )
    names = columns.column_names(head[0], has_header=has_header)
    found_out = ("text_column", *(["label_column"] if label is not None else ()), "delimiter", "has_header")
    guessed = tuple(name for name in found_out if getattr(options, name) is None)
    return table, guessed, tuple(columns.told(names)), unclear and not options.labelled


def _assign_columns(
    head: Sequence[Sequence[str]], has_header: bool, options: UploadOptions
) -> tuple[str, str | None, str | None]:
    """Names of the columns of text, label and split."""
    names = columns.column_names(head[0], has_header=has_header)
    rows = head[has_header:]
    text = columns.find_if_asked(names, options.text_column, "text_column")
    label = columns.find_if_asked(names, options.label_column, "label_column")
    split = columns.find_if_asked(names, options.split_column, "split_column")
    taken = [i for i in (text, label, split) if i is not None]
    if len(set(taken)) < len(taken):
        listed = ", ".join(shown(names[i]) for i in taken)
        raise ColumnNotFound(
            f"Expected different columns for text, label and split, found {listed}.", columns=columns.told(names)
        )
    if text is None:
        usual = names.index(options.usual_text) if has_header and options.usual_text in names else -1
        filled = usual not in (-1, *taken) and any(row[usual].strip() for row in rows)
        text = usual if filled else columns.guess_text(names, rows, taken)
    if label is None and options.labelled:
        label = columns.guess_label(names, rows, [*taken, text])
    return names[text], None if label is None else names[label], None if split is None else names[split]


def _cells(file: TextSource, table: TableFormat) -> Cells:
    dialect = Dialect(table.encoding, table.delimiter, table.literal_quotes)
    return Cells(file, dialect, has_header=table.has_header)


def _rows(cells: Cells, table: TableFormat) -> Iterator[Row]:
    numbered = iter(cells)
    first = list(itertools.islice(numbered, 1))
    if not first:
        return
    names = columns.column_names(first[0][1], has_header=table.has_header)
    text = columns.find_column(names, table.text_column, "text_column")
    label = columns.find_if_asked(names, table.label_column, "label_column")
    split = columns.find_if_asked(names, table.split_column, "split_column")
    for row_id, row in numbered if table.has_header else itertools.chain(first, numbered):
        part = None if split is None else row[split].strip()
        yield Row(
            row_id,
            row[text],
            None if label is None else row[label].strip(),
            None if part is None else _PARTS.get(part.lower(), part),
        )


def _scan(path: Path, table: TableFormat, max_labels: int) -> Scan:
    cells = _cells(path, table)
    digests, lengths, label_ids, part_ids = array("q"), array("i"), array("i"), array("b")
    ids, bad_parts = {"": -1}, BadRows()
    for row_id, text, label, part in _rows(cells, table):
        folded = fold(text)
        digests.append(hash(folded))
        lengths.append(len(text) if folded else 0)
        label_ids.append(ids.setdefault(label or "", len(ids) - 1) if table.needs_label else 0)
        if len(ids) > max_labels + 1:
            like_ids = ", so nearly every row has one of its own: this looks like a column of ids"
            raise TooManyLabels(
                f"Expected at most {max_labels:,} labels in column {shown(str(table.label_column))}, found more by row "
                f"{row_id}{like_ids * (max_labels > findings.ID_LIKE * row_id)}. Pass another label_column, or merge "
                "labels."
            )
        if part is not None:
            part_ids.append(PART_IDS.get(part, -1))
            if part not in PART_IDS:
                bad_parts.add(row_id, f"expected train, validation, val, dev or test, found {part[:20]!r}")
    cells.refuse()
    bad_parts.refuse(InvalidSplit, f"Column {shown(str(table.split_column))} is no split. Correct it or leave it out.")
    if not lengths:
        raise NoRows("Expected rows below a header, found none.")
    return Scan(
        digests=_integers(digests),
        lengths=_integers(lengths),
        label_ids=_integers(label_ids),
        part_ids=_integers(part_ids),
        quoted=_integers(cells.rows_with_quotes),
        labels=tuple(ids)[1:],
    )


def _integers(values: "array[int]") -> Integers:
    return np.array(values, dtype=np.int64)
