"""A server that says what a test tells it to, over httpx's mock transport; and the answers it begins with."""

from collections.abc import Iterator
from typing import Any

import httpx
from typer.testing import CliRunner, Result

import tuneproof.cli
from tuneproof import AsyncClient, Client
from tuneproof.sync.client import DEFAULT_URL

NOW = "2026-03-01T12:00:00Z"
JOB: dict[str, Any] = {
    "id": "job_1",
    "kind": "experiment",
    "name": "tickets",
    "status": "succeeded",
    "terminal": True,
    "stage": "publish",
    "progress": {"fraction": 1.0, "message": "done", "eta_seconds": None},
    "attempt": 1,
    "created_at": NOW,
    "started_at": NOW,
    "finished_at": NOW,
    "dataset_id": "ds_1",
    "model_id": "mdl_lora",
    "spec": {"seed": 42},
    "error": None,
    "metadata": {},
    "summary": {
        "headline": "embedding_logreg is as good as it gets [here]",
        "recommendation": {
            "method": "embedding_logreg",
            "reason": "Nothing beats it; set `seed` to 1.",
            "margin": 0.02,
        },
        "methods": {
            "zero_shot_similarity": {"accuracy": 0.5, "macro_f1": 0.4, "on": "baseline_subset", "model_id": None},
            "embedding_logreg": {"accuracy": 0.9, "macro_f1": 0.88, "on": "test", "model_id": "mdl_probe"},
            "lora": {"accuracy": 0.89, "macro_f1": 0.87, "on": "test", "model_id": "mdl_lora"},
        },
    },
    "artifacts": [
        {"name": name, "size_bytes": 1, "sha256": "0" * 64, "url": f"/jobs/job_1/artifacts/{name}"}
        for name in ("metrics.json", "predictions.csv", "report.html", "adapter/a.json")
    ],
}
RUNNING = JOB | {
    "status": "running",
    "terminal": False,
    "stage": "train",
    "progress": {"fraction": 0.42, "message": "epoch [2]/5", "eta_seconds": 95.0},
    "summary": None,
    "artifacts": [],
}
FAILED = JOB | {
    "status": "failed",
    "summary": None,
    "error": {"code": "out_of_memory", "message": "It did not fit.", "hint": "Try a smaller batch."},
}
DATASET: dict[str, Any] = {
    "id": "ds_1", "name": "tickets [x]", "created_at": NOW, "sha256": "0" * 64, "size_bytes": 9, "n_rows": 3,
    "n_usable_rows": 3, "text_column": "text", "label_column": "label", "split_column": None, "delimiter": ",",
    "has_header": True, "encoding": "utf-8", "inferred": ["label_column"], "labels": [{"label": "refund", "count": 3}],
    "text_length": {"p50_chars": 1, "p95_chars": 2, "max_chars": 3},
    "warnings": [{"code": "duplicate_text", "message": "Twice.", "count": 1, "rows": [2]}],
}  # fmt: skip
MODEL: dict[str, Any] = {
    "id": "mdl_1", "name": "tickets [x]", "version": 2, "method": "lora", "job_id": "job_1", "base_model": "minilm",
    "base_revision": "sha256:0", "labels": ["a", "b"], "created_at": NOW, "aliases": ["prod"],
    "metrics": {"accuracy": 0.91, "macro_f1": 0.9}, "size_bytes": 3,
}  # fmt: skip
EMPTY = {"data": [], "has_more": False}


def event(number: int, message: str = "hello", **given: Any) -> dict[str, Any]:
    values = {"id": number, "job_id": "job_1", "created_at": NOW, "level": "info", "type": "message", "data": {}}
    return values | {"message": message} | given


def answer(texts: list[str], model_id: str = "mdl_1", **given: Any) -> dict[str, Any]:
    """Of `/predict`: each text in capitals."""
    predictions = [
        {"label": text.upper(), "confidence": 0.987, "probabilities": {}, "abstained": False, "truncated": False}
        | given
        for text in texts
    ]
    return {"model_id": model_id, "predictions": predictions, "usage": {"texts": len(texts), "tokens": 9}}


def problem(status: int, code: str = "some_code", retry_after: str | None = None, **fields: Any) -> httpx.Response:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return httpx.Response(status, json={"detail": "Expected this, found that.", "code": code} | fields, headers=headers)


def unreachable(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


def lost(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("gone", request=request)


class FakeServer:
    """Answers by method and path: with JSON, with what a function makes of the request, or with one after another."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {"GET /jobs/job_1/events": EMPTY, "GET /datasets/ds_1": DATASET}
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        answer = self.answers[f"{request.method} {request.url.path}"]
        answer = next(answer) if isinstance(answer, Iterator) else answer
        answer = answer(request) if callable(answer) else answer
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)

    def client(self, url: str = DEFAULT_URL, api_key: str | None = None, **given: Any) -> Client:
        return Client(url, api_key, transport=httpx.MockTransport(self), **given)

    def async_client(self, url: str = DEFAULT_URL, api_key: str | None = None, **given: Any) -> AsyncClient:
        async def handle(request: httpx.Request) -> httpx.Response:
            await request.aread()
            return self(request)

        return AsyncClient(url, api_key, transport=httpx.MockTransport(handle), **given)


def tuneproof_command(*words: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(tuneproof.cli.app, list(words), input=stdin)
