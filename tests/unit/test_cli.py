"""The client and the command, against a fake server over httpx's mock transport; the processes are real."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

import tuneproof.cli
from tuneproof import Client, TuneproofError, demo, processes

JOB: dict[str, Any] = {
    "id": "job_1",
    "kind": "experiment",
    "name": "tickets",
    "status": "succeeded",
    "terminal": True,
    "stage": "publish",
    "progress": {"fraction": 1.0, "message": "done", "eta_seconds": None},
    "model_id": "mdl_lora",
    "error": None,
    "summary": {
        "headline": "embedding_logreg is as good as it gets [here]",
        "recommendation": {"method": "embedding_logreg", "reason": "Nothing beats it.", "margin": 0.02},
        "methods": {
            "zero_shot_similarity": {"accuracy": 0.5, "macro_f1": 0.4, "on": "baseline_subset", "model_id": None},
            "embedding_logreg": {"accuracy": 0.9, "macro_f1": 0.88, "on": "test", "model_id": "mdl_probe"},
            "lora": {"accuracy": 0.89, "macro_f1": 0.87, "on": "test", "model_id": "mdl_lora"},
        },
    },
    "artifacts": [{"name": name} for name in ("metrics.json", "predictions.csv", "report.html", "adapter/a.json")],
}
RUNNING = JOB | {
    "status": "running",
    "terminal": False,
    "stage": "train",
    "progress": {"fraction": 0.42, "message": "epoch [2]/5", "eta_seconds": 95.0},
}
FAILED = JOB | {
    "status": "failed",
    "summary": None,
    "error": {"code": "out_of_memory", "message": "It did not fit.", "hint": "Try a smaller batch."},
}
METRICS = {
    "comparison": [
        {
            "candidate": "lora",
            "baseline": "embedding_logreg",
            "on": "test",
            "n": 300,
            "accuracy_delta": -0.01,
            "accuracy_delta_ci95": [-0.03, 0.01],
            "n_fixed": 5,
            "n_broken": 8,
            "mcnemar_p_holm": 0.58,
            "verdict": "inconclusive",
        }
    ]
}
EMPTY = {"data": [], "has_more": False}


class FakeServer:
    """Answers by method and path: with JSON, with what a function makes of the request, or with one after another."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {"GET /jobs/job_1/events": EMPTY}
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        answer = self.answers[f"{request.method} {request.url.path}"]
        answer = next(answer) if isinstance(answer, Iterator) else answer
        answer = answer(request) if callable(answer) else answer
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)

    def client(self, url: str = tuneproof.cli.DEFAULT_URL, api_key: str | None = None) -> Client:
        return Client(url, api_key, transport=httpx.MockTransport(self))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    fake = FakeServer()
    monkeypatch.setattr(tuneproof.cli, "Client", fake.client)
    for name in ("TUNEPROOF_URL", "TUNEPROOF_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return fake


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    path = tmp_path / "tickets.csv"
    path.write_text("text,label\nwhere is my money,refund\n")
    return path


def tuneproof_command(*words: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(tuneproof.cli.app, list(words), input=stdin)


def problem(status: int, code: str = "some_code", retry_after: str | None = None, **fields: Any) -> httpx.Response:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return httpx.Response(status, json={"detail": "Expected this, found that.", "code": code} | fields, headers=headers)


def unreachable(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


# The client ---------------------------------------------------------------------------------------
def test_one_call_uploads_the_file_with_the_spec_and_the_fields_that_were_given(
    server: FakeServer, tickets: Path
) -> None:
    server.answers["POST /jobs"] = JOB
    job = server.client(api_key=" secret\n").submit(tickets, {"seed": 7}, has_header=False, encoding=None)
    request = server.requests[0]
    body = request.content.decode()
    assert job["id"] == "job_1"
    assert request.headers["Authorization"] == "Bearer secret"
    assert 'name="file"; filename="tickets.csv"' in body
    assert "where is my money,refund" in body
    assert 'name="spec"\r\n\r\n{"seed": 7}\r\n' in body
    assert 'name="has_header"\r\n\r\nfalse\r\n' in body
    assert "encoding" not in body


def test_a_problem_becomes_an_error_with_its_status_code_and_detail(server: FakeServer) -> None:
    server.answers["GET /jobs/job_1"] = problem(
        422, "rare_labels", errors=[{"row": 3, "message": "alone"}], hint="Drop it."
    )
    with pytest.raises(TuneproofError, match="Expected this, found that") as caught:
        server.client().job("job_1")
    error = caught.value
    assert (error.status, error.code, error.hint) == (422, "rare_labels", "Drop it.")
    assert error.errors == [{"row": 3, "message": "alone"}]


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (httpx.Response(502, text="<html>Bad Gateway</html>"), 502, "502 Bad Gateway"),
        (httpx.Response(500, json=["odd"]), 500, "500"),
        (httpx.Response(302, headers={"Location": "/login"}), 302, "302"),
        (httpx.Response(200, text="<html>Hello</html>"), None, "not a tuneproof server"),
        (unreachable, None, "No server answers"),
    ],
)
def test_what_is_no_problem_document_still_becomes_one_clear_error(
    server: FakeServer, answer: Any, status: int | None, words: str
) -> None:
    server.answers["GET /readyz"] = answer
    with pytest.raises(TuneproofError, match=words) as caught:
        server.client().ready()
    assert caught.value.status == status


def test_a_name_that_is_no_url_is_an_error_of_ours() -> None:
    with pytest.raises(TuneproofError, match="not a URL"):
        Client("http://127.0.0.1:port")


def test_predict_asks_again_when_the_server_says_so(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("tuneproof.client.time.sleep", waits.append)
    answers = [problem(503, "base_loading", "2"), problem(429, "queue_full", "1"), {"model_id": "mdl_1"}]
    server.answers["POST /predict"] = iter(answers)
    assert server.client().predict("mdl_1", ["a"])["model_id"] == "mdl_1"
    assert waits == [2, 1]
    sent = {"model": "mdl_1", "texts": ["a"], "top_k": 3, "min_confidence": 0.0}
    assert [json.loads(request.content) for request in server.requests] == [sent] * 3


def test_predict_sends_a_target_precision_in_place_of_a_threshold(server: FakeServer) -> None:
    server.answers["POST /predict"] = {"model_id": "mdl_1"}
    server.client().predict("mdl_1", ["a"], target_precision=0.9)
    server.client().predict("mdl_1", ["a"], target_precision=0.9, min_confidence=0.5)
    sent = {"model": "mdl_1", "texts": ["a"], "top_k": 3, "target_precision": 0.9}
    assert [json.loads(request.content) for request in server.requests] == [sent, sent | {"min_confidence": 0.5}]


def test_a_file_is_uploaded_alone_and_looked_at_with_the_values_of_a_job(
    server: FakeServer, tickets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("tuneproof.client.time.sleep", waits.append)
    server.answers["POST /datasets"] = {"id": "ds_1"}
    server.answers["GET /datasets/ds_1/preflight"] = iter([problem(429, "queue_full", "2"), {"warnings": []}])
    client = server.client()
    dataset = client.upload(tickets, label_column="label")
    assert client.preflight(dataset["id"], base_model="minilm", seed=7) == {"warnings": []}
    assert waits == [2]
    assert 'name="label_column"' in server.requests[0].content.decode()
    assert 'name="spec"' not in server.requests[0].content.decode()
    assert dict(server.requests[-1].url.params) == {"base_model": "minilm", "seed": "7"}


@pytest.mark.parametrize(
    ("answer", "deadline_seconds"),
    [
        (problem(503, "base_loading", "30"), 20.0),  # would pass the deadline
        (problem(503, "base_not_served", "1"), 20.0),  # will not get better
        (problem(503, "down"), 20.0),  # does not say when
        (problem(404, "not_found"), 20.0),
    ],
)
def test_predict_gives_up_where_asking_again_is_of_no_use(
    server: FakeServer, answer: httpx.Response, deadline_seconds: float
) -> None:
    server.answers["POST /predict"] = answer
    with pytest.raises(TuneproofError):
        server.client().predict("mdl_1", ["a"], deadline_seconds=deadline_seconds)
    assert len(server.requests) == 1


def test_lists_are_followed_to_their_end(server: FakeServer) -> None:
    def pages(request: httpx.Request) -> dict[str, Any]:
        if request.url.params.get("after") == "mdl_2":
            return {"data": [{"id": "mdl_1"}], "has_more": False}
        return {"data": [{"id": "mdl_3"}, {"id": "mdl_2"}], "has_more": True}

    server.answers["GET /models"] = pages
    assert [model["id"] for model in server.client().models()] == ["mdl_3", "mdl_2", "mdl_1"]


def test_a_download_that_breaks_leaves_no_file(server: FakeServer, tmp_path: Path) -> None:
    def broken(request: httpx.Request) -> httpx.Response:
        def chunks() -> Any:
            yield b"half"
            raise httpx.ReadError("gone", request=request)

        return httpx.Response(200, content=chunks())

    client = server.client()
    server.answers["GET /jobs/job_1/artifacts/adapter/a.json"] = broken
    with pytest.raises(TuneproofError, match="gone"):
        client.download("job_1", "adapter/a.json", tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()

    server.answers["GET /jobs/job_1/artifacts/adapter/a.json"] = httpx.Response(200, content=b"whole")
    assert client.download("job_1", "adapter/a.json", tmp_path / "a.json").read_bytes() == b"whole"

    server.answers["GET /jobs/job_1/artifacts/adapter/a.json"] = problem(404, "not_found")
    with pytest.raises(TuneproofError, match="Expected this"):
        client.download("job_1", "adapter/a.json", tmp_path / "b.json")


def test_watching_ends_with_the_terminal_state(server: FakeServer) -> None:
    server.answers["GET /jobs/job_1"] = RUNNING | {"status": "queued", "stage": None}
    server.answers["GET /jobs/job_1/wait"] = iter([RUNNING, JOB])
    assert [job["status"] for job in server.client().watch("job_1")] == ["queued", "running", "succeeded"]
    assert server.requests[-1].url.params["timeout_seconds"] == "1.0"


def test_an_id_cannot_lead_to_another_path(server: FakeServer) -> None:
    server.answers["POST /jobs/../models/x/cancel"] = JOB  # httpx decodes; what is sent stays quoted
    server.client().cancel("../models/x")
    assert server.requests[0].url.raw_path == b"/jobs/..%2Fmodels%2Fx/cancel"


# The command: what it says and with which code it ends ----------------------------------------------
@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (problem(404), 2),
        (problem(422, errors=[{"loc": ["seed"], "message": "0 to 9"}, {"row": 3, "message": "3 cells"}]), 2),
        (problem(401), 2),
        (problem(500), 3),
        (problem(507), 3),
        (unreachable, 3),
    ],
)
def test_an_error_is_a_sentence_on_stderr_and_an_exit_code(server: FakeServer, answer: Any, code: int) -> None:
    server.answers["GET /jobs/job_1"] = answer
    result = tuneproof_command("watch", "job_1")
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    if b"3 cells" in getattr(answer, "content", b""):
        assert "  seed: 0 to 9\n  row 3: 3 cells\n" in result.stderr


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_job_that_did_not_succeed_ends_with_1_and_says_why(server: FakeServer, status: str) -> None:
    server.answers["GET /jobs/job_1"] = FAILED | {"status": status}
    result = tuneproof_command("watch", "job_1")
    assert result.exit_code == 1
    assert f"job_1 is {status}: It did not fit. (out_of_memory)\nTry a smaller batch." in result.stderr


def test_watch_shows_stage_share_and_time_left_and_then_the_result(server: FakeServer) -> None:
    server.answers["GET /jobs/job_1"] = RUNNING
    server.answers["GET /jobs/job_1/wait"] = JOB
    warning = {"id": 1, "level": "warning", "message": "The embedded model was taken."}
    server.answers["GET /jobs/job_1/events"] = {"data": [warning], "has_more": False}
    result = tuneproof_command("watch", "job_1")
    assert result.exit_code == 0
    assert "train       42%  epoch [2]/5  0:01:35 left" in result.stderr
    assert "Warning: The embedded model was taken." in result.stdout
    assert "zero_shot_similarity 0.500    0.400    baseline_subset" in result.stdout
    assert "embedding_logreg is as good as it gets [here]\nNothing beats it." in result.stdout
    assert "predict --model mdl_probe 'a text'\n" in result.stdout


def test_submit_passes_on_what_it_is_told(server: FakeServer, tickets: Path, tmp_path: Path) -> None:
    server.answers["POST /jobs"] = RUNNING
    (tmp_path / "spec.json").write_text('{"seed": 7, "base_model": "minilm"}')
    options = ["--name", "n", "--text-column", "0", "--no-header", "--delimiter", r"\t", "--rare-labels", "drop"]
    options += ["--base-model", "qwen3-0.6b", "--spec", f"@{tmp_path / 'spec.json'}", "--url", "http://other.test"]
    result = tuneproof_command("submit", str(tickets), *options)
    assert result.exit_code == 0
    assert "watch job_1 --url http://other.test" in result.stdout
    body = server.requests[0].content.decode()
    assert server.requests[0].url.host == "other.test"
    fields = {"name": "n", "text_column": "0", "has_header": "false", "delimiter": "\t", "rare_labels": "drop"}
    for name, value in (fields | {"spec": '{"seed": 7, "base_model": "qwen3-0.6b"}'}).items():
        assert f'name="{name}"\r\n\r\n{value}\r\n' in body


def test_with_json_stdout_is_the_servers_json_alone(server: FakeServer, tickets: Path) -> None:
    server.answers |= {"POST /jobs": RUNNING, "GET /jobs/job_1": JOB, "GET /models": EMPTY}
    assert json.loads(tuneproof_command("submit", str(tickets), "--json").stdout) == RUNNING
    assert json.loads(tuneproof_command("submit", str(tickets), "--watch", "--json").stdout) == JOB
    assert json.loads(tuneproof_command("watch", "job_1", "--json").stdout) == JOB
    assert json.loads(tuneproof_command("models", "--json").stdout) == []


@pytest.mark.parametrize("spec", ["{", "[1]", "@no/such/file.json"])
def test_a_spec_that_is_none_is_wrong_usage(server: FakeServer, tickets: Path, spec: str) -> None:
    result = tuneproof_command("submit", str(tickets), "--spec", spec)
    assert result.exit_code == 2
    assert "--spec takes" in result.stderr
    assert not server.requests


def test_predict_labels_the_lines_of_stdin_some_at_a_time(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: httpx.Request) -> dict[str, Any]:
        texts = json.loads(request.content)["texts"]
        return {"model_id": "mdl_1", "predictions": [{"label": t.upper(), "confidence": 0.987} for t in texts]}

    monkeypatch.setattr(tuneproof.cli, "TEXTS_PER_CALL", 2)
    server.answers["POST /predict"] = answer
    result = tuneproof_command("predict", "--model", "prod", stdin="a\n\nb  b\r\nc\n")
    assert result.stdout == "A\t0.987\ta\nB  B\t0.987\tb b\nC\t0.987\tc\n"
    assert [json.loads(request.content)["texts"] for request in server.requests] == [["a", "b  b"], ["c"]]
    answers = tuneproof_command("predict", "--model", "prod", "a", "b", "c", "--json").stdout.splitlines()
    assert [len(json.loads(line)["predictions"]) for line in answers] == [2, 1]


def test_models_lists_name_version_and_aliases(server: FakeServer) -> None:
    model = {"id": "mdl_1", "name": "tickets [x]", "version": 2, "method": "lora", "aliases": ["prod"]}
    server.answers["GET /models"] = {"data": [model | {"metrics": {"accuracy": 0.91}}], "has_more": False}
    assert "mdl_1 lora   0.910    tickets [x] v2 (prod)" in tuneproof_command("models").stdout


# The server's parts -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["serve"], ["service", "serve"]),
        (["serve", "--host", "::1", "--port", "9000"], ["service", "serve", "--host", "::1", "--port", "9000"]),
        (["worker"], ["worker"]),
        (["migrate"], ["service", "migrate"]),
        (
            ["keys", "create", "--name", "ci", "--scope", "write", "--expires-days", "9"],
            ["service", "keys", "create", "--name", "ci", "--scope", "write", "--expires-days", "9"],
        ),
        (["keys", "list"], ["service", "keys", "list"]),
        (["keys", "revoke", "key_1"], ["service", "keys", "revoke", "key_1"]),
        (["models", "pull", "f2llm-0.6b"], ["service", "pull", "f2llm-0.6b"]),
        (["models", "pull"], ["service", "pull", "qwen3-0.6b"]),
    ],
)
def test_the_servers_parts_take_this_processs_place(
    monkeypatch: pytest.MonkeyPatch, words: list[str], command: list[str]
) -> None:
    def execv(program: str, arguments: list[str]) -> None:
        assert program == sys.executable
        assert arguments == [sys.executable, "-P", "-m", *command]
        raise SystemExit(42)

    monkeypatch.setattr("tuneproof.processes.os.execv", execv)
    assert tuneproof_command(*words).exit_code == 42


