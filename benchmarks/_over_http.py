"""The service over HTTP beside a plain server and beside the engine alone; all under the same client."""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from _catalogue import make_key, publish
from _client import Load, Outcome, ask
from _engine_alone import CALL, N_ADAPTERS, Alone
from _measures import Measure, in_rounds, ratio, seconds
from _servers import Running, plain, service
from service.core.settings import Settings

SINGLE, BATCH, COLD = 32, 4, 60
Calls = list[tuple[str, str, str, int]]


def predict_calls(models: Sequence[str], calls: Sequence[Sequence[str]]) -> Calls:
    """Calls of `/predict`, models in turn."""
    bodies = zip(itertools.cycle(models), calls, strict=False)
    return [("POST", "/predict", json.dumps({"model": name, "texts": list(some)}), len(some)) for name, some in bodies]


def zipf(models: Sequence[str], n: int, seed: int = 0) -> list[str]:
    """`n` of them by Zipf's law, s = 1."""
    shares = 1 / np.arange(1, len(models) + 1)
    return [models[i] for i in np.random.default_rng(seed).choice(len(models), n, p=shares / shares.sum())]


def http_measures(alone: Alone, folder: Path, given: argparse.Namespace) -> list[Measure]:
    settings = Settings(data_dir=folder / "data")
    size = statistics.mean(alone.load(path).size_bytes for path in alone.varied)
    # A third of the adapters that Zipf's law asks for, and at least the sixteen.
    tight = settings.model_copy(update={"adapter_cache_bytes": int(size * max(given.models // 3, N_ADAPTERS))})
    keys = {scope: make_key(settings, scope) for scope in ("predict", "admin")}
    uniform = publish(settings, alone.uniform, N_ADAPTERS)
    many, cold = publish(settings, alone.varied, given.models), publish(settings, alone.varied, COLD, linked=False)
    with service(settings, alone.threads, keys["admin"]) as ours, plain(alone.uniform) as stock:
        measures = _side_by_side(alone, ours, stock, keys["predict"], uniform, given)
        measures += _cold(ours, keys["predict"], cold, alone)
        measures += _health(ours, keys["predict"], uniform, alone, given.seconds)
    # As the cache ships: as it fills, then once every model was asked, as the sixteen were; and with evictions.
    everyone = predict_calls(many, [alone.texts[:1]] * len(many))
    for limits, names in ((settings, ("from_empty", "vs_mixed16")), (tight, ("a_third_in_memory",))):
        with service(limits, alone.threads, keys["admin"]) as ours:
            for name in names:
                if name == "vs_mixed16":
                    ask(Load(ours.port, everyone, SINGLE, key=keys["predict"]))
                taken = _in_rounds(_by_zipf(alone, ours, keys["predict"], many, given), given.rounds)
                measures.append(Measure(f"thousand_zipf_{name}", ratio(taken, "zipf", "mixed16"), at_least=0.9))
                measures.append(Measure(f"thousand_zipf_{name}_texts_per_second", taken["zipf"]))
            if limits is tight:
                measures += _memory(ours, keys["admin"], tight.adapter_cache_bytes)
    return measures


def _side_by_side(
    alone: Alone, ours: Running, stock: Running, key: str, uniform: list[str], given: argparse.Namespace
) -> list[Measure]:
    singles = [[text] for text in alone.texts]
    adapters = [alone.load(path) for path in alone.uniform]
    names, cpu_ms, client = [path.name for path in alone.uniform], [], []
    ids = [alone.ids(call) for call in alone.calls[:N_ADAPTERS]]

    def load(server: Running, calls: Calls, connections: int) -> Outcome:
        return ask(Load(server.port, calls, connections, given.seconds, key))

    def single() -> float:
        before = ours.cpu_seconds
        outcome = load(ours, predict_calls(uniform, singles), SINGLE)
        cpu_ms.append(1000 * (ours.cpu_seconds - before) / len(outcome.milliseconds))
        client.append(outcome.cpu_seconds / outcome.seconds)
        return outcome.rate

    def engine() -> float:
        calls = [(call, [one] * CALL) for call, one in zip(ids, adapters, strict=True)]
        return CALL * len(calls) / seconds(lambda: [alone.engine.score(*call) for call in calls])

    variants = {
        "plain_single": lambda: load(stock, predict_calls(names, singles), SINGLE).rate,
        "single": single,
        "plain_batch": lambda: load(stock, predict_calls(names, alone.calls), BATCH).rate,
        "batch": lambda: load(ours, predict_calls(uniform, alone.calls), BATCH).rate,
        "engine": engine,
    }
    taken = _in_rounds(variants, given.rounds)
    return [
        Measure("http_single_vs_plain", ratio(taken, "single", "plain_single"), at_least=7),
        Measure("http_batch_vs_plain", ratio(taken, "batch", "plain_batch"), at_least=3.5),
        Measure("http_batch_vs_engine", ratio(taken, "batch", "engine"), at_least=0.8),
        *(Measure(f"{name}_texts_per_second", values) for name, values in taken.items()),
        Measure("api_cpu_ms_per_call", cpu_ms[1:]),
        Measure("client_cpu_share_of_a_core", client[1:]),
    ]


def _by_zipf(
    alone: Alone, ours: Running, key: str, many: list[str], given: argparse.Namespace
) -> dict[str, Callable[[], float]]:
    """Single texts to sixteen models in turn, and to a thousand by Zipf's law."""
    singles, seeds = [[text] for text in alone.texts], itertools.count()

    def load(names: Sequence[str]) -> float:
        calls = predict_calls(names, singles * (len(names) // len(singles) or 1))
        return ask(Load(ours.port, calls, SINGLE, given.seconds, key)).rate

    return {
        "mixed16": lambda: load(many[:N_ADAPTERS]),
        # Another draw each time: what was asked for before is no forecast.
        "zipf": lambda: load(zipf(many, 4 * len(singles), next(seeds))),
    }


def _in_rounds(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """As `in_rounds`, after one that warms up."""
    return {name: values[1:] for name, values in in_rounds(variants, rounds + 1).items()}


def _cold(ours: Running, key: str, cold: list[str], alone: Alone) -> list[Measure]:
    """What the first answer of each takes over its second, nothing else being asked: the 95th percentile."""
    twice = [name for name in cold for _ in range(2)]
    milliseconds = ask(Load(ours.port, predict_calls(twice, [alone.texts[:1]] * len(twice)), key=key)).milliseconds
    extra = np.subtract(milliseconds[::2], milliseconds[1::2]) / 1000
    return [Measure("cold_adapter_extra_seconds", [float(np.percentile(extra, 95))], at_most=0.05)]


def _health(ours: Running, key: str, models: list[str], alone: Alone, length: float) -> list[Measure]:
    """The 99th percentile of `/healthz` while the engine is idle, and while it is saturated."""
    looks = Load(ours.port, [("GET", "/healthz", "", 0)], seconds=length, pause=0.01)
    idle = ask(looks)
    load = Load(ours.port, predict_calls(models, [[text] for text in alone.texts]), SINGLE, length + 1, key)
    with ThreadPoolExecutor(1) as beside:
        busy = beside.submit(ask, load)
        saturated = ask(looks)
        busy.result()
    taken = {"idle": idle.milliseconds, "saturated": saturated.milliseconds}
    return [Measure(f"healthz_p99_ms_{state}", [float(np.percentile(ms, 99))]) for state, ms in taken.items()]


def _memory(ours: Running, key: str, room: int) -> list[Measure]:
    """What the adapters in memory take, in shares of what they may; and the engine process's resident size."""
    told = dict(line.rsplit(" ", 1) for line in ours.get("/metrics", key)[1].splitlines() if not line.startswith("#"))
    resident = sum(child.memory_info().rss for child in ours.children)
    return [
        Measure("adapter_cache_share_of_budget", [float(told["tuneproof_adapter_cache_bytes"]) / room], at_most=1),
        Measure("adapter_cache_evictions", [float(told["tuneproof_adapter_cache_evictions_total"])]),
        Measure("engine_resident_bytes", [float(resident)]),
    ]
