"""Jobs, from a file to the report."""

import json
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tuneproof.commands.options import EXIT_CODES, FAILED, INTERRUPTED, ApiKey, AsJson, JobId, Limit, Url, connect
from tuneproof.commands.reading import Delimiter, Encoding, HasHeader, TextColumn
from tuneproof.commands.show import (
    command,
    err,
    follow,
    out,
    plain_table,
    print_json,
    print_table,
    show_progress,
    show_result,
    warnings_of,
)
from tuneproof.errors import TuneproofError
from tuneproof.results import Job
from tuneproof.sync.client import DEFAULT_URL, Client

app = typer.Typer()
PANEL = "Jobs"


@app.command(rich_help_panel=PANEL, epilog=EXIT_CODES)
def submit(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="CSV or TSV.")],
    name: Annotated[str | None, typer.Option(help="Name of the dataset, the job and its models.")] = None,
    text_column: TextColumn = None,
    label_column: Annotated[str | None, typer.Option(help="Name or 0-based index.")] = None,
    split_column: Annotated[str | None, typer.Option(help="Column that says train, validation or test.")] = None,
    has_header: HasHeader = None,
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    rare_labels: Annotated[str | None, typer.Option(help="refuse (the default) or drop.")] = None,
    base_model: Annotated[str | None, typer.Option(help="A model on the server's allow-list, or auto.")] = None,
    spec: Annotated[str | None, typer.Option(help="The job's spec as JSON, or @FILE.", metavar="JSON|@FILE")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show progress until the job ends.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Start a job on a file; what is not said about it is recognised."""
    job_spec = _spec(spec)
    if base_model is not None:
        job_spec["base_model"] = base_model
    with connect(url, api_key) as client:
        job = client.jobs.submit(
            file, job_spec, name=name, text_column=text_column, label_column=label_column, split_column=split_column,
            has_header=has_header, delimiter=delimiter, encoding=encoding, rare_labels=rare_labels,
        )  # fmt: skip
        if watch:
            show_columns(client, job)
            watch_job(client, job.id, as_json)
        else:
            show_started(client, job, as_json)


@app.command("jobs", rich_help_panel=PANEL, epilog=EXIT_CODES)
def list_jobs(limit: Limit = 20, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """List the jobs, newest first."""
    with connect(url, api_key) as client:
        jobs = list(client.jobs.list(limit=limit))
    if as_json:
        print_json([job.raw for job in jobs])
        return
    table = plain_table("id", "kind", "status", "done", "created", "recommended", "name")
    for job in jobs:
        recommended = job.summary.recommendation.method if job.summary and job.summary.recommendation else ""
        done, created = f"{job.progress.fraction:.0%}", f"{job.created_at.astimezone():%Y-%m-%d %H:%M}"
        table.add_row(job.id, job.kind, job.status, done, created, recommended, Text(job.name))
    print_table(table)


@app.command(rich_help_panel=PANEL, epilog=EXIT_CODES)
def status(job_id: JobId, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show how a job stands now; its result where it has ended. Ends with 0 whatever became of the job."""
    with connect(url, api_key) as client:
        job = client.jobs.get(job_id)
        if as_json:
            print_json(job.raw)
        elif job.terminal:
            show_result(job, warnings_of(client, job_id))
        else:
            _show_state(job)


@app.command(rich_help_panel=PANEL, epilog=EXIT_CODES)
def watch(job_id: JobId, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show a job's progress until it ends, then its result."""
    with connect(url, api_key) as client:
        watch_job(client, job_id, as_json)


@app.command(rich_help_panel=PANEL, epilog=EXIT_CODES)
def cancel(job_id: JobId, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Ask for a job to be cancelled; `retry` goes on with it later."""
    with connect(url, api_key) as client:
        _print_job(client.jobs.cancel(job_id), as_json)


@app.command(rich_help_panel=PANEL, epilog=EXIT_CODES)
def retry(job_id: JobId, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Go on with a failed or cancelled job, from its last checkpoint."""
    with connect(url, api_key) as client:
        _print_job(client.jobs.retry(job_id), as_json)


@app.command(rich_help_panel=PANEL, epilog=EXIT_CODES)
def report(
    job_id: JobId,
    output: Annotated[Path | None, typer.Option(help="File to write; report-JOB.html here by default.")] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Download a job's report, one page that needs no network, and print where it lies."""
    with connect(url, api_key) as client:
        path = client.jobs.report(job_id, output)
    if as_json:
        print_json({"path": str(path)})
    else:
        out.print(str(path))
    if open_it and not webbrowser.open(path.absolute().as_uri()):
        err.print("No browser could be opened.")
        raise typer.Exit(FAILED)


def watch_job(client: Client, job_id: str, as_json: bool) -> None:
    """Shows a job until it ends, then its result; ends with 1 where that is no success."""
    try:
        job = show_progress(follow(client, job_id))
    except KeyboardInterrupt as interrupt:
        err.print(f"The job goes on; follow it again with: {command(client, 'watch', job_id)}")
        raise typer.Exit(INTERRUPTED) from interrupt
    if as_json:
        print_json(job.raw)
    else:
        show_result(job, warnings_of(client, job_id))
        if job.served:
            out.print(f"Ask {job.served[1]} with: {command(client, 'predict', '--model', job.served[0], 'a text')}")
        elif job.status == "succeeded" and job.kind == "baseline":
            out.print("It published no model: one of kind 'experiment' or 'train' does.")
        out.print(f"The job's page: {client.url}/ui/#/job/{job.id}")
    if job.status != "succeeded":
        raise typer.Exit(FAILED)


def show_columns(client: Client, job: Job) -> None:
    """Say on stderr which columns of the job's file are read, and what is in doubt of it; not worth an error."""
    try:
        dataset = client.datasets.get(job.dataset_id)
    except TuneproofError:
        return
    for role, name in (("text", dataset.text_column), ("label", dataset.label_column)):
        if f"{role}_column" in dataset.inferred:
            err.print(f"Recognised {name!r} as the column of {role}s; --{role}-column names another.")
    for message in (warning.message for warning in dataset.warnings if warning.code == "unclear_header"):
        err.print(f"Warning: {message}")


def show_started(client: Client, job: Job, as_json: bool) -> None:
    if as_json:
        print_json(job.raw)
    else:
        out.print(f"{job.id} is {job.status}; follow it with: {command(client, 'watch', job.id)}")
        show_columns(client, job)


def _print_job(job: Job, as_json: bool) -> None:
    if as_json:
        print_json(job.raw)
    else:
        _show_state(job)


def _show_state(job: Job) -> None:
    message = f": {job.progress.message}" if job.progress.message and not job.terminal else "."
    out.print(f"{job.id} is {job.status}, {job.progress.fraction:.0%} done{message}")


def _spec(argument: str | None) -> dict[str, Any]:
    try:
        text = Path(argument[1:]).read_text("utf-8") if argument and argument.startswith("@") else argument
        spec = json.loads(text or "{}")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--spec takes JSON, or @ and the name of a file with JSON: {error}") from error
    if not isinstance(spec, dict):
        raise typer.BadParameter('--spec takes a JSON object, such as {"seed": 7}.')
    return spec
