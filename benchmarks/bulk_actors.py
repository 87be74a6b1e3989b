"""A file labelled on a Ray cluster of this machine, by one actor and by two of one torch thread each.

Engine time: rows by the seconds that an actor's engine had them, times the actors. The wall's rate, over the second
half of the file, when all actors are there, is told beside it: the cluster's own processes take from the same cores.
"""

import csv
import os
import tempfile
import time
from itertools import count, cycle, islice
from pathlib import Path

from _catalogue import save_adapter
from _measures import Measure, in_rounds, parser, ratio, show, write
from _workload import texts
from service.ml.base_models import EMBEDDED, find_base, locate
from service.ml.dataset import UploadOptions, profile
from service.ml.encode import load_tokenizer
from worker.bulk import Parts

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}


def main() -> int:
    asked = parser(__doc__).parse_args()
    try:
        import ray

        from worker.cluster.bulk import label_on_actors
    except ImportError:
        print("Ray is not installed: pip install 'tuneproof[ray]'")
        return 2
    rows, rounds = (4096, 1) if asked.quick else (16_384, 3)
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    with tempfile.TemporaryDirectory() as place:
        folder, numbers = Path(place), count()
        source = locate(find_base(EMBEDDED, None))
        tokenizer = load_tokenizer(source.folder, decoder=False)
        model = save_adapter(folder / "model", source=source, tokenizer=tokenizer, n_labels=77, seed=0)
        with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
            lines = islice(cycle(texts(tokenizer, 2048)), rows)
            csv.writer(file).writerows([("text",), *((text,) for text in lines)])
        table = profile(folder / "rows.csv", UploadOptions(labelled=False)).format
        walls: dict[int, list[float]] = {1: [], 2: []}

        def labelled(actors: int) -> float:
            """Rows a second, engine time."""
            parts, told = Parts(folder / f"run-{next(numbers)}"), [(0, time.perf_counter())]
            cluster = {"address": "auto", "cpus": 1.0, "gpus": 0.0, "bulk_actors": actors}
            label_on_actors(
                cluster, (model, None, "fp32", "", None, 0.0), folder / "rows.csv", table, parts,
                lambda n: told.append((n, time.perf_counter())), lambda _: None,
            )  # fmt: skip
            half, start = next(seen for seen in told if seen[0] >= rows // 2)
            walls[actors].append((rows - half) / (told[-1][1] - start))
            return actors * parts.tally.rows / parts.tally.seconds

        taken = in_rounds({"2 actors": lambda: labelled(2), "1 actor": lambda: labelled(1)}, rounds)
    ray.shutdown()
    measures = [
        Measure("two_actors_vs_one_engine_time", ratio(taken, "2 actors", "1 actor"), at_least=1.7),
        Measure("two_actors_vs_one_wall", [two / one for two, one in zip(walls[2], walls[1], strict=True)]),
        Measure("rows_per_second_one_actor", taken["1 actor"]),
        Measure("rows_per_second_two_actors", taken["2 actors"]),
    ]
    show(f"{rows:,} rows, {EMBEDDED} in fp32, one thread an actor", measures)
    write(asked.json, measures)
    return not all(measure.met for measure in measures)


if __name__ == "__main__":
    raise SystemExit(main())
