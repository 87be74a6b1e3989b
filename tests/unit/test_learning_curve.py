"""A tiny experiment with a learning curve, through `worker.run`; and what it says of the prompt."""

import csv
import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.special import softmax

from service.core.spec import auto_epochs
from service.ml.adapter import load_adapter
from service.ml.backbone import load_backbone
from service.ml.base_models import find_base, locate
from service.ml.engine import Engine
from service.ml.manifest import Manifest
from service.ml.preflight import near_duplicates
from tests.adapters import stock_logits
from tests.tiny import BERT, KEYWORDS, labelled_texts
from worker import learning_curve as curve_module
from worker.learning_curve import LearningCurve, main_part, overtakes
from worker.methods.frozen import FrozenBase
from worker.methods.lora import Lora
from worker.progress import Reporter
from worker.run import Experiment

N_LABELS = len(KEYWORDS)
SHARES = [0.1, 0.5, 1.0]
METHODS = {"tfidf_logreg", "embedding_logreg", "lora"}
LEAK = "near_duplicate_across_parts"


class Run:
    """An experiment run in this process, with what it said, and every fit that was asked of LoRA."""

    def __init__(self, folder, models_dir, **spec):
        texts, labels = labelled_texts(240)
        with (folder / "dataset").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
        self.spec = {
            "base_model": BERT, "baseline": {"sample_size": 10},
            "train": {"epochs": 2, "max_length": 24, "learning_rate": 1e-3, "precision": "fp32"},
        } | spec  # fmt: skip
        (folder / "job.json").write_text(
            json.dumps({"spec": self.spec, "models_dir": str(models_dir), "serve_dtype": "fp32"})
        )
        self.folder, self.said, self.fits = folder, io.StringIO(), []
        original = Lora.fit

        def fit(lora, train, validation, on_progress):
            self.fits.append((train, lora.checkpoints, lora.recipe))
            return original(lora, train, validation, on_progress)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Lora, "fit", fit)
            self.experiment = Experiment(folder, Reporter(self.said))
            self.experiment.run()
        self.metrics = json.loads((folder / "out" / "metrics.json").read_text())
        self.messages = [json.loads(line) for line in self.said.getvalue().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_models):
    return Run(tmp_path_factory.mktemp("run"), tiny_models, learning_curve=SHARES)


# The curve -----------------------------------------------------------------------------------------
def test_every_share_has_the_trained_methods_and_the_whole_is_the_main_run_itself(run):
    curve, n_train = run.metrics["learning_curve"], run.metrics["split"]["n_train"]
    assert [point["share"] for point in curve] == SHARES
    assert [point["n_train"] for point in curve] == [round(share * n_train) for share in SHARES]
    assert all(set(point["methods"]) == METHODS for point in curve)
    for name, figures in curve[-1]["methods"].items():
        on_test, on_subset = (run.metrics["methods"][name][rows] for rows in ("test", "baseline_subset"))
        assert figures == {
            "accuracy": on_test["accuracy"], "macro_f1": on_test["macro_f1"], "subset_accuracy": on_subset["accuracy"]
        }  # fmt: skip
    assert curve[0]["methods"]["tfidf_logreg"]["accuracy"] < curve[-1]["methods"]["tfidf_logreg"]["accuracy"]


def test_shares_are_nested_stratified_and_fitted_once_in_folders_of_their_own(run):
    whole, half, tenth = ({*zip(rows.texts, rows.label_ids.tolist(), strict=True)} for rows, _, _ in run.fits)
    assert tenth < half < whole
    n_train = run.metrics["split"]["n_train"]
    for rows, share in ((half, 0.5), (tenth, 0.1)):
        counts = Counter(label for _, label in rows)
        assert set(counts) == set(range(N_LABELS))
        assert max(counts.values()) <= share * n_train / N_LABELS + 1
    folders = [folder for _, folder, _ in run.fits]
    assert folders[0] == run.folder / "checkpoints"
    assert len(set(folders)) == 3
    assert not any(folder.exists() for folder in folders[1:])
    kept = [message["folder"] for message in run.messages if message["type"] == "checkpoint"]
    assert kept
    assert all(folder.startswith(str(run.folder / "checkpoints")) for folder in kept)


