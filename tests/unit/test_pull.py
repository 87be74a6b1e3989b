"""`models pull`, against a hub of our own on 127.0.0.1: the real client, the real command."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from service.ml.base_models import GPU_DEFAULT, PROMPT_DEFAULT, BaseModel, find_base

FILES = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}', "model.safetensors": b"weights " * 99, "notes.md": b"#"}


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """Gives `sent` as the files whose hashes are those of FILES: JSON as git blobs, weights as LFS."""

    def __init__(self, base: BaseModel) -> None:
        self.base, self.sent, self.asked = base, dict(FILES), list[str]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                hub.asked.append(self.path)
                known = hub.answer(self.path)
                self.send_response(200 if known else 404)
                content, headers = known or (b"{}", {})
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def answer(self, path: str) -> tuple[bytes, dict[str, str]] | None:
        if path.startswith(f"/api/models/{self.base.repo}/tree/{self.base.revision}"):
            return json.dumps([self.entry(name) for name in FILES]).encode(), {"Content-Type": "application/json"}
        name = path.removeprefix(f"/{self.base.repo}/resolve/{self.base.revision}/")
        if name not in FILES:
            return None
        entry = self.entry(name)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        return self.sent[name], {"ETag": f'"{etag}"', "X-Repo-Commit": self.base.revision}

    def entry(self, name: str) -> dict[str, Any]:
        data = FILES[name]
        entry = {"type": "file", "path": name, "size": len(data), "oid": git_sha1(data)}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[Hub]:
    made = Hub(find_base(getattr(request, "param", GPU_DEFAULT), None))
    yield made
    made.stop()


def pull(name: str, cache: Path, url: str = "http://127.0.0.1:9", **given: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    return subprocess.run(
        [sys.executable, "-P", "-m", "service", "pull", name],
        env=os.environ | settings | given, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_pinned_revision_is_fetched_with_progress_and_only_what_is_loaded(hub: Hub, tmp_path: Path) -> None:
    done = pull(hub.base.name, tmp_path, hub.url)
    assert done.returncode == 0, done.stderr
    assert f"f2llm-0.6b: {hub.base.repo} at {hub.base.revision[:12]}, hashes verified" in done.stdout
    assert "%" in done.stderr
    folder = tmp_path / "hub" / "models--codefuse-ai--F2LLM-0.6B" / "snapshots" / hub.base.revision
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        name: data for name, data in FILES.items() if name != "notes.md"
    }
    fetched = [path for path in hub.asked if hub.base.repo in path]
    assert fetched
    assert all(hub.base.revision in path for path in fetched)

    del hub.asked[:]
    assert pull(hub.base.name, tmp_path, hub.url).returncode == 0
    assert not [path for path in hub.asked if "/resolve/" in path], "what is there is not fetched again"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_not_what_its_hash_says_is_refused(name: str, hub: Hub, tmp_path: Path) -> None:
    hub.sent[name] = FILES[name][::-1]
    done = pull(hub.base.name, tmp_path, hub.url)
    assert done.returncode == 2
    assert f"not the pinned files: {name}." in done.stderr
    assert "hf cache rm" in done.stderr


@pytest.mark.parametrize("hub", [PROMPT_DEFAULT], indirect=True)
def test_weights_are_held_to_our_own_hash_whatever_the_hub_says(hub: Hub, tmp_path: Path) -> None:
    assert len(str(hub.base.weights_sha256)) == 64
    done = pull(hub.base.name, tmp_path, hub.url)
    assert done.returncode == 2
    assert "not the pinned files: the weights." in done.stderr


@pytest.mark.parametrize("offline", ["0", "1"], ids=["a hub without it", "offline"])
def test_a_model_that_cannot_be_had_is_told_with_what_to_do(offline: str, hub: Hub, tmp_path: Path) -> None:
    assert hub.base.name != PROMPT_DEFAULT, "this hub answers 404 to it"
    done = pull(PROMPT_DEFAULT, tmp_path, hub.url, HF_HUB_OFFLINE=offline)
    assert done.returncode == 2
    assert "the model hub did not give it" in done.stderr
    assert "HF_HUB_OFFLINE" in done.stderr
    assert "TUNEPROOF_MODELS_DIR" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_names_are_refused_and_what_comes_with_the_packages_needs_no_download(tmp_path: Path) -> None:
    done = pull("gpt2", tmp_path)
    assert done.returncode == 2
    assert "Use 'auto' or one of: f2llm-0.6b" in done.stderr
    assert "minilm: needs no download" in pull("minilm", tmp_path).stdout
