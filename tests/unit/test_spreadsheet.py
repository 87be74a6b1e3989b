"""What a spreadsheet is given: no cell of it is a formula, and nothing else has changed."""

import csv
import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.spreadsheet import inert, inert_csv

CELLS = st.text(st.characters(codec="utf-8"), max_size=12)


@pytest.mark.parametrize(
    "cell",
    ["=1+1", "+SUM(A1)", "-cmd|' /C calc'!A0", "@import", "\t=1", "\r=1", " =1", "\n=1", "-", "+", "--1", "=", "-1e"],
)
def test_a_formula_becomes_text(cell):
    assert inert(cell) == f"'{cell}"


@pytest.mark.parametrize("cell", ["", "fee", "-1", "+0.5", "-1e-05", "0.9", "a=b", "1-2", "'=1", "ü=", "9e9"])
def test_what_is_no_formula_stays_as_it_is(cell):
    assert inert(cell) == cell


@given(st.lists(st.lists(CELLS, min_size=2, max_size=2), max_size=8))
def test_every_cell_is_as_it_was_or_has_one_apostrophe_before_it(rows):
    written = io.StringIO(newline="")
    csv.writer(written).writerows(rows)
    got = b"".join(inert_csv(io.BytesIO(written.getvalue().encode()))).decode()
    read = list(csv.reader(io.StringIO(got, newline="")))
    assert len(read) == len(rows)
    for row, was in zip(read, rows, strict=True):
        for cell, before in zip(row, was, strict=True):
            assert cell in (before, f"'{before}")
            assert not re.match(r"[=@+\-\t\r\n]", cell) or re.fullmatch(r"[+-]?[\d.eE+-]+", cell)


def test_a_long_file_comes_in_parts_and_whole():
    rows = [[str(i), f"=text {i}"] for i in range(2500)]
    written = io.StringIO(newline="")
    csv.writer(written).writerows(rows)
    parts = list(inert_csv(io.BytesIO(written.getvalue().encode())))
    assert len(parts) == 3
    read = list(csv.reader(io.StringIO(b"".join(parts).decode(), newline="")))
    assert read == [[number, f"'{text}"] for number, text in rows]