def test_a_share_is_fitted_and_served_as_a_run_on_those_rows_alone_would_be(run, tmp_path, tiny_models):
    experiment = run.experiment
    [(rows, _, recipe)] = [fit for fit in run.fits if len(fit[0].texts) == round(0.5 * run.metrics["split"]["n_train"])]
    base = FrozenBase(Engine(load_backbone(locate(find_base(BERT, tiny_models)), device=torch.device("cpu"),
                                           dtype=torch.float32)), 24)  # fmt: skip
    alone = Lora(base, recipe, tmp_path).fit(rows, experiment.validation)
    right = alone.logits(experiment.test.texts).argmax(1) == experiment.test.label_ids
    assert run.metrics["learning_curve"][1]["methods"]["lora"]["accuracy"] == pytest.approx(right.mean(), abs=0.05)


def test_states_of_the_train_rows_are_computed_once_for_all_shares(run):
    held = [set(texts) for texts in run.experiment.base._states]
    train = set(run.experiment.train.texts)
    assert sum(texts <= train for texts in held) == 1


def test_the_curve_publishes_no_model_of_its_own_and_progress_never_falls(run):
    [result] = [message for message in run.messages if message["type"] == "result"]
    assert [model["method"] for model in result["models"]] == ["embedding_logreg", "lora"]
    progress = [message for message in run.messages if message["type"] == "progress"]
    fractions = [message["fraction"] for message in progress]
    assert fractions == sorted(fractions)
    stages = [message["stage"] for message in progress]
    assert list(dict.fromkeys(stages)) == ["prepare", "baseline", "train", "evaluate"]
    assert stages == sorted(stages, key=["prepare", "baseline", "train", "evaluate"].index)
    told = [message["data"] for message in run.messages if message["type"] == "event" and "share" in message["data"]]
    assert {(entry["share"], entry["method"]) for entry in told} == {(s, m) for s in (0.1, 0.5) for m in METHODS}


def test_near_duplicates_across_the_split_are_told_before_anything_is_trained(tmp_path, tiny_models):
    texts, labels = labelled_texts(240)
    long = [f"{text} and then some words that all of these texts have in common, as templates do" for text in texts]
    with (tmp_path / "dataset").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("text", "label"), *zip([*long, *(f"{t}s" for t in long)], labels * 2, strict=True)]
        )
    spec = {"base_model": BERT, "train": {"max_length": 24}}
    (tmp_path / "job.json").write_text(json.dumps({"spec": spec, "models_dir": str(tiny_models)}))
    (tmp_path / "out").mkdir()
    experiment = Experiment(tmp_path, Reporter(said := io.StringIO()))
    experiment._prepare()
    messages = [json.loads(line) for line in said.getvalue().splitlines()]
    [told] = [message for message in messages if (message.get("data") or {}).get("code") == LEAK]
    assert told["level"] == "warning"
    assert told["data"]["count"] == near_duplicates(experiment.table, experiment.split)[1].count > 10
    assert told["message"].endswith(f"figures on the later part will flatter. ({told['data']['count']} rows)")
    assert [warning["code"] for warning in experiment.warnings] == [LEAK]  # which the report lists


def test_the_fine_tune_of_all_rows_keeps_its_part_of_the_stage():
    assert main_part([]) == main_part([1.0]) == 1
    assert main_part([0.1, 0.4, 1.0]) == pytest.approx(1 / 1.5)


def test_baselines_alone_have_a_curve_too_and_nothing_asked_for_is_an_empty_one(tmp_path, tiny_models):
    methods = {"methods": ["majority", "tfidf_logreg"], "sample_size": 10}
    for name, shares in (("some", [0.3]), ("none", [])):
        (tmp_path / name).mkdir()
        made = Run(tmp_path / name, tiny_models, kind="baseline", baseline=methods, learning_curve=shares)
        assert [(p["share"], set(p["methods"])) for p in made.metrics["learning_curve"]] == [
            (share, {"tfidf_logreg"}) for share in shares
        ]
        assert made.metrics["overtakes"] is None


def test_epochs_that_are_auto_are_those_of_so_many_rows(run, monkeypatch):
    experiment, asked = run.experiment, []

    class Recorded(Lora):
        def fit(self, train, validation, on_progress):
            asked.append((len(train.texts), self.recipe.epochs))
            raise InterruptedError

    monkeypatch.setattr(curve_module, "Lora", Recorded)
    monkeypatch.setattr(curve_module, "auto_epochs", lambda n: 9 if n < 100 else 6)
    for epochs in (6, 2):
        recipe = run.fits[0][2].__class__(**run.fits[0][2].__dict__ | {"epochs": epochs})
        curve = LearningCurve(
            [0.1], ["lora"], experiment.base, recipe, experiment._saved, experiment.train, experiment.validation,
            experiment.test, experiment.ready.subset, 1,
        )  # fmt: skip
        with pytest.raises(InterruptedError):
            curve.fit(run.folder, lambda *_: None, lambda *_: None)
    assert [epochs for _, epochs in asked] == [9, 2]
    assert auto_epochs(100) > auto_epochs(100_000)


