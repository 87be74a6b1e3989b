"""The server's parts, on this machine."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tuneproof.commands.options import FAILED, ApiKey, AsJson
from tuneproof.commands.show import err
from tuneproof.processes import become, require_server, run_together, server_command

PANEL = "Server"

app = typer.Typer()
keys = typer.Typer(no_args_is_help=True, help="API keys of the server in this data folder.")
app.add_typer(keys, name="keys", rich_help_panel=PANEL)

Host = Annotated[str | None, typer.Option(help="Address to listen on, in place of TUNEPROOF_HOST.")]
Port = Annotated[int | None, typer.Option(help="Port to listen on, in place of TUNEPROOF_PORT.")]


@app.command(rich_help_panel=PANEL)
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


@app.command(rich_help_panel=PANEL)
def serve(host: Host = None, port: Port = None) -> None:
    """Start the API alone."""
    become("service", "serve", *_listen(host, port))


@app.command(rich_help_panel=PANEL)
def worker() -> None:
    """Start one worker; any number may run."""
    become("worker")


@app.command(rich_help_panel=PANEL)
def migrate() -> None:
    """Bring the database to this version's tables; `up` and `serve` do so by themselves."""
    become("service", "migrate")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this machine and the settings, and say what to do; changes nothing."""
    become("service", "doctor", *_json(as_json))


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="Whose key it is.")],
    scope: Annotated[str, typer.Option(help="predict, read, write or admin; each includes those before it.")],
    expires_days: Annotated[int | None, typer.Option(help="Days until it ends; never by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, once."""
    expires = [] if expires_days is None else ["--expires-days", str(expires_days)]
    become("service", "keys", "create", "--name", name, "--scope", scope, *expires, *_json(as_json))


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List the keys, without their secrets."""
    become("service", "keys", "list", *_json(as_json))


@keys.command("revoke")
def revoke_key(key_id: str) -> None:
    """End a key at once."""
    become("service", "keys", "revoke", key_id)


@app.command(rich_help_panel=PANEL)
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
    from tuneproof.demo import DemoFailed, run_demo  # here: most commands do without

    require_server()
    try:
        run_demo(file, data_dir, api_key, prompt)
    except DemoFailed as error:
        err.print(f"Error: {error}")
        raise typer.Exit(FAILED) from error


def _listen(host: str | None, port: int | None) -> Sequence[str]:
    return [*([] if host is None else ["--host", host]), *([] if port is None else ["--port", str(port)])]


def _json(asked: bool) -> Sequence[str]:
    return ["--json"] if asked else []
