"""Jobs: start, follow, cancel, and what they leave."""

import asyncio
import contextlib
import re
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from service.api.context import Context, Ctx, Limit, after, json_body, parse_json, takes
from service.api.datasets import UPLOAD_FIELDS, read_form, store, upload_form
from service.api.idempotency import IdempotencyKey, answer_once, form_content, json_content, respond
from service.api.schemas import ArtifactOut, DatasetForm, JobOut, Page, ProgressOut
from service.api.spreadsheet import inert_csv
from service.core.endpoints import endpoint_name
from service.core.errors import InvalidData, InvalidInput, NotFound, UnknownBaseModel
from service.core.spec import ENDPOINT_PREFIX, JobSpec, Kind
from service.core.webhooks import host_of, refuse_webhook
from service.db import catalog, jobs
from service.db.idempotency import Answer, Claim, keep
from service.db.models import Artifact, Dataset, Job
from service.ml.base_models import EMBEDDED, allowed_models, find_base

router = APIRouter(tags=["jobs"])
Status = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
_MAX_SPEC_BYTES = 1 << 20
_SECONDS_BETWEEN_LOOKS = 0.25
_LINK_SECONDS = 900
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
_TYPES = {
    ".json": "application/json", ".csv": "text/csv; charset=utf-8", ".html": "text/html; charset=utf-8",
    ".jsonl": "application/jsonl", ".txt": "text/plain; charset=utf-8", ".md": "text/markdown; charset=utf-8",
}  # fmt: skip
# The report is our own page, but it shows other people's texts: it may load and run nothing.
_PAGE_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"}


@router.post("/jobs", status_code=202, response_model=JobOut, openapi_extra=takes(json="JobSpec", form="JobUpload"))
async def create_job(request: Request, ctx: Ctx, key: IdempotencyKey = None) -> Response:
    """Start a job: JSON that names a dataset, or one multipart call with the CSV itself."""
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        if key is None:  # what was accepted under one is answered again
            await run_in_threadpool(_refuse_on_full_queue, ctx)
        async with read_form(request, ctx, ("spec", *UPLOAD_FIELDS)) as (upload, fields):
            sent = dict(fields)
            spec = parse_json(JobSpec, fields.pop("spec", "{}"))
            form = upload_form(fields)
            make = partial(_start_on_upload, ctx, upload, form, spec)
            return respond(await answer_once(request, ctx, key, lambda: form_content(sent, upload.file), make))
    spec = await json_body(JobSpec, _MAX_SPEC_BYTES)(request)
    return respond(await answer_once(request, ctx, key, lambda: json_content(spec), partial(_start, ctx, spec)))


@router.get("/jobs", response_model=Page[JobOut])
def list_jobs(
    ctx: Ctx,
    limit: Limit = 50,
    after: after("job") = None,  # type: ignore[valid-type]
    status: Status | None = None,
    kind: Kind | None = None,
    dataset_id: Annotated[str | None, Query(max_length=64)] = None,
) -> Page[JobOut]:
    asked = ((Job.status, status), (Job.kind, kind), (Job.dataset_id, dataset_id))
    where = [column == value for column, value in asked if value is not None]
    with ctx.db.read() as session:
        rows, more = catalog.newest(session, Job, limit, after, where)
        return Page(data=[_job_out(session, row) for row in rows], has_more=more)


@router.get("/jobs/{job_id}", response_model=JobOut)
def get_job(ctx: Ctx, job_id: str) -> JobOut:
    with ctx.db.read() as session:
        return _job_out(session, jobs.get(session, job_id))


