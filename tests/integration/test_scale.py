"""Many processes on one PostgreSQL: what `make test-scale` runs and prints."""

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import numpy as np
import pytest
from sqlalchemy import select

from service.db import jobs
from service.db.engine import Database, migrate
from service.db.models import Event, Job
from tests.databases import Server, address
from tests.rows import LEASE_SECONDS, add_dataset, add_job

pytestmark = pytest.mark.scale
WORKERS, PROCESSES, JOBS = 50, 5, 2000


@pytest.fixture
def url() -> Iterator[str]:
    server = Server(fsync="on", full_page_writes="on")  # or the figures would be of another database
    migrate(address(server.folder))
    yield address(server.folder)
    server.close()


def claim_all(url: str, process: int) -> list[tuple[str, float]]:
    """What the workers of one process claim until nothing is left, each with the seconds that it took."""
    n = WORKERS // PROCESSES
    db = Database(url, connections=n)

    def work(worker: int) -> list[tuple[str, float]]:
        taken = []
        while True:
            start = time.perf_counter()
            claimed = jobs.claim(db, f"wrk_{process}_{worker}", datetime.now(UTC), LEASE_SECONDS)
            if claimed is None:
                return taken
            taken.append((claimed.lease.job_id, time.perf_counter() - start))

    with ThreadPoolExecutor(n) as pool:
        return [one for worker in pool.map(work, range(n)) for one in worker]


def test_fifty_workers_claim_two_thousand_jobs_each_once(url: str) -> None:
    db = Database(url)
    dataset_id = add_dataset(db)
    made = [add_job(db, dataset_id) for _ in range(JOBS)]
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        start = time.perf_counter()
        found = pool.starmap(claim_all, [(url, process) for process in range(PROCESSES)], chunksize=1)
        wall = time.perf_counter() - start
    claims = [one for process in found for one in process]
    assert sorted(job_id for job_id, _ in claims) == sorted(made)
    with db.read() as session:
        assert set(session.execute(select(Job.attempt, Job.status).distinct())) == {(1, "running")}
        started = session.scalars(select(Event.job_id).where(Event.message == "attempt 1 started")).all()
    assert sorted(started) == sorted(made)
    db.close()
    middle, slow, slowest = np.quantile([1000 * seconds for _, seconds in claims], (0.5, 0.99, 1)).round(1)
    print(f"\n{JOBS} jobs, {WORKERS} workers in {PROCESSES} processes, claimed in {wall:.1f} s; double claims: 0")
    print(f"milliseconds of a claim: median {middle}, p99 {slow}, slowest {slowest}")
