"""The `tuneproof` command: starts the server's parts, and talks to one over HTTP.

Exit codes: 0 done; 1 the job or the demo failed, or the job was cancelled; 2 wrong usage, or refused by the
server (4xx); 3 the server could not be reached, or failed (5xx); 130 interrupted.
"""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from tuneproof.client import DEFAULT_URL, Client, Job, TuneproofError
from tuneproof.processes import ServerNotInstalled, become, require_server, run_together, server_command

FAILED, REFUSED, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130
TEXTS_PER_CALL = 128

# Server's words are printed as they are: brackets in a label are no markup, and a command is not broken in two.
out = Console(highlight=False, markup=False, soft_wrap=True)
err = Console(highlight=False, markup=False, soft_wrap=True, stderr=True)


class Commands(TyperGroup):
    """Ends every command that fails with a sentence on stderr and an exit code that scripts can use."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ServerNotInstalled as error:
            err.print(f"Error: {error}")
            raise typer.Exit(REFUSED) from error
        except TuneproofError as error:
            complain(error)
            refused = error.status is not None and 400 <= error.status < 500
            raise typer.Exit(REFUSED if refused else UNREACHABLE) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Prompt a model or fine-tune one? A verdict on your own labelled CSV, and a /predict that serves the winner.",
)
keys = typer.Typer(no_args_is_help=True, help="API keys of the server in this data folder.")
app.add_typer(keys, name="keys")
models = typer.Typer(cls=TyperGroup)
app.add_typer(models, name="models")

Url = Annotated[str, typer.Option(envvar="TUNEPROOF_URL", help="Where the server answers.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="TUNEPROOF_API_KEY", help="Not needed while the server has no keys.")
]
Host = Annotated[str | None, typer.Option(help="Address to listen on, in place of TUNEPROOF_HOST.")]
Port = Annotated[int | None, typer.Option(help="Port to listen on, in place of TUNEPROOF_PORT.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's JSON.")]


@app.command()
def up(host: Host = None, port: Port = None) -> None:
    """Start the API and one worker, in this terminal, until Ctrl-C."""
    require_server()
    code = subprocess.call(server_command("service", "migrate"))
    if code == 0:
        code = run_together(
            {
                "api": server_command("service", "serve", *_listen(host, port)),
                "worker": server_command("worker"),
            }
        )
    raise typer.Exit(code)


@app.command()
def serve(host: Host = None, port: Port = None) -> None:
    """Start the API alone."""
    become("service", "serve", *_listen(host, port))


@app.command()
def worker() -> None:
    """Start one worker; any number may run."""
    become("worker")


@app.command()
def migrate() -> None:
    """Bring the database to this version's tables; `up` and `serve` do so by themselves."""
    become("service", "migrate")


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Check this machine and the settings, and say what to do; changes nothing."""
    become("service", "doctor", *(["--json"] if as_json else []))


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="Whose key it is.")],
    scope: Annotated[str, typer.Option(help="predict, read, write or admin; each includes those before it.")],
    expires_days: Annotated[int | None, typer.Option(help="Days until it ends; never by default.")] = None,
) -> None:
    """Make a key and print it, once."""
    expires = [] if expires_days is None else ["--expires-days", str(expires_days)]
    become("service", "keys", "create", "--name", name, "--scope", scope, *expires)


@keys.command("list")
def list_keys() -> None:
    """List the keys, without their secrets."""
    become("service", "keys", "list")


@keys.command("revoke")
def revoke_key(key_id: str) -> None:
    """End a key at once."""
    become("service", "keys", "revoke", key_id)


@app.command()
def demo(
    file: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, help="Your own CSV, in place of the example.")
    ] = None,
    data_dir: Annotated[Path, typer.Option(envvar="TUNEPROOF_DATA_DIR", help="Folder for what it makes.")] = Path(
        "data"
    ),
    prompt: Annotated[
        str | None, typer.Option(help="Model to prompt: remote:NAME, or one on the allow-list such as qwen3-0.6b.")
    ] = None,
    api_key: ApiKey = None,
) -> None:
    """From a CSV to predictions in one go: starts everything, shows the verdict, asks /predict, and stops."""
    from tuneproof.demo import DemoFailed, run_demo  # here: the demo is written with what this module shows

    require_server()
    try:
        run_demo(file, data_dir, api_key, prompt)
    except DemoFailed as error:
        err.print(f"Error: {error}")
        raise typer.Exit(FAILED) from error


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="CSV or TSV.")],
    name: Annotated[str | None, typer.Option(help="Name of the dataset, the job and its models.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Name or 0-based index.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Name or 0-based index.")] = None,
    split_column: Annotated[str | None, typer.Option(help="Column that says train, validation or test.")] = None,
    has_header: Annotated[
        bool | None, typer.Option("--has-header/--no-header", help="Whether the first row names the columns.")
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help=r"One character; \t is a tab.")] = None,
    encoding: Annotated[str | None, typer.Option(help="UTF-8 by default; e.g. cp1252.")] = None,
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
    with Client(url, api_key) as client:
        job = client.submit(
            file,
            job_spec,
            name=name,
            text_column=text_column,
            label_column=label_column,
            split_column=split_column,
            has_header=has_header,
            delimiter=delimiter and delimiter.replace(r"\t", "\t"),
            encoding=encoding,
            rare_labels=rare_labels,
        )
        if watch:
            _watch(client, job["id"], as_json)
        elif as_json:
            _print_json(job)
        else:
            out.print(f"{job['id']} is {job['status']}; follow it with: {_command(client, 'watch', job['id'])}")


@app.command()
def watch(job_id: str, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show a job's progress until it ends, then its result."""
    with Client(url, api_key) as client:
        _watch(client, job_id, as_json)


