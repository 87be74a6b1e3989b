"""What a job is asked to do. One definition, for the API that checks it and the worker that runs it."""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

Auto = Literal["auto"]
ENDPOINT_PREFIX = "remote:"
Kind = Literal["experiment", "train", "baseline", "predict"]
BaselineMethod = Literal["majority", "tfidf_logreg", "embedding_logreg", "zero_shot"]
Decoding = Literal["free", "constrained"]
MAX_SEED = 2**32 - 1
MOST_PROMPTED = 10_000
OF_EVERY_JOB = {"kind", "name", "dataset_id", "metadata", "webhook_url"}
OF_PREDICT = {"model", "top_k", "min_confidence"}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Share = Annotated[float, Field(ge=0.05, le=0.9)]


class SplitSpec(_Part):
    """Shares of the usable rows."""

    train: Share = 0.8
    validation: Share = 0.1
    test: Share = 0.1

    @model_validator(mode="after")
    def _sums_to_one(self) -> "SplitSpec":
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train, validation and test must sum to 1, these sum to {total:g}")
        return self


Description = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)]


class BaselineSpec(_Part):
    """The methods to compare the fine-tune with."""

    methods: list[BaselineMethod] = Field(
        default=["majority", "tfidf_logreg", "embedding_logreg", "zero_shot"], min_length=1, max_length=4
    )
    sample_size: Annotated[int, Field(ge=10, le=MOST_PROMPTED)] = 300
    prompt_model: Annotated[str, Field(min_length=1, max_length=200)] = "auto"
    prompt_template: Annotated[str, Field(min_length=1, max_length=20_000)] | None = None
    few_shot: Annotated[int, Field(ge=0, le=64)] = 0
    decoding: Annotated[
        Decoding, Field(description="`constrained` generates one of the labels; `free` any text, which is parsed.")
    ] = "free"
    label_descriptions: Annotated[
        dict[str, Description], Field(max_length=1000, description="What a label means, by label; for the prompt.")
    ] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> "BaselineSpec":
        if len(set(self.methods)) != len(self.methods):
            raise ValueError("baseline.methods names a method twice; name each once")
        if self.prompt_template is not None:
            missing = [place for place in ("{labels}", "{text}") if place not in self.prompt_template]
            if missing:
                raise ValueError(f"prompt_template must contain {{labels}} and {{text}}; missing: {', '.join(missing)}")
        if self.decoding == "constrained" and self.prompt_model.startswith(ENDPOINT_PREFIX):
            raise ValueError("decoding must be 'free' for a remote prompt_model: its tokens are chosen elsewhere")
        return self


class TrainSpec(_Part):
    """The LoRA fine-tune. `auto` is replaced by the value in force as soon as it is known."""

    epochs: Annotated[int, Field(ge=1, le=100)] | Auto = "auto"
    batch_size: Annotated[int, Field(ge=1, le=1024)] | Auto = "auto"
    learning_rate: Annotated[float, Field(ge=1e-7, le=1e-1)] | Auto = "auto"
    max_length: Annotated[int, Field(ge=8, description="In tokens; at most the base model's limit.")] = 192
    lora_rank: Annotated[int, Field(ge=1, le=256)] = 16
    lora_alpha: Annotated[int, Field(ge=1, le=512)] = 32
    lora_dropout: Annotated[
        float, Field(ge=0, le=0.5, description="At 0 no tokens are left out of the texts either, else a tenth is.")
    ] = 0.05
    target_modules: Literal["attention"] = "attention"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    gradient_checkpointing: bool | Auto = "auto"
    class_weights: Literal["none", "balanced"] = "none"
    early_stopping_patience: Annotated[int, Field(ge=0, le=50)] = 2


def auto_epochs(n_train: int) -> int:
    """Ten; fewer where that would be over 300,000 rows.

    On BANKING77 (9,422 rows to train on, 2,353 to choose on) a schedule of ten had validation macro-F1 0.942 at its
    best epoch, the sixth, and one of six 0.937; early stopping ends it two epochs after the best.
    """
    return min(max(300_000 // n_train, 1), 10)


CurveShare = Annotated[float, Field(ge=0.001, le=1, description="Of the train rows.")]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class JobSpec(_Part):
    """The body of `POST /jobs`; every field has a good default but `dataset_id`."""

    dataset_id: Annotated[str, Field(max_length=64)] | None = None
    kind: Kind = "experiment"
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    base_model: Annotated[str, Field(min_length=1, max_length=200)] = "auto"
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 42
    split: SplitSpec = SplitSpec()
    baseline: BaselineSpec = BaselineSpec()
    train: TrainSpec = TrainSpec()
    learning_curve: Annotated[list[CurveShare], Field(max_length=10)] = []
    margin: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] = {}
    webhook_url: Annotated[
        Annotated[str, Field(min_length=1, max_length=2000)] | None,
        Field(repr=False, description="Called when the job has ended; only its host is ever shown."),
    ] = None
    model: Annotated[str, Field(max_length=64, description="For kind `predict`: a model's id or alias.")] | None = None
    top_k: (
        Annotated[int, Field(ge=1, le=20, description="For kind `predict`: how many labels with probabilities.")] | None
    ) = None
    min_confidence: Annotated[
        float, Field(ge=0, le=1, description="For kind `predict`: below it the label is left open.")
    ] = 0.0

    @field_validator("learning_curve")
    @classmethod
    def _shares_ascend(cls, shares: list[float]) -> list[float]:
        if any(share >= following for share, following in pairwise(shares)):
            raise ValueError("the shares of learning_curve must ascend, such as [0.1, 0.25, 0.5, 1.0]")
        return shares

    def misplaced(self) -> list[str]:
        """Fields that were given and that say nothing about a job of this kind."""
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        return sorted(given - OF_EVERY_JOB - OF_PREDICT if self.kind == "predict" else given & OF_PREDICT)

    def kept(self) -> dict[str, Any]:
        """What a job keeps of it as its `spec`."""
        about = {"metadata", "dataset_id", "webhook_url"}
        if self.kind == "predict":
            return self.model_dump(include=(OF_EVERY_JOB | OF_PREDICT) - about)
        return self.model_dump(exclude=OF_PREDICT | about)

    @property
    def runs_baselines(self) -> bool:
        return self.kind in ("experiment", "baseline")

    @property
    def trains(self) -> bool:
        return self.kind in ("experiment", "train")
