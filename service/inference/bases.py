"""The bases an engine process holds, and the adapters beside them: each least recently used out, by bytes."""

import logging
import shutil
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch

from service.core.errors import AppError, BaseLoading, BaseNotServed, InvalidData, ModelUnavailable
from service.inference.wire import Figures, ServedModel
from service.ml.adapter import Adapter, load_adapter
from service.ml.backbone import load_backbone
from service.ml.base_models import Located, find_base, locate
from service.ml.device import DTYPES, pick_device, serving_precision
from service.ml.engine import Engine
from service.storage import Storage

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
    _loading: set[BaseKey] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.device = pick_device(self.limits.device)
        precision = serving_precision(self.device) if self.limits.dtype == "auto" else self.limits.dtype
        self.dtype = DTYPES[precision]

    def engine(self, key: BaseKey) -> Engine:
        """The engine of a base.

        Raises:
            BaseLoading: it is being loaded; this call has started that, if nobody had.
            BaseNotServed: this machine cannot hold it, or has other files than the ones meant.
        """
        with self._lock:
            if key in self._engines:
                self._engines.move_to_end(key)
                return self._engines[key][0]
            refused, since = self._refused.get(key, (None, 0.0))
            if refused is not None and time.monotonic() - since < _SECONDS_REFUSED:
                raise refused
            if key not in self._loading:
                self._loading.add(key)
                threading.Thread(target=self._load, args=(key,), daemon=True).start()
        raise BaseLoading(f"Base model {key[0]!r} is being loaded. Ask again in a moment.")

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
        try:
            source = self._locate(key)
            size = source.size_bytes * (2 if self.dtype == torch.float32 else 1)
            self._make_room(key, size)
            engine = Engine(load_backbone(source, device=self.device, dtype=self.dtype))
            actual = sum(p.numel() * p.element_size() for p in engine.backbone.model.parameters())
            self._make_room(key, actual, exact=True)
            with self._lock:
                self._engines[key] = (engine, actual)
        except AppError as error:
            self._refuse(key, error.detail)
        except torch.OutOfMemoryError:
            self._refuse(key, f"Base model {key[0]!r} does not fit into the device's memory.")
        except Exception as error:  # damaged files, whatever the libraries say of them
            log.exception("base model %s cannot be loaded", key[0])
            self._refuse(key, f"Base model {key[0]!r} cannot be loaded ({type(error).__name__}).")
        finally:
            with self._lock:
                self._loading.discard(key)

    def _locate(self, key: BaseKey) -> Located:
        name, revision = key
        source = locate(find_base(name, self.models_dir))
        if source.revision != revision:
            raise ModelUnavailable(f"Base model {name!r} is here at another revision than the model was trained on.")
        return source

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

    def _refuse(self, key: BaseKey, detail: str) -> None:
        with self._lock:
            refusal = BaseNotServed(f"{detail} Predictions of models on it cannot be made here.")
            self._refused[key] = refusal, time.monotonic()


@dataclass
class Adapters:
    """Adapters in memory, read from the storage when first asked for."""

    storage: Storage
    limit_bytes: int
    figures: Figures = field(default_factory=Figures)
    _held: "OrderedDict[str, tuple[weakref.ref[Engine], Adapter]]" = field(default_factory=OrderedDict)

    def get(self, model: ServedModel, engine: Engine) -> Adapter:
        """The model's adapter, attached to `engine`. Raises InvalidData where its files are not the published ones."""
        held = self._held.get(model.id)
        if held is not None and held[0]() is engine:
            self._held.move_to_end(model.id)
            self.figures.adapter_hits += 1
            return held[1]
        self.figures.adapter_misses += 1
        adapter = self._read(model, engine)
        engine.attach(adapter)
        self._held[model.id] = (weakref.ref(engine), adapter)  # an adapter must not keep an evicted base alive
        while len(self._held) > 1 and self._bytes() > self.limit_bytes:
            self._held.popitem(last=False)
            self.figures.adapter_evictions += 1
        self.figures.adapter_bytes = self._bytes()
        return adapter

    def _bytes(self) -> int:
        return sum(adapter.size_bytes for _engine, adapter in self._held.values())

    def _read(self, model: ServedModel, engine: Engine) -> Adapter:
        folder = Path(tempfile.mkdtemp(prefix="tuneproof-adapter-"))
        try:
            for name in model.files:
                try:
                    self.storage.fetch(f"{model.storage_prefix}/{name}", folder / name)
                except FileNotFoundError:
                    raise InvalidData(f"{name} of the saved model is missing.") from None
            backbone = engine.backbone
            dtype = next(backbone.model.parameters()).dtype
            return load_adapter(folder, head_name=backbone.head_name, device=backbone.device, dtype=dtype)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
