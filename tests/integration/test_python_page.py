"""The whole way with the client, against what `tuneproof up` starts: docs/python.md, and a restart meanwhile."""

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest

from tuneproof import Client

pytestmark = [pytest.mark.more, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "python.md"


@contextmanager
def up(data_dir: Path, port: int) -> Iterator[str]:
    command = [sys.executable, "-c", "from tuneproof.cli import main; main()", "up", "--port", str(port)]
    env = os.environ | {"TUNEPROOF_DATA_DIR": str(data_dir), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, start_new_session=True, cwd=data_dir)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    """`examples/support_tickets.csv`, as the page has it, but for its length."""
    path = tmp_path / "examples" / "support_tickets.csv"
    path.parent.mkdir()
    with (ROOT / "examples" / path.name).open(encoding="utf-8", newline="") as file:
        rows = list(islice(csv.reader(file), 601))
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_every_block_of_the_page_runs_in_order(
    data_dir: Path, port: int, tickets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    monkeypatch.chdir(tickets.parents[1])
    with up(data_dir, port) as url:
        names: dict[str, Any] = {"__name__": "page"}
        for block in blocks:
            source = block.replace("http://127.0.0.1:8000", url)
            exec(compile(source, str(PAGE), "exec"), names)
    shown = capsys.readouterr().out
    assert (tickets.parents[1] / "report.html").read_text("utf-8").startswith("<!doctype html>")
    assert "embedding_logreg 0." in shown
    assert "validation macro-F1" in shown
    assert "422 rare_labels" in shown or "422 too_few_labels" in shown
    names["client"].close()


class LosesFirstAnswers(httpx.HTTPTransport):
    """The server does what it is asked, and of each POST and DELETE the first answer never arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.lost: list[str] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = super().handle_request(request)
        what = request.headers.get("Idempotency-Key") or f"{request.method} {request.url.path}"
        if request.method != "GET" and what not in self.lost:
            self.lost.append(what)
            raise httpx.ReadError("lost", request=request)
        return answer


def test_a_lost_answer_creates_nothing_twice(data_dir: Path, port: int, tickets: Path) -> None:
    losing = LosesFirstAnswers()
    with up(data_dir, port) as url, Client(url, transport=losing) as client:
        client.ready(wait_seconds=120)
        dataset = client.datasets.upload(tickets, name="once")
        assert [one.id for one in client.datasets.list() if one.name == "once"] == [dataset.id]
        jobs = [client.jobs.submit(source, {"kind": "baseline"}, name="once") for source in (dataset, tickets)]
        assert {one.id for one in client.jobs.list() if one.name == "once"} == {job.id for job in jobs}
        for job in jobs:
            client.jobs.cancel(job.id)
            client.jobs.wait(job.id, raise_on_failure=False)
            client.jobs.delete(job.id)
        again = [client.jobs.submit(dataset, name="mine", idempotency_key="mine").id for _ in range(2)]
        client.jobs.cancel(again[0])
    assert len(losing.lost) == 9, "four created, three cancelled, two deleted"
    assert len(set(again)) == 1


def test_a_stream_and_a_wait_survive_a_restart_of_the_server(data_dir: Path, port: int, tickets: Path) -> None:
    ends: list[Any] = []
    with Client(f"http://127.0.0.1:{port}") as client:
        with up(data_dir, port):
            client.ready(wait_seconds=120)
            job = client.jobs.submit(tickets, {"train": {"epochs": 1}, "seed": 7})
            waiting = threading.Thread(target=lambda: ends.append(client.jobs.wait(job.id, raise_on_failure=False)))
            waiting.start()
            stream = client.jobs.stream(job.id)
            seen = [next(stream)]
        with up(data_dir, port):
            seen += list(stream)
            waiting.join(300)
            kept = [event.id for event in client.jobs.events(job.id)]
    assert [end.status for end in ends] == ["succeeded"]
    assert [event.id for event in seen if event.type != "progress"] == kept
    assert any(event.type == "progress" for event in seen)
