"""What a fleet takes for so many adapters and predictions: a model with its inputs, and simulated caches.

Every input has its source. `measured` was taken on the machine named in `docs/scale.md`, `sheet` stands on the maker's
data sheet, `assumed` nobody has measured: those are ranges, and so is what follows from them. The simulation draws
models by Zipf's law and keeps the least recently used out, as the engine's cache does.

    python benchmarks/capacity.py                          the tables
    python benchmarks/capacity.py --predictions 5000 --adapters 10000 --gpu-bytes 24e9 --gpu-flops 121e12
    python benchmarks/capacity.py --page docs/scale.md     writes the tables into the page
    python benchmarks/capacity.py --measure                times reading an adapter from a folder and from S3 (moto)
"""

import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from _measures import Measure, parser, write

GiB = 1 << 30
LOADERS = 2
"""Threads of `service/inference/adapters.py` that read adapters."""
REMEMBERED = 10_000
"""Names that `service/api/recent.py` remembers."""
BATCH_ROWS, BATCH_TOKENS = 256, 16_384
"""Most of a batch on CUDA, `service/ml/engine.py`."""
EXPONENTS = (0.8, 1.0, 1.2)
_SEED = 0


class Range(NamedTuple):
    """From the worst to the best that is thought likely; the same twice where it was measured."""

    worst: float
    best: float


@dataclass(frozen=True)
class Shape:
    """A base model, by its configuration: `layers` blocks, each with attention projections `(in, out)` and the rest."""

    name: str
    hidden: int
    layers: int
    projections: tuple[tuple[int, int], ...]
    other_weights_a_layer: int
    embeddings: int
    rank: int = 16

    @property
    def adapter_numbers(self) -> int:
        """Of A (r, in) and B (out, r) over all wrapped layers."""
        return self.layers * sum(self.rank * (n_in + n_out) for n_in, n_out in self.projections)

    @property
    def weights(self) -> int:
        """Norms left out."""
        own = sum(n_in * n_out for n_in, n_out in self.projections) + self.other_weights_a_layer
        return self.embeddings + self.layers * own

    def adapter_bytes(self, bytes_a_number: int, labels: int) -> int:
        """In memory: the head stays fp32."""
        return self.adapter_numbers * bytes_a_number + 4 * labels * (self.hidden + 1)

    @property
    def flops_a_token(self) -> float:
        """Forward, attention's own products left out; the embeddings are looked up."""
        return 2.0 * (self.weights - self.embeddings)


F2LLM = Shape(
    "F2LLM-0.6B", 1024, 28, ((1024, 2048), (1024, 1024), (1024, 1024), (2048, 1024)), 3 * 1024 * 3072, 151_936 * 1024
)
MINILM = Shape("MiniLM", 384, 6, ((384, 384),) * 4, 2 * 384 * 1536, (30_522 + 512 + 2) * 384)


# Assumed but for the reads: see docs/scale.md.
_SHARE_OF_FLOPS = Range(0.1, 0.4)
_SECONDS_TO_LAUNCH_A_BATCH = Range(0.050, 0.010)
_LOAD_SECONDS = Range(0.074, 0.026)
_TRAINING_GPU_MINUTES = Range(15, 3)


@dataclass(frozen=True)
class Inputs:
    """What the tables are computed from; `docs/scale.md` says where each is from."""

    predictions: float = 50_000
    texts_a_request: int = 1
    tokens_a_text: float = 16
    adapters: int = 100_000
    labels: int = 77
    trainings_a_day: float = 1000
    rows_a_training: int = 10_000
    gpu_bytes: float = 80e9
    gpu_flops: float = 989e12
    gpu_bytes_a_second: float = 3.35e12
    gpu_price: float = 2.5
    busy: float = 0.6
    share_of_flops: Range = _SHARE_OF_FLOPS
    seconds_to_launch_a_batch: Range = _SECONDS_TO_LAUNCH_A_BATCH
    scratch_bytes: float = 6e9
    api_seconds: float = 0.0011
    relay_seconds: float = 0.0017
    replica_seconds: float = 0.0014
    load_seconds: Range = _LOAD_SECONDS
    tokenizer_bytes: float = 11.4e6
    files_a_model: int = 6
    training_gpu_minutes: Range = _TRAINING_GPU_MINUTES
    status_reads_a_second: float = 2.0


def zipf(n: int, exponent: float) -> NDArray[np.float64]:
    """`(n,)` shares of all calls, the most asked for first."""
    weights = 1.0 / np.arange(1, n + 1, dtype=np.float64) ** exponent
    return weights / weights.sum()


