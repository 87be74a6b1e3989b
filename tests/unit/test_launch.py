"""A real child process and what its supervisor hears of it. A shell script stands in for the interpreter."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.waiting import until
from worker.launch import LocalChild

Start = Callable[[str], LocalChild]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a child that runs this shell script, whatever it is called with."""

    def run(script: str) -> LocalChild:
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return LocalChild(tmp_path)

    return run


def heard(child: LocalChild) -> list[dict[str, object]]:
    until(lambda: child.ended() is not None, 20, "the child ends")
    return list(child.messages(0))


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_every_message_is_heard_before_the_end_is_told(start: Start) -> None:
    child = start('for i in 1 2 3; do echo "{\\"n\\": $i}"; done; exit 3')
    assert heard(child) == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert child.ended() == 3


def test_a_line_that_was_cut_off_or_is_no_message_is_passed_over(start: Start) -> None:
    child = start('echo \'{"n": 1}\'; echo warning; printf \'\\377\\n{"n": 2}\\n{"n"\'')
    assert heard(child) == [{"n": 1}, {"n": 2}]
    assert child.ended() == 0


def test_a_child_is_called_with_its_folder_and_watches_its_supervisor(start: Start, tmp_path: Path) -> None:
    child = start('printf \'{"arguments": "%s"}\\n\' "$*"')
    assert heard(child) == [{"arguments": f"-P -m worker.child {tmp_path}"}]


def test_what_it_writes_elsewhere_goes_to_its_log_and_not_to_ours(start: Start, tmp_path: Path) -> None:
    assert heard(start("echo trouble >&2")) == []
    assert (tmp_path / "log.txt").read_text() == "trouble\n"


def test_a_child_that_ends_by_a_signal_tells_which(start: Start) -> None:
    child = start("kill -SEGV $$")
    until(lambda: child.ended() is not None, 20, "the child ends")
    assert child.ended() == -signal.SIGSEGV


def test_asked_to_stop_it_may_end_in_its_own_way(start: Start) -> None:
    child = start('trap \'echo "{\\"last\\": 1}"; exit 75\' TERM; echo \'{"up": 1}\'; while :; do sleep 0.05; done')
    assert next(child.messages(20)) == {"up": 1}
    child.ask_to_stop()
    assert heard(child) == [{"last": 1}]
    assert child.ended() == 75


def test_a_kill_takes_what_it_has_started_too(start: Start) -> None:
    child = start('trap "" TERM; sleep 1000 & echo "{\\"pid\\": $!}"; wait')
    grandchild = next(child.messages(20))["pid"]
    child.ask_to_stop()
    assert child.ended() is None
    child.kill()
    until(lambda: child.ended() is not None, 20, "the child ends")
    assert child.ended() == -signal.SIGKILL
    until(lambda: gone(grandchild), 20, "the grandchild is gone")
    child.kill()  # once more is no error


def test_a_child_that_hangs_after_its_last_word_holds_nobody_up(start: Start) -> None:
    child = start("exec >&-; while :; do sleep 0.05; done")
    until(lambda: not child._reader.is_alive(), 20, "its output is closed")
    assert child.ended() is None
    assert list(child.messages(0)) == []
    child.kill()
    until(lambda: child.ended() == -signal.SIGKILL, 20, "it ends")


def test_a_child_whose_supervisor_has_died_ends_and_leaves_no_texts_behind(tmp_path: Path) -> None:
    (tmp_path / "folder" / "out").mkdir(parents=True)
    (tmp_path / "folder" / "dataset").write_text("text,label\n")
    child = LocalChild(tmp_path / "folder")
    assert child._process.stdin is not None
    child._process.stdin.close()
    until(lambda: child.ended() is not None, 20, "the child ends")
    assert child.ended() == os.EX_TEMPFAIL
    assert not (tmp_path / "folder").exists()


def test_nothing_said_is_waited_for_no_longer_than_asked(start: Start) -> None:
    child = start("while :; do sleep 0.05; done")
    assert list(child.messages(0.01)) == []
    child.kill()
