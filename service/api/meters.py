"""What Prometheus sees. Labels are routes, statuses, kinds and stages, never anything a user wrote.

Requests are this process's own. Figures of jobs come from the database, so every process tells the same; those of
the engine are the ones its process last sent, counted from its start, as a scraper expects of a process.
"""

from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.db import catalog, tallies
from service.db.jobs import STATUSES
from service.db.models import Delivery, Job
from service.inference.handle import EngineHandle
from service.inference.wire import BATCH_BUCKETS, Figures

WORKER_SILENT = timedelta(seconds=30)


class Meters:
    """What a process counts itself, and at each look the figures of the database and the engine."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # a gauge beside every counter, which nobody reads
        self.registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self._requests = Counter("tuneproof_requests", "Requests answered.", labels, registry=self.registry)
        self._seconds = Histogram(
            "tuneproof_request_seconds", "Time to answer, streams aside.", ("route",), registry=self.registry
        )

    def answered(self, method: str, route: str, status: int, seconds: float | None) -> None:
        """`seconds` is None for a stream: how long somebody listens is no time to answer."""
        self._requests.labels(method, route, str(status)).inc()
        if seconds is not None:
            self._seconds.labels(route).observe(seconds)

    def exposition(self, session: Session, engine: EngineHandle, now: datetime) -> bytes:
        """Everything, in Prometheus's text format."""
        looked_up = _Families([*_of_jobs(session, now), *_of_engine(engine)])
        return generate_latest(self.registry) + generate_latest(looked_up)


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def _of_jobs(session: Session, now: datetime) -> Iterator[Metric]:
    by_status = session.execute(select(Job.status, func.count()).group_by(Job.status))
    counts = {status: number for status, number in by_status}  # noqa: C416 -- `dict` is not told what rows hold
    jobs = GaugeMetricFamily("tuneproof_jobs", "Jobs by status.", labels=("status",))
    for status in STATUSES:
        jobs.add_metric((status,), counts.get(status, 0))
    yield jobs
    oldest = session.scalar(select(func.min(Job.created_at)).where(Job.status == "queued"))
    age = 0.0 if oldest is None else max((now - oldest).total_seconds(), 0.0)
    yield _gauge("tuneproof_oldest_queued_job_seconds", "Age of the oldest queued job; 0 where none waits.", age)
    ended = CounterMetricFamily("tuneproof_jobs_ended", "Jobs ended, deleted ones included.", labels=("kind", "status"))
    for row in tallies.tallied(session, "ended"):
        ended.add_metric((row.kind, row.value), row.count)
    yield ended
    stages = SummaryMetricFamily(
        "tuneproof_job_stage_seconds", "Time in stages of jobs, finished or not.", labels=("kind", "stage")
    )
    for row in tallies.tallied(session, "stage"):
        stages.add_metric((row.kind, row.value), count_value=row.count, sum_value=row.seconds)
    yield stages
    seen = len(catalog.workers_seen(session, now - WORKER_SILENT))
    yield _gauge("tuneproof_workers", "Workers seen in the last 30 seconds.", seen)
    waiting = session.scalar(select(func.count()).select_from(Delivery)) or 0
    yield _gauge("tuneproof_webhooks_waiting", "Webhook calls not yet taken or given up.", waiting)


def _of_engine(engine: EngineHandle) -> Iterator[Metric]:
    yield _gauge("tuneproof_engine_up", "Whether the engine process runs.", float(engine.running))
    yield _counter("tuneproof_engine_restarts", "Starts of the engine after it was lost.", engine.restarts)
    yield _gauge("tuneproof_predict_waiting_calls", "Calls of /predict that wait or are scored.", engine.waiting_calls)
    yield _gauge("tuneproof_predict_waiting_characters", "Characters of those calls' texts.", engine.waiting_chars)
    if engine.figures is None:
        return
    if engine.figures.replicas is None:
        yield from _of_figures(engine.figures)
    else:
        answer = engine.figures.replicas
        yield _gauge("tuneproof_replicas", "Replicas that answer, in place of an engine's figures.", answer)


def _of_figures(figures: Figures) -> Iterator[Metric]:
    bounds = [*map(str, BATCH_BUCKETS), "+Inf"]
    waiting = figures.waiting_tokens
    yield _gauge("tuneproof_predict_waiting_tokens", "Tokens that wait to be scored.", waiting)
    batches = HistogramMetricFamily("tuneproof_engine_batch_texts", "Texts in each batch that the engine scored.")
    batches.add_metric((), list(zip(bounds, accumulate(figures.batches), strict=True)), figures.texts)
    yield batches
    yield _counter("tuneproof_engine_tokens", "Tokens scored for /predict.", figures.tokens)
    yield _counter("tuneproof_adapter_cache_hits", "Adapters that were at hand.", figures.adapter_hits)
    yield _counter("tuneproof_adapter_cache_misses", "Adapters read from the storage.", figures.adapter_misses)
    yield _counter("tuneproof_adapter_cache_evictions", "Adapters that made room.", figures.adapter_evictions)
    yield _gauge("tuneproof_adapter_cache_bytes", "Memory of the adapters at hand.", figures.adapter_bytes)
    yield _gauge("tuneproof_bases", "Base models that the engine holds.", len(figures.bases))
    yield _gauge("tuneproof_bases_bytes", "Memory of those base models.", figures.base_bytes)
    if figures.gpu_allocated_bytes is not None and figures.gpu_reserved_bytes is not None:
        allocated, reserved = figures.gpu_allocated_bytes, figures.gpu_reserved_bytes
        yield _gauge("tuneproof_gpu_memory_allocated_bytes", "GPU memory of the engine's tensors.", allocated)
        yield _gauge("tuneproof_gpu_memory_reserved_bytes", "GPU memory that the engine keeps for them.", reserved)


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value=value)


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(name, help_text, value=value)
