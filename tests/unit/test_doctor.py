"""`tuneproof doctor`: finds what is wrong, says what to do, changes nothing, and tells no secret."""

import hashlib
import json
import socket
import sqlite3
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from service import doctor
from service.__main__ import main
from service.core.errors import ModelUnavailable
from service.core.settings import Settings
from service.db import catalog
from service.db.engine import Database, migrate
from service.doctor import Finding, examine
from service.ml.base_models import BaseModel, Located
from tests.databases import fresh_database
from tests.rows import START
from tuneproof import cli
from tuneproof.commands import server

SECRET = "whsec_" + "c2VjcmV0" * 5


def findings(folder: Path, **given: Any) -> dict[str, Finding]:
    """By what they are about. Whatever is not well says what to do."""
    settings = Settings(**{"data_dir": folder, "port": 0, "min_free_bytes": 0} | given)
    found = list(examine(settings))
    assert not [finding for finding in found if finding.level != "ok" and not finding.todo]
    assert not [finding for finding in found if "cannot be looked at" in finding.found]
    return {finding.about: finding for finding in sorted(found, key=lambda f: f.level, reverse=True)}


def everything_in(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }  # fmt: skip


def test_a_healthy_machine_fails_nowhere_and_nothing_is_made(tmp_path: Path) -> None:
    found = findings(tmp_path / "new")
    assert not [finding for finding in found.values() if finding.level == "fail"]
    assert "first start" in found["database"].found
    assert found["data folder"].found == f"{tmp_path / 'new'} is not there yet"
    assert found["data folder"].level == "note"
    assert found["model minilm"].found.endswith("weights verified")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_left_as_it_was_also_beside_a_running_server(tmp_path: Path) -> None:
    db = fresh_database(tmp_path)
    db.close()
    (tmp_path / "storage").mkdir()
    before = everything_in(tmp_path)
    found = findings(tmp_path)
    assert found["database"].level == found["storage"].level == found["data folder"].level == "ok"
    assert "takes, gives and deletes" in found["storage"].found
    assert everything_in(tmp_path) == before
    db = Database(db.url)
    with db.write() as session:
        catalog.create_key(session, "me", "admin", START)
        assert findings(tmp_path)["database"].level == "ok", "a writer is at work"
    before = everything_in(tmp_path)
    assert f"{tmp_path}/tuneproof.db-wal" in before
    assert findings(tmp_path)["keys"].found == "there are some", "also from the write-ahead log"
    assert set(everything_in(tmp_path)) == set(before)
    db.close()


def test_files_that_other_processes_on_the_database_do_not_find_are_warned_of(tmp_path: Path) -> None:
    url = f"postgresql://me@/tuneproof?host={tmp_path}"
    assert findings(tmp_path, database_url=url)["storage: shared"].level == "warn"
    assert "storage: shared" not in findings(tmp_path, database_url=url, storage_url=f"file://{tmp_path}/s")
    assert "storage: shared" not in findings(tmp_path)