# Where fine-tuning overtakes prompting -------------------------------------------------------------
def curve_of(**accuracies):
    """Points of 10, 20, … train rows, with these accuracies on the prompt's rows."""
    n = len(next(iter(accuracies.values())))
    return [
        {"share": (i + 1) / n, "n_train": 10 * (i + 1),
         "methods": {name: {"subset_accuracy": values[i]} for name, values in accuracies.items()}}
        for i in range(n)
    ]  # fmt: skip


def prompted(**accuracies):
    return {name: {"baseline_subset": {"accuracy": value, "n": 300}} for name, value in accuracies.items()}


@pytest.mark.parametrize(
    ("lora", "n_train"),
    [([0.6, 0.7, 0.8], 20), ([0.9, 0.9, 0.9], 10), ([0.7, 0.6, 0.7], 30), ([0.7, 0.8, 0.65], None), ([0.65] * 3, None)],
)
def test_it_overtakes_where_it_gets_above_the_prompt_and_stays_there(lora, n_train):
    found = overtakes(curve_of(tfidf_logreg=[0.9] * 3, lora=lora), prompted(zero_shot_prompt=0.65, lora=0.9))
    assert (found and (found["method"], found["n_train"])) == (n_train and ("lora", n_train))
    if found:
        assert (found["prompt"], found["prompt_accuracy"], found["n"]) == ("zero_shot_prompt", 0.65, 300)
        assert "point estimate" in found["caveat"]


def test_the_better_prompt_is_the_one_to_beat_and_without_a_fine_tune_the_first_method_counts():
    methods = prompted(zero_shot_prompt=0.5, few_shot_prompt=0.7)
    found = overtakes(curve_of(tfidf_logreg=[0.6, 0.6, 0.8], embedding_logreg=[0.6, 0.75, 0.8]), methods)
    assert (found["method"], found["n_train"], found["prompt"]) == ("embedding_logreg", 20, "few_shot_prompt")
    assert overtakes(curve_of(lora=[0.9]), prompted(zero_shot_similarity=0.1)) is None
    assert overtakes([], methods) is None


# What the run says of its confidences --------------------------------------------------------------
@pytest.mark.parametrize("method", ["lora", "embedding_logreg"])
def test_the_manifest_has_the_temperature_and_thresholds_that_the_figures_and_the_engine_use(run, method, tiny_models):
    folder = run.folder / ("out/adapter" if method == "lora" else f"models/{method}")
    manifest, base = Manifest.read(folder), run.experiment.base
    backbone = base.engine.backbone
    adapter = load_adapter(folder, head_name=backbone.head_name, device=backbone.device, dtype=torch.float32)
    assert adapter.temperature == manifest.temperature == run.metrics["methods"][method]["test"]["temperature"]
    assert manifest.temperature != 1
    rows = list(csv.DictReader(io.StringIO((run.folder / "out" / "predictions.csv").read_text(), newline="")))
    base.engine.attach(adapter)
    served = base.predict(adapter, [row["text"] for row in rows])
    confidence = [float(row[f"{method}_confidence"]) for row in rows]
    np.testing.assert_allclose(served.probabilities.max(1), confidence, atol=1e-6)
    if method == "lora":
        logits = stock_logits(tiny_models / BERT, folder, [row["text"] for row in rows], N_LABELS, 24)
        np.testing.assert_allclose(softmax(logits / manifest.temperature, axis=1).max(1), confidence, atol=1e-4)
    validation = [row for row in rows if row["split"] == "validation"]
    assert manifest.calibration["rows"] == len(validation)
    for least, kept, right in manifest.calibration["points"]:
        above = [row for row in validation if float(row[f"{method}_confidence"]) >= least]
        assert (kept, right) == (len(above), sum(row[method] == row["label"] for row in above))


def test_the_temperature_lowers_the_log_loss_of_the_validation_rows_it_was_fitted_on(run):
    for method in METHODS:
        on_validation = run.metrics["methods"][method]["validation"]
        assert on_validation["log_loss"] <= on_validation["log_loss_uncalibrated"] + 0.02, method
    assert "temperature" not in run.metrics["methods"]["majority"]["test"]
