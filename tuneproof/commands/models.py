"""Models, what they are called, what they say to texts, and how they are taken elsewhere; datasets beside them."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from enum import StrEnum
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.text import Text
from typer.core import TyperGroup

from tuneproof.commands.jobs import show_columns, show_started, watch_job
from tuneproof.commands.options import EXIT_CODES, AliasName, ApiKey, AsJson, Limit, ModelId, ModelOrAlias, Url, connect
from tuneproof.commands.reading import Delimiter, Encoding, HasHeader, TextColumn
from tuneproof.commands.show import err, out, plain_table, print_json, print_table, score
from tuneproof.errors import TuneproofError
from tuneproof.processes import become, require_server, server_command
from tuneproof.results import Answer, Prediction, Threshold
from tuneproof.sync.client import DEFAULT_URL
from tuneproof.tables import TableOptions

TEXTS_PER_CALL = 128
Format = StrEnum("Format", ["adapter", "merged"])
PANEL = "Models and datasets"

app = typer.Typer()
models = typer.Typer(cls=TyperGroup)
app.add_typer(models, name="models", rich_help_panel=PANEL, epilog=EXIT_CODES)


@app.command(rich_help_panel=PANEL, epilog=EXIT_CODES)
def predict(
    model: ModelOrAlias,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; without any, the lines of standard input.")] = None,
    file: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Start a job on a CSV or TSV.")] = None,
    text_column: TextColumn = None,
    has_header: HasHeader = None,
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    watch: Annotated[bool, typer.Option("--watch", help="See that job through and download its predictions.")] = False,
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, help="To here; predictions-JOB.csv by default.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="How many probabilities: JSON has 3, a file none.")] = None,
    min_confidence: Annotated[float, typer.Option(help="Below it the label is left open.")] = 0.0,
    target_precision: Annotated[
        float | None, typer.Option(help="Have it picked so that answers are right so often.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON per text.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Label texts: prints label, confidence and text, separated by tabs; a label left open is empty. Or a whole file.

    A blank line is answered by one that holds nothing, so that answers stand beside their lines. An alias that is
    moved meanwhile changes nothing: one run is answered by one version.
    """
    reading = TableOptions(text_column=text_column, has_header=has_header, delimiter=delimiter, encoding=encoding)
    if file is not None:
        if texts or target_precision is not None:
            raise typer.BadParameter(
                "--file goes with neither texts nor --target-precision: ask about one text with that, and give the "
                "threshold it finds as --min-confidence."
            )
        folder = (output or Path("predictions.csv")).parent
        if (watch or output) and not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise typer.BadParameter(f"Expected a folder that can be written to, found none at {folder.absolute()}.")
        with connect(url, api_key) as client:
            job = client.jobs.predict(model, file, top_k=top_k, min_confidence=min_confidence, **reading)
            if not (watch or output):
                show_started(client, job, as_json)
                return
            show_columns(client, job)
            watch_job(client, job.id, as_json)
            # Said before: a disk that is full takes nothing from who knows where they are.
            err.print(f"The predictions are at {client.url}/jobs/{job.id}/artifacts/predictions.csv")
            saved = client.jobs.download(job.id, "predictions.csv", output or f"predictions-{job.id}.csv")
        err.print(f"{saved} holds every row.")
        return
    if watch or output or set(reading.values()) != {None}:
        raise typer.BadParameter("--watch, --output and what says how a file is read go with --file.")
    if not texts and sys.stdin.isatty():
        raise typer.BadParameter("Give texts as arguments, or one a line on standard input.")
    waiting, note = iter(texts) if texts else _lines(), None
    answer: Answer | None = None
    with connect(url, api_key) as client:
        while batch := list(islice(waiting, TEXTS_PER_CALL)):
            asked = [text for text in batch if text.strip()]
            if asked or answer is None:
                answer = client.predict(
                    # A text in any case: it is known then which version answers, before a blank line is printed.
                    answer.model_id if answer else model, asked or ["?"], top_k=3 if top_k is None else top_k,
                    min_confidence=min_confidence, target_precision=target_precision,
                )  # fmt: skip
                if answer.threshold and note != (note := _evidence(answer.threshold)):
                    err.print(note)
            predictions = iter(answer.predictions)
            for text in batch:
                _print_answer(text, next(predictions) if text.strip() else None, answer, as_json)
    if answer is None:
        raise typer.BadParameter("There are no texts: standard input is empty.")


def _evidence(found: Threshold) -> str:
    """The threshold and the validation rows behind it, or why there is none."""
    if found.min_confidence is None:
        return str(found.note)
    share = f"{found.validation_coverage:.1%} of {found.validation_rows:,} validation rows reach it"
    said = f"Threshold {found.min_confidence}: {share}, {found.validation_precision:.1%} of these are right."
    return said + (f" {found.note}" if found.note else "")


def _print_answer(text: str, prediction: Prediction | None, answer: Answer, as_json: bool) -> None:
    if as_json:
        found = prediction.raw if prediction else dict.fromkeys(answer.predictions[0].raw)
        threshold = {"threshold": answer.threshold.raw} if answer.threshold else {}
        typer.echo(json.dumps({"text": text, **found, "model_id": answer.model_id, **threshold}, ensure_ascii=False))
    elif prediction is None:
        typer.echo("\t\t")
    else:  # one line each, whatever white space a text holds
        typer.echo(f"{prediction.label or ''}\t{prediction.confidence:.3f}\t{' '.join(text.split())}")


