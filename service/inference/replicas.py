"""Predictions on Ray Serve: replicas, each with an engine process of its own, and who asks them.

`app` is what Serve deploys. Beside an API, where an engine would run, `python -P -m service.inference.replicas
SETTINGS_JSON` hands its calls on to the replicas and speaks as an engine does (`wire`). It is a process of its own
because Ray ends the one that has joined a cluster whose head stays away for a minute: the API lives on, and starts
another.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from typing import IO, Any, NoReturn

import ray
from ray import serve
from ray.exceptions import ActorDiedError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from service.core import logs
from service.core.errors import AppError, BaseLoading, EngineFailed, EngineUnavailable, QueueFull
from service.core.settings import read_settings, settings_in_use
from service.inference import wire
from service.inference.handle import EngineHandle
from service.inference.wire import Figures, ServedModel

APP = "tuneproof"
# Two full batches of calls with one text each: while one is scored, the next is made ready. A model that is asked for
# more often than that at once is loaded by a second replica.
_CALLS_A_REPLICA, _CALLS_WAITING = 512, 1024
_ARGUMENTS = {"replicas": "serve_replicas", "cpus": "ray_cpus", "gpus": "ray_gpus"}
_MODELS_KNOWN = 1000  # that Serve keeps of a replica; what is in memory is the engine's to say
_SECONDS_TO_START, _SECONDS_OF_PATIENCE = 180.0, 10.0
_SECONDS_BETWEEN_LOOKS, _SECONDS_TO_REACH = 1.0, 2.0
log = logging.getLogger("tuneproof.engine")


async def _known(model_id: str) -> str:
    return model_id


class Replica:
    """One engine, on whichever node has room. It is there once its engine is."""

    async def __init__(self, cpus: float) -> None:  # type: ignore[misc] # Serve awaits it
        settings = settings_in_use(engine="local")
        logs.configure(settings.log_level, settings.log_format)
        threads = settings.serve_threads or max(1, int(cpus))
        self._engine = EngineHandle(settings.model_copy(update={"serve_threads": threads}))
        self._running = asyncio.create_task(self._engine.run())
        # What Serve goes by when it looks for the replica that has a model.
        self._know = serve.multiplexed(_known, max_num_models_per_replica=_MODELS_KNOWN)
        self._id = serve.get_replica_context().replica_tag
        async with asyncio.timeout(_SECONDS_TO_START):
            while self._engine.figures is None:  # noqa: ASYNC110 -- a handle has no event for it
                await asyncio.sleep(0.1)

    def check_health(self) -> None:
        """Serve asks every few seconds; a replica that fails three times is replaced."""
        if self._running.done() or self._engine.figures is None:
            raise RuntimeError("the engine process is not there")

    async def predict(
        self, model: dict[str, Any], texts: list[str], seconds: float, request_id: str | None
    ) -> dict[str, Any]:
        """The engine's answer as it came, or an error as it would tell it: what Ray pickles is plain data.

        A replica that is new has its bases to load, which others have long done, and one whose engine was lost has to
        start it first: a call waits a little for that.
        """
        end = time.monotonic() + seconds
        patience = min(end, time.monotonic() + _SECONDS_OF_PATIENCE)
        with logs.bound(request_id=request_id):
            try:
                await self._know(model["id"])
                while self._engine.figures is None and time.monotonic() < patience:  # noqa: ASYNC110 -- as above
                    await asyncio.sleep(0.2)
                while True:
                    message = await self._engine.ask(ServedModel(**model), texts, end - time.monotonic())
                    loading = message.get("error", {}).get("code") == BaseLoading.code
                    if not loading or time.monotonic() > patience:
                        break
                    await asyncio.sleep(0.2)
            except AppError as error:
                message = wire.told(error)
            except Exception as error:  # noqa: BLE001 -- Serve would log its message, which may quote a text
                log.error("a prediction failed\n%s", logs.where(error))
                message = wire.told(EngineFailed("The engine failed on this call; its log says why."))
        return message | {"replica": self._id}


def app(arguments: dict[str, Any]) -> Any:
    """For `serve run service.inference.replicas:app replicas=4 gpus=1`, or `args` of the application in a file.

    Serve calls it on a node where a file is deployed: what is not given is what TUNEPROOF_* says there.
    """
    if unknown := sorted(arguments.keys() - _ARGUMENTS.keys()):
        raise RuntimeError(f"The application takes {', '.join(_ARGUMENTS)} in its args, not {', '.join(unknown)}.")
    settings = read_settings(**{_ARGUMENTS[name]: value for name, value in arguments.items()})
    deployment = serve.deployment(
        Replica, num_replicas=settings.serve_replicas, max_ongoing_requests=_CALLS_A_REPLICA,
        max_queued_requests=_CALLS_WAITING, health_check_period_s=5, health_check_timeout_s=10,
        ray_actor_options={"num_cpus": settings.ray_cpus, "num_gpus": settings.ray_gpus},
    )  # fmt: skip
    return deployment.bind(settings.ray_cpus)


class Relay:
    """Takes an API's calls as an engine would, and has a replica answer each."""

    def __init__(self, address: str, answers: IO[bytes]) -> None:
        self._address, self._answers = address, answers
        self._replicas: Any = None
        self._connected = False
        self._there = asyncio.Event()
        self._calls: dict[Any, asyncio.Task[None]] = {}
        self._figures = Figures(replicas=0, away=f"The Ray cluster {address} is being looked for. Ask again shortly.")

    async def run(self, requests: asyncio.StreamReader) -> None:
        """Until the API is gone."""
        watching = asyncio.create_task(self._watch())
        while (message := await wire.read_async(requests)) is not None and not watching.done():
            kind = message.pop("type")
            if kind == "drop":
                if message["number"] in self._calls:
                    self._calls[message["number"]].cancel()
                continue
            number = message.get("number", object())
            call = asyncio.create_task(self._warm(**message) if kind == "warm" else self._answer(**message))
            self._calls[number] = call
            call.add_done_callback(partial(self._forget, number))

    def _forget(self, number: Any, _call: asyncio.Task[None]) -> None:
        del self._calls[number]

    async def _warm(self, model: dict[str, Any]) -> None:
        """Has the replica that will be asked for a model load it; bases alone are each replica's own affair."""
        await self._there.wait()
        end = time.monotonic() + _SECONDS_TO_START
        while model["files"] and (error := (await self._asked(model, ["a"], end, None)).get("error")):
            if error["code"] not in (BaseLoading.code, EngineUnavailable.code) or time.monotonic() > end:
                log.warning("not warmed: %s", error["detail"])
                break
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
        self._figures.warmed += 1
        self._tell()

    async def _answer(
        self, number: int, model: dict[str, Any], texts: list[str], deadline: float, request_id: str | None
    ) -> None:
        with logs.bound(request_id=request_id):
            message = await self._asked(model, texts, deadline, request_id)
        self._send(message | {"number": number})

    async def _asked(
        self, model: dict[str, Any], texts: list[str], deadline: float, request_id: str | None
    ) -> dict[str, Any]:
        """A call that loses its replica, or its engine, is made once more: to score a text twice harms nobody."""
        message = wire.told(EngineUnavailable("The replica was lost, and the next one too. Ask again in a moment."))
        wanted = {"multiplexed_model_id": model["id"]}
        for _attempt in range(2):
            try:
                ask = self._replicas.options(method_name="predict", **wanted)
                response = ask.remote(model, texts, deadline - time.monotonic(), request_id)
                message = await response
            except BackPressureError:
                return wire.told(QueueFull("More calls wait for the replicas than they take on. Ask later."))
            except (RayError, RayServeException, asyncio.CancelledError) as error:
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    response.cancel()
                    raise
                log.warning("a call lost its replica: %s", type(error).__name__)
            except Exception as error:  # noqa: BLE001 -- whoever called waits for an answer; a message may quote a text
                log.error("a call failed on its way\n%s", logs.where(error))
                return wire.told(EngineFailed("The call failed on its way to a replica; the API's log says why."))
            else:
                if message.get("error", {}).get("code") != EngineUnavailable.code:
                    break
                wanted = {}  # whichever replica is least busy: that one has no engine, or no memory
        return message

    async def _watch(self) -> None:
        while True:
            before = replace(self._figures)
            self._figures.replicas, self._figures.away = await asyncio.to_thread(self._look)
            if self._figures != before:
                log.warning("%s", self._figures.away or f"{self._figures.replicas} replicas answer")
            if not self._figures.away:
                self._there.set()
            self._tell()
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)

    def _look(self) -> tuple[int, str]:
        """How many replicas run; and where none does, why, and what to do."""
        try:
            if not ray.is_initialized():
                self._join()
            status = serve.status().applications.get(APP)
            n = 0 if status is None else sum(d.replica_states.get("RUNNING", 0) for d in status.deployments.values())
            if not n:
                self._connected = False  # another Serve may start: what knows its replicas is made anew
                has = "no application 'tuneproof'" if status is None else f"no replica yet ({status.status.value})"
                todo = "`serve run --name tuneproof service.inference.replicas:app` starts it. Ask again then."
                return 0, f"Ray Serve has {has}: {todo}"
            if not self._connected:
                self._replicas, self._connected = serve.get_app_handle(APP), True
        except ActorDiedError:  # Serve was shut down, and its client knows no other: a new process finds the next one
            os._exit(os.EX_TEMPFAIL)
        except Exception as error:  # noqa: BLE001 -- Ray's, the network's: whichever it is, it is tried again
            if self._connected:  # without its head, the replicas that are known go on
                return self._figures.replicas or 0, ""
            todo = "Is its head running, and this machine a part of it (`ray start`)? See TUNEPROOF_RAY_ADDRESS."
            return 0, f"The Ray cluster {self._address} cannot be reached ({type(error).__name__}). {todo}"
        return n, ""

    def _join(self) -> None:
        host, separator, port = self._address.rpartition(":")
        if separator and "//" not in host:  # Ray itself would try for many minutes
            socket.create_connection((host, int(port)), _SECONDS_TO_REACH).close()
        ray.init(self._address, namespace=APP, log_to_driver=False, logging_level=logging.ERROR)

    def _tell(self) -> None:
        self._send({"figures": asdict(self._figures)})

    def _send(self, message: dict[str, Any]) -> None:
        self._answers.write(wire.pack(message, message.pop("raw", b"")))
        self._answers.flush()


async def _relay(address: str, answers: IO[bytes]) -> NoReturn:
    requests = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(requests)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    await Relay(address, answers).run(requests)
    os._exit(0)  # Ray, and a thread that waits for it, would take their time to say goodbye


def main(arguments: list[str]) -> None:
    """Runs until the API is gone; like an engine, it is not stopped with the API's group of processes."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    given = json.loads(arguments[0])
    logs.configure(given["log_level"], given["log_format"])
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not stand between the answers
    asyncio.run(_relay(given["ray_address"], answers))


if __name__ == "__main__":
    main(sys.argv[1:])
