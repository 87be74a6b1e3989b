"""When a call is worth repeating, and how long to wait before. Sends nothing and sleeps nowhere."""

import logging
import random
import ssl
import time
from collections.abc import Callable, Iterator

import httpx

from tuneproof.errors import TuneproofError

# Where nothing ever answered, the address is wrong or the server not started far more often than it is restarting.
FIRST_CONTACT_SECONDS = 1.5
# A base that this machine cannot hold will not fit later either; nor will a file that broke the memory.
FINAL = frozenset({"base_not_served", "out_of_memory"})
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 8.0


class Attempts:
    """The attempts of one call. Every call of this client may be repeated: what creates carries an idempotency key.

    Args:
        url: Of the server, for messages.
        seconds: How long after the first failure a call is tried again.
        met: Whether the server has ever answered.
        clock: Seconds, monotonic.
    """

    def __init__(self, url: str, seconds: float, *, met: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._url, self._seconds, self._met, self._clock = url, seconds, met, clock
        self._failures = 0
        self._heard = self._ending = False
        self._first_failure: float | None = None

    @property
    def maybe_heard(self) -> bool:
        """Whether an earlier attempt may have done its work, though its answer was lost."""
        return self._heard

    def pause(self, error: httpx.RequestError | TuneproofError, *, to_the_end: bool = False) -> float:
        """Seconds to wait before the next attempt, never fewer than the server asked for.

        `to_the_end` makes one exception: the last attempt is at the end of the time.

        Raises:
            TuneproofError: another attempt is of no use, or the time is over.
        """
        problem = error if isinstance(error, TuneproofError) else _unreachable(error, self._url)
        now = self._clock()
        self._first_failure = now if self._first_failure is None else self._first_failure
        asked = problem.retry_after_seconds
        backoff = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2**self._failures)
        # Jitter: many clients that lost one server shall not come back in step.
        wait = random.uniform(0.5, 1.0) * backoff if asked is None else asked * random.uniform(1.0, 1.1)
        self._failures += 1
        reached = not isinstance(
            error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | httpx.ProxyError
        )
        self._met = self._met or reached
        self._heard = self._heard or (reached and problem.status in (None, 502, 504))
        give_up_at = self._first_failure + (self._seconds if self._met else min(self._seconds, FIRST_CONTACT_SECONDS))
        late = now + wait > give_up_at
        if late and to_the_end and not self._ending and now < give_up_at:
            wait, late, self._ending = give_up_at - now, False, True
        if late or not _may_pass(error, problem):
            raise problem from (None if problem is error else error)
        if self._failures == 1 and self._met and asked is None and not to_the_end:
            logging.getLogger(__name__).warning("No answer from %s; asking for %g s.", self._url, self._seconds)
        if asked is not None and asked >= _LONGEST_PAUSE_SECONDS:
            logging.getLogger(__name__).warning("%s (Asking again in %g s.)", problem.detail, round(wait))
        return wait


def passing(problem: TuneproofError) -> bool:
    """Whether what a call ended with may go away by itself."""
    return _may_pass(problem.__cause__ or problem, problem)


def _may_pass(error: BaseException, problem: TuneproofError) -> bool:
    if isinstance(error, httpx.TransportError):
        lasting = isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError)
        return not (lasting or any(isinstance(cause, ssl.SSLError) for cause in _causes(error)))
    if problem.status in (429, 503) and problem.retry_after_seconds is not None:
        return problem.code not in FINAL
    # A proxy says these while the server behind it restarts, and seldom for how long.
    return problem.status in (502, 504) or (problem.status == 503 and problem.code == "unknown")


def _unreachable(error: httpx.RequestError, url: str) -> TuneproofError:
    if any(isinstance(cause, ssl.SSLError) for cause in _causes(error)):
        detail = (
            f"No secure connection to {url}: {error}. Check whether it is https, and that its certificate is one this "
            "machine trusts (SSL_CERT_FILE names a file with your own authority's)."
        )
    elif isinstance(error, httpx.UnsupportedProtocol):
        detail = f"{url!r} is not a URL: it begins neither with http:// nor with https://."
    elif isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        detail = f"No server answers at {url}; `tuneproof up` starts one, --url or TUNEPROOF_URL names another."
    else:
        detail = f"The connection to {url} failed: {error or type(error).__name__}."
    return TuneproofError(None, "unreachable", detail)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
