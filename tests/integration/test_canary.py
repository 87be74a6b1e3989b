"""A canary in everything that a caller can send, through every route and every failure: nobody else hears it sing.

What is held here:
* No log line in either format, no line on stdout or stderr, no figure and no word of `/readyz` holds anything that a
  caller sent, but the caller's own `X-Request-ID`, which is there to be found in a log.
* No error repeats a text, a key, an address or a file's name, not even to who sent it. Who sent them may be told again
  which fields, columns, labels, metadata keys and type of content of its own an error is about.
* An error for another caller holds nothing of it at all.
"""

import asyncio
import contextlib
import io
import json
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import alembic.config  # noqa: F401 -- it keeps the stdout that it is first imported with: not that of a test
import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import DatabaseError

from service.api import datasets, preflight
from service.api.recent import Recent
from service.core import logs
from service.db import catalog, jobs
from service.db.engine import Database
from service.main import _housekeeping, _round
from service.storage import Storage
from service.webhooks import Webhooks
from tests.integration.conftest import ELSEWHERE, api, listening, make_app
from tests.integration.test_webhooks import SECRET
from tests.integration.test_worker import Bench
from tests.routes import routes_of
from tests.rows import START, add_job, add_published
from tests.waiting import until
from worker.launch import LocalChild

CANARY = "canary7f3a"
TEXT, FILE, KEY, ADDRESS, QUERY = (f"{CANARY}-{what}" for what in ("text", "file", "key", "address", "query"))
LABEL, COLUMN, FIELD, NAME = (f"{CANARY}-{what}" for what in ("label", "column", "field", "name"))
TOLD_TO_NOBODY = (TEXT, FILE, KEY, ADDRESS, QUERY)
# What a library's message may quote: made to look like the frames and the end of a traceback.
SONG = (
    f'{TEXT}\n  File "{TEXT}", line 1, in {CANARY}\n'
    f'Traceback (most recent call last):\n  File "x", line 1, in {CANARY}\n'
    f"    {TEXT}()\n  File {TEXT}\nValueError: {TEXT}\n\nCRITICAL tuneproof: ended by an error\n{TEXT}"
)
TABLE = f"{COLUMN},label\n" + "".join(f"{TEXT} number {i},{'ab'[i % 2]}-{LABEL}\n" for i in range(60))
BAD_TABLES = (
    f'{COLUMN},label\n"{TEXT}', f"{COLUMN},label\n{TEXT},{LABEL},{TEXT}\n", f"{COLUMN}\n{TEXT}\n", "",
    f"{COLUMN},{COLUMN}\n{TEXT},{TEXT}\n", f"{COLUMN},label\n{TEXT},{LABEL}\n", f"{COLUMN},label\n{TEXT}\0,{LABEL}\n",
    f"{TABLE},{LABEL}\n{TEXT}", TABLE.encode() + b"\xff\xfe" + TEXT.encode(), b"PK\x03\x04" + TEXT.encode(),
)  # fmt: skip
FORMS = (
    {}, {"text_column": COLUMN, "name": NAME}, {"text_column": FIELD}, {FIELD: TEXT}, {"delimiter": TEXT},
    {"encoding": TEXT, "has_header": TEXT, "rare_labels": TEXT},
)  # fmt: skip
HOOK = f"https://hooks.example/{ADDRESS}?{ADDRESS}"
SPEC = {
    "name": NAME, "metadata": {FIELD: TEXT}, "webhook_url": HOOK,
    "baseline": {"label_descriptions": {f"a-{LABEL}": TEXT}, "prompt_template": f"{TEXT} {{labels}} {{text}}"},
}  # fmt: skip
BAD_BODIES: tuple[Any, ...] = (
    TEXT, [TEXT], {"text": {FIELD: TEXT}}, {"texts": [TEXT, 7, {FIELD: 1}]}, {"model": [TEXT], "text": 1},
    {"name": TEXT * 99}, {FIELD: TEXT}, {"key": [KEY]}, {"key": KEY, FIELD: KEY}, {"metadata": {FIELD: {FIELD: TEXT}}},
    {"metadata": {FIELD: TEXT * 99}}, {"webhook_url": f"ftp://{ADDRESS}"}, {"webhook_url": f"https://{ADDRESS}/"},
    {"webhook_url": f"https://{ADDRESS}:{KEY}@hooks.example/"}, {"kind": TEXT, "seed": TEXT, "split": TEXT},
    {"baseline": {"prompt_template": TEXT, "methods": [TEXT]}}, {"model_id": TEXT * 99}, {"scope": TEXT, "name": 1},
)  # fmt: skip
HEADERS = {
    "user-agent": CANARY, "referer": CANARY, "range": CANARY, "if-none-match": CANARY, "last-event-id": CANARY,
    "x-forwarded-for": CANARY, "cookie": f"other={CANARY}",
}  # fmt: skip


