"""A whole file, as a job of kind `predict` labels it, beside the engine alone on the same rows."""

import csv
from itertools import count
from pathlib import Path

from _engine_alone import Alone
from _measures import Measure, in_rounds, ratio, seconds
from service.ml.dataset import UploadOptions, profile
from worker.bulk import Labeller, Parts, header, label_here


def bulk_measures(alone: Alone, folder: Path, rounds: int, n_rows: int) -> list[Measure]:
    """From the CSV to predictions.csv; the engine alone has all token ids at hand and gives all logits at once."""
    some = (alone.texts * (1 + n_rows // len(alone.texts)))[:n_rows]
    file, adapter, numbers = folder / "rows.csv", alone.load(alone.varied[-1]), count()
    with file.open("w", encoding="utf-8", newline="") as opened:
        csv.writer(opened).writerows([("text",), *((text,) for text in some)])
    table, ids = profile(file, UploadOptions(labelled=False)).format, alone.ids(some)

    def bulk() -> None:
        place = folder / f"bulk-{next(numbers)}"
        parts = Parts(place / "parts")
        label_here(Labeller(alone.engine, adapter, "fp32"), file, table, parts)
        parts.join(header(adapter.labels, None), place / "predictions.csv")

    variants = {
        "bulk": lambda: n_rows / seconds(bulk),
        "engine": lambda: n_rows / seconds(lambda: alone.engine.score(ids, [adapter] * n_rows)),
    }
    taken = in_rounds(variants, rounds)
    return [
        Measure("bulk_vs_engine", ratio(taken, "bulk", "engine"), at_least=0.85),
        Measure("bulk_texts_per_second", taken["bulk"]),
    ]
