"""Ten minutes at saturation: no error but 429, and memory that does not grow after the first minute.

Thirty-two connections ask for 64 models, half by aliases that move all the time, in a cache that holds half of them;
one call in sixteen has 64 texts. Prints the resident size of API and engine, and fails where it has grown by more
than 2 %: the median of any later ninth of the time after the warm-up over that of the first.
The warm-up is a minute, or half of a shorter run.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers.utils import logging as transformers_logging

from _catalogue import make_key, publish
from _client import Load, ask
from _engine_alone import CALL, Alone
from _over_http import SINGLE, Calls, zipf
from _servers import Running, service
from service.core.clock import utc_now
from service.core.settings import Settings
from service.db import catalog
from service.db.engine import Database

MODELS, ALIASES, GROWTH, MiB = 64, 16, 1.02, 1 << 20


def mixed_calls(models: list[str], aliases: list[str], texts: list[str], n: int = 4096) -> Calls:
    chance, named = random.Random(0), zipf(models, n)
    made: Calls = []
    for number in range(n):
        size = CALL if number % 16 == 0 else 1
        name = chance.choice(aliases) if number % 2 else named[number]
        body = {"model": name, "texts": chance.sample(texts, size)}
        made.append(("POST", "/predict", json.dumps(body), size))
    return made


def resident(running: Running) -> tuple[float, float]:
    """MiB of the API and of the engine process."""
    engine = sum(child.memory_info().rss for child in running.children)
    return running.process.memory_info().rss / MiB, engine / MiB


def growth(samples: list[float]) -> float:
    """The highest median of a later ninth, over the first ninth's."""
    parts = [samples[i * len(samples) // 9 : (i + 1) * len(samples) // 9] for i in range(9)]
    first, *later = [statistics.median(part) for part in parts]
    return max(later) / first


def soak(seconds: float, folder: Path) -> list[str]:
    """What is wrong at the end; nothing, if all is well."""
    alone = Alone.over(folder / "adapters")
    settings = Settings(data_dir=folder / "data", adapter_cache_bytes=alone.load(alone.varied[-1]).size_bytes * 32)
    keys = {scope: make_key(settings, scope) for scope in ("predict", "admin")}
    models, aliases = publish(settings, alone.varied, MODELS), [f"alias-{i}" for i in range(ALIASES)]
    chance, db = random.Random(1), Database(settings.resolved_database_url)
    samples: dict[str, list[float]] = {"API": [], "engine": []}

    def move(names: list[str]) -> None:
        with db.write() as session:
            for name in names:
                catalog.point_alias(session, name, chance.choice(models), utc_now())

    move(aliases)
    with ThreadPoolExecutor(1) as beside, service(settings, alone.threads, keys["admin"]) as ours:
        engines = {child.pid for child in ours.children}
        begun, told = time.monotonic(), 0.0
        calls = mixed_calls(models, aliases, alone.texts)
        load = Load(ours.port, calls, SINGLE, seconds, keys["predict"], allowed=["429"])
        outcome = beside.submit(ask, load)
        while not outcome.done():
            move([chance.choice(aliases)])
            api, engine = resident(ours)
            at = time.monotonic() - begun
            if at > min(60, seconds / 2):
                samples["API"].append(api)
                samples["engine"].append(engine)
            if at >= told:
                print(f"{at:6.0f} s   API {api:7.1f} MiB   engine {engine:7.1f} MiB", flush=True)
                told += seconds / 20
            time.sleep(0.2)
        asked = outcome.result()
        figures = ours.get("/metrics", keys["admin"])[1].splitlines()
        evictions = sum(float(x.rsplit(" ", 1)[1]) for x in figures if x.startswith("tuneproof_adapter_cache_evict"))
        lost = {child.pid for child in ours.children} != engines
    db.close()
    grown = {name: growth(of) for name, of in samples.items()}
    told_growth = ", ".join(f"{name} {by - 1:+.2%}" for name, by in grown.items())
    print(f"answers {asked.statuses}, {asked.rate:.0f} texts/s, {evictions:.0f} evictions, growth {told_growth}")
    refused = asked.statuses.get("429", 0) / sum(asked.statuses.values())
    wrong = {
        f"{refused:.0%} of the calls were refused: the service was not at work": refused > 0.5,
        f"memory grew after the warm-up: {told_growth}": max(grown.values()) > GROWTH,
        "the engine process was lost on the way": lost,
        "nothing was evicted: the cache was not put to the test": evictions == 0,
    }
    return [said for said, is_so in wrong.items() if is_so]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--seconds", type=float, default=600)
    given = asked.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="tuneproof-soak-") as folder:
        if wrong := soak(given.seconds, Path(folder)):
            raise SystemExit("; ".join(wrong))


if __name__ == "__main__":
    main()
