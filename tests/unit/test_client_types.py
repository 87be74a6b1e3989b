"""What a user's type checker sees of the client."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.more
ROOT = Path(__file__).parents[2]
PROGRAM = """
from typing import assert_type

import pandas as pd
from tuneproof import Answer, AsyncClient, Client, Event, Job, TuneproofError


def report(job: Job) -> None:
    print(job.progress.fraction)


def main(frame: pd.DataFrame) -> str | None:
    with Client("http://127.0.0.1:8000", retry_seconds=5) as client:
        job = client.jobs.submit("tickets.csv", {"seed": 7}, text_column=0, rare_labels="drop")
        job = client.jobs.wait(job.id, report, timeout_seconds=3600)
        assert_type(job, Job)
        for event in client.jobs.stream(job.id):
            assert_type(event, Event)
        assert_type(client.predict("tickets", ["a"]), Answer)
        assert_type(client.predict_frame("tickets", frame, "text"), pd.DataFrame)
        assert_type([model.metrics["accuracy"] for model in client.models.list(limit=3)], list[float])
        try:
            client.aliases.put("tickets", "mdl_1", force=True)
        except TuneproofError as error:
            assert_type(error.status, int | None)
        return job.summary.headline if job.summary else None


async def same() -> list[str]:
    async with AsyncClient() as client:
        job = await client.jobs.submit("ds_1")
        assert_type(await client.jobs.get(job.id), Job)
        async for event in client.jobs.stream(job.id):
            assert_type(event, Event)
        return [dataset.name async for dataset in client.datasets.list()]
"""
WRONG = """
from tuneproof import Client

client = Client()
client.jobs.submit("tickets.csv", text_colum="message")
client.jobs.list(status="suceeded")
client.jobs.get("job_1").summary.headline
client.jobs.get("job_1").status == "succeded"
client.jobs.get("job_1").sumary
"""


def errors(folder: Path, program: str) -> list[int]:
    """Lines that mypy finds fault with, away from this project's own settings."""
    (folder / "program.py").write_text(program)
    (folder / "mypy.ini").write_text(f"[mypy]\nstrict = true\nmypy_path = {ROOT}\n[mypy-service.*,worker.*]\n")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(folder / "cache"), "program.py"]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout
    assert "program.py" in found or "Success" in found, found
    return [int(line) for line in re.findall(r"^program\.py:(\d+): error", found, re.MULTILINE)]


def test_a_strictly_typed_program_is_accepted_and_its_mistakes_are_found(tmp_path: Path) -> None:
    assert errors(tmp_path, PROGRAM) == []
    assert sorted(set(errors(tmp_path, WRONG))) == [5, 6, 7, 8, 9]
