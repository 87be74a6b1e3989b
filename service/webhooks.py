"""Tells whoever asked for it that a job has ended, signed by Standard Webhooks. An optional room: jobs know only the
outbox (`service/db/outbox.py`), where the news waits until it was taken or is given up.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx
from standardwebhooks import Webhook
from starlette.concurrency import run_in_threadpool

from service.core import logs
from service.core.clock import Clock
from service.core.errors import InvalidInput
from service.core.settings import Settings
from service.core.webhooks import host_of, refuse_webhook
from service.db import jobs, outbox
from service.db.engine import Database, is_away
from service.db.models import Delivery, Job

MAX_ATTEMPTS = 10
_FIRST_RETRY_SECONDS = 10.0  # tripled each time: 10 attempts take some 27 hours
_CALL_SECONDS = 10.0
_SECONDS_BETWEEN_ROUNDS = 2.0
_GONE = 410  # "do not call again"
log = logging.getLogger("tuneproof.webhooks")


@dataclass(frozen=True)
class Outcome:
    """How an attempt went.

    Args:
        words: For the job's events.
        status: Of the answer, if there was one.
        final: Whether another attempt is out of the question.
    """

    words: str
    status: int | None = None
    final: bool = False

    @property
    def delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


def retry_after(attempt: int, jitter: float) -> timedelta | None:
    """From the failed `attempt`, counted from 1, to the next; None after the last. `jitter` is a factor about 1."""
    if attempt >= MAX_ATTEMPTS:
        return None
    return timedelta(seconds=_FIRST_RETRY_SECONDS * 3 ** (attempt - 1) * jitter)


def new_client() -> httpx.AsyncClient:
    """Follows no redirect, and keeps no cookie: one receiver's must not reach another."""
    jar = CookieJar(DefaultCookiePolicy(allowed_domains=()))
    return httpx.AsyncClient(cookies=jar, follow_redirects=False, timeout=_CALL_SECONDS)


class Webhooks:
    """Makes the calls that are due. Any number of processes may do so: each call is leased to one of them."""

    def __init__(
        self, db: Database, settings: Settings, clock: Clock,
        jitter: Callable[[], float] = lambda: random.uniform(0.8, 1.2),
    ) -> None:  # fmt: skip
        self._db, self._settings, self._clock, self._jitter = db, settings, clock, jitter

    async def run(self) -> None:
        """Until this task is cancelled; a call under way is then made again by the next process, under its old id."""
        async with new_client() as client:
            while True:
                try:
                    await self.round(client)
                except Exception as error:  # noqa: BLE001 -- it is to go on, and the log says where
                    logs.failed(log, "webhooks cannot be sent now; it is tried again", error, away=is_away(error))
                await asyncio.sleep(_SECONDS_BETWEEN_ROUNDS)

    async def round(self, client: httpx.AsyncClient) -> None:
        """Makes every call that is due, side by side."""
        due = await run_in_threadpool(outbox.take_due, self._db, self._clock())
        outcomes = await asyncio.gather(*(self._deliver(client, one) for one in due), return_exceptions=True)
        for delivery, broke in zip(due, outcomes, strict=True):
            if isinstance(broke, Exception):  # one that cannot be told must not keep the others from being told
                log.error("webhook %s cannot be sent now; it is tried again\n%s", delivery.id, logs.where(broke))

    async def _deliver(self, client: httpx.AsyncClient, delivery: Delivery) -> None:
        outcome = await self._call(client, delivery)
        await run_in_threadpool(self._settle, delivery, outcome)

    async def _call(self, client: httpx.AsyncClient, delivery: Delivery) -> Outcome:
        secret = self._settings.webhook_secret
        try:
            refuse_webhook(delivery.url, self._settings.webhook_origins)
        except InvalidInput:
            return Outcome("its host is no longer in TUNEPROOF_WEBHOOK_HOSTS", final=True)
        assert secret is not None  # the settings have none without hosts
        now = self._clock()
        headers = {
            "content-type": "application/json", "user-agent": "tuneproof", "webhook-id": delivery.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Webhook(secret.get_secret_value()).sign(delivery.id, now, delivery.body),
        }  # fmt: skip
        try:
            # The answer's body is nobody's business; it is not read, however long it is.
            async with (
                asyncio.timeout(_CALL_SECONDS),
                client.stream("POST", delivery.url, content=delivery.body, headers=headers) as answer,
            ):
                status = answer.status_code
        except (httpx.HTTPError, ValueError, TimeoutError, OSError) as error:
            return Outcome(f"no answer ({type(error).__name__})")
        return Outcome(f"answered {status}", status, final=status == _GONE)

    def _settle(self, delivery: Delivery, outcome: Outcome) -> None:
        now, attempt, host = self._clock(), delivery.attempt, host_of(delivery.url)
        wait = None if outcome.final or outcome.delivered else retry_after(attempt, self._jitter())
        level: jobs.Level = "info" if outcome.delivered else "error" if wait is None else "warning"
        if outcome.delivered:
            message = f"webhook delivered to {host} at attempt {attempt}"
        elif wait is None:
            message = f"webhook to {host} given up after attempt {attempt}: {outcome.words}"
        else:
            message = f"webhook to {host}, attempt {attempt}: {outcome.words}; again in {wait.total_seconds():.0f} s"
        data = {"webhook_id": delivery.id, "attempt": attempt, "status": outcome.status}
        with self._db.write() as session:
            # The job first: whoever deletes it locks it, and then what hangs on it.
            if session.get(Job, delivery.job_id, with_for_update={"read": True}) is None:
                return
            # Not ours any more where the lease ran out, or the job was deleted: then there is nothing to say either.
            if outbox.settle(session, delivery, None if wait is None else now + wait):
                jobs.add_event(session, delivery.job_id, "message", message, now, level=level, data=data)
