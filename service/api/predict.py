"""`POST /predict`: what other apps call all day."""

import math
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from service.api.context import Context, Ctx, json_body
from service.api.schemas import PredictIn, PredictionOut, PredictOut, ThresholdOut, UsageOut
from service.core.errors import Conflict, InvalidInput, ModelDamaged
from service.db import catalog
from service.db.models import Model
from service.inference.handle import Scores
from service.inference.wire import ServedModel
from service.ml.calibration import Threshold, threshold_for

router = APIRouter(tags=["predict"])


async def _body(request: Request, ctx: Ctx) -> PredictIn:
    settings = ctx.settings
    # A character is at most 12 bytes of JSON: a pair of \uXXXX.
    longest = settings.predict_max_texts * settings.predict_max_chars * 12 + 65_536
    return await json_body(PredictIn, min(longest, settings.max_upload_bytes))(request)


@router.post("/predict", response_model=PredictOut, openapi_extra={"requestBody": {"content": {
    "application/json": {"schema": {"$ref": "#/components/schemas/PredictIn"}}}, "required": True}})  # fmt: skip
async def predict(ctx: Ctx, body: Annotated[PredictIn, Depends(_body)]) -> PredictOut:
    """Labels for texts, in their order, all from one published version of one model."""
    texts = _checked(ctx, body.all_texts)
    served, labels, calibration = await run_in_threadpool(_find, ctx, body.model)
    threshold = None if body.target_precision is None else _threshold(body.target_precision, calibration)
    least = body.min_confidence
    if threshold is not None:
        least = math.inf if threshold.min_confidence is None else threshold.min_confidence
    scores = await scored(ctx, served, labels, texts)
    return PredictOut(
        model_id=served.id,
        predictions=[_prediction(scores, row, body.top_k, least) for row in range(len(texts))],
        usage=UsageOut(texts=len(texts), tokens=scores.tokens),
        threshold=None if threshold is None else ThresholdOut.model_validate(threshold),
    )


async def scored(ctx: Context, served: ServedModel, labels: list[str], texts: list[str]) -> Scores:
    """The engine's answers, which are held to the labels that were published. Raises as `EngineHandle.predict` does."""
    scores = await ctx.engine.predict(served, texts)
    if list(scores.labels) != labels:
        raise ModelDamaged("The labels in the saved model's manifest are not the ones that were published.")
    return scores


def served_model(model: Model) -> ServedModel:
    return ServedModel(model.id, model.base_model, model.base_revision, model.storage_prefix, tuple(model.files))


def _checked(ctx: Context, texts: list[str]) -> list[str]:
    most, longest = ctx.settings.predict_max_texts, ctx.settings.predict_max_chars
    if len(texts) > most:
        raise InvalidInput(f"Expected 1 to {most} texts a call, found {len(texts)}. Split them over several calls.")
    errors = [{"loc": ["texts", i], "message": f"expected 1 to {longest} characters"}
              for i, text in enumerate(texts) if not 0 < len(text) <= longest]  # fmt: skip
    if errors:
        raise InvalidInput(
            f"A text must have 1 to {longest} characters; see `errors` for those that do not.", errors=errors[:50]
        )
    return texts


def _find(ctx: Context, id_or_alias: str) -> tuple[ServedModel, list[str], dict[str, Any] | None]:
    with ctx.db.read() as session:
        model = catalog.find_model(session, id_or_alias)
    return served_model(model), model.labels, model.calibration


def _threshold(target_precision: float, calibration: dict[str, Any] | None) -> Threshold:
    if calibration is None:
        raise Conflict(
            "This model was published before thresholds were kept, so target_precision cannot be looked up. Train it "
            "again, or give min_confidence."
        )
    return threshold_for(target_precision, calibration)


def _prediction(scores: Scores, row: int, top_k: int, min_confidence: float) -> PredictionOut:
    probabilities = scores.probabilities[row]
    # Equal probabilities stand in the order of the labels' ids.
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])[:top_k]
    confidence = probabilities[order[0]]
    abstained = confidence < min_confidence
    return PredictionOut(
        label=None if abstained else scores.labels[order[0]],
        confidence=confidence,
        probabilities={scores.labels[i]: probabilities[i] for i in order},
        abstained=abstained,
        truncated=scores.truncated[row],
    )
