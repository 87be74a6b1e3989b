"""`/datasets`: what is taken, what is refused and how, and that the service goes on after every refusal."""

import gzip
import hashlib
import io
import random
import socket
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.integration.conftest import listening, make_app
from tests.problems import problem_of
from tests.rows import add_dataset

Start = Callable[..., TestClient]
HEADER = "text,label\n"


def table(labels: dict[str, int], header: str = HEADER) -> bytes:
    """So many rows of each label, every text another."""
    rows = [f"a text about {label} {i},{label}\n" for label, n in labels.items() for i in range(n)]
    return (header + "".join(rows)).encode()


GOOD = table({"refund": 5, "fee": 4})


def upload(client: Any, content: bytes, filename: str = "tickets.csv", **form: str) -> Any:
    return client.post("/datasets", files={"file": (filename, content)}, data=form)


@pytest.fixture
def client(shared: TestClient) -> Iterator[TestClient]:
    """After every test, whatever it sent, an upload still works."""
    yield shared
    assert upload(shared, GOOD).status_code == 201


# What is taken ------------------------------------------------------------------------------------
def test_an_upload_is_answered_with_its_profile(client: TestClient) -> None:
    answer = upload(client, GOOD, filename="Tickets 2026.csv")
    assert answer.status_code == 201
    body = answer.json()
    assert body.pop("id").startswith("ds_")
    assert body.pop("created_at").endswith(("Z", "+00:00"))
    assert body.pop("warnings") == []
    assert set(body.pop("inferred")) == {"text_column", "label_column", "delimiter", "has_header"}
    assert body == {
        "name": "Tickets 2026", "sha256": hashlib.sha256(GOOD).hexdigest(), "size_bytes": len(GOOD), "n_rows": 9,
        "n_usable_rows": 9, "text_column": "text", "label_column": "label", "split_column": None, "delimiter": ",",
        "has_header": True, "encoding": "utf-8", "columns": ["text", "label"],
        "labels": [{"label": "fee", "count": 4}, {"label": "refund", "count": 5}],
        "text_length": {"p50_chars": 21, "p95_chars": 21, "max_chars": 21} | {
            "p50_chars": len("a text about refund 0"), "p95_chars": len("a text about refund 0")},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\x\\t.csv", "t"),
        ("a\u202eb.csv", "ab"),
        (".csv", ".csv"),
        ("x" * 300, "x" * 200),
    ],
)
def test_a_files_name_is_only_ever_shown(client: TestClient, filename: str, name: str) -> None:
    assert upload(client, GOOD, filename).json()["name"] == name


def test_a_page_is_told_the_columns_to_choose_from(client: TestClient) -> None:
    """Also where none was recognised, or the one asked for is not there."""
    content = b"when;note;who;\xc3\xa4\n" + b"".join(b"2026-03-%02d;n%d;w%d;u%d\n" % (i, i, i, i) for i in range(1, 9))
    columns = ["when", "note", "who", "\u00e4"]
    for form in ({}, {"label_column": "topic"}, {"text_column": "9"}, {"text_column": "note", "label_column": "1"}):
        body = problem_of(upload(client, content, has_header="true", **form), 422, "column_not_found")
        assert body["columns"] == columns, form
    chosen = {"text_column": "note", "labelled": "false"}
    dataset = upload(client, content, **chosen).json()
    assert dataset["columns"] == columns
    assert client.get(f"/datasets/{dataset['id']}").json()["columns"] == columns
    spec_too = client.post(
        "/jobs", files={"file": ("a.csv", content)}, data={"label_column": "topic", "has_header": "true"}
    )
    assert problem_of(spec_too, 422, "column_not_found")["columns"] == columns


def test_a_refusal_that_another_column_may_mend_tells_the_columns(client: TestClient) -> None:
    rows = "text,status,kind\n" + "".join(f"some words {i},open,{'ab'[i % 2]}\n" for i in range(12))
    body = problem_of(upload(client, rows, label_column="status"), 422, "too_few_labels")
    assert body["columns"] == ["text", "status", "kind"]
    assert "at least 2 labels in column status, found 1" in body["detail"]


