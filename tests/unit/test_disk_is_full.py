"""A full disk is known as one, whoever says it in whichever way."""

import errno
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.core.errors import disk_is_full


def test_what_the_system_says_is_known() -> None:
    with pytest.raises(OSError, match="No space") as found, Path("/dev/full").open("wb", buffering=0) as full:
        full.write(b"x")
    assert disk_is_full(found.value)
    assert disk_is_full(OSError(errno.EDQUOT, "Disk quota exceeded"))


def test_what_sqlite_says_is_known(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'small.db'}")
    with engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=2")
        connection.exec_driver_sql("CREATE TABLE a (b)")
        with pytest.raises(sa.exc.OperationalError) as found:
            connection.exec_driver_sql("INSERT INTO a VALUES (zeroblob(1000000))")
    engine.dispose()
    assert disk_is_full(found.value)


def test_what_it_was_the_reason_for_is_known() -> None:
    error = ValueError("no checkpoint")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert disk_is_full(error)


def test_safetensors_says_it_in_words() -> None:
    words = "Error while serializing: I/O error: No space left on device (os error 28)"  # safetensors 0.7 on tmpfs
    assert disk_is_full(Exception(words))


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), ValueError("full"), None])
def test_nothing_else_is_taken_for_it(error: Exception | None) -> None:
    assert not disk_is_full(error)
