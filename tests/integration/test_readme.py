"""What the README, the quick start and the page about `/predict` tell people to type, typed: in order, in a copy of the
checkout, against the real service on a free port. Variables and the environment pass from block to block."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.documents import ROOT, Block, blocks
from tests.waiting import until
from tuneproof.demo import free_port

pytestmark = [pytest.mark.more, pytest.mark.timeout(1800)]

PAGES = ("README.md", "docs/quick-start.md", "docs/predict.md")
NOT_RUN = {("README.md", "it would run itself"), ("docs/predict.md", "needs Excel")}
STAYS = {"make run\n"}  # started, and left running for the blocks that follow
ONCE = {"make demo\n", *STAYS}  # the quick start begins like the README; a second time would show nothing new
# What a Google sheet has that node lacks, and one call of the function as a cell makes it.
APPS_SCRIPT = """
const {execFileSync} = require("node:child_process");
const UrlFetchApp = {fetch: (url, {method, contentType, headers, payload}) => {
  const all = Object.entries({...headers, "Content-Type": contentType});
  const sent = all.flatMap(([name, is]) => ["-H", `${name}: ${is}`]);
  const body = execFileSync("curl", ["-sf", "-X", method.toUpperCase(), url, ...sent, "-d", payload]).toString();
  return {getContentText: () => body};
}};
const PropertiesService = {getScriptProperties: () => ({getProperty: name => process.env[name]})};
%s
const rows = TUNEPROOF([["where is my parcel?"], ["I was charged twice"]]);
if (rows.length !== 2 || rows.some(([label, confidence]) => !label || !(confidence > 0))) throw new Error(rows);
"""


class Reader:
    """Somebody who goes through the pages: one shell's variables, one folder, and what was left running."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.variables = folder.parent / "variables"
        self.variables.write_text("")
        self.left_running: list[subprocess.Popen[bytes]] = []
        self.said = ""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TUNEPROOF_")}
        self.environment = inherited | {
            "PYTHONPATH": str(folder),  # the environment's packages are the checkout's that runs the tests
            "TUNEPROOF_PORT": str(self.port),
            "TUNEPROOF_URL": self.url,
            "HF_HUB_OFFLINE": "1",
        }

    def does(self, block: Block) -> None:
        text = block.text.replace("http://127.0.0.1:8000", self.url).replace("https://tuneproof.example.com", self.url)
        if block.text in STAYS:
            self.leaves_running(text)
        elif block.language == "sh":
            self.said = self.shell(text, block)
        elif block.language == "python":
            self.said = self.shell(f"python {self.file('block.py', text)}", block)
        elif block.language == "javascript" and "UrlFetchApp" in text:
            self.shell(f"node {self.file('block.cjs', APPS_SCRIPT % text)}", block)
        elif block.language == "javascript":
            self.said = self.shell(f"node {self.file('block.mjs', text)}", block)
        elif block.language == "json":
            assert_told(json.loads(text), json.loads(self.said), block.where)
        else:
            assert block.language == "text", f"{block.where}: how is a block of {block.language!r} to be run?"

    def shell(self, text: str, block: Block) -> str:
        """Its standard output. Every variable it sets is there for the next."""
        kept = f"set -a; . {self.variables}; set -euo pipefail\n{text}\nexport -p > {self.variables}"
        done = subprocess.run(
            ["bash", "-c", kept], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (
            f"{block.where} ended with {done.returncode}:\n{text}\n{done.stdout}\n{done.stderr}"
        )
        return done.stdout

    def file(self, name: str, text: str) -> Path:
        (self.folder.parent / name).write_text(text)
        return self.folder.parent / name

    def leaves_running(self, text: str) -> None:
        with (self.folder.parent / "running.log").open("wb") as log:
            process = subprocess.Popen(
                # Tests started in the background ignore Ctrl-C, and what they start inherits that.
                ["env", "--default-signal=INT", "bash", "-c", f"exec {text}"], cwd=self.folder, env=self.environment,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.left_running.append(process)
        until(lambda: process.poll() is not None or self.is_ready(), 120, f"{text.strip()} answers")
        assert process.poll() is None, (self.folder.parent / "running.log").read_text()

    def is_ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/readyz", timeout=5).status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def presses_ctrl_c(self) -> list[int]:
        """In every terminal where something still runs; how each ended."""
        for process in self.left_running:
            os.killpg(process.pid, signal.SIGINT)
        return [process.wait(60) for process in self.left_running]


def assert_told(told: Any, found: Any, where: str) -> None:
    """Every field that a page shows is in the answer, with a value of the same kind."""
    assert type(told) is type(found), f"{where}: shows {told!r}, the answer has {found!r}"
    if isinstance(told, list):
        for shown, item in zip(told, found, strict=False):
            assert_told(shown, item, where)
    elif where.endswith(", probabilities"):  # their names are labels
        assert len(told) == len(found), where
    elif isinstance(told, dict):
        assert set(told) <= set(found), f"{where}: shows {sorted(told)}, the answer has {sorted(found)}"
        for name in told:
            assert_told(told[name], found[name], f"{where}, {name}")


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    folder = tmp_path / "checkout"
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    # The environment is there: one more installation of it would take minutes and show nothing new.
    (folder / ".venv").mkdir()
    for part in Path(sys.prefix).iterdir():
        if part.name != ".installed":
            (folder / ".venv" / part.name).symlink_to(part)
    (folder / ".venv" / ".installed").touch()
    started = Reader(folder)
    yield started
    for process in started.left_running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.skipif(not Path(sys.prefix, "bin", "activate").is_file(), reason="the tests run in no environment")
def test_everything_the_pages_tell_people_to_type_works(reader: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    assert shutil.which("curl"), "the pages call the service with curl; install it"
    skipped, done = set(), set()
    for block in (block for page in PAGES for block in blocks(page)):
        no_node = block.language == "javascript" and shutil.which("node") is None
        if block.not_run or no_node:
            with capsys.disabled():
                print(f"\nnot run: {block.where}: {block.not_run or 'no node on this machine'}", end="")
        if block.not_run:
            skipped.add((block.where.partition(":")[0], block.not_run))
        elif no_node:
            continue
        elif block.text not in done & ONCE:
            done.add(block.text)
            reader.does(block)
    assert skipped == NOT_RUN
    assert done >= ONCE
    assert set(reader.presses_ctrl_c()) <= {0, 2, 130, -signal.SIGINT}