def test_what_is_no_text_or_empty_is_said_so_first(client: TestClient) -> None:
    noise = random.Random(0).randbytes(5000)
    body = problem_of(upload(client, noise), 422, "invalid_encoding")
    assert body["detail"].startswith("This does not look like a text file in utf-8. Bad rows: ")
    german = "".join(f"wo bleibt das Päckchen {i},{'ab'[i % 2]}\n" for i in range(12)).encode("cp1252")
    assert problem_of(upload(client, german), 422, "invalid_encoding")["detail"].startswith("Bad rows: 12. ")
    assert problem_of(upload(client, b""), 422, "no_rows")["detail"].startswith("The file is empty")


def test_columns_have_names_where_the_file_gives_none_and_are_not_told_without_end(client: TestClient) -> None:
    rows = b"".join(b"some words %d,%s\n" % (i, b"ab"[i % 2 : i % 2 + 1]) for i in range(12))
    assert upload(client, rows).json()["columns"] == ["column_0", "column_1"]
    wide = b",".join(b"c%d" % i for i in range(1200)) + b"\n" + b",".join([b"x"] * 1200) + b"\n"
    body = problem_of(upload(client, wide, text_column="nowhere", has_header="true"), 422, "column_not_found")
    assert body["columns"] == [f"c{i}" for i in range(1000)]


def test_a_dataset_of_before_columns_were_kept_has_none_to_tell(client: TestClient) -> None:
    dataset_id = add_dataset(client.app.state.context.db)  # type: ignore[attr-defined]
    assert client.get(f"/datasets/{dataset_id}").json()["columns"] == []


def test_given_columns_and_names_are_used(client: TestClient) -> None:
    content = b"a;b;c\n" + b"".join(b"%d;text %d;%s\n" % (i, i, b"xy"[i % 2 : i % 2 + 1]) for i in range(8))
    body = upload(client, content, name="t", text_column="1", label_column="c", delimiter=";", has_header="true").json()
    assert (body["text_column"], body["label_column"], body["inferred"]) == ("b", "c", [])
    assert upload(client, GOOD, name="x", text_column="", encoding="").status_code == 201  # empty counts as left out
    assert upload(client, GOOD, name="mine").json()["name"] == "mine"


def test_a_dataset_without_labels_is_taken_when_it_says_so(client: TestClient) -> None:
    body = upload(client, b"text\nhello there\ngood day\n", labelled="false").json()
    assert (body["labels"], body["n_usable_rows"]) == ([], 2)


def test_bad_spots_that_leave_the_file_usable_are_warnings(client: TestClient) -> None:
    content = (
        GOOD
        + b"a text about refund 0,fee\n,fee\nno label here,\nA text  about FEE 1,fee\nanother,Fee\nmore,Fee\nlast,Fee\n"
    )
    body = upload(client, content).json()
    warnings = {warning["code"]: warning for warning in body["warnings"]}
    assert set(warnings) == {"conflicting_labels", "duplicate_text", "empty_text", "empty_label", "label_variants"}
    assert warnings["empty_text"]["rows"] == [10]
    assert warnings["empty_label"]["rows"] == [11]
    assert warnings["conflicting_labels"]["rows"] == [0, 9]
    assert body["n_usable_rows"] == body["n_rows"] - 2 == 14


def test_a_byte_order_mark_and_an_encoding_that_was_named_are_read(client: TestClient) -> None:
    text = GOOD.decode().replace("refund", "Rückgabe")
    for content, form, encoding in (
        (b"\xef\xbb\xbf" + text.encode(), {}, "utf-8"),
        (text.encode("utf-16"), {"encoding": "utf-16"}, "utf-16"),
        (text.encode("cp1252"), {"encoding": "cp1252"}, "cp1252"),
    ):
        body = upload(client, content, **form).json()
        assert (body["encoding"], body["text_column"]) == (encoding, "text")
        assert {label["label"] for label in body["labels"]} == {"fee", "Rückgabe"}


