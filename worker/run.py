"""One job in one process: a folder with a table and a spec in, artifacts out. No database, no HTTP.

What follows is an experiment, or half of one; a job of kind `predict` is `worker.bulk`'s.

    folder/dataset          the uploaded file, as it came
    folder/job.json         a `JobFile`; `{}` runs an experiment with every default
    folder/checkpoints/     where an earlier attempt stood, if there was one
    folder/out/             what is to be published; out/adapter is the fine-tuned model
    folder/models/          other models to be published, a folder per method

Progress, events and the result go to standard output as JSON lines.
"""

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging as transformers_logging

from service.core.endpoints import Endpoint, endpoint_name
from service.core.errors import DISK_FULL, AppError, EndpointUnavailable, OutOfMemory, disk_is_full
from service.core.spec import JobSpec
from service.ml.backbone import load_backbone
from service.ml.dataset import TableFormat, UploadOptions, profile
from service.ml.device import DTYPES, pick_device, serving_precision
from service.ml.engine import Engine
from service.ml.evidence import same_texts
from service.ml.manifest import FILE as MANIFEST
from service.ml.manifest import Manifest, sha256_of
from service.ml.preflight import near_duplicates
from worker.artifacts import flips, write_flips, write_json, write_predictions, write_split
from worker.bulk import Bulk
from worker.card import write_card
from worker.compare import COST_ORDER, MethodAnswers, compare_all, unproven
from worker.learning_curve import TRAINED, LearningCurve, main_part
from worker.methods.embedding_logreg import EmbeddingLogreg
from worker.methods.frozen import FrozenBase
from worker.methods.lora import CHECKPOINT_SECONDS, Lora
from worker.methods.majority import Majority
from worker.methods.parts import HelperGone
from worker.methods.prompts import USER_V1, PromptTemplate
from worker.methods.protocol import OnProgress, Predictor, Rows, silent
from worker.methods.ranks import follow, meeting_place, rank, world_size
from worker.methods.recipe import LoraRecipe
from worker.methods.tfidf_logreg import TfidfLogreg
from worker.methods.zero_shot import Answerer, Prompted, PromptedModel, Similarity, draw_examples
from worker.metrics import score
from worker.predictions import Predictions
from worker.prepare import NOT_PROMPTED, prepare
from worker.progress import Reporter
from worker.report import render
from worker.saved import Saveable, Served, save_and_serve
from worker.stop import Stop, Stopped
from worker.verdict import judge

if TYPE_CHECKING:
    from worker.methods.remote import RemoteModel

STOPPED = 75
"""Exit status of a child that was told to stop (EX_TEMPFAIL)."""


@dataclass(frozen=True)
class JobFile:
    """`job.json`.

    Args:
        spec: A `JobSpec`.
        table: How to read the file; inferred where it is left out.
        dataset: `id`, `name`, `sha256`, `n_rows` and `warnings`, for the figures and the report.
        job_id: For the figures.
        models_dir: Folder of allowed local base models.
        serve_dtype: In which models are served here, and so scored.
        checkpoint_seconds: At most so much training is lost with a process.
        endpoint: The `Endpoint` that the spec names, where it names one; the key is in the environment.
    """

    spec: dict[str, Any] = field(default_factory=dict)
    table: dict[str, Any] | None = None
    dataset: dict[str, Any] = field(default_factory=dict)
    job_id: str = "job_local"
    models_dir: str | None = None
    serve_dtype: str = "auto"
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    endpoint: dict[str, Any] | None = None


