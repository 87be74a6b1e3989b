"""The model card of a published folder: how it is used, how it did, how it was made, and where that ends."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from service.ml.base_models import EMBEDDED, Located
from service.ml.calibration import wilson_interval
from service.ml.manifest import Manifest
from worker.compare import PLAIN_NAMES

# Where the hub has the very files of the embedded package, by their sha256.
_EMBEDDED_ON_HUB = ("sentence-transformers/all-MiniLM-L6-v2", "1110a243fdf4706b3f48f1d95db1a4f5529b4d41")
_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
# What CommonMark or GFM gives a meaning within a line; `www.` and `://` make links by themselves.
_MARKUP = re.compile(r"(?i)[\\`*_\[\]<>|&~$#!]|:(?=//)|(?<=www)\.")


def write_card(
    folder: Path, metrics: Mapping[str, Any], summary: Mapping[str, Any], notes: Mapping[str, Any], source: Located
) -> None:
    """Writes the card into a published folder, and its manifest anew, which holds the hash of every file.

    Nothing in it tells one run of a job from another: no time, no id.

    Args:
        folder: As `save_and_serve` left it.
        metrics: The contract's `metrics.json`.
        summary: The job's `headline` and `methods`.
        notes: `dataset_name` and `spec`, as the report has them.
        source: The base model.
    """
    manifest, base = Manifest.read(folder, whole=False), source.base
    figures = metrics["methods"][manifest.method]["test"]
    dataset = _one_line(notes["dataset_name"])
    title = _one_line(notes["spec"]["name"] or "") or dataset
    repo, revision = base.repo or base.name, source.revision
    if embedded := base.name == EMBEDDED and base.folder is None:
        repo, revision = _EMBEDDED_ON_HUB
    scored = [("accuracy", figures["accuracy"]), ("f1", figures["macro_f1"])]
    front = ModelCardData(
        library_name="peft" if manifest.method == "lora" else "tuneproof", base_model=repo, model_name=title,
        pipeline_tag="text-classification", tags=["tuneproof", manifest.method], eval_results=[
            EvalResult("text-classification", "csv", dataset, kind, round(value, 4), dataset_split="test")
            for kind, value in scored
        ],
    )  # fmt: skip
    card = _TEMPLATES.get_template("card.md").render(
        front=front.to_yaml(), title=title, dataset=dataset, manifest=manifest, metrics=metrics, summary=summary,
        figures=figures, interval=wilson_interval(round(figures["accuracy"] * figures["n"]), figures["n"]),
        names=PLAIN_NAMES, settings=notes["spec"]["train"], repo=repo, revision=revision, embedded=embedded,
    )  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")
    manifest.write(folder)


def in_markdown(value: object) -> object:
    """Text as it reads, on one line, in a table too, whatever markup is in it; figures and `Markup` as they are."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return _MARKUP.sub(r"\\\g<0>", _one_line(value))
    return value


def _one_line(text: str) -> str:
    return _BLANK.sub(" ", text).strip()


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True, keep_trailing_newline=True, finalize=in_markdown, autoescape=False,  # noqa: S701 -- no HTML
)  # fmt: skip
