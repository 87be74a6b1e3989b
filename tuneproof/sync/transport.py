# Made by tools/make_sync.py from tuneproof/aio; change it there.
"""Requests to one server, sent again where that is of use."""

import time
import uuid
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import httpx_sse

from tuneproof.errors import TuneproofError, refusal
from tuneproof.results import Result, parse
from tuneproof.retries import Attempts

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
PAGE = 200
R = TypeVar("R", bound=Result)


class Transport:
    """The arguments are the client's."""

    def __init__(
        self,
        url: str,
        api_key: str | None,
        timeout_seconds: float,
        retry_seconds: float,
        transport: httpx.BaseTransport | None,
    ) -> None:
        self.url = url.rstrip("/")
        self._timeout_seconds, self._retry_seconds = timeout_seconds, retry_seconds
        self._answered = False
        try:
            self.http = httpx.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {api_key.strip()}"} if api_key else {},
                timeout=timeout_seconds,
                transport=transport,
                # A proxy from the environment cannot reach this machine's loopback.
                trust_env=httpx.URL(self.url).host not in LOOPBACK,
            )
        except httpx.InvalidURL as error:
            raise TuneproofError(None, "unreachable", f"{url!r} is not a URL: {error}") from error
        except UnicodeEncodeError as error:
            raise TuneproofError(None, "unreachable", "An API key holds ASCII characters alone.") from error

    def get(self, kind: type[R], path: str, **options: Any) -> R:
        return self.parsed(kind, self.send("GET", path, **options))

    def send(
        self,
        method: str,
        path: str,
        *,
        creates: str | bool = False,
        done: int | None = None,
        wait_seconds: float = 0.0,
        retry_seconds: float | None = None,
        **options: Any,
    ) -> httpx.Response:
        """The answer of a call that succeeded, or `done`.

        Args:
            method: Of HTTP.
            path: Under the server's URL.
            creates: Something new, which a repeated request must not create twice: True, or an idempotency key.
            done: The status by which a repeated request learns that an earlier one, whose answer was lost, was heard.
            wait_seconds: How long the server may think before it answers, beyond the time-out of a plain call.
            retry_seconds: In place of the client's own; then also where nothing has ever answered, and to the end.
            options: As `httpx` takes them.
        """
        if creates:
            options["headers"] = {"Idempotency-Key": creates if isinstance(creates, str) else str(uuid.uuid4())}
        timeout = httpx.Timeout(self._timeout_seconds, read=self._timeout_seconds + wait_seconds)
        attempts = self.attempts() if retry_seconds is None else Attempts(self.url, retry_seconds, met=True)
        while True:
            try:
                response = self.http.request(method, path, timeout=timeout, **options)
                self._answered = True
                if response.is_success or (attempts.maybe_heard and response.status_code == done):
                    return response
                raise refusal(response)
            except (httpx.RequestError, TuneproofError) as error:
                pause_seconds = attempts.pause(error, to_the_end=retry_seconds is not None)
            time.sleep(pause_seconds)

    def pages(self, kind: type[R], path: str, limit: int | None, asked: Mapping[str, Any] | None = None) -> Iterator[R]:
        """Every entry of a list, or the first `limit`; what is asked for as None is not."""
        left, more = PAGE if limit is None else limit, True
        params = {name: value for name, value in (asked or {}).items() if value is not None}
        while more and left > 0:
            response = self.send("GET", path, params={**params, "limit": min(left, PAGE)})
            entries, more = self.page(kind, response)
            yield from entries
            left -= 0 if limit is None else len(entries)
            params["after"] = entries[-1].raw["id"] if more else None

    def download(self, path: str, to: str | PathLike[str]) -> Path:
        """Stream an answer's bytes into the file `to`, which appears only when it is whole."""
        target = Path(to)
        partial = target.with_name(f"{target.name}.part")
        attempts = self.attempts()
        try:
            while True:
                try:
                    with self.http.stream("GET", path) as response:
                        self._check(response)
                        with partial.open("wb") as file:
                            for chunk in response.iter_bytes():
                                file.write(chunk)
                    return partial.replace(target)
                except (httpx.RequestError, TuneproofError) as error:
                    pause_seconds = attempts.pause(error)
                time.sleep(pause_seconds)
        finally:
            partial.unlink(missing_ok=True)

    def events(self, kind: type[R], path: str, read_seconds: float = 60.0) -> Iterator[R]:
        """Server-sent events, from the first to the last; where the connection breaks, from the last one seen on."""
        attempts = self.attempts()
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        timeout = httpx.Timeout(self._timeout_seconds, read=read_seconds)
        while True:
            pause_seconds = 0.2  # it ended in order: the job has, which the next answer says, or the server goes down
            try:
                with self.http.stream("GET", path, headers=headers, timeout=timeout) as response:
                    self._check(response)
                    if response.status_code == 204:  # the job has ended, and all of it was seen
                        return
                    for sent in httpx_sse.EventSource(response).iter_sse():
                        if sent.id:
                            headers["Last-Event-ID"] = sent.id
                        if sent.data:
                            attempts = self.attempts()
                            yield self._as(kind, sent.json())
            except (httpx_sse.SSEError, ValueError) as error:
                raise self.unexpected("no stream of events") from error
            except (httpx.RequestError, TuneproofError) as error:
                pause_seconds = attempts.pause(error)
            time.sleep(pause_seconds)

    def attempts(self) -> Attempts:
        return Attempts(self.url, self._retry_seconds, met=self._answered)

    def json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise self.unexpected("no JSON") from error

    def parsed(self, kind: type[R], response: httpx.Response) -> R:
        return self._as(kind, self.json(response))

    def page(self, kind: type[R], response: httpx.Response) -> tuple[list[R], bool]:
        """The entries, and whether there are more."""
        page = self.json(response)
        try:
            return [self._as(kind, entry) for entry in page["data"]], page["has_more"] and bool(page["data"])
        except (TypeError, LookupError) as error:
            raise self.unexpected(f"a list without {error}") from error

    def _as(self, kind: type[R], data: Any) -> R:
        try:
            return parse(kind, data)
        except (ValueError, TypeError, AttributeError) as error:
            raise self.unexpected(str(error)) from error

    def unexpected(self, found: str) -> TuneproofError:
        detail = f"What answers at {self.url} is not a tuneproof server of this version ({found}); check the URL."
        return TuneproofError(None, "unexpected_answer", detail)

    def _check(self, response: httpx.Response) -> None:
        """Of a streamed answer. Raises TuneproofError where it is no success."""
        self._answered = True
        if not response.is_success:
            response.read()
            raise refusal(response)


def at(*parts: str | int) -> str:
    """A path of these parts; an id cannot lead to another one."""
    return "".join(f"/{quote(str(part), safe='')}" for part in parts)