@app.command()
def predict(
    model: Annotated[str, typer.Option(help="Id or alias of a model.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; without any, the lines of standard input.")] = None,
    top_k: Annotated[int, typer.Option(help="How many probabilities the JSON holds.")] = 3,
    min_confidence: Annotated[float, typer.Option(help="Below it the label is left open.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help=f"Print one JSON answer per {TEXTS_PER_CALL} texts.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Label texts: prints label, confidence and text, separated by tabs; a label left open is empty."""
    if not texts and sys.stdin.isatty():
        raise typer.BadParameter("Give texts as arguments, or one a line on standard input.")
    waiting = iter(texts) if texts else (line for row in sys.stdin if (line := row.rstrip("\r\n")).strip())
    with Client(url, api_key) as client:
        while batch := list(islice(waiting, TEXTS_PER_CALL)):
            answer = client.predict(model, batch, top_k=top_k, min_confidence=min_confidence)
            if as_json:
                typer.echo(json.dumps(answer, ensure_ascii=False))
                continue
            for text, prediction in zip(batch, answer["predictions"], strict=True):
                # One line each, whatever white space a text holds.
                typer.echo(f"{prediction['label'] or ''}\t{prediction['confidence']:.3f}\t{' '.join(text.split())}")


@models.callback(invoke_without_command=True)
def list_models(ctx: typer.Context, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """List the published models, newest first; `pull` fetches a base model."""
    if ctx.invoked_subcommand is not None:
        return
    with Client(url, api_key) as client:
        published = list(client.models())
    if as_json:
        _print_json(published)
        return
    table = plain_table("id", "method", "accuracy", "name")
    table.columns[0].no_wrap = True
    for model in published:
        name = " ".join([model["name"], f"v{model['version']}", *(f"({alias})" for alias in model["aliases"])])
        table.add_row(model["id"], model["method"], score(model["metrics"].get("accuracy")), Text(name))
    out.print(table, soft_wrap=True)  # an id that is cut cannot be copied


@models.command("pull")
def pull_model(name: Annotated[str, typer.Argument(help="A base model of the allow-list.")] = "qwen3-0.6b") -> None:
    """Fetch a base model's pinned revision from its hub into this machine's cache, and verify its hashes."""
    become("service", "pull", name)


def show_progress(jobs: Iterable[Job]) -> Job:
    """Draw stage, share, message and time left on stderr until the job ends; lines where that is no terminal.

    Returns:
        The job's last state.
    """
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[message]}", markup=False),
        console=err,
        disable=not err.is_terminal,
    )
    shown: tuple[str, int] | None = None
    with bar:
        task = bar.add_task("queued", total=1.0, message="")
        for job in jobs:
            stage = job["status"] if job["terminal"] else job["stage"] or job["status"]
            fraction, message = job["progress"]["fraction"], _message(job)
            bar.update(task, completed=fraction, description=stage, message=message)
            if not err.is_terminal and shown != (shown := (stage, int(fraction * 10))):
                err.print(f"{stage:<10} {fraction:4.0%}  {message}")
    return job


def show_result(job: Job, warnings: Iterable[str] = ()) -> None:
    """Print how the job ended: what went wrong, or how each method did and what is recommended."""
    for warning in warnings:
        out.print(f"Warning: {warning}")
    if job["status"] != "succeeded":
        error = job["error"]
        why = f": {error['message']} ({error['code']})" if error else "."
        err.print(f"The job {job['id']} is {job['status']}{why}")
        if error and error["hint"]:
            err.print(error["hint"])
        return
    summary = job["summary"] or {}
    if methods := summary.get("methods"):
        table = plain_table("method", "accuracy", "macro-F1", "on")
        for name, figures in methods.items():
            table.add_row(name, score(figures["accuracy"]), score(figures["macro_f1"]), figures["on"])
        out.print(table, soft_wrap=False)
    if "headline" in summary:
        out.print(f"\n{summary['headline']}", style="bold")
    if recommendation := summary.get("recommendation"):
        out.print(recommendation["reason"])


def served_model(job: Job) -> tuple[str, str] | None:
    """`(model id, method)` to ask: the recommended method, or the most accurate served one where it is not served."""
    summary = job["summary"] or {}
    methods = {name: m for name, m in summary.get("methods", {}).items() if m.get("model_id")}
    if not methods:
        return None
    recommended = summary.get("recommendation", {}).get("method")
    method = recommended if recommended in methods else max(methods, key=lambda name: methods[name]["accuracy"])
    return methods[method]["model_id"], method


def complain(error: TuneproofError) -> None:
    """Say on stderr what the server refused, with the first of the fields or rows at fault."""
    err.print(f"Error: {error.detail}")
    for entry in error.errors[:5]:
        where = f"row {entry['row']}" if "row" in entry else ".".join(map(str, entry.get("loc", ())))
        err.print(f"  {where}: {entry.get('message', '')}")
    if error.hint:
        err.print(error.hint)


def plain_table(*columns: str) -> Table:
    return Table(*columns, box=None, padding=(0, 1, 0, 0), header_style="bold")


def command_name() -> str:
    """`tuneproof`, or how it was called where the shell does not find it by that name."""
    return "tuneproof" if shutil.which("tuneproof") else sys.argv[0]


def score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def warnings_of(client: Client, job_id: str) -> Iterator[str]:
    return (event["message"] for event in client.events(job_id) if event["level"] == "warning")


def _watch(client: Client, job_id: str, as_json: bool) -> None:
    try:
        job = show_progress(client.watch(job_id))
    except KeyboardInterrupt as interrupt:
        err.print(f"The job goes on; follow it again with: {_command(client, 'watch', job_id)}")
        raise typer.Exit(INTERRUPTED) from interrupt
    if as_json:
        _print_json(job)
    else:
        show_result(job, warnings_of(client, job_id))
        if served := served_model(job):
            out.print(f"Ask {served[1]} with: {_command(client, 'predict', '--model', served[0], 'a text')}")
    if job["status"] != "succeeded":
        raise typer.Exit(FAILED)


def _command(client: Client, *words: str) -> str:
    where = [] if client.url == DEFAULT_URL else ["--url", client.url]
    return shlex.join([command_name(), *words, *where])


def _message(job: Job) -> str:
    message, eta_seconds = job["progress"]["message"] or "", job["progress"]["eta_seconds"]
    if job["status"] == "queued" and not message:
        return "waiting for a worker"
    if eta_seconds is None or job["terminal"]:
        return message
    return f"{message}  {timedelta(seconds=round(eta_seconds))} left".strip()


def _spec(argument: str | None) -> dict[str, Any]:
    try:
        text = Path(argument[1:]).read_text("utf-8") if argument and argument.startswith("@") else argument
        spec = json.loads(text or "{}")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--spec takes JSON, or @ and the name of a file with JSON: {error}") from error
    if not isinstance(spec, dict):
        raise typer.BadParameter('--spec takes a JSON object, such as {"seed": 7}.')
    return spec


def _listen(host: str | None, port: int | None) -> Sequence[str]:
    return [*([] if host is None else ["--host", host]), *([] if port is None else ["--port", str(port)])]


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def main() -> None:
    app()
