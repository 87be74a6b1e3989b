"""`tuneproof demo`: a CSV becomes a verdict and a served model, with the server started and stopped around it."""

import csv
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from rich.text import Text

from tuneproof.commands.show import (
    command_name,
    err,
    follow,
    out,
    plain_table,
    score,
    show_progress,
    show_result,
    warnings_of,
)
from tuneproof.errors import TuneproofError
from tuneproof.processes import running, server_command
from tuneproof.results import Job
from tuneproof.sync.client import DEFAULT_URL, Client

EXAMPLE = "support_tickets.csv"
NEW_TEXTS = [
    "I was charged twice for my subscription this month, please send one payment back.",
    "Every time I open the settings on my phone, the app closes by itself.",
    "my parcel shoud have come on monday, where is it??",
]
KEPT = ("report.html", "metrics.json", "predictions.csv", "split.csv", "manifest.json")
PROMPT_METHODS = {"zero_shot_prompt", "few_shot_prompt"}
PROMPT_DEFAULT = "qwen3-0.6b"
READY_WITHIN_SECONDS = 180.0
State = TypeVar("State")


class DemoFailed(Exception):
    """The demo could not show everything that it is there to show."""


def run_demo(file: Path | None, data_dir: Path, api_key: str | None, prompt: str | None = None) -> None:
    """Start API and worker on a free port, go through the demo, and leave no process behind.

    Raises:
        DemoFailed: something did not happen; the ends of the processes' logs are on stderr.
        TuneproofError: the server refused or failed; likewise.
    """
    path = file or example_file()
    data_dir = data_dir.absolute()
    logs = data_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    commands = {
        "api": server_command("service", "serve", "--host", "127.0.0.1", "--port", str(port)),
        "worker": server_command("worker"),
    }
    try:
        with (
            running(commands, log_folder=logs, environment={"TUNEPROOF_DATA_DIR": str(data_dir)}) as processes,
            Client(f"http://127.0.0.1:{port}", api_key) as client,
        ):
            go_through(client, path, data_dir, lambda: check_alive(processes), own_file=file is not None, prompt=prompt)
    except (DemoFailed, TuneproofError) as error:
        if isinstance(error, TuneproofError) and error.status == 422:
            raise  # what was asked for is at fault, and no process
        for log in (logs / f"{name}.log" for name in commands):
            lines = log.read_text("utf-8", "replace").splitlines()[-15:]
            err.print("\n".join([f"--- the end of {shown_path(log)}", *lines]))
        raise
    out.print(f"\nAll of it stays in {shown_path(data_dir)}; `make run` (or `tuneproof up`) opens it at {DEFAULT_URL}.")


def go_through(
    client: Client, path: Path, data_dir: Path, check: Callable[[], None], *, own_file: bool, prompt: str | None = None
) -> None:
    """The demo itself, against a server that is starting; `check` raises where waiting on makes no sense.

    Of a user's own file, texts of its test part are put to /predict.
    """
    wait_until_ready(client, check)
    out.print(f"One call of POST {client.url}/jobs with {shown_path(path)}:")
    job = show_progress(checked(follow(client, submit(client, path, prompt).id), check))
    if job.status != "succeeded":
        show_result(job)
        raise DemoFailed(f"The job ended as {job.status}.")
    out.print(f"{job.id} {job.status}.\n")
    show_result(job, warnings_of(client, job.id))

    folder = data_dir / "demo" / job.id
    kept = keep_artifacts(client, job, folder)
    for name in ("report.html", "metrics.json", "predictions.csv"):
        if name not in kept:
            raise DemoFailed(f"The job left no {name}.")
    show_comparison(json.loads((folder / "metrics.json").read_text("utf-8")))

    ask(client, job, unseen_texts(folder / "predictions.csv") if own_file else NEW_TEXTS)
    out.print(f"\nThe report is {shown_path(folder / 'report.html')} (GET /jobs/{job.id}/report).")
    others = ", ".join(name for name in kept if name != "report.html")
    out.print(f"Beside it lie {others} (GET /jobs/{job.id}/artifacts/…).")
    if prompt is None and not PROMPT_METHODS & set(job.summary.methods if job.summary else ()):
        say_how_to_prompt()


