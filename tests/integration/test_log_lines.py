"""What API, engine and worker log of a day with users' texts in it: ids and routes, and no word of anybody's."""

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.integration.test_webhooks import SECRET
from tests.rows import add_job
from tests.waiting import until

Start = Callable[..., TestClient]
CANARY = "canary7f3a"
TABLE = "text,label\n" + "".join(f"{CANARY} text {i},{'ab'[i % 2]}-{CANARY}\n" for i in range(60))


def test_each_answer_is_one_line_with_its_route_and_ids(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    client = start()
    job_id = add_job(client.app.state.context.db)  # type: ignore[attr-defined]
    with caplog.at_level(logging.DEBUG, "tuneproof"):
        client.get(f"/jobs/{job_id}?{CANARY}={CANARY}")
        client.get(f"/jobs/{CANARY}")
        client.get(f"/{CANARY}")
        client.request(CANARY, "/jobs")
        client.get("/healthz")
        client.get("/ui/")
        client.get(f"/ui/{CANARY}.js")
    assert CANARY not in caplog.text
    lines = [record for record in caplog.records if record.name == "tuneproof.access"]
    assert [(line.levelname, line.getMessage().partition(" in ")[0]) for line in lines] == [
        ("INFO", "GET /jobs/{job_id} 200"), ("INFO", "GET /jobs/{job_id} 404"), ("INFO", "GET unknown 404"),
        ("INFO", "other /jobs 405"), ("DEBUG", "GET /healthz 200"),
        ("INFO", "GET /ui/{path} 200"), ("INFO", "GET /ui/{path} 404"),
    ]  # fmt: skip


@pytest.mark.more
def test_no_process_logs_a_word_of_what_users_sent(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {
        "TUNEPROOF_DATA_DIR": str(tmp_path / "data"), "TUNEPROOF_PORT": str(port), "TUNEPROOF_LOG_FORMAT": "json",
        "TUNEPROOF_LOG_LEVEL": "debug", "TUNEPROOF_MIN_FREE_BYTES": "0", "TUNEPROOF_MAX_ATTEMPTS": "1",
        "TUNEPROOF_WEBHOOK_HOSTS": "http://127.0.0.1:9", "TUNEPROOF_WEBHOOK_SECRET": SECRET,
    }  # fmt: skip
    with (tmp_path / "log").open("wb") as log, contextlib.ExitStack() as stack:
        for command in (["service", "serve"], ["worker"]):
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", *command], env=environment, stdout=log, stderr=log, cwd=tmp_path
            )
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
        job = _a_day(f"http://127.0.0.1:{port}", tmp_path)
    said = (tmp_path / "log").read_text("utf-8")
    assert CANARY not in said
    assert SECRET.removeprefix("whsec_") not in said
    started = ("open http://127.0.0.1:", f"data folder {tmp_path / 'data'}", "started; data folder")
    routes = ("POST /jobs 202", "POST /datasets 201", "GET unknown 404", "stage train", "a prediction failed")
    for route in (*started, *routes):
        assert route in said, route
    lines = [json.loads(line) for line in said.splitlines()]
    assert {line["logger"].partition(".")[0] for line in lines} >= {"tuneproof", "uvicorn"}
    [stage] = [line for line in lines if line["message"] == "stage train"]
    assert (stage["job_id"], stage["attempt"]) == (job["id"], 1)
    failed = next(line for line in lines if line["message"] == "a prediction failed")
    assert (failed["logger"], failed["request_id"]) == ("tuneproof.engine", "of-the-engine")
    assert "in _tokenize" in failed["error"]
    assert any(line.get("status") == 202 and line["route"] == "/jobs" for line in lines)


def _a_day(url: str, folder: Path) -> dict[str, Any]:
    """Uploads, a job, predictions, refusals, a webhook nobody answers, and a model whose files are broken."""
    with httpx.Client(base_url=url, timeout=60, headers={"authorization": f"Bearer {CANARY}"}) as client:

        def up() -> bool:
            try:
                return client.get("/healthz").status_code == 200
            except httpx.HTTPError:
                return False

        until(up, 60, "the API answers")
        assert client.get("/jobs").status_code == 401
        client.headers.pop("authorization")
        made = client.post("/datasets", files={"file": (f"{CANARY}.csv", TABLE)}, data={"name": CANARY}).json()
        client.get(f"/{CANARY}?{CANARY}={CANARY}")
        client.post("/jobs", json={"dataset_id": made["id"], CANARY: CANARY})
        client.post("/jobs", content=f'{{"{CANARY}')
        client.post("/datasets", files={"file": f"text,label\n{CANARY},{CANARY},{CANARY}\n"})
        spec = {"dataset_id": made["id"], "kind": "train", "base_model": "minilm", "train": {"epochs": 1},
                "name": CANARY, "webhook_url": f"http://127.0.0.1:9/{CANARY}"}  # fmt: skip
        job: dict[str, Any] = client.post("/jobs", json=spec).json()

        def ended() -> dict[str, Any] | None:
            now: dict[str, Any] = client.get(f"/jobs/{job['id']}").json()
            return now if now["terminal"] else None

        done = until(ended, 240, "the job ends")
        assert done["status"] == "succeeded", done
        events = client.get(f"/jobs/{job['id']}/events?limit=200").json()["data"]
        assert not [event for event in events if "9/" in event["message"]]
        model = folder / "data" / "storage" / "models" / done["model_id"]
        manifest = json.loads((model / "manifest.json").read_text("utf-8"))
        (model / "manifest.json").write_text(json.dumps(manifest | {"max_length": CANARY}), "utf-8")
        asked = {"model": done["model_id"], "text": f"{CANARY} hello"}

        def refused() -> bool:
            answer = client.post("/predict", json=asked, headers={"x-request-id": "of-the-engine"})
            return answer.status_code == 500 and answer.json()["code"] == "engine_failed"

        until(refused, 120, "the broken model is told")
        return done
