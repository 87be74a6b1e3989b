"""A whole file labelled with one published model: what a job of kind `predict` does in its child.

    folder/dataset             the uploaded file, as it came
    folder/job.json            as for `worker.run`
    folder/model/              the published model
    folder/checkpoints/parts/  what earlier attempts have written
    folder/out/                predictions.csv

Rows go by in blocks, and no more than three are in memory: one is scored while a thread of its own writes the one
before and reads the one after.
"""

import io
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.core.spec import JobSpec
from service.ml.adapter import Adapter, load_adapter
from service.ml.backbone import load_backbone
from service.ml.base_models import locate_at
from service.ml.calibration import softmax
from service.ml.dataset import Row, TableFormat, UploadOptions, profile, read_rows
from service.ml.device import DTYPES, pick_device, serving_precision
from service.ml.encode import encode, load_tokenizer
from service.ml.engine import Engine
from service.ml.manifest import Manifest, sha256_of
from worker.artifacts import csv_writer
from worker.progress import Reporter
from worker.stop import Stopped

# Sorted by length, a block of so many rows fills its batches; a block is the least that is done twice, so on a CPU its
# characters are bounded too: some 25,000 tokens.
BLOCK_ROWS, BLOCK_CHARS = {"cpu": 1024}, {"cpu": 100_000}
MOST_BLOCK_ROWS, MOST_BLOCK_CHARS = 4096, 2_000_000
PART_SECONDS = 10.0  # at most about so much work is done twice
SHARES = {"prepare": 0.02, "evaluate": 0.95, "publish": 0.03}


