"""`/metrics` as Prometheus's own parser reads it: right values, names by its rules, and told completely in the docs."""

import asyncio
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from service.api.envelope import Envelope
from service.api.meters import Meters
from service.db import catalog, jobs
from service.db.jobs import Progress
from service.inference.wire import Figures
from tests.rows import GRACE, START, StillClock, add_job, claim, model, publish_stored

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"
Start = Callable[..., TestClient]
FIGURES = Figures(
    texts=300, tokens=4000, batches=[3, 2, 0, 0, 0, 0, 0, 0, 1, 0], adapter_hits=7, adapter_misses=2,
    adapter_evictions=1, adapter_bytes=5000, bases=["minilm", "f2llm-0.6b"], base_bytes=90_000_000,
    gpu_allocated_bytes=91_000_000, gpu_reserved_bytes=100_000_000,
)  # fmt: skip


def families(client: TestClient) -> dict[str, Metric]:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    found = list(text_string_to_metric_families(answer.text))
    assert len({family.name for family in found}) == len(found)
    return {family.name: family for family in found}


def value(found: dict[str, Metric], sample: str, **labels: str) -> float | None:
    """The one sample of that name with at least these labels; None where there is none."""
    values = [
        s.value for family in found.values() for s in family.samples
        if s.name == sample and labels.items() <= s.labels.items()
    ]  # fmt: skip
    assert len(values) <= 1, (sample, labels)
    return values[0] if values else None


@pytest.fixture
def busy(start: Start) -> TestClient:
    """A service on which something of everything has happened."""
    clock = StillClock()
    client = start(clock=clock)
    ctx: Any = client.app.state.context  # type: ignore[attr-defined]
    ctx.engine.figures = FIGURES
    catalog.saw_worker(ctx.db, "wrk_1", START, START)
    add_job(ctx.db)
    lease = claim(ctx.db).lease
    for seconds, stage in ((2, "baseline"), (5, "baseline"), (30, "train")):
        jobs.report(ctx.db, lease, START + timedelta(seconds=seconds), Progress(stage, 0.5, "canary", None))
    publish_stored(ctx.db, lease, [], [model()], {}, START + timedelta(seconds=90), GRACE)
    add_job(ctx.db, now=START - timedelta(seconds=40))
    add_job(ctx.db)
    client.get("/healthz")
    return client


def test_figures_of_jobs_are_the_databases(busy: TestClient) -> None:
    found = families(busy)
    assert value(found, "tuneproof_jobs", status="queued") == 2
    assert value(found, "tuneproof_jobs", status="succeeded") == 1
    assert value(found, "tuneproof_jobs", status="failed") == 0
    assert value(found, "tuneproof_oldest_queued_job_seconds") == 40
    assert value(found, "tuneproof_jobs_ended_total", kind="experiment", status="succeeded") == 1
    seconds = {"prepare": 2.0, "baseline": 28.0, "train": 60.0}
    for stage, taken in seconds.items():
        assert value(found, "tuneproof_job_stage_seconds_sum", kind="experiment", stage=stage) == taken
        assert value(found, "tuneproof_job_stage_seconds_count", kind="experiment", stage=stage) == 1
    assert value(found, "tuneproof_workers") == 1
    assert value(found, "tuneproof_webhooks_waiting") == 0


def test_a_counter_of_jobs_does_not_fall_when_a_job_is_deleted(busy: TestClient) -> None:
    ended = busy.get("/jobs?status=succeeded").json()["data"][0]["id"]
    assert busy.delete(f"/jobs/{ended}").status_code == 204
    found = families(busy)
    assert value(found, "tuneproof_jobs", status="succeeded") == 0
    assert value(found, "tuneproof_jobs_ended_total", kind="experiment", status="succeeded") == 1


def test_attempts_that_are_lost_or_given_back_count_their_time_and_not_as_an_end(start: Start) -> None:
    client = start()
    db = client.app.state.context.db  # type: ignore[attr-defined]
    job_id = add_job(db)
    jobs.give_back(db, claim(db).lease, START + timedelta(seconds=3), GRACE)
    jobs.lose(db, claim(db).lease, "gone", 3, START + timedelta(seconds=4), GRACE)
    jobs.lose(db, claim(db).lease, "gone", 2, START + timedelta(seconds=5), GRACE)
    with db.write() as session:
        jobs.retry(session, job_id, START)
        jobs.cancel(session, job_id, START)
    found = families(client)
    assert value(found, "tuneproof_job_stage_seconds_sum", stage="prepare") == 12
    assert value(found, "tuneproof_job_stage_seconds_count", stage="prepare") == 3
    assert value(found, "tuneproof_jobs_ended_total", status="failed") == 1
    assert value(found, "tuneproof_jobs_ended_total", status="cancelled") == 1


