"""What is deleted is gone from every byte of the data folder; what is old goes by itself where the operator says so."""

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from service.db import idempotency
from service.main import _round
from tests.integration.conftest import api
from tests.integration.test_webhooks import SECRET
from tests.integration.test_worker import FakeChild
from tests.rows import StillClock
from worker.supervisor import TEXT_ARTIFACTS, Supervisor

Start = Callable[..., TestClient]
TEXT, REST = "canary-text", "canary-rest"
TABLE = f"{REST},label\n" + "".join(f"{TEXT} number {i},{'ab'[i % 2]}-{REST}\n" for i in range(60))
DAY = 24 * 3600.0


class Desk:
    """An API and a worker whose children are scripts, on one clock."""

    def __init__(self, client: TestClient) -> None:
        self.client, self.context = client, client.app.state.context  # type: ignore[attr-defined]
        self.clock: StillClock = self.context.clock
        self.context.steady = lambda: True

    def work(self, *steps: Any, status: int = 0) -> None:
        given = self.context.settings
        worker = Supervisor(given, lambda folder: FakeChild(folder, list(steps), status), self.clock)
        worker.steady = lambda: True  # type: ignore[assignment]
        assert worker.work_once(given.data_dir / "work" / worker.id)
        worker.db.close()

    def days_go_by(self, days: float) -> None:
        self.clock.advance(days * DAY)
        for _ in range(3):  # what is discarded in one round is collected in another, once its grace is over
            _round(self.context)
            self.clock.advance(3600)

    def deletes(self, *paths: str) -> None:
        for path in paths:
            answer = self.client.delete(path)
            assert answer.status_code == 204, answer.text
        self.days_go_by(1)


def holding(folder: Path, word: str) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes())


def leaves(child: FakeChild) -> None:
    """What an experiment leaves: its artifacts, its model, and in both what was learned from."""
    files = dict.fromkeys(TEXT_ARTIFACTS, TEXT) | {"metrics.json": REST, "adapter/weights.bin": REST}
    manifest = {"base_model": "minilm", "base_revision": "sha256:0", "labels": [f"a-{REST}", f"b-{REST}"]}
    for name, said in (files | {"adapter/manifest.json": json.dumps(manifest)}).items():
        file = child.folder / "out" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(said)


def keeps_checkpoint(child: FakeChild) -> None:
    (child.folder / "checkpoints" / "at-1").mkdir(parents=True)
    (child.folder / "checkpoints" / "at-1" / "labelled.csv").write_text(TEXT)
    child.steps.insert(0, {"type": "checkpoint", "folder": str(child.folder / "checkpoints" / "at-1")})


FIGURES = {"accuracy": 0.9, "macro_f1": 0.8, "on": "test", "model_id": None}
RESULT = {
    "type": "result", "summary": {"headline": REST, "methods": {"lora": FIGURES}},
    "models": [{"method": "lora", "folder": "out/adapter"}],
}  # fmt: skip


def test_what_was_deleted_is_in_no_byte_of_the_data_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    given = {"webhook_hosts": "hooks.example", "webhook_secret": SECRET, "max_attempts": 1}
    with api(folder, clock=StillClock(), **given) as client:
        desk = Desk(client)
        upload = {"file": (f"{REST}.csv", TABLE)}
        spec = {"name": REST, "metadata": {REST: REST}, "webhook_url": f"https://hooks.example/{REST}",
                "baseline": {"prompt_template": f"{REST} {{labels}} {{text}}"}}  # fmt: skip
        sent = {"spec": json.dumps(spec), "text_column": REST}
        job = client.post("/jobs", files=upload, data=sent, headers={"idempotency-key": REST}).json()
        again = client.post("/jobs", json={"dataset_id": job["dataset_id"], "name": REST}).json()
        desk.work(leaves, RESULT)
        desk.work(keeps_checkpoint, status=-9)
        model_id = client.get(f"/jobs/{job['id']}").json()["model_id"]
        assert client.get(f"/jobs/{again['id']}").json()["status"] == "failed"
        assert client.get(f"/jobs/{job['id']}/artifacts/predictions.csv").text.startswith(TEXT)
        assert holding(folder, TEXT)
        desk.deletes(f"/datasets/{job['dataset_id']}")
        assert holding(folder, TEXT) == [], "the job and the model, which stay, hold no text"
        assert client.get(f"/models/{model_id}").json()["labels"] == [f"a-{REST}", f"b-{REST}"]
        desk.deletes(f"/jobs/{job['id']}", f"/jobs/{again['id']}", f"/models/{model_id}")
        desk.days_go_by(idempotency.KEPT / timedelta(days=1))
        assert not [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("tuneproof.")]
    # Stopped: what stood in the write-ahead log is in the file, and what was overwritten there is not.
    assert holding(folder, TEXT) == holding(folder, REST) == []


# By itself ------------------------------------------------------------------------------------------
def retained(start: Start, days: int) -> tuple[Desk, dict[str, str], dict[str, str]]:
    """Old datasets whose job has ended, whose job waits, and without one, and a young one; ids of datasets and jobs."""
    desk = Desk(start(clock=StillClock(), retention_days=days))
    upload = {"file": ("x.csv", TABLE)}
    datasets, made = {}, {}
    for name in ("ended", "waits", "alone"):
        datasets[name] = desk.client.post("/datasets", files=upload).json()["id"]
        if name != "alone":
            made[name] = desk.client.post("/jobs", json={"dataset_id": datasets[name]}).json()["id"]
        if name == "ended":
            desk.work(leaves, RESULT)
    desk.days_go_by(5)
    datasets["young"] = desk.client.post("/datasets", files=upload).json()["id"]
    return desk, datasets, made


def left(desk: Desk, ids: dict[str, str]) -> set[str]:
    found = {dataset["id"] for dataset in desk.client.get("/datasets").json()["data"]}
    return {name for name, dataset_id in ids.items() if dataset_id in found}


def test_old_datasets_go_with_their_jobs_texts_and_one_at_work_stays_until_it_has_ended(start: Start) -> None:
    desk, datasets, made = retained(start, 7)
    folder = desk.context.settings.data_dir / "storage"
    desk.days_go_by(1.7)
    assert left(desk, datasets) == set(datasets), "none is seven days old"
    desk.days_go_by(1)
    assert left(desk, datasets) == {"waits", "young"}
    ended = desk.client.get(f"/jobs/{made['ended']}").json()
    assert {artifact["name"] for artifact in ended["artifacts"]} & TEXT_ARTIFACTS == set()
    assert desk.client.get(f"/models/{ended['model_id']}").status_code == 200
    assert {Path(path).parts[-2] for path in holding(folder, TEXT)} == {datasets["waits"], datasets["young"]}
    desk.client.post(f"/jobs/{made['waits']}/cancel")
    desk.days_go_by(0)
    assert left(desk, datasets) == {"young"}
    desk.days_go_by(5)
    assert left(desk, datasets) == set()
    assert holding(folder, TEXT) == []


def test_without_a_setting_nothing_goes_by_itself(start: Start) -> None:
    desk, datasets, made = retained(start, 0)
    desk.days_go_by(4000)
    assert left(desk, datasets) == set(datasets)
    names = {artifact["name"] for artifact in desk.client.get(f"/jobs/{made['ended']}").json()["artifacts"]}
    assert names >= TEXT_ARTIFACTS