class Heard:
    """All that is logged, in both formats, as where a server runs; what is printed past it; both without the canary."""

    def __init__(self) -> None:
        self._streams = (io.StringIO(), io.StringIO())
        self._handlers = [logging.StreamHandler(stream) for stream in self._streams]
        for handler, form in zip(self._handlers, (logs._Text(), logs._Json()), strict=True):
            handler.setFormatter(form)

    @contextlib.contextmanager
    def listen(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        root, ours = logging.getLogger(), logging.getLogger("tuneproof")
        monkeypatch.setattr(root, "handlers", self._handlers)
        monkeypatch.setattr(root, "level", logging.WARNING)
        monkeypatch.setattr(logging.getLogger("uvicorn"), "level", logging.INFO)
        level = ours.level
        ours.setLevel(logging.DEBUG)  # empties what loggers remember of levels
        yield
        ours.setLevel(level)

    @property
    def all(self) -> str:
        text, lines = (stream.getvalue() for stream in self._streams)
        assert text
        assert all(json.loads(line)["message"] for line in lines.splitlines())
        return text + lines


@pytest.fixture
def heard(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    heard = Heard()
    with heard.listen(monkeypatch):
        yield heard
    printed = capfd.readouterr()
    assert CANARY not in printed.out + printed.err + heard.all


class Stage:
    """An API with two callers, and what the first has in it: everything by the name of a canary."""

    def __init__(self, client: TestClient) -> None:
        self.client, self.context = client, client.app.state.context  # type: ignore[attr-defined]
        with self.context.db.write() as session:
            self.mine = catalog.create_key(session, NAME, "admin", START)[1]
            self.other = catalog.create_key(session, "other", "admin", START)[1]
        upload = {"file": (f"{FILE}.csv", TABLE)}
        made = self.ask("POST", "/datasets", files=upload, data={"text_column": COLUMN})
        assert made.status_code == 201, made.text
        self.job, self.model = add_published(self.context.db, self.context.storage, name=NAME)
        waiting = add_job(self.context.db, made.json()["id"], name=NAME)
        assert self.ask("PUT", f"/aliases/{CANARY}", json={"model_id": self.model}).status_code == 200
        self.there = {
            "{dataset_id}": made.json()["id"], "{job_id}": self.job, "{model_id}": self.model, "{alias}": CANARY,
            "{name:path}": "report.html", "{key_id}": "key_0", "{path}": "app.js",
        }  # fmt: skip
        self.waiting = waiting

    def ask(self, method: str, path: str, *, key: str | None = None, **sent: Any) -> httpx.Response:
        headers = HEADERS | {"authorization": f"Bearer {key or self.mine}"} | sent.pop("headers", {})
        return self.client.request(method, path, **{"params": {FIELD: QUERY}} | sent, headers=headers)

    def at(self, path: str, what: str | None = None) -> str:
        """The path with things that are there, or with `what`."""
        for place, known in self.there.items():
            path = path.replace(place, what or known)
        return path

    def as_other(self) -> Iterator[httpx.Response]:
        """What another caller does meanwhile, who never heard of a canary."""
        headers = {"authorization": f"Bearer {self.other}"}
        for path in ("/datasets/{dataset_id}/rows", "/jobs/{job_id}/report", "/models/{model_id}/download", "/jobs/x"):
            yield self.client.get(self.at(path), headers=headers)
        for path, body in (("/predict", {"model": self.model, "text": "hello"}), ("/jobs", {"seed": "x"})):
            yield self.client.post(path, json=body, headers=headers)
        yield self.client.post("/datasets", files={"file": ("a.csv", "text,label\nhello\n")}, headers=headers)


Case = Callable[[Stage, str, str], Iterator[httpx.Response]]


def looks(stage: Stage, method: str, path: str) -> Iterator[httpx.Response]:
    """For what is there and what is not, with a canary in each header and each parameter."""
    names = ("limit", "offset", "after", "status", "kind", "dataset_id", "jobs", "timeout_seconds", "safe", "candidate",
             "baseline", "label", "flip", "model_id", "base_model", "seed", "max_length", "methods")  # fmt: skip
    for where in dict.fromkeys((stage.at(path), stage.at(path, TEXT))):
        yield stage.ask(method, where)
        yield stage.ask(method, where, params={})
        yield stage.ask(method, where, params=dict.fromkeys(names, TEXT))
        yield stage.ask(method, where, headers={"authorization": f"Bearer {KEY}"})


def sends(*fine: dict[str, Any]) -> Case:
    """These bodies, and all that are not fine."""

    def call(stage: Stage, method: str, path: str) -> Iterator[httpx.Response]:
        for body in (*fine, *BAD_BODIES):
            said = stage.at(json.dumps(body))
            kind = {"content-type": "application/json", "idempotency-key": f"{CANARY} {len(said)}"}
            yield stage.ask(method, stage.at(path), content=said, headers=kind)
        yield stage.ask(method, stage.at(path), content=f'{{"{TEXT}', headers={"content-type": "application/json"})
        yield stage.ask(method, stage.at(path), content=TEXT, headers={"content-type": FIELD})
        yield from looks(stage, method, path)

    return call


def uploads(stage: Stage, method: str, path: str) -> Iterator[httpx.Response]:
    for table, form in [(TABLE, form) for form in FORMS] + [(table, FORMS[1]) for table in BAD_TABLES]:
        spec = {"spec": json.dumps(SPEC)} if path == "/jobs" else {}
        key = {"idempotency-key": f"{CANARY} {hash((table, *form))}"}
        yield stage.ask(method, path, files={"file": (f"{FILE}.csv", table)}, data=form | spec, headers=key)
    if path == "/jobs":
        for body in BAD_BODIES:
            yield stage.ask(method, path, files={"file": (f"{FILE}.csv", TABLE)}, data={"spec": json.dumps(body)})
        yield stage.ask(method, path, files={"file": (f"{FILE}.csv", TABLE)}, data={"spec": f'{{"{TEXT}'})
        yield from sends(
            SPEC | {"dataset_id": "{dataset_id}"}, SPEC, {"dataset_id": TEXT}, {"kind": "predict", "model": TEXT},
            {"dataset_id": "{dataset_id}", "baseline": {"label_descriptions": {LABEL: TEXT}}},
        )(stage, method, path)  # fmt: skip
    form = {"content-type": f"multipart/form-data; boundary={CANARY}"}
    yield stage.ask(method, path, content=f"--{CANARY}\r\n{TEXT}\r\n", headers=form)
    yield stage.ask(method, path, content=TEXT, headers={"content-type": "multipart/form-data"})


LOOKED_AT = (
    "/", "/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/session", "/keys",
    "/datasets", "/datasets/{dataset_id}", "/datasets/{dataset_id}/rows", "/datasets/{dataset_id}/preflight", "/jobs",
    "/jobs/{job_id}", "/jobs/{job_id}/wait", "/jobs/{job_id}/events", "/jobs/{job_id}/report", "/jobs/{job_id}/flips",
    "/jobs/{job_id}/artifacts/{name:path}", "/compare", "/models", "/models/{model_id}", "/models/{model_id}/download",
    "/aliases", "/aliases/{alias}/history", "/aliases/{alias}/gate", "/base-models", "/ui/{path}",
    "/static-offline-docs/{path}",
)  # fmt: skip
TAKEN_AWAY = (
    "/aliases/{alias}", "/models/{model_id}", "/jobs/{job_id}", "/datasets/{dataset_id}", "/keys/{key_id}", "/session",
)  # fmt: skip
CASES: dict[tuple[str, str], Case] = {
    **{("GET", path): looks for path in LOOKED_AT},
    ("HEAD", "/openapi.json"): looks,
    ("POST", "/datasets"): uploads,
    ("POST", "/jobs"): uploads,
    ("POST", "/jobs/{job_id}/cancel"): looks,
    ("POST", "/jobs/{job_id}/retry"): looks,
    ("POST", "/predict"): sends(
        {"model": "{model_id}", "text": TEXT}, {"model": TEXT, "text": TEXT},
        {"model": "{alias}", "texts": [TEXT, TEXT]}, {"model": "{alias}", "text": TEXT * 9999},
        {"model": "{alias}", "text": TEXT, "target_precision": 0.9},
    ),
    ("POST", "/session"): sends({"key": KEY}, {"key": KEY * 99}),
    ("POST", "/keys"): sends({"name": NAME, "scope": "read"}),
    ("PUT", "/aliases/{alias}"): sends({"model_id": "{model_id}"}, {"model_id": TEXT}),
    # At the end: what the others ask for is gone then.
    **{("DELETE", path): looks for path in TAKEN_AWAY},
}  # fmt: skip


@pytest.fixture
def stage(tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(preflight, "_look_in_a_process_of_its_own", breaks)
    with api(tmp_path / "data", client=ELSEWHERE, webhook_hosts="hooks.example", webhook_secret=SECRET) as client:
        yield Stage(client)


def breaks(*_: Any, **__: Any) -> Any:
    raise RuntimeError(SONG)


def held_back(answers: Iterator[httpx.Response], words: tuple[str, ...]) -> list[int]:
    """The statuses, of which none above 399 comes with one of these words."""
    statuses = []
    for answer in answers:
        statuses.append(answer.status_code)
        told = [] if answer.status_code < 400 else [word for word in words if word in answer.text + str(answer.headers)]
        assert not told, f"{answer.request.method} {answer.request.url.path}: {answer.text}"
    return statuses


def test_every_route_has_a_case(stage: Stage) -> None:
    assert routes_of(stage.client.app) == set(CASES)  # type: ignore[arg-type]


def test_nothing_that_is_sent_to_any_route_is_heard_elsewhere(stage: Stage, heard: Heard) -> None:
    statuses: set[int] = set()
    for (method, path), case in CASES.items():
        statuses.update(held_back(case(stage, method, path), TOLD_TO_NOBODY))
        if method != "GET":
            held_back(stage.as_other(), (CANARY,))
    assert statuses >= {200, 201, 202, 204, 401, 404, 409, 415, 422, 500, 503}, "the cases reach less than they did"
    for path in ("/metrics", "/readyz"):
        said = stage.client.get(path, headers={"authorization": f"Bearer {stage.other}"}).text
        assert len(said) > 100
        assert CANARY not in said
    assert "POST /predict 422" in heard.all


def of_the_database(patch: pytest.MonkeyPatch, stage: Stage) -> None:
    def lost(*_: Any) -> Any:
        raise DatabaseError(SONG, {"text": SONG}, Exception(SONG))

    held_back(stage.as_other(), (CANARY,))  # whose key it is, and which model, is known by now
    patch.setattr(Recent, "held", lambda self, name, _stamp=None: self._held.get(name, (None,))[0])
    patch.setattr(Database, "read", lost)
    patch.setattr(Database, "write", lost)


def of_the_storage(patch: pytest.MonkeyPatch, stage: Stage) -> None:
    for name in ("put", "open", "chunks", "fetch", "folder", "probe"):
        patch.setattr(Storage, name, lambda *_, **__: (_ for _ in ()).throw(OSError(5, SONG, SONG)))


def of_the_engine(patch: pytest.MonkeyPatch, stage: Stage) -> None:
    patch.setattr(stage.context.engine, "predict", breaks)
    patch.setattr(stage.context.engine, "figures", None)


def of_the_reader(patch: pytest.MonkeyPatch, stage: Stage) -> None:
    for name in ("profile", "read_rows"):
        patch.setattr(datasets, name, breaks)


@pytest.mark.parametrize("failure", [of_the_database, of_the_storage, of_the_engine, of_the_reader])
def test_no_failure_passes_on_what_its_message_quotes(
    failure: Callable[[pytest.MonkeyPatch, Stage], None], stage: Stage, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure(monkeypatch, stage)
    statuses: list[int] = []
    upload = {"files": {"file": (f"{FILE}.csv", TABLE)}, "data": {"text_column": COLUMN}}
    bodies: dict[str, dict[str, Any]] = {
        "/datasets": upload, "/jobs": upload, "/predict": {"json": {"model": stage.model, "text": TEXT}},
        "/session": {"json": {"key": KEY}}, "/keys": {"json": {"name": NAME, "scope": "read"}},
        "/aliases/{alias}": {"json": {"model_id": stage.model}},
    }  # fmt: skip
    for method, path in CASES:
        sent = {"params": {}} | (bodies.get(path, {}) if method in ("POST", "PUT") else {})
        statuses += held_back(iter((stage.ask(method, stage.at(path), **sent),)), (CANARY,))
        if method != "GET":
            statuses += held_back(stage.as_other(), (CANARY,))
    assert 500 in statuses
    assert " failed" in heard.all, "and the log says where"
    ready = stage.client.get("/readyz", headers={"authorization": f"Bearer {stage.other}"})
    assert CANARY not in ready.text


def test_housekeeping_and_webhooks_fail_without_quoting(
    stage: Stage, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = stage.context
    with context.db.write() as session:
        jobs.get(session, stage.waiting).webhook_url = HOOK
        jobs.cancel(session, stage.waiting, START)

    async def at_work() -> None:
        def refuse(_request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError(SONG)

        async with httpx.AsyncClient(transport=httpx.MockTransport(refuse)) as client:
            rounds = Webhooks(context.db, context.settings, context.clock)
            await rounds.round(client)
            context.clock.advance(3600)
            monkeypatch.setattr(Webhooks, "_call", breaks)
            await rounds.round(client)
        keeping = asyncio.create_task(_housekeeping(context))
        await asyncio.to_thread(until, lambda: "housekeeping failed" in heard.all, 10, "it says that it failed")
        keeping.cancel()

    monkeypatch.setattr(Storage, "delete", lambda *_: (_ for _ in ()).throw(OSError(5, SONG, SONG)))
    stage.ask("DELETE", f"/jobs/{stage.job}")
    context.clock.advance(10 * 24 * 3600)
    _round(context)
    monkeypatch.setattr(Storage, "delete", breaks)
    context.clock.advance(3600)
    asyncio.run(at_work())
    assert "cannot be deleted yet" in heard.all
    assert "cannot be sent now" in heard.all
    bearer = {"authorization": f"Bearer {stage.other}"}
    told = [
        event["message"] for event in stage.client.get(f"/jobs/{stage.waiting}/events", headers=bearer).json()["data"]
    ]
    assert any("webhook to hooks.example, attempt 1: no answer (ConnectError)" in message for message in told)
    assert CANARY not in str(told)


def test_a_server_says_nothing_of_what_is_no_request_and_of_a_stream_that_breaks(
    heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(tmp_path / "data")
    context = app.state.context
    with listening(app) as url:
        job_id, _model = add_published(context.db, context.storage)

        def half(*_: Any) -> Iterator[bytes]:
            yield b"page"
            raise OSError(5, SONG, SONG)

        monkeypatch.setattr(Storage, "chunks", half)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url}/jobs/{job_id}/report?{QUERY}", headers={"x-canary": CANARY})
        address = httpx.URL(url)
        for said in (f"{TEXT}\r\n\r\n", f"GET /{TEXT} HTTP/9.9\r\n\r\n", f"GET / HTTP/1.1\r\n{TEXT}\r\n\r\n",
                     f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: {TEXT}\r\n\r\n"):  # fmt: skip
            with socket.create_connection((address.host, address.port or 0), 10) as raw:
                raw.sendall(said.encode())
                raw.settimeout(10)
                assert CANARY not in raw.recv(4096).decode()
        until(lambda: "Exception in ASGI application" in heard.all, 10, "uvicorn has told of the stream")
    assert "Invalid HTTP request" in heard.all
    assert "in half" in heard.all, "and where it broke"


# A worker's child -----------------------------------------------------------------------------------
BREAKS = """
import runpy, sys, types, warnings, threading
def sing(*_):
    print(SONG); print(SONG, file=sys.stderr); warnings.warn(SONG)
    thread = threading.Thread(target=breaks); thread.start(); thread.join()
    try:
        breaks()
    except ValueError as error:
        raise ExceptionGroup(SONG, [error]) from error
def breaks():
    raise ValueError(SONG)
sys.modules["worker.run"] = types.SimpleNamespace(main=sing)
sys.argv = ["child", sys.argv[-1]]
runpy.run_module("worker.child", run_name="__main__")
"""


class Singing(LocalChild):
    program = ("-c", f"SONG = {SONG!r}\n{BREAKS}")


def test_a_child_that_dies_with_a_text_on_its_lips_is_told_by_where_it_died(heard: Heard, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.supervisor.launcher = Singing
    assert bench.supervisor.work_once(tmp_path / "work")
    assert bench.job.error == {
        "code": "internal", "message": "The job's process failed.", "hint": "The worker's log says where."
    }  # fmt: skip
    assert "in sing" in heard.all
    assert "in breaks" in heard.all
    assert CANARY not in str(bench.messages())
    bench.db.close()


def test_a_worker_that_stumbles_says_where_alone(heard: Heard, tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def stumble(_folder: Path) -> Any:
        bench.supervisor.stop.set()
        raise DatabaseError(SONG, {}, Exception(SONG))

    bench.supervisor.launcher = stumble
    bench.supervisor.run()
    assert "the worker stumbled" in heard.all
    assert "in stumble" in heard.all
    bench.db.close()