class Experiment:
    """A job under way."""

    def __init__(self, folder: Path, reporter: Reporter, stop: Stop | None = None) -> None:
        self.folder, self.out, self.reporter, self.stop = folder, folder / "out", reporter, stop or Stop()
        self.job = JobFile(**json.loads((folder / "job.json").read_text(encoding="utf-8")))
        self.device = pick_device()
        self.messages: list[str] = []
        self.answers: dict[str, dict[str, Predictions]] = {}
        self.models: list[dict[str, Any]] = []
        self.training: dict[str, Any] | None = None
        self.lora: Served | None = None
        self.curve: LearningCurve | None = None

    def run(self) -> None:
        """Everything, from the file to the figures. Raises AppError."""
        self.reporter.stage("prepare")
        self.out.mkdir(parents=True, exist_ok=True)
        self._prepare()
        if self.spec.runs_baselines:
            self.reporter.stage("baseline")
            self._baselines()
        if self.spec.trains:
            self.reporter.stage("train")
            self._fine_tune()
        if self.spec.learning_curve:
            self.curve = self._grow()
        self.reporter.stage("evaluate")
        if self.lora is not None:
            self._predict_all("lora", self.lora, self.reporter.part(0.0, 0.5))
        self.reporter.result(self._evaluate(), self.models)

    def _prepare(self) -> None:
        file = self.folder / "dataset"
        table_format = TableFormat(**self.job.table) if self.job.table else profile(file, UploadOptions()).format
        models_dir = Path(self.job.models_dir) if self.job.models_dir else None
        spec = JobSpec.model_validate(self.job.spec)
        self.ready = ready = prepare(spec, file, table_format, models_dir, self.device, self._say)
        self.spec, self.table, self.split = ready.spec, ready.table, ready.split
        self.reporter.leave_out(baseline=not spec.runs_baselines, train=not (spec.trains or spec.learning_curve))
        self.train, self.validation, self.test = (
            Rows(tuple(self.table.texts[i] for i in rows), self.table.label_ids[rows], self.table.labels)
            for rows in (self.split.train, self.split.validation, self.split.test)
        )
        self.reporter.spec(self.spec.model_dump())
        near, known = near_duplicates(self.table, self.split)[1], self.job.dataset.get("warnings", [])
        self.warnings = [*known, asdict(near)] if near.count else known
        for found in self.warnings:
            message = f"{found['message']} ({found['count']:,} row{'s' * (found['count'] > 1)})"
            self.reporter.event("message", message, found, level="warning")
        write_split(self.out / "split.csv", self.table, self.split)
        self.dtype = DTYPES[serving_precision(self.device, self.job.serve_dtype)]
        backbone = load_backbone(ready.base, device=self.device, dtype=self.dtype)
        if self.spec.trains:
            backbone.attention_projections()  # raises where there is nothing to put LoRA on
        self.base = FrozenBase(Engine(backbone), self.spec.train.max_length)
        self.remote = self._reach_endpoint()

    def _reach_endpoint(self) -> "RemoteModel | None":
        """The remote model that is to be prompted, asked once whether it answers. Raises EndpointUnavailable."""
        name = endpoint_name(self.spec.baseline.prompt_model)
        if name is None or not self.spec.runs_baselines or "zero_shot" not in self.spec.baseline.methods:
            return None
        if self.job.endpoint is None:
            raise EndpointUnavailable(
                f"This worker knows no endpoint {name!r}.",
                hint="Give TUNEPROOF_PROMPT_ENDPOINTS to every API and worker process, then retry the job.",
            )
        try:
            from worker.methods.remote import RemoteModel
        except ImportError as error:
            raise EndpointUnavailable(
                "The worker lacks the packages for remote endpoints.", hint="pip install 'tuneproof[remote]'"
            ) from error
        endpoint = Endpoint.model_validate(self.job.endpoint)
        remote = RemoteModel(endpoint, name, self.spec.seed, self.base.engine.backbone.tokenizer)
        remote.check()
        return remote

    def _baselines(self) -> None:
        methods = self.spec.baseline.methods
        for i, name in enumerate(methods):
            on_progress = self.reporter.part(i / len(methods), (i + 1) / len(methods))
            on_progress(0.0, name)
            if name in ("majority", "tfidf_logreg"):
                method = Majority() if name == "majority" else TfidfLogreg()
                self._predict_all(name, method.fit(self.train, self.validation, on_progress), on_progress)
            elif name == "embedding_logreg":
                fitted = EmbeddingLogreg(self.base).fit(self.train, self.validation, on_progress)
                folder = self.folder / "models" / name
                served = self._saved(name, fitted, folder, "fp32", on_progress)
                self._publish(name, folder)
                self._predict_all(name, served, on_progress)
            elif self.remote is not None:
                self._prompt(self.remote, on_progress)
            elif self.ready.prompt_model is not None:
                model = PromptedModel(self.ready.prompt_model, self.device, self.spec.baseline.decoding)
                self._prompt(model, on_progress)
            else:
                similarity = Similarity(self.base, self.table.labels, self.spec.baseline.label_descriptions)
                self._predict_all("zero_shot_similarity", similarity, on_progress)

    def _prompt(self, model: Answerer, on_progress: OnProgress) -> None:
        asked = self.spec.baseline
        template = PromptTemplate(asked.prompt_template or USER_V1, descriptions=asked.label_descriptions)
        texts = tuple(self.test.texts[i] for i in self.ready.subset)
        longest = self.spec.train.max_length
        prompted = {"zero_shot_prompt": Prompted(model, template, self.table.labels, max_text_tokens=longest)}
        if self.spec.baseline.few_shot:
            examples = draw_examples(self.train, self.spec.baseline.few_shot, self.spec.seed)
            prompted["few_shot_prompt"] = Prompted(model, template, self.table.labels, examples, longest)
        shown: dict[str, Any] = {**model.facts, "template_version": template.version, "template": template.user}
        shown["label_descriptions"] = asked.label_descriptions
        for name, method in prompted.items():
            shown[name] = dict(zip(("system", "user"), method.messages(texts[0]), strict=True))
            try:
                self.answers[name] = {"baseline_subset": method.predict(texts, on_progress)}
            except EndpointUnavailable as error:
                if not self.answers and not self.spec.trains and self.spec.baseline.methods[-1] == "zero_shot":
                    raise  # there is nothing else to judge
                left_out = " and ".join(other for other in prompted if other not in self.answers)
                self._say(f"{left_out}: left out. {error.detail} {error.hint}", "warning")
                break
            finally:
                if self.remote is not None:
                    self._say(f"{name}: {self.remote.account()}", "info")
        write_json(self.out / "prompt.json", shown)

    def _fine_tune(self) -> None:
        recipe = LoraRecipe.of(self.spec.train, self.spec.seed)
        whole = main_part(self.spec.learning_curve)
        lora = Lora(
            self.base, recipe, self.folder / "checkpoints", self.reporter.checkpoint, self.reporter.event,
            self.job.checkpoint_seconds, self.stop,
            lambda share, message: self.reporter.goes_on(share * whole, message),
        )  # fmt: skip
        on_progress = self.reporter.part(0.0, whole)
        trained = lora.fit(self.train, self.validation, on_progress)
        self.training = trained.facts()
        lines = "".join(json.dumps(told) + "\n" for told in trained.state.log)
        (self.out / "training_log.jsonl").write_text(lines, encoding="utf-8")
        checkpointing = {"gradient_checkpointing": trained.state.gradient_checkpointing}
        self.spec = self.spec.model_copy(update={"train": self.spec.train.model_copy(update=checkpointing)})
        self.reporter.spec(self.spec.model_dump())
        if n := trained.truncated_texts:
            longer = f"{n} texts of train and validation are longer than {recipe.max_length} tokens"
            self._say(f"{longer}; what lies beyond was not read.", "warning")
        self.lora = self._saved("lora", trained, self.out / "adapter", recipe.precision, on_progress)
        self._publish("lora", self.out / "adapter")

    def _saved(
        self, method: str, fitted: Saveable, folder: Path, precision: str, on_progress: OnProgress = silent
    ) -> Served:
        """Saves a model and loads it the way serving does. Raises RoundTripFailed."""
        backbone = self.base.engine.backbone
        split = {"algorithm": self.ready.split_algorithm, "sha256": sha256_of(self.out / "split.csv")}
        manifest = Manifest(
            method=method, base_model=backbone.source.base.name, base_revision=backbone.source.revision,
            labels=self.table.labels.names, states=fitted.states, max_length=self.spec.train.max_length,
            pad_token_id=backbone.pad_id, ends_with_eos=backbone.decoder, seed=self.spec.seed, split=split,
            precision=precision,
        )  # fmt: skip
        return save_and_serve(fitted, folder, manifest, self.base, self.validation, on_progress)

    def _publish(self, method: str, folder: Path) -> None:
        if self.spec.trains:
            self.models.append({"method": method, "folder": folder.relative_to(self.folder).as_posix()})

    def _grow(self) -> LearningCurve:
        """The trained methods on growing shares of the train rows."""
        self.reporter.stage("train")
        trained = [name for name in TRAINED if name in self.answers or (name == "lora" and self.spec.trains)]
        curve = LearningCurve(
            self.spec.learning_curve, trained, self.base,
            LoraRecipe.of(self.spec.train, self.spec.seed) if self.spec.trains else None, self._saved, self.train,
            self.validation, self.test, self.ready.subset, self.spec.seed,
        )  # fmt: skip
        start = main_part(self.spec.learning_curve) if self.spec.trains else 0.0
        curve.fit(self.folder, self.reporter.part(start, 1.0), self.reporter.event)
        return curve

    def _predict_all(self, name: str, predictor: Predictor, on_progress: OnProgress) -> None:
        test = predictor.predict(self.test.texts, on_progress)
        texts = self.validation.texts
        validation = predictor.validation if isinstance(predictor, Served) else predictor.predict(texts, on_progress)
        self.answers[name] = {"test": test, "validation": validation, "baseline_subset": test.take(self.ready.subset)}

    def _evaluate(self) -> dict[str, Any]:
        """Writes figures, predictions and report; gives the job's summary."""
        labels, subset = self.table.labels.names, self.ready.subset
        true = {"test": self.test.label_ids, "validation": self.validation.label_ids}
        true["baseline_subset"] = self.test.label_ids[subset]
        text_ids = same_texts(self.test.texts)
        answers = {name: self.answers[name] for name in COST_ORDER if name in self.answers}
        methods = {
            name: {part: score(predictions, true[part], labels) for part, predictions in parts.items()}
            for name, parts in answers.items()
        }
        judged = {
            name: MethodAnswers(
                true["test"], true["baseline_subset"], parts["test"].label_ids if "test" in parts else None,
                parts["baseline_subset"].label_ids, text_ids, text_ids[subset],
            )
            for name, parts in answers.items()
        }  # fmt: skip
        self.reporter.progress(0.6, "comparing the methods", always=True)
        comparisons = compare_all(judged, len(labels), self.spec.seed)
        split = self.split
        test_share = len(split.test) / (len(split.train) + len(split.validation) + len(split.test))
        headline, recommendation = judge(judged, comparisons, self.spec.margin, len(labels), self.spec.seed, test_share)
        metrics = self._figures(methods, [asdict(comparison) for comparison in comparisons])
        summary = {
            "headline": f"{headline} Prompting was not tested." if self._untested() else headline,
            "recommendation": asdict(recommendation) | {"reason": f"{recommendation.reason}{self._untested()}"},
            "methods": {name: _brief(parts) for name, parts in methods.items()},
        }
        write_json(self.out / "metrics.json", metrics)
        write_predictions(self.out / "predictions.csv", self.table, self.split, subset, answers)
        write_flips(self.out / "flips.csv", changed := flips(self.table, self.split, subset, answers, comparisons))
        notes = {
            "job_name": self.spec.name or self.job.job_id, "dataset_name": self.job.dataset.get("name", "dataset"),
            "warnings": self.warnings, "messages": self.messages,
            "spec": self.spec.model_dump(), "unproven": unproven(judged, comparisons),
        }  # fmt: skip
        (self.out / "report.html").write_text(render(metrics, summary, notes, changed), encoding="utf-8")
        for model in self.models:
            write_card(self.folder / model["folder"], metrics, summary, notes, self.ready.base)
        if self.lora is not None:
            (self.out / MANIFEST).write_bytes((self.out / "adapter" / MANIFEST).read_bytes())
        return summary

    def _untested(self) -> str:
        """What the summary has to say where a prompt was asked for and none was answered."""
        asked = self.spec.runs_baselines and "zero_shot" in self.spec.baseline.methods
        if not asked or any(name.endswith("_prompt") for name in self.answers):
            return ""
        if self.remote is not None:
            return " Prompting was not tested, because the endpoint failed: see the warnings, and start the job again."
        return f" {NOT_PROMPTED}"

    def _figures(self, methods: dict[str, Any], comparisons: list[dict[str, Any]]) -> dict[str, Any]:
        """The contract's metrics.json."""
        split, dropped = self.split, len(self.table.dropped_row_ids)
        sizes = {"n_train": len(split.train), "n_validation": len(split.validation), "n_test": len(split.test)}
        return {
            "schema_version": 1,
            "job_id": self.job.job_id,
            "dataset": self._dataset(),
            "labels": list(self.table.labels.names),
            "split": {"seed": self.spec.seed, "algorithm": self.ready.split_algorithm, **sizes, "n_dropped": dropped},
            "baseline_subset": {"n": len(self.ready.subset), "drawn_from": "test", "seed": self.spec.seed},
            "methods": methods,
            "comparison": comparisons,
            "training": self.training,
            **(self.curve.finished(methods) if self.curve is not None else {"learning_curve": [], "overtakes": None}),
            "environment": self._environment(),
        }

    def _dataset(self) -> dict[str, Any]:
        known = {"id": "", "sha256": sha256_of(self.folder / "dataset"), "n_rows": len(self.table.texts)}
        return known | {key: value for key, value in self.job.dataset.items() if key in known}

    def _environment(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "base_model": self.ready.base.base.name,
            "base_revision": self.ready.base.revision,
            "device": torch.cuda.get_device_name(self.device) if cuda else platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "scored_in": str(self.dtype).removeprefix("torch."),
            "libraries": {name: version(name) for name in ("torch", "transformers", "peft", "scikit-learn", "scipy")},
        }

    def _say(self, message: str, level: str) -> None:
        self.messages.append(message)
        self.reporter.event("message", message, level=level)