def draws(shares: NDArray[np.float64], n: int, seed: int = _SEED) -> list[int]:
    chance = np.random.default_rng(seed)
    return np.minimum(np.searchsorted(np.cumsum(shares), chance.random(n)), len(shares) - 1).tolist()


def lru_hit_rate(shares: NDArray[np.float64], held: int, replicas: int = 1, n: int = 200_000) -> float:
    """Of calls whose model is at hand, once the caches have settled.

    Args:
        shares: Of the models.
        held: Models that one replica's cache holds.
        replicas: Among which the models are divided, each asked at one of them; 1 where any may be asked for any, as
            each then sees the same law.
        n: Calls that are counted, after as many that are not. The caches start with the most popular.
    """
    home = np.random.default_rng(_SEED + 1).integers(0, replicas, len(shares)).tolist()
    caches: list[dict[int, None]] = [{} for _ in range(replicas)]
    for model in range(len(shares)):
        if len(caches[home[model]]) < held:
            caches[home[model]][model] = None
    # The least popular is the oldest.
    caches = [dict.fromkeys(reversed(cache)) for cache in caches]
    hits = 0
    for number, model in enumerate(draws(shares, 2 * n)):
        cache = caches[home[model]]
        if model in cache:
            del cache[model]
            hits += number >= n
        elif len(cache) >= held:
            del cache[next(iter(cache))]
        cache[model] = None
    return hits / n


