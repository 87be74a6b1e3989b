"""The adapters an engine process holds: read in the background, the least recently used out by bytes."""

import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from service.core.errors import InvalidData
from service.inference.wire import Figures, ServedModel
from service.ml.adapter import Adapter, load_adapter
from service.ml.engine import Engine
from service.storage import Storage

# Reading waits for disk or network, checking hashes takes a core: neither is to take the engine's.
_LOADERS = 2


@dataclass(eq=False)
class _Held:
    """An adapter that is there or on its way; `size_bytes` is 0 until it is there."""

    engine: weakref.ref[Engine]  # an adapter must not keep an evicted base alive
    adapter: Future[Adapter]
    size_bytes: int = 0


class Adapters:
    """One cache over the storage. Calls that wait for the same adapter share one load.

    The bytes held stay within the limit, a single larger adapter aside. One that is evicted lives on in the calls that
    are being answered with it.
    """

    def __init__(self, storage: Storage, limit_bytes: int, figures: Figures) -> None:
        self._storage, self._limit_bytes, self._figures = storage, limit_bytes, figures
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._lock = threading.Lock()
        self._loaders = ThreadPoolExecutor(_LOADERS, "adapter")

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
            held = _Held(weakref.ref(engine), self._loaders.submit(self._read, model, engine))
            self._held[model.id] = held
            self._held.move_to_end(model.id)
        held.adapter.add_done_callback(partial(self._settle, model.id, held))
        return held.adapter

    def _count(self, *, hit: bool) -> None:
        self._figures.adapter_hits += hit
        self._figures.adapter_misses += not hit

    def _settle(self, model_id: str, held: _Held, adapter: Future[Adapter]) -> None:
        """Makes room for one that is there, and forgets one that could not be had."""
        with self._lock:
            if self._held.get(model_id) is not held:
                return
            if adapter.exception() is not None:
                del self._held[model_id]
                return
            held.size_bytes = adapter.result().size_bytes
            self._figures.adapter_bytes += held.size_bytes
            while len(self._held) > 1 and self._figures.adapter_bytes > self._limit_bytes:
                _id, oldest = self._held.popitem(last=False)
                self._figures.adapter_bytes -= oldest.size_bytes
                self._figures.adapter_evictions += 1

    def _read(self, model: ServedModel, engine: Engine) -> Adapter:
        backbone = engine.backbone
        dtype = next(backbone.model.parameters()).dtype
        try:
            with self._storage.folder(model.storage_prefix, model.files) as folder:
                return load_adapter(folder, head_name=backbone.head_name, device=backbone.device, dtype=dtype)
        except FileNotFoundError:
            raise InvalidData("A file of the saved model is missing.") from None
