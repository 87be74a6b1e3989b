"""The command against a fake server: what it prints, where, and with which code it ends."""

import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.fake_server import (
    DATASET,
    EMPTY,
    FAILED,
    JOB,
    MODEL,
    RUNNING,
    FakeServer,
    answer,
    event,
    problem,
    tuneproof_command,
    unreachable,
)
from tuneproof import Client, Job, cli
from tuneproof.commands import models, options, show
from tuneproof.results import parse


def upper(request: httpx.Request) -> dict[str, Any]:
    return answer(json.loads(request.content)["texts"])


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
def test_an_error_is_a_sentence_on_stderr_and_an_exit_code(
    server: FakeServer, waits: list[float], answer: Any, code: int
) -> None:
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
    ended = {"failed": "failed", "cancelled": "was cancelled"}[status]
    assert f"The job job_1 {ended}: It did not fit. (out_of_memory)\nTry a smaller batch." in result.stderr


def test_watch_shows_stage_share_and_time_left_and_then_the_result(server: FakeServer) -> None:
    server.answers["GET /jobs/job_1"] = RUNNING
    server.answers["GET /jobs/job_1/wait"] = JOB
    found = [event(1, "The embedded model was taken.", level="warning"),
             event(2, type="metric", data={"validation_macro_f1": 0.912})]  # fmt: skip
    server.answers["GET /jobs/job_1/events"] = {"data": found, "has_more": False}
    result = tuneproof_command("watch", "job_1")
    assert result.exit_code == 0
    assert "train       42%  0:01:35 left  F1 0.912  epoch [2]/5" in result.stderr
    assert "Warning: The embedded model was taken." in result.stdout
    assert "zero_shot_similarity 0.500    0.400    baseline_subset" in result.stdout
    assert "embedding_logreg is as good as it gets [here]\nNothing beats it; set seed to 1.\n" in result.stdout
    assert "predict --model mdl_probe 'a text'\n" in result.stdout
    assert result.stdout.endswith("The job's page: http://127.0.0.1:8000/ui/#/job/job_1\n")


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
    fields = {"name": "n", "text_column": "0", "has_header": "false", "delimiter": r"\t", "rare_labels": "drop"}
    for name, value in (fields | {"spec": '{"seed": 7, "base_model": "qwen3-0.6b"}'}).items():
        assert f'name="{name}"\r\n\r\n{value}\r\n' in body


def test_with_json_stdout_is_the_servers_json_alone(server: FakeServer, tickets: Path) -> None:
    server.answers |= {"POST /jobs": RUNNING, "GET /jobs/job_1": JOB, "GET /models": EMPTY}
    assert json.loads(tuneproof_command("submit", str(tickets), "--json").stdout) == RUNNING
    assert json.loads(tuneproof_command("submit", str(tickets), "--watch", "--json").stdout) == JOB
    assert json.loads(tuneproof_command("watch", "job_1", "--json").stdout) == JOB
    assert json.loads(tuneproof_command("models", "--json").stdout) == []


PREDICTED = JOB | {
    "kind": "predict",
    "model_id": "mdl_1",
    "summary": {"headline": "3 of 3 rows labelled.", "labels": [{"label": "refund [x]", "count": 3}]},
}