@dataclass(frozen=True)
class Fleet:
    """What follows from the inputs."""

    given: Inputs

    @property
    def adapter_bytes(self) -> int:
        return F2LLM.adapter_bytes(2, self.given.labels)

    @property
    def room(self) -> float:
        """Bytes of a GPU that are left for adapters."""
        return 0.95 * self.given.gpu_bytes - 2 * F2LLM.weights - self.given.scratch_bytes

    @property
    def held(self) -> int:
        return int(self.room // self.adapter_bytes)

    @property
    def texts(self) -> float:
        return self.given.predictions * self.given.texts_a_request

    @property
    def rows_a_batch(self) -> int:
        return int(min(BATCH_ROWS, BATCH_TOKENS // self.given.tokens_a_text))

    @property
    def adapters_a_batch(self) -> float:
        """Distinct ones expected by Zipf's law with exponent 1, each call's texts under one."""
        calls = max(1, self.rows_a_batch // self.given.texts_a_request)
        return float((1 - (1 - zipf(self.given.adapters, 1.0)) ** calls).sum())

    def seconds_a_batch(self, which: int) -> tuple[float, float, float]:
        """Products; copies of the adapters into stacks (read, written, read); what the processor takes meanwhile."""
        given = self.given
        products = self.rows_a_batch * given.tokens_a_text * F2LLM.flops_a_token / (
            given.gpu_flops * given.share_of_flops[which]
        )  # fmt: skip
        copies = 3 * self.adapters_a_batch * self.adapter_bytes / given.gpu_bytes_a_second
        return products, copies, given.seconds_to_launch_a_batch[which]

    def texts_a_second(self, which: int) -> float:
        """Of one GPU; the processor launches one batch while the GPU computes the one before."""
        products, copies, launches = self.seconds_a_batch(which)
        return self.rows_a_batch / max(products + copies, launches)

    def replicas_for_speed(self, which: int) -> int:
        return ceil(self.texts / (self.texts_a_second(which) * self.given.busy))

    @property
    def replicas_for_memory(self) -> int:
        """So that every adapter is at hand at one of them; a twentieth more, as hashing divides them unevenly."""
        return ceil(1.05 * self.given.adapters / self.held)

    def replicas(self, which: int) -> int:
        return max(self.replicas_for_speed(which), self.replicas_for_memory)

    def loads_a_second(self, which: int) -> float:
        """Adapters that one replica can read."""
        return LOADERS / self.given.load_seconds[which]

    @property
    def api_cores(self) -> int:
        return ceil(self.given.predictions * self.given.api_seconds / self.given.busy)

    @property
    def relay_cores(self) -> int:
        """Of the processes that hand the APIs' calls to Ray Serve."""
        return ceil(self.given.predictions * self.given.relay_seconds / self.given.busy)

    @property
    def replica_processes(self) -> int:
        """Each takes its calls in one Python loop, so it is one core's work whatever its GPU does."""
        return ceil(self.given.predictions * self.given.replica_seconds / self.given.busy)

    def training_gpus(self, which: int) -> int:
        return ceil(self.given.trainings_a_day * self.given.training_gpu_minutes[which] / 1440 / self.given.busy)


def rows(*cells: tuple[str, ...]) -> str:
    head, *body = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([head, "|" + "---|" * len(cells[0]), *body])


def span(worst: float, best: float, form: str = ",.0f") -> str:
    low, high = sorted((worst, best))
    return f"{low:{form}}" if f"{low:{form}}" == f"{high:{form}}" else f"{low:{form}} to {high:{form}}"


def sizes(given: Inputs) -> str:
    lines = [("base", "weights, bf16", "numbers of an adapter", "fp32", "bf16", "a cache of 1 GiB holds, bf16")]
    for shape in (F2LLM, MINILM):
        small = shape.adapter_bytes(2, given.labels)
        lines.append((
            shape.name, f"{2 * shape.weights / 1e6:,.0f} MB", f"{shape.adapter_numbers:,}",
            f"{shape.adapter_bytes(4, given.labels) / 1e6:.2f} MB", f"{small / 1e6:.2f} MB", f"{GiB // small:,}",
        ))  # fmt: skip
    return rows(*lines)


def answer(given: Inputs) -> str:
    fleet = Fleet(given)
    (products, copies, launches), best = fleet.seconds_a_batch(0), fleet.seconds_a_batch(1)
    hour = given.gpu_price / (given.predictions * 3600 / 1e6)
    stored = given.adapters * (4 * F2LLM.adapter_numbers + 4 * given.labels * F2LLM.hidden + given.tokenizer_bytes)
    cold = [given.adapters / (fleet.replicas(i) * fleet.loads_a_second(i)) for i in (0, 1)]
    at_once = [given.trainings_a_day * minutes / 1440 for minutes in given.training_gpu_minutes]
    return rows(
        ("what", "figure", "from"),
        ("cores for the APIs", f"{fleet.api_cores:,}",
         f"{1000 * given.api_seconds:g} ms an answer, {given.busy:.0%} busy"),
        ("cores beside them that hand on to Serve", f"{fleet.relay_cores:,}",
         f"{1000 * given.relay_seconds:g} ms a call"),
        ("processes that take the calls of replicas", f"{fleet.replica_processes:,}",
         f"{1000 * given.replica_seconds:g} ms a call, one core each, {given.busy:.0%} busy"),
        ("distinct adapters in a batch", f"{fleet.adapters_a_batch:.0f}", f"{fleet.rows_a_batch} texts, Zipf 1.0"),
        ("a batch: products", span(1000 * products, 1000 * best[0]) + " ms", "assumed share of the GPU's rate"),
        ("a batch: copying adapters", span(1000 * copies, 1000 * best[1], ".1f") + " ms",
         "memory rate of the data sheet"),
        ("a batch: launching", span(1000 * launches, 1000 * best[2]) + " ms", "assumed"),
        ("texts a second of one GPU", span(*map(fleet.texts_a_second, (0, 1))), "the slower of GPU and launching"),
        ("GPUs for the speed", span(*map(fleet.replicas_for_speed, (0, 1))), f"{given.busy:.0%} busy"),
        ("adapters that one GPU holds", f"{fleet.held:,}", f"{fleet.room / 1e9:.0f} GB left beside base and scratch"),
        ("GPUs to hold every adapter once", f"{fleet.replicas_for_memory}", "each model at one replica"),
        ("**GPUs for serving**", f"**{span(*map(fleet.replicas, (0, 1)))}**", "the larger of the two"),
        ("a million predictions", span(*(hour * fleet.replicas(i) for i in (0, 1)), ".2f"),
         f"{given.gpu_price:g} a GPU-hour, any currency; APIs aside"),
        ("adapters that a replica can read", span(*map(fleet.loads_a_second, (0, 1))) + " a second",
         f"{LOADERS} loaders"),
        ("all adapters read once, by all", span(cold[0] / 60, cold[1] / 60, ".1f") + " minutes", "after a restart"),
        ("files in the bucket", f"{given.adapters * given.files_a_model:,}, {stored / 1e12:.1f} TB",
         "adapter in fp32, and a tokenizer with each"),
        ("GPUs for training", span(*map(fleet.training_gpus, (0, 1))), "assumed GPU-minutes of a training"),
        ("trainings at once", span(*at_once, ".0f"), "so many workers at least"),
        ("their reads of the database", span(*(given.status_reads_a_second * x for x in at_once), ".0f") + " a second",
         "a status every half second each"),
    )  # fmt: skip


def hit_rates(given: Inputs) -> str:
    fleet = Fleet(given)
    replicas = fleet.replicas_for_memory
    per_replica = given.predictions / replicas
    lines = [("cache of a replica", "adapters", "Zipf", "any replica: at hand", "misses a second",
              "its own replica: at hand", "misses a second")]  # fmt: skip
    for size in (1 * GiB, 16 * GiB, int(fleet.room)):
        held = size // fleet.adapter_bytes
        for exponent in EXPONENTS:
            shares = zipf(given.adapters, exponent)
            alone, divided = lru_hit_rate(shares, held), lru_hit_rate(shares, held, replicas)
            lines.append((
                f"{size / GiB:.0f} GiB", f"{held:,}", f"{exponent}",
                f"{alone:.1%}", f"{per_replica * (1 - alone):,.0f}",
                f"{divided:.1%}", f"{per_replica * (1 - divided):,.0f}",
            ))  # fmt: skip
    return rows(*lines)


def popularity(given: Inputs) -> str:
    replicas = Fleet(given).replicas_for_memory
    home = np.random.default_rng(_SEED + 1).integers(0, replicas, given.adapters)
    lines = [("Zipf", "calls for the most popular", "its share", f"busiest of {replicas} replicas against the mean",
              "an API need not look up", "rows looked up a second, in all")]  # fmt: skip
    for exponent in EXPONENTS:
        shares = zipf(given.adapters, exponent)
        busiest = np.bincount(home, shares, replicas).max() * replicas
        known = lru_hit_rate(shares, REMEMBERED)
        lines.append((
            f"{exponent}", f"{given.predictions * shares[0]:,.0f} a second", f"{shares[0]:.1%}", f"{busiest:.1f}",
            f"{known:.1%}", f"{given.predictions * (1 - known):,.0f}",
        ))  # fmt: skip
    return rows(*lines)


def tables(given: Inputs) -> dict[str, str]:
    return {
        "sizes": sizes(given),
        "answer": answer(given),
        "hit rates": hit_rates(given),
        "popularity": popularity(given),
    }


def with_tables(page: str, made: dict[str, str]) -> str:
    """The page with each table between its two comments."""
    for name, table in made.items():
        found = re.compile(rf"(<!-- capacity: {name} -->\n).*?(<!-- /capacity -->)", re.DOTALL)
        page, n = found.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", page)
        if n != 1:
            raise ValueError(f"the page has {n} places for {name!r}, not one")
    return page


def measures(given: Inputs) -> Iterator[Measure]:
    fleet = Fleet(given)
    both = {
        "gpus_for_speed": fleet.replicas_for_speed, "gpus_for_serving": fleet.replicas,
        "texts_per_second_of_a_gpu": fleet.texts_a_second, "gpus_for_training": fleet.training_gpus,
    }  # fmt: skip
    for name, figure in both.items():
        yield Measure(f"{name}_worst", [figure(0)])
        yield Measure(f"{name}_best", [figure(1)])
    yield Measure("gpus_to_hold_every_adapter", [fleet.replicas_for_memory])
    yield Measure("adapter_bytes", [fleet.adapter_bytes])
    yield Measure("api_cores", [fleet.api_cores])
    for exponent in EXPONENTS:
        shares, name = zipf(given.adapters, exponent), f"{10 * exponent:.0f}"
        yield Measure(f"hit_rate_any_zipf{name}", [lru_hit_rate(shares, fleet.held)])
        yield Measure(f"hit_rate_own_zipf{name}", [lru_hit_rate(shares, fleet.held, fleet.replicas_for_memory)])


def arguments() -> Namespace:
    asked = parser(__doc__)
    asked.add_argument("--page", type=Path, help="write the tables into this page, between its comments")
    asked.add_argument("--measure", action="store_true", help="time reading adapters, in place of the tables")
    for name, field in Inputs.__dataclass_fields__.items():
        if isinstance(field.default, int | float):
            asked.add_argument(f"--{name.replace('_', '-')}", type=float, default=field.default)
    return asked.parse_args()


def inputs(asked: Namespace) -> Inputs:
    numbers = {name: type(field.default)(getattr(asked, name)) for name, field in Inputs.__dataclass_fields__.items()
               if isinstance(field.default, int | float)}  # fmt: skip
    return Inputs(**numbers)


def main() -> None:
    asked = arguments()
    given = inputs(asked)
    if asked.measure:
        from _adapter_reads import read_measures
        from _measures import show

        taken = read_measures((F2LLM, MINILM), given.labels, int(given.tokenizer_bytes), 3 if asked.quick else 20)
        show("Reading one adapter, seconds", taken)
        write(asked.json, taken)
        return
    made = tables(given)
    for name, table in made.items():
        print(f"{name}\n{table}\n")
    if asked.page is not None:
        asked.page.write_text(with_tables(asked.page.read_text("utf-8"), made), "utf-8")
    write(
        asked.json, list(measures(given)), inputs={name: getattr(given, name) for name in Inputs.__dataclass_fields__}
    )


if __name__ == "__main__":
    main()
