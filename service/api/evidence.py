"""What a job's verdict rests on, row by row; and jobs beside each other."""

import contextlib
import csv
import io
import json
from collections.abc import Generator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query
from numpy.typing import NDArray

from service.api.context import Context, Ctx, Limit
from service.api.jobs import artifact_of
from service.api.schemas import ComparedMethodOut, ComparedSplitOut, CompareOut, FlipOut, Page
from service.core.errors import Conflict, InvalidInput, NotFound
from service.db import jobs as queue
from service.db.models import Artifact
from service.ml.evidence import Ids, PairedComparison, beats, compare, holm, same_texts, withhold
from service.ml.table import CELL_LIMIT

router = APIRouter(tags=["evidence"])
MAX_COMPARED = 10
Method = Annotated[str | None, Query(max_length=64)]


@dataclass(frozen=True)
class Entrant:
    """One job's method, on the N test rows of its job.

    Args:
        name: `job_id/method`.
        figures: Its line in the job's summary.
        dataset: sha256 of the dataset's bytes.
        split: What made the test rows, and the sha256 of split.csv.
        labels: All of the dataset's, by id.
        true_ids: `(N,)`.
        ids: `(N,)` answers; -1 is none.
        text_ids: `(N,)`, equal where the texts are.
        asked: `(N,)`, the rows the method was run on.
    """

    name: str
    figures: ComparedMethodOut
    dataset: str
    split: ComparedSplitOut
    labels: list[str]
    true_ids: Ids
    ids: Ids
    text_ids: Ids
    asked: NDArray[np.bool_]


@router.get("/jobs/{job_id}/flips", response_model=Page[FlipOut])
def list_flips(
    ctx: Ctx,
    job_id: str,
    candidate: Method = None,
    baseline: Method = None,
    label: Annotated[str | None, Query(description="The true label.")] = None,
    flip: Literal["fixed", "broken"] | None = None,
    limit: Limit = 50,
    after: Annotated[int, Query(ge=0, le=2**63 - 1, description="The last id seen.")] = 0,
) -> Page[FlipOut]:
    """The rows that one side of a comparison has right and the other wrong: comparison by comparison, by row."""
    asked = {"candidate": candidate, "baseline": baseline, "label": label, "flip": flip}
    with contextlib.closing(records(ctx, artifact_of(ctx, job_id, "flips.csv"))) as lines:
        found = (
            _flip(i, record)
            for i, record in enumerate(lines, 1)
            if i > after and all(value in (None, record[name]) for name, value in asked.items())
        )
        data = list(islice(found, limit + 1))
    return Page(data=data[:limit], has_more=len(data) > limit)


@router.get("/compare", response_model=CompareOut)
def compare_jobs(
    ctx: Ctx,
    jobs: Annotated[
        str,
        Query(max_length=2000, description="2 to 10, by comma: `job_id`, or `job_id/method` for one of its methods."),
    ],
) -> CompareOut:
    """Each later job's method against the first's, on the same rows of one split; Holm over all of them.

    Where no method is named, it is `lora` if the job trained it, else the one the job recommends.
    """
    names = jobs.split(",")
    if not 2 <= len(set(names)) == len(names) <= MAX_COMPARED:
        raise _expected_different(f"found {len(names)}, {len(set(names))} of them different")
    entrants = [_entrant(ctx, name) for name in names]
    if len({entrant.name for entrant in entrants}) < len(names):
        raise _expected_different("found one twice, by its name and as its job's own choice")
    first, *others = entrants
    for other in others:
        _refuse_other_rows(first, other)
    comparison = holm([_compare(other, first) for other in others])
    unproven = {
        e.name
        for e in entrants
        if not (e.name.endswith("/majority") or beats(e.true_ids[e.asked], e.ids[e.asked], None, e.text_ids[e.asked]))
    }
    return CompareOut(
        dataset_sha256=first.dataset, split=first.split, methods={e.name: e.figures for e in (first, *others)},
        comparison=withhold(comparison, unproven),
    )  # fmt: skip


def _expected_different(found: str) -> InvalidInput:
    return InvalidInput(
        f"Expected 2 to {MAX_COMPARED} different jobs by comma, like ?jobs=job_a,job_b; {found}.",
        errors=[{"loc": ["jobs"], "message": f"expected 2 to {MAX_COMPARED} different jobs"}],
    )