@router.get("/jobs/{job_id}/wait", response_model=JobOut)
async def wait_for_job(
    request: Request, ctx: Ctx, job_id: str, timeout_seconds: Annotated[float, Query(ge=0, le=60)] = 30.0
) -> JobOut:
    """Answers as soon as the job's status or stage changes, it has ended, or the time is over.

    A server that stops does not wait for it either.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_seconds
    first = job = await run_in_threadpool(get_job, ctx, job_id)
    if job.terminal:
        return job
    with ctx.streams.hold():
        while not job.terminal and (job.status, job.stage) == (first.status, first.stage):
            left = deadline - loop.time()
            if left <= 0 or await request.is_disconnected() or await ctx.pause(min(_SECONDS_BETWEEN_LOOKS, left)):
                break
            job = await run_in_threadpool(get_job, ctx, job_id)
    return job


@router.post("/jobs/{job_id}/cancel", status_code=202, response_model=JobOut)
def cancel_job(ctx: Ctx, job_id: str) -> JobOut:
    with ctx.db.write() as session:
        return _job_out(session, jobs.cancel(session, job_id, ctx.clock()))


@router.post("/jobs/{job_id}/retry", status_code=202, response_model=JobOut)
def retry_job(ctx: Ctx, job_id: str) -> JobOut:
    """A failed or cancelled job goes on from its last checkpoint."""
    ctx.refuse_on_low_disk()
    with ctx.db.write() as session:
        jobs.refuse_on_full_queue(session, ctx.settings.max_queued_jobs)
        return _job_out(session, jobs.retry(session, job_id, ctx.clock()))


@router.delete("/jobs/{job_id}", status_code=204)
def delete_job(ctx: Ctx, job_id: str) -> Response:
    """The job, its events and artifacts; its models stay."""
    with ctx.db.write() as session:
        jobs.remove(session, job_id, ctx.clock(), ctx.grace)
    return Response(status_code=204)


@router.get("/jobs/{job_id}/report", response_class=Response)
def get_report(request: Request, ctx: Ctx, job_id: str) -> Response:
    """The report, as a page."""
    return get_artifact(request, ctx, job_id, "report.html")


@router.get("/jobs/{job_id}/artifacts/{name:path}", response_class=Response)
def get_artifact(
    request: Request, ctx: Ctx, job_id: str, name: str, safe: Literal["spreadsheet"] | None = None,
    redirect: Annotated[bool, Query(description="Where the storage signs links, answer with one (307).")] = False,
) -> Response:  # fmt: skip
    """One file, or a range of its bytes; a CSV also with no cell that a spreadsheet would take for a formula."""
    artifact = artifact_of(ctx, job_id, name)
    headers = {"Accept-Ranges": "bytes", "ETag": f'"{artifact.sha256}"', **_PAGE_HEADERS}
    suffix = "." + name.rpartition(".")[2]
    media_type = _TYPES.get(suffix, "application/octet-stream")
    if safe is not None:
        return _inert(ctx, artifact, suffix, media_type)
    if redirect and (link := _link(ctx, artifact, media_type)) is not None:
        return RedirectResponse(link, headers={"Cache-Control": "no-store"})
    start, size, status = 0, artifact.size_bytes, 200
    asked = request.headers.get("range")
    if asked is not None and request.headers.get("if-range", headers["ETag"]) == headers["ETag"]:
        found = _range(asked, artifact.size_bytes)
        if found is not None:
            start, size, status = found[0], found[1], 206
            headers["Content-Range"] = f"bytes {start}-{start + size - 1}/{artifact.size_bytes}"
    headers["Content-Length"] = str(size)
    try:
        chunks = ctx.storage.chunks(artifact.storage_key, start, size)
    except FileNotFoundError:
        raise NotFound("The file has just been deleted.") from None
    return StreamingResponse(chunks, status, headers, media_type)


def _link(ctx: Context, artifact: Artifact, media_type: str) -> str | None:
    """It opens the file to whoever has it, so for a short while; a report's page is saved, not shown as the store's."""
    name = artifact.name.rpartition("/")[2]
    saved = {"ResponseContentType": media_type, "ResponseContentDisposition": f'attachment; filename="{name}"'}
    return ctx.storage.link(artifact.storage_key, _LINK_SECONDS, **saved)


def _inert(ctx: Context, artifact: Artifact, suffix: str, media_type: str) -> Response:
    """Raises InvalidInput where it is no CSV, NotFound."""
    if suffix != ".csv":
        raise InvalidInput("Only a CSV has a form for spreadsheets. Leave out `safe`.")
    try:
        stream = ctx.storage.open(artifact.storage_key)
    except FileNotFoundError:
        raise NotFound("The file has just been deleted.") from None
    return StreamingResponse(inert_csv(stream), headers=_PAGE_HEADERS, media_type=media_type)


def check_spec(ctx: Context, spec: JobSpec) -> None:
    """What can be refused before anything is stored. Raises InvalidInput, NotFound."""
    if misplaced := spec.misplaced():
        raise InvalidInput(
            f"A job of kind {spec.kind!r} takes no {', '.join(misplaced)}. Leave out what is listed, or name another "
            "kind.",
            errors=[{"loc": [name], "message": f"not for kind {spec.kind!r}"} for name in misplaced],
        )
    if spec.webhook_url is not None:
        refuse_webhook(spec.webhook_url, ctx.settings.webhook_origins)
    if spec.kind == "predict":
        _refuse_unknown_model(ctx, spec.model)
        return
    models_dir = ctx.settings.models_dir
    base = find_base(EMBEDDED if spec.base_model == "auto" else spec.base_model, models_dir)
    if (endpoint := endpoint_name(spec.baseline.prompt_model)) is not None:
        _refuse_unknown_endpoint(ctx, endpoint)
    elif spec.baseline.prompt_model != "auto":
        _refuse_unknown_prompt_model(ctx, spec.baseline.prompt_model)
    if spec.train.max_length > base.max_length:
        hint = "" if spec.base_model != "auto" else " ('auto' may take it; name another base model to go beyond)"
        raise InvalidInput(
            f"train.max_length must be 8 to {base.max_length} for base model {base.name!r}{hint}.",
            errors=[{"loc": ["train", "max_length"], "message": f"expected 8 to {base.max_length}"}],
        )


def _refuse_unknown_endpoint(ctx: Context, name: str) -> None:
    configured = ctx.settings.prompt_endpoints
    if name not in configured:
        known = ", ".join(f"'{ENDPOINT_PREFIX}{known}'" for known in configured)
        raise InvalidInput(
            f"baseline.prompt_model names a remote endpoint that is not configured. Configured are: {known or 'none'}. "
            "The operator adds one in TUNEPROOF_PROMPT_ENDPOINTS.",
            errors=[{"loc": ["baseline", "prompt_model"], "message": f"expected one of: {known or '(none)'}"}],
        )


def _refuse_unknown_model(ctx: Context, id_or_alias: str | None) -> None:
    if id_or_alias is None:
        raise InvalidInput(
            "A job of kind 'predict' needs `model`, the id or an alias of a published model. List them with "
            "GET /models and GET /aliases.",
            errors=[{"loc": ["model"], "message": "missing"}],
        )
    with ctx.db.read() as session:
        catalog.find_model(session, id_or_alias)


def _text_column_of(ctx: Context, id_or_alias: str) -> str | None:
    """The name of the column that a model learned from; None where it had none, or its job or its dataset is gone."""
    with ctx.db.read() as session, contextlib.suppress(NotFound):
        job = jobs.get(session, catalog.find_model(session, id_or_alias).job_id)
        learned: dict[str, Any] = catalog.get_dataset(session, job.dataset_id).profile["format"]
        return learned["text_column"] if learned["has_header"] else None
    return None


def _refuse_unknown_prompt_model(ctx: Context, name: str) -> None:
    known = [base.name for base in allowed_models(ctx.settings.models_dir).values() if base.generative]
    if name not in known:
        known += [ENDPOINT_PREFIX + endpoint for endpoint in ctx.settings.prompt_endpoints]
        raise UnknownBaseModel(
            f"Prompt model {name!r} is none that can be prompted here. Use 'auto' or one of: {', '.join(known)}.",
            errors=[{"loc": ["baseline", "prompt_model"], "message": "not a generative model on the allow-list"}],
        )


def refuse_unlabelled(spec: JobSpec, *, labelled: bool) -> None:
    if not labelled and spec.kind != "predict":
        raise InvalidData(
            f"A job of kind '{spec.kind}' needs labels, and this dataset was uploaded without. Upload it again with "
            "labelled=true."
        )


def _start_on_upload(ctx: Context, upload: UploadFile, form: DatasetForm, spec: JobSpec, claim: Claim) -> Answer:
    """The file's dataset and the job, in one transaction: where the job is refused, nothing stays."""
    if spec.dataset_id is not None:
        raise InvalidInput("Send either `file` or `dataset_id`, not both.")
    check_spec(ctx, spec)
    if spec.kind == "predict" and "labelled" not in form.model_fields_set:
        form = form.model_copy(update={"labelled": False})
    refuse_unlabelled(spec, labelled=form.labelled)
    learned = _text_column_of(ctx, spec.model) if spec.model is not None else None
    return store(
        ctx, upload, form, lambda session, dataset: _submit(ctx, session, dataset, spec, claim), usual_text=learned
    )


