"""Bytes to cells, held against pandas and the standard library's writers."""

import bz2
import csv
import gzip
import io
import lzma
import sqlite3
import zipfile
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.errors import InvalidData, InvalidEncoding, MalformedRows, UnsupportedMedia
from service.ml.table import (
    CELL_LIMIT,
    LISTED_ROWS,
    Cells,
    Dialect,
    cut_head,
    find_delimiter,
    head_lines,
    quotes_are_data,
    refuse_binary,
    resolve_delimiter,
    resolve_encoding,
)

# All but control characters and surrogates, with more of what separates and quotes than chance would bring.
CELL = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters=[chr(c) for c in [*range(32), 127]])
    | st.sampled_from('",;|\t\r\n é\u2028'),
    max_size=12,
)
TABLES = st.integers(2, 4).flatmap(
    lambda width: st.lists(st.lists(CELL, min_size=width, max_size=width), min_size=1, max_size=8)
)


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes) -> Path:
        path = tmp_path / "upload"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def read(path: Path, *, has_header: bool = True, literal_quotes: bool = False, encoding: str = "utf-8", delimiter=","):
    cells = Cells(path, Dialect(encoding, delimiter, literal_quotes), has_header=has_header)
    rows = list(cells)
    cells.refuse()
    return rows


def refused(path: Path, error: type[InvalidData] = MalformedRows, **how):
    with pytest.raises(error) as caught:
        read(path, **how)
    return caught.value


@given(
    TABLES,
    st.sampled_from(",;|\t"),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le"]),
)
def test_well_formed_tables_are_read_as_written_and_as_pandas_reads_them(
    tmp_path_factory, rows, delimiter, line_end, quoting, encoding
):
    if any(set(cell) & set("\r\n") for row in rows for cell in row):
        quoting = csv.QUOTE_ALL  # Python 3.11's writer quotes no line breaks but its own
    path = tmp_path_factory.getbasetemp() / "table.csv"
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=line_end, quoting=quoting)
        writer.writerows([[f"c{i}" for i in range(len(rows[0]))], *rows])

    found = read(path, delimiter=delimiter, encoding=resolve_encoding(path, encoding))

    assert found[1:] == list(enumerate(rows))
    pandas = pd.read_csv(path, sep=delimiter, encoding=encoding, dtype=str, keep_default_na=False)
    assert [cells for _, cells in found] == [list(pandas.columns), *pandas.to_numpy().tolist()]


@given(TABLES, st.sampled_from(",;|\t"))
def test_the_delimiter_is_found_where_a_header_tells(rows, delimiter):
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter).writerows([["text", "label", "note", "part"][: len(rows[0])], *rows])
    file.seek(0)
    assert find_delimiter(list(file)) == delimiter


@pytest.mark.parametrize(
    ("text", "delimiter"),
    [
        ("ham\tfine, really, yes\nspam\twin; now\n", "\t"),
        ("a;b\nx,y;1\nz,w;2\n", ";"),
        ("good, really|1\nbad, so bad, no|2\nwell|3\n", "|"),
        ("text\nHello, you\nBye\n", "\t"),
        ("text\nHello\nBye\n", ","),
        ('text,label\n"a;b;c",x\n"d;e",y\n', ","),
        ('1\ta "quote\n2\tb\n3\t"c\n', "\t"),
        ("text,label\na,x\nb, and c,y\nd,x\n", ","),
    ],
)
def test_the_delimiter_is_the_one_that_makes_equal_rows(text, delimiter):
    assert find_delimiter(text.splitlines(keepends=True)) == delimiter


def test_a_delimiter_may_be_written_as_a_word_but_is_one_character():
    assert [resolve_delimiter(asked) for asked in ("tab", "\\t", "\t", ";")] == ["\t", "\t", "\t", ";"]
    for asked in ("", ",,", '"', "\n", "\x00"):
        with pytest.raises(InvalidData, match="one character"):
            resolve_delimiter(asked)


def zipped(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "text,label\n")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (gzip.compress(b"text,label\n", mtime=0), "gzip"),
        (bz2.compress(b"text,label\n"), "bzip2"),
        (lzma.compress(b"text,label\n"), "xz"),
        (zipped("table.csv"), "zip archive"),
        (zipped("xl/workbook.xml"), "xlsx"),
        (zipped("word/document.xml"), "docx"),
        (b"PAR1\x15\x04", "parquet"),
        (b"\x28\xb5\x2f\xfd\x04\x00", "zstd"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\x00", "xls"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\x89PNG\r\n\x1a\n\x00", "PNG"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "JPEG"),
        (b"GIF89a\x01\x00", "GIF"),
    ],
)
def test_a_file_that_is_no_text_is_named(write, content, named):
    with pytest.raises(UnsupportedMedia, match=named):
        refuse_binary(write(content))


def test_a_database_is_named(tmp_path):
    with closing(sqlite3.connect(tmp_path / "table.db")) as database:
        database.execute("create table rows (text, label)")
    with pytest.raises(UnsupportedMedia, match="SQLite"):
        refuse_binary(tmp_path / "table.db")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_wide_byte_order_mark_without_encoding_says_what_to_pass(write, encoding):
    path = write("text,label\n".encode(encoding))
    with pytest.raises(InvalidEncoding, match=f"encoding={encoding}"):
        resolve_encoding(path, None)
    assert resolve_encoding(path, encoding) == encoding