def submit(client: Client, path: Path, prompt: str | None) -> Job:
    asked = {"baseline": {"prompt_model": prompt}} if prompt else {}
    try:
        return client.jobs.submit(path, {"name": path.stem, **asked})
    except TuneproofError as error:
        if error.status not in (401, 403):
            raise
        raise DemoFailed(
            "This data folder already has API keys: put one with the scope `write` into TUNEPROOF_API_KEY, "
            "or name an empty folder in TUNEPROOF_DATA_DIR."
        ) from error


def keep_artifacts(client: Client, job: Job, folder: Path) -> list[str]:
    """Download what people look at; returns the names."""
    folder.mkdir(parents=True, exist_ok=True)
    there = {artifact.name for artifact in job.artifacts}
    names = [name for name in KEPT if name in there]
    for name in names:
        client.jobs.download(job.id, name, folder / name)
    return names


def show_comparison(metrics: Mapping[str, Any]) -> None:
    """Print the paired comparisons, one table for each candidate."""
    verdicts = {"candidate_wins": "wins", "baseline_wins": "loses"}
    for candidate in dict.fromkeys(pair["candidate"] for pair in metrics["comparison"]):
        table = plain_table("against", "rows", "points [95 %]", "fixed/broken", "p Holm", candidate)
        for pair in metrics["comparison"]:
            if pair["candidate"] != candidate:
                continue
            delta, low, high = (
                f"{100 * share:+.1f}" for share in (pair["accuracy_delta"], *pair["accuracy_delta_ci95"])
            )
            table.add_row(
                pair["baseline"],
                str(pair["n"]),
                Text(f"{delta} [{low}, {high}]"),
                f"{pair['n_fixed']}/{pair['n_broken']}",
                "<0.001" if pair["mcnemar_p_holm"] < 0.001 else f"{pair['mcnemar_p_holm']:.3f}",
                verdicts.get(pair["verdict"], pair["verdict"]),
            )
        out.print(f"\n{candidate} against the others on the same rows, accuracy in points:")
        out.print(table, soft_wrap=False)


def ask(client: Client, job: Job, texts: list[str]) -> None:
    if job.served is None:
        raise DemoFailed("The job published no model.")
    model_id, method = job.served
    answer = client.predict(model_id, texts)
    out.print(f"\nPOST /predict, model {answer.model_id} ({method}):")
    table = plain_table("label", "confidence", "text")
    for text, prediction in zip(texts, answer.predictions, strict=True):
        table.add_row(Text(prediction.label or ""), score(prediction.confidence), Text(text))
    out.print(table, soft_wrap=False)


def say_how_to_prompt() -> None:
    out.print(
        f"\nTo put a prompt beside them: {command_name()} models pull {PROMPT_DEFAULT}, then the demo again; or name a "
        "configured endpoint: make demo PROMPT=remote:NAME."
    )


def wait_until_ready(client: Client, check: Callable[[], None]) -> None:
    give_up_at = time.monotonic() + READY_WITHIN_SECONDS
    while True:
        check()
        try:
            client.ready()
            return
        except TuneproofError as error:
            if time.monotonic() > give_up_at:
                raise DemoFailed(f"The server was not ready after {READY_WITHIN_SECONDS:.0f} s: {error}") from error
        time.sleep(0.2)


def check_alive(processes: Mapping[str, subprocess.Popen[bytes]]) -> None:
    for name, process in processes.items():
        if (code := process.poll()) is not None:
            raise DemoFailed(f"The process `{name}` ended by itself, with code {code}.")


def checked(states: Iterator[State], check: Callable[[], None]) -> Iterator[State]:
    for state in states:
        yield state
        check()


def unseen_texts(predictions: Path, n: int = 3) -> list[str]:
    """The first texts of the test part, which no method was trained on."""
    csv.field_size_limit(sys.maxsize)
    with predictions.open(encoding="utf-8", newline="") as file:
        return list(islice((row["text"] for row in csv.DictReader(file) if row["split"] == "test"), n))


def example_file() -> Path:
    """The example: in the package where it was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    places = package / "examples" / EXAMPLE, package.parent / "examples" / EXAMPLE
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise DemoFailed(f"The example {EXAMPLE} is missing; give a CSV of your own: tuneproof demo FILE.")
    return path


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def shown_path(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
