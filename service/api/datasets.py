"""Datasets: upload, look, delete."""

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import IO, Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError
from sqlalchemy.orm import Session
from starlette.datastructures import FormData, UploadFile

from service.api.context import Context, Ctx, Limit, after, takes
from service.api.idempotency import IdempotencyKey, answer_once, form_content, respond
from service.api.problems import from_pydantic
from service.api.schemas import DatasetForm, DatasetOut, Page, RowOut
from service.core.errors import InvalidInput, NotFound, TooLarge
from service.core.ids import new_id, new_token
from service.db import catalog, garbage
from service.db.idempotency import Answer, Claim, keep
from service.db.models import Dataset
from service.ml.dataset import TableFormat, UploadOptions, profile, read_rows
from service.storage import StoredText

router = APIRouter(tags=["datasets"])
_CHUNK = 1 << 20
UPLOAD_FIELDS = tuple(DatasetForm.model_fields)
Made = TypeVar("Made")


@router.post("/datasets", status_code=201, response_model=DatasetOut, openapi_extra=takes(form="DatasetUpload"))
async def create_dataset(request: Request, ctx: Ctx, key: IdempotencyKey = None) -> Response:
    """Upload a CSV or TSV; the answer says how it was read and what was found in it."""
    async with read_form(request, ctx, UPLOAD_FIELDS) as (upload, fields):
        form = upload_form(fields)

        def make(claim: Claim) -> Answer:
            def answered(session: Session, dataset: Dataset) -> Answer:
                return keep(session, claim, 201, dataset_out(dataset).model_dump(mode="json"), None)

            return store(ctx, upload, form, answered)

        return respond(await answer_once(request, ctx, key, lambda: form_content(fields, upload.file), make))


@router.get("/datasets", response_model=Page[DatasetOut])
def list_datasets(ctx: Ctx, limit: Limit = 50, after: after("ds") = None) -> Page[DatasetOut]:  # type: ignore[valid-type]
    with ctx.db.read() as session:
        rows, more = catalog.newest(session, Dataset, limit, after)
        return Page(data=[dataset_out(row) for row in rows], has_more=more)


@router.get("/datasets/{dataset_id}", response_model=DatasetOut)
def get_dataset(ctx: Ctx, dataset_id: str) -> DatasetOut:
    with ctx.db.read() as session:
        return dataset_out(catalog.get_dataset(session, dataset_id))


