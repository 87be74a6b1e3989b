"""Jobs that predict, from the upload to predictions.csv, by a real child; held against `POST /predict`."""

import csv
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file
from sqlalchemy import select
from transformers import AutoTokenizer

from service.core.errors import DISK_FULL
from service.core.settings import Settings
from service.db.models import Garbage
from service.main import create_app
from service.ml.adapter import WEIGHTS, save_head
from service.ml.base_models import EMBEDDED, find_base, locate
from service.ml.manifest import Manifest
from tests.adapters import labels, manifest, save_random_adapter
from tests.databases import fresh_database
from tests.rows import GRACE, START, add_job, claim, model, publish_stored
from tests.storing import put_folder
from tests.tiny import BERT, QWEN3, labelled_texts
from tests.waiting import until
from worker.launch import LocalChild
from worker.supervisor import Supervisor

K = 4
TEXTS = [*labelled_texts(90, seed=8)[0], "", "late parcel " * 200]


class SmallBlocks(LocalChild):
    """A child that ends a part after every 8 rows, and says how far it has come."""

    program = (
        "-c",
        "import sys, worker.bulk; worker.bulk.BLOCK_ROWS = {'cpu': 8}; worker.bulk.PART_SECONDS = 0.0; "
        "from worker.run import main; sys.exit(main(sys.argv[1:]))",
    )


class OnAFullDisk(LocalChild):
    """One whose scratch cannot be written to any more."""

    program = (
        "-c",
        "import errno, sys, worker.bulk; from worker.run import main\n"
        "def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "worker.bulk.Bulk.run = full; sys.exit(main(sys.argv[1:]))",
    )


class KilledAt(SmallBlocks):
    """One that is killed at its third part."""

    parts = 0

    def messages(self, wait_seconds: float) -> Iterator[dict[str, Any]]:
        for message in super().messages(wait_seconds):
            if self.parts == 3:
                self.kill()
                return  # what it said after that nobody has heard
            self.parts += message["type"] == "checkpoint"
            yield message


class Told(SmallBlocks):
    """One that is heard at its first part."""

    heard: Callable[[], object] | None = None

    def messages(self, wait_seconds: float) -> Iterator[dict[str, Any]]:
        for message in super().messages(wait_seconds):
            if message["type"] == "checkpoint" and Told.heard is not None:
                Told.heard()
                Told.heard = None
            yield message


