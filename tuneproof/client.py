"""A client for the HTTP API: httpx and nothing heavier."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, TypedDict, cast
from urllib.parse import quote

import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
LOOPBACK = {"127.0.0.1", "::1", "localhost"}


class Job(TypedDict):
    """A job as `GET /jobs/{id}` gives it; like every answer, it may hold more than is named here."""

    id: str
    kind: str
    name: str
    status: str
    terminal: bool
    stage: str | None
    progress: dict[str, Any]
    attempt: int
    dataset_id: str
    model_id: str | None
    spec: dict[str, Any]
    error: dict[str, Any] | None
    summary: dict[str, Any] | None
    artifacts: list[dict[str, Any]]


class Event(TypedDict):
    id: str | int
    created_at: str
    level: str
    type: str
    message: str


class Model(TypedDict):
    id: str
    name: str
    version: int
    method: str
    base_model: str
    labels: list[str]
    aliases: list[str]
    metrics: dict[str, float]


class Prediction(TypedDict):
    """`label` is None, and `abstained` true, where the confidence is under the `min_confidence` asked for."""

    label: str | None
    confidence: float
    probabilities: dict[str, float]
    abstained: bool
    truncated: bool


class Answer(TypedDict):
    model_id: str
    predictions: list[Prediction]
    usage: dict[str, int]
    threshold: dict[str, Any] | None


@dataclass(eq=False)
class TuneproofError(Exception):
    """The server refused, failed, or could not be reached.

    Args:
        status: The HTTP status; None where no answer came.
        code: The stable slug of the problem, such as `rare_labels`; `unreachable` where no answer came.
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


