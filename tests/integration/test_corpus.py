"""Every input that docs/inputs.md names gets the answer that stands beside it there, and its table names every case."""

import gzip
import http.client
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from service.core.errors import AppError
from service.inference import handle
from service.inference.adapters import Adapters
from service.inference.handle import Scores
from service.inference.wire import Figures, ServedModel
from service.ml.backbone import load_backbone
from service.ml.base_models import find_base, locate
from service.storage import Storage
from tests.adapters import labels, manifest, save_random_adapter
from tests.documents import ROOT
from tests.integration.conftest import QuietEngine, api, listening, make_app
from tests.integration.test_api_datasets import BOUNDARY, GOOD, HEADER, table, upload, zipped
from tests.problems import problem_of
from tests.rows import GRACE, START, add_job, add_published, claim, model, publish_stored
from tests.storing import put_folder
from tests.tiny import save_bert

PAGE = (ROOT / "docs" / "inputs.md").read_text("utf-8")
ROW = re.compile(r"^\| (.+) \| (\d{3}|job) \| (?:`(\w+)`|—) \|$", re.MULTILINE)
TOLD = {what: (status, code) for what, status, code in ROW.findall(PAGE)}
DEEP = 100_000
HUGE = 2**63
PICKLE = pickle.dumps({"weight": [1.0]})


class Served(NamedTuple):
    """The service in this process, with a dataset, a job that has ended and its model; and one behind a socket.

    The latter takes uploads of 100,000 bytes, so that what is too large can be small.
    """

    client: TestClient
    dataset: str
    job: str
    model: str
    url: str
    job_there: str

    def raw(self, method: str, path: str, body: bytes = b"", **headers: str) -> httpx.Response:
        """As the bytes are: no client tidies the path up."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=20)
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(body or None)
        answer = connection.getresponse()
        return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())


Answer = httpx.Response | list[httpx.Response]
Case = Callable[[Served], Answer]


def file(content: bytes, filename: str = "tickets.csv", **form: str) -> Case:
    return lambda served: upload(served.client, content, filename, **form)


def form(**sent: Any) -> Case:
    return lambda served: served.client.post("/datasets", **sent)


def job(**spec: Any) -> Case:
    """As JSON text: what Python reads as a number beyond JSON is written as it writes that."""
    return lambda served: posted(served, "/jobs", json.dumps({"dataset_id": served.dataset} | spec))


def predict(**body: Any) -> Case:
    return lambda served: posted(served, "/predict", json.dumps({"model": served.model, "text": "hello"} | body))


def posted(served: Served, path: str, body: str | bytes, kind: str = "application/json") -> httpx.Response:
    return served.client.post(path, content=body, headers={"content-type": kind})


def get(path: str, **headers: str) -> Case:
    """`path` may name `{dataset}`, `{job}` and `{model}`."""
    return lambda served: served.client.get(
        path.format(**served._asdict()), headers={name.replace("_", "-"): value for name, value in headers.items()}
    )


def declared(served: Served) -> httpx.Response:
    """The head alone: the answer must not wait for what was announced."""
    return served.raw("POST", "/datasets", Content_Length=str(3 * 10**9), Content_Type=BOUNDARY["content-type"])


def chunked(served: Served) -> httpx.Response:
    def chunks() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n'
        for _ in range(60):
            yield b"x" * 50_000

    return httpx.post(f"{served.url}/datasets", content=chunks(), headers=BOUNDARY)


def paths(name: str, *, aliases: bool) -> Case:
    """`name` in each place of each route's path, over a socket; of the aliases alone, or of all others alone."""

    def send(served: Served) -> list[httpx.Response]:
        answers = []
        for route, methods in served.client.get("/openapi.json").json()["paths"].items():
            for place in re.findall(r"\{(\w+)\}", route):
                if (place == "alias") is aliases:
                    known = {"job_id": served.job_there, "name": "metrics.json"} | {place: name}
                    path = route.format_map(known) + ("?model_id=x" if route.endswith("/gate") else "")
                    body = b'{"model_id":"x"}' if "put" in methods else b""
                    answers += [
                        served.raw(method.upper(), path, body, Content_Type="application/json") for method in methods
                    ]
        assert len(answers) > 3
        return answers

    return send