@models.callback(invoke_without_command=True)
def list_models(
    ctx: typer.Context, limit: Limit = 50, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None
) -> None:
    """List the published models, newest first; `pull` fetches a base model."""
    if ctx.invoked_subcommand is not None:
        return
    with connect(url, api_key) as client:
        published = list(client.models.list(limit=limit))
    if as_json:
        print_json([model.raw for model in published])
        return
    table = plain_table("id", "method", "accuracy", "name")
    for model in published:
        name = " ".join([model.name, f"v{model.version}", *(f"({alias})" for alias in model.aliases)])
        table.add_row(model.id, model.method, score(model.metrics.get("accuracy")), Text(name))
    print_table(table)


@models.command("pull")
def pull_model(name: Annotated[str, typer.Argument(help="A base model of the allow-list.")] = "qwen3-0.6b") -> None:
    """Fetch a base model's pinned revision from its hub into this machine's cache, and verify its hashes."""
    become("service", "pull", name)


@app.command(rich_help_panel=PANEL, epilog=EXIT_CODES)
def export(
    model: ModelId,
    form: Annotated[
        Format, typer.Option("--format", help="Its own files, for PEFT; or merged into its base, for transformers.")
    ] = Format.adapter,
    output: Annotated[Path | None, typer.Option(file_okay=False, help="MODEL-FORMAT here by default.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Take a model elsewhere: into a folder that is new or empty. Merging needs the server's packages and the base.

    An alias stands for the model that it points to.
    """
    shown = output or Path(f"{model}-{form}")
    folder = shown.resolve()
    if folder.exists() and any(folder.iterdir()):
        raise typer.BadParameter(f"Expected a folder that is new or empty, found files in {folder}.")
    if form is Format.merged:
        require_server()
    with connect(url, api_key) as client, TemporaryDirectory(dir=folder.parent, prefix=".export-") as place:
        made = Path(place, "adapter")
        _unpack(client.models.download(model, Path(place, "model.zip")), made)
        if form is Format.merged:
            adapter, made = made, Path(place, "merged")
            if code := subprocess.call(server_command("service", "merge", str(adapter), str(made))):
                if code < 0:
                    err.print(f"Error: merging was ended by signal {-code}; it takes twice the base's size in memory.")
                raise typer.Exit(128 - code if code < 0 else code)
        made.rename(folder)
    typer.echo(shown)


def _unpack(archive: Path, folder: Path) -> None:
    """The files that the model's manifest names, if they are the ones that were published."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            hashes = json.loads(zipped.read("manifest.json"))["files"]
            for name, sha256 in dict(hashes).items():
                if hashlib.sha256(zipped.read(name)).hexdigest() != sha256:
                    raise ValueError(f"{name} is not the file that was published")
            zipped.extractall(folder, ["manifest.json", *hashes])  # takes `..` and the like out of names
    except (zipfile.BadZipFile, zlib.error, EOFError, LookupError, RuntimeError, TypeError, ValueError) as error:
        detail = f"What the server sent is no whole model ({error}). Nothing was written."
        raise TuneproofError(None, "unexpected_answer", detail) from error


@app.command(rich_help_panel=PANEL, epilog=EXIT_CODES)
def promote(
    model: ModelId,
    alias: AliasName,
    force: Annotated[bool, typer.Option("--force", help="Also where it is shown to be worse.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Point an alias to a model; one shown to be worse than the model it replaces is refused, with exit code 1."""
    with connect(url, api_key) as client:
        moved = client.aliases.put(alias, model, force=force)
    if as_json:
        print_json(moved.raw)
        return
    out.print(f"{moved.alias} is {moved.model_id} now.")
    if (gate := moved.gate) and gate.accuracy_delta is not None:
        shown = {"candidate_wins": "shown to be better", "incumbent_wins": "shown to be worse"}.get(str(gate.verdict))
        delta = f"{100 * gate.accuracy_delta:+.1f} points of accuracy on {gate.n:,} rows that neither was trained on"
        err.print(f"Against the one before: {delta}, {shown or 'not shown to be better or worse'}.")
    if gate and gate.note:
        err.print(gate.note)


@app.command(rich_help_panel=PANEL, epilog=EXIT_CODES)
def datasets(limit: Limit = 20, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """List the datasets, newest first."""
    with connect(url, api_key) as client:
        found = list(client.datasets.list(limit=limit))
    if as_json:
        print_json([dataset.raw for dataset in found])
        return
    table = plain_table("id", "rows", "labels", "created", "name")
    for dataset in found:
        rows, labels = str(dataset.n_usable_rows), str(len(dataset.labels))
        created = f"{dataset.created_at.astimezone():%Y-%m-%d %H:%M}"
        table.add_row(dataset.id, rows, labels, created, Text(dataset.name))
    print_table(table)


def _lines() -> Iterator[str]:
    """The lines of standard input, blank ones too: UTF-8, whatever the locale takes bytes for."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            found = f"0x{line[error.start]:02x} at byte {error.start + 1}"
            raise typer.BadParameter(
                f"Expected UTF-8 on standard input, found {found} of line {number}. Convert it before, for example "
                "with: iconv -f cp1252 -t utf-8"
            ) from None
        yield text
