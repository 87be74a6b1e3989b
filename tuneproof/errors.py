"""What a call of the client can end with instead of an answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from tuneproof.results import ENDED, Job


@dataclass(eq=False)
class TuneproofError(Exception):
    """The server refused, failed, could not be reached, or is none of ours.

    Args:
        status: The HTTP status; None where no answer came.
        code: The stable slug of the problem, such as `rare_labels`. The client's own are `unreachable`,
            `unexpected_answer`, and `unknown` for an error that some proxy in between made.
        detail: What was expected, what was found, what to do.
        hint: What else may help.
        errors: One entry per offending field or row: `loc` or `row`, and a `message`.
        retry_after_seconds: When the server asks to be tried again (429 and 503).
    """

    status: int | None
    code: str
    detail: str
    hint: str | None = None
    errors: Sequence[Mapping[str, Any]] = ()
    retry_after_seconds: float | None = None

    def __str__(self) -> str:
        return self.detail


class JobFailed(TuneproofError):
    """The job that was waited for has failed, or was cancelled (code `cancelled`); `job` is its last state."""

    def __init__(self, job: Job) -> None:
        error = job.error
        super().__init__(
            None,
            error.code if error else job.status,
            error.message if error else f"The job {job.id} {ENDED.get(job.status, job.status)}.",
            error.hint if error else None,
        )
        self.job = job

    def __reduce__(self) -> tuple[type["JobFailed"], tuple[Job]]:
        return type(self), (self.job,)


class WaitTimeout(TuneproofError, TimeoutError):
    """The job was not done in the time given; it goes on, and `wait` can be called again."""


def refusal(response: httpx.Response) -> TuneproofError:
    """What the problem+json says, as an error; of an answer that is none (a proxy's page, say), the status."""
    try:
        problem = response.json()
    except ValueError:
        problem = None
    problem = problem if isinstance(problem, dict) else {}
    plain = f"The server answered {response.status_code} {response.reason_phrase}."
    return TuneproofError(
        response.status_code,
        problem.get("code") or "unknown",
        problem.get("detail") or _not_ready(problem) or plain,
        hint=problem.get("hint") or _wrong_root(response),
        errors=problem.get("errors") or (),
        retry_after_seconds=_seconds(response.headers.get("Retry-After", "")),
    )


def _wrong_root(response: httpx.Response) -> str | None:
    asked = response.url.path.partition("/ui/")
    if response.status_code in (404, 405) and asked[1]:
        root = response.url.copy_with(raw_path=(asked[0] or "/").encode())
        return (
            f"The address to give (--url, TUNEPROOF_URL) is the service's root, {str(root).rstrip('/')}, without /ui."
        )
    return None


def _not_ready(readiness: Mapping[str, Any]) -> str | None:
    """`/readyz` says in words what is wrong, to callers with a key; its answer is no problem document."""
    checks = readiness.get("checks")
    if not isinstance(checks, dict):
        return None
    said = "; ".join(f"{name}: {words}" for name, words in checks.items() if isinstance(words, str) and words != "ok")
    return f"The server is not ready: {said}."


def _seconds(retry_after: str) -> float | None:
    """Of `Retry-After`, which is a number of seconds or, from some proxies, a date."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        wait = parsedate_to_datetime(retry_after) - datetime.now(timezone.utc)
    except (ValueError, TypeError):  # no date, or one without a zone
        return None
    return max(0.0, wait.total_seconds())
