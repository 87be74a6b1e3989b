"""`tuneproof export`: what is written, and that nothing is where something was wrong."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from transformers import pipeline

from tests.fake_server import FakeServer, problem, tuneproof_command
from tests.threaded_server import answering
from tests.tiny import QWEN3
from tests.unit.test_merge import TEXTS, published, served
from tuneproof import TuneproofError
from tuneproof.commands import models

FILES = {"adapter_config.json": b"{}", "sub/weights.safetensors": b"weights " * 99}
DOWNLOAD = "GET /models/mdl_1/download"


def packed(files: dict[str, bytes] = FILES, **hashes: str) -> bytes:
    """A model's zip as the server sends it; `hashes` take the place of the right ones."""
    known = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} | hashes
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, data in {**files, "manifest.json": json.dumps({"files": known}).encode()}.items():
            zipped.writestr(name, data)
    return archive.getvalue()


def written(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def says(server: FakeServer, content: bytes) -> None:
    server.answers[DOWNLOAD] = lambda _request: httpx.Response(200, content=content)


@pytest.mark.parametrize(
    ("words", "folder"), [([], "mdl_1-adapter"), (["--output", "new"], "new"), (["--output", "empty"], "empty")]
)
def test_an_adapter_is_unpacked_and_its_folder_printed(
    server: FakeServer, here: Path, words: list[str], folder: str
) -> None:
    (here / "empty").mkdir()
    says(server, packed())
    result = tuneproof_command("export", "mdl_1", *words)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{folder}\n", "")
    (here / folder / "manifest.json").unlink()
    assert written(here / folder) == FILES
    assert {path.name for path in here.iterdir()} == {"empty", folder}


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "sub/../../evil"])
def test_no_file_leaves_the_folder_whatever_it_is_called(server: FakeServer, here: Path, name: str) -> None:
    says(server, packed({name: b"evil"}))
    assert tuneproof_command("export", "mdl_1", "--output", "a").exit_code == 0
    assert all(path.is_relative_to(here / "a") for path in here.rglob("*evil"))
    assert not (here.parent / "evil").exists()
    assert not Path("/tmp/evil").exists()


def test_a_folder_with_files_is_left_as_it_is(server: FakeServer, here: Path) -> None:
    (here / "full").mkdir()
    (here / "full" / "README.md").write_text("mine")
    result = tuneproof_command("export", "mdl_1", "--output", "full")
    assert result.exit_code == 2
    assert "Expected a folder that is new or empty" in result.stderr
    assert server.requests == []
    assert written(here) == {"full/README.md": b"mine"}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda whole: whole[:-30], "not a zip file"),
        (lambda whole: b"<html>", "not a zip file"),
        (lambda whole: whole.replace(b"PK\x03\x04", b"PK\x00\x00", 1), "magic number"),
        (lambda _: packed(**{"adapter_config.json": "0" * 64}), "adapter_config.json is not the file"),
        (lambda _: packed(**{"gone.bin": "0" * 64}), "no item named 'gone.bin'"),
        (lambda _: packed({}).replace(b"manifest", b"manifold"), "no item named 'manifest.json'"),
    ],
)
def test_a_damaged_download_leaves_nothing(
    server: FakeServer, here: Path, damage: Callable[[bytes], bytes], said: str
) -> None:
    says(server, damage(packed()))
    result = tuneproof_command("export", "mdl_1")
    assert result.exit_code == 3
    assert result.stderr.startswith("Error: What the server sent is no whole model (")
    assert said in result.stderr
    assert list(here.iterdir()) == []


def test_whichever_byte_is_wrong_no_wrong_file_is_written(here: Path) -> None:
    whole, refused = packed(), 0
    for i in range(len(whole)):
        (here / "z.zip").write_bytes(whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :])
        try:
            models._unpack(here / "z.zip", here / str(i))
        except (TuneproofError, OSError):  # the command makes a sentence of both
            refused += 1
        else:
            assert written(here / str(i)).items() >= FILES.items()
    assert refused > len(whole) / 2


def test_a_model_that_is_not_there_is_the_servers_refusal(server: FakeServer, here: Path) -> None:
    server.answers[DOWNLOAD] = problem(404)
    result = tuneproof_command("export", "mdl_1")
    assert (result.exit_code, result.stderr) == (2, "Error: Expected this, found that.\n")
    assert list(here.iterdir()) == []


def test_merging_is_the_servers_part(server: FakeServer, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(command: list[str]) -> int:
        assert command[:-2] == [sys.executable, "-P", "-m", "service", "merge"]
        adapter, made = map(Path, command[-2:])
        assert FILES.keys() < written(adapter).keys()
        made.mkdir()
        (made / "model.safetensors").write_bytes(b"merged")
        return 0

    monkeypatch.setattr(models.subprocess, "call", call)
    says(server, packed())
    result = tuneproof_command("export", "mdl_1", "--format", "merged")
    assert (result.exit_code, result.stdout) == (0, "mdl_1-merged\n")
    assert written(here) == {"mdl_1-merged/model.safetensors": b"merged"}


@pytest.mark.parametrize(("ended", "code", "said"), [(2, 2, ""), (-9, 137, "Error: merging was ended by signal 9")])
def test_a_merge_that_fails_leaves_nothing(
    server: FakeServer, here: Path, monkeypatch: pytest.MonkeyPatch, ended: int, code: int, said: str
) -> None:
    monkeypatch.setattr(models.subprocess, "call", lambda command: ended)
    says(server, packed())
    result = tuneproof_command("export", "mdl_1", "--format", "merged")
    assert result.exit_code == code
    assert result.stderr.startswith(said)
    assert list(here.iterdir()) == []


def test_merging_without_the_servers_packages_says_how_to_get_them(
    server: FakeServer, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneproof.processes.importlib.util.find_spec", lambda name: None)
    result = tuneproof_command("export", "mdl_1", "--format", "merged")
    assert result.exit_code == 2
    assert "pip install 'tuneproof[server]'" in result.stderr
    assert server.requests == []
    says(server, packed())
    assert tuneproof_command("export", "mdl_1").exit_code == 0


@pytest.mark.more
def test_from_the_command_to_stock_answers(tiny_models: Path, here: Path) -> None:
    """Real processes: the command, and the server's part that it starts."""
    adapter = published(here / "published", tiny_models, QWEN3)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        for name, data in written(adapter).items():
            zipped.writestr(name, data)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/models/mdl_1/download"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(archive.getvalue())

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with answering(Handler) as url:
        done = subprocess.run(
            [sys.executable, "-m", "tuneproof", "export", "mdl_1", "--format", "merged", "--url", url],
            env=os.environ | {"TUNEPROOF_MODELS_DIR": str(tiny_models)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "mdl_1-merged\n"), done.stderr
    assert not re.search("warn|error", done.stderr, re.IGNORECASE)
    labels, probabilities = served(adapter, tiny_models, QWEN3)
    answers = pipeline("text-classification", "mdl_1-merged", truncation=True)(TEXTS)
    assert [answer["label"] for answer in answers] == labels
    np.testing.assert_allclose([answer["score"] for answer in answers], probabilities.max(1), atol=1e-4)
