"""Published models and the aliases that point to them."""

import tempfile
import zipfile
from collections.abc import Iterator
from typing import IO, Annotated

from fastapi import APIRouter, Depends, Path, Response
from fastapi.responses import StreamingResponse
from pydantic import AfterValidator
from sqlalchemy.orm import Session

from service.api.context import Ctx, Limit, after, json_body
from service.api.schemas import AliasIn, AliasMoveOut, AliasOut, AliasWithHistoryOut, BaseModelOut, ModelOut, Page
from service.core.errors import NotFound
from service.db import catalog
from service.db.models import Model
from service.ml.base_models import allowed_models

router = APIRouter(tags=["models"])


def _no_model_id(alias: str) -> str:
    if alias.startswith("mdl_"):
        raise ValueError("an alias must not look like a model's id (mdl_…)")
    return alias


AliasName = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$"), AfterValidator(_no_model_id)]
_IN_MEMORY = 16 << 20


@router.get("/models", response_model=Page[ModelOut])
def list_models(ctx: Ctx, limit: Limit = 50, after: after("mdl") = None) -> Page[ModelOut]:  # type: ignore[valid-type]
    with ctx.db.read() as session:
        rows, more = catalog.newest(session, Model, limit, after)
        return Page(data=_models_out(session, rows), has_more=more)


@router.get("/models/{model_id}", response_model=ModelOut)
def get_model(ctx: Ctx, model_id: str) -> ModelOut:
    with ctx.db.read() as session:
        return _models_out(session, [catalog.get_model(session, model_id)])[0]


@router.get("/models/{model_id}/download", response_class=Response)
def download_model(ctx: Ctx, model_id: str) -> Response:
    """The model's folder as a zip."""
    with ctx.db.read() as session:
        model = catalog.get_model(session, model_id)
    packed = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 -- closed by the stream
    try:
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in model.files:
                with archive.open(name, "w") as target:
                    for chunk in ctx.storage.chunks(f"{model.storage_prefix}/{name}"):
                        target.write(chunk)
    except FileNotFoundError:
        packed.close()
        raise NotFound("The model has just been deleted.") from None
    size = packed.tell()
    headers = {"Content-Disposition": f'attachment; filename="{model.id}.zip"', "Content-Length": str(size)}
    return StreamingResponse(_drained(packed), media_type="application/zip", headers=headers)


@router.delete("/models/{model_id}", status_code=204)
def delete_model(ctx: Ctx, model_id: str) -> Response:
    with ctx.db.write() as session:
        catalog.remove_model(session, model_id, ctx.clock(), ctx.grace)
    return Response(status_code=204)


@router.get("/base-models", response_model=Page[BaseModelOut])
def list_base_models(ctx: Ctx) -> Page[BaseModelOut]:
    """What a job may name; whether it can be had here is found out when a job asks for it."""
    known = allowed_models(ctx.settings.models_dir).values()
    return Page(data=[BaseModelOut.model_validate(base) for base in known], has_more=False)


@router.get("/aliases", response_model=Page[AliasWithHistoryOut])
def list_aliases(ctx: Ctx) -> Page[AliasWithHistoryOut]:
    """Every alias with where it pointed before, newest first."""
    with ctx.db.read() as session:
        data = [
            AliasWithHistoryOut(
                alias=alias.alias,
                model_id=alias.model_id,
                updated_at=alias.updated_at,
                history=[AliasMoveOut(model_id=move.model_id, created_at=move.created_at) for move in moves],
            )
            for alias, moves in catalog.alias_history(session)
        ]
    return Page(data=data, has_more=False)


@router.put("/aliases/{alias}", response_model=AliasOut, openapi_extra={"requestBody": {"content": {
    "application/json": {"schema": {"$ref": "#/components/schemas/AliasIn"}}}, "required": True}})  # fmt: skip
def put_alias(ctx: Ctx, alias: AliasName, body: Annotated[AliasIn, Depends(json_body(AliasIn, 1 << 16))]) -> AliasOut:
    """Point an alias to a model; every later call of `/predict` sees the new one."""
    with ctx.db.write() as session:
        row = catalog.point_alias(session, alias, body.model_id, ctx.clock())
        return AliasOut(alias=row.alias, model_id=row.model_id, updated_at=row.updated_at)


def _models_out(session: Session, models: list[Model]) -> list[ModelOut]:
    aliases = catalog.aliases_of(session, [model.id for model in models])
    same = ("id", "name", "version", "method", "job_id", "base_model", "base_revision", "labels", "created_at",
            "metrics", "size_bytes")  # fmt: skip
    return [ModelOut(**{key: getattr(model, key) for key in same}, aliases=aliases[model.id]) for model in models]


def _drained(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    with file:
        while chunk := file.read(1 << 20):
            yield chunk
