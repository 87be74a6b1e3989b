"""Before any work: which base models, which rows, which split, and what every `auto` of the spec comes to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig

from service.core.endpoints import endpoint_name
from service.core.errors import InvalidData, ModelUnavailable
from service.core.spec import JobSpec, auto_epochs
from service.ml.base_models import EMBEDDED, GPU_DEFAULT, PROMPT_DEFAULT, Located, find_base, locate
from service.ml.dataset import TableFormat
from service.ml.device import training_precision
from service.ml.labels import LabelSet
from service.ml.split import Split, Table, read_split, stratified_subset
from worker.methods.recipe import auto_learning_rate

NOT_PROMPTED = (
    "Prompting was not tested, because no generative model is at hand: fetch one with `tuneproof models pull "
    f"{PROMPT_DEFAULT}`, or name a remote endpoint in `baseline.prompt_model`, and start the job again."
)
Say = Callable[[str, str], None]
"""Called with a message for the user and its level."""


@dataclass(frozen=True)
class Prepared:
    """What an experiment works on.

    Args:
        spec: With no `auto` left, but for `gradient_checkpointing`, which the first batches decide.
        base: The base model.
        prompt_model: The model to prompt on this machine; None where none is wanted or at hand.
        table: The usable rows.
        split: Their parts.
        split_algorithm: How they were dealt out.
        subset: Positions, within the test part, of the rows that prompts are asked about.
    """

    spec: JobSpec
    base: Located
    prompt_model: Located | None
    table: Table
    split: Split
    split_algorithm: str
    subset: NDArray[np.int64]


def prepare(
    spec: JobSpec, file: Path, table_format: TableFormat, models_dir: Path | None, device: torch.device, say: Say
) -> Prepared:
    """Checks that everything is at hand, reads the rows and splits them.

    Raises:
        ModelUnavailable: a base model that was named cannot be had.
        InvalidData: the rows cannot be split as asked, or the spec does not fit the base model.
    """
    base = _find_base(spec, models_dir, device, say)
    wants_prompt = spec.runs_baselines and "zero_shot" in spec.baseline.methods
    prompt_model = _find_prompt_model(spec, base, models_dir, device, say) if wants_prompt else None
    shares: dict[Any, float] = spec.split.model_dump()
    table, split, algorithm = read_split(file, table_format, shares, spec.seed)
    _check_descriptions(spec.baseline.label_descriptions, table.labels)
    test_texts = [table.texts[i] for i in split.test]
    subset = stratified_subset(test_texts, table.label_ids[split.test], spec.baseline.sample_size, spec.seed)
    say(
        f"{len(table.texts)} usable rows, {len(table.labels)} labels: {len(split.train)} to train on, "
        f"{len(split.validation)} to choose on, {len(split.test)} to judge on.",
        "info",
    )
    resolved = _resolve(spec, base, prompt_model, len(split.train), device)
    return Prepared(resolved, base, prompt_model, table, split, algorithm, subset)


def _find_base(spec: JobSpec, models_dir: Path | None, device: torch.device, say: Say) -> Located:
    name = spec.base_model
    if name == "auto":
        name = EMBEDDED
        if device.type == "cuda":
            try:
                return _long_enough(locate(find_base(GPU_DEFAULT, models_dir)), spec)
            except ModelUnavailable as error:
                say(f"{error.detail} The embedded model {EMBEDDED!r} is used instead.", "warning")
    return _long_enough(locate(find_base(name, models_dir)), spec)


def _long_enough(source: Located, spec: JobSpec) -> Located:
    asked, limit = spec.train.max_length, source.base.max_length
    if asked > limit:
        raise InvalidData(
            f"train.max_length is {asked}, and base model {source.base.name!r} reads at most {limit} tokens.",
            hint="Lower train.max_length, or name a base model that reads longer texts.",
        )
    return source


def _find_prompt_model(
    spec: JobSpec, base: Located, models_dir: Path | None, device: torch.device, say: Say
) -> Located | None:
    """The one named, the base itself if it generates, else the default one where it is at hand."""
    name = spec.baseline.prompt_model
    if endpoint_name(name) is not None:
        return None
    if name != "auto":
        try:
            source = locate(find_base(name, models_dir))
        except ModelUnavailable as error:
            raise ModelUnavailable(
                f"Prompt model {name!r} cannot be had.",
                hint=f"`tuneproof models pull {name}` fetches it from its hub; or leave prompt_model at 'auto'.",
            ) from error
        if not source.base.generative:
            raise InvalidData(
                f"Prompt model {name!r} has no language-model head, so it cannot be prompted.",
                hint=f"Name a generative model, such as {PROMPT_DEFAULT!r}, or leave prompt_model at 'auto'.",
            )
        return source
    if base.base.generative:
        return base
    try:
        return locate(find_base(PROMPT_DEFAULT, models_dir), download=device.type == "cuda")
    except ModelUnavailable:
        say(f"{NOT_PROMPTED} Until then, zero_shot is the similarity of text and label name.", "warning")
        return None


def _check_descriptions(descriptions: Mapping[str, str], labels: LabelSet) -> None:
    unknown = [repr(label) for label in descriptions if labels.id_of(label) is None]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise InvalidData(
            f"baseline.label_descriptions describes {', '.join(unknown[:5])}{more}: no usable row has such a label.",
            hint="Spell every label as the dataset does, or leave its description out.",
        )


def _resolve(spec: JobSpec, base: Located, prompt_model: Located | None, n_train: int, device: torch.device) -> JobSpec:
    hidden_size = AutoConfig.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False).hidden_size
    decided = {
        "epochs": auto_epochs(n_train), "batch_size": 32, "learning_rate": auto_learning_rate(hidden_size),
        "precision": training_precision(device),
    }  # fmt: skip
    train = spec.train
    train = train.model_copy(update={name: v for name, v in decided.items() if getattr(train, name) == "auto"})
    baseline = spec.baseline
    if prompt_model is not None:
        baseline = baseline.model_copy(update={"prompt_model": prompt_model.base.name})
    return spec.model_copy(update={"base_model": base.base.name, "train": train, "baseline": baseline})
