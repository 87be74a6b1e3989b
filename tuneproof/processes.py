"""The server's processes: how they are called, started and ended."""

import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

GRACE_SECONDS = 30.0
POLL_SECONDS = 0.2

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


class ServerNotInstalled(Exception):
    """The service needs packages that the client does without."""


def require_server() -> None:
    """Raises: ServerNotInstalled, with what to do."""
    if any(importlib.util.find_spec(name) is None for name in ("service", "worker", "fastapi", "torch")):
        raise ServerNotInstalled(
            "Only the client is installed here; add the server with: pip install 'tuneproof[server]' "
            "(in a checkout: pip install '.[server]')."
        )


def server_command(module: str, *arguments: str) -> list[str]:
    """How a part of the server is started. `-P`: a user's own `worker.py` in this folder is not ours."""
    return [sys.executable, "-P", "-m", module, *arguments]


def become(module: str, *arguments: str) -> NoReturn:
    """Turn this process into that part of the server: signals reach it and its exit code is ours."""
    require_server()
    command = server_command(module, *arguments)
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted


@contextmanager
def running(
    commands: Mapping[str, Sequence[str]],
    *,
    log_folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    grace_seconds: float = GRACE_SECONDS,
) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Keep the named commands running while the block runs, and none of them after it.

    Each stands in a process group of its own, so that a Ctrl-C in the terminal reaches this process alone,
    which then ends them in order. SIGTERM and SIGHUP raise KeyboardInterrupt here, as Ctrl-C does.

    Args:
        commands: Name to command line.
        log_folder: Where `<name>.log` is written anew; None leaves the output in the terminal.
        environment: Variables set on top of this process's own.
        grace_seconds: How long an end by SIGTERM may take; after it comes SIGKILL.
    """
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in _stop_signals()}
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        with ExitStack() as logs:
            for name, command in commands.items():
                log = logs.enter_context((log_folder / f"{name}.log").open("wb")) if log_folder else None
                processes[name] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT if log else None,
                    env={**os.environ, **(environment or {})},
                    start_new_session=True,
                    preexec_fn=_end_with_parent if _LIBC else None,  # noqa: PLW1509 - no threads run yet
                )
        yield processes
    finally:
        _stop(list(processes.values()), grace_seconds)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_together(commands: Mapping[str, Sequence[str]], grace_seconds: float = GRACE_SECONDS) -> int:
    """Run the commands until one ends or this process is told to stop, then end them all.

    Returns:
        The exit code: 0 where it was told to stop. A command that ended by itself gives its own code, at
        least 1, since none of them should; 128 plus the signal where one killed it.
    """
    try:
        with running(commands, grace_seconds=grace_seconds) as processes:
            while (code := _first_code(processes)) is None:
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        return 0
    return 128 - code if code < 0 else max(code, 1)


def _first_code(processes: Mapping[str, subprocess.Popen[bytes]]) -> int | None:
    return next((code for process in processes.values() if (code := process.poll()) is not None), None)


def _stop(processes: Sequence[subprocess.Popen[bytes]], grace_seconds: float) -> None:
    """SIGTERM to each; what is left of their groups after the grace, or at a second Ctrl-C, is killed."""
    deadline = time.monotonic() + grace_seconds
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        for number in _stop_signals():
            signal.signal(number, signal.SIG_IGN)
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _stop_signals() -> list[signal.Signals]:
    """Those that end a program, but for the ones it was started to ignore (`nohup`)."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def _end_with_parent() -> None:
    """In the child: Linux sends it SIGTERM where this process is killed outright, so that no server is orphaned."""
    if _LIBC:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