def test_a_whole_file_is_labelled_by_a_job_and_its_predictions_are_downloaded(
    server: FakeServer, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server.answers |= {"POST /jobs": RUNNING, "GET /jobs/job_1": PREDICTED}
    csv = b"row_id,text,label,confidence\n"
    server.answers["GET /jobs/job_1/artifacts/predictions.csv"] = lambda request: httpx.Response(200, content=csv)
    given = ["predict", "--model", "prod", "--file", str(tickets), "--text-column", "0", "--min-confidence", "0.5"]
    assert "watch job_1" in tuneproof_command(*given).stdout
    body = server.requests[0].content.decode()
    assert '"kind": "predict", "model": "prod", "min_confidence": 0.5}' in body
    assert 'name="text_column"\r\n\r\n0\r\n' in body
    shown = tuneproof_command(*given, "--top-k", "2", "--watch")
    assert shown.exit_code == 0
    assert "refund [x] 3" in shown.stdout
    assert "3 of 3 rows labelled." in shown.stdout
    assert (tmp_path / "predictions-job_1.csv").read_bytes() == csv
    assert json.loads(tuneproof_command(*given, "--output", "mine.csv", "--json").stdout) == PREDICTED
    assert (tmp_path / "mine.csv").read_bytes() == csv


def test_how_a_file_to_label_is_read_can_be_said_as_for_one_to_learn_from(server: FakeServer, tickets: Path) -> None:
    server.answers["POST /jobs"] = RUNNING
    said = ["--encoding", "cp1252", "--delimiter", ";", "--has-header"]
    assert tuneproof_command("predict", "--model", "prod", "--file", str(tickets), *said).exit_code == 0
    body = server.requests[0].content.decode()
    for name, value in {"encoding": "cp1252", "delimiter": ";", "has_header": "true"}.items():
        assert f'name="{name}"\r\n\r\n{value}\r\n' in body
    for option in (said[:2], said[2:4], ["--no-header"]):
        assert tuneproof_command("predict", "--model", "prod", "a text", *option).exit_code == 2
    assert len([request for request in server.requests if request.method == "POST"]) == 1


def test_a_header_in_doubt_is_told_when_the_job_starts(server: FakeServer, tickets: Path) -> None:
    doubt = {"code": "unclear_header", "message": "It may be a header.", "count": 1, "rows": [0]}
    warnings = [*DATASET["warnings"], doubt]
    server.answers |= {"POST /jobs": RUNNING, "GET /datasets/ds_1": DATASET | {"inferred": [], "warnings": warnings}}
    told = tuneproof_command("predict", "--model", "prod", "--file", str(tickets))
    assert told.stderr == "Warning: It may be a header.\n"


def test_a_warning_that_each_attempt_gave_is_shown_once(server: FakeServer) -> None:
    found = [event(i, message, level="warning") for i, message in enumerate(("Twice.", "Cut.") * 4, 1)]
    server.answers |= {"GET /jobs/job_1": JOB, "GET /jobs/job_1/events": {"data": found, "has_more": False}}
    for command in ("watch", "status"):
        assert tuneproof_command(command, "job_1").stdout.startswith("Warning: Twice.\nWarning: Cut.\nmethod ")


def test_the_column_that_was_recognised_is_told_and_no_reason_to_fail(server: FakeServer, tickets: Path) -> None:
    found = DATASET | {"inferred": ["text_column", "delimiter"], "text_column": "msg [x]", "label_column": None}
    server.answers |= {"POST /jobs": RUNNING, "GET /datasets/ds_1": iter([found, problem(404)])}
    told, untold = (tuneproof_command("predict", "--model", "prod", "--file", str(tickets)) for _ in range(2))
    assert told.stderr == "Recognised 'msg [x]' as the column of texts; --text-column names another.\n"
    assert (untold.exit_code, untold.stderr, untold.stdout) == (0, "", told.stdout)


@pytest.mark.parametrize("output", ["missing/dir/x.csv", "."])
def test_where_nothing_could_be_written_no_job_is_started(
    server: FakeServer, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = tuneproof_command("predict", "--model", "prod", "--file", str(tickets), "--output", output)
    assert (result.exit_code, server.requests) == (2, [])


def test_where_the_predictions_could_not_be_written_it_is_said_where_they_are(
    server: FakeServer, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()

    def removed(request: httpx.Request) -> httpx.Response:
        (tmp_path / "there").rmdir()
        return httpx.Response(200, content=b"row_id\n")

    server.answers |= {"POST /jobs": RUNNING, "GET /jobs/job_1": PREDICTED}
    server.answers["GET /jobs/job_1/artifacts/predictions.csv"] = removed
    output = str(tmp_path / "there" / "x.csv")
    result = tuneproof_command("predict", "--model", "prod", "--file", str(tickets), "--output", output)
    assert result.exit_code == 2
    assert "/jobs/job_1/artifacts/predictions.csv" in result.stderr


def test_of_a_file_to_label_nothing_is_downloaded_where_the_job_failed(server: FakeServer, tickets: Path) -> None:
    server.answers |= {"POST /jobs": RUNNING, "GET /jobs/job_1": FAILED}
    assert tuneproof_command("predict", "--model", "prod", "--file", str(tickets), "--watch").exit_code == 1


@pytest.mark.parametrize("more", [["a text", "--file"], ["--target-precision", "0.9", "--file"], ["a", "--output"]])
def test_what_goes_with_a_file_alone_is_wrong_usage_without(server: FakeServer, tickets: Path, more: list[str]) -> None:
    assert tuneproof_command("predict", "--model", "prod", *more, str(tickets)).exit_code == 2
    assert server.requests == []


@pytest.mark.parametrize("spec", ["{", "[1]", "@no/such/file.json"])
def test_a_spec_that_is_none_is_wrong_usage(server: FakeServer, tickets: Path, spec: str) -> None:
    result = tuneproof_command("submit", str(tickets), "--spec", spec)
    assert result.exit_code == 2
    assert "--spec takes" in result.stderr
    assert not server.requests


def test_predict_labels_the_lines_of_stdin_some_at_a_time(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "TEXTS_PER_CALL", 2)
    server.answers["POST /predict"] = upper
    result = tuneproof_command("predict", "--model", "prod", stdin="a\n\nb  b\r\nc\n")
    assert result.stdout == "A\t0.987\ta\n\t\t\nB  B\t0.987\tb b\nC\t0.987\tc\n"
    assert [json.loads(request.content)["texts"] for request in server.requests] == [["a"], ["b  b", "c"]]
    assert [json.loads(request.content)["model"] for request in server.requests] == ["prod", "mdl_1"], "one version"
    lines = tuneproof_command("predict", "--model", "prod", "a", "b", "c", "--json").stdout.splitlines()
    assert [json.loads(line)["label"] for line in lines] == ["A", "B", "C"]
    assert json.loads(lines[0]) == {"text": "a", **answer(["a"])["predictions"][0], "model_id": "mdl_1"}


def test_each_line_of_stdin_has_its_line_in_the_answer_also_a_blank_one(server: FakeServer) -> None:
    server.answers["POST /predict"] = upper
    lines = tuneproof_command("predict", "--model", "prod", "--json", stdin="\n  \na\n\n").stdout.splitlines()
    assert [json.loads(line)["label"] for line in lines] == [None, None, "A", None]
    assert json.loads(lines[0]) == dict.fromkeys(json.loads(lines[2])) | {"text": "", "model_id": "mdl_1"}
    assert [json.loads(request.content)["texts"] for request in server.requests] == [["a"]], "blank ones are not sent"


def test_blank_lines_alone_are_answered_by_a_model_that_is_there(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "TEXTS_PER_CALL", 2)
    server.answers["POST /predict"] = upper
    assert tuneproof_command("predict", "--model", "prod", stdin=" \n\n").stdout == "\t\t\n\t\t\n"
    lines = tuneproof_command("predict", "--model", "prod", "--json", stdin="\n\n\na\n").stdout.splitlines()
    assert {json.loads(line)["model_id"] for line in lines} == {"mdl_1"}, "not the alias"
    assert len({frozenset(json.loads(line)) for line in lines}) == 1, "the same keys"
    server.answers["POST /predict"] = problem(404, "not_found")
    assert tuneproof_command("predict", "--model", "gone", stdin="\n\n").exit_code == 2


def test_nothing_on_stdin_is_wrong_usage(server: FakeServer) -> None:
    result = tuneproof_command("predict", "--model", "prod", stdin="")
    assert (result.exit_code, result.stdout, server.requests) == (2, "", [])
    assert "There are no texts" in result.stderr


def test_the_address_of_the_pages_is_told_from_the_services(server: FakeServer, tickets: Path) -> None:
    server.answers |= {"GET /ui/jobs": problem(404, "not_found"), "POST /ui/jobs": problem(405)}
    for words in (["jobs"], ["submit", str(tickets)]):
        result = tuneproof_command(*words, "--url", "http://other.test:8000/ui")
        assert result.exit_code == 2
        assert "is the service's root, http://other.test:8000, without /ui." in result.stderr


def test_models_lists_name_version_and_aliases(server: FakeServer) -> None:
    server.answers["GET /models"] = {"data": [MODEL], "has_more": False}
    assert "mdl_1 lora   0.910    tickets [x] v2 (prod)" in tuneproof_command("models").stdout


def test_jobs_and_datasets_are_listed_with_what_tells_them_apart(server: FakeServer) -> None:
    server.answers |= {
        "GET /jobs": {"data": [RUNNING | {"name": "tickets [x]"}, JOB], "has_more": True},
        "GET /datasets": {"data": [DATASET], "has_more": False},
    }
    shown = tuneproof_command("jobs", "--limit", "2").stdout.splitlines()
    assert re.fullmatch(r"job_1 experiment running +42%  2026-03-01 \d\d:00 +tickets \[x\] *", shown[1])
    assert " embedding_logreg " in shown[2]
    shown = tuneproof_command("datasets").stdout.splitlines()
    assert re.fullmatch(r"ds_1 3    1      2026-03-01 \d\d:00 tickets \[x\] *", shown[1])
    assert json.loads(tuneproof_command("jobs", "--limit", "1", "--json").stdout)[0]["name"] == "tickets [x]"
    assert json.loads(tuneproof_command("datasets", "--json").stdout) == [DATASET]


def test_a_job_is_looked_at_cancelled_and_tried_again(server: FakeServer) -> None:
    server.answers |= {
        "GET /jobs/job_1": iter([RUNNING, JOB, FAILED, JOB]),
        "POST /jobs/job_1/cancel": RUNNING | {"status": "cancelling"},
        "POST /jobs/job_1/retry": JOB | {"status": "queued", "terminal": False, "progress": {"fraction": 0.0}},
    }
    assert tuneproof_command("status", "job_1").stdout == "job_1 is running, 42% done: epoch [2]/5\n"
    assert "Nothing beats it; set seed to 1." in tuneproof_command("status", "job_1").stdout
    failed = tuneproof_command("status", "job_1")
    assert (failed.exit_code, "It did not fit." in failed.stderr) == (0, True)
    assert json.loads(tuneproof_command("status", "job_1", "--json").stdout) == JOB
    assert "job_1 is cancelling" in tuneproof_command("cancel", "job_1").stdout
    assert tuneproof_command("retry", "job_1").stdout == "job_1 is queued, 0% done.\n"
    assert json.loads(tuneproof_command("retry", "job_1", "--json").stdout)["status"] == "queued"


@pytest.mark.parametrize(("opens", "code"), [(True, 0), (False, 1)])
def test_a_report_is_put_into_a_file_and_opened(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opens: bool, code: int
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("tuneproof.commands.jobs.webbrowser.open", lambda url: opened.append(url) or opens)
    monkeypatch.chdir(tmp_path)
    server.answers["GET /jobs/job_1/report"] = lambda request: httpx.Response(200, content=b"<p>page")
    assert tuneproof_command("report", "job_1").stdout == "report-job_1.html\n"
    assert (tmp_path / "report-job_1.html").read_bytes() == b"<p>page"
    shown = tuneproof_command("report", "job_1", "--output", "my report.html", "--json")
    assert json.loads(shown.stdout) == {"path": "my report.html"}
    assert opened == []
    assert tuneproof_command("report", "job_1", "--open").exit_code == code
    assert opened == [(tmp_path / "report-job_1.html").as_uri()]


def test_a_file_that_cannot_be_written_is_a_sentence(server: FakeServer, tmp_path: Path) -> None:
    server.answers["GET /jobs/job_1/report"] = httpx.Response(200, content=b"<p>page")
    result = tuneproof_command("report", "job_1", "--output", str(tmp_path / "no" / "report.html"))
    assert result.exit_code == 2
    assert result.stderr == f"Error: {tmp_path / 'no' / 'report.html.part'}: No such file or directory\n"


def test_a_file_that_vanishes_is_a_sentence(server: FakeServer, tickets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = options.connect

    def meanwhile(url: str, api_key: str | None) -> Client:
        tickets.unlink()
        return connect(url, api_key)

    monkeypatch.setattr("tuneproof.commands.jobs.connect", meanwhile)
    result = tuneproof_command("submit", str(tickets))
    assert (result.exit_code, result.stderr) == (2, f"Error: {tickets}: No such file or directory\n")


def test_promoting_moves_an_alias_and_a_refusal_ends_with_1(server: FakeServer) -> None:
    moved = {"alias": "prod", "model_id": "mdl_1", "updated_at": JOB["created_at"]}
    gate = {"checked": False, "note": "Forced: nothing was compared."}
    server.answers["PUT /aliases/prod"] = iter(
        [moved | {"gate": gate}, moved | {"gate": None}, problem(409, "promotion_refused"), problem(409, "conflict")]
    )
    result = tuneproof_command("promote", "mdl_1", "prod", "--force")
    assert (result.stdout, result.stderr) == ("prod is mdl_1 now.\n", "Forced: nothing was compared.\n")
    assert json.loads(server.requests[0].content) == {"model_id": "mdl_1", "force": True}
    assert json.loads(tuneproof_command("promote", "mdl_1", "prod", "--json").stdout) == moved | {"gate": None}
    assert [tuneproof_command("promote", "mdl_1", "prod").exit_code for _ in range(2)] == [1, 2]


@pytest.mark.parametrize(
    ("verdict", "said"),
    [("candidate_wins", "shown to be better"), ("inconclusive", "not shown to be better or worse")],
)
def test_promoting_says_how_the_two_compare(server: FakeServer, verdict: str, said: str) -> None:
    gate = {"checked": True, "n": 1234, "accuracy_delta": -0.069, "verdict": verdict, "note": "The labels differ."}
    moved = {"alias": "prod", "model_id": "mdl_1", "updated_at": JOB["created_at"], "gate": gate}
    server.answers["PUT /aliases/prod"] = iter([moved])
    told = tuneproof_command("promote", "mdl_1", "prod").stderr
    compared = "Against the one before: -6.9 points of accuracy on 1,234 rows that neither was trained on"
    assert " ".join(told.split()) == f"{compared}, {said}. The labels differ."


def test_standard_input_is_utf8_with_or_without_a_mark(server: FakeServer) -> None:
    server.answers["POST /predict"] = upper
    marked = tuneproof_command("predict", "--model", "prod", stdin="\ufeffgr\u00fcn\n".encode())
    assert marked.stdout == "GR\u00dcN\t0.987\tgr\u00fcn\n"
    result = tuneproof_command("predict", "--model", "prod", stdin=b"ok\ngr\xfcn\n")
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    said = " ".join(result.stderr.replace("\u2502", " ").split())
    assert "found 0xfc at byte 3 of line 2" in said


THRESHOLD = {
    "min_confidence": 0.5, "validation_precision": 0.9, "validation_coverage": 0.8, "validation_rows": 1009,
    "note": "Nine rows are few.",
}  # fmt: skip
EVIDENCE = "Threshold 0.5: 80.0% of 1,009 validation rows reach it, 90.0% of these are right."


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, f"{EVIDENCE} Nine rows are few.\n"),
        ({"note": None}, f"{EVIDENCE}\n"),
        ({"min_confidence": None, "validation_precision": None, "note": "None reached it."}, "None reached it.\n"),
    ],
)
def test_the_threshold_found_and_what_stands_behind_it_is_said_once_and_with_json_in_every_line(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], said: str
) -> None:
    threshold = THRESHOLD | found
    monkeypatch.setattr(models, "TEXTS_PER_CALL", 1)
    server.answers["POST /predict"] = lambda request: upper(request) | {"threshold": threshold}
    result = tuneproof_command("predict", "--model", "prod", "a", "b", "--target-precision", "0.9")
    assert result.stderr == said
    assert result.stdout == "A\t0.987\ta\nB\t0.987\tb\n"
    lines = tuneproof_command("predict", "--model", "prod", "--json", "--target-precision", "0.9", stdin="a\n\n").stdout
    assert [json.loads(line)["threshold"] for line in lines.splitlines()] == [threshold] * 2


def test_who_watches_is_told_that_the_server_is_away_and_that_another_attempt_begins(
    server: FakeServer, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own; a command has none
    server.answers["GET /jobs/job_1"] = RUNNING
    again = RUNNING | {"attempt": 2, "stage": "prepare", "progress": {"fraction": 0.0, "message": "starting"}}
    server.answers["GET /jobs/job_1/wait"] = iter([unreachable, unreachable, again, JOB])
    started = [
        {"data": [event(i, f"attempt {i} started", type="status", data={"attempt": i})], "has_more": False}
        for i in (1, 2)
    ]
    server.answers["GET /jobs/job_1/events"] = iter([*started, EMPTY, EMPTY])
    said = tuneproof_command("watch", "job_1").stderr.splitlines()
    assert said[0].startswith("train       42%")
    assert said[1] == "No answer from http://127.0.0.1:8000; asking for 120 s."
    assert said[2] == "attempt 2 started"
    assert said[3] == "prepare      0%  starting"


@pytest.mark.parametrize("width", [60, 200])
def test_in_a_terminal_progress_is_one_line_with_stage_time_left_and_score(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    long = parse(Job, RUNNING | {"progress": RUNNING["progress"] | {"message": "epoch 2/5, step 310/640"}})
    screen = io.StringIO()
    monkeypatch.setattr(show, "err", Console(file=screen, force_terminal=True, width=width, color_system=None))
    show.show_progress([(long, 0.912)])
    drawn = [line for line in re.sub(r"\x1b\[[0-9?]*[a-zA-Z]", "\n", screen.getvalue()).splitlines() if "train" in line]
    assert drawn
    assert all("42%" in line and "0:01:35 left  F1 0.912" in line and len(line.strip()) <= width for line in drawn)
    assert (drawn[-1].rstrip().endswith("step 310/640")) == (width == 200)


def test_every_command_says_its_exit_codes_where_it_asks_a_server() -> None:
    for name in (
        "submit",
        "jobs",
        "status",
        "watch",
        "cancel",
        "retry",
        "report",
        "predict",
        "promote",
        "datasets",
        "models",
    ):
        shown = " ".join(tuneproof_command(name, "--help").stdout.split())
        assert "Exit codes: 0 done; 1 the job failed" in shown, name
        assert "--json" in shown, name


def test_what_the_server_knows_is_completed_and_a_failure_is_silent(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    alias = {"alias": "prod", "model_id": "mdl_1", "updated_at": JOB["created_at"], "history": []}
    server.answers |= {
        "GET /jobs": {"data": [JOB, JOB | {"id": "job_2"}, JOB | {"id": "other"}], "has_more": False},
        "GET /aliases": {"data": [alias], "has_more": False},
        "GET /models": {"data": [MODEL], "has_more": False},
    }

    def completed(line: str) -> list[str]:
        variables = {
            "_TUNEPROOF_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split()) - 1),
        }
        return CliRunner().invoke(cli.app, [], env=variables, prog_name="tuneproof").stdout.split()

    assert completed("tuneproof watch job") == ["job_1", "job_2"]
    assert completed("tuneproof predict --model p") == ["prod"]
    assert completed("tuneproof promote m") == ["mdl_1"]
    assert completed("tuneproof promote mdl_1 p") == ["prod"]
    assert completed("tuneproof can") == ["cancel"]
    server.answers["GET /jobs"] = unreachable
    assert completed("tuneproof watch job") == []
