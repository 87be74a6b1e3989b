"""`client.models` and `client.aliases`."""

from collections.abc import AsyncIterator
from os import PathLike
from pathlib import Path

from tuneproof.aio.transport import AsyncTransport, at
from tuneproof.results import Alias, Gate, Model

# The server may have to ask both models about the rows that they are compared on.
COMPARING_SECONDS = 600.0


class AsyncModels:
    """Published models."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    def list(self, *, limit: int | None = None) -> AsyncIterator[Model]:
        """Every model, or the first `limit`, newest first."""
        return self._transport.pages(Model, "/models", limit)

    async def get(self, model_id: str) -> Model:
        return await self._transport.get(Model, at("models", model_id))

    async def download(self, model_id: str, to: str | PathLike[str] | None = None) -> Path:
        """The model's folder as a zip, into the file `to`; without one, `<model_id>.zip` here."""
        return await self._transport.download(at("models", model_id, "download"), to or f"{model_id}.zip")

    async def delete(self, model_id: str) -> None:
        """Refused (409) while an alias points to it."""
        await self._transport.send("DELETE", at("models", model_id), done=404)


class AsyncAliases:
    """Names of yours that point to a model, now to this version and later to that."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    def list(self) -> AsyncIterator[Alias]:
        """Every alias, with where it pointed before."""
        return self._transport.pages(Alias, "/aliases", None)

    async def put(self, alias: str, model_id: str, *, force: bool = False) -> Alias:
        """Point the alias to the model; every later call of `/predict` sees the new one.

        A model that is shown to be worse than the one it would replace is refused (409, `promotion_refused`), unless
        `force` is given.
        """
        body = {"model_id": model_id, **({"force": True} if force else {})}
        response = await self._transport.send("PUT", at("aliases", alias), json=body, wait_seconds=COMPARING_SECONDS)
        return self._transport.parsed(Alias, response)

    async def gate(self, alias: str, model_id: str) -> Gate | None:
        """How the model compares with the one that the alias points to, without moving it; None without another one."""
        response = await self._transport.send(
            "GET", at("aliases", alias, "gate"), params={"model_id": model_id}, wait_seconds=COMPARING_SECONDS
        )
        return self._transport.parsed(Gate, response) if self._transport.json(response) else None

    async def delete(self, alias: str) -> None:
        """The model stays."""
        await self._transport.send("DELETE", at("aliases", alias), done=404)