def test_the_data_folder_is_told_before_all_that_depends_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TUNEPROOF_DATA_DIR", raising=False)
    assert next(examine(Settings(port=0))).found == f"{tmp_path / 'data'} is not there yet"
    (tmp_path / "data").mkdir()
    assert next(examine(Settings(port=0))) == Finding("ok", "data folder", str(tmp_path / "data"))
    assert main(["keys", "create", "--name", "me", "--scope", "read"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"Keys of the server with its data in {tmp_path / 'data'}:\n")
    assert len(said.out.split()) == 1, "the key alone"


def test_a_base_model_that_is_not_at_hand_is_not_called_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(base: BaseModel, *, download: bool = True) -> Located:
        raise ModelUnavailable("It is not here.", hint="Fetch it.")

    monkeypatch.setattr(doctor, "locate", away)
    found = findings(tmp_path)
    assert (found["model minilm"].level, found["model qwen3-0.6b"].level) == ("fail", "note")
    assert "tuneproof models pull qwen3-0.6b" in found["model qwen3-0.6b"].todo


def test_a_database_that_is_behind_damaged_or_no_database_is_told(tmp_path: Path) -> None:
    db = fresh_database(tmp_path)
    db.close()
    file = tmp_path / "tuneproof.db"
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    connection.close()
    behind = findings(tmp_path)["database"]
    assert (behind.level, "0001" in behind.found, "tuneproof migrate" in behind.todo) == ("warn", True, True)
    whole = file.read_bytes()
    file.write_bytes(whole[:8192] + b"\xff" * 4096 + whole[12288:])
    assert findings(tmp_path)["database"].level == "fail"
    file.write_bytes(b"no database" * 1000)
    assert "cannot be read" in findings(tmp_path)["database"].found


def test_sqlite_on_a_network_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh_database(tmp_path).close()
    mounts = [
        SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in (("/", "ext4"), (str(tmp_path), "nfs4"))
    ]
    monkeypatch.setattr(doctor.psutil, "disk_partitions", lambda **_: mounts)
    found = findings(tmp_path)["database"]
    assert (found.level, "nfs4" in found.found) == ("fail", True)


def test_a_port_is_free_taken_or_held_by_tuneproof_itself(tmp_path: Path) -> None:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"status": "ok"}'
            self.send_response(200 if self.path == "/healthz" else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = findings(tmp_path, port=other.getsockname()[1])["port"]
    assert (taken.level, "TUNEPROOF_PORT" in taken.todo) == ("fail", True)
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        held = findings(tmp_path, port=server.server_port)["port"]
        server.shutdown()
    assert (held.level, "tuneproof answers" in held.found) == ("ok", True)


@pytest.mark.parametrize(
    ("given", "about"),
    [
        ({"host": "0.0.0.0"}, "keys"),
        ({"min_free_bytes": 2**60}, "disk: data"),
        ({"models_dir": Path("/nowhere/at/all")}, "models"),
        ({"serve_device": "quantum"}, "serving"),
        ({"storage_url": "nosuch://bucket"}, "storage"),
        ({"database_url": "postgresql+nosuch://me:pass-canary@db/x"}, "database"),
    ],
)
def test_settings_that_will_not_do_here_fail(tmp_path: Path, given: dict[str, Any], about: str) -> None:
    if given.get("database_url"):
        [finding] = [f for f in examine(Settings(data_dir=tmp_path, port=0, **given)) if f.about == about]
        assert "canary" not in finding.found
    else:
        finding = findings(tmp_path, **given)[about]
    assert finding.level == "fail"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert findings(tmp_path, serve_device="cuda")["serving"].level == "fail"


def test_more_memory_or_threads_than_there_are_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory_bytes", lambda: 2 * 2**30)
    found = findings(tmp_path, serve_threads=4096)
    assert {found[about].level for about in ("serving", "memory", "cpu")} == {"warn"}


def test_names_to_preload_that_no_model_has_are_told(tmp_path: Path) -> None:
    fresh_database(tmp_path).close()
    assert findings(tmp_path, preload="live")["preload"].found == "no model has the id or alias 'live'"


def test_a_key_opens_the_service_to_others(tmp_path: Path) -> None:
    db = fresh_database(tmp_path)
    with db.write() as session:
        catalog.create_key(session, "me", "admin", START)
    db.close()
    assert findings(tmp_path, host="0.0.0.0")["keys"].level == "ok"
    for secret, level in (("canary", "warn"), ("a-key-that-is-long-enough", "ok")):
        assert findings(tmp_path / "other", host="0.0.0.0", bootstrap_key=secret)["keys"].level == level


def test_no_secret_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "MY_KEY"}
    for name, value in {
        "DATA_DIR": str(tmp_path), "BOOTSTRAP_KEY": "key-canary", "PORT": "0", "MIN_FREE_BYTES": "0",
        "WEBHOOK_SECRET": SECRET, "PROMPT_ENDPOINTS": json.dumps({"mine": endpoint, "other": endpoint}),
        "DATABASE_URL": "postgresql://me:pass-canary@127.0.0.1:9/x", "STORAGE_URL": "s3://id-canary:secret-canary@b",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"TUNEPROOF_{name}", value)
    monkeypatch.setenv("MY_KEY", "env-canary")
    assert main(["doctor"]) == 1
    said = capsys.readouterr()
    assert "canary" not in said.out + said.err
    assert "c2VjcmV0" not in said.out


def test_settings_that_cannot_be_read_are_a_finding_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TUNEPROOF_PORT", "http")
    assert main(["doctor", "--json"]) == 1
    [finding] = json.loads(capsys.readouterr().out)
    assert (finding["level"], finding["about"], "TUNEPROOF_PORT" in finding["found"]) == ("fail", "settings", True)


def test_the_command_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr(server, "become", lambda *arguments: called.append(arguments))
    for words in (["doctor"], ["doctor", "--json"]):
        assert CliRunner().invoke(cli.app, words).exit_code == 0
    assert called == [("service", "doctor"), ("service", "doctor", "--json")]


def test_the_database_of_the_first_start_is_at_the_revision_it_needs(tmp_path: Path) -> None:
    migrate(f"sqlite:///{tmp_path / 'tuneproof.db'}")
    assert findings(tmp_path)["database"].level == "ok"
