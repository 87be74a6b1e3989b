"""What the commands print: results on standard output, progress and errors on standard error."""

import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column, Table
from rich.text import Text

from tuneproof.errors import TuneproofError
from tuneproof.results import ENDED, Job
from tuneproof.sync.client import DEFAULT_URL, Client


class _Plain(Console):
    """Server's words are printed as they are: brackets in a label are no markup, and a command is not broken in two."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(highlight=False, markup=False, soft_wrap=True, stderr=stderr)

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 -- called while it is handled; `Commands` ends the program


out = _Plain()
err = _Plain(stderr=True)
SHOWN_LABELS = 20


def follow(client: Client, job_id: str) -> Iterator[tuple[Job, float | None]]:
    """The job at each change and every second until it ends, with the latest validation macro-F1 of its training.

    Says on stderr that another attempt begins.
    """
    seen, macro_f1 = 0, None
    for job in client.jobs.watch(job_id):
        for event in client.jobs.events(job_id, after=seen):
            seen = event.id or seen
            macro_f1 = event.data.get("validation_macro_f1", macro_f1)
            if event.data.get("attempt", 1) > 1:  # else stage and share would seem to fall
                err.print(event.message)
        yield job, macro_f1


def show_progress(states: Iterable[tuple[Job, float | None]]) -> Job:
    """Draw stage, share, time left, score and message on stderr until the job ends; lines where that is no terminal.

    Returns:
        The job's last state.
    """
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(16),
        TaskProgressColumn(),
        TextColumn(
            "{task.fields[detail]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
        ),
        console=err,
        disable=not err.is_terminal,
        expand=True,
    )
    shown: tuple[str, int, float | None] | None = None
    with bar:
        task = bar.add_task("queued", total=1.0, detail="")
        for job, macro_f1 in states:
            stage = job.status if job.terminal else job.stage or job.status
            fraction, detail = job.progress.fraction, _detail(job, macro_f1)
            bar.update(task, completed=fraction, description=stage, detail=detail)
            if not err.is_terminal and shown != (shown := (stage, int(fraction * 10), macro_f1)):
                err.print(f"{stage:<10} {fraction:4.0%}  {detail}")
    return job


def show_result(job: Job, warnings: Iterable[str] = ()) -> None:
    """Print how the job ended: what went wrong, or how each method did and what is recommended."""
    for warning in dict.fromkeys(warnings):  # each attempt gives its own
        out.print(f"Warning: {warning}")
    if job.status != "succeeded" or job.summary is None:
        error = job.error
        why = f": {error.message} ({error.code})" if error else "."
        err.print(f"The job {job.id} {ENDED.get(job.status, f'is {job.status}')}{why}")
        if error and error.hint:
            err.print(error.hint)
        return
    if job.summary.methods:
        table = plain_table("method", "accuracy", "macro-F1", "on")
        for name, figures in job.summary.methods.items():
            table.add_row(name, score(figures.accuracy), score(figures.macro_f1), figures.on)
        out.print(table, soft_wrap=False)
    if job.summary.labels:
        counts = plain_table("label", "rows")
        for label in job.summary.labels[:SHOWN_LABELS]:
            counts.add_row(Text(label.label), f"{label.count:,}")
        out.print(counts, soft_wrap=False)
    out.print(f"\n{job.summary.headline}", style="bold")
    if job.summary.recommendation:
        out.print(job.summary.recommendation.reason.replace("`", ""))


def complain(error: TuneproofError) -> None:
    """Say on stderr what the server refused, with the first of the fields or rows at fault."""
    err.print(f"Error: {error.detail}")
    for entry in error.errors[:5]:
        where = f"row {entry['row']}" if "row" in entry else ".".join(map(str, entry.get("loc", ())))
        err.print(f"  {where}: {entry.get('message', '')}")
    if error.hint:
        err.print(error.hint)


def warnings_of(client: Client, job_id: str) -> Iterator[str]:
    return (event.message for event in client.jobs.events(job_id) if event.level == "warning")


def plain_table(*columns: str) -> Table:
    return Table(*columns, box=None, padding=(0, 1, 0, 0), header_style="bold")


def print_table(table: Table) -> None:
    """As wide as it takes: an id that is cut cannot be copied."""
    table.columns[0].no_wrap = True
    out.print(table, soft_wrap=True)


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def command(client: Client, *words: str) -> str:
    """A command line to copy, for the same server."""
    where = [] if client.url == DEFAULT_URL else ["--url", client.url]
    return shlex.join([command_name(), *words, *where])


def command_name() -> str:
    """`tuneproof`, or how it was called where the shell does not find it by that name."""
    return "tuneproof" if shutil.which("tuneproof") else sys.argv[0]


def score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _detail(job: Job, macro_f1: float | None) -> str:
    """What stands first is what a narrow terminal shows."""
    if job.status == "queued" and not job.progress.message:
        return "waiting for a worker"
    eta_seconds = None if job.terminal else job.progress.eta_seconds
    parts = (
        None if eta_seconds is None else f"{timedelta(seconds=round(eta_seconds))} left",
        None if macro_f1 is None else f"F1 {macro_f1:.3f}",
        job.progress.message or None,
    )
    return "  ".join(part for part in parts if part)
