"""`POST /predict`: what other apps call all day."""

import math
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from service.api.context import Context, Ctx, json_body, takes, unless_gone
from service.api.recent import SECONDS, SECONDS_OF_AN_ID, Found
from service.api.schemas import PredictIn, PredictionOut, PredictOut, ThresholdOut, UsageOut
from service.core.errors import Conflict, InvalidInput, ModelDamaged
from service.db import catalog, tallies
from service.db.models import Model
from service.inference.handle import Scores
from service.inference.wire import ServedModel
from service.ml.calibration import Threshold, threshold_for

router = APIRouter(tags=["predict"])


@router.post("/predict", response_model=PredictOut, openapi_extra=takes(json="PredictIn"))
async def predict(request: Request, ctx: Ctx) -> Response:
    """Labels for texts, in their order, all from one published version of one model."""
    with ctx.predict_bytes.hold(0) as take:
        return await _answered(request, ctx, await json_body(PredictIn, ctx.predict_bytes.most, take)(request))


async def _answered(request: Request, ctx: Context, body: PredictIn) -> Response:
    texts = _checked(ctx, body)
    served, labels, calibration = await _found(ctx, body.model)
    threshold = None if body.target_precision is None else _threshold(body.target_precision, calibration)
    least = body.min_confidence
    if threshold is not None:
        least = math.inf if threshold.min_confidence is None else threshold.min_confidence
    scores = await unless_gone(request, scored(ctx, served, labels, texts))
    answer = PredictOut(
        model_id=served.id,
        predictions=_predictions(scores, body.top_k, least),
        usage=UsageOut(texts=len(texts), tokens=scores.tokens),
        threshold=None if threshold is None else ThresholdOut.model_validate(threshold),
    )
    return Response(answer.model_dump_json(), media_type="application/json")  # checked once, by being made


async def scored(ctx: Context, served: ServedModel, labels: list[str], texts: list[str]) -> Scores:
    """The engine's answers, which are held to the labels that were published. Raises as `EngineHandle.predict` does."""
    scores = await ctx.engine.predict(served, texts)
    if list(scores.labels) != labels:
        raise ModelDamaged("The labels in the saved model's manifest are not the ones that were published.")
    return scores


def served_model(model: Model) -> ServedModel:
    return ServedModel(model.id, model.base_model, model.base_revision, model.storage_prefix, tuple(model.files))


def _checked(ctx: Context, body: PredictIn) -> list[str]:
    texts, most, longest = body.all_texts, ctx.settings.predict_max_texts, ctx.settings.predict_max_chars
    if len(texts) > most:
        raise InvalidInput(f"Expected 1 to {most} texts a call, found {len(texts)}. Split them over several calls.")
    errors = [{"loc": ["text"] if body.texts is None else ["texts", i],
               "message": f"expected 1 to {longest} characters, found {len(text)}"}
              for i, text in enumerate(texts) if not 0 < len(text) <= longest]  # fmt: skip
    if errors:
        raise InvalidInput(
            f"A text must have 1 to {longest} characters; see `errors` for those that do not.", errors=errors[:50]
        )
    return texts


async def _found(ctx: Context, id_or_alias: str) -> tuple[ServedModel, list[str], dict[str, Any] | None]:
    """The one version that answers this call.

    What an id stands for never changes, so it is known until some model is deleted; an alias is looked up each second.
    """

    def deleted() -> int:
        with ctx.db.read() as session:
            return tallies.deleted_models(session)

    def look() -> tuple[ServedModel, list[str], dict[str, Any] | None]:
        with ctx.db.read() as session:
            model = catalog.find_model(session, id_or_alias)
        return served_model(model), model.labels, model.calibration

    name = "model", id_or_alias
    if not id_or_alias.startswith("mdl_"):
        return await _recent(ctx, name, look)
    return await _recent(ctx, name, look, SECONDS_OF_AN_ID, await _recent(ctx, "deleted models", deleted))


async def _recent(
    ctx: Context, name: Hashable, look: Callable[[], Found], seconds: float = SECONDS, stamp: int | None = None
) -> Found:
    held: Found | None = ctx.recent.held(name, stamp)
    return held if held is not None else await run_in_threadpool(ctx.recent.get, name, look, seconds, stamp)


def _threshold(target_precision: float, calibration: dict[str, Any] | None) -> Threshold:
    if calibration is None:
        raise Conflict(
            "This model was published before thresholds were kept, so target_precision cannot be looked up. Train it "
            "again, or give min_confidence."
        )
    return threshold_for(target_precision, calibration)


def _predictions(scores: Scores, top_k: int, min_confidence: float) -> list[PredictionOut]:
    probabilities = np.asarray(scores.probabilities)
    # Equal probabilities stand in the order of the labels' ids.
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    best = np.take_along_axis(probabilities, order, axis=1)
    return [
        PredictionOut(
            label=None if values[0] < min_confidence else scores.labels[ids[0]],
            confidence=values[0],
            probabilities={scores.labels[i]: value for i, value in zip(ids, values, strict=True)},
            abstained=values[0] < min_confidence,
            truncated=truncated,
        )
        for ids, values, truncated in zip(order.tolist(), best.tolist(), scores.truncated, strict=True)
    ]
