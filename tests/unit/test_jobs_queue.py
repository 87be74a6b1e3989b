"""The queue under two workers, lost leases, cancels and crashes; the time is always passed in."""

import multiprocessing
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import event, func, select

from service.core.errors import Conflict, LeaseLost, NotFound
from service.db import garbage as garbage_notes
from service.db import jobs
from service.db.engine import Database
from service.db.jobs import Lease, Progress
from service.db.models import Artifact, Event, Garbage, Job, Model
from tests.databases import fresh_database
from tests.rows import (
    GRACE,
    LEASE_SECONDS,
    START,
    add_dataset,
    add_job,
    artifact,
    claim,
    model,
    publish_stored,
    read_job,
)

MAX_ATTEMPTS = 3
LATER = START + timedelta(seconds=LEASE_SECONDS + 1)
ERROR = {"code": "invalid_data", "message": "no", "hint": None}


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = fresh_database(tmp_path)
    yield database
    database.close()


def messages(db: Database, job_id: str) -> list[str]:
    with db.read() as session:
        return list(session.scalars(select(Event.message).where(Event.job_id == job_id).order_by(Event.id)))


def garbage(db: Database) -> set[str]:
    with db.read() as session:
        return set(session.scalars(select(Garbage.prefix)))


def snapshot(db: Database) -> list[Any]:
    """Everything a reader could see."""
    with db.read() as session:
        return [
            [tuple(row) for row in session.execute(select(table.__table__)).all()]  # type: ignore[attr-defined]
            for table in (Job, Event, Artifact, Model, Garbage)
        ]


def publish(db: Database, lease: Lease, now: datetime = START, *, by: Any = publish_stored, **given: Any) -> None:
    values = {"artifacts": [artifact("metrics.json", lease.prefix)], "models": [model()], "summary": {"methods": {}}}
    by(db, lease, now=now, grace=GRACE, **values | given)


# Claims -------------------------------------------------------------------------------------------
def test_the_oldest_job_is_claimed_first(db: Database) -> None:
    made = [add_job(db) for _ in range(3)]
    assert [claim(db).lease.job_id for _ in made] == made
    assert jobs.claim(db, "wrk_1", START, LEASE_SECONDS) is None


def test_a_claim_starts_an_attempt_under_a_fresh_token(db: Database) -> None:
    job_id = add_job(db)
    first = claim(db).lease
    jobs.give_back(db, first, START, GRACE)
    second = claim(db, START + timedelta(seconds=5)).lease
    assert (first.attempt, second.attempt) == (1, 2)
    assert first.token != second.token
    assert first.prefix != second.prefix
    job = read_job(db, job_id)
    assert (job.status, job.stage, job.started_at) == ("running", "prepare", START)
    assert job.lease_expires_at == START + timedelta(seconds=5 + LEASE_SECONDS)


def test_a_claimed_job_shows_no_progress_and_no_error_of_the_attempt_before(db: Database) -> None:
    job_id = add_job(db)
    lease = claim(db).lease
    jobs.report(db, lease, START, Progress("train", 0.7, "epoch 2/5", 9.0))
    jobs.fail(db, lease, ERROR, START, GRACE)
    with db.write() as session:
        jobs.retry(session, job_id, START)
    queued = read_job(db, job_id)
    assert (queued.status, queued.stage, queued.progress_fraction, queued.error) == ("queued", None, 0.0, None)
    claim(db)
    running = read_job(db, job_id)
    assert (running.progress_fraction, running.eta_seconds, running.error) == (0.0, None, None)