@pytest.mark.parametrize(
    "asked", ["", "klingon", "rot13", "base64", "zlib", "idna", "unicode_escape", "undefined", "\0"]
)
def test_an_encoding_that_is_none_of_text_is_refused(write, asked):
    with pytest.raises(InvalidEncoding, match="text encoding"):
        resolve_encoding(write("text,label\n"), asked)


def test_a_byte_order_mark_is_no_part_of_the_first_cell(write):
    assert read(write(b'\xef\xbb\xbf"text",label\n'))[0] == (-1, ["text", "label"])


def test_each_row_with_undecodable_bytes_is_listed(write):
    error = refused(write(b"text,label\nfine,x\ncaf\xe9,y\nfine,x\n\x93hi\x94,y\n"), InvalidEncoding)
    assert [entry["row"] for entry in error.errors] == [1, 3]
    assert "0xe9" in error.errors[0]["message"]
    assert "cp1252" in error.detail


def test_undecodable_bytes_in_the_header_are_told_of_the_header(write):
    assert refused(write(b"te\xffxt,label\na,x\n"), InvalidEncoding).errors[0]["loc"] == ["header"]


def test_bytes_that_break_utf_16_are_one_clear_error(write):
    assert "utf-16" in refused(write("text,a\n".encode("utf-16") + b"\x00"), InvalidEncoding, encoding="utf-16").detail


def test_control_characters_are_listed_but_c1_characters_are_text(write):
    error = refused(write("text,label\na\x00,x\nb,y\nc\x7f,x\nd\x0b,\x01\n"))
    assert [entry["row"] for entry in error.errors] == [0, 2, 3]
    assert "utf-16" in error.errors[0]["message"]
    assert read(write("text,label\na\x91b\x85c,x\td\n"))[1] == (0, ["a\x91b\x85c", "x\td"])


def test_ragged_rows_are_listed_with_what_was_expected_and_found(write):
    error = refused(write("text,label\na,x\nb\n\nc,y,z\nd,x\n"))
    assert error.errors == [
        {"row": 1, "message": "expected 2 cells, found 1"},
        {"row": 2, "message": "expected 2 cells, found 3"},
    ]


def test_fifty_bad_rows_are_listed_and_all_are_counted(write):
    error = refused(write("text,label\n" + "a\n" * 70))
    assert len(error.errors) == LISTED_ROWS
    assert "70" in error.detail


def test_reading_goes_on_after_a_stray_quote_but_not_after_an_open_one(write):
    error = refused(write('text,label\n"a" b,x\nc,y\n"d"e,x\nf,y\n"g,x\nh\ni,y\n'))
    assert [entry["row"] for entry in error.errors] == [0, 2, 4]
    assert "never closed" in error.errors[-1]["message"]


def test_an_open_quote_does_not_swallow_a_large_file(write):
    error = refused(write('text,label\na,x\n"b,y\n' + "c,x\n" * 300_000 + "d\n"))
    assert [entry["row"] for entry in error.errors] == [1]
    assert f"{CELL_LIMIT:,}" in error.errors[0]["message"]


def test_a_cell_may_have_a_million_characters_and_not_one_more(write):
    assert len(read(write(f"text,label\n{'a' * CELL_LIMIT},x\n"))[1][1][0]) == CELL_LIMIT
    assert refused(write(f"text,label\n{'a' * (CELL_LIMIT + 1)},x\n")).errors[0]["row"] == 0


def test_a_file_without_line_breaks_is_not_read_as_one_line(write):
    path = write("a" * (17 * CELL_LIMIT))
    assert head_lines(path, "utf-8") == []
    assert refused(path, has_header=False).errors[0]["row"] == 0


def test_blank_lines_are_no_rows_but_a_quoted_empty_cell_is_one(write):
    assert read(write('text\n\na\n  \n""\n\r\nb\n')) == [(-1, ["text"]), (0, ["a"]), (1, [""]), (2, ["b"])]


def test_quotes_are_data_only_where_quoting_makes_no_table_and_leaving_it_does(write):
    assert quotes_are_data(write('ham\t"hi" you\nspam\t"win\n'), "utf-8")
    assert not quotes_are_data(write('ham\t"hi\tyou"\nspam\twin\n'), "utf-8")
    assert not quotes_are_data(write('ham\t"hi" you\nspam\n'), "utf-8")


def test_literal_quotes_are_kept_and_their_rows_told(write):
    path = write('text\tlabel\n"a" b\tx\nc\ty\n"d\tx\n')
    cells = Cells(path, Dialect("utf-8", "\t", literal_quotes=True), has_header=True)
    assert [row[0] for _, row in cells] == ["text", '"a" b', "c", '"d']
    assert list(cells.rows_with_quotes) == [0, 2]


def test_the_head_leaves_out_a_record_that_it_cuts_off():
    assert cut_head(["text,label\n", "a,x\n", '"b\n', "c\n"], Dialect("utf-8", ",")) == [["text", "label"], ["a", "x"]]


@pytest.mark.parametrize("quotes_end", [True, False])
def test_a_row_that_goes_on_for_ever_is_refused_before_it_fills_the_memory(write, quotes_end):
    """Each cell is small enough, each line too; only the row has no end."""
    cell = '"' + "\n" * 900_000 + '",' if quotes_end else '"' + "\n," * 900_000
    found = refused(write("text,label\n" + cell * 20 + "\n"))
    assert "is a quote never closed?" in found.errors[0]["message"]
