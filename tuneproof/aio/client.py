"""The client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import httpx

from tuneproof.aio.datasets import AsyncDatasets
from tuneproof.aio.jobs import AsyncJobs
from tuneproof.aio.models import AsyncAliases, AsyncModels
from tuneproof.aio.transport import AsyncTransport
from tuneproof.results import Answer, Prediction, Readiness
from tuneproof.tables import prediction_frame, texts_of, with_text

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_URL = "http://127.0.0.1:8000"


class AsyncClient:
    """Talks to one tuneproof server. Close it, or use it as a context manager.

    Every call raises `TuneproofError` where the server refuses, fails or cannot be reached. A lost connection, a busy
    server (429, 503 with `Retry-After`) and a gateway's 502 or 504 are tried again before; what creates something
    carries an idempotency key, so that it is not created twice.

    Args:
        url: Where the server answers; may end in a path, behind a proxy.
        api_key: Not needed while the server has no keys.
        timeout_seconds: For connecting, and for each wait on bytes.
        retry_seconds: How long after its first failure a call is tried again; 0 for never.
        transport: Another way to send requests than the network.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout_seconds: float = 30.0,
        retry_seconds: float = 120.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._transport = AsyncTransport(url, api_key, timeout_seconds, retry_seconds, transport)
        self.datasets = AsyncDatasets(self._transport)
        self.jobs = AsyncJobs(self._transport)
        self.models = AsyncModels(self._transport)
        self.aliases = AsyncAliases(self._transport)

    @property
    def url(self) -> str:
        return self._transport.url

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._transport.http.aclose()

    async def ready(self, *, wait_seconds: float = 0.0) -> Readiness:
        """What `/readyz` says; raises where the server cannot do its work, and still cannot after `wait_seconds`."""
        return await self._transport.get(Readiness, "/readyz", retry_seconds=wait_seconds)

    async def predict(
        self,
        model: str,
        texts: str | Sequence[str],
        *,
        top_k: int = 3,
        min_confidence: float = 0.0,
        target_precision: float | None = None,
    ) -> Answer:
        """Label texts with one published model; answers stand in the order asked.

        Args:
            model: Its id, or an alias.
            texts: Up to 1,024, or one.
            top_k: How many probabilities each prediction shows.
            min_confidence: Below it the label is left open.
            target_precision: The server picks the `min_confidence` that reached it on the validation rows; the
                answer's `threshold` says which, on how many rows, and whether any did.
        """
        body: dict[str, Any] = {"model": model, "texts": [texts] if isinstance(texts, str) else list(texts)}
        body["top_k"] = top_k
        if target_precision is None or min_confidence:  # both are the server's to refuse
            body["min_confidence"] = min_confidence
        if target_precision is not None:
            body["target_precision"] = target_precision
        return self._transport.parsed(Answer, await self._transport.send("POST", "/predict", json=body))

    async def predict_frame(
        self,
        model: str,
        table: pd.DataFrame | pd.Series[Any],
        text_column: Any = None,
        *,
        min_confidence: float = 0.0,
        target_precision: float | None = None,
        batch_size: int = 128,
    ) -> pd.DataFrame:
        """Label a column of texts, all with the version that an alias points to at the start.

        Args:
            model: Its id, or an alias.
            table: A frame, or the Series of texts itself.
            text_column: The frame's column of texts.
            min_confidence: As for `predict`.
            target_precision: As for `predict`.
            batch_size: Texts a call.

        Returns:
            `label` and `confidence` on the table's index; missing where the text is missing or empty, and the label
            also where the confidence is too low.
        """
        texts = texts_of(table, text_column)
        predictions: dict[int, Prediction] = {}
        waiting = with_text(texts)
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start : start + batch_size]
            answer = await self.predict(
                model, [text for _, text in batch], top_k=1, min_confidence=min_confidence,
                target_precision=target_precision,
            )  # fmt: skip
            model = answer.model_id
            predictions.update(zip((i for i, _ in batch), answer.predictions, strict=True))
        return prediction_frame(texts, predictions)
