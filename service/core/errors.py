"""Typed errors. Each carries a stable slug; only the API knows which HTTP status it becomes.

A message says what was expected, what was found and what to do. It may be shown to whoever made the
request, so it never quotes another user's text or a path of the machine.
"""

import errno
from collections.abc import Sequence
from typing import Any, ClassVar

_FULL = "53100"  # PostgreSQL's


def disk_is_full(error: BaseException | None) -> bool:
    """Whether it was, or came of, a full disk or quota; databases and safetensors have errors of their own for that."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        driver_said = getattr(error, "orig", None)
        if (
            getattr(driver_said, "sqlite_errorname", "") == "SQLITE_FULL"
            or getattr(driver_said, "sqlstate", "") == _FULL
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


class AppError(Exception):
    """Something a caller can act on.

    Args:
        detail: What was expected, what was found, what to do.
        errors: One entry per offending field or row: `{"loc": [...]}` or `{"row": n}`, and a `message`.
        hint: What to do next, where it is not the caller's input that is wrong (jobs show it).
        retry_after_seconds: When to ask again, where that is known.
    """

    code: ClassVar[str] = "internal"

    def __init__(
        self, detail: str, *, errors: Sequence[dict[str, Any]] = (), hint: str | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(detail)
        self.detail = detail
        self.errors = list(errors)
        self.hint = hint
        self.retry_after_seconds = retry_after_seconds


# What a caller sent cannot be used ----------------------------------------------------------------
class InvalidInput(AppError):
    """A field, parameter or body is malformed or out of range."""

    code = "invalid_input"


class InvalidData(InvalidInput):
    """The file is text, but not a usable table of texts and labels. `columns` are its own, where they are known."""

    code = "invalid_data"

    def __init__(self, detail: str, *, columns: Sequence[str] = (), **given: Any) -> None:
        super().__init__(detail, **given)
        self.columns = list(columns)


class InvalidEncoding(InvalidData):
    """Bytes that are not the encoding asked for, or an encoding nobody knows."""

    code = "invalid_encoding"


class MalformedRows(InvalidData):
    """Broken quoting, a wrong number of cells, or control characters: one entry per bad row."""

    code = "malformed_rows"


class DuplicateColumns(InvalidData):
    """Two columns have the same name."""

    code = "duplicate_columns"


class ColumnNotFound(InvalidData):
    """A column was asked for that is not there, or none could be recognised."""

    code = "column_not_found"


class NoRows(InvalidData):
    """There is nothing below the header, or nothing usable."""

    code = "no_rows"


class InvalidLabels(InvalidData):
    """A label that cannot be told apart from another, or that breaks the line."""

    code = "invalid_labels"


class TooFewLabels(InvalidData):
    """Fewer than two labels: there is nothing to tell apart."""

    code = "too_few_labels"


class TooManyLabels(InvalidData):
    """More labels than the service allows; most likely the wrong column."""

    code = "too_many_labels"


class RareLabels(InvalidData):
    """A label has too few distinct texts to stand in train, validation and test."""

    code = "rare_labels"


class InvalidSplit(InvalidData):
    """The file's own split names unknown parts or leaves one empty."""

    code = "invalid_split"


class UnknownBaseModel(InvalidInput):
    """A base model that is not on the allow-list."""

    code = "unknown_base_model"


class IdempotencyKeyReused(InvalidInput):
    """An Idempotency-Key that came with another request before."""

    code = "idempotency_key_reused"


class UnsupportedMedia(AppError):
    """The upload is not text: an archive, a spreadsheet, an image."""

    code = "unsupported_media_type"


class TooLarge(AppError):
    """The body is larger than the service takes."""

    code = "too_large"


class TooSlow(AppError):
    """The rest of a body does not come."""

    code = "too_slow"


# Who is asking, and for what ----------------------------------------------------------------------
class Unauthorized(AppError):
    """No key, or one that is unknown, revoked or expired."""

    code = "unauthorized"


class Forbidden(AppError):
    """The key's scope does not reach this far."""

    code = "forbidden"


class NotFound(AppError):
    """Nothing has that id."""

    code = "not_found"


class Conflict(AppError):
    """The thing is in a state that does not allow it."""

    code = "conflict"


class PromotionRefused(Conflict):
    """A candidate is shown to be worse than the model that an alias points to."""

    code = "promotion_refused"


# The service cannot do it now ---------------------------------------------------------------------
class QueueFull(AppError):
    """More is waiting than the service takes on: texts, uploads or jobs."""

    code = "queue_full"


class RateLimited(AppError):
    """A key calls faster than it may."""

    code = "rate_limited"


class TooManyStreams(AppError):
    """The process holds as many event streams and long polls as it may."""

    code = "too_many_streams"


class StillAnswering(AppError):
    """The first request with this Idempotency-Key is still being answered."""

    code = "still_answering"


class EngineUnavailable(AppError):
    """The engine process is starting, or was lost and is being started again."""

    code = "engine_unavailable"


class EngineFailed(AppError):
    """The engine failed on a call's texts, and would again."""

    code = "engine_failed"


class BaseLoading(AppError):
    """The model's base is being loaded."""

    code = "base_loading"


class BaseNotServed(AppError):
    """This machine cannot hold or find the model's base."""

    code = "base_not_served"


class ModelDamaged(AppError):
    """A published model's files are missing or are not the ones that were published."""

    code = "model_damaged"


class DeadlinePassed(AppError):
    """The answer did not come within the time allowed."""

    code = "deadline_passed"


class LowDisk(AppError):
    """Too little disk space is free to take on more."""

    code = "low_disk"


DISK_FULL = {
    "code": LowDisk.code, "message": "The worker's disk is full.",
    "hint": "Give it more space; POST /jobs/{id}/retry goes on from the last checkpoint.",
}  # fmt: skip
"""How a job ends by it."""


class StorageUnavailable(AppError, OSError):
    """The object store with the files does not answer."""

    code = "storage_unavailable"


class Busy(AppError):
    """The database was being written to for longer than a call waits, or cannot be reached at the moment."""

    code = "database_busy"


# A job cannot go on -------------------------------------------------------------------------------
class ModelUnavailable(AppError):
    """A listed base model that cannot be had here."""

    code = "model_unavailable"


class EndpointUnavailable(AppError):
    """A remote model does not answer, refuses the key, or answers with something else than an answer."""

    code = "endpoint_unavailable"


class BudgetSpent(EndpointUnavailable):
    """What a run may spend on a remote model is spent before every text was asked about."""

    code = "budget_spent"


class OutOfMemory(AppError):
    """The job does not fit into the device's memory."""

    code = "out_of_memory"


class LeaseLost(AppError):
    """Another worker holds the job now; this attempt must publish nothing."""

    code = "lease_lost"


class RoundTripFailed(AppError):
    """The saved model, loaded as serving loads it, does not answer as the trained one did."""

    code = "round_trip_failed"