# What is refused ----------------------------------------------------------------------------------
def zipped(member: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(member, GOOD)
    return packed.getvalue()


MEDIA = {
    "a gzip archive": gzip.compress(GOOD),
    "a zip archive": zipped("tickets.csv"),
    "xlsx": zipped("xl/workbook.xml"),
    "a parquet file": b"PAR1" + bytes(40),
    "a PNG image": b"\x89PNG\r\n\x1a\n" + bytes(40),
    "a PDF": b"%PDF-1.7\n",
}


@pytest.mark.parametrize("kind", MEDIA)
def test_what_is_not_text_is_415_and_named(client: TestClient, kind: str) -> None:
    assert kind in problem_of(upload(client, MEDIA[kind]), 415, "unsupported_media_type")["detail"]


ROWS = {
    "NUL bytes": (GOOD + b"a \x00 text,fee\n", "malformed_rows", [9]),
    "another control character": (GOOD + b"fine,fee\na \x1b text,fee\n", "malformed_rows", [10]),
    "DEL": (GOOD + b"a \x7f text,fee\n", "malformed_rows", [9]),
    "latin-1 bytes": (GOOD + b"caf\xe9,fee\n", "invalid_encoding", [9]),
    "an unclosed quote": (GOOD + b'"never closed,fee\nmore,fee\n', "malformed_rows", [9]),
    "text after a closing quote": (GOOD + b'"a" b,fee\n', "malformed_rows", [9]),
    "ragged rows": (GOOD + b"one\na,b,c\nfine,fee\n", "malformed_rows", [9, 10]),
    "a label with a line break": (GOOD + b'hello,"fe\ne"\n', "invalid_labels", [9]),
    "labels that look the same": (GOOD + "hello,fe\u200be\n".encode(), "invalid_labels", [9]),
    "labels equal after NFKC": (GOOD + "hello,\uff46ee\n".encode(), "invalid_labels", [9]),
}


@pytest.mark.parametrize("what", ROWS)
def test_bad_rows_are_422_and_listed(client: TestClient, what: str) -> None:
    content, code, rows = ROWS[what]
    body = problem_of(upload(client, content), 422, code)
    assert [entry["row"] for entry in body["errors"]] == rows


def test_of_many_bad_rows_the_first_fifty_are_listed_and_all_are_counted(client: TestClient) -> None:
    body = problem_of(upload(client, GOOD + b"one\n" * 70), 422, "malformed_rows")
    assert [entry["row"] for entry in body["errors"]] == list(range(9, 59))
    assert "70" in body["detail"]


WHOLE: dict[str, tuple[bytes, dict[str, str], str, str]] = {
    "a UTF-16 mark": (GOOD.decode().encode("utf-16"), {}, "invalid_encoding", "encoding=utf-16"),
    "an unknown encoding": (GOOD, {"encoding": "klingon"}, "invalid_encoding", "klingon"),
    "an encoding that is none of text": (GOOD, {"encoding": "rot13"}, "invalid_encoding", "rot13"),
    "a duplicate column": (b"text,text,label\na,b,c\n", {}, "duplicate_columns", "text"),
    "nothing": (b"", {}, "no_rows", "rows"),
    "white space": (b" \n\n \n", {}, "no_rows", "rows"),
    "a header alone": (HEADER.encode(), {}, "no_rows", "header"),
    "rows without any text": (HEADER.encode() + b" ,a\n ,b\n", {}, "no_rows", "text"),
    "one label": (table({"fee": 9}), {}, "too_few_labels", "2 labels"),
    "too many labels": (table({f"label {i}": 3 for i in range(21)}), {}, "too_many_labels", "20"),
    "a rare label": (GOOD + b"hello,refnud\nyou,refnud\n", {}, "rare_labels", "refnud"),
    "only rare labels": (table({"a": 2, "b": 2, "c": 9}), {"rare_labels": "drop"}, "too_few_labels", "a"),
    "a column that is not there": (GOOD, {"label_column": "topic"}, "column_not_found", "label"),
    "a column beyond the last": (GOOD, {"text_column": "7"}, "column_not_found", "text"),
    "the same column twice": (GOOD, {"text_column": "text", "label_column": "text"}, "column_not_found", "different"),
    "no label column": (
        b"text\n" + b"".join(b"words of row %d\n" % i for i in range(9)),
        {},
        "column_not_found",
        "text",
    ),
    "a split of other names": (
        b"text,label,part\n" + b"".join(b"t%d,%s,x\n" % (i, b"ab"[i % 2 : i % 2 + 1]) for i in range(8)),
        {"split_column": "part"},
        "invalid_split",
        "part",
    ),
    "a delimiter of two characters": (GOOD, {"delimiter": "||"}, "invalid_data", "one character"),
}


@pytest.mark.parametrize("what", WHOLE)
def test_an_unusable_table_is_422_and_says_why(client: TestClient, what: str) -> None:
    content, form, code, word = WHOLE[what]
    assert word in problem_of(upload(client, content, **form), 422, code)["detail"]


def test_rare_labels_are_dropped_when_asked_and_said_so(client: TestClient) -> None:
    body = upload(client, GOOD + b"hello,refnud\nyou,refnud\n", rare_labels="drop").json()
    assert {label["label"] for label in body["labels"]} == {"fee", "refund"}
    [warning] = body["warnings"]
    assert (warning["code"], warning["count"], warning["rows"]) == ("rare_label_dropped", 2, [9, 10])
    assert body["n_usable_rows"] == 9


@pytest.mark.parametrize(
    ("form", "field"),
    [
        ({"rare_labels": "keep"}, "rare_labels"),
        ({"labelled": "perhaps"}, "labelled"),
        ({"has_header": "2"}, "has_header"),
        ({"name": "x" * 201}, "name"),
        ({"lable_column": "x"}, "lable_column"),
        ({"delimiter": "x" * 11}, "delimiter"),
    ],
)
def test_a_wrong_form_field_is_422_and_named(client: TestClient, form: dict[str, str], field: str) -> None:
    body = problem_of(upload(client, GOOD, **form), 422, "invalid_input")
    assert [entry["loc"] for entry in body["errors"]] == [[field]]


BOUNDARY = {"content-type": "multipart/form-data; boundary=x"}
BODIES: dict[str, dict[str, Any]] = {
    "no body": {},
    "JSON": {"json": {"file": "x"}},
    "a form that is not multipart": {"data": {"file": "x"}},
    "no file": {"files": {"name": (None, "x")}},
    "the file as text": {"files": {"file": (None, "text,label")}},
    "two files": {"files": [("file", ("a.csv", GOOD)), ("file", ("b.csv", GOOD))]},
    "a file of another name": {"files": {"data": ("a.csv", GOOD)}},
    "no boundary": {"content": b"hello", "headers": {"content-type": "multipart/form-data"}},
    "a body that is not multipart": {"content": b"hello", "headers": BOUNDARY},
    "a multipart body cut short": {"content": b'--x\r\nContent-Disposition: form-data; name="fi', "headers": BOUNDARY},
    "a field of 2 MiB": {"files": {"file": ("a.csv", GOOD), "name": (None, "x" * (2 << 20))}},
    "a lone surrogate by a charset": {
        "content": b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\n\\ud800\r\n--x\r\n'
        b'Content-Disposition: form-data; name="file"; filename="\\ud800"\r\n\r\n' + GOOD + b"\r\n--x--\r\n",
        "headers": {"content-type": "multipart/form-data; charset=raw_unicode_escape; boundary=x"},
    },
}


@pytest.mark.parametrize("what", BODIES)
def test_a_body_that_is_no_upload_is_refused_without_breaking_anything(client: TestClient, what: str) -> None:
    answer = client.post("/datasets", **BODIES[what])
    if what == "a field of 2 MiB":
        assert answer.status_code in (413, 422)
        problem_of(answer, answer.status_code, answer.json()["code"])
    else:
        problem_of(answer, 422, "invalid_input")


@pytest.mark.parametrize("size", [300_001, 2_000_000], ids=["past the limit for files", "past the limit for bodies"])
def test_a_file_that_is_too_large_is_413(client: TestClient, size: int) -> None:
    body = problem_of(upload(client, HEADER.encode() + b"x" * size), 413, "too_large")
    assert "TUNEPROOF_MAX_UPLOAD_BYTES" in body["detail"]


def test_a_length_that_python_makes_no_number_of_is_too_large(client: TestClient) -> None:
    answer = client.post("/datasets", content=b"x", headers=BOUNDARY | {"content-length": "9" * 5000})
    problem_of(answer, 413, "too_large")


def sent_alone(url: str, head: bytes) -> bytes:
    """What is answered to these bytes and no more."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as connection:
        connection.sendall(head)
        return connection.recv(1 << 16)


def test_over_a_socket_too_large_is_413_declared_or_chunked_and_the_next_upload_works(tmp_path: Any) -> None:
    with listening(make_app(tmp_path / "data", max_upload_bytes=100_000)) as url, httpx.Client(base_url=url) as client:
        # Only the head is sent: the refusal must not wait for a terabyte.
        assert b" 413 " in sent_alone(url, b"POST /datasets HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000000\r\n"
                                      b"Content-Type: multipart/form-data; boundary=x\r\n\r\n")  # fmt: skip
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n'

        def chunks() -> Iterator[bytes]:
            yield head
            for _ in range(60):
                yield b"x" * 50_000

        answer = client.post("/datasets", content=chunks(), headers=BOUNDARY)
        problem_of(answer, 413, "too_large")
        assert upload(client, GOOD).status_code == 201
        assert list((tmp_path / "data" / "tmp").iterdir()) == []


def test_low_disk_refuses_uploads_and_jobs_with_507_and_lets_the_rest_be_read(start: Start) -> None:
    client = start(min_free_bytes=1 << 60)
    for answer in (upload(client, GOOD), client.post("/jobs", json={"dataset_id": "ds_0"}),
                   client.post("/jobs", files={"file": GOOD})):  # fmt: skip
        assert "TUNEPROOF_MIN_FREE_BYTES" in problem_of(answer, 507, "low_disk")["detail"]
    assert client.get("/datasets").json() == {"data": [], "has_more": False}


def test_a_refused_upload_leaves_no_bytes_behind(start: Start, tmp_path: Any) -> None:
    client = start()
    for content in (b"", MEDIA["a PNG image"], table({"fee": 9}), GOOD + b"one\n"):
        assert upload(client, content).status_code in (415, 422)
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file() and "tuneproof.db" not in path.name
            and path.suffix != ".lock"] == []  # fmt: skip


# Reading and deleting -----------------------------------------------------------------------------
def test_a_dataset_is_got_previewed_and_deleted(start: Start, tmp_path: Any) -> None:
    client = start(delete_grace_seconds=0)
    made = upload(client, GOOD).json()
    assert client.get(f"/datasets/{made['id']}").json() == made
    rows = client.get(f"/datasets/{made['id']}/rows").json()
    assert rows["has_more"] is False
    assert rows["data"][0] == {"row_id": 0, "text": "a text about refund 0", "label": "refund"}
    assert len(rows["data"]) == 9
    page = client.get(f"/datasets/{made['id']}/rows?offset=7&limit=1").json()
    assert (page["has_more"], [row["row_id"] for row in page["data"]]) == (True, [7])
    assert client.get(f"/datasets/{made['id']}/rows?offset=9").json() == {"data": [], "has_more": False}
    answer = client.delete(f"/datasets/{made['id']}")
    assert (answer.status_code, answer.content) == (204, b"")
    for path in ("", "/rows"):
        problem_of(client.get(f"/datasets/{made['id']}{path}"), 404, "not_found")
    problem_of(client.delete(f"/datasets/{made['id']}"), 404, "not_found")


def test_the_list_is_newest_first_and_goes_on_after_an_id(start: Start) -> None:
    client = start()
    made = [upload(client, GOOD, filename=f"{i}.csv").json()["id"] for i in range(3)]
    page = client.get("/datasets?limit=2").json()
    assert ([row["id"] for row in page["data"]], page["has_more"]) == ([made[2], made[1]], True)
    page = client.get(f"/datasets?limit=2&after={made[1]}").json()
    assert ([row["id"] for row in page["data"]], page["has_more"]) == ([made[0]], False)


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=201",
        "limit=x",
        "limit=",
        "limit=1e1",
        f"limit={2**63}",
        f"limit={'9' * 5000}",
        "after=x",
        "after=",
        "after=job_0",
        "after=ds_",
        "after=ds_" + "0" * 61,
        "after=ds_0%0A",
        "after=ds_%00",
        "after=%ED%A0%80",
    ],
)
def test_a_list_with_a_wrong_limit_or_after_is_422(client: TestClient, query: str) -> None:
    body = problem_of(client.get(f"/datasets?{query}"), 422, "invalid_input")
    assert body["errors"][0]["loc"] == ["query", query.partition("=")[0]]


@pytest.mark.parametrize("query", ["offset=-1", f"offset={2**63}", "limit=0", "limit=201", "offset=nan"])
def test_a_preview_out_of_range_is_422(client: TestClient, query: str) -> None:
    problem_of(client.get(f"/datasets/ds_0/rows?{query}"), 422, "invalid_input")


@pytest.mark.parametrize("dataset_id", ["ds_0", "x", "%00", "%2e%2e%2fx", "a" * 5000, "%F0%9F%98%80", "%ED%A0%80"])
def test_what_is_not_there_is_404(client: TestClient, dataset_id: str) -> None:
    problem_of(client.get(f"/datasets/{dataset_id}"), 404, "not_found")
