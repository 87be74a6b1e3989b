"""Log lines: what they carry, and what they never do; set up in a process of its own, as where a server starts."""

import json
import subprocess
import sys
from datetime import datetime
from typing import Any

import pytest

from service.core import logs

PROGRAM = """
import asyncio, logging, sys, threading, warnings
from service.core import logs
logs.configure(*sys.argv[1:3])
ours, other = logging.getLogger("tuneproof.api"), logging.getLogger("httpx")

def private(text):
    raise ValueError(text)

def nested():
    try:
        private("canary one")
    except ValueError as error:
        raise KeyError("canary two") from error

ours.debug("a detail")
with logs.bound(request_id="req_1", seconds=0.5):
    with logs.bound(job_id="job_1", attempt=2):
        ours.info("in %s\\nof two lines", "both")
    try:
        nested()
    except KeyError:
        ours.exception("it broke")
other.info("POST https://hooks/canary")
logging.getLogger("openai").debug("canary")
other.warning("first\\n  File \\"canary.py\\", line 1, in canary\\n    canary()\\nValueError: canary")
frame = "  File \\"%s\\", line 1, in it"
other.error("Traceback (most recent call last):\\n" + frame % "a.py" + "\\nValueError: canary\\n" + frame % "canary.py")
warnings.warn("old\\ncanary")
thread = threading.Thread(target=private, args=("canary three",))
thread.start()
thread.join()

async def forgotten():
    asyncio.get_running_loop().create_task(fails())
    await asyncio.sleep(0.01)

async def fails():
    private("canary four")

asyncio.run(forgotten())
private("canary five")
"""


def run(level: str, log_format: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, level, log_format], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    """Every line is an object, whatever was logged, warned or raised."""
    return [json.loads(line) for line in run("debug", "json").splitlines()]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_exception_and_no_library_tells_what_it_was_given(log_format: str) -> None:
    said = run("debug", log_format)
    assert "canary" not in said
    assert said.count("in private") == 4, "but where each broke"
    assert "KeyError" in said
    assert "line 1, in it" in said


def test_a_line_of_json_has_time_level_logger_and_the_ids_that_are_bound(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        assert {"time", "level", "logger", "message"} <= set(line)
        assert datetime.fromisoformat(line["time"]).utcoffset() is not None
    first, second, third = lines[:3]
    assert (first["message"], first["level"], first["logger"]) == ("a detail", "debug", "tuneproof.api")
    assert second["message"] == "in both\nof two lines"
    assert [second[key] for key in ("request_id", "seconds", "job_id", "attempt")] == ["req_1", 0.5, "job_1", 2]
    assert (third["request_id"], "job_id" in third) == ("req_1", False)
    assert third["error"].splitlines()[-1] == "KeyError"


def test_text_names_the_ids_and_the_level_holds_for_our_own_lines() -> None:
    said = run("info", "text")
    assert "a detail" not in said
    assert "INFO tuneproof.api: in both\nof two lines [request_id=req_1 job_id=job_1 attempt=2]" in said
    assert "WARNING httpx: first" in run("info", "text")
    assert "WARNING httpx" in run("error", "text")


def test_every_error_of_a_group_is_told_where_it_broke_and_a_hidden_cause_is_not() -> None:
    def broke(error: Exception) -> Exception:
        try:
            raise error
        except Exception as raised:  # noqa: BLE001
            return raised

    told = logs.where(ExceptionGroup("canary", [broke(ValueError("canary")), broke(KeyError("canary"))]))
    assert told.count("in broke") == 2
    assert [line for line in told.splitlines() if not line.startswith("  File")] == [
        "ValueError", "KeyError", "ExceptionGroup"
    ]  # fmt: skip
    hidden = KeyError()
    hidden.__context__, hidden.__suppress_context__ = ValueError(), True  # as `raise … from None` leaves it
    assert logs.where(hidden) == "KeyError"


def test_what_is_bound_ends_with_its_block() -> None:
    with logs.bound(request_id="req_1"):
        assert logs.request_id() == "req_1"
    assert logs.request_id() is None
