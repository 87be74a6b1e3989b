"""A file's profile and rows: what is recognised, refused and warned of."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.errors import (
    AppError,
    ColumnNotFound,
    DuplicateColumns,
    InvalidData,
    InvalidEncoding,
    InvalidLabels,
    InvalidSplit,
    MalformedRows,
    NoRows,
    RareLabels,
    TooFewLabels,
    TooManyLabels,
    UnsupportedMedia,
)
from service.ml.dataset import Row, TableFormat, UploadOptions, profile, read_frame, read_rows
from service.ml.findings import fold

LABELS = ("refund", "fee")


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes) -> Path:
        path = tmp_path / "upload"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def table(*rows: str, header: str = "text,label", each: int = 3) -> str:
    """A sound table of two labels, then `rows`."""
    sound = [f"{label} number {i},{label}" for label in LABELS for i in range(each)]
    return "\n".join([header, *sound, *rows, ""])


def refused(path: Path, error: type[InvalidData], **options):
    with pytest.raises(error) as caught:
        profile(path, UploadOptions(**options))
    assert type(caught.value) is error
    return caught.value


def warnings(path: Path, **options) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {warning.code: (warning.count, warning.rows) for warning in profile(path, UploadOptions(**options)).warnings}


def rows_of(path: Path, **options) -> list[Row]:
    return list(read_rows(path, profile(path, UploadOptions(**options)).format))


# Real files
def test_banking77_is_recognised(shared_data):
    found = profile(shared_data / "banking77.csv", UploadOptions())

    assert found.format == TableFormat("text", "category", None, ",", True, "utf-8", False)
    assert found.inferred == ("text_column", "label_column", "delimiter", "has_header")
    assert (found.n_rows, found.n_usable_rows, len(found.labels)) == (13_083, 13_083, 77)
    assert {warning.code: warning.count for warning in found.warnings} == {"duplicate_text": 12}


def test_banking77_has_the_cells_that_pandas_reads(shared_data):
    path = shared_data / "banking77.csv"
    frame = read_frame(path, profile(path, UploadOptions()).format)
    pandas = pd.read_csv(path, dtype=object, keep_default_na=False)

    assert frame["row_id"].tolist() == list(range(13_083))
    assert frame["text"].tolist() == pandas["text"].tolist()
    assert frame["label"].tolist() == pandas["category"].tolist()
    assert not frame["dropped"].any()


@pytest.mark.parametrize("options", [{}, {"text_column": "1", "label_column": "0", "has_header": False}])
def test_sms_spam_is_read_with_its_quotes_as_text(shared_data, options):
    path = shared_data / "sms_spam.tsv"
    found = profile(path, UploadOptions(**options))

    assert found.format == TableFormat("column_1", "column_0", None, "\t", False, "utf-8", True)
    assert found.n_usable_rows == found.n_rows == 5_574
    assert [(label.label, label.count) for label in found.labels] == [("ham", 4_827), ("spam", 747)]
    assert {warning.code for warning in found.warnings} == {"literal_quotes", "duplicate_text"}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=False)
    assert sum(line.count('"') for line in lines) == sum(row.text.count('"') for row in read_rows(path, found.format))


# Profile and rows
def test_a_table_is_read_the_same_way_from_its_format_after_a_trip_through_json(write):
    path = write(table("one,rare\n"))
    fmt = profile(path, UploadOptions(rare_labels="drop")).format
    again = TableFormat(**json.loads(json.dumps(asdict(fmt))))

    assert again == fmt
    assert again.dropped_labels == ("rare",)
    assert list(read_rows(path, again)) == list(read_rows(path, fmt))


def test_texts_are_kept_as_they_are_and_labels_without_white_space_around(write):
    assert rows_of(write(table('"  A  b ", refund ')))[-1] == Row(6, "  A  b ", "refund", None)


def test_text_lengths_are_percentiles_of_usable_texts(write):
    rows = [f"{'x' * n},{LABELS[n % 2]}" for n in range(1, 101)]
    length = profile(write("\n".join(["text,label", *rows, ","])), UploadOptions()).text_length
    assert (length.p50_chars, length.p95_chars, length.max_chars) == (50, 95, 100)


def test_labels_are_sorted_by_code_point_and_counted(write):
    rows = "".join(f"{label} {i},{label}\n" for label in ("b", "é", "B") for i in range(3))
    found = profile(write("text,label\n" + rows), UploadOptions()).labels
    assert [(label.label, label.count) for label in found] == [("B", 3), ("b", 3), ("é", 3)]


def test_the_frame_holds_usable_rows_and_those_of_dropped_labels(write):
    path = write(table(",refund", "no label,", "one,rare"))
    found = profile(path, UploadOptions(rare_labels="drop"))
    frame = read_frame(path, found.format)

    assert (found.n_rows, found.n_usable_rows) == (9, 6)
    assert frame.columns.tolist() == ["row_id", "text", "label", "split", "dropped"]
    assert (frame["row_id"].dtype, frame["dropped"].dtype) == ("int64", "bool")
    assert frame["row_id"].tolist() == [0, 1, 2, 3, 4, 5, 8]
    assert frame["row_id"][frame["dropped"]].tolist() == [8]
    assert frame["split"].tolist() == [None] * 7


def test_a_table_without_labels_needs_none(write):
    path = write('text\nHello, you\n\nBye\n""\n')
    found = profile(path, UploadOptions(labelled=False))
    frame = read_frame(path, found.format)

    assert (found.format.label_column, found.labels, found.n_usable_rows) == (None, (), 2)
    assert "label_column" not in found.inferred
    assert frame["text"].tolist() == ["Hello, you", "Bye"]
    assert frame["label"].tolist() == [None, None]


def test_a_label_column_that_is_named_but_not_needed_is_kept_and_not_checked(write):
    path = write("text,label\na,x\nb,\n")
    found = profile(path, UploadOptions(labelled=False, label_column="label"))
    assert (found.format.label_column, found.labels, found.n_usable_rows) == ("label", (), 2)
    assert read_frame(path, found.format)["label"].tolist() == ["x", ""]


@given(st.text())
def test_folding_twice_is_folding_once_and_case_and_white_space_do_not_matter(text):
    assert fold(f"\t{text.replace(' ', '  ')}\n") == fold(text)
    assert fold(fold(text)) == fold(text)
    assert (fold(text) == "") == (not text.strip())


# Header, columns, delimiter
@pytest.mark.parametrize(
    ("content", "has_header"),
    [
        (table(), True),
        (table(header="what they said,what it was"), True),
        (table(header="Is it late?,fee"), False),
        (table(header="question,fee"), False),
        (table(header="query,intent"), True),
    ],
)
def test_a_header_is_told_from_a_row(write, content, has_header):
    assert profile(write(content), UploadOptions()).format.has_header is has_header


TEXTS = (
    "where is my parcel, it was to come on Monday",
    "I was charged twice for the same order",
    "Please send me the invoice once more",
    "the app does not let me change my address",
    "Wrong item in the box, who takes it back?",
    "I want my money back",
)


def unlabelled(*first: str, cells: tuple[str, ...] = ("{i}",), texts: tuple[str, ...] = TEXTS, cut: str = ",") -> str:
    """A first row, then rows of `cells` and a text."""
    cells = cells if len(first) > 1 else ()
    rows = [cut.join([*(cell.format(i=i) for cell in cells), f'"{text}"']) for i, text in enumerate(texts, 10)]
    return "\n".join([cut.join(first), *rows, ""])


@pytest.mark.parametrize(
    "content",
    [
        unlabelled("id", "Ticket text", cut=";"),
        unlabelled("id", "free text"),
        unlabelled("id", "What the customer wrote"),
        unlabelled("Complaint ID", "Complaint text", cells=("T-{i}",)),
        unlabelled("Nr.", "Freitext"),
        unlabelled("Q1", "Freitext"),
        unlabelled("Wann", "Was können wir besser machen als bisher?", cells=("10/{i}/2026 3:45 PM",)),
        unlabelled("Absender", "Nachricht des Kunden", cells=("anna@firma.example",)),
        unlabelled("", "0"),
        unlabelled("Kunde", "Sprache", "Freitext", cells=("{i}", "de")),
        unlabelled("col1", "col2", cells=("AB-{i}",)),
        unlabelled("mail1", "nachrichtentext", cells=("anna{i}@firma.example",)),
        unlabelled("Betreff", "Nachricht der Kunden", cells=("Zu Ihrer Rechnung vom Mai",)),
        unlabelled("id", "free text", texts=tuple("abcdefgh")),
        unlabelled("free text"),
        unlabelled("Beschwerde"),
        unlabelled("What the customer wrote", texts=(TEXTS[0] * 2,)),
        unlabelled("客户留言", texts=("我的包裹还没有到达请帮我查询一下", "同一笔订单我被收取了两次费用")),
    ],
)
def test_a_header_of_a_file_to_label_is_told_by_what_stands_below(write, content):
    found = profile(write(content), UploadOptions(labelled=False))
    assert found.format.has_header
    assert found.format.text_column == content.splitlines()[0].replace(";", ",").split(",")[-1]
    assert found.n_rows == len(content.splitlines()) - 1


@pytest.mark.parametrize(
    "content",
    [
        unlabelled("9", "wrong item", cut=";"),
        unlabelled("T-9", "wrong item", cells=("T-{i}",)),
        unlabelled("2026-01-09", "hello", cells=("2026-01-{i}",)),
        unlabelled("9", "de", "wrong item", cells=("{i}", "en")),
        unlabelled("Is it late?"),
        unlabelled("Thanks."),
        unlabelled("I want my money back"),
        unlabelled(f'"{TEXTS[0]}"', texts=TEXTS[1:]),
        unlabelled("anna@web.example", "wrong item", cells=("b.{i}@firma-x.example",)),
    ],
)
def test_the_first_row_of_a_file_to_label_is_a_row_where_it_is_like_the_others(write, content):
    found = profile(write(content), UploadOptions(labelled=False))
    assert (found.format.has_header, found.n_rows) == (False, len(content.splitlines()))
    assert "unclear_header" not in {warning.code for warning in found.warnings}


def test_where_nothing_tells_a_header_from_a_short_text_it_is_a_text_and_a_warning(write):
    path = write("card arrival\nlost my card\npin blocked\ntop up failed\n")
    assert warnings(path, labelled=False) == {"unclear_header": (1, (0,))}
    assert profile(path, UploadOptions(labelled=False)).n_rows == 4
    for said, n_rows in ((True, 3), (False, 4)):
        assert warnings(path, labelled=False, has_header=said) == {}
        assert profile(path, UploadOptions(labelled=False, has_header=said)).n_rows == n_rows


def test_where_a_short_first_row_over_texts_is_taken_for_names_a_warning_says_so(write):
    path = write(unlabelled("Refund please"))
    [doubt] = profile(path, UploadOptions(labelled=False)).warnings
    assert (doubt.code, "read as a header" in doubt.message) == ("unclear_header", True)
    assert warnings(path, labelled=False, has_header=True) == {}


@pytest.mark.parametrize(
    ("first", "cells"),
    [("unknown", ("+49 30 1234{i}",)), ("", ("{i}",)), ("unknown", ("T-{i}",)), ("Malta", ("Germany",))],
    ids=["a number", "no id", "an id", "a country"],
)
def test_a_statement_beside_a_cell_unlike_the_codes_below_is_a_row_and_a_question_a_header_and_both_a_warning(
    write, first, cells
):
    for text, has_header in (("I ordered my parcel. It is late.", False), ("Where is the parcel I ordered?", True)):
        content = unlabelled(first, text, cells=cells)
        path = write(content)
        found = profile(path, UploadOptions(labelled=False)).format
        assert (found.has_header, found.text_column) == (has_header, text if has_header else "column_1")
        assert warnings(path, labelled=False) == {"unclear_header": (1, (0,))}


def test_a_generated_name_that_a_model_learned_from_takes_no_header_from_other_files(write):
    path = write(unlabelled("id", "text"))
    found = profile(path, UploadOptions(labelled=False, usual_text="column_1"))
    assert (found.format.has_header, found.format.text_column, found.n_rows) == (True, "text", len(TEXTS))


@pytest.mark.parametrize("cell", ["1" * 999_998 + " x", "x" * 1_000_000, "-" * 999_999 + "x", "@" * 999_998 + " x"])
def test_a_cell_as_long_as_any_may_be_is_profiled_at_once(write, cell):
    """In the square of its length, it would take days."""
    assert profile(write(f"id,text\n1,hello\n{cell},bye\n"), UploadOptions(labelled=False)).n_rows == 2


def test_the_name_of_the_column_that_a_model_learned_from_is_a_header_whatever_stands_below(write):
    path = write("card arrival\nlost my card\npin blocked\n")
    found = profile(path, UploadOptions(labelled=False, usual_text="card arrival"))
    assert (found.format.text_column, found.n_rows, found.warnings) == ("card arrival", 2, ())


@given(
    st.lists(st.integers(0, 10**6), min_size=2, unique=True),
    st.sampled_from(["{}", "T-{}", "2026-01-01 {}", "user{}@firma.example"]),
    st.text("abc é", min_size=1).filter(str.strip),
)
def test_beside_ids_and_dates_no_row_is_lost_or_gained(tmp_path_factory, ids, pattern, text):
    path = tmp_path_factory.getbasetemp() / "ids.csv"
    rows = "".join(f'{pattern.format(i)};"{text * (i % 9)}"\n' for i in [*ids, 1])
    for first, has_header in (("", False), ("Nummer;Was der Kunde uns am Ende sagen wollte\n", True)):
        path.write_text(first + rows, encoding="utf-8")
        found = profile(path, UploadOptions(labelled=False))
        assert (found.format.has_header, found.n_rows) == (has_header, len(ids) + 1)


def test_a_column_that_is_named_and_found_in_the_first_row_makes_it_a_header(write):
    path = write(table(header="fee,refund"))
    found = profile(path, UploadOptions(text_column="fee"))
    assert (found.format.has_header, found.format.label_column) == (True, "refund")


def test_a_generated_name_says_that_there_is_no_header(write):
    path = write(table(header="text,label", each=4))
    refused(path, RareLabels, text_column="column_0")
    assert profile(write(table(header="hello,fee")), UploadOptions(text_column="column_0")).n_rows == 7


def test_a_column_is_matched_by_name_before_index(write):
    path = write("1,0\n" + "".join(f"{label},{label} {i}\n" for label in LABELS for i in range(3)))
    found = profile(path, UploadOptions(text_column="0", label_column="1", has_header=True))
    assert (found.format.text_column, found.format.label_column) == ("0", "1")
    unnamed = UploadOptions(text_column="column_1", label_column="0", has_header=False, rare_labels="drop")
    assert profile(path, unnamed).format.label_column == "column_0"


def test_header_names_lose_white_space_and_empty_ones_are_generated(write):
    rows = "".join(f"{label},{label} {i}\n" for label in LABELS for i in range(3))
    path = write("\ufeff, Text \n" + rows)
    found = profile(path, UploadOptions(label_column="column_0")).format
    assert (found.text_column, found.label_column, found.has_header) == ("Text", "column_0", True)


def test_several_plausible_label_columns_are_never_guessed(write):
    rows = "".join(f"{label} {i},{label},de\n" for label in LABELS for i in range(3))
    error = refused(write("text,one,two\n" + rows), ColumnNotFound)
    assert "one and two are equally plausible" in error.detail
    assert "label_column" in error.detail
    assert "equally plausible" in refused(write("text,label,category\n" + rows), ColumnNotFound).detail


def test_a_usual_name_goes_before_shape(write):
    rows = "".join(f"{label} {i},{label},de\n" for label in LABELS for i in range(3))
    found = profile(write("words,Intent,lang\n" + rows), UploadOptions())
    assert (found.format.text_column, found.format.label_column) == ("words", "Intent")


def test_numbers_are_not_taken_for_texts_whatever_their_column_is_called(write):
    rows = "".join(f"{label},{i:04},2026-01-{i:02},{label} is {i}\n" for i, label in enumerate(LABELS * 3, 1))
    assert profile(write("label,ticket,date,raw\n" + rows), UploadOptions()).format.text_column == "raw"
    dates = "".join(f"{i},2026-01-{i:02}T10:00:00Z,word{i}\n" for i in range(1, 7))
    named = UploadOptions(labelled=False, has_header=True)
    assert profile(write("id,created,note\n" + dates), named).format.text_column == "note"


@pytest.mark.parametrize("texts", ["😀 😃 😂 🥲 😎 🤖", "1200 99 7 555 8 12", "1+3=? 2-1=? 7*7=? 6/2=? 5-5=? 9*1=?"])
def test_where_nothing_else_is_left_texts_may_be_of_any_characters(write, texts):
    rows = "".join(f"{text},{label}\n" for text, label in zip(texts.split(), "aaabbb", strict=True))
    assert profile(write("text,label\n" + rows), UploadOptions()).format.text_column == "text"


def test_the_usual_column_of_texts_is_taken_where_the_file_has_it_and_no_other_is_named(write):
    rows = "".join(f"{label},{label} was {i},{label} is {i}\n" for i, label in enumerate(LABELS * 3, 1))
    path = write("label,text,raw\n" + rows)
    for options, column in (
        ({"usual_text": "raw"}, "raw"),
        ({"usual_text": "gone"}, "text"),
        ({"usual_text": "column_0"}, "text"),
        ({"usual_text": "raw", "text_column": "text"}, "text"),
    ):
        found = profile(path, UploadOptions(label_column="label", **options)).format
        assert (found.text_column, found.has_header) == (column, True)
    spaced = write('"grund ","bem"\nlieferung,spaet\nrechnung,falsch\n')
    assert profile(spaced, UploadOptions(labelled=False, usual_text="grund")).n_rows == 2
    empty = write("raw,text\n,c d e\n,h i j\n")
    assert profile(empty, UploadOptions(labelled=False, usual_text="raw")).format.text_column == "text"


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ("text\na b\nc d\n", {}),
        (table(), {"text_column": "body"}),
        (table(), {"label_column": "2"}),
        (table(), {"text_column": "label", "label_column": "1"}),
        ("text,note\na,b c\nd,e f\n", {}),
    ],
)
def test_a_column_that_is_not_there_is_refused_with_those_that_are(write, content, options):
    assert "text" in refused(write(content), ColumnNotFound, **options).detail


def test_a_column_count_of_one_asks_for_the_delimiter(write):
    assert "delimiter" in refused(write("text/label\na/x\nb/y\n"), ColumnNotFound).detail
    assert profile(write(table().replace(",", "/")), UploadOptions(delimiter="/")).format.delimiter == "/"


def test_columns_of_one_name_are_refused(write):
    assert "label" in refused(write("text,label,label\na,x,y\n"), DuplicateColumns).detail


# Refusals
@pytest.mark.parametrize(
    "content", ["", "\n\n", "text,label\n", "text,label\n\n", "what,else\n", "text,label\n,x\nb,\n"]
)
def test_a_table_without_usable_rows_is_refused(write, content):
    refused(write(content), NoRows, has_header=True)


def test_a_broken_file_is_told_before_a_missing_column(write):
    assert refused(write("text,bar\na,x\nb\n"), MalformedRows).errors[0]["row"] == 1
    assert refused(write(b"foo\nb\xff\n"), InvalidEncoding).errors
    assert refused(write('"te"xt,label\na,x\n'), MalformedRows, has_header=True).errors[0]["loc"] == ["header"]


def test_binary_files_and_unknown_encodings_are_refused_first(write):
    with pytest.raises(UnsupportedMedia):
        profile(write(b"PK\x03\x04" + b"\0" * 60), UploadOptions())
    refused(write(table()), InvalidEncoding, encoding="rot13")
    refused(write(table().encode("utf-16")), InvalidEncoding)
    assert profile(write(table().encode("utf-16")), UploadOptions(encoding="UTF-16")).format.encoding == "utf-16"


def test_fewer_than_two_labels_are_refused(write):
    refused(write("text,label\na,x\nb,x\nc,x\n"), TooFewLabels)
    refused(write("text,label\na,x\nb,x\nc,x\nd,y\n"), TooFewLabels, rare_labels="drop")


def test_more_labels_than_allowed_are_refused(write):
    rows = "".join(f"text {i},label {i // 3}\n" for i in range(33))
    assert "10" in refused(write("text,label\n" + rows), TooManyLabels, max_labels=10).detail
    assert len(profile(write("text,label\n" + rows), UploadOptions(max_labels=11)).labels) == 11


@pytest.mark.parametrize(
    ("label", "named"),
    [
        ('"two\nlines"', "line break"),
        ("two\u2028lines", "line break"),
        ("re\u200bfund", r"'re\u200bfund' looks like 'refund'"),
        ("ｒefund", r"'\uff52efund' looks like 'refund'"),
        ("refund\ufe0f", "looks like"),
        ("\u200b", "nothing visible"),
    ],
)
def test_a_label_that_cannot_be_told_apart_is_refused_with_its_rows(write, label, named):
    error = refused(write(table(f"a,{label}", "b,fee", f"c,{label}")), InvalidLabels)
    assert named in error.detail
    assert [entry["row"] for entry in error.errors] == [6, 8]


def test_emoji_and_scripts_are_labels_like_others(write):
    rows = "".join(f"text {label} {i},{label}\n" for label in ("👍", "👎", "退款", "a\tb", "a b") for i in range(3))
    assert len(profile(write("text,label\n" + rows), UploadOptions()).labels) == 5


def test_labels_with_too_few_distinct_texts_are_refused_by_name_or_dropped(write):
    path = write(table("A b,rare", "a  B ,rare", "c,rare"))
    error = refused(path, RareLabels)
    assert "rare (2)" in error.detail
    assert "rare_labels=drop" in error.detail

    found = profile(path, UploadOptions(rare_labels="drop"))
    assert found.format.dropped_labels == ("rare",)
    assert [label.label for label in found.labels] == ["fee", "refund"]
    assert warnings(path, rare_labels="drop") == {"rare_label_dropped": (3, (6, 7, 8))}


def test_a_column_of_ids_in_the_place_of_labels_is_told(write):
    ids = write("ticket_id,text\n" + "".join(f"T{i},text {i}\n" for i in range(40)))
    said = "nearly every row has a label of its own (40 labels in 40 rows): this looks like a column of ids"
    assert said in refused(ids, RareLabels, label_column="ticket_id").detail
    said = "nearly every row has one of its own: this looks like a column of ids"
    assert said in refused(ids, TooManyLabels, label_column="ticket_id", max_labels=20).detail
    many = write("label,text\n" + "".join(f"L{i % 21},text {i}\n" for i in range(20)) + "L0,x\n" * 40 + "L20,y\n")
    assert "ids" not in refused(many, TooManyLabels, max_labels=20).detail


def test_at_most_twenty_rare_labels_are_named(write):
    error = refused(write(table(*(f"text,label {i}" for i in range(30)))), RareLabels)
    assert "found 30" in error.detail
    assert "label 19" in error.detail
    assert "label 20" not in error.detail


# The file's own split
def with_split(*parts: str) -> str:
    rows = "".join(f"{label} {part} {i},{label},{part}\n" for label in LABELS for i, part in enumerate(parts))
    return "text,label,part\n" + rows


def test_the_files_own_split_is_read_by_its_usual_names(write):
    path = write(with_split("Train", "train ", "VAL", "dev", "validation", "test"))
    found = profile(path, UploadOptions(split_column="part"))
    frame = read_frame(path, found.format)
    assert frame["split"].tolist()[:6] == ["train", "train", "validation", "validation", "validation", "test"]


def test_a_split_column_is_never_inferred(write):
    path = write(with_split("train", "train", "test").replace("part\n", "split\n"))
    assert profile(path, UploadOptions()).format.split_column is None


def test_unknown_parts_are_refused_with_their_rows(write):
    error = refused(write(with_split("train", "holdout", "test", "")), InvalidSplit, split_column="part")
    assert [entry["row"] for entry in error.errors] == [1, 3, 5, 7]
    assert "holdout" in error.errors[0]["message"]


@pytest.mark.parametrize("missing", ["train", "test"])
def test_a_split_without_train_or_test_rows_is_refused(write, missing):
    parts = [part for part in ("train", "train", "validation", "test", "test") if part != missing]
    assert f"none of {missing}" in refused(write(with_split(*parts)), InvalidSplit, split_column="part").detail


def test_rare_labels_are_rare_in_a_split_file_too(write):
    refused(write(with_split("train", "test")), RareLabels, split_column="part")


def test_a_text_in_two_parts_of_the_files_own_split_is_warned_of(write):
    path = write(with_split("train", "train", "test") + "Refund TRAIN 0,refund,test\n")
    assert warnings(path, split_column="part") == {"duplicate_text": (1, (6,)), "duplicate_across_split": (2, (0, 6))}


# Warnings
def test_a_sound_table_brings_no_warning(write):
    assert warnings(write(table())) == {}


def test_repeated_texts_are_counted_from_the_second_on(write):
    assert warnings(write(table("Refund  NUMBER 0,refund", "refund number 0,refund"))) == {
        "duplicate_text": (2, (6, 7))
    }


def test_one_text_with_two_labels_is_warned_of_and_stays_usable(write):
    path = write(table("refund number 0,fee"))
    assert warnings(path) == {"duplicate_text": (1, (6,)), "conflicting_labels": (2, (0, 6))}
    assert profile(path, UploadOptions()).n_usable_rows == 7


def test_empty_texts_and_labels_are_warned_of_and_not_used(write):
    path = write(table("  ,fee", "x, ", ","))
    assert warnings(path) == {"empty_text": (2, (6, 8)), "empty_label": (2, (7, 8))}


def test_labels_that_differ_in_case_or_white_space_are_warned_of(write):
    path = write(table("a,Refund", "b,Refund", "c,Refund"))
    assert warnings(path) == {"label_variants": (6, (0, 1, 2, 6, 7, 8))}


def test_a_label_outnumbered_more_than_ten_times_is_warned_of(write):
    def rows(n):
        return table(*(f"more {i},fee" for i in range(n)))

    assert warnings(write(rows(27))) == {}
    assert warnings(write(rows(28))) == {"imbalanced": (3, (0, 1, 2))}


def test_literal_quotes_are_warned_of_with_their_rows(write):
    path = write(table('"hi" there,fee').replace(",", "\t"))
    assert warnings(path) == {"literal_quotes": (1, (6,))}
    assert rows_of(path)[-1].text == '"hi" there'


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "A ", "b", "c", "d", ""]), st.sampled_from(["x", "y", "z", ""])), max_size=40
    )
)
def test_figures_and_warnings_agree_with_plain_counting(tmp_path_factory, pairs):
    usable = [i for i, (text, label) in enumerate(pairs) if text and label]
    texts = defaultdict(set)
    for i in usable:
        texts[pairs[i][1]].add(fold(pairs[i][0]))
    kept = {label for label, distinct in texts.items() if len(distinct) >= 3}
    path = tmp_path_factory.getbasetemp() / "pairs.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in pairs))
    if len(kept) < 2:
        with pytest.raises((NoRows, TooFewLabels)):
            profile(path, UploadOptions(rare_labels="drop"))
        return

    found = profile(path, UploadOptions(rare_labels="drop"))
    warned = {warning.code: warning.count for warning in found.warnings}
    used = [(fold(pairs[i][0]), pairs[i][1]) for i in usable if pairs[i][1] in kept]
    counts = Counter(label for _, label in used)
    labels_of = defaultdict(set)
    for text, label in used:
        labels_of[text].add(label)
    assert (found.n_rows, found.n_usable_rows) == (len(pairs), len(used))
    assert {label.label: label.count for label in found.labels} == counts
    assert warned.get("duplicate_text", 0) == len(used) - len(labels_of)
    assert warned.get("conflicting_labels", 0) == sum(len(labels_of[text]) > 1 for text, _ in used)
    assert warned.get("rare_label_dropped", 0) == len(usable) - len(used)


def test_at_most_twenty_rows_are_listed(write):
    assert warnings(write(table(*["again,fee"] * 40)))["duplicate_text"] == (39, tuple(range(7, 27)))


# Anything at all
@given(
    st.binary(max_size=60) | st.text(st.sampled_from('ab,;\t"\n\r \x00é'), max_size=60).map(str.encode),
    st.booleans(),
    st.sampled_from([None, True, False]),
    st.sampled_from([None, "utf-8", "utf-16", "cp1252", "shift_jis", "utf-7"]),
)
def test_any_bytes_make_a_profile_or_an_error_that_json_can_hold(tmp_path_factory, content, labelled, header, encoding):
    path = tmp_path_factory.getbasetemp() / "anything"
    path.write_bytes(content)
    options = UploadOptions(labelled=labelled, has_header=header, encoding=encoding, rare_labels="drop")
    try:
        found = profile(path, options)
    except AppError as error:
        json.dumps([error.detail, error.errors], ensure_ascii=False).encode()
    else:
        frame = read_frame(path, found.format)
        assert (~frame["dropped"]).sum() == found.n_usable_rows
        assert sum(1 for _ in read_rows(path, found.format)) == found.n_rows


# Weight
def test_profiling_imports_neither_torch_nor_pandas(write):
    code = (
        "import sys; from pathlib import Path; from service.ml.dataset import *; "
        "profile(Path(sys.argv[1]), UploadOptions()); sys.exit(bool({'torch', 'pandas'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(write(table()))], cwd=root, check=True)