def _refuse_on_full_queue(ctx: Context) -> None:
    with ctx.db.read() as session:
        jobs.refuse_on_full_queue(session, ctx.settings.max_queued_jobs)


def _start(ctx: Context, spec: JobSpec, claim: Claim) -> Answer:
    ctx.refuse_on_low_disk()
    if spec.dataset_id is None:
        raise InvalidInput(
            "A JSON job needs `dataset_id`; to send the CSV with the job, use multipart/form-data with `file`.",
            errors=[{"loc": ["dataset_id"], "message": "missing"}],
        )
    check_spec(ctx, spec)
    with ctx.db.write() as session:
        return _submit(ctx, session, catalog.get_dataset(session, spec.dataset_id), spec, claim)


def _submit(ctx: Context, session: Session, dataset: Dataset, spec: JobSpec, claim: Claim) -> Answer:
    refuse_unlabelled(spec, labelled=bool(dataset.profile["labels"]))
    _refuse_unknown_labels(spec, {label["label"] for label in dataset.profile["labels"]})
    kept = spec.kept() | {"name": spec.name or dataset.name}
    jobs.refuse_on_full_queue(session, ctx.settings.max_queued_jobs)
    model_id = None
    if spec.model is not None:  # the one an alias points to now, and which stays until the job has ended
        kept["model"] = model_id = catalog.find_model(session, spec.model, lock=True).id
    job = jobs.submit(
        session, kind=spec.kind, name=kept["name"], dataset_id=dataset.id, metadata=spec.metadata, now=ctx.clock(),
        spec=kept, webhook_url=spec.webhook_url, model_id=model_id,
    )  # fmt: skip
    return keep(session, claim, 202, _job_out(session, job).model_dump(mode="json"), f"/jobs/{job.id}")


