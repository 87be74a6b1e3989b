"""Claims jobs, keeps their leases, starts and stops their children, publishes what they leave. Never touches a GPU."""

import contextlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError

from service.core import logs
from service.core.clock import Clock, Steadiness, utc_now
from service.core.endpoints import endpoint_name
from service.core.errors import DISK_FULL, LeaseLost, StorageUnavailable, disk_is_full
from service.core.ids import new_id
from service.core.settings import Settings
from service.db import catalog, garbage, jobs
from service.db.engine import Database, is_away, stores
from service.db.jobs import Claimed, Lease, NewArtifact, NewModel, Progress
from service.db.models import Dataset, Model
from service.storage import Storage, Stored
from worker.launch import Child, Launcher, LocalChild
from worker.scratch import own_folder

TEXT_ARTIFACTS = frozenset({"predictions.csv", "flips.csv", "report.html", "prompt.json"})
"""What is deleted with the dataset whose texts it holds."""

_LOOK_SECONDS = 0.2
_STATUS_SECONDS = 0.5
_LAST_WORD_SECONDS = 10.0  # from a child's result or error to killing it, where it does not end by itself
# From asking a child to stop to killing it: a cancel is to take under five, a stop with its checkpoint under thirty.
_CANCEL_SECONDS, _STOP_SECONDS = 2.5, 20.0
_AWAY_SECONDS = 1.0  # between two questions to a database that is away
_FRAME = re.compile(r'  File "[^"]+", line [0-9]+, in [\w<>.]+')
log = logging.getLogger("tuneproof.worker")
Answer = TypeVar("Answer")
Row = TypeVar("Row", Dataset, Model)


class Supervisor:
    """One worker process: a job at a time, each attempt in a child."""

    def __init__(self, settings: Settings, launcher: Launcher = LocalChild, clock: Clock = utc_now) -> None:
        self.settings, self.launcher, self.clock = settings, launcher, clock
        self.id = new_id("wrk")
        self.db = Database(settings.resolved_database_url, settings.database_connections)
        self.storage = Storage(settings.resolved_storage_url)
        self.grace = timedelta(seconds=settings.delete_grace_seconds)
        self.stop = threading.Event()
        self.steady = Steadiness(clock, settings.lease_seconds)
        self._started = clock()
        self._seen = float("-inf")

    def run(self) -> None:
        """Works until `stop` is set; then the job at hand is given back."""
        with own_folder(self.settings.data_dir.absolute() / "work", self.id) as folder:
            data_dir, where = self.settings.data_dir.absolute(), stores(self.settings)
            log.info("worker %s started; data folder %s; %s", self.id, data_dir, where)
            while not self.stop.is_set():
                try:
                    worked = self.work_once(folder)
                except Exception as error:  # noqa: BLE001 -- it is to go on, and the log says where
                    # The database or the storage is away: the lease runs out and the job is taken up again.
                    away = self.looked_in_vain(error)
                    logs.failed(log, "the worker stumbled; it goes on in a moment", error, away=away)
                    worked = False
                if not worked:
                    self.stop.wait(self.settings.poll_seconds)

    def work_once(self, folder: Path) -> bool:
        """Takes one job and sees it through. False where none was waiting."""
        self.show_life()
        now = self.clock()
        if self.steady():  # where the clock was set, those at work have had no time to renew by it
            jobs.reap(self.db, now, self.settings.max_attempts, self.grace)
        claimed = jobs.claim(self.db, self.id, self.clock(), self.settings.lease_seconds)
        if claimed is None:
            return False
        place = folder / f"{claimed.lease.job_id}-{claimed.lease.attempt}"
        with logs.bound(job_id=claimed.lease.job_id, attempt=claimed.lease.attempt):
            log.info("attempt started")
            try:
                Attempt(self, claimed, place).run()
            except LeaseLost:
                log.warning("lost the lease")
            finally:
                shutil.rmtree(place, ignore_errors=True)
        return True

    def show_life(self) -> None:
        """Says, now and then, that this worker is there, unless the database is away."""
        if time.monotonic() - self._seen > 10:
            self._seen = time.monotonic()
            try:
                catalog.saw_worker(self.db, self.id, self._started, self.clock())
            except DBAPIError as error:
                if not self.looked_in_vain(error):
                    raise

    def looked_in_vain(self, error: Exception) -> bool:
        """Whether the database is away: nobody could renew then, and is given time to before a lease counts as over."""
        if is_away(error):
            self.steady.doubt()
        return is_away(error)