def test_figures_of_the_engine_are_what_it_sent(busy: TestClient) -> None:
    found = families(busy)
    assert value(found, "tuneproof_engine_batch_texts_bucket", le="1") == 3
    assert value(found, "tuneproof_engine_batch_texts_bucket", le="128") == 5
    assert value(found, "tuneproof_engine_batch_texts_count") == 6
    assert value(found, "tuneproof_engine_batch_texts_sum") == 300
    assert value(found, "tuneproof_bases") == 2
    assert value(found, "tuneproof_gpu_memory_allocated_bytes") == 91_000_000
    busy.app.state.context.engine.figures = None  # type: ignore[attr-defined]
    found = families(busy)
    assert value(found, "tuneproof_engine_up") == 1
    assert value(found, "tuneproof_bases") is None


def test_without_a_gpu_nothing_is_said_of_one(busy: TestClient) -> None:
    busy.app.state.context.engine.figures = Figures()  # type: ignore[attr-defined]
    assert not [name for name in families(busy) if "gpu" in name]


def test_replicas_are_counted_and_nothing_is_made_up_of_their_engines(busy: TestClient) -> None:
    busy.app.state.context.engine.figures = Figures(replicas=2)  # type: ignore[attr-defined]
    found = families(busy)
    assert value(found, "tuneproof_replicas") == 2
    assert "tuneproof_engine_tokens" not in found


def test_requests_are_counted_by_route_and_streams_without_their_time(start: Start) -> None:
    client = start()
    for _ in range(3):
        client.get("/jobs/job_0")
    found = families(client)
    assert value(found, "tuneproof_requests_total", route="/jobs/{job_id}", method="GET", status="404") == 3
    assert value(found, "tuneproof_request_seconds_count", route="/jobs/{job_id}") == 3

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        headers = [(b"content-type", scope["path"].strip("/").encode() + b"; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    async def call(path: str, meters: Meters) -> None:
        async def ignore(_message: Any) -> None: ...

        scope = {"type": "http", "path": path, "method": "GET", "headers": []}
        await Envelope(app, meters, 10)(scope, ignore, ignore)  # type: ignore[arg-type]

    for path, timed in (("/text/event-stream", None), ("/text/plain", 1.0)):
        meters = Meters()
        asyncio.run(call(path, meters))
        labels = {"route": "unknown"}
        assert meters.registry.get_sample_value("tuneproof_request_seconds_count", labels) == timed
        counted = labels | {"method": "GET", "status": "200"}
        assert meters.registry.get_sample_value("tuneproof_requests_total", counted) == 1


def test_names_follow_the_rules_that_promtool_checks(busy: TestClient) -> None:
    for name, family in families(busy).items():
        assert re.fullmatch(r"tuneproof_[a-z]+(_[a-z]+)*", name), name
        assert family.documentation.endswith("."), name
        assert family.type in ("counter", "gauge", "histogram", "summary"), name
        assert not re.search(r"_(counter|gauge|histogram|summary|info|count|sum|bucket)$", name), name
        assert not re.search(r"milli|micro|minutes|hours|kilo|mega|giga|_ms|_kb|_mb|percent", name), name
        for unit in ("seconds", "bytes"):
            assert unit not in name or name.endswith(unit), f"{name}: the unit stands last"
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
            assert all(re.fullmatch(r"[a-z]+", label) for label in sample.labels)
        if family.type == "histogram":
            assert [s for s in family.samples if s.labels.get("le") == "+Inf"], name


def rows(client: TestClient) -> list[str]:
    """The table of docs/operations.md: metric, type, labels, meaning."""
    made = []
    for name, family in families(client).items():
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        shown = name + "_total" * (family.type == "counter")
        made.append(f"| `{shown}` | {family.type} | {', '.join(map('`{}`'.format, labels))} | {family.documentation} |")
    return [row.replace("|  |", "| |") for row in made]


def test_the_docs_tell_every_metric(busy: TestClient) -> None:
    found = [line for line in DOCS.read_text("utf-8").splitlines() if line.startswith("| `tuneproof_")]
    made = rows(busy)
    busy.app.state.context.engine.figures = Figures(replicas=2)  # type: ignore[attr-defined]
    made += [row for row in rows(busy) if row not in made]
    assert found == made, "put these rows into docs/operations.md:\n" + "\n".join(made)