def _refuse_unknown_labels(spec: JobSpec, labels: set[str]) -> None:
    unknown = sorted(spec.baseline.label_descriptions.keys() - labels)
    if unknown:
        raise InvalidInput(
            f"baseline.label_descriptions describes {len(unknown)} labels that the dataset does not have. Spell them "
            "as the dataset does; GET /datasets/{id} lists them.",
            errors=[
                {"loc": ["baseline", "label_descriptions", label], "message": "no such label"} for label in unknown[:50]
            ],
        )


def artifact_of(ctx: Context, job_id: str, name: str) -> Artifact:
    with ctx.db.read() as session:
        jobs.get(session, job_id)
        artifact = session.get(Artifact, (job_id, name))
    if artifact is None:
        raise NotFound("The job has no artifact of that name. GET /jobs/{id} lists them; they appear when it succeeds.")
    return artifact


def _job_out(session: Session, job: Job) -> JobOut:
    found = session.scalars(select(Artifact).where(Artifact.job_id == job.id).order_by(Artifact.name))
    artifacts = [
        ArtifactOut(
            name=a.name, size_bytes=a.size_bytes, sha256=a.sha256, url=f"/jobs/{job.id}/artifacts/{a.name}"
        )
        for a in found
    ]  # fmt: skip
    progress = ProgressOut(fraction=job.progress_fraction, message=job.progress_message, eta_seconds=job.eta_seconds)
    same = ("id", "kind", "name", "status", "stage", "attempt", "created_at", "started_at", "finished_at", "dataset_id",
            "model_id", "spec", "error", "summary")  # fmt: skip
    values: dict[str, Any] = {key: getattr(job, key) for key in same}
    return JobOut(
        **values, terminal=job.status in jobs.TERMINAL, progress=progress, metadata=job.job_metadata,
        artifacts=artifacts, webhook_host=None if job.webhook_url is None else host_of(job.webhook_url),
    )  # fmt: skip


def _range(asked: str, size: int) -> tuple[int, int] | None:
    """`(start, length)` of a single range; None for what is to be answered whole. Raises 416."""
    match = _RANGE.fullmatch(asked.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first:
        start, stop = int(first), min(int(last) + 1 if last else size, size)
        if last and int(last) < start:
            return None
    else:
        start, stop = max(0, size - int(last)), size
    if start >= stop:
        raise HTTPException(416, f"The file has {size} bytes; ask for some.", {"Content-Range": f"bytes */{size}"})
    return start, stop - start
