"""What only a PostgreSQL server can show: writers side by side, and a server that goes away and comes back."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from psycopg import connect
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

import worker.supervisor as supervisor_module
from service.__main__ import main
from service.core.clock import Steadiness
from service.core.errors import AppError, Conflict, NotFound
from service.core.settings import Settings
from service.db import catalog, idempotency, jobs, outbox
from service.db.engine import Database, is_away, migrate
from service.db.models import ApiKey, Dataset, Job, Model
from service.webhooks import Outcome, Webhooks
from tests.databases import Server, address
from tests.integration.conftest import LOOPBACK, make_app
from tests.integration.test_worker import RESULT, Bench, leaves, progress
from tests.problems import problem_of
from tests.rows import GRACE, START, Steady, add_dataset, add_job, artifact, claim, model, publish_stored, read_job
from tests.waiting import until

pytestmark = pytest.mark.more
AT_ONCE = 8


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    """Of a new database without tables."""
    name = f"t_{sha256(request.node.nodeid.encode()).hexdigest()[:24]}"
    with connect(address(server.folder), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return address(server.folder, name)


@pytest.fixture
def db(url: str) -> Iterator[Database]:
    migrate(url)
    database = Database(url, AT_ONCE + 2)
    yield database
    database.close()


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each gives or raises, all begun in the same moment."""
    gate = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        gate.wait(20)
        try:
            return call()
        except AppError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


# Side by side -------------------------------------------------------------------------------------
def test_jobs_of_one_name_that_are_published_at_once_get_a_version_each(db: Database) -> None:
    leases = []
    for _ in range(AT_ONCE):
        add_job(db)
        leases.append(claim(db).lease)

    def publish(lease: jobs.Lease) -> None:
        publish_stored(db, lease, [artifact("metrics.json", lease.prefix)], [model()], {}, START, GRACE)

    assert at_once(*(lambda lease=lease: publish(lease) for lease in leases)) == [None] * AT_ONCE  # type: ignore[misc]
    with db.read() as session:
        assert sorted(session.scalars(select(Model.version))) == list(range(1, AT_ONCE + 1))


def test_a_dataset_and_a_job_on_it_are_never_deleted_and_queued_at_once(db: Database) -> None:
    def delete(dataset_id: str) -> None:
        with db.write() as session:
            catalog.remove_dataset(session, dataset_id, START, GRACE)

    outcomes = set()
    for _ in range(20):
        dataset_id = add_dataset(db)
        deleted, queued = at_once(lambda: delete(dataset_id), lambda: add_job(db, dataset_id))  # noqa: B023
        outcomes.add((type(deleted), type(queued)))
        with db.read() as session:
            there = session.get(Dataset, dataset_id) is not None
            waiting = bool(session.scalars(jobs.open_jobs_on(dataset_id)).all())
        assert there == waiting
    assert outcomes <= {(type(None), NotFound), (Conflict, str)}


def ended_job(db: Database, dataset_id: str, checkpoint: str | None = None) -> str:
    """A cancelled one."""
    job_id = add_job(db, dataset_id)
    with db.write() as session:
        jobs.cancel(session, job_id, START).checkpoint_prefix = checkpoint
    return job_id


def in_one(db: Database, change: Callable[..., Any], *given: Any) -> Callable[[], Any]:
    """A call that makes this change in a transaction of its own."""

    def call() -> None:
        with db.write() as session:
            change(session, *given)

    return call


def test_a_dataset_is_never_deleted_under_a_job_that_is_being_retried(db: Database) -> None:
    for _ in range(20):
        dataset_id = add_dataset(db)
        job_id = ended_job(db, dataset_id)
        at_once(
            in_one(db, catalog.remove_dataset, dataset_id, START, GRACE), in_one(db, jobs.retry, job_id, START)
        )  # fmt: skip
        with db.read() as session:
            there = session.get(Dataset, dataset_id) is not None
        assert there == (read_job(db, job_id).status == "queued")


def test_a_job_and_its_dataset_can_be_deleted_at_once(db: Database) -> None:
    for _ in range(20):
        dataset_id = add_dataset(db)
        job_id = ended_job(db, dataset_id, "jobs/x/checkpoints/1")
        deleted = at_once(
            in_one(db, catalog.remove_dataset, dataset_id, START, GRACE), in_one(db, jobs.remove, job_id, START, GRACE)
        )  # fmt: skip
        assert deleted == [None, None]


