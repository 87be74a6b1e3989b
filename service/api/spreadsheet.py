"""A CSV as a spreadsheet may open it: no cell is taken for a formula."""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from typing import IO

from service.ml.table import CELL_LIMIT

_FORMULA = re.compile(r"[\s\0]*[=+\-@]|[\t\r\n]")
_NUMBER = re.compile(r"[+-]?[0-9]*[.]?[0-9]+([eE][+-]?[0-9]+)?")
_ROWS_AT_ONCE = 1000


def inert(cell: str) -> str:
    """The cell, with an apostrophe before what would be a formula; numbers stay as they are.

    Source: OWASP, CSV injection.
    """
    return f"'{cell}" if _FORMULA.match(cell) and not _NUMBER.fullmatch(cell) else cell


def inert_csv(stream: IO[bytes]) -> Iterator[bytes]:
    """The same rows in the same order, every cell `inert`; closes the stream."""
    csv.field_size_limit(CELL_LIMIT)
    with io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
        rows = (map(inert, row) for row in csv.reader(text))
        while chunk := _written(rows):
            yield chunk


def _written(rows: Iterator[Iterable[str]]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out)  # with \r\n: else a cell with \r alone would not be quoted
    for _ in range(_ROWS_AT_ONCE):
        row = next(rows, None)
        if row is None:
            break
        writer.writerow(row)
    return out.getvalue().encode()
