"""The adapters an engine process holds: read in the background, the least recently used out by bytes."""

import logging
import os
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from service.core.errors import EngineUnavailable, InvalidData
from service.inference.wire import Figures, ServedModel
from service.ml.adapter import READ, Adapter, load_adapter
from service.ml.backbone import Backbone
from service.ml.engine import Engine
from service.storage import Storage

# Reading waits for disk or network, checking hashes takes a core: neither is to take the engine's.
_LOADERS = 2
# Whoever waits for the calls before it has been told by then that it took too long.
_SECONDS_FOR_ROOM = 60.0
log = logging.getLogger("tuneproof.engine")


@dataclass(eq=False)
class _Held:
    """An adapter that is there or on its way; `size_bytes` is 0 until it is there."""

    engine: weakref.ref[Engine]  # an adapter must not keep an evicted base alive
    adapter: Future[Adapter]
    size_bytes: int = 0


class Adapters:
    """One cache over the storage. Calls that wait for the same adapter share one load.

    One that is evicted lives on in the calls that are being answered with it, and counts until they are: while what
    was read and is in use takes more than the limit, nothing more is read. Beyond it are at most what the loaders have
    in hand, and a single adapter that is larger.
    """

    def __init__(self, storage: Storage, limit_bytes: int, figures: Figures) -> None:
        self._storage, self._limit_bytes, self._figures = storage, limit_bytes, figures
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._alive_bytes = 0
        self._lock = threading.RLock()  # whoever holds it may let go of the last of an adapter
        self._fewer = threading.Condition(self._lock)
        self._loaders = ThreadPoolExecutor(_LOADERS, "adapter", _beside_the_engine)

    def get(self, model: ServedModel, engine: Engine) -> Future[Adapter]:
        """The model's adapter for the base that `engine` has; InvalidData where its files are not the published ones.

        It has yet to be attached.
        """
        with self._lock:
            held = self._held.get(model.id)
            if held is not None and held.engine() is engine:
                self._held.move_to_end(model.id)
                self._count(hit=held.adapter.done())
                return held.adapter
            self._count(hit=False)
            if held is not None:  # its base was evicted and loaded again
                self._figures.adapter_bytes -= held.size_bytes
            reading = self._loaders.submit(self._read, model, engine.backbone)
            self._held[model.id] = _Held(weakref.ref(engine), reading)
            self._held.move_to_end(model.id)
        reading.add_done_callback(partial(self._settle, model.id))
        return reading

    def _count(self, *, hit: bool) -> None:
        self._figures.adapter_hits += hit
        self._figures.adapter_misses += not hit

    def _settle(self, model_id: str, reading: Future[Adapter]) -> None:
        """Makes room for one that is there, and forgets one that could not be had."""
        with self._lock:
            held = self._held.get(model_id)
            if held is None or held.adapter is not reading:
                return
            if reading.exception() is not None:
                del self._held[model_id]
                return
            held.adapter = Future()  # in place of one that keeps the calls which waited for it, and their texts
            held.adapter.set_result(reading.result())
            held.size_bytes = reading.result().size_bytes
            self._figures.adapter_bytes += held.size_bytes
            self._make_room(model_id)
            self._fewer.notify_all()

    def _make_room(self, keep: str) -> bool:
        """Evicts the least recently used until the rest fits, `keep` and those on their way aside.

        Gives whether those in use, evicted or not, leave room for another.
        """
        while self._figures.adapter_bytes > self._limit_bytes:
            oldest = next((name for name, held in self._held.items() if held.size_bytes and name != keep), None)
            if oldest is None:
                break
            self._figures.adapter_bytes -= self._held.pop(oldest).size_bytes
            self._figures.adapter_evictions += 1
        return self._alive_bytes <= self._limit_bytes

    def _read(self, model: ServedModel, backbone: Backbone) -> Adapter:
        with self._fewer:
            # Made each time: what was on its way may have come since, and be in nobody's use.
            self._fewer.wait_for(lambda: self._make_room(model.id), _SECONDS_FOR_ROOM)
        adapter = self._load(model, backbone)
        size_bytes = adapter.size_bytes
        with self._lock:
            self._alive_bytes += size_bytes
        weakref.finalize(adapter, self._used_up, size_bytes).atexit = False
        return adapter

    def _used_up(self, size_bytes: int) -> None:
        with self._fewer:
            self._alive_bytes -= size_bytes
            self._fewer.notify_all()

    def _load(self, model: ServedModel, backbone: Backbone) -> Adapter:
        dtype = next(backbone.model.parameters()).dtype
        try:
            with self._storage.folder(model.storage_prefix, READ.intersection(model.files)) as folder:
                return load_adapter(folder, head_name=backbone.head_name, device=backbone.device, dtype=dtype)
        except FileNotFoundError:
            raise InvalidData("A file of the saved model is missing.") from None
        except OSError as error:
            log.warning("a model cannot be read: %s", type(error).__name__)
            raise EngineUnavailable("The model's files cannot be read at the moment. Ask again later.") from error


def _beside_the_engine() -> None:
    """For a loader's thread: one core, and that when the engine leaves it.

    With a team of two of its own there would be more OpenMP threads than cores, and those of the engine would no longer
    spin while they wait for the next product: a fifth of its speed on small batches. And while a loader has the core of
    one of them, the others wait too.
    """
    torch.set_num_threads(1)
    if hasattr(os, "sched_setscheduler"):  # on Linux a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
