"""The demo against a fake server."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fake_server import FAILED, JOB, RUNNING, FakeServer, answer, problem, tuneproof_command, unreachable
from tuneproof import demo

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


def go_through(server: FakeServer, tmp_path: Path, **given: Any) -> None:
    path = tmp_path / "my tickets.csv"
    path.write_text("text,label\n")
    demo.go_through(server.client(), path, tmp_path, lambda: None, **{"own_file": False, **given})


@pytest.fixture
def demo_server(server: FakeServer) -> FakeServer:
    def refunds(request: httpx.Request) -> dict[str, Any]:
        asked = json.loads(request.content)
        return answer(asked["texts"], asked["model"], label="refund", confidence=0.5)

    predictions = "row_id,split,text\n0,validation,v\n" + "".join(f"{n},test,unseen {n}\n" for n in range(1, 9))
    artifacts = "GET /jobs/job_1/artifacts/"
    server.answers |= {
        "GET /readyz": iter([unreachable, problem(503, "engine_unavailable"), {"status": "ok"}]),
        "POST /jobs": RUNNING,
        "GET /jobs/job_1": JOB,
        "POST /predict": refunds,
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


def test_without_a_prompt_among_the_methods_it_names_the_command_for_one(
    demo_server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go_through(demo_server, tmp_path)
    shown = capsys.readouterr().out
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
        (
            {"GET /jobs/job_1": JOB | {"model_id": None, "summary": {"headline": "nothing", "methods": {}}}},
            "published no model",
        ),
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
