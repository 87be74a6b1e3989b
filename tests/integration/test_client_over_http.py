"""Client and command against the real API over real HTTP. No worker: jobs wait in the queue."""

import asyncio
import http.server
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.integration.conftest import listening, make_app
from tests.rows import ARTIFACTS, add_published
from tuneproof import AsyncClient, Client, JobFailed, TuneproofError, WaitTimeout

ROWS = [(f'text {i}, "quoted"\nand on', "ab"[i % 2]) for i in range(40)]
FRAME = pd.DataFrame(ROWS, columns=["message", "queue"])


class Running:
    """The application behind a port, with one job published in it."""

    def __init__(self, url: str, job_id: str, model_id: str) -> None:
        self.url, self.job_id, self.model_id = url, job_id, model_id


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    app = make_app(tmp_path_factory.mktemp("api") / "data")
    with listening(app) as url:
        context = app.state.context
        yield Running(url, *add_published(context.db, context.storage))


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(running.url) as client:
        yield client


def command(running: Running, *words: str, **given: Any) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from tuneproof.cli import main; main()", *words]
    env = os.environ | {"TUNEPROOF_URL": running.url} | given.pop("env", {})
    return subprocess.run(program, env=env, text=True, timeout=60, check=False, **({"capture_output": True} | given))


# The client ---------------------------------------------------------------------------------------
def test_a_frame_becomes_the_same_rows_and_a_job_and_both_can_be_deleted(client: Client) -> None:
    dataset = client.datasets.upload(FRAME, name="from pandas")
    assert (dataset.name, dataset.n_usable_rows, dataset.inferred) == (
        "from pandas",
        40,
        ("text_column", "label_column"),
    )
    rows = client.datasets.rows(dataset.id, limit=200)
    assert [(row.text, row.label) for row in rows] == ROWS
    assert client.datasets.get(dataset.id) == dataset
    assert dataset.id in [one.id for one in client.datasets.list()]

    job = client.jobs.submit(dataset, {"kind": "baseline", "metadata": {"ticket": "ABC-1"}}, name="by name")
    assert (job.dataset_id, job.kind, job.name) == (dataset.id, "baseline", "by name")
    assert job.metadata == {"ticket": "ABC-1"}
    assert [one.id for one in client.jobs.list(dataset_id=dataset.id, status="queued")] == [job.id]
    assert [event.type for event in client.jobs.events(job.id)] == ["status"]
    with pytest.raises(TuneproofError, match="job") as caught:
        client.datasets.delete(dataset.id)
    assert (caught.value.status, caught.value.code) == (409, "conflict")

    with pytest.raises(WaitTimeout):
        client.jobs.wait(job.id, timeout_seconds=0.1)
    assert client.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(JobFailed) as failed:
        client.jobs.wait(job.id)
    assert failed.value.code == "cancelled"
    assert client.jobs.retry(job.id).status == "queued"
    client.jobs.cancel(job.id)
    client.jobs.delete(job.id)
    client.datasets.delete(dataset.id)
    with pytest.raises(TuneproofError, match="No job has that id"):
        client.jobs.get(job.id)


def test_a_refused_file_is_refused_with_its_rows(client: Client, tmp_path: Path) -> None:
    ragged = tmp_path / "ragged.csv"
    ragged.write_text("text,label\n" + "a,b\n" * 9 + "a,b,c\n")
    with pytest.raises(TuneproofError) as caught:
        client.jobs.submit(ragged)
    assert (caught.value.status, caught.value.code) == (422, "malformed_rows")
    assert caught.value.errors[0]["row"] == 9


def test_what_a_job_left_is_fetched(client: Client, running: Running, tmp_path: Path) -> None:
    job = client.jobs.wait(running.job_id)
    assert job.summary
    assert job.summary.headline == "fine"
    assert client.jobs.metrics(job.id) == {"schema_version": 1}
    for artifact in job.artifacts:
        path = client.jobs.download(job.id, artifact.name, tmp_path / "file")
        assert path.read_bytes() == ARTIFACTS[artifact.name]
    assert client.jobs.report(job.id, tmp_path / "r.html").read_bytes() == ARTIFACTS["report.html"]
    (model,) = client.models.list()
    assert model == client.models.get(running.model_id)
    with zipfile.ZipFile(client.models.download(model.id, tmp_path / "m.zip")) as archive:
        assert set(archive.namelist()) == {"manifest.json", "sub/weights.bin"}
    client.aliases.put("prod", model.id)
    assert [(alias.alias, alias.history[0].model_id) for alias in client.aliases.list()] == [("prod", model.id)]
    with pytest.raises(TuneproofError, match="alias"):
        client.models.delete(model.id)


