"""How every process of the server logs: set up in one place, as text or as JSON, to standard error.

Nothing a user wrote may stand there. What our own lines say is written with care; an exception is told by where it
broke and never by its message, which may quote a text; and of other libraries only warnings are heard, as their
chatter holds addresses and bodies of requests.
"""

import json
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from itertools import takewhile
from traceback import extract_tb
from types import MappingProxyType
from typing import Any, Literal

LogFormat = Literal["text", "json"]
_IDS = ("request_id", "job_id", "attempt")
_FRAME = "  File "
ENDED = "ended by an error"
"""How the line begins that tells where an error ended a process."""
_bound: ContextVar[Mapping[str, Any]] = ContextVar("bound", default=MappingProxyType({}))


@contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """Lines logged inside carry these fields: all of them in JSON, the ids among them in text."""
    token = _bound.set({**_bound.get(), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


def request_id() -> str | None:
    """Of the request that is being answered."""
    return _bound.get().get("request_id")


def configure(level: str, log_format: LogFormat) -> None:
    """Once, where a process starts. `level` is for our own lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    ours = logging.getLogger("tuneproof")
    ours.setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(max(ours.level, logging.INFO))
    sys.excepthook = lambda kind, error, _trace: _uncaught(kind, error)
    threading.excepthook = lambda given: _uncaught(given.exc_type, given.exc_value)


def where(error: BaseException) -> str:
    """Where it broke, and what led there, without a message."""
    context = None if error.__suppress_context__ else error.__context__
    before = [error.__cause__ or context, *getattr(error, "exceptions", ())]
    frames = [f'{_FRAME}"{at.filename}", line {at.lineno}, in {at.name}' for at in extract_tb(error.__traceback__)]
    return "\n".join([*(where(other) for other in before if other is not None), *frames, type(error).__name__])


def failed(log: logging.Logger, what: str, error: BaseException, *, away: bool) -> None:
    """Says where it broke; in one line where the database is away."""
    if away:
        log.warning("%s: the database does not answer", what)
    else:
        log.error("%s\n%s", what, where(error))


def _uncaught(kind: type[BaseException], error: BaseException | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        logging.getLogger("tuneproof").critical(ENDED, exc_info=error)


def _message(record: logging.LogRecord) -> str:
    """Of other libraries the first line, and of a traceback the frames: what is quoted below may look like frames."""
    message = record.getMessage()
    if record.name.partition(".")[0] != "tuneproof":
        first, *more = message.splitlines() or [""]
        frames = takewhile(lambda line: line.startswith("  "), more) if first.startswith("Traceback ") else ()
        message = "\n".join([first, *(line for line in frames if line.startswith(_FRAME))])
    return message


def _error(record: logging.LogRecord) -> str | None:
    error = record.exc_info[1] if record.exc_info else None
    return None if error is None else where(error)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        ids = " ".join(f"{name}={value}" for name, value in _bound.get().items() if name in _IDS)
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {_message(record)}"
        return "\n".join(filter(None, (f"{line} [{ids}]" if ids else line, _error(record))))


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(), "logger": record.name, "message": _message(record), **_bound.get(),
        }  # fmt: skip
        error = _error(record)
        return json.dumps(line if error is None else line | {"error": error}, default=str)