class Client:
    """Talks to one tuneproof server. Close it, or use it in a `with` block.

    Every method raises `TuneproofError`.

    Args:
        url: Where the server answers; may end in a path, behind a proxy.
        api_key: Not needed while the server has no keys.
        timeout_seconds: For connecting, and for each wait on bytes.
        transport: Another way to send requests than the network.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout_seconds: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._timeout_seconds = timeout_seconds
        try:
            self._http = httpx.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {api_key.strip()}"} if api_key else {},
                timeout=timeout_seconds,
                transport=transport,
                # A proxy from the environment cannot reach this machine's loopback.
                trust_env=httpx.URL(self.url).host not in LOOPBACK,
            )
        except httpx.InvalidURL as error:
            raise TuneproofError(None, "unreachable", f"{url!r} is not a URL: {error}") from error

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def ready(self) -> dict[str, Any]:
        """What `/readyz` says; raises while the server cannot do its work."""
        return cast(dict[str, Any], self._json("GET", "/readyz"))

    def submit(self, path: str | PathLike[str], spec: Mapping[str, Any] | None = None, **form: Any) -> Job:
        """Start a job on a CSV or TSV file, with one call that uploads and submits.

        Args:
            path: The file; it is streamed, not read into memory.
            spec: The job's spec; empty means an experiment with every default.
            form: Fields about the file, such as `text_column`, `has_header` or `rare_labels`; None is left out.
        """
        return cast(Job, self._send_file("/jobs", path, {"spec": json.dumps(spec or {}), **form}))

    def upload(self, path: str | PathLike[str], **form: Any) -> dict[str, Any]:
        """Send a file alone, with the form fields of `submit`; gives the dataset, whose `id` a spec can name."""
        return cast(dict[str, Any], self._send_file("/datasets", path, form))

    def preflight(self, dataset_id: str, *, deadline_seconds: float = 120.0, **asked: Any) -> dict[str, Any]:
        """What a job on the dataset would meet, and about how long it would take, before any compute.

        Args:
            dataset_id: A labelled dataset.
            deadline_seconds: How long a server that is at another one is asked again.
            asked: Values of the job: `base_model`, `max_length`, `seed`, `train`, `validation`, `test`.
        """
        path, options = f"/datasets/{_quoted(dataset_id)}/preflight", {"params": asked, "timeout": self._slow}
        return cast(dict[str, Any], self._json_until(deadline_seconds, "GET", path, **options))

    def job(self, job_id: str) -> Job:
        return cast(Job, self._json("GET", f"/jobs/{_quoted(job_id)}"))

    def wait(self, job_id: str, timeout_seconds: float = 30.0) -> Job:
        """The job as soon as its status or stage changes, at the latest after `timeout_seconds` (0-60)."""
        path, options = f"/jobs/{_quoted(job_id)}/wait", {"timeout_seconds": timeout_seconds}
        return cast(Job, self._json("GET", path, params=options, timeout=self._timeout_seconds + timeout_seconds))

    def watch(self, job_id: str, every_seconds: float = 1.0) -> Iterator[Job]:
        """The job now, at each change of status or stage, and at least `every_seconds`; the last one is terminal."""
        job = self.job(job_id)
        yield job
        while not job["terminal"]:
            job = self.wait(job_id, every_seconds)
            yield job

    def cancel(self, job_id: str) -> Job:
        """Ask for the job to be cancelled; refused (409) where it has already ended."""
        return cast(Job, self._json("POST", f"/jobs/{_quoted(job_id)}/cancel"))

    def events(self, job_id: str) -> Iterator[Event]:
        """What happened in the job, oldest first."""
        return cast(Iterator[Event], self._pages(f"/jobs/{_quoted(job_id)}/events"))

    def models(self) -> Iterator[Model]:
        """Every published model, newest first."""
        return cast(Iterator[Model], self._pages("/models"))

    def predict(
        self,
        model: str,
        texts: Sequence[str],
        *,
        top_k: int = 3,
        min_confidence: float = 0.0,
        target_precision: float | None = None,
        deadline_seconds: float = 120.0,
    ) -> Answer:
        """Label texts with one published model, named by id or alias; answers stand in the order asked.

        With `target_precision`, the server picks the `min_confidence` that reached it on the validation rows; the
        answer's `threshold` says which, on how many rows, and whether any did.

        A server that is busy or still loads the model's base is asked again when it says so, until the
        deadline would be passed.
        """
        body = {"model": model, "texts": list(texts), "top_k": top_k}
        if target_precision is None or min_confidence:  # both are the server's to refuse
            body["min_confidence"] = min_confidence
        if target_precision is not None:
            body["target_precision"] = target_precision
        return cast(Answer, self._json_until(deadline_seconds, "POST", "/predict", json=body))

    def download(self, job_id: str, name: str, to: str | PathLike[str]) -> Path:
        """Stream one artifact, such as `metrics.json`, into the file `to`, which appears only when it is whole."""
        target = Path(to)
        partial = target.with_name(f"{target.name}.part")
        with (
            self._reaching(),
            self._http.stream("GET", f"/jobs/{_quoted(job_id)}/artifacts/{quote(name)}") as response,
        ):
            if not response.is_success:
                response.read()
                _refuse(response)
            with partial.open("wb") as file:
                for chunk in response.iter_bytes():
                    file.write(chunk)
        return partial.replace(target)

    @property
    def _slow(self) -> httpx.Timeout:
        """For calls in which the server reads a whole file before it answers."""
        return httpx.Timeout(self._timeout_seconds, read=max(600.0, self._timeout_seconds))

    def _send_file(self, to: str, path: str | PathLike[str], form: Mapping[str, Any]) -> Any:
        fields = {name: value for name, value in form.items() if value is not None}
        with Path(path).open("rb") as file:
            files = {"file": (Path(path).name, file, "text/csv")}
            return self._json("POST", to, data=fields, files=files, timeout=self._slow)

    def _json_until(self, deadline_seconds: float, method: str, path: str, **options: Any) -> Any:
        """The answer, asked for again as often as the server says to and the deadline allows."""
        give_up_at = time.monotonic() + deadline_seconds
        while True:
            try:
                return self._json(method, path, **options)
            except TuneproofError as error:
                # A base that this machine cannot hold will not fit later either; nor will a file that broke the memory.
                final = error.code in ("base_not_served", "out_of_memory")
                wait_seconds = None if final else error.retry_after_seconds
                if wait_seconds is None or time.monotonic() + wait_seconds > give_up_at:
                    raise
                time.sleep(wait_seconds)

    def _json(self, method: str, path: str, **options: Any) -> Any:
        with self._reaching():
            response = self._http.request(method, path, **options)
        if not response.is_success:
            _refuse(response)
        try:
            return response.json()
        except ValueError as error:
            detail = f"What answers at {self.url} is not a tuneproof server; check the URL."
            raise TuneproofError(None, "unreachable", detail) from error

    def _pages(self, path: str) -> Iterator[Any]:
        page: dict[str, Any] = {"has_more": True, "data": []}
        while page["has_more"]:
            after = {"after": page["data"][-1]["id"]} if page["data"] else {}
            page = self._json("GET", path, params={"limit": 200, **after})
            yield from page["data"]

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            detail = (
                f"No server answers at {self.url}; `tuneproof up` starts one, --url or TUNEPROOF_URL names another."
            )
            raise TuneproofError(None, "unreachable", detail) from error
        except httpx.TransportError as error:
            detail = f"The connection to {self.url} failed: {error or type(error).__name__}."
            raise TuneproofError(None, "unreachable", detail) from error


def _quoted(identifier: str) -> str:
    return quote(identifier, safe="")


def _refuse(response: httpx.Response) -> NoReturn:
    """Raise what the problem+json says; of an answer that is none (a proxy's page, say), the status."""
    try:
        problem = response.json()
    except ValueError:
        problem = {}
    problem = problem if isinstance(problem, dict) else {}
    retry_after = response.headers.get("Retry-After", "")
    raise TuneproofError(
        response.status_code,
        problem.get("code") or "unknown",
        problem.get("detail") or f"The server answered {response.status_code} {response.reason_phrase}.",
        hint=problem.get("hint"),
        errors=problem.get("errors") or (),
        retry_after_seconds=float(retry_after) if retry_after.isdecimal() else None,
    )