class Attempt:
    """One attempt at one job. Every method that writes raises LeaseLost once another worker has the job."""

    def __init__(self, supervisor: Supervisor, claimed: Claimed, place: Path) -> None:
        self.supervisor, self.claimed, self.place = supervisor, claimed, place
        self.db, self.storage, self.settings = supervisor.db, supervisor.storage, supervisor.settings
        self.lease: Lease = claimed.lease
        self._renewed = self._looked = self._last_heard = time.monotonic()
        self._cancelling = False
        self._stage_told: str | None = None
        self._stop_asked: float | None = None
        self._ends: dict[str, dict[str, Any]] = {}  # what the child had to say at its end: a result, an error, nothing
        self._last_word: float | None = None
        self._hung = False
        self._stored: dict[str, Stored] = {}
        self._kept: str | None = None

    def run(self) -> None:
        """From the staged folder to the published result, or whatever end it takes."""
        try:
            self._stage()
            child = self._launched()
            try:
                self._follow(child)
            finally:
                child.kill()
            self._finish(child)
        except Exception as error:
            full, stops = disk_is_full(error), self.supervisor.stop.is_set()
            if not full and not isinstance(error, StorageUnavailable):
                raise
            self._cancelling = self._write(jobs.status_under) == "cancelling"
            if not (full or stops or self._cancelling):
                raise
            self._ends = {} if stops else {"error": DISK_FULL}
            self._end(None)

    def _launched(self) -> Child:
        try:
            return self.supervisor.launcher(self.place)
        except ConnectionError:  # that is no failure of the job
            self._write(jobs.give_back, self._now(), self.supervisor.grace)
            raise

    def _stage(self) -> None:
        """Fetches the dataset, the model that is to label it, and the last checkpoint into the child's folder."""
        predicts, spec = self.claimed.kind == "predict", self.claimed.spec
        dataset = self._patiently(self._row, Dataset, self.claimed.dataset_id)
        model = self._patiently(self._row, Model, spec["model"]) if predicts else None
        if dataset is None or (predicts and model is None):
            # Not possible while the job is open; a restored backup may do it.
            gone, hint = ("dataset", "Upload it again.") if dataset is None else ("model", "Name another one.")
            self._fail({"code": "invalid_data", "message": f"The job's {gone} is gone.", "hint": hint})
            raise LeaseLost("the job has ended")
        self.place.mkdir(parents=True)
        with self._renewing():
            self._patiently(self._fetch, dataset, model)
        self._write_job(dataset)

    def _row(self, table: type[Row], row_id: str) -> Row | None:
        with self.db.read() as session:
            return session.get(table, row_id)

    def _fetch(self, dataset: Dataset, model: Model | None) -> None:
        try:
            self.storage.fetch(dataset.storage_key, self.place / "dataset")
        except FileNotFoundError as error:  # nor would the next attempt find it
            log.error(
                "%s is not in the storage: have all processes the same TUNEPROOF_STORAGE_URL?", dataset.storage_key
            )
            hint = "Have all processes of the service the same TUNEPROOF_STORAGE_URL?"
            self._fail({"code": "internal", "message": "The dataset's file is not in the storage.", "hint": hint})
            raise LeaseLost("the job has ended") from error
        if model is not None:
            for name in model.files:
                with contextlib.suppress(FileNotFoundError):  # the child says what it misses
                    self.storage.fetch(f"{model.storage_prefix}/{name}", self.place / "model" / name)
        if self.claimed.checkpoint_prefix is not None:
            name = self.claimed.checkpoint_prefix.rpartition("/")[2]
            self.storage.fetch_folder(self.claimed.checkpoint_prefix, self.place / "checkpoints" / name)

    def _write_job(self, dataset: Dataset) -> None:
        spec, profile = self.claimed.spec, dataset.profile
        known = {"id": dataset.id, "name": dataset.name, "sha256": dataset.sha256, "n_rows": profile["n_rows"]}
        models_dir = self.settings.models_dir
        named = None if self.claimed.kind == "predict" else endpoint_name(spec["baseline"]["prompt_model"])
        endpoint = None if named is None else self.settings.prompt_endpoints.get(named)
        job = {
            "job_id": self.lease.job_id,
            "spec": spec,
            "table": profile["format"],
            "dataset": known | {"warnings": profile["warnings"]},
            "models_dir": str(models_dir.absolute()) if models_dir else None,
            "serve_dtype": self.settings.serve_dtype,
            "checkpoint_seconds": self.settings.checkpoint_seconds,
            "endpoint": endpoint.as_json() if endpoint else None,
        }
        (self.place / "job.json").write_text(json.dumps(job), encoding="utf-8")

    def _follow(self, child: Child) -> None:
        """Passes on what the child says, keeps the lease, stops the child where it must, until it has ended."""
        self._last_heard = time.monotonic()
        while True:
            ended = child.ended() is not None  # asked first: what it said before its end is still to be heard
            for message in child.messages(0 if ended else _LOOK_SECONDS):
                self._heard(message)
                if not ended:  # here too: a child may talk without a pause
                    self._keep_lease()
                    self._stop_where_due(child)
            if ended:
                return
            self._keep_lease()
            self._stop_where_due(child)
            if self._last_word is not None and time.monotonic() - self._last_word > _LAST_WORD_SECONDS:
                child.kill()
            if time.monotonic() - self._last_heard > self.settings.silence_seconds:
                self._hung = True
                child.kill()

    def _heard(self, message: dict[str, Any]) -> None:
        kind = message.pop("type")
        if kind == "progress":
            progress = Progress(**message)
            if progress.stage != self._stage_told:
                self._stage_told = progress.stage
                log.info("stage %s", progress.stage)
            self._report(progress=progress)
        elif kind == "event":
            self._report(events=[(message["level"], message["kind"], message["message"], message["data"])])
        elif kind == "spec":
            given = {key: value for key, value in message["spec"].items() if key in self.claimed.spec}
            self._report(spec=given)
        elif kind == "checkpoint":
            self._keep_checkpoint(Path(message["folder"]))
        elif kind in ("result", "error"):
            self._ends[kind], self._last_word = message, time.monotonic()
        self._last_heard = time.monotonic()  # now: to store a checkpoint may have taken long

    def _keep_checkpoint(self, folder: Path) -> None:
        prefix = f"jobs/{self.lease.job_id}/checkpoints/{self.lease.attempt}-{self.lease.token}/{folder.name}"
        # A child that is ahead may have removed it by now; the next one is on its way.
        with contextlib.suppress(FileNotFoundError):
            try:
                self._put_all(folder, prefix)
                if not folder.is_dir():  # what was listed may not have been all of it
                    return
                self._write(jobs.keep_checkpoint, prefix, self._now(), self.supervisor.grace)
            except LeaseLost:
                if prefix != self._kept:  # else it is where the next attempt goes on from, less what is not whole
                    self.storage.delete(prefix)
                raise
            self._kept = prefix

    @contextlib.contextmanager
    def _renewing(self) -> Iterator[None]:
        """Keeps the lease beside copying, which says nothing on its way; one that was lost is noticed after it."""
        done = threading.Event()

        def renew() -> None:
            with contextlib.suppress(LeaseLost):
                while not done.wait(self.settings.lease_seconds / 3):
                    self._renew()

        thread = threading.Thread(target=renew)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _keep_lease(self) -> None:
        now = time.monotonic()
        if now - self._looked < min(_STATUS_SECONDS, self.settings.lease_seconds / 3):
            return
        self._looked = now
        self.supervisor.show_life()
        if now - self._renewed > self.settings.lease_seconds / 3:
            self._renewed = now
            status = self._renew()
        else:
            status = self._write(jobs.status_under)
        self._cancelling = status == "cancelling"

    def _renew(self) -> str:
        """The time is that of each try: a lease that counts from before an outage may be over by its end."""
        return self._patiently(lambda: jobs.renew(self.db, self.lease, self._now(), self.settings.lease_seconds))

    def _stop_where_due(self, child: Child) -> None:
        if not self._cancelling and not self.supervisor.stop.is_set():
            return
        if self._stop_asked is None:
            self._stop_asked = time.monotonic()
            child.ask_to_stop()
        elif time.monotonic() - self._stop_asked > (_CANCEL_SECONDS if self._cancelling else _STOP_SECONDS):
            child.kill()

    def _finish(self, child: Child) -> None:
        status = child.ended()
        if self._stop_asked is None:
            log.info("the child ended with status %s", status)
        else:
            log.info("the child was told to stop, and has ended")
        self._end(status)

    def _end(self, status: int | None) -> None:
        if self._cancelling:
            self._write(jobs.confirm_cancelled, self._now(), self.supervisor.grace)
        elif "result" in self._ends:
            self._publish(self._ends["result"])
        elif "error" in self._ends:
            self._fail(self._ends["error"])
        elif self.supervisor.stop.is_set():
            log.info("the worker is to stop: the job is given back, and goes on when the next one starts")
            self._write(jobs.give_back, self._now(), self.supervisor.grace)
        elif status is not None and (status < 0 or status == os.EX_TEMPFAIL):
            reason = f"its process was ended by signal {-status}" if status < 0 else "its process was told to stop"
            if self._hung:
                reason = f"its process had said nothing for {self.settings.silence_seconds:g} s and was ended"
            self._write(jobs.lose, reason, self.settings.max_attempts, self._now(), self.supervisor.grace)
        else:
            log.error("the child failed:\n%s", _last_frames(self.place / "log.txt"))
            self._fail(
                {"code": "internal", "message": "The job's process failed.", "hint": "The worker's log says where."}
            )

    def _publish(self, result: dict[str, Any]) -> None:
        """Bytes first, then the one transaction that makes them visible; a cancel that came first wins."""
        self._report(progress=Progress("publish", 0.98, "publishing", 1.0))
        summary, announced = result["summary"], list[str]()
        try:
            artifacts = [
                NewArtifact(name, stored.size_bytes, stored.sha256, stored.key, name in TEXT_ARTIFACTS)
                for name, stored in self._put_all(self.place / "out", self.lease.prefix)
            ]
            models = []
            for made in result["models"]:
                model_id = new_id("mdl")
                announced.append(f"models/{model_id}")
                models.append(self._put_model(model_id, self.place / made["folder"], made["method"], summary))
            self._write(jobs.publish, artifacts, models, summary, self._now(), self.supervisor.grace)
        except LeaseLost:
            if self._write(jobs.was_published):
                return
            for (
                prefix
            ) in announced:  # never deleted from here: models outlive their job, by which alone one looks above
                self._patiently(garbage.give_up, self.db, prefix, self._now())
            self.storage.delete(self.lease.prefix)
            self._write(jobs.confirm_cancelled, self._now(), self.supervisor.grace)

    def _put_model(self, model_id: str, folder: Path, method: str, summary: dict[str, Any]) -> NewModel:
        prefix = f"models/{model_id}"
        self._patiently(garbage.announce, self.db, prefix, self._now())
        stored = self._put_all(folder, prefix)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        figures = summary["methods"][method]
        figures["model_id"] = model_id
        return NewModel(
            id=model_id, method=method, base_model=manifest["base_model"], base_revision=manifest["base_revision"],
            labels=manifest["labels"], metrics={key: figures[key] for key in ("accuracy", "macro_f1")},
            size_bytes=sum(file.size_bytes for _name, file in stored), storage_prefix=prefix,
            files=[name for name, _file in stored], calibration=manifest.get("calibration"),
        )  # fmt: skip

    def _put_all(self, folder: Path, prefix: str) -> list[tuple[str, Any]]:
        """Stores every file of a folder, each once however often that is asked, keeping the lease meanwhile."""
        stored = []
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = file.relative_to(folder).as_posix()
            key = f"{prefix}/{name}"
            if key not in self._stored:
                with self._renewing():
                    self._stored[key] = self._patiently(self._put, file, key)
                self._keep_lease()
            stored.append((name, self._stored[key]))
        return stored

    def _put(self, file: Path, key: str) -> Stored:
        with file.open("rb") as stream:
            return self.storage.put(stream, key)

    def _report(self, **what: Any) -> None:
        self._write(jobs.report, self._now(), **what)

    def _write(self, change: Callable[..., Answer], *given: Any, **named: Any) -> Answer:
        """One of the queue's verbs, under this lease."""
        return self._patiently(change, self.db, self.lease, *given, **named)

    def _patiently(self, ask: Callable[..., Answer], *given: Any, **named: Any) -> Answer:
        """What it gives. A server that is away is waited for: the child works on meanwhile.

        Whoever took the job since is safe from it, as from any write that comes late. A job that is cancelled while the
        storage is away does not wait for it.
        """
        while True:
            try:
                return ask(*given, **named)
            except (DBAPIError, StorageUnavailable) as error:
                stores = isinstance(error, StorageUnavailable)
                if self.supervisor.stop.is_set() or not (stores or self.supervisor.looked_in_vain(error)):
                    raise
                log.warning("the %s does not answer; asking again", "storage" if stores else "database")
                self.supervisor.stop.wait(_AWAY_SECONDS)
                self._last_heard = time.monotonic()  # what the child has said meanwhile is still to be heard
                if stores:
                    self._keep_lease()
                    if self._cancelling:
                        raise

    def _fail(self, error: dict[str, Any]) -> None:
        log.warning("failed: %s", error["code"])
        self._write(jobs.fail, error, self._now(), self.supervisor.grace)

    def _now(self) -> Any:
        return self.supervisor.clock()


def _last_frames(log_file: Path, lines: int = 12) -> str:
    """Where a child broke: the frames below the line that says so. What stands above may quote a text."""
    text = log_file.read_text(encoding="utf-8", errors="replace") if log_file.is_file() else ""
    _above, found, below = text.rpartition(f"CRITICAL tuneproof: {logs.ENDED}\n")
    frames = [line for line in below.splitlines() if found and _FRAME.fullmatch(line)]
    return "\n".join(frames[-lines:]) or "(it left no traceback)"
