"""The bases an engine process holds, the least recently used out by bytes."""

import logging
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch

from service.core.errors import AppError, BaseLoading, BaseNotServed
from service.inference.wire import Figures
from service.ml.backbone import load_backbone
from service.ml.base_models import locate_at
from service.ml.device import DTYPES, pick_device, serving_precision
from service.ml.engine import Engine

# A base that cannot be had may be there later: its folder filled, the hub back.
_SECONDS_REFUSED = 60.0
log = logging.getLogger("tuneproof.engine")

BaseKey = tuple[str, str]
"""Name and revision; device and dtype are the same for all bases of a process."""


@dataclass
class Limits:
    """An engine process's share of the machine."""

    device: str
    dtype: str
    memory_bytes: int
    adapter_bytes: int


@dataclass
class Bases:
    """Engines by base, loaded in the background, each by at most one thread."""

    models_dir: Path | None
    limits: Limits
    _engines: "OrderedDict[BaseKey, tuple[Engine, int]]" = field(default_factory=OrderedDict)
    _refused: dict[BaseKey, tuple[BaseNotServed, float]] = field(default_factory=dict)
    _loading: dict[BaseKey, Future[Engine]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.device = pick_device(self.limits.device)
        self.dtype = DTYPES[serving_precision(self.device, self.limits.dtype)]

    def engine(self, key: BaseKey) -> Engine:
        """The engine of a base.

        Raises:
            BaseLoading: it is being loaded; this call has started that, if nobody had.
            BaseNotServed: this machine cannot hold it, or has other files than the ones meant.
        """
        loading = self.load(key)
        if not loading.done():
            raise BaseLoading(f"Base model {key[0]!r} is being loaded. Ask again in a moment.")
        return loading.result()

    def load(self, key: BaseKey) -> Future[Engine]:
        """The engine of a base once it is there, or BaseNotServed."""
        known: Future[Engine] = Future()
        with self._lock:
            if key in self._engines:
                self._engines.move_to_end(key)
                known.set_result(self._engines[key][0])
                return known
            refused, since = self._refused.get(key, (None, 0.0))
            if refused is not None and time.monotonic() - since < _SECONDS_REFUSED:
                known.set_exception(BaseNotServed(refused.detail))  # a new one: a raised one keeps its frames
                return known
            if key not in self._loading:
                self._loading[key] = known
                threading.Thread(target=self._load, args=(key,), daemon=True).start()
            return self._loading[key]

    def tell(self, figures: Figures) -> None:
        """Writes down what is held, being loaded, and refused at the moment."""
        now = time.monotonic()
        with self._lock:
            figures.bases = [name for name, _revision in self._engines]
            figures.base_bytes = sum(used for _engine, used in self._engines.values())
            figures.loading = sorted(name for name, _revision in self._loading)
            figures.refused = {
                name: refusal.detail
                for (name, _revision), (refusal, since) in self._refused.items()
                if now - since < _SECONDS_REFUSED and (name, _revision) not in self._engines
            }

    def _load(self, key: BaseKey) -> None:
        with self._one_at_a_time:  # room is made for one, and transformers' loading changes what is global
            found = self._found(key)
        with self._lock:
            loading = self._loading.pop(key)
        if isinstance(found, BaseNotServed):
            loading.set_exception(found)
        else:
            loading.set_result(found)

    def _found(self, key: BaseKey) -> Engine | BaseNotServed:
        try:
            source = locate_at(*key, self.models_dir)
            size = source.size_bytes * (2 if self.dtype == torch.float32 else 1)
            self._make_room(key, size)
            engine = Engine(load_backbone(source, device=self.device, dtype=self.dtype))
            actual = sum(p.numel() * p.element_size() for p in engine.backbone.model.parameters())
            self._make_room(key, actual, exact=True)
            with self._lock:
                self._engines[key] = (engine, actual)
        except AppError as error:
            return self._refuse(key, error.detail)
        except torch.OutOfMemoryError:
            return self._refuse(key, f"Base model {key[0]!r} does not fit into the device's memory.")
        except Exception as error:  # damaged files, whatever the libraries say of them
            log.exception("base model %s cannot be loaded", key[0])
            return self._refuse(key, f"Base model {key[0]!r} cannot be loaded ({type(error).__name__}).")
        return engine

    def _make_room(self, key: BaseKey, size: int, *, exact: bool = False) -> None:
        limit = self.limits.memory_bytes
        # The files may hold half the bytes the loaded weights take; judged exactly once they are loaded.
        if (size if exact else size / 2) > limit:
            raise BaseNotServed(
                f"Base model {key[0]!r} takes about {size} bytes and serving may use {limit}. Raise "
                "TUNEPROOF_SERVE_MEMORY_BYTES, or serve it on another machine."
            )
        with self._lock:
            while self._engines and size + sum(used for _engine, used in self._engines.values()) > limit:
                self._engines.popitem(last=False)

    def _refuse(self, key: BaseKey, detail: str) -> BaseNotServed:
        refusal = BaseNotServed(f"{detail} Predictions of models on it cannot be made here.")
        with self._lock:
            self._refused[key] = refusal, time.monotonic()
        return refusal