@router.get("/datasets/{dataset_id}/rows", response_model=Page[RowOut])
def preview_rows(
    ctx: Ctx,
    dataset_id: str,
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Page[RowOut]:
    """Rows as they are read, in the order of the file."""
    with ctx.db.read() as session:
        dataset = catalog.get_dataset(session, dataset_id)
    rows = read_rows(StoredText(ctx.storage, dataset.storage_key), TableFormat(**dataset.profile["format"]))
    try:
        asked = list(itertools.islice(rows, offset, offset + limit + 1))
    except FileNotFoundError:
        raise NotFound("The dataset has just been deleted.") from None
    rows.close()  # type: ignore[attr-defined]
    found = [RowOut(row_id=row.row_id, text=row.text, label=row.label) for row in asked]
    return Page(data=found[:limit], has_more=len(found) > limit)


@router.delete("/datasets/{dataset_id}", status_code=204)
def delete_dataset(ctx: Ctx, dataset_id: str) -> Response:
    with ctx.db.write() as session:
        catalog.remove_dataset(session, dataset_id, ctx.clock(), ctx.grace)
    return Response(status_code=204)


@contextlib.asynccontextmanager
async def read_form(
    request: Request, ctx: Context, allowed: tuple[str, ...]
) -> AsyncIterator[tuple[UploadFile, dict[str, str]]]:
    """The file and the other fields of a multipart body; an empty field counts as left out.

    Raises:
        InvalidInput: it is no such body, has no file, or has a field nobody knows.
        QueueFull, LowDisk: there is no room for it now.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise InvalidInput("Expected a multipart/form-data body with the CSV as `file` (curl: -F file=@your.csv).")
    declared = request.headers.get("content-length", "")[:20]
    coming = int(declared) if declared.isdigit() else 0
    ctx.refuse_on_low_disk(coming if coming <= ctx.settings.max_upload_bytes else 0)  # what is too large is told so
    with ctx.uploads.hold():
        async with request.form(max_files=1, max_fields=50, max_part_size=_CHUNK) as form:
            yield _checked(form, allowed)


def _checked(form: FormData, allowed: tuple[str, ...]) -> tuple[UploadFile, dict[str, str]]:
    upload = form.get("file")
    if not isinstance(upload, UploadFile):
        raise InvalidInput(
            "The form has no file. Send the CSV as `file` (curl: -F file=@your.csv).",
            errors=[{"loc": ["file"], "message": "expected a file"}],
        )
    fields = {name: value for name, value in form.multi_items() if name != "file" and isinstance(value, str) and value}
    unknown = sorted(set(fields) - set(allowed))
    if unknown:
        raise InvalidInput(
            f"Unknown form fields. Known are: file, {', '.join(allowed)}.",
            errors=[{"loc": [name], "message": "unknown field"} for name in unknown],
        )
    return upload, fields


def upload_form(fields: dict[str, str]) -> DatasetForm:
    try:
        return DatasetForm.model_validate(fields)
    except ValidationError as error:
        raise from_pydantic(error, DatasetForm) from None


def store(
    ctx: Context, upload: UploadFile, form: DatasetForm, then: Callable[[Session, Dataset], Made], *,
    usual_text: str | None = None,
) -> Made:  # fmt: skip
    """Checks an upload, puts its bytes into the storage, then its row into the database.

    `then` is what else belongs into the row's transaction; what it gives is given. `usual_text` names the column to
    take for the texts where the form names none and the file has it.

    Raises:
        InvalidData, UnsupportedMedia, TooLarge: it cannot be used; nothing of it is kept.
    """
    options = UploadOptions(
        **form.model_dump(exclude={"name"}), max_labels=ctx.settings.max_labels, usual_text=usual_text
    )
    with tempfile.NamedTemporaryFile(dir=ctx.settings.data_dir / "tmp") as file:
        _copy(upload.file, file, ctx.settings.max_upload_bytes)
        found = profile(Path(file.name), options)
        dataset_id = new_id("ds")
        file.seek(0)
        key = f"datasets/{dataset_id}/{new_token()}"
        garbage.announce(ctx.db, key, ctx.clock())
        stored = ctx.storage.put(file, key)
    dataset = Dataset(
        id=dataset_id, name=_name(form, upload), created_at=ctx.clock(), sha256=stored.sha256,
        size_bytes=stored.size_bytes, storage_key=stored.key, profile=asdict(found),
    )  # fmt: skip
    try:
        with ctx.db.write() as session:
            session.add(dataset)
            session.flush()
            garbage.named(session, [key])
            return then(session, dataset)
    except BaseException:  # a commit that seems to have failed may stand: what the row names is not deleted
        garbage.give_up(ctx.db, key, ctx.clock())
        raise


def dataset_out(dataset: Dataset) -> DatasetOut:
    found: dict[str, Any] = dataset.profile
    known = {key: getattr(dataset, key) for key in ("id", "name", "created_at", "sha256", "size_bytes")}
    return DatasetOut.model_validate({"columns": []} | found | found["format"] | known)


def _copy(source: IO[bytes], target: Any, max_bytes: int) -> None:
    if source.seek(0, os.SEEK_END) > max_bytes:
        raise TooLarge(
            f"The file is larger than the {max_bytes} bytes this service takes (TUNEPROOF_MAX_UPLOAD_BYTES)."
        )
    source.seek(0)
    shutil.copyfileobj(source, target, _CHUNK)
    target.flush()


def _name(form: DatasetForm, upload: UploadFile) -> str:
    """As given, else the file's own name without its ending. It is shown, and never part of a path."""
    stem = PurePath((upload.filename or "").replace("\\", "/")).stem
    printable = "".join(char for char in stem if char.isprintable())
    return (form.name or printable or "dataset")[:200]