def _compare(candidate: Entrant, baseline: Entrant) -> PairedComparison:
    rows = candidate.asked & baseline.asked
    if not rows.any():
        raise Conflict(f"{candidate.name} and {baseline.name} were run on no row in common.")
    return compare(
        candidate.name, baseline.name, "test" if rows.all() else "baseline_subset", baseline.true_ids[rows],
        candidate.ids[rows], baseline.ids[rows], len(baseline.labels), baseline.split.seed,
        text_ids=baseline.text_ids[rows],
    )  # fmt: skip


def _refuse_other_rows(first: Entrant, other: Entrant) -> None:
    """Raises Conflict where the two were not judged on the same rows."""
    ours, theirs = first.split, other.split
    if first.dataset != other.dataset:
        reason = "they ran on different datasets"
    elif ours.sha256 != theirs.sha256:
        made = [f"{split.algorithm} with seed {split.seed}" for split in (ours, theirs)]
        how = f"{made[0]} and {made[1]}" if made[0] != made[1] else "other shares, columns or dropped labels"
        reason = f"their splits differ ({how})"
    elif first.labels != other.labels or not np.array_equal(first.true_ids, other.true_ids):
        reason = "their labels differ (another label column)"
    else:
        return
    raise Conflict(
        f"{other.name} cannot be compared with {first.name}: {reason}. Only answers to the same rows are compared; run "
        "both with the same file, columns, `split` and `seed`."
    )


def _entrant(ctx: Context, name: str) -> Entrant:
    """Raises NotFound, Conflict where the job has not succeeded or its predictions are gone, InvalidInput."""
    job_id, _, method = name.partition("/")
    with ctx.db.read() as session:
        job = queue.get(session, job_id)
        status, summary = job.status, job.summary
    if status != "succeeded" or summary is None:
        raise Conflict(f"{job_id} is {status}; only jobs that succeeded can be compared.")
    if "methods" not in summary:
        raise Conflict(f"{job_id} labelled a file; only jobs that ran methods on test rows can be compared.")
    method = method or ("lora" if "lora" in summary["methods"] else summary["recommendation"]["method"])
    if method not in summary["methods"]:
        raise InvalidInput(f"{job_id} ran no such method; it ran {', '.join(summary['methods'])}.")
    try:
        files = {file: artifact_of(ctx, job_id, file) for file in ("metrics.json", "split.csv", "predictions.csv")}
        metrics: dict[str, Any] = json.loads(b"".join(ctx.storage.chunks(files["metrics.json"].storage_key)))
        with contextlib.closing(records(ctx, files["predictions.csv"])) as lines:
            rows = [
                (row["label"], row[method], row["text"], row["in_baseline_subset"] == "1")
                for row in lines
                if row["split"] == "test"
            ]
    except (NotFound, FileNotFoundError):
        raise Conflict(f"{job_id} has no predictions any more; they went with its dataset.") from None
    labels: list[str] = metrics["labels"]
    number = {label: i for i, label in enumerate(labels)} | {"": -1}
    true, given, texts, in_subset = zip(*rows, strict=True)
    figures = ComparedMethodOut(**summary["methods"][method])
    split = ComparedSplitOut(
        algorithm=metrics["split"]["algorithm"], seed=metrics["split"]["seed"], sha256=files["split.csv"].sha256
    )
    return Entrant(
        f"{job_id}/{method}", figures, metrics["dataset"]["sha256"], split, labels,
        np.array([number[label] for label in true]), np.array([number[label] for label in given]), same_texts(texts),
        np.array(in_subset) | (figures.on == "test"),
    )  # fmt: skip


def _flip(i: int, record: dict[str, str]) -> FlipOut:
    answers = {side: record[side] or None for side in ("candidate_answer", "baseline_answer")}
    return FlipOut.model_validate(record | {"id": i} | answers)


def records(ctx: Context, artifact: Artifact) -> Generator[dict[str, str], None, None]:
    """The rows of a CSV as a stream. Raises NotFound where its bytes are gone."""
    csv.field_size_limit(CELL_LIMIT)
    try:
        stream = ctx.storage.open(artifact.storage_key)
    except FileNotFoundError:
        raise NotFound("The file has just been deleted.") from None
    with io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
        yield from csv.DictReader(text)
