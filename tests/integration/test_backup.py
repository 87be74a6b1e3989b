"""The backup of docs/production.md, made by its own commands while the service works, and put back."""

import hashlib
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

from fastapi.testclient import TestClient
from sqlalchemy import select

from service.core.settings import Settings
from service.db.models import Artifact, Dataset, Model
from service.main import create_app
from tests.integration.conftest import QuietEngine, make_app
from tests.rows import add_published

PAGE = Path(__file__).parents[2] / "docs/production.md"
ME = ("127.0.0.1", 1)


def table(number: int) -> bytes:
    return b"text,label\n" + b"".join(b"text %d of %d,%s\n" % (i, number, (b"fee", b"refund")[i % 2]) for i in range(9))


def test_a_backup_made_under_load_is_whole(tmp_path: Path) -> None:
    [block] = re.findall(r"## Backup\n.*?```sh\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    app, enough = make_app(tmp_path / "data"), threading.Event()
    kept: list[str] = []
    with TestClient(app, client=ME) as client:
        published = [add_published(app.state.context.db, app.state.context.storage)[0] for _ in range(3)]

        def work() -> None:
            for number in range(10_000):
                dataset_id = client.post("/datasets", files={"file": table(number)}).json()["id"]
                if number % 3:
                    kept.append(dataset_id)
                else:
                    client.delete(f"/datasets/{dataset_id}")
                if enough.is_set():
                    return

        worker = threading.Thread(target=work)
        worker.start()
        while len(kept) < 20:
            assert worker.is_alive()
        before = set(kept)
        commands = block.replace(".venv/bin/python", sys.executable)
        subprocess.run(["bash", "-euc", commands], cwd=tmp_path, check=True)
        enough.set()
        worker.join()
    again = tmp_path / "again"
    again.mkdir()
    (tmp_path / "backup.db").rename(again / "tuneproof.db")
    (tmp_path / "backup-storage").rename(again / "storage")
    shutil.rmtree(tmp_path / "data")
    restored = create_app(Settings(data_dir=again, min_free_bytes=0))
    restored.state.context.engine = QuietEngine()
    with TestClient(restored, client=ME) as client, restored.state.context.db.read() as session:
        datasets = {row.id: row for row in session.scalars(select(Dataset))}
        assert before <= set(datasets)
        assert len(before) >= 20
        for dataset in datasets.values():
            if dataset.storage_key.endswith("/file"):
                continue  # a row of `add_published`, whose dataset has no bytes
            content = b"".join(restored.state.context.storage.chunks(dataset.storage_key))
            assert hashlib.sha256(content).hexdigest() == dataset.sha256
        for job_id in published:
            for artifact in session.scalars(select(Artifact).where(Artifact.job_id == job_id)):
                answer = client.get(f"/jobs/{job_id}/artifacts/{artifact.name}")
                assert hashlib.sha256(answer.content).hexdigest() == artifact.sha256
        for model in session.scalars(select(Model)):
            for name in model.files:
                restored.state.context.storage.open(f"{model.storage_prefix}/{name}").close()
        assert client.post("/datasets", files={"file": table(0)}).status_code == 201
    with sqlite3.connect(again / "tuneproof.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