@pytest.mark.parametrize("n_workers", [2, 4])
def test_threads_that_claim_at_once_never_get_the_same_job(db: Database, n_workers: int) -> None:
    made, taken = {add_job(db, None) for _ in range(50)}, []
    start = threading.Barrier(n_workers)

    def work(worker: str) -> None:
        start.wait()
        while (claimed := jobs.claim(db, worker, START, LEASE_SECONDS)) is not None:
            taken.append(claimed.lease.job_id)

    threads = [threading.Thread(target=work, args=(f"wrk_{i}",)) for i in range(n_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 50
    assert set(taken) == made


def claim_all(url: str, worker: str) -> list[str]:
    db, taken = Database(url), []
    while (claimed := jobs.claim(db, worker, START, LEASE_SECONDS)) is not None:
        taken.append(claimed.lease.job_id)
    db.close()
    return taken


def test_processes_that_claim_at_once_never_get_the_same_job(db: Database) -> None:
    made = {add_job(db) for _ in range(50)}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        taken = pool.starmap(claim_all, [(db.url, "wrk_1"), (db.url, "wrk_2")], chunksize=1)
    assert sorted(taken[0] + taken[1]) == sorted(made)


def test_a_job_on_a_dataset_that_is_gone_cannot_be_queued(db: Database) -> None:
    with pytest.raises(NotFound), db.write() as session:
        jobs.submit(session, kind="train", name="x", dataset_id="ds_gone", spec={}, metadata={}, now=START)


# Leases -------------------------------------------------------------------------------------------
WRITES: dict[str, Callable[[Database, Lease], object]] = {
    "renew": lambda db, lease: jobs.renew(db, lease, LATER, LEASE_SECONDS),
    "report": lambda db, lease: jobs.report(db, lease, LATER, Progress("train", 0.5, "epoch", 1.0)),
    "report an event": lambda db, lease: jobs.report(db, lease, LATER, events=[("info", "message", "hello", {})]),
    "report a spec": lambda db, lease: jobs.report(db, lease, LATER, spec={"seed": 1}),
    "keep_checkpoint": lambda db, lease: jobs.keep_checkpoint(db, lease, "jobs/x/checkpoints/1", LATER, GRACE),
    "publish": lambda db, lease: publish(db, lease, LATER, by=jobs.publish),
    "fail": lambda db, lease: jobs.fail(db, lease, ERROR, LATER, GRACE),
    "lose": lambda db, lease: jobs.lose(db, lease, "killed", MAX_ATTEMPTS, LATER, GRACE),
    "give_back": lambda db, lease: jobs.give_back(db, lease, LATER, GRACE),
    "confirm_cancelled": lambda db, lease: jobs.confirm_cancelled(db, lease, LATER, GRACE),
    "status_under": jobs.status_under,
}


def reaped_and_claimed_by_another(db: Database, _lease: Lease) -> None:
    assert jobs.reap(db, LATER, MAX_ATTEMPTS, GRACE) == 1
    claim(db, LATER, "wrk_2")


def reaped(db: Database, _lease: Lease) -> None:
    assert jobs.reap(db, LATER, MAX_ATTEMPTS, GRACE) == 1


def ended(db: Database, lease: Lease) -> None:
    publish(db, lease)


def deleted(db: Database, lease: Lease) -> None:
    jobs.fail(db, lease, ERROR, START, GRACE)
    with db.write() as session:
        jobs.remove(session, lease.job_id, START, GRACE)


@pytest.mark.parametrize("lost", [reaped, reaped_and_claimed_by_another, ended, deleted])
@pytest.mark.parametrize("write", WRITES)
def test_a_worker_that_lost_its_lease_changes_nothing(
    db: Database, write: str, lost: Callable[[Database, Lease], None]
) -> None:
    add_job(db)
    lease = claim(db).lease
    lost(db, lease)
    before = snapshot(db)
    with pytest.raises(LeaseLost):
        WRITES[write](db, lease)
    assert snapshot(db) == before


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("forged", [{"token": "guessed"}, {"attempt": 2}], ids=["token", "attempt"])
def test_a_lease_holds_only_with_its_own_attempt_and_token(db: Database, write: str, forged: dict[str, Any]) -> None:
    job_id = add_job(db)
    lease = claim(db).lease
    before = snapshot(db)
    with pytest.raises(LeaseLost):
        WRITES[write](db, Lease(**{"job_id": job_id, "attempt": lease.attempt, "token": lease.token} | forged))
    assert snapshot(db) == before


def test_a_renewed_lease_outlives_its_first_end(db: Database) -> None:
    job_id = add_job(db)
    lease = claim(db).lease
    assert jobs.renew(db, lease, START + timedelta(seconds=20), LEASE_SECONDS) == "running"
    assert jobs.reap(db, LATER, MAX_ATTEMPTS, GRACE) == 0
    assert read_job(db, job_id).lease_expires_at == START + timedelta(seconds=20 + LEASE_SECONDS)


def test_a_worker_learns_of_a_cancel_when_it_renews_or_looks(db: Database) -> None:
    job_id = add_job(db)
    lease = claim(db).lease
    assert jobs.status_under(db, lease) == "running"
    with db.write() as session:
        jobs.cancel(session, job_id, START)
    assert jobs.status_under(db, lease) == "cancelling"
    assert jobs.renew(db, lease, START, LEASE_SECONDS) == "cancelling"


# Lost workers -------------------------------------------------------------------------------------
def test_a_lost_job_is_queued_again_until_it_was_lost_too_often(db: Database) -> None:
    job_id, now = add_job(db), START
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert claim(db, now).lease.attempt == attempt
        now += timedelta(seconds=LEASE_SECONDS + 1)
        assert jobs.reap(db, now, MAX_ATTEMPTS, GRACE) == 1
        assert read_job(db, job_id).status == ("queued" if attempt < MAX_ATTEMPTS else "failed")
    job = read_job(db, job_id)
    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    assert job.error["hint"]
    assert (job.finished_at, job.failures, job.lease_token, job.worker_id) == (now, MAX_ATTEMPTS, None, None)
    assert jobs.claim(db, "wrk_1", now, LEASE_SECONDS) is None


def test_a_lease_that_ends_right_now_is_not_yet_lost(db: Database) -> None:
    add_job(db)
    claim(db)
    assert jobs.reap(db, START + timedelta(seconds=LEASE_SECONDS), MAX_ATTEMPTS, GRACE) == 0


def test_the_reason_a_job_was_lost_for_stands_in_an_event(db: Database) -> None:
    job_id = add_job(db)
    jobs.lose(db, claim(db).lease, "its process was ended by signal 9", MAX_ATTEMPTS, START, GRACE)
    assert any("signal 9" in message for message in messages(db, job_id))
    assert read_job(db, job_id).status == "queued"


def test_a_job_that_is_being_cancelled_ends_cancelled_when_its_worker_is_lost(db: Database) -> None:
    job_id = add_job(db)
    claim(db)
    with db.write() as session:
        jobs.cancel(session, job_id, START)
    assert jobs.reap(db, LATER, MAX_ATTEMPTS, GRACE) == 1
    job = read_job(db, job_id)
    assert (job.status, job.finished_at, job.error) == ("cancelled", LATER, None)
    assert messages(db, job_id)[-1].startswith("cancelled")


def test_giving_a_job_back_counts_no_failure(db: Database) -> None:
    job_id = add_job(db)
    for _ in range(MAX_ATTEMPTS + 2):
        jobs.give_back(db, claim(db).lease, START, GRACE)
    job = read_job(db, job_id)
    assert (job.status, job.failures, job.attempt) == ("queued", 0, MAX_ATTEMPTS + 2)


def test_a_job_that_is_being_cancelled_is_not_given_back_but_ends(db: Database) -> None:
    job_id = add_job(db)
    lease = claim(db).lease
    with db.write() as session:
        jobs.cancel(session, job_id, START)
    jobs.give_back(db, lease, START, GRACE)
    assert read_job(db, job_id).status == "cancelled"


def test_a_lost_attempt_leaves_its_bytes_as_garbage_and_its_checkpoint_for_the_next(db: Database) -> None:
    job_id = add_job(db)
    lease = claim(db).lease
    jobs.keep_checkpoint(db, lease, f"jobs/{job_id}/checkpoints/epoch-1", START, GRACE)
    jobs.reap(db, LATER, MAX_ATTEMPTS, GRACE)
    assert lease.prefix in garbage(db)
    assert f"jobs/{job_id}/checkpoints/epoch-1" not in garbage(db)
    assert claim(db, LATER).checkpoint_prefix == f"jobs/{job_id}/checkpoints/epoch-1"


def test_a_newer_checkpoint_makes_garbage_of_the_one_before(db: Database) -> None:
    add_job(db)
    lease = claim(db).lease
    for name in ("epoch-1", "epoch-2", "epoch-2"):
        jobs.keep_checkpoint(db, lease, f"jobs/x/checkpoints/{name}", START, GRACE)
    assert garbage(db) == {"jobs/x/checkpoints/epoch-1"}


# The user's own doing -----------------------------------------------------------------------------
def test_a_queued_job_is_cancelled_at_once(db: Database) -> None:
    job_id = add_job(db)
    with db.write() as session:
        jobs.cancel(session, job_id, START)
    assert read_job(db, job_id).status == "cancelled"
    assert jobs.claim(db, "wrk_1", START, LEASE_SECONDS) is None


def test_cancelling_twice_changes_nothing_more(db: Database) -> None:
    job_id = add_job(db)
    claim(db)
    for _ in range(2):
        with db.write() as session:
            assert jobs.cancel(session, job_id, START).status == "cancelling"
    assert messages(db, job_id).count("cancelling") == 1


def test_what_has_ended_cannot_be_cancelled_and_what_runs_cannot_be_retried_or_deleted(db: Database) -> None:
    job_id = add_job(db)
    lease = claim(db).lease
    for refused in (lambda s: jobs.retry(s, job_id, START), lambda s: jobs.remove(s, job_id, START, GRACE)):
        with pytest.raises(Conflict), db.write() as session:
            refused(session)
    publish(db, lease)
    for refused in (lambda s: jobs.retry(s, job_id, START), lambda s: jobs.cancel(s, job_id, START)):
        with pytest.raises(Conflict), db.write() as session:
            refused(session)


def test_a_retry_starts_the_count_of_lost_attempts_anew(db: Database) -> None:
    job_id, now = add_job(db), START
    for _ in range(MAX_ATTEMPTS):
        lease = claim(db, now).lease
        jobs.lose(db, lease, "killed", MAX_ATTEMPTS, now, GRACE)
    assert read_job(db, job_id).status == "failed"
    with db.write() as session:
        jobs.retry(session, job_id, now)
    for _ in range(MAX_ATTEMPTS - 1):
        jobs.lose(db, claim(db, now).lease, "killed", MAX_ATTEMPTS, now, GRACE)
        assert read_job(db, job_id).status == "queued"
    assert claim(db, now).lease.attempt == 2 * MAX_ATTEMPTS


def test_a_job_whose_dataset_was_deleted_cannot_be_retried(db: Database) -> None:
    from service.db import catalog

    dataset_id = add_dataset(db)
    job_id = add_job(db, dataset_id)
    jobs.fail(db, claim(db).lease, ERROR, START, GRACE)
    with db.write() as session:
        catalog.remove_dataset(session, dataset_id, START, GRACE)
    with pytest.raises(Conflict), db.write() as session:
        jobs.retry(session, job_id, START)


# Publishing ---------------------------------------------------------------------------------------
def test_publishing_shows_artifacts_models_and_the_final_status_together(db: Database) -> None:
    job_id = add_job(db)
    lease = claim(db).lease
    jobs.keep_checkpoint(db, lease, "jobs/x/checkpoints/1", START, GRACE)
    lora, probe = model(), model("embedding_logreg")
    publish(db, lease, models=[probe, lora], summary={"headline": "lora wins"})
    job = read_job(db, job_id)
    assert (job.status, job.model_id, job.summary) == ("succeeded", lora.id, {"headline": "lora wins"})
    assert (job.progress_fraction, job.lease_token, job.checkpoint_prefix) == (1.0, None, None)
    assert f"jobs/{job_id}/checkpoints" in garbage(db)
    with db.read() as session:
        assert session.scalars(select(Artifact.name)).all() == ["metrics.json"]
        assert set(session.scalars(select(Model.id))) == {lora.id, probe.id}


@pytest.mark.parametrize("table", ["artifacts", "models", "events", "garbage"])
def test_a_publish_that_breaks_in_the_middle_shows_nothing(db: Database, table: str) -> None:
    add_job(db)
    lease = claim(db).lease
    jobs.keep_checkpoint(db, lease, "jobs/x/checkpoints/1", START, GRACE)
    made = model()
    garbage_notes.announce(db, made.storage_prefix, START)
    before = snapshot(db)

    def fail(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith(f"INSERT INTO {table}"):
            raise OSError("the disk is full")

    event.listen(db.engine, "before_cursor_execute", fail)
    with pytest.raises(OSError, match="disk is full"):
        publish(db, lease, by=jobs.publish, models=[made])
    event.remove(db.engine, "before_cursor_execute", fail)
    assert snapshot(db) == before
    publish(db, lease, by=jobs.publish, models=[made])


def test_a_model_whose_bytes_were_collected_meanwhile_is_not_published(db: Database) -> None:
    """Stopped for more than a day between storing and publishing."""
    job_id = add_job(db)
    lease, made = claim(db).lease, model()
    garbage_notes.announce(db, made.storage_prefix, START)
    assert garbage_notes.due(db, START + garbage_notes.UNNAMED - timedelta(seconds=1)) == []
    [(garbage_id, prefix)] = garbage_notes.due(db, START + garbage_notes.UNNAMED)
    assert prefix == made.storage_prefix
    garbage_notes.collected(db, garbage_id)
    with pytest.raises(Conflict, match="longer than"):
        publish(db, lease, by=jobs.publish, models=[made])
    assert read_job(db, job_id).status == "running"


def test_giving_up_what_a_row_names_does_nothing(db: Database) -> None:
    """As where a commit seemed to fail and stands."""
    add_job(db)
    lease, made = claim(db).lease, model()
    publish(db, lease, models=[made])
    garbage_notes.give_up(db, made.storage_prefix, START)
    assert made.storage_prefix not in garbage(db)


def test_a_cancel_that_came_first_beats_the_publish(db: Database) -> None:
    job_id = add_job(db)
    lease = claim(db).lease
    with db.write() as session:
        jobs.cancel(session, job_id, START)
    before = snapshot(db)
    with pytest.raises(LeaseLost):
        publish(db, lease, by=jobs.publish)
    assert snapshot(db) == before
    jobs.confirm_cancelled(db, lease, START, GRACE)
    assert read_job(db, job_id).status == "cancelled"


def test_versions_of_models_count_up_per_name(db: Database) -> None:
    for name in ("tickets", "tickets", "mails"):
        add_job(db, name=name)
        publish(db, claim(db).lease, models=[model("embedding_logreg"), model()])
    with db.read() as session:
        found = session.execute(select(Model.name, Model.version).order_by(Model.name, Model.version)).all()
    assert [tuple(row) for row in found] == [
        ("mails", 1), ("mails", 2), ("tickets", 1), ("tickets", 2), ("tickets", 3), ("tickets", 4)
    ]  # fmt: skip


# Deleting -----------------------------------------------------------------------------------------
def test_deleting_a_job_keeps_its_models_and_makes_garbage_of_its_bytes(db: Database) -> None:
    job_id = add_job(db)
    publish(db, claim(db).lease)
    with db.write() as session:
        jobs.remove(session, job_id, START, GRACE)
    with db.read() as session:
        assert session.get(Job, job_id) is None
        assert session.scalar(select(func.count()).select_from(Event)) == 0
        assert session.scalar(select(func.count()).select_from(Artifact)) == 0
        assert session.scalar(select(func.count()).select_from(Model)) == 1
    assert garbage(db) == {f"jobs/{job_id}", f"jobs/{job_id}/checkpoints"}


def test_garbage_is_due_only_after_its_grace_time(db: Database) -> None:
    job_id = add_job(db)
    jobs.fail(db, claim(db).lease, ERROR, START, GRACE)
    assert garbage_notes.due(db, START + GRACE - timedelta(seconds=1)) == []
    [(garbage_id, prefix)] = garbage_notes.due(db, START + GRACE)
    assert prefix.startswith(f"jobs/{job_id}/1-")
    garbage_notes.collected(db, garbage_id)
    assert garbage_notes.due(db, START + GRACE) == []


# All of it, in any order --------------------------------------------------------------------------
class Queue(RuleBasedStateMachine):
    """One job, any number of workers, every order of events; `held` is who should hold it, by our own book-keeping."""

    leases = Bundle("leases")

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.db = fresh_database(self.folder)
        self.job_id = add_job(self.db)
        self.now, self.held, self.expires, self.cancelling = START, None, START, False
        self.attempt, self.published = 0, 0

    def teardown(self) -> None:
        self.db.close()
        shutil.rmtree(self.folder)

    @rule(target=leases)
    def claim(self) -> Lease | None:
        claimed = jobs.claim(self.db, "wrk_1", self.now, LEASE_SECONDS)
        if claimed is None:
            return None
        assert self.held is None
        self.attempt += 1
        assert claimed.lease.attempt == self.attempt
        self.held, self.expires, self.cancelling = claimed.lease, self.now + timedelta(seconds=LEASE_SECONDS), False
        return claimed.lease

    @rule(seconds=st.sampled_from([1, 20, 40]))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @rule()
    def reap(self) -> None:
        lost = self.held is not None and self.expires < self.now
        assert jobs.reap(self.db, self.now, MAX_ATTEMPTS, GRACE) == lost
        self.held = None if lost else self.held

    @rule(lease=leases)
    def renew(self, lease: Lease | None) -> None:
        if self.allowed(lease, lambda: jobs.renew(self.db, lease, self.now, LEASE_SECONDS)):
            self.expires = self.now + timedelta(seconds=LEASE_SECONDS)

    @rule(lease=leases)
    def publish(self, lease: Lease | None) -> None:
        if self.allowed(lease, lambda: publish(self.db, lease, self.now), unless=self.cancelling):
            self.held, self.published = None, self.published + 1

    @rule(lease=leases, end=st.sampled_from(["fail", "lose", "give_back", "confirm_cancelled"]))
    def end(self, lease: Lease | None, end: str) -> None:
        if self.allowed(lease, lambda: WRITES[end](self.db, lease)):
            self.held = None

    @rule()
    def cancel(self) -> None:
        if read_job(self.db, self.job_id).status not in jobs.TERMINAL:
            with self.db.write() as session:
                jobs.cancel(session, self.job_id, self.now)
            self.cancelling = self.held is not None

    @rule()
    def retry(self) -> None:
        if read_job(self.db, self.job_id).status in ("failed", "cancelled"):
            with self.db.write() as session:
                jobs.retry(session, self.job_id, self.now)

    def allowed(self, lease: Lease | None, write: Callable[[], object], *, unless: bool = False) -> bool:
        if lease is None:
            return False
        if lease == self.held and not unless:
            write()
            return True
        with pytest.raises(LeaseLost):
            write()
        return False

    @invariant()
    def the_row_agrees(self) -> None:
        if not hasattr(self, "db"):
            return
        job = read_job(self.db, self.job_id)
        assert (job.status in jobs.HELD) == (self.held is not None)
        assert job.lease_token == (self.held.token if self.held else None)
        assert (job.status == "cancelling") == (self.held is not None and self.cancelling)
        assert (job.finished_at is not None) == (job.status in jobs.TERMINAL)
        assert job.failures <= MAX_ATTEMPTS
        assert self.published == (job.status == "succeeded")


Queue.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestEveryOrderOfEvents = Queue.TestCase