@pytest.mark.parametrize("words", [["up"], ["serve"], ["worker"], ["migrate"], ["keys", "list"], ["demo"]])
def test_without_the_server_extra_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr("tuneproof.processes.importlib.util.find_spec", lambda name: None)
    result = tuneproof_command(*words)
    assert result.exit_code == 2
    assert "pip install 'tuneproof[server]'" in result.stderr


def test_the_command_imports_nothing_of_the_server() -> None:
    program = "import sys, tuneproof.demo; print(*{'service', 'worker', 'fastapi', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == ""


@pytest.mark.parametrize(("migrated", "code"), [(0, 7), (4, 4)])
def test_up_migrates_first_and_starts_nothing_where_that_fails(
    monkeypatch: pytest.MonkeyPatch, migrated: int, code: int
) -> None:
    monkeypatch.setattr("tuneproof.cli.subprocess.call", lambda command: migrated)
    started: list[dict[str, list[str]]] = []
    monkeypatch.setattr(tuneproof.cli, "run_together", lambda commands: started.append(commands) or 7)
    assert tuneproof_command("up", "--port", "9000").exit_code == code
    assert [list(commands) for commands in started] == ([["api", "worker"]] if migrated == 0 else [])


# Run by `&` in a script or by nohup, the tests have been told to ignore signals, and what they start inherits that.
PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from tuneproof.processes import run_together
commands = {str(n): [sys.executable, "-c", program] for n, program in enumerate(sys.argv[2:])}
sys.exit(run_together(commands, grace_seconds=float(sys.argv[1])))
"""
WAITS = "import os, signal; os.write(1, b'up\\n'); signal.pause()"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAITS}"


def started_together(grace_seconds: float, *programs: str) -> subprocess.Popen[str]:
    """A process that runs the programs together; they share its stdout, which ends when the last has ended."""
    command = [sys.executable, "-c", PARENT, str(grace_seconds), *programs]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    for program in programs:
        if program.endswith(WAITS):
            assert parent.stdout.readline() == "up\n"
    return parent


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_told_to_stop_it_ends_both_and_exits_with_0(number: signal.Signals) -> None:
    parent = started_together(30, WAITS, WAITS)
    parent.send_signal(number)
    assert parent.communicate() == ("", None)
    assert parent.returncode == 0


def test_what_does_not_end_in_the_grace_time_is_killed() -> None:
    parent = started_together(0.05, DEAF, WAITS)
    parent.send_signal(signal.SIGTERM)
    parent.communicate()
    assert parent.returncode == 0


@pytest.mark.parametrize(
    ("last_words", "code"),
    [("raise SystemExit(3)", 3), ("", 1), ("import os; os.kill(os.getpid(), 9)", 128 + 9)],
)
def test_where_one_ends_the_other_is_ended_and_the_code_is_passed_on(last_words: str, code: int) -> None:
    parent = started_together(30, WAITS, last_words)
    parent.communicate()
    assert parent.returncode == code


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's own")
def test_killed_outright_it_leaves_no_orphans() -> None:
    parent = started_together(30, WAITS, WAITS)
    parent.kill()
    assert parent.communicate() == ("", None)


# The demo -----------------------------------------------------------------------------------------------
def go_through(server: FakeServer, tmp_path: Path, **given: Any) -> None:
    path = tmp_path / "my tickets.csv"
    path.write_text("text,label\n")
    demo.go_through(server.client(), path, tmp_path, lambda: None, **{"own_file": False, **given})


@pytest.fixture
def demo_server(server: FakeServer) -> FakeServer:
    def answer(request: httpx.Request) -> dict[str, Any]:
        asked = json.loads(request.content)
        predictions = [{"label": "refund", "confidence": 0.5} for _ in asked["texts"]]
        return {"model_id": asked["model"], "predictions": predictions}

    predictions = "row_id,split,text\n0,validation,v\n" + "".join(f"{n},test,unseen {n}\n" for n in range(1, 9))
    artifacts = "GET /jobs/job_1/artifacts/"
    server.answers |= {
        "GET /readyz": iter([unreachable, problem(503, "engine_unavailable"), {"status": "ok"}]),
        "POST /jobs": RUNNING,
        "GET /jobs/job_1": JOB,
        "POST /predict": answer,
        f"{artifacts}metrics.json": METRICS,
        f"{artifacts}predictions.csv": httpx.Response(200, text=predictions),
        f"{artifacts}report.html": httpx.Response(200, text="<p>the report</p>"),
    }
    return server


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneproof.demo.time.sleep", lambda seconds: None)


def test_the_demo_goes_from_one_post_to_three_predictions(
    demo_server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go_through(demo_server, tmp_path)
    shown = capsys.readouterr()
    posts = [request for request in demo_server.requests if request.method == "POST"]
    assert [request.url.path for request in posts] == ["/jobs", "/predict"]
    assert '{"name": "my tickets"}' in posts[0].content.decode()
    assert json.loads(posts[1].content)["model"] == "mdl_probe", "the recommended method's model is asked"
    assert json.loads(posts[1].content)["texts"] == demo.NEW_TEXTS
    assert "embedding_logreg 300  -1.0 [-3.0, +1.0] 5/8          0.580  inconclusive" in shown.out
    assert shown.out.count("refund") == 3
    assert (tmp_path / "demo" / "job_1" / "report.html").read_text() == "<p>the report</p>"
    assert "GET /jobs/job_1/report" in shown.out


def test_without_a_generative_model_it_says_similarity_and_names_the_command_for_more(
    demo_server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go_through(demo_server, tmp_path)
    shown = capsys.readouterr().out
    assert "similarity" in shown
    assert "prompting" not in shown.lower()
    assert "models pull qwen3-0.6b" in shown


def test_the_demo_prompts_the_model_it_is_told_to(
    demo_server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go_through(demo_server, tmp_path, prompt="remote:ollama")
    (submitted,) = [request for request in demo_server.requests if request.url.path == "/jobs"]
    assert '{"name": "my tickets", "baseline": {"prompt_model": "remote:ollama"}}' in submitted.content.decode()
    assert "models pull" not in capsys.readouterr().out


def test_a_demo_told_to_prompt_an_unknown_model_says_what_the_server_said_and_shows_no_logs(
    demo_server: FakeServer, monkeypatch: pytest.MonkeyPatch, tickets: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "Client", demo_server.client)
    monkeypatch.setattr(demo, "server_command", lambda *words: [sys.executable, "-c", "input()"])
    monkeypatch.setattr(demo, "check_alive", lambda processes: None)
    demo_server.answers["POST /jobs"] = problem(422, detail="Configured are: 'remote:ollama'.")
    result = tuneproof_command("demo", str(tickets), "--data-dir", str(tmp_path / "data"), "--prompt", "remote:x")
    assert result.exit_code == 2
    assert result.stderr == "Error: Configured are: 'remote:ollama'.\n"


def test_make_demo_passes_the_model_on() -> None:
    root = Path(__file__).parents[2]
    shown = subprocess.check_output(["make", "--dry-run", "--directory", root, "demo", "PROMPT=remote:x"], text=True)
    assert "demo  --prompt 'remote:x'" in shown


def test_of_a_users_own_file_unseen_rows_are_asked_about(demo_server: FakeServer, tmp_path: Path) -> None:
    go_through(demo_server, tmp_path, own_file=True)
    asked = next(request for request in demo_server.requests if request.url.path == "/predict")
    assert json.loads(asked.content)["texts"] == ["unseen 1", "unseen 2", "unseen 3"]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"POST /jobs": problem(401)}, "TUNEPROOF_API_KEY"),
        ({"GET /jobs/job_1": FAILED}, "The job ended as failed"),
        ({"GET /jobs/job_1": JOB | {"artifacts": []}}, "left no report.html"),
        ({"GET /jobs/job_1": JOB | {"model_id": None, "summary": {"methods": {}}}}, "published no model"),
    ],
)
def test_the_demo_fails_where_something_did_not_happen(
    demo_server: FakeServer, tmp_path: Path, answers: dict[str, Any], words: str
) -> None:
    demo_server.answers |= answers
    with pytest.raises(demo.DemoFailed, match=words):
        go_through(demo_server, tmp_path)


def test_a_demo_whose_server_dies_shows_the_end_of_its_log(
    monkeypatch: pytest.MonkeyPatch, tickets: Path, tmp_path: Path
) -> None:
    program = "import os, sys; sys.exit(os.environ['TUNEPROOF_DATA_DIR'] + ' is on fire')"
    monkeypatch.setattr(demo, "server_command", lambda *words: [sys.executable, "-c", program])
    result = tuneproof_command("demo", str(tickets), "--data-dir", str(tmp_path / "data"))
    assert result.exit_code == 1
    assert f"{tmp_path / 'data'} is on fire" in result.stderr
    assert "ended by itself, with code 1" in result.stderr


def test_a_process_in_the_demo_gets_its_signals_from_the_demo_alone(tmp_path: Path) -> None:
    program = "import os; print(os.getsid(0) == os.getpid())"
    with processes.running({"api": [sys.executable, "-c", program]}, log_folder=tmp_path) as started:
        started["api"].wait()
    assert (tmp_path / "api.log").read_text() == "True\n"