@dataclass
class Tally:
    """What the rows so far came to; `precision` is the one they were scored in, empty before the first."""

    rows: int = 0
    empty: int = 0
    abstained: int = 0
    truncated: int = 0
    tokens: int = 0
    seconds: float = 0.0
    precision: str = ""
    labels: dict[str, int] = field(default_factory=dict)

    def add(self, other: "Tally") -> None:
        """Counts the rows of another, which come after its own."""
        for name in ("rows", "empty", "abstained", "truncated", "tokens", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.precision = self.precision or other.precision
        self.labels = dict(Counter(self.labels) + Counter(other.labels))


@dataclass(frozen=True)
class Block:
    """Some rows of the file; `ids` are those of the rows that have a text."""

    rows: list[Row]
    ids: list[list[int]]
    truncated: int


class Parts:
    """The rows written so far, in files that are whole and never touched again, each with the tally up to its end.

    So each is stored once, however many follow. What lies in `folder` is taken up as far as it is whole and undamaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.n, self.tally = folder, 0, Tally()
        folder.mkdir(parents=True, exist_ok=True)
        while (found := self._read(self.n)) is not None:
            self.tally, self.n = found, self.n + 1
        for stale in [path for path in folder.iterdir() if int(path.stem) >= self.n]:
            stale.unlink()
        self._open = folder.with_name("part")
        self._begun: float | None = None

    def write(self, lines: str) -> bool:
        """Adds the lines of a block, which `tally` counts already; gives whether that has ended a part."""
        begun, self._begun = self._begun, None  # what cannot be written leaves nothing to end
        if begun is None:
            self._open.unlink(missing_ok=True)
        with self._open.open("a", encoding="utf-8", newline="") as file:
            file.write(lines)
        self._begun = begun or time.monotonic()
        return time.monotonic() - self._begun >= PART_SECONDS and self.end()

    def end(self) -> bool:
        """Ends the part at hand; gives whether there was one."""
        if self._begun is None:
            return False
        known = {"sha256": sha256_of(self._open), "tally": asdict(self.tally)}
        self._open.replace(self._file(self.n, "csv"))
        self._open.write_text(json.dumps(known), encoding="utf-8")
        self._open.replace(self._file(self.n, "json"))
        self.n, self._begun = self.n + 1, None
        return True

    def join(self, header: Sequence[str], path: Path) -> None:
        """All rows, in the order of the file."""
        with path.open("w", encoding="utf-8", newline="") as file:
            csv_writer(file)(header)
        with path.open("ab") as target:
            for i in range(self.n):
                with self._file(i, "csv").open("rb") as part:
                    shutil.copyfileobj(part, target, 1 << 20)

    def _read(self, i: int) -> Tally | None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(self._file(i, "json").read_text(encoding="utf-8"))
            if sha256_of(self._file(i, "csv")) == known["sha256"]:
                return Tally(**known["tally"])
        return None

    def _file(self, i: int, ending: str) -> Path:
        return self.folder / f"{i:06}.{ending}"


@dataclass
class Labeller:
    """One model on its base, which labels blocks of rows. Nobody else may use its engine meanwhile.

    Args:
        engine: With `adapter` attached.
        adapter: The model's.
        precision: Of the engine, for the record.
        top_k: How many labels to write with their probabilities; None for the answer alone.
        min_confidence: Below it the label is left open.
    """

    engine: Engine
    adapter: Adapter
    precision: str
    top_k: int | None = None
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        backbone = self.engine.backbone
        self._tokenizer = load_tokenizer(backbone.source.folder, decoder=backbone.decoder)  # a thread's own

    @classmethod
    def load(
        cls, model: Path, models_dir: str | None, dtype: str, precision: str, top_k: int | None, min_confidence: float
    ) -> "Labeller":
        """From the published files. `dtype` is TUNEPROOF_SERVE_DTYPE; earlier rows' `precision` overrules it.

        Raises:
            ModelUnavailable: the base cannot be had.
        """
        manifest = Manifest.read(model)
        source = locate_at(manifest.base_model, manifest.base_revision, Path(models_dir) if models_dir else None)
        device = pick_device()
        precision = precision or serving_precision(device, dtype)
        engine = Engine(load_backbone(source, device=device, dtype=DTYPES[precision]))
        adapter = load_adapter(model, head_name=engine.backbone.head_name, device=device, dtype=DTYPES[precision])
        engine.attach(adapter)
        return cls(engine, adapter, precision, top_k, min_confidence)

    def read(self, rows: list[Row]) -> Block:
        encoded = encode(self._tokenizer, [row.text for row in rows if row.text.strip()], self.adapter.max_length)
        return Block(rows, encoded.ids, int(encoded.truncated.sum()))

    def score(self, block: Block, on_rows: Callable[[int], None] = lambda _: None) -> list[NDArray[np.float32]]:
        return self.engine.score(block.ids, [self.adapter] * len(block.ids), lambda n, _: on_rows(n))

    def write(self, block: Block, logits: list[NDArray[np.float32]], seconds: float) -> tuple[str, Tally]:
        """The block's lines, and what they come to."""
        tally = Tally(truncated=block.truncated, tokens=sum(map(len, block.ids)), seconds=seconds)
        tally.precision = self.precision
        lines = io.StringIO(newline="")
        write = csv_writer(lines)
        for line in _answered(block.rows, logits, self.adapter, self.top_k, self.min_confidence, tally):
            write(line)
        return lines.getvalue(), tally

    def label(self, rows: list[Row]) -> tuple[str, Tally]:
        start = time.perf_counter()
        block = self.read(rows)
        return self.write(block, self.score(block), time.perf_counter() - start)


def blocks_of(file: Path, table: TableFormat, start: int, device: str) -> Iterator[list[Row]]:
    """Its rows from number `start` on, as many at a time as are scored at once.

    Cut by rows and characters alone, so that an attempt that goes on at a block's end scores the same blocks.

    Raises:
        InvalidData: the file is not the one that was profiled.
    """
    most_rows, most_chars = BLOCK_ROWS.get(device, MOST_BLOCK_ROWS), BLOCK_CHARS.get(device, MOST_BLOCK_CHARS)
    rows = itertools.islice(read_rows(file, table), start, None)
    for first in rows:
        block, chars = [first], len(first.text)
        while len(block) < most_rows and chars < most_chars and (row := next(rows, None)) is not None:
            block.append(row)
            chars += len(row.text)
        yield block


def label_here(
    labeller: Labeller, file: Path, table: TableFormat, parts: Parts, on_rows: Callable[[int], None] = lambda _: None,
    on_part: Callable[[Path], None] = lambda _: None,
) -> None:  # fmt: skip
    """Labels the rows of a file that `parts` does not hold yet.

    Args:
        labeller: What labels them.
        file: As it was uploaded.
        table: How to read it.
        parts: Where to, and how far earlier attempts came.
        on_rows: Called with the rows done.
        on_part: Called with the folder of the parts when there is one more.
    """
    tally, done, writing = parts.tally, parts.tally.rows, None
    blocks = map(labeller.read, blocks_of(file, table, done, labeller.engine.backbone.device.type))

    def write(block: Block, logits: list[NDArray[np.float32]], seconds: float) -> bool:
        lines, counted = labeller.write(block, logits, seconds)
        tally.add(counted)
        return parts.write(lines)

    with ThreadPoolExecutor(1) as aside:
        start = time.perf_counter()
        coming: Future[Block | None] = aside.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = aside.submit(next, blocks, None)
            before = done
            logits = labeller.score(block, lambda n: on_rows(before + n))  # noqa: B023
            if writing is not None and writing.result():
                on_part(parts.folder)
            now = time.perf_counter()
            writing = aside.submit(write, block, logits, now - start)
            start, done = now, done + len(block.rows)
        if writing is not None:
            writing.result()
        aside.submit(parts.end).result()  # there, as the writing: a stop reaches this thread alone


def header(labels: Sequence[str], top_k: int | None) -> list[str]:
    """Of predictions.csv."""
    ranks = range(1, min(top_k or 0, len(labels)) + 1)
    return ["row_id", "text", "label", "confidence", *(f"{of}_{i}" for i in ranks for of in ("label", "probability"))]


def _answered(
    rows: Sequence[Row], logits: list[NDArray[np.float32]], adapter: Adapter, top_k: int | None,
    min_confidence: float, tally: Tally,
) -> list[list[str]]:  # fmt: skip
    """The lines of a block, counted into `tally`. Equal probabilities stand in the order of the labels' ids."""
    labels, width = adapter.labels, min(max(top_k or 0, 1), len(adapter.labels))
    shares = softmax(np.stack(logits), adapter.temperature) if logits else np.empty((0, len(labels)))
    order = np.argsort(-shares, axis=1, kind="stable")[:, :width]
    best = zip(order.tolist(), np.take_along_axis(shares, order, axis=1).tolist(), strict=True)
    lines, counts = [], Counter(tally.labels)
    for row in rows:
        line = [str(row.row_id), row.text, "", ""]
        ranked = [""] * (2 * width)
        if row.text.strip():
            ids, confidences = next(best)
            ranked = [cell for i, share in zip(ids, confidences, strict=True) for cell in (labels[i], repr(share))]
            line[3] = ranked[1]
            if confidences[0] >= min_confidence:
                line[2] = ranked[0]
                counts[ranked[0]] += 1
            else:
                tally.abstained += 1
        else:
            tally.empty += 1
        lines.append(line + ranked if top_k else line)
    tally.rows, tally.labels = tally.rows + len(rows), dict(counts)
    return lines


class Bulk:
    """A job under way."""

    def __init__(self, folder: Path, reporter: Reporter) -> None:
        self.folder, self.out, self.reporter = folder, folder / "out", reporter
        self.job: dict[str, Any] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        self.spec = JobSpec.model_validate(self.job["spec"])

    def run(self) -> None:
        """From the file to predictions.csv. Raises AppError."""
        self.reporter.weigh(SHARES)
        self.reporter.stage("prepare")
        self.out.mkdir(parents=True, exist_ok=True)
        parts = Parts(self.folder / "checkpoints" / "parts")
        tally = parts.tally
        if tally.rows:
            self.reporter.event("message", f"Goes on after {tally.rows:,} rows.", {"count": tally.rows})
        model = (
            self.folder / "model", self.job.get("models_dir"), self.job.get("serve_dtype", "auto"), tally.precision,
            self.spec.top_k, self.spec.min_confidence,
        )  # fmt: skip
        label = self._anywhere(model) if "cluster" in self.job else partial(label_here, Labeller.load(*model))
        table, n_rows = self._table()
        self.reporter.stage("evaluate")
        try:
            label(self.folder / "dataset", table, parts, self._pace(tally.rows, n_rows), self.reporter.checkpoint)
            names = Manifest.read(self.folder / "model").labels
            parts.join(header(names, self.spec.top_k), self.out / "predictions.csv")
        except Stopped:
            if parts.end() or parts.n:  # every block that was scored is written by now
                self.reporter.checkpoint(parts.folder)
            raise
        self._warn(tally)
        self.reporter.result(self._summary(tally), [])

    def _anywhere(self, model: tuple[Any, ...]) -> Callable[..., None]:
        from worker.cluster.bulk import label_on_actors

        waits = partial(self.reporter.progress, 0.0, "waiting for a place in the cluster", always=True)
        return partial(label_on_actors, self.job["cluster"], model, on_wait=waits)

    def _table(self) -> tuple[TableFormat, int]:
        if self.job.get("table"):
            return TableFormat(**self.job["table"]), self.job["dataset"]["n_rows"]
        found = profile(self.folder / "dataset", UploadOptions(labelled=False))
        return found.format, found.n_rows

    def _pace(self, first: int, n_rows: int) -> Callable[[int], None]:
        """Progress by the rows of this attempt alone: what earlier ones did took it no time."""
        start = time.monotonic()

        def tell(done: int) -> None:
            rate = (done - first) / max(time.monotonic() - start, 1e-9)
            message = f"{done:,} of {n_rows:,} rows, {rate:,.0f} a second"
            self.reporter.progress(done / n_rows, message, eta_seconds=(n_rows - done) / max(rate, 1e-9))

        return tell

    def _warn(self, tally: Tally) -> None:
        for found in self.job.get("dataset", {}).get("warnings", []):
            if found["code"] == "unclear_header":
                self.reporter.event("message", found["message"], found, level="warning")
        for count, message in (
            (tally.empty, "rows have no text; they stand in predictions.csv without a label."),
            (tally.truncated, "texts are longer than the model reads; what lies beyond was not read."),
        ):
            if count:
                self.reporter.event("message", f"{count:,} {message}", {"count": count}, level="warning")

    def _summary(self, tally: Tally) -> dict[str, Any]:
        """The headline names no label: it also goes out by webhook."""
        labelled = tally.rows - tally.empty - tally.abstained
        left = [
            f"{n:,} {why}"
            for n, why in ((tally.abstained, "under the confidence asked for"), (tally.empty, "without a text"))
            if n
        ]
        headline = f"{labelled:,} of {tally.rows:,} rows labelled" + (f"; {', '.join(left)}" if left else "") + "."
        counts = sorted(tally.labels.items(), key=lambda item: -item[1])
        return {
            "headline": headline, "model_id": self.spec.model, "n_rows": tally.rows, "n_empty": tally.empty,
            "n_abstained": tally.abstained, "n_truncated": tally.truncated, "tokens": tally.tokens,
            "labels": [{"label": label, "count": count} for label, count in counts], "scored_in": tally.precision,
            "seconds": tally.seconds, "rows_per_second": tally.rows / max(tally.seconds, 1e-9),
        }  # fmt: skip
