"""What can be told of a dataset before any compute."""

import contextlib
import json
import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from service.api.context import Context, Ctx
from service.api.jobs import check_spec, refuse_unlabelled
from service.api.schemas import WarningOut
from service.core.errors import ModelUnavailable, NotFound, OutOfMemory, QueueFull
from service.core.spec import MAX_SEED, JobSpec, SplitSpec, TrainSpec
from service.db import catalog
from service.db.models import Artifact, Job
from service.ml.base_models import EMBEDDED, find_base, locate
from service.ml.dataset import TableFormat
from service.ml.eta import KNOWN, Estimate, Speed, estimates, measured_speed
from service.ml.preflight import NearDuplicates, Preflight, Truncation, look
from service.ml.split import Part
from service.storage import Storage, StoredText

router = APIRouter(tags=["datasets"])
_one_at_a_time = threading.Lock()


class PreflightIn(SplitSpec):
    """The values of a job that its split and its tokens depend on."""

    model_config = ConfigDict(strict=False)

    base_model: Annotated[str, Field(min_length=1, max_length=200)] = "auto"
    max_length: Annotated[int, Field(ge=8)] = 192
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 42

    def spec(self) -> JobSpec:
        split = SplitSpec(train=self.train, validation=self.validation, test=self.test)
        return JobSpec(
            base_model=self.base_model, seed=self.seed, split=split, train=TrainSpec(max_length=self.max_length)
        )


class SplitSizesOut(BaseModel):
    algorithm: str
    seed: int
    n_train: int
    n_validation: int
    n_test: int


class PreflightOut(BaseModel):
    """`warnings` are those of the upload and what the split adds to them; `eta` is by method."""

    dataset_id: str
    split: SplitSizesOut
    warnings: list[WarningOut]
    near_duplicates: NearDuplicates
    truncation: Truncation | None
    eta: dict[str, Estimate]


@router.get("/datasets/{dataset_id}/preflight", response_model=PreflightOut)
def preflight(ctx: Ctx, dataset_id: str, asked: Annotated[PreflightIn, Query()]) -> PreflightOut:
    """What a job with these values would meet: near-duplicates across its split, texts cut short, how long it takes."""
    spec = asked.spec()
    check_spec(ctx, spec)
    with ctx.db.read() as session:
        dataset = catalog.get_dataset(session, dataset_id)
    refuse_unlabelled(spec, labelled=bool(dataset.profile["labels"]))
    base_model = EMBEDDED if asked.base_model == "auto" else asked.base_model
    found = _look(
        ctx.storage, dataset.storage_key, TableFormat(**dataset.profile["format"]), (*spec.split.model_dump().items(),),
        asked.seed, base_model, _folder(ctx, base_model), asked.max_length,
    )  # fmt: skip
    sizes = {f"n_{part}": n for part, n in found.work.rows.items()}
    return PreflightOut(
        dataset_id=dataset_id,
        split=SplitSizesOut(algorithm=found.algorithm, seed=asked.seed, **sizes),
        warnings=[WarningOut(**warning) for warning in (*dataset.profile["warnings"], *map(asdict, found.warnings))],
        near_duplicates=found.near_duplicates,
        truncation=found.truncation,
        eta=estimates(found.work, _speed(ctx, base_model)),
    )


@lru_cache(maxsize=64)
def _look(
    storage: Storage, key: str, table_format: TableFormat, shares: tuple[tuple[Part, float], ...], *more: Any
) -> Preflight:
    """Kept, since the same values find the same: a result's page asks for what the start page has asked for."""
    return _look_in_a_process_of_its_own(StoredText(storage, key), table_format, dict(shares), *more)


def _look_in_a_process_of_its_own(*arguments: Any) -> Preflight:
    """`look`, which imports what training imports and may need much memory: one at a time."""
    if not _one_at_a_time.acquire(blocking=False):
        raise QueueFull("Another preflight is under way, and they go one at a time. Ask again in a moment.")
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            return process.submit(look, *arguments).result()
    except FileNotFoundError:
        raise NotFound("The dataset has just been deleted.") from None
    except (BrokenProcessPool, MemoryError):
        raise OutOfMemory("The preflight was lost, most likely for want of memory. Free some, or ask again.") from None
    finally:
        _one_at_a_time.release()


def _folder(ctx: Context, base_model: str) -> Path | None:
    try:
        return locate(find_base(base_model, ctx.settings.models_dir), download=False).folder
    except ModelUnavailable:
        return None


def _speed(ctx: Context, base_model: str) -> Speed | None:
    """As the newest finished job on the same base model had it, else what is known without one."""
    newest = (
        select(Job.id, Artifact.storage_key)
        .join(Artifact, Artifact.job_id == Job.id)
        .where(Job.status == "succeeded", Job.kind.in_(("experiment", "train")), Artifact.name == "metrics.json")
        .where(Job.spec["base_model"].as_string() == base_model)
        .order_by(Job.finished_at.desc())
        .limit(1)
    )
    with ctx.db.read() as session:
        found = session.execute(newest).one_or_none()
    measured = None
    if found is not None:
        with contextlib.suppress(FileNotFoundError):  # the job has just been deleted
            measured = measured_speed(json.loads(b"".join(ctx.storage.chunks(found.storage_key))), found.id)
    return measured or KNOWN.get(base_model)
