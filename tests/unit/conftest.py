"""What the tests of client and command share."""

from pathlib import Path

import pytest

from tests.fake_server import FakeServer
from tuneproof.commands import options


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """Answers the commands, and the clients that it gives."""
    fake = FakeServer()
    monkeypatch.setattr(options, "Client", fake.client)
    for name in ("TUNEPROOF_URL", "TUNEPROOF_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return fake


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    path = tmp_path / "tickets.csv"
    path.write_text("text,label\nwhere is my money,refund\n")
    return path


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have slept, each time."""
    slept: list[float] = []
    monkeypatch.setattr("tuneproof.sync.transport.time.sleep", slept.append)
    return slept