@dataclass
class Service:
    """An API with its engine process, a worker beside it, and models published by hand."""

    client: TestClient
    folder: Path
    models_dir: Path

    @property
    def ctx(self) -> Any:
        return self.client.app.state.context  # type: ignore[attr-defined]

    def publish(self, base: str, method: str) -> str:
        folder = self.folder / f"{base}-{method}-{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        source = locate(find_base(base, self.models_dir))
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if method == "lora":
            save_random_adapter(folder, source.folder, tokenizer, K)
            known = Manifest.read(folder)
            # As small beside the base as training leaves it: what is drawn at random makes rounding errors large.
            tensors = load_file(folder / WEIGHTS)
            save_file({k: v / 20 if "lora_B" in k else v for k, v in tensors.items()}, folder / WEIGHTS)
        else:
            torch.manual_seed(2)
            width = json.loads((source.folder / "config.json").read_text())["hidden_size"]
            save_head(folder, torch.randn(K, width) / 8, torch.randn(K))
            known = manifest(K, method=method, states="pooled")
        replace(known, base_model=base, base_revision=source.revision, temperature=1.5).write(folder)
        made = model(
            method, base_model=base, base_revision=source.revision, labels=list(labels(K)),
            files=sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
        )  # fmt: skip
        put_folder(self.ctx.storage, folder, made.storage_prefix)
        add_job(self.ctx.db, name=folder.name)
        publish_stored(self.ctx.db, claim(self.ctx.db).lease, [], [made], {}, START, GRACE)
        return made.id

    def submit(self, model_id: str, times: int = 1, **spec: Any) -> str:
        file = io.StringIO(newline="")
        csv.writer(file).writerows([("text", "n"), *((text, i) for i, text in enumerate(TEXTS * times))])
        form = {"spec": json.dumps({"kind": "predict", "model": model_id} | spec)}
        answer = self.client.post("/jobs", files={"file": ("t.csv", file.getvalue().encode())}, data=form)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def work(self, launcher: Any = LocalChild) -> None:
        supervisor = Supervisor(self.ctx.settings, launcher)
        assert supervisor.work_once(self.folder / "work")
        supervisor.db.close()

    def job(self, job_id: str) -> dict[str, Any]:
        return self.client.get(f"/jobs/{job_id}").json()  # type: ignore[no-any-return]

    def written(self, job_id: str) -> bytes:
        return self.client.get(f"/jobs/{job_id}/artifacts/predictions.csv").content

    def rows(self, job_id: str) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(self.written(job_id).decode(), newline="")))

    def answered(self, model_id: str, texts: list[str]) -> list[dict[str, Any]]:
        """By `/predict`, once the engine has the base."""

        def look() -> Any:
            answer = self.client.post("/predict", json={"model": model_id, "texts": texts, "top_k": 2})
            return answer if answer.status_code != 503 else None

        answer = until(look, 120, "the engine answers")
        assert answer.status_code == 200, answer.text
        return answer.json()["predictions"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def service(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("bulk")
    (folder / "data").mkdir()
    fresh_database(folder / "data").close()
    settings = Settings(
        data_dir=folder / "data", models_dir=tiny_models, min_free_bytes=0, serve_threads=1, serve_device="cpu"
    )
    with TestClient(create_app(settings), client=("127.0.0.1", 5000)) as client:
        yield Service(client, folder, tiny_models)


@pytest.mark.more
@pytest.mark.parametrize("base", [EMBEDDED, QWEN3])
@pytest.mark.parametrize("method", ["lora", "embedding_logreg"])
def test_a_file_gets_the_labels_that_predict_gives(service: Service, base: str, method: str) -> None:
    model_id = service.publish(base, method)
    job_id = service.submit(model_id, top_k=2)
    service.work()
    job = service.job(job_id)
    assert (job["status"], job["model_id"], job["stage"]) == ("succeeded", model_id, "publish"), job["error"]
    assert job["summary"]["headline"] == f"{len(TEXTS) - 1} of {len(TEXTS)} rows labelled; 1 without a text."
    rows = service.rows(job_id)
    assert [row["text"] for row in rows] == TEXTS
    texts = [text for text in TEXTS if text]
    answers = service.answered(model_id, texts[:50]) + service.answered(model_id, texts[50:])
    scored = [row for row in rows if row["text"]]
    assert [row["label"] for row in scored] == [answer["label"] for answer in answers]
    # Other batches round otherwise, and bf16 keeps 8 bits.
    tolerance = 1e-6 if job["summary"]["scored_in"] == "fp32" else 2e-2
    for row, answer in zip(scored, answers, strict=True):
        assert float(row["confidence"]) == pytest.approx(answer["confidence"], abs=tolerance)
        assert {row["label_1"], row["label_2"]} == set(answer["probabilities"])


@pytest.mark.more
def test_a_job_whose_child_is_killed_between_blocks_goes_on_and_leaves_the_same_bytes(service: Service) -> None:
    model_id = service.publish(BERT, "lora")
    whole = service.submit(model_id)
    service.work(SmallBlocks)
    broken = service.submit(model_id)
    service.work(KilledAt)
    job = service.job(broken)
    assert (job["status"], job["attempt"]) == ("queued", 1)
    service.work(SmallBlocks)
    job = service.job(broken)
    assert (job["status"], job["attempt"]) == ("succeeded", 2), job["error"]
    assert service.written(broken) == service.written(whole)
    told = [event["message"] for event in service.client.get(f"/jobs/{broken}/events").json()["data"]]
    assert any(message.startswith("Goes on after ") for message in told)

    # What holds texts goes with the dataset: the predictions, and the parts of a job that was not finished.
    half = service.submit(model_id)
    service.work(KilledAt)
    assert service.client.post(f"/jobs/{half}/cancel").status_code == 202
    for job_id in (half, broken):
        assert service.client.delete(f"/datasets/{service.job(job_id)['dataset_id']}").status_code == 204
        assert service.client.get(f"/jobs/{job_id}/artifacts/predictions.csv").status_code == 404
    with service.ctx.db.read() as session:
        garbage = session.scalars(select(Garbage.prefix)).all()
    assert f"jobs/{half}/checkpoints" in garbage
    assert any(broken in prefix and prefix.endswith("/predictions.csv") for prefix in garbage)


@pytest.mark.more
def test_a_cancel_takes_under_five_seconds_and_a_retry_goes_on(service: Service) -> None:
    job_id, asked = service.submit(service.publish(QWEN3, "lora"), times=40), 0.0

    def cancel() -> None:
        nonlocal asked
        asked = time.monotonic()
        assert service.client.post(f"/jobs/{job_id}/cancel").status_code == 202

    Told.heard = cancel
    service.work(Told)
    assert asked
    assert time.monotonic() - asked < 5
    assert service.job(job_id)["status"] == "cancelled"
    assert service.client.post(f"/jobs/{job_id}/retry").status_code == 202
    service.work()
    assert service.job(job_id)["summary"]["n_rows"] == 40 * len(TEXTS)
    assert len(service.rows(job_id)) == 40 * len(TEXTS)


@pytest.mark.more
def test_a_full_disk_fails_the_job_as_such_and_a_retry_goes_on_once_there_is_space(service: Service) -> None:
    model_id = service.publish(BERT, "embedding_logreg")
    job_id = service.submit(model_id)
    service.work(OnAFullDisk)
    failed = service.job(job_id)
    assert (failed["status"], failed["error"]) == ("failed", DISK_FULL)
    assert failed["artifacts"] == []
    assert service.client.post(f"/jobs/{job_id}/retry").status_code == 202
    service.work()
    assert service.job(job_id)["status"] == "succeeded"
    assert len(service.rows(job_id)) == len(TEXTS)