def test_no_more_jobs_wait_than_may_however_many_are_sent_at_once(db: Database) -> None:
    def submit(session: Session, dataset_id: str) -> None:
        jobs.refuse_on_full_queue(session, 3)
        jobs.submit(
            session, kind="experiment", name="x", dataset_id=dataset_id, spec={}, metadata={}, now=START
        )  # fmt: skip

    found = at_once(*(in_one(db, submit, add_dataset(db)) for _ in range(AT_ONCE)))
    assert sorted(type(one).__name__ for one in found) == ["NoneType"] * 3 + ["QueueFull"] * (AT_ONCE - 3)


def test_an_alias_moved_twice_at_once_points_to_where_its_newest_move_says(db: Database) -> None:
    made = [model(), model()]
    add_job(db)
    publish_stored(db, claim(db).lease, [], made, {}, START, GRACE)
    in_one(db, catalog.point_alias, "live", made[0].id, START)()
    for _ in range(20):
        at_once(*(in_one(db, catalog.point_alias, "live", one.id, START) for one in made))
        with db.read() as session:
            assert catalog.pointed_to(session, "live") == catalog.moves_of(session, "live")[0].model_id


def test_an_answer_given_while_somebody_takes_its_key_stays(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    real = idempotency.asdict

    def asdict(claim: idempotency.Claim) -> Any:
        monkeypatch.setattr(idempotency, "asdict", real)
        other = idempotency.claim(db, "me", "key", "request", START)
        assert isinstance(other, idempotency.Claim)
        in_one(db, idempotency.keep, other, 202, {"id": "job_1"}, None)()
        return real(claim)

    monkeypatch.setattr(idempotency, "asdict", asdict)
    assert idempotency.claim(db, "me", "key", "request", START) is None
    answer = idempotency.claim(db, "me", "key", "request", START)
    assert isinstance(answer, idempotency.Answer)
    assert answer.body == {"id": "job_1"}


def test_a_job_can_be_deleted_while_its_webhook_is_settled(
    tmp_path: Path, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = ended_job(db, add_dataset(db))
    in_one(db, lambda s: setattr(jobs.get(s, job_id), "webhook_url", "https://hook"))()
    in_one(db, lambda s: outbox.announce(s, jobs.get(s, job_id), START))()
    [due] = outbox.take_due(db, START)
    real = outbox.settle
    removing: list[Future[None]] = []

    def waits_for_a_lock() -> bool:
        with connect(db.url, autocommit=True) as admin:
            return admin.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone() is not None

    with ThreadPoolExecutor(1) as pool:

        def settle(*given: Any) -> bool:
            settled = real(*given)
            removing.append(pool.submit(in_one(db, jobs.remove, job_id, START, GRACE)))
            until(waits_for_a_lock, 30, "who deletes the job waits for the webhook")
            return settled

        monkeypatch.setattr(outbox, "settle", settle)
        Webhooks(db, Settings(data_dir=tmp_path), lambda: START)._settle(due, Outcome("answered 200", 200))
    removing[0].result()
    with pytest.raises(NotFound):
        read_job(db, job_id)


@pytest.mark.parametrize("what", ["dataset", "job", "alias"])
def test_of_two_that_delete_the_same_at_once_one_is_told_that_it_is_gone(db: Database, what: str) -> None:
    def delete(name: str) -> None:
        with db.write() as session:
            if what == "dataset":
                catalog.remove_dataset(session, name, START, GRACE)
            elif what == "job":
                jobs.remove(session, name, START, GRACE)
            else:
                catalog.remove_alias(session, name)

    made = model()
    add_job(db)
    publish_stored(db, claim(db).lease, [], [made], {}, START, GRACE)
    for _ in range(10):
        job_id = add_job(db)
        with db.write() as session:
            jobs.cancel(session, job_id, START)
            catalog.point_alias(session, "live", made.id, START)
        name = {"dataset": add_dataset(db), "job": job_id, "alias": "live"}[what]
        found = at_once(lambda: delete(name), lambda: delete(name))  # noqa: B023
        assert sorted(type(one).__name__ for one in found) == ["NoneType", "NotFound"]


def test_processes_that_start_at_once_with_a_first_key_make_one(tmp_path: Path, url: str) -> None:
    made = [
        make_app(tmp_path / str(i), fresh=False, database_url=url, bootstrap_key="a-first-key-for-containers")
        for i in range(3)
    ]

    def start(app: Any) -> int:
        with TestClient(app, client=LOOPBACK) as client:
            headers = {"authorization": "Bearer a-first-key-for-containers"}
            return client.get("/keys", headers=headers).status_code

    assert at_once(*(lambda app=app: start(app) for app in made)) == [200] * 3  # type: ignore[misc]
    database = Database(url)
    with database.read() as session:
        assert len(session.scalars(select(ApiKey)).all()) == 1
    database.close()


def test_a_reader_sees_one_state_and_changes_nothing(db: Database) -> None:
    job_id = add_job(db)
    with db.read() as session:
        before = session.scalars(select(Job.status)).one()
        claim(db)
        assert session.scalars(select(Job.status)).one() == before == "queued"
        session.get_one(Job, job_id).name = "changed"
        with pytest.raises(Exception, match="read-only transaction"):
            session.flush()
    assert read_job(db, job_id).status == "running"


# Away and back ------------------------------------------------------------------------------------
class Bounced:
    """A step of a child's script: the server crashes, and is there again when `supervisor` has asked in vain."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server, self.asked = server, 0
        monkeypatch.setattr(supervisor_module, "_AWAY_SECONDS", 0.0)
        monkeypatch.setattr(supervisor_module, "is_away", self._is_away)

    def __call__(self, _child: Any) -> None:
        self.server.stop("immediate")

    def _is_away(self, error: BaseException) -> bool:
        assert isinstance(error, OperationalError)
        self.asked += 1
        if self.asked == 2:
            self.server.start()
        return True


@pytest.mark.parametrize("at", ["in the middle", "at the end"])
def test_an_attempt_outlives_its_database_server(
    tmp_path: Path, server: Server, url: str, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    migrate(url)
    bench = Bench(tmp_path, database_url=url)
    bounced = Bounced(server, monkeypatch)
    steps: list[Any] = [progress("train", 0.5), bounced, progress("train", 0.6), leaves(), RESULT]
    if at == "at the end":
        steps = [progress("train", 0.5), leaves(), RESULT, bounced]
    job = bench.attempt(*steps)
    assert (job.status, job.attempt, job.failures) == ("succeeded", 1, 0)
    assert bounced.asked >= 2
    assert len(bench.rows(Model)) == 1
    bench.db.close()


def test_a_server_that_only_reads_now_is_away_and_its_connections_are_left(server: Server, db: Database) -> None:
    """As after a failover, where the name still leads to what has become the standby."""
    add_job(db)
    lease = claim(db).lease
    with connect(db.url, autocommit=True) as admin:
        admin.execute(f'ALTER DATABASE "{db.engine.url.database}" SET default_transaction_read_only = on')
    db.engine.dispose()
    with pytest.raises(DBAPIError) as caught:
        jobs.renew(db, lease, START, 30)
    assert is_away(caught.value)
    with connect(db.url, autocommit=True) as admin:
        admin.execute("SET default_transaction_read_only = off")
        admin.execute(f'ALTER DATABASE "{db.engine.url.database}" RESET default_transaction_read_only')
    assert jobs.renew(db, lease, START, 30) == "running"


def test_nobody_waits_long_for_a_host_that_says_nothing(url: str) -> None:
    database, own = Database(url, 3), Database(f"{url}&connect_timeout=7")
    with database.read() as session, own.read() as other:
        found = [one.connection().connection.driver_connection.info.get_parameters() for one in (session, other)]  # type: ignore[union-attr]
    assert (found[0]["connect_timeout"], found[1]["connect_timeout"]) == ("10", "7")
    assert found[0]["tcp_user_timeout"] == "30000"
    database.close()
    own.close()


def test_a_url_without_a_database_takes_as_many_connections_as_any() -> None:
    assert Database("postgresql://me@db.internal", 3).engine.pool.size() == 3  # type: ignore[attr-defined]


def test_nobody_takes_a_job_whose_lease_ran_out_while_the_server_was_away(
    tmp_path: Path, server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate(url)
    bench, ticks, looks = Bench(tmp_path, database_url=url), [0.0], []
    settings = bench.supervisor.settings.model_copy(update={"poll_seconds": 0.01})
    idle = supervisor_module.Supervisor(settings, bench.launch, bench.clock)
    idle.steady = Steadiness(bench.clock, settings.lease_seconds, lambda: ticks[0])
    real = idle.work_once

    def work_once(folder: Path) -> bool:
        try:
            return real(folder)
        finally:
            looks.append(1)

    monkeypatch.setattr(idle, "work_once", work_once)

    def look() -> None:
        n = len(looks) + 1  # one may be under way
        until(lambda: len(looks) > n, 30, "the idle worker has looked")

    def pass_by() -> None:
        ticks[0] += 40
        bench.clock.advance(40)
        look()

    def outage(_child: Any) -> None:
        thread = threading.Thread(target=idle.run)
        thread.start()
        look()
        server.stop("immediate")
        pass_by()
        server.start()
        look()
        idle.stop.set()
        thread.join()

    ticks[0] += 31
    bench.clock.advance(31)
    job = bench.attempt(progress("train", 0.5), outage, progress("train", 0.6), leaves(), RESULT)
    assert (job.status, job.attempt, job.failures) == ("succeeded", 1, 0)
    for database in (bench.db, idle.db):
        database.close()


def test_an_attempt_whose_commit_arrived_and_whose_answer_did_not_keeps_what_it_published(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate(url)
    bench, real = Bench(tmp_path, database_url=url), jobs.publish

    def publish(*given: Any) -> None:
        real(*given)
        monkeypatch.setattr(jobs, "publish", real)
        raise OperationalError("COMMIT", None, Exception("server closed the connection unexpectedly"))

    monkeypatch.setattr(supervisor_module, "_AWAY_SECONDS", 0.0)
    monkeypatch.setattr(jobs, "publish", publish)
    job = bench.attempt(leaves(), RESULT)
    assert job.status == "succeeded"
    [made] = bench.rows(Model)
    assert b"".join(bench.storage.chunks(f"{made.storage_prefix}/manifest.json"))
    bench.db.close()


def test_while_the_server_is_away_calls_are_503_and_then_they_are_answered_again(
    tmp_path: Path, server: Server, url: str
) -> None:
    app = make_app(tmp_path, fresh=False, database_url=url)
    app.state.context.steady = Steady()
    with TestClient(app, client=LOOPBACK) as client:
        assert client.get("/jobs").status_code == 200
        server.stop("immediate")
        problem_of(client.get("/jobs"), 503, "database_busy")
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200
        server.start()
        assert client.get("/jobs").status_code == 200


def test_a_server_that_cannot_be_reached_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TUNEPROOF_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("TUNEPROOF_DATABASE_URL", f"postgresql://me:secret@/tuneproof?host={tmp_path}")
    assert main(["migrate"]) == 2
    said = capsys.readouterr().err
    assert "TUNEPROOF_DATABASE_URL cannot be reached" in said
    assert "secret" not in said
    assert "Traceback" not in said


def test_a_database_in_another_encoding_is_one_line(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with connect(address(server.folder), autocommit=True) as connection:
        connection.execute("CREATE DATABASE ascii ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    monkeypatch.setenv("TUNEPROOF_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("TUNEPROOF_DATABASE_URL", address(server.folder, "ascii"))
    for command in ("migrate", "serve"):
        assert main([command]) == 2
        said = capsys.readouterr().err
        assert said.startswith("The database's encoding is SQL_ASCII; tuneproof needs UTF8: ")
        assert said.count("\n") == 1
    assert main(["doctor"]) == 1
    assert "The database's encoding is SQL_ASCII" in capsys.readouterr().out


def test_while_the_server_is_away_housekeeping_and_webhooks_say_so_in_one_line_each(
    tmp_path: Path, server: Server, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(tmp_path, fresh=False, database_url=url)
    with TestClient(app, client=LOOPBACK) as client:
        assert client.get("/jobs").status_code == 200
        server.stop("immediate")
        until(lambda: "housekeeping failed" in caplog.text and "webhooks cannot" in caplog.text, 20, "both say so")
        server.start()
    told = [line for line in caplog.records if "it is tried again" in line.getMessage()]
    assert all(line.getMessage().endswith("tried again: the database does not answer") for line in told)
    assert not [line for line in caplog.records if line.exc_info]