HEAD_OF_A_PART = b"--x\r\nContent-Disposition: form-data; name="
ONE_PART = HEAD_OF_A_PART + b'"file"; filename="a.csv"\r\n\r\n' + GOOD + b"\r\n--x"


def multipart(body: bytes) -> Case:
    return form(content=body, headers=BOUNDARY)


def with_header(name: str, value: str) -> Case:
    return lambda served: served.client.post(
        "/datasets", files={"file": GOOD}, headers={name.encode(): value.encode("latin-1")}
    )


CASES: dict[str, Case] = {
    # Uploads
    "a length of 3 GB that is declared, and nothing sent": declared,
    "a chunked body that goes on past the limit": chunked,
    "gzip": file(gzip.compress(GOOD)),
    "zip": file(zipped("tickets.csv")),
    "xlsx": file(zipped("xl/workbook.xml")),
    "a pickle": file(PICKLE),
    "a NUL byte in a cell": file(GOOD + b"a \x00 text,fee\n"),
    "UTF-16 with its byte-order mark": file(GOOD.decode().encode("utf-16")),
    "UTF-16 with `encoding=utf-16`": file(GOOD.decode().encode("utf-16"), encoding="utf-16"),
    "latin-1 bytes": file(GOOD + b"caf\xe9,fee\n"),
    "an encoding that nobody knows": file(GOOD, encoding="klingon"),
    "a quote that is never closed": file(GOOD + b'"never closed,fee\nmore,fee\n'),
    "one cell of two million characters": file(GOOD + b"x" * 2_000_000 + b",fee\n"),
    "rows of too few and of too many cells": file(GOOD + b"one\na,b,c\n"),
    "a header that names a column twice": file(b"text,text,label\na,b,c\n"),
    "one label only": file(table({"fee": 9})),
    "20,000 labels": file(HEADER.encode() + b"".join(b"t%d,l%d\n" % (i, i) for i in range(20_000))),
    "a label with a line break": file(GOOD + b'hello,"fe\ne"\n'),
    "two labels that differ in a zero-width character": file(GOOD + "hello,fe\u200be\n".encode()),
    "an empty file": file(b""),
    "a header and nothing below": file(HEADER.encode()),
    "a file called `../../etc/passwd`": file(GOOD, filename="../../etc/passwd"),
    "multipart without a file": form(files={"name": (None, "x")}),
    "two files": form(files=[("file", ("a.csv", GOOD)), ("file", ("b.csv", GOOD))]),
    "an unknown form field": file(GOOD, lable_column="x"),
    "a form field of 2 MiB": file(GOOD, name="x" * (2 << 20)),
    "a thousand form fields": form(files={"file": GOOD}, data={f"field-{i}": "x" for i in range(1000)}),
    "multipart that breaks off": multipart(ONE_PART[:40]),
    "multipart without a boundary": form(content=ONE_PART, headers={"content-type": "multipart/form-data"}),
    "multipart whose text is no UTF-8": multipart(
        HEAD_OF_A_PART + b'"name"\r\n\r\n\xff\xfe\r\n' + ONE_PART + b"--\r\n"
    ),
    "the CSV itself as the body": form(content=GOOD, headers={"content-type": "text/csv"}),
    "no body": form(),
    # JSON
    "`NaN` in a job": job(margin=float("nan")),
    "`Infinity` in a job": job(margin=float("inf")),
    "`NaN` in `/predict`": predict(min_confidence=float("nan")),
    "`Infinity` in `/predict`": predict(min_confidence=float("inf")),
    '`"\\ud800"` as a text': predict(text="\ud800"),
    '`"\\ud800"` as a name': job(name="\ud800"),
    '`"\\ud800"` in a job\'s metadata': job(metadata={"\ud800": "\ud800"}),
    '`"\\ud800"` in the `spec` of a multipart job': lambda served: served.client.post(
        "/jobs", files={"file": GOOD}, data={"spec": json.dumps({"name": "\ud800"})}
    ),
    '`"\\u0000"` as a name': job(name="a\u0000b"),
    "2^63 as a seed": job(seed=HUGE),
    "2^63 as `top_k`": predict(top_k=HUGE),
    "2^63 as a number of days": lambda served: posted(
        served, "/keys", json.dumps({"name": "x", "scope": "admin", "expires_days": HUGE})
    ),
    "a number of 10,000 digits": lambda served: posted(served, "/jobs", b'{"seed":' + b"9" * 10_000 + b"}"),
    "arrays in arrays, 100,000 deep": lambda served: posted(served, "/jobs", b"[" * DEEP + b"]" * DEEP),
    "objects in objects, 100,000 deep": lambda served: posted(
        served, "/predict", b'{"text":' * DEEP + b"1" + b"}" * DEEP
    ),
    "bytes that are no UTF-8": lambda served: posted(served, "/jobs", b'{"name":"\xff\xfe"}'),
    "JSON that breaks off": lambda served: posted(served, "/predict", b'{"model":"x","text":"'),
    "an empty body": lambda served: posted(served, "/jobs", b""),
    "`null`, a number or a list in place of an object": lambda served: [
        posted(served, path, body)
        for path in ("/jobs", "/predict", "/keys", "/session")
        for body in ("null", "1", "[]")
    ],
    "JSON of type text/plain": lambda served: posted(served, "/predict", b"{}", "text/plain"),
    "an unknown field": job(epoch=3),
    "2 MiB of JSON for a job": job(name="x" * (2 << 20)),
    "a text of over 100,000 characters": predict(text="x" * 100_001),
    "1,025 texts": predict(text=None, texts=["x"] * 1025),
    '`base_model="../../etc"`': job(base_model="../../etc"),
    "`base_model` as a URL": job(base_model="https://example.com/model.bin"),
    '`prompt_model="../../etc"`': job(baseline={"prompt_model": "../../etc"}),
    "`../../etc/passwd` as `dataset_id`": job(dataset_id="../../etc/passwd"),
    "`../../etc/passwd` as `model`": predict(model="../../etc/passwd"),
    "`../../etc/passwd` as `model_id` of an alias": lambda served: served.client.put(
        "/aliases/live", json={"model_id": "../../etc/passwd"}
    ),
    # Paths, queries and headers
    "`../../etc/passwd` in place of an id or a file name": paths("../../etc/passwd", aliases=False),
    "`../../etc/passwd` in place of an alias": paths("../../etc/passwd", aliases=True),
    "`%2e%2e/%2e%2e/etc/passwd` in place of an id or a file name": paths("%2e%2e/%2e%2e/etc/passwd", aliases=False),
    "`%2e%2e%2fetc%2fpasswd` in place of an id or a file name": paths("%2e%2e%2fetc%2fpasswd", aliases=False),
    "`%2e%2e` in place of an id or a file name": paths("%2e%2e", aliases=False),
    "`%252e%252e` in place of an id or a file name": paths("%252e%252e", aliases=False),
    "`%00` in place of an id or a file name": paths("%00", aliases=False),
    "`%2e%2e`, `%252e%252e` or `%00` in place of an alias": lambda served: [
        answer for name in ("%2e%2e", "%252e%252e", "%00") for answer in paths(name, aliases=True)(served)
    ],
    "2^63 as `limit` or `offset`": lambda served: [
        get(path.format(HUGE))(served)
        for path in (
            "/datasets?limit={}",
            "/jobs?limit={}",
            "/models?limit={}",
            "/keys?limit={}",
            f"/datasets/{served.dataset}/rows?offset={{}}",
            f"/jobs/{served.job}/events?after={{}}",
            f"/jobs/{served.job}/flips?after={{}}",
        )
    ],
    "2^63 as `timeout_seconds`": get(f"/jobs/{{job}}/wait?timeout_seconds={HUGE}"),
    "`nan` as `timeout_seconds`": get("/jobs/{job}/wait?timeout_seconds=nan"),
    "a lone surrogate as `after`": get("/jobs?after=%ED%A0%80"),
    "a lone surrogate or NUL as `dataset_id` of a list": lambda served: [
        get(f"/jobs?dataset_id={it}")(served) for it in ("%ED%A0%80", "%00")
    ],
    "an `X-Request-ID` of 60,000 characters": with_header("X-Request-ID", "x" * 60_000),
    "an `Idempotency-Key` of 60,000 characters": with_header("Idempotency-Key", "x" * 60_000),
    "an `Idempotency-Key` that is no ASCII": with_header("Idempotency-Key", "\xe9"),
    "an `Authorization` of 60,000 characters": with_header("Authorization", "Bearer " + "x" * 60_000),
    "an `Accept` that makes no sense": get("/jobs/{job}/events", Accept="text/event-stream;q=9,;;;,*/*;q=nan"),
    "2^63 as `Last-Event-ID`": get("/jobs/{job}/events", Last_Event_ID=str(HUGE)),
    "a `Content-Length` of 5,000 digits": form(content=b"x", headers=BOUNDARY | {"content-length": "9" * 5000}),
    "a `Range` that makes no sense": lambda served: [
        get("/jobs/{job}/artifacts/metrics.json", Range=asked)(served)
        for asked in ("bytes=9-1", "bytes=-", "bytes=a-b", "lines=1-2", "bytes=0-1,3-4", f"bytes={'9' * 99}-")
    ],
    "a `Range` behind the file's end": get("/jobs/{job}/artifacts/metrics.json", Range="bytes=999-"),
    "a `Range` of no last bytes": get("/jobs/{job}/artifacts/metrics.json", Range="bytes=-0"),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    there = make_app(tmp_path_factory.mktemp("there") / "data", max_upload_bytes=100_000)
    with api(tmp_path_factory.mktemp("here") / "data") as client, listening(there) as url:
        ctx, ctx_there = client.app.state.context, there.state.context  # type: ignore[attr-defined]
        job_id, model_id = add_published(ctx.db, ctx.storage)
        job_there, _ = add_published(ctx_there.db, ctx_there.storage)
        yield Served(client, upload(client, GOOD).json()["id"], job_id, model_id, url, job_there)


def test_every_row_has_a_case_and_every_case_a_row() -> None:
    assert len(ROW.findall(PAGE)) == len(TOLD)  # none twice
    assert sorted(TOLD) == sorted([*CASES, *BASES, *ADAPTERS])


@pytest.mark.parametrize("what", CASES)
def test_an_input_gets_what_the_page_says_and_the_next_call_is_answered(served: Served, what: str) -> None:
    answers, (status, code) = CASES[what](served), TOLD[what]
    for answer in answers if isinstance(answers, list) else [answers]:
        assert str(answer.status_code) == status, answer.text
        if code:
            problem_of(answer, int(status), code)
    assert served.client.get("/healthz").status_code == httpx.get(f"{served.url}/healthz").status_code == 200


@given(
    st.binary(max_size=200)
    | st.lists(st.sampled_from(["text", "label", ",", ";", '"', "\n", "\r", "\t", "\0", "fee", "\ufeff", "é"])).map(
        lambda parts: "".join(parts).encode()
    )
    | st.builds(
        lambda at, wedge: GOOD[:at] + wedge + GOOD[at:], st.integers(0, len(GOOD)), st.binary(min_size=1, max_size=9)
    ),
    st.sampled_from(
        [{}, {"labelled": "false"}, {"has_header": "false"}, {"encoding": "utf-16"}, {"encoding": "utf-7"}]
    ),
)
@settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes_are_a_dataset_or_a_problem(served: Served, content: bytes, form: dict[str, str]) -> None:
    answer = upload(served.client, content, **form)
    assert answer.status_code in (201, 413, 415, 422), answer.text
    if answer.status_code != 201:
        problem_of(answer, answer.status_code, answer.json()["code"])


# Files on the service's machine -------------------------------------------------------------------
class Evil:
    """Unpickled, it tells."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was loaded",)


def pickled(file: Path) -> None:
    file.write_bytes(pickle.dumps(Evil()))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def not_a_number(file: Path) -> None:
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


BASES: dict[str, Callable[[Path], None]] = {
    "a pickle called `model.safetensors` in the folder of a base model": pickled,
    "half of a `model.safetensors` in the folder of a base model": cut,
    "NaN in the weights of a base model": not_a_number,
}
ADAPTERS: dict[str, Callable[[Path], None]] = {
    "a pickle called `adapter_model.safetensors` in a published model": pickled,
    "half of an `adapter_model.safetensors` in a published model": cut,
    "NaN in the weights of a published model": not_a_number,
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mine"
    save_bert(folder)
    return folder


@pytest.mark.parametrize("what", BASES)
def test_a_job_on_a_damaged_base_model_ends_as_the_page_says(
    start: Callable[..., TestClient], tmp_path: Path, bert: Path, what: str
) -> None:
    shutil.copytree(bert, tmp_path / "models" / "mine")
    BASES[what](tmp_path / "models" / "mine" / "model.safetensors")
    client = start(models_dir=tmp_path / "models")
    assert client.get("/base-models").status_code == 200
    job = {"dataset_id": upload(client, GOOD).json()["id"], "base_model": "mine", "train": {"max_length": 64}}
    assert client.post("/jobs", json=job).status_code == 202
    with pytest.raises(AppError) as refused:  # as the job does
        load_backbone(locate(find_base("mine", tmp_path / "models")), device=torch.device("cpu"), dtype=torch.float32)
    assert ("job", refused.value.code) == TOLD[what]
    assert str(tmp_path) not in f"{refused.value.detail} {refused.value.hint}"


class Reads(QuietEngine):
    """Reads adapters as the engine's process does, without one; and beside no base."""

    backbone = SimpleNamespace(model=torch.nn.Linear(1, 1), head_name="classifier", device=torch.device("cpu"))

    def __init__(self, storage: Storage) -> None:
        self._adapters = Adapters(storage, 1 << 20, Figures())

    async def predict(self, model: ServedModel, texts: list[str]) -> Scores:
        try:
            labels = self._adapters.get(model, self).result(20).labels  # type: ignore[arg-type]
        except AppError as error:
            raise handle._ERRORS[error.code](error.detail) from None
        return Scores(labels, [[0.5, 0.5]] * len(texts), [False] * len(texts), 1)


@pytest.mark.parametrize("what", ["nothing", *ADAPTERS])
def test_a_damaged_model_answers_as_the_page_says(
    start: Callable[..., TestClient], tmp_path: Path, bert: Path, what: str
) -> None:
    client = start()
    ctx = client.app.state.context  # type: ignore[attr-defined]
    ctx.engine = Reads(ctx.storage)
    folder = save_random_adapter(tmp_path / "adapter", bert, AutoTokenizer.from_pretrained(bert), 2)
    if what in ADAPTERS:
        ADAPTERS[what](folder / "adapter_model.safetensors")
        manifest(2).write(folder)  # the hashes fit: it was published so
    add_job(ctx.db)
    lease, made = claim(ctx.db).lease, model(labels=list(labels(2)))
    files = [
        stored.key.removeprefix(f"{made.storage_prefix}/")
        for stored in put_folder(ctx.storage, folder, made.storage_prefix)
    ]
    publish_stored(ctx.db, lease, [], [replace(made, files=files)], {}, START, GRACE)
    answer = client.post("/predict", json={"model": made.id, "text": "hello"})
    if what in ADAPTERS:
        status, code = TOLD[what]
        problem_of(answer, int(status), str(code))
    else:
        assert answer.status_code == 200, answer.text