def _brief(parts: dict[str, Any]) -> dict[str, Any]:
    """A method's line in the job's summary; `model_id` is filled in where the model is published."""
    on = "test" if "test" in parts else "baseline_subset"
    return {"accuracy": parts[on]["accuracy"], "macro_f1": parts[on]["macro_f1"], "on": on, "model_id": None}


def main(arguments: list[str]) -> int:
    """`python -m worker.run FOLDER`. Gives the exit status: 0 done, 1 failed, 75 stopped."""
    stop = Stop()
    stop.listen()
    folder = Path(arguments[0])
    transformers_logging.set_verbosity_error()  # that a fresh head is missing from the checkpoint is no news
    transformers_logging.disable_progress_bar()
    # Libraries print where they like; standard output belongs to the messages alone.
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if rank():
        return follow(folder)
    reporter = Reporter(messages)
    spec = json.loads((folder / "job.json").read_text(encoding="utf-8")).get("spec", {})
    try:
        if world_size() > 1:
            meeting_place()
        Bulk(folder, reporter).run() if spec.get("kind") == "predict" else Experiment(folder, reporter, stop).run()
    except (Stopped, HelperGone):
        return STOPPED
    except (torch.OutOfMemoryError, MemoryError):
        reporter.error(OutOfMemory.code, "The job does not fit into the device's memory.", "Lower train.batch_size.")
        return 1
    except AppError as error:
        reporter.error(error.code, error.detail, error.hint)
        return 1
    except Exception as error:
        if not disk_is_full(error):
            raise
        reporter.error(**DISK_FULL)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
