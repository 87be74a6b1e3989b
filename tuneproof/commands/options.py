"""What many commands take, and what the shell completes of it."""

import os
from collections.abc import Callable, Iterable
from typing import Annotated

import typer

from tuneproof.sync.client import DEFAULT_URL, Client

FAILED, REFUSED, UNREACHABLE, INTERRUPTED, UNREAD = 1, 2, 3, 130, 141
EXIT_CODES = (
    "Exit codes: 0 done; 1 the job failed or was cancelled, or a promotion was refused; 2 wrong usage, or refused by "
    "the server; 3 no server answers, or it failed; 130 interrupted; 141 nobody reads the output."
)
Completions = list[tuple[str, str]]


def connect(url: str, api_key: str | None) -> Client:
    """Here alone, so that tests can put another server in its place."""
    return Client(url, api_key)


def _completions(ask: Callable[[Client], Iterable[tuple[str, str]]]) -> Callable[[typer.Context, str], Completions]:
    """Completes words that the server knows; none where it cannot be asked, since nobody reads errors at a TAB."""

    def complete(ctx: typer.Context, incomplete: str) -> Completions:
        url = ctx.params.get("url") or os.environ.get("TUNEPROOF_URL") or DEFAULT_URL
        api_key = ctx.params.get("api_key") or os.environ.get("TUNEPROOF_API_KEY")
        try:
            with Client(url, api_key, timeout_seconds=1.0, retry_seconds=0.0) as client:
                return [(word, meaning) for word, meaning in ask(client) if word.startswith(incomplete)]
        except Exception:  # noqa: BLE001 -- as the docstring says
            return []

    return complete


_jobs = _completions(lambda client: ((job.id, f"{job.name}, {job.status}") for job in client.jobs.list(limit=50)))
_models = _completions(
    lambda client: (
        (model.id, f"{model.name} v{model.version}, {model.method}") for model in client.models.list(limit=50)
    )
)
_aliases = _completions(lambda client: ((alias.alias, alias.model_id) for alias in client.aliases.list()))


def _aliases_and_models(ctx: typer.Context, incomplete: str) -> Completions:
    return _aliases(ctx, incomplete) + _models(ctx, incomplete)


Url = Annotated[str, typer.Option(envvar="TUNEPROOF_URL", help="Where the server answers.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="TUNEPROOF_API_KEY", help="Not needed while the server has no keys.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
Limit = Annotated[int, typer.Option(min=1, help="How many at most.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job.", autocompletion=_jobs)]
ModelId = Annotated[str, typer.Argument(metavar="MODEL", help="Id of a model.", autocompletion=_models)]
AliasName = Annotated[str, typer.Argument(metavar="ALIAS", help="A name of yours.", autocompletion=_aliases)]
ModelOrAlias = Annotated[str, typer.Option(help="Id or alias of a model.", autocompletion=_aliases_and_models)]
