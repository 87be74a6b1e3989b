"""Published models."""

import tempfile
import zipfile
from collections.abc import Iterator
from typing import IO

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse
from sqlalchemy.orm import Session

from service.api.context import Ctx, Limit, after
from service.api.schemas import BaseModelOut, BaseModelsOut, ModelOut, Page
from service.core.errors import NotFound
from service.core.spec import ENDPOINT_PREFIX
from service.db import catalog
from service.db.models import Model
from service.ml.base_models import PROMPT_DEFAULT, allowed_models, is_at_hand

router = APIRouter(tags=["models"])


_IN_MEMORY = 16 << 20


@router.get("/models", response_model=Page[ModelOut])
def list_models(ctx: Ctx, limit: Limit = 50, after: after("mdl") = None) -> Page[ModelOut]:  # type: ignore[valid-type]
    with ctx.db.read() as session:
        rows, more = catalog.newest(session, Model, limit, after)
        return Page(data=_models_out(session, rows), has_more=more)


@router.get("/models/{model_id}", response_model=ModelOut)
def get_model(ctx: Ctx, model_id: str) -> ModelOut:
    """An alias stands for the model that it points to, here and at its download."""
    with ctx.db.read() as session:
        return _models_out(session, [catalog.find_model(session, model_id)])[0]


@router.get("/models/{model_id}/download", response_class=Response)
def download_model(ctx: Ctx, model_id: str) -> Response:
    """The model's folder as a zip."""
    with ctx.db.read() as session:
        model = catalog.find_model(session, model_id)
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


@router.get("/base-models", response_model=BaseModelsOut)
def list_base_models(ctx: Ctx) -> BaseModelsOut:
    """What a job may name, and what of it is at hand; the rest is fetched when a job asks for it."""
    data = [
        BaseModelOut(name=base.name, max_length=base.max_length, generative=base.generative, at_hand=is_at_hand(base))
        for base in allowed_models(ctx.settings.models_dir).values()
    ]
    prompted = next((base.name for base in data if base.name == PROMPT_DEFAULT and base.at_hand), None)
    endpoints = [ENDPOINT_PREFIX + name for name in ctx.settings.prompt_endpoints]
    return BaseModelsOut(data=data, has_more=False, auto_prompt_model=prompted, prompt_endpoints=endpoints)


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
