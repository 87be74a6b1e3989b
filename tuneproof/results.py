"""What the server answers, typed. Fields that this version does not know stay in `raw`."""

import types
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import datetime
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

JobStatus = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]

ENDED = {"succeeded": "succeeded", "failed": "failed", "cancelled": "was cancelled"}
"""What a job's last status makes of the sentence `The job … .`"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """`raw` is the JSON as the server sent it."""

    raw: Mapping[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class LabelCount(Result):
    label: str
    count: int


@dataclass(frozen=True, kw_only=True)
class DatasetWarning(Result):
    """`rows` are 0-based data rows of the file, at most 20 of the `count`."""

    code: str
    message: str
    count: int
    rows: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Dataset(Result):
    """A file as it was read; `inferred` names what nobody had said about it."""

    id: str
    name: str
    created_at: datetime
    sha256: str
    size_bytes: int
    n_rows: int
    n_usable_rows: int
    text_column: str
    label_column: str | None
    split_column: str | None
    delimiter: str
    has_header: bool
    encoding: str
    inferred: tuple[str, ...]
    labels: tuple[LabelCount, ...]
    text_length: Mapping[str, int]
    warnings: tuple[DatasetWarning, ...]


@dataclass(frozen=True, kw_only=True)
class Row(Result):
    row_id: int
    text: str
    label: str | None


@dataclass(frozen=True, kw_only=True)
class Estimate(Result):
    """Both None where nothing is known: no job has finished there on that base model."""

    seconds: float | None
    basis: str | None


@dataclass(frozen=True, kw_only=True)
class Preflight(Result):
    """What a job would meet; `eta` is by method."""

    dataset_id: str
    split: Mapping[str, Any]
    warnings: tuple[DatasetWarning, ...]
    near_duplicates: Mapping[str, Any]
    truncation: Mapping[str, Any] | None
    eta: Mapping[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class Progress(Result):
    """`fraction` is 0 to 1 and never falls within an attempt; `eta_seconds` is None while nobody can tell."""

    fraction: float
    message: str = ""
    eta_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class JobError(Result):
    code: str
    message: str
    hint: str | None = None


@dataclass(frozen=True, kw_only=True)
class MethodScore(Result):
    """`on` says on which rows: `test`, or `baseline_subset`; `model_id` is None where the method is not served."""

    accuracy: float
    macro_f1: float
    on: str
    model_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recommendation(Result):
    method: str
    reason: str
    margin: float


@dataclass(frozen=True, kw_only=True)
class Summary(Result):
    """`labels` are of a job that predicts: how many rows got each, most first."""

    headline: str
    labels: tuple[LabelCount, ...] = ()
    recommendation: Recommendation | None = None
    methods: Mapping[str, MethodScore] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Artifact(Result):
    name: str
    size_bytes: int
    sha256: str
    url: str


@dataclass(frozen=True, kw_only=True)
class Job(Result):
    id: str
    kind: str
    name: str
    status: JobStatus
    terminal: bool
    stage: str | None
    progress: Progress
    attempt: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    dataset_id: str
    model_id: str | None
    spec: Mapping[str, Any]
    error: JobError | None
    summary: Summary | None
    artifacts: tuple[Artifact, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def served(self) -> tuple[str, str] | None:
        """`(model id, method)` to call: the recommended method, or the most accurate one that is served."""
        if self.summary is None:
            return None
        methods = self.summary.methods
        models = {name: score.model_id for name, score in methods.items() if score.model_id is not None}
        if not models:
            return None
        recommended = self.summary.recommendation.method if self.summary.recommendation else None
        method = recommended if recommended in models else max(models, key=lambda name: methods[name].accuracy)
        return models[method], method


@dataclass(frozen=True, kw_only=True)
class Event(Result):
    """Something that happened in a job; of type `status`, `progress`, `metric` or `message`.

    Those of type `progress` come in streams alone and are not kept: their `data` holds stage, fraction, eta_seconds,
    status and attempt, and their `id` is that of the kept event before.
    """

    type: str
    id: int | None = None
    job_id: str = ""
    created_at: datetime | None = None
    level: str = "info"
    message: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Flip(Result):
    """A row that one side of a comparison has right and the other wrong: `fixed` or `broken` by the candidate."""

    id: int
    candidate: str
    baseline: str
    row_id: int
    text: str
    label: str
    candidate_answer: str | None
    baseline_answer: str | None
    flip: str


@dataclass(frozen=True, kw_only=True)
class Model(Result):
    """A published version; `labels` stand in the order of their integer ids."""

    id: str
    name: str
    version: int
    method: str
    job_id: str
    base_model: str
    base_revision: str
    labels: tuple[str, ...]
    created_at: datetime
    aliases: tuple[str, ...]
    metrics: Mapping[str, float]
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class AliasMove(Result):
    model_id: str
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class Gate(Result):
    """A candidate against the model that an alias points to, on rows that neither was trained on.

    The delta is candidate minus incumbent. Where nothing could be compared, `checked` is false and `note` says why.
    """

    checked: bool
    verdict: Literal["candidate_wins", "incumbent_wins", "inconclusive"] | None = None
    n: int = 0
    accuracy_delta: float | None = None
    accuracy_delta_ci95: tuple[float, ...] | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Alias(Result):
    """`history` is where it pointed, newest first, and comes with lists; `gate` comes with the answer to a move."""

    alias: str
    model_id: str
    updated_at: datetime
    history: tuple[AliasMove, ...] = ()
    gate: Gate | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction(Result):
    """`label` is None, and `abstained` true, where the confidence is under the threshold asked for."""

    label: str | None
    confidence: float
    probabilities: Mapping[str, float]
    abstained: bool
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class Usage(Result):
    texts: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Threshold(Result):
    """The confidence that reached a `target_precision` on the validation rows; None where none did."""

    min_confidence: float | None
    validation_precision: float | None
    validation_coverage: float
    validation_rows: int
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Answer(Result):
    """Predictions in the order of the texts, all from the one version `model_id`."""

    model_id: str
    predictions: tuple[Prediction, ...]
    usage: Usage
    threshold: Threshold | None = None


@dataclass(frozen=True, kw_only=True)
class Readiness(Result):
    """`checks` are shown to callers with a key."""

    status: str
    checks: Mapping[str, Any] = field(default_factory=dict)


R = TypeVar("R", bound=Result)


def parse(kind: type[R], data: Any) -> R:
    """`data`, an object of the server's JSON, as `kind`; the types of plain values are taken on trust.

    Raises:
        ValueError: it is no object, or lacks a field that every such answer has.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"expected a JSON object for {kind.__name__}, found {type(data).__name__}")
    hints = _hints(cast(Hashable, kind))
    values = {name: _converted(hint, data[name]) for name, hint in hints.items() if name in data}
    required = (f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)
    if missing := [name for name in required if name not in values and name != "raw"]:
        raise ValueError(f"{kind.__name__} without {', '.join(missing)}")
    return kind(**{**values, "raw": data})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(kind).items() if name != "raw"}


def _converted(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _converted(next(one for one in inner if one is not types.NoneType), value)
    if origin is tuple:
        return tuple(_converted(inner[0], one) for one in value)
    if origin is Mapping:
        return {key: _converted(inner[1], one) for key, one in value.items()}
    if isinstance(hint, type) and issubclass(hint, Result):
        return parse(hint, value)
    return datetime.fromisoformat(value) if hint is datetime else value
