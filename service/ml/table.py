"""Bytes to cells: whether a file is text, in which encoding, cut by which delimiter, and which rows are broken."""

import codecs
import csv
import io
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol, TextIO

from service.core.errors import AppError, InvalidData, InvalidEncoding, MalformedRows, UnsupportedMedia

CELL_LIMIT = 1_000_000  # characters; past it an unclosed quote is swallowing the file
LINE_LIMIT = 16 * CELL_LIMIT  # a file without line breaks must not be read as one line
SAMPLE_CHARS = 2_000_000  # enough to meet several labels in a file that is sorted by them
LISTED_ROWS = 50
DELIMITERS = (",", "\t", ";", "|")

_MAGIC = (
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    *((b"BZh%d1AY&SY" % level, "a bzip2 archive") for level in range(1, 10)),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a rar archive"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office file (xls or doc)"),
    (b"PAR1", "a parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"%PDF-", "a PDF document"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF87a", "a GIF image"),
    (b"GIF89a", "a GIF image"),
    (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"),
)
_ZIPPED = (
    (b"xl/", "an Excel workbook (xlsx)"),
    (b"word/", "a Word document (docx)"),
    (b"opendocument.spreadsheet", "an OpenDocument spreadsheet (ods)"),
)
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it starts with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Python calls these text encodings, but they rewrite text instead of storing it.
_NOT_FOR_FILES = {"idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape"}
# Control characters, and the surrogates that stand for bytes that could not be decoded.
_FAULT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_OVERLONG = "field larger than field limit"  # as the csv module says it


class TextSource(Protocol):
    """A `Path`, or what opens like one."""

    def open(self, *, encoding: str, errors: str, newline: str) -> TextIO: ...


@dataclass(frozen=True)
class Dialect:
    """How bytes are cut into cells; `literal_quotes` takes quotes as part of the text."""

    encoding: str
    delimiter: str
    literal_quotes: bool = False

    def cut(self, lines: Iterable[str]) -> Iterator[list[str]]:
        """The cells of each record; a `csv.Error` loses one record, and the next call goes on after it."""
        csv.field_size_limit(CELL_LIMIT)
        read = partial(csv.reader, delimiter=self.delimiter, strict=True)
        return _Records(lines, partial(read, quoting=csv.QUOTE_NONE) if self.literal_quotes else read)


