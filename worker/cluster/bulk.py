"""A file labelled by actors on a Ray cluster, each with an engine of its own.

Ray Data takes the blocks to them and brings their lines back in order, on another actor where one was lost. What is
kept is as on one machine: parts, written here, in the order of the file, each row once.
"""

import contextlib
import json
import logging
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask, read_datasource
from ray.data.block import BlockMetadata
from ray.exceptions import RayError

from service.core import logs
from service.core.errors import AppError, OutOfMemory
from service.ml.dataset import Row, TableFormat
from worker.bulk import Labeller, Parts, Tally, blocks_of
from worker.cluster.nodes import Cluster

_SAYS_SO_SECONDS = 10.0
log = logging.getLogger("tuneproof.worker")


def label_on_actors(
    cluster: dict[str, Any], model: Sequence[Any], file: Path, table: TableFormat, parts: Parts,
    on_rows: Callable[[int], None], on_part: Callable[[Path], None], on_wait: Callable[[], None] = lambda: None,
    make: Callable[..., Labeller] = Labeller.load,
) -> None:  # fmt: skip
    """As `worker.bulk.label_here`, by actors on a `cluster`, as JSON has it; `on_wait` is called while none is there.

    What an actor labels with, `make` gives it: `model` is the folder here, and what it is to be loaded with there.
    Raises AppError as an actor did.
    """
    asked = Cluster(**cluster)
    asked.connect()
    context: Any = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # so that each of our blocks is one of Ray's, and moves by itself
    folder, *how = model
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    blocks = read_datasource(
        _Blocks(file, table, parts.tally.rows, "cuda" if asked.gpus else "cpu"),
        override_num_blocks=1, label_selector=here, num_cpus=0,
    )  # fmt: skip
    answers = blocks.map_batches(
        _Scorer, batch_size=1, batch_format="pyarrow", num_cpus=asked.cpus, num_gpus=asked.gpus or None,
        fn_constructor_args=(partial(ray.get, ray.put(files)), partial(_made, make, how)),
        compute=ActorPoolStrategy(min_size=1, max_size=asked.bulk_actors),
    )  # fmt: skip

    def kept(answer: dict[str, Any]) -> bool:
        parts.tally.add(Tally(**json.loads(answer["tally"])))
        return parts.write(answer["lines"].decode())

    there = threading.Event()
    with ThreadPoolExecutor(1) as aside, ThreadPoolExecutor(1) as waiting, contextlib.ExitStack() as held:
        held.callback(there.set)
        waiting.submit(_say_so_until, there, on_wait)
        for answer in answers.iter_rows():
            there.set()
            if answer["error"]:
                raise _told(**json.loads(answer["error"]))
            if aside.submit(kept, answer).result():  # there: a stop reaches this thread alone
                on_part(parts.folder)
            on_rows(parts.tally.rows)
        aside.submit(parts.end).result()


def _say_so_until(there: threading.Event, on_wait: Callable[[], None]) -> None:
    """Actors may wait for places for hours, and whoever says nothing for long is taken for hung."""
    while not there.wait(_SAYS_SO_SECONDS):
        on_wait()


def _made(make: Callable[..., Labeller], how: Sequence[Any], folder: Path) -> Labeller:
    return make(folder, *how)


def _told(code: str, detail: str, hint: str | None) -> AppError:
    error = AppError(detail, hint=hint)
    error.code = code  # type: ignore[misc]
    return error


class _Blocks(Datasource):  # type: ignore[misc]
    """The file's blocks, as they are read: one task that goes through it, where the file lies."""

    def __init__(self, file: Path, table: TableFormat, start: int, device: str) -> None:
        self._given = file, table, start, device

    def estimate_inmemory_data_size(self) -> int:
        return self._given[0].stat().st_size

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        return [ReadTask(partial(_read, *self._given), BlockMetadata(None, None, None, None))]


def _read(file: Path, table: TableFormat, start: int, device: str) -> Iterator[pa.Table]:
    for rows in blocks_of(file, table, start, device):
        block = json.dumps([(row.row_id, row.text) for row in rows]).encode()
        yield pa.table({"block": pa.array([block], pa.large_binary())})


class _Scorer:
    """An engine with the model, in an actor of its own. It is loaded for the first block."""

    def __init__(self, files: Callable[[], dict[str, bytes]], make: Callable[[Path], Labeller]) -> None:
        self._files, self._make = files, make
        self._labeller: Labeller | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [Row(row_id, text, None, None) for row_id, text in json.loads(batch["block"][0].as_py())]
        lines, tally, error = "", Tally(), ""
        try:
            lines, tally = self._loaded().label(rows)
        except (torch.OutOfMemoryError, MemoryError):
            told = {"code": OutOfMemory.code, "detail": "A block of rows does not fit into an actor's memory."}
            error = json.dumps(told | {"hint": "Give each actor more, or a smaller base model."})
        except RayError:
            raise  # Ray sends the block to another actor
        except AppError as found:
            error = json.dumps({"code": found.code, "detail": found.detail, "hint": found.hint})
        except Exception as found:  # noqa: BLE001 -- Ray would log its message, which may quote a text
            log.error("a block could not be labelled\n%s", logs.where(found))
            told = {"code": AppError.code, "detail": "An actor could not label a block of rows."}
            error = json.dumps(told | {"hint": "The log of the actor's node says where."})
        kinds = {"lines": pa.large_binary(), "tally": pa.string(), "error": pa.string()}
        said = {"lines": lines.encode(), "tally": json.dumps(asdict(tally)), "error": error}
        return pa.table({name: pa.array([said[name]], kind) for name, kind in kinds.items()})

    def _loaded(self) -> Labeller:
        if self._labeller is None:
            with tempfile.TemporaryDirectory() as folder:
                for name, content in self._files().items():
                    (Path(folder) / name).write_bytes(content)
                self._labeller = self._make(Path(folder))
        return self._labeller
