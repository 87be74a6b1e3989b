"""What goes in and out, as the contract has it."""

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, field_validator, model_validator

from service.ml.evidence import PairedComparison, Rows

Item = TypeVar("Item")
Scope = Literal["predict", "read", "write", "admin"]


class Page(BaseModel, Generic[Item]):
    """A piece of a list."""

    data: list[Item]
    has_more: bool


class Problem(BaseModel):
    """RFC 9457. `columns`, those of the file, is there where a file was refused whose columns are known."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: list[dict[str, Any]]
    request_id: str
    columns: list[str] | None = None


class DatasetForm(BaseModel):
    """The form fields of an upload, all optional."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=200)] | None = None
    text_column: Annotated[str, Field(max_length=1000)] | None = None
    label_column: Annotated[str, Field(max_length=1000)] | None = None
    split_column: Annotated[str, Field(max_length=1000)] | None = None
    delimiter: Annotated[str, Field(max_length=10)] | None = None
    has_header: bool | None = None
    encoding: Annotated[str, Field(max_length=100)] | None = None
    labelled: bool = True
    rare_labels: Literal["refuse", "drop"] = "refuse"


class LabelCountOut(BaseModel):
    label: str
    count: int


class TextLengthOut(BaseModel):
    p50_chars: int
    p95_chars: int
    max_chars: int


class WarningOut(BaseModel):
    code: str
    message: str
    count: int
    rows: list[int]


class DatasetOut(BaseModel):
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
    inferred: list[str]
    labels: list[LabelCountOut]
    text_length: TextLengthOut
    warnings: list[WarningOut]
    columns: Annotated[list[str], Field(description="Up to 1,000; empty for datasets of before columns were kept.")]


class RowOut(BaseModel):
    row_id: int
    text: str
    label: str | None


class ProgressOut(BaseModel):
    fraction: float
    message: str
    eta_seconds: float | None


class ArtifactOut(BaseModel):
    name: str
    size_bytes: int
    sha256: str
    url: str


class JobOut(BaseModel):
    id: str
    kind: str
    name: str
    status: Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
    terminal: bool
    stage: Literal["prepare", "baseline", "train", "evaluate", "publish"] | None
    progress: ProgressOut
    attempt: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    dataset_id: str
    model_id: str | None
    spec: dict[str, Any]
    error: dict[str, Any] | None
    metadata: dict[str, str]
    summary: dict[str, Any] | None
    artifacts: list[ArtifactOut]
    webhook_host: str | None


class EventOut(BaseModel):
    id: int
    job_id: str
    created_at: datetime
    level: Literal["info", "warning", "error"]
    type: Literal["status", "progress", "metric", "message"]
    message: str
    data: dict[str, Any]


class FlipOut(BaseModel):
    """A row that one side of a comparison has right and the other wrong; an answer is null where none was given."""

    id: int
    candidate: str
    baseline: str
    row_id: int
    text: str
    label: str
    candidate_answer: str | None
    baseline_answer: str | None
    flip: Literal["fixed", "broken"]


class ComparedSplitOut(BaseModel):
    algorithm: str
    seed: int
    sha256: str


class ComparedMethodOut(BaseModel):
    accuracy: float
    macro_f1: float
    on: Rows
    model_id: str | None


class CompareOut(BaseModel):
    """Jobs side by side; `methods` and the two sides of each comparison are named `job_id/method`."""

    dataset_sha256: str
    split: ComparedSplitOut
    methods: dict[str, ComparedMethodOut]
    comparison: list[PairedComparison]


class ModelOut(BaseModel):
    id: str
    name: str
    version: int
    method: str
    job_id: str
    base_model: str
    base_revision: str
    labels: list[str]
    created_at: datetime
    aliases: list[str]
    metrics: dict[str, float]
    size_bytes: int