class _Records:
    """The records of lines. One of over `LINE_LIMIT` characters is a `csv.Error`: quoted, it may go on for ever."""

    def __init__(self, lines: Iterable[str], read: Callable[[Iterable[str]], Iterator[list[str]]]) -> None:
        self._n_chars, self._records = 0, read(self._counted(lines))

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        self._n_chars = 0
        return next(self._records)

    def _counted(self, lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            self._n_chars += len(line)
            if self._n_chars > LINE_LIMIT:
                raise csv.Error(_OVERLONG)
            yield line


class BadRows:
    """The first `LISTED_ROWS` bad rows, one entry each, and how many there are in all."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.total = 0
        self._last: int | None = None

    def add(self, row: int, message: str) -> None:
        """Rows come in order; of one with several faults the first is told. The header is row -1."""
        if row == self._last:
            return
        self._last = row
        self.total += 1
        if len(self.entries) < LISTED_ROWS:
            where: dict[str, Any] = {"loc": ["header"]} if row < 0 else {"row": row}
            self.entries.append({**where, "message": message})

    def refuse(self, error: type[AppError], expected: str, first: str = "") -> None:
        """Raise `error` if there is any bad row; `expected` says what should be there and what to do, after `first`."""
        if self.total:
            listed = f", the first {LISTED_ROWS} listed" if self.total > LISTED_ROWS else ""
            raise error(f"{first}Bad rows: {self.total}{listed}. {expected}", errors=self.entries)


class Cells:
    """One pass over a file.

    Iterating gives `(row, cells)` for every sound row, the header as row -1; blank lines do not count. What is broken
    is collected on the way, and `refuse` raises it after.
    """

    def __init__(self, file: TextSource, dialect: Dialect, *, has_header: bool) -> None:
        self.file, self.dialect = file, dialect
        self.rows_with_quotes = array("q")  # told apart only where quotes are literal
        self._row = -1 if has_header else 0
        self._malformed, self._undecodable = BadRows(), BadRows()
        self._n_lines = self._n_with_control = 0

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        width = 0
        with _open(self.file, self.dialect.encoding) as file:
            records = self.dialect.cut(self._inspected(_lines(file)))
            while True:
                try:
                    for cells in records:
                        if len(cells) < 2 and _is_blank(cells):
                            continue
                        width = width or len(cells)
                        if len(cells) == width:
                            yield self._row, cells
                        else:
                            self._malformed.add(self._row, f"expected {width} cells, found {len(cells)}")
                        self._row += 1
                    return
                except csv.Error as error:
                    message, goes_on = _explain(error)
                    self._malformed.add(self._row, message)
                    if not goes_on:
                        return
                    self._row += 1

    def refuse(self) -> None:
        """Raise what the pass has found.

        Raises:
            InvalidEncoding: bytes that are not text in the encoding asked for.
            MalformedRows: broken quoting, a wrong number of cells, or control characters.
        """
        encoding = self.dialect.encoding
        advice = "Pass the file's encoding (cp1252 is common) or save it as UTF-8."
        # Texts in another encoding have other faults, but for UTF-16, which has a NUL in most characters.
        is_text = 2 * self._n_with_control <= self._n_lines
        first = "" if is_text else f"This does not look like a text file in {encoding}. "
        self._undecodable.refuse(InvalidEncoding, f"Expected {encoding}, found bytes that are not. {advice}", first)
        self._malformed.refuse(
            MalformedRows,
            f"Expected rows of equally many cells, separated by {self.dialect.delimiter!r}, with quotes closed and "
            "doubled inside cells, and no control characters. Mend these rows, or pass the delimiter.",
            first,
        )

    def _inspected(self, lines: Iterator[str]) -> Iterator[str]:
        literal_quotes = self.dialect.literal_quotes
        for line in lines:
            self._n_lines += 1
            if fault := _FAULT.search(line):
                self._note(ord(fault[0]))
                self._n_with_control += _CONTROL.search(line) is not None
            if literal_quotes and '"' in line and self._row >= 0:
                self.rows_with_quotes.append(self._row)
            yield line

    def _note(self, code: int) -> None:
        if code >= 0xD800:
            self._undecodable.add(self._row, f"byte 0x{code & 0xFF:02x} is not {self.dialect.encoding} here")
        else:
            hint = "; is the file UTF-16? then pass encoding=utf-16" if code == 0 else ""
            self._malformed.add(self._row, f"control character U+{code:04X}{hint}")


def refuse_binary(path: Path) -> None:
    """Raise `UnsupportedMedia`, naming what the file is, where its first bytes tell."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    kind = next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)
    if kind == "a zip archive":
        kind = next((inside for name, inside in _ZIPPED if name in head), kind)
    if kind:
        raise UnsupportedMedia(
            f"Expected a text file (CSV or TSV), found {kind}. Unpack it, or export the table as CSV."
        )


def resolve_encoding(path: Path, asked: str | None) -> str:
    """Python's name of the encoding asked for; UTF-8, with or without its mark, by default.

    Raises:
        InvalidEncoding: nobody knows it, it is not one of text, or the file says it is UTF-16 or UTF-32.
    """
    if asked is None:
        with path.open("rb") as file:
            head = file.read(4)
        if found := next((name for mark, name in _BYTE_ORDER_MARKS if head.startswith(mark)), None):
            raise InvalidEncoding(f"Expected UTF-8, found the byte-order mark of {found}. Pass encoding={found}.")
        return "utf-8"
    name = _text_codec(asked)
    if name is None:
        raise InvalidEncoding(f"Expected a text encoding such as utf-8 or cp1252, found {asked[:40]!r}.")
    return name


def resolve_delimiter(asked: str) -> str:
    """The one character; `tab` and `\\t` are words for it."""
    delimiter = "\t" if asked in {"tab", "\\t"} else asked
    if len(delimiter) != 1 or delimiter == '"' or not (delimiter == "\t" or delimiter.isprintable()):
        raise InvalidData(f"Expected a delimiter of one character, such as ',' or 'tab', found {asked[:20]!r}.")
    return delimiter


def head_lines(path: Path, encoding: str) -> list[str]:
    """The first lines, enough of them to recognise the table by."""
    lines, size = [], 0
    with _open(path, encoding) as file:
        try:
            for line in _lines(file):
                lines.append(line)
                size += len(line)
                if size > SAMPLE_CHARS:
                    break
        except csv.Error:
            pass  # the full pass tells
    return lines


def cut_head(lines: list[str], dialect: Dialect) -> list[list[str]]:
    """The records of the head; a broken one is an empty list, a last one that the head cuts off is left out."""
    records = dialect.cut(lines)
    found: list[list[str]] = []
    while True:
        try:
            found.extend(cells for cells in records if not _is_blank(cells))
        except csv.Error as error:
            if "end of data" in str(error):
                return found
            found.append([])
        else:
            return found


def find_delimiter(lines: list[str]) -> str:
    """The delimiter that cuts most records into as many cells as the first sound one.

    A tab is hardly ever part of a text, so it wins a tie; then the one that makes more columns. Where none makes two,
    the table has one column, and the first of those that never cut a line is taken.
    """
    ranked, uncut = [], []
    for literal_quotes, delimiter in [(False, delimiter) for delimiter in DELIMITERS] + [(True, "\t")]:
        widths = [len(cells) for cells in cut_head(lines, Dialect("", delimiter, literal_quotes))]
        width = next(filter(None, widths), 0)
        if width > 1:
            ranked.append((widths.count(width) / len(widths), delimiter == "\t", width, delimiter))
        elif set(widths) <= {1}:
            uncut.append(delimiter)
    if ranked:
        return max(ranked, key=itemgetter(0, 1, 2))[-1]
    return uncut[0] if uncut else DELIMITERS[0]


def quotes_are_data(path: Path, encoding: str) -> bool:
    """Whether a tab-separated file is a table only when its quotes are taken as they stand."""
    quoted, literal = (Dialect(encoding, "\t", literal_quotes=literal) for literal in (False, True))
    return not _is_rectangular(path, quoted) and _is_rectangular(path, literal)


def _is_rectangular(path: Path, dialect: Dialect) -> bool:
    with _open(path, dialect.encoding) as file:
        try:
            return len({len(cells) for cells in dialect.cut(_lines(file)) if not _is_blank(cells)}) <= 1
        except csv.Error:
            return False


def _text_codec(asked: str) -> str | None:
    try:
        name = codecs.lookup(asked).name
        io.TextIOWrapper(io.BytesIO(), encoding=name)
    except (LookupError, ValueError):
        return None
    return None if name in _NOT_FOR_FILES else name.removesuffix("-sig")


def _open(file: TextSource, encoding: str) -> TextIO:
    return file.open(encoding=encoding, errors="surrogateescape", newline="")


def _lines(file: TextIO) -> Iterator[str]:
    """Lines with their ends, without a byte-order mark. An endless one is a `csv.Error`, as an endless cell is."""
    read = partial(file.readline, LINE_LIMIT)
    try:
        line = read().removeprefix("\ufeff")
        while line:
            if len(line) == LINE_LIMIT:
                raise csv.Error(_OVERLONG)
            yield line
            line = read()
    except UnicodeError:
        raise InvalidEncoding(
            f"Expected {file.encoding}, found bytes that are not. Pass the file's encoding or save it as UTF-8."
        ) from None


def _is_blank(cells: list[str]) -> bool:
    """Nothing, or spaces, between two line breaks; a quoted empty cell is a row."""
    return not cells or (len(cells) == 1 and bool(cells[0]) and not cells[0].strip(" \t"))


def _explain(error: csv.Error) -> tuple[str, bool]:
    """What to tell about a record, and whether the records after it can be trusted."""
    if "end of data" in str(error):
        return "a quote opens in this row and is never closed", False
    if _OVERLONG in str(error):
        return (
            f"a cell of over {CELL_LIMIT:,} characters, or a row of many, begins here; is a quote never closed?",
            False,
        )
    return "a closing quote is not followed by the delimiter; write quotes inside a quoted cell twice", True