def test_a_busy_engine_is_asked_again_until_the_time_is_over(running: Running) -> None:
    with Client(running.url, retry_seconds=0) as client, pytest.raises(TuneproofError) as caught:
        client.predict(running.model_id, ["a"])
    assert (caught.value.status, caught.value.code) == (503, "engine_unavailable")
    assert caught.value.retry_after_seconds


def test_with_await_it_goes_the_same_way(running: Running, tmp_path: Path) -> None:
    file = tmp_path / "tickets.csv"
    FRAME.to_csv(file, index=False)

    async def go_through() -> None:
        async with AsyncClient(running.url) as client:
            job, other = await asyncio.gather(client.jobs.submit(file), client.jobs.submit(FRAME, name="other"))
            assert {job.name, other.name} == {"tickets", "other"}
            waiting = asyncio.create_task(client.jobs.wait(job.id, raise_on_failure=False))
            await client.jobs.cancel(job.id)
            assert (await waiting).status == "cancelled"
            await client.jobs.cancel(other.id)
            assert (await client.jobs.report(running.job_id, tmp_path / "r.html")).stat().st_size > 0

    asyncio.run(go_through())


# The command --------------------------------------------------------------------------------------
@pytest.mark.more
def test_the_command_goes_from_a_file_to_a_cancelled_job(running: Running, tmp_path: Path) -> None:
    file = tmp_path / "tickets.csv"
    FRAME.to_csv(file, index=False)
    job = json.loads(command(running, "submit", str(file), "--json").stdout)
    assert "queued" in command(running, "status", job["id"]).stdout
    assert job["id"] in command(running, "jobs", env={"COLUMNS": "60", "NO_COLOR": "1"}).stdout
    assert "cancelled" in command(running, "cancel", job["id"]).stdout
    watched = command(running, "watch", job["id"])
    assert (watched.returncode, watched.stderr.splitlines()[-1]) == (1, f"The job {job['id']} was cancelled.")
    assert "\x1b" not in watched.stdout + watched.stderr
    assert command(running, "cancel", job["id"]).returncode == 2


@pytest.mark.parametrize(
    ("words", "code"), [(["jobs", "--json"], 141), (["models"], 141), (["status", "{job_id}"], 141), (["--help"], 1)]
)
def test_where_nobody_reads_the_output_it_ends_without_a_word(running: Running, words: list[str], code: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ended = command(
        running, *[word.format(job_id=running.job_id) for word in words],
        stdout=writing, stderr=subprocess.PIPE, capture_output=False,
    )  # fmt: skip
    os.close(writing)
    assert ended.stderr == ""
    assert ended.returncode == code


def test_an_interrupted_watch_says_how_to_go_on(running: Running, client: Client) -> None:
    job = client.jobs.submit(FRAME)
    program = [sys.executable, "-c", "from tuneproof.cli import main; main()", "watch", job.id, "--url", running.url]
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program[2] = start + program[2]
    watching = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watching.stderr
    assert "waiting for a worker" in watching.stderr.readline()
    watching.send_signal(signal.SIGINT)
    _, said = watching.communicate(timeout=30)
    client.jobs.cancel(job.id)
    assert watching.returncode == 130
    assert "The job goes on; follow it again with: " in said
    assert "Traceback" not in said
    assert said.strip().endswith(f"watch {job.id} --url {running.url}")


@pytest.mark.more
def test_bash_completes_commands_and_what_the_server_knows(running: Running) -> None:
    commands_are = shlex.quote(str(Path(sys.executable).parent))
    script = f"""
        PATH={commands_are}:$PATH  # where the package's own command is, which completion calls by name
        eval "$(_TUNEPROOF_COMPLETE=source_bash tuneproof)"
        complete -p tuneproof
        for line in "tuneproof ca" "tuneproof watch job"; do
            COMP_WORDS=($line); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()
            _tuneproof_completion tuneproof; echo "${{COMPREPLY[@]}}"
        done
    """
    env = os.environ | {"TUNEPROOF_URL": running.url}
    shown = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60, check=True)
    registered, commands, jobs = shown.stdout.splitlines()
    assert "_tuneproof_completion tuneproof" in registered
    assert commands == "cancel"
    assert running.job_id in jobs.split()


class Page(http.server.BaseHTTPRequestHandler):
    """What a proxy or another program at that port might say."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>Welcome to nginx!</html>")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("scheme", "code", "words"),
    [("http", 3, "is not a tuneproof server"), ("https", 3, "No secure connection to https://127.0.0.1")],
)
def test_another_server_is_told_from_ours_in_one_sentence(running: Running, scheme: str, code: int, words: str) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
    ended = command(running, "jobs", "--url", url)
    server.shutdown()
    server.server_close()
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.startswith("Error: ")
    assert words in ended.stderr
    assert ended.stderr.count("\n") == 1
