# Made by tools/make_sync.py from tuneproof/aio; change it there.
"""`client.models` and `client.aliases`."""

from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from tuneproof.results import Alias, Gate, Model
from tuneproof.sync.transport import Transport, at

# The server may have to ask both models about the rows that they are compared on.
COMPARING_SECONDS = 600.0


class Models:
    """Published models."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self, *, limit: int | None = None) -> Iterator[Model]:
        """Every model, or the first `limit`, newest first."""
        return self._transport.pages(Model, "/models", limit)

    def get(self, model_id: str) -> Model:
        return self._transport.get(Model, at("models", model_id))

    def download(self, model_id: str, to: str | PathLike[str] | None = None) -> Path:
        """The model's folder as a zip, into the file `to`; without one, `<model_id>.zip` here."""
        return self._transport.download(at("models", model_id, "download"), to or f"{model_id}.zip")

    def delete(self, model_id: str) -> None:
        """Refused (409) while an alias points to it."""
        self._transport.send("DELETE", at("models", model_id), done=404)


class Aliases:
    """Names of yours that point to a model, now to this version and later to that."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> Iterator[Alias]:
        """Every alias, with where it pointed before."""
        return self._transport.pages(Alias, "/aliases", None)

    def put(self, alias: str, model_id: str, *, force: bool = False) -> Alias:
        """Point the alias to the model; every later call of `/predict` sees the new one.

        A model that is shown to be worse than the one it would replace is refused (409, `promotion_refused`), unless
        `force` is given.
        """
        body = {"model_id": model_id, **({"force": True} if force else {})}
        response = self._transport.send("PUT", at("aliases", alias), json=body, wait_seconds=COMPARING_SECONDS)
        return self._transport.parsed(Alias, response)

    def gate(self, alias: str, model_id: str) -> Gate | None:
        """How the model compares with the one that the alias points to, without moving it; None without another one."""
        response = self._transport.send(
            "GET", at("aliases", alias, "gate"), params={"model_id": model_id}, wait_seconds=COMPARING_SECONDS
        )
        return self._transport.parsed(Gate, response) if self._transport.json(response) else None

    def delete(self, alias: str) -> None:
        """The model stays."""
        self._transport.send("DELETE", at("aliases", alias), done=404)
