"""The server's parts as the command starts and ends them; the processes are real."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_server import tuneproof_command
from tuneproof import processes
from tuneproof.commands import server


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["serve"], ["service", "serve"]),
        (["serve", "--host", "::1", "--port", "9000"], ["service", "serve", "--host", "::1", "--port", "9000"]),
        (["worker"], ["worker"]),
        (["migrate"], ["service", "migrate"]),
        (
            ["keys", "create", "--name", "ci", "--scope", "write", "--expires-days", "9"],
            ["service", "keys", "create", "--name", "ci", "--scope", "write", "--expires-days", "9"],
        ),
        (["keys", "list"], ["service", "keys", "list"]),
        (["keys", "list", "--json"], ["service", "keys", "list", "--json"]),
        (["keys", "revoke", "key_1"], ["service", "keys", "revoke", "key_1"]),
        (["models", "pull", "f2llm-0.6b"], ["service", "pull", "f2llm-0.6b"]),
        (["models", "pull"], ["service", "pull", "qwen3-0.6b"]),
    ],
)
def test_the_servers_parts_take_this_processs_place(
    monkeypatch: pytest.MonkeyPatch, words: list[str], command: list[str]
) -> None:
    def execv(program: str, arguments: list[str]) -> None:
        assert program == sys.executable
        assert arguments == [sys.executable, "-P", "-m", *command]
        raise SystemExit(42)

    monkeypatch.setattr("tuneproof.processes.os.execv", execv)
    assert tuneproof_command(*words).exit_code == 42


@pytest.mark.parametrize("words", [["up"], ["serve"], ["worker"], ["migrate"], ["keys", "list"], ["demo"]])
def test_without_the_server_extra_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr("tuneproof.processes.importlib.util.find_spec", lambda name: None)
    result = tuneproof_command(*words)
    assert result.exit_code == 2
    assert "pip install 'tuneproof[server]'" in result.stderr


@pytest.mark.parametrize(("migrated", "code"), [(0, 7), (4, 4)])
def test_up_migrates_first_and_starts_nothing_where_that_fails(
    monkeypatch: pytest.MonkeyPatch, migrated: int, code: int
) -> None:
    monkeypatch.setattr("tuneproof.commands.server.subprocess.call", lambda command: migrated)
    started: list[dict[str, list[str]]] = []
    monkeypatch.setattr(server, "run_together", lambda commands: started.append(commands) or 7)
    assert tuneproof_command("up", "--port", "9000").exit_code == code
    assert [list(commands) for commands in started] == ([["api", "worker"]] if migrated == 0 else [])


# Run by `&` in a script or by nohup, the tests have been told to ignore signals, and what they start inherits that.
PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from tuneproof.processes import run_together
commands = {str(n): [sys.executable, "-c", program] for n, program in enumerate(sys.argv[2:])}
sys.exit(run_together(commands, grace_seconds=float(sys.argv[1])))
"""
WAITS = "import os, signal; os.write(1, b'up\\n'); signal.pause()"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAITS}"


def started_together(grace_seconds: float, *programs: str) -> subprocess.Popen[str]:
    """A process that runs the programs together; they share its stdout, which ends when the last has ended."""
    command = [sys.executable, "-c", PARENT, str(grace_seconds), *programs]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    for program in programs:
        if program.endswith(WAITS):
            assert parent.stdout.readline() == "up\n"
    return parent


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_told_to_stop_it_ends_both_and_exits_with_0(number: signal.Signals) -> None:
    parent = started_together(30, WAITS, WAITS)
    parent.send_signal(number)
    assert parent.communicate() == ("", None)
    assert parent.returncode == 0


def test_what_does_not_end_in_the_grace_time_is_killed() -> None:
    parent = started_together(0.05, DEAF, WAITS)
    parent.send_signal(signal.SIGTERM)
    parent.communicate()
    assert parent.returncode == 0


@pytest.mark.parametrize(
    ("last_words", "code"),
    [("raise SystemExit(3)", 3), ("", 1), ("import os; os.kill(os.getpid(), 9)", 128 + 9)],
)
def test_where_one_ends_the_other_is_ended_and_the_code_is_passed_on(last_words: str, code: int) -> None:
    parent = started_together(30, WAITS, last_words)
    parent.communicate()
    assert parent.returncode == code


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's own")
def test_killed_outright_it_leaves_no_orphans() -> None:
    parent = started_together(30, WAITS, WAITS)
    parent.kill()
    assert parent.communicate() == ("", None)


def test_a_process_in_the_demo_gets_its_signals_from_the_demo_alone(tmp_path: Path) -> None:
    program = "import os; print(os.getsid(0) == os.getpid())"
    with processes.running({"api": [sys.executable, "-c", program]}, log_folder=tmp_path) as started:
        started["api"].wait()
    assert (tmp_path / "api.log").read_text() == "True\n"