class AliasIn(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model_id: Annotated[str, StringConstraints(max_length=64)]
    force: Annotated[bool, Field(description="Skip the gate.")] = False


class AliasMoveOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    model_id: str
    created_at: datetime


class AliasOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    alias: str
    model_id: str
    updated_at: datetime


class GateOut(BaseModel):
    """Candidate against incumbent on rows that neither was trained or chosen on; the delta is candidate − incumbent."""

    checked: Literal[True] = True
    n: int
    candidate_accuracy: float
    incumbent_accuracy: float
    accuracy_delta: float
    accuracy_delta_ci95: tuple[float, float]
    mcnemar_p: float
    verdict: Literal["candidate_wins", "incumbent_wins", "inconclusive"]
    note: str | None


class GateSkippedOut(BaseModel):
    """Nothing was compared; `note` says why, and what to do."""

    checked: Literal[False] = False
    note: str


class AliasMovedOut(AliasOut):
    """`gate` is null where there was nothing to compare: no model before, or the same one."""

    gate: GateOut | GateSkippedOut | None


class AliasWithHistoryOut(AliasOut):
    history: list[AliasMoveOut]


class PredictIn(BaseModel):
    """`text` may stand in place of `texts`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1, max_length=64, description="A model's id, or an alias.")]
    texts: list[str] | None = None
    text: str | None = None
    top_k: Annotated[int, Field(ge=1, le=1_000_000)] = 3
    min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.0
    target_precision: (
        Annotated[
            float,
            Field(ge=0.5, le=1, description="Abstain under the confidence that was right so often on validation."),
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _one_of_two_ways(self) -> "PredictIn":
        if (self.texts is None) == (self.text is None):
            raise ValueError("give either `texts`, a list, or `text`, one string")
        if self.target_precision is not None and "min_confidence" in self.model_fields_set:
            raise ValueError("give either `min_confidence`, or `target_precision` to have it chosen")
        return self

    @field_validator("texts")
    @classmethod
    def _not_empty(cls, texts: list[str] | None) -> list[str] | None:
        if texts is not None and not texts:
            raise ValueError("give at least one text")
        return texts

    @property
    def all_texts(self) -> list[str]:
        return self.texts if self.texts is not None else [self.text or ""]


class PredictionOut(BaseModel):
    label: str | None
    confidence: float
    probabilities: dict[str, float]
    abstained: bool
    truncated: bool


class UsageOut(BaseModel):
    texts: int
    tokens: int


class ThresholdOut(BaseModel):
    """The `min_confidence` chosen for a `target_precision`, and what it did on the validation rows.

    `min_confidence` is null, and `note` says so, where no confidence reached the target: every prediction abstains. A
    threshold that few rows stand behind has a `note` too.
    """

    model_config = ConfigDict(from_attributes=True)

    min_confidence: float | None
    validation_precision: float | None
    validation_precision_ci95: tuple[float, float] | None
    validation_coverage: float
    validation_rows: int
    note: str | None


class PredictOut(BaseModel):
    model_id: str
    predictions: list[PredictionOut]
    usage: UsageOut
    threshold: ThresholdOut | None = None


class KeyIn(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: Annotated[str, Field(min_length=1, max_length=200)]
    scope: Scope
    expires_days: Annotated[float, Field(gt=0, le=36_500)] | None = None


class KeyOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: str
    name: str
    scope: Scope
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class NewKeyOut(KeyOut):
    """`key` is the secret, which is not shown again."""

    key: str


class BaseModelOut(BaseModel):
    """A name for `base_model`; a generative one may also be a `prompt_model`. `max_length` is in tokens."""

    name: str
    max_length: int
    generative: bool
    at_hand: bool


class BaseModelsOut(Page[BaseModelOut]):
    """What is at hand is so where the API runs. `prompt_endpoints` may be a `prompt_model`, too.

    `auto_prompt_model` is what a `prompt_model` of 'auto' prompts beside a base model that is not generative; None
    where it is not at hand.
    """

    auto_prompt_model: str | None
    prompt_endpoints: list[str]


class SessionIn(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    key: Annotated[SecretStr, Field(min_length=1, max_length=1000)]


class SessionKeyOut(BaseModel):
    id: str
    name: str


class SessionOut(BaseModel):
    """`key` is null on loopback while no key was ever created."""

    scope: Scope
    key: SessionKeyOut | None
    keys_exist: bool


class HealthOut(BaseModel):
    status: Literal["ok"]


class ReadyOut(BaseModel):
    """`checks` is shown to callers with a key."""

    status: Literal["ready", "not_ready"]
    checks: dict[str, Any] | None = None
