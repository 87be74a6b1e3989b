"""The `tuneproof` command: starts the server's parts, and talks to one over HTTP."""

import io
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from tuneproof.commands import jobs, models, server
from tuneproof.commands.options import EXIT_CODES, FAILED, REFUSED, UNREACHABLE, UNREAD
from tuneproof.commands.show import complain, err
from tuneproof.errors import TuneproofError
from tuneproof.processes import ServerNotInstalled


class Commands(TyperGroup):
    """Ends every command that fails with a sentence on stderr and an exit code that scripts can use."""

    def invoke(self, ctx: Any) -> Any:
        try:
            answer = super().invoke(ctx)
            sys.stdout.flush()
        except ServerNotInstalled as error:
            err.print(f"Error: {error}")
            raise typer.Exit(REFUSED) from error
        except TuneproofError as error:
            complain(error)
            raise typer.Exit(_exit_code(error)) from error
        except BrokenPipeError as error:
            # What is still in the buffer has nowhere to go, and must not fail once more at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(UNREAD) from error
        except OSError as error:
            err.print(f"Error: {error.filename or 'the system says'}: {error.strerror or error}")
            raise typer.Exit(REFUSED) from error
        except UnicodeEncodeError as error:
            err.print("Error: a text holds bytes that are not UTF-8; convert it first.")
            raise typer.Exit(REFUSED) from error
        return answer


def _exit_code(error: TuneproofError) -> int:
    if error.code == "promotion_refused":
        return FAILED
    return REFUSED if error.status is not None and 400 <= error.status < 500 else UNREACHABLE


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Prompt a model or fine-tune one? A verdict on your own labelled CSV, and a /predict that serves the winner.",
    epilog=EXIT_CODES,
)
for room in (server, jobs, models):
    app.add_typer(room.app)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a letter is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    app()
