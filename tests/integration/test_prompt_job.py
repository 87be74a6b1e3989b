"""A baseline job that prompts: from the file to prompt.json and predictions.csv, in this process."""

import csv
import html
import io
import json
from pathlib import Path
from typing import Any

import pytest

from service.core.errors import InvalidData, ModelUnavailable
from service.ml.base_models import PROMPT_DEFAULT, BaseModel, Located
from tests.tiny import BERT, KEYWORDS, QWEN3, labelled_texts
from worker import prepare
from worker.progress import Reporter
from worker.run import Experiment

DESCRIPTIONS = {"login": "cannot get into the account", "praise": "says {thanks}"}


def run(
    folder: Path, models_dir: Path, base_model: str = QWEN3, said: io.StringIO | None = None, **baseline: Any
) -> Path:
    texts, labels = labelled_texts(120)
    with (folder / "dataset").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    asked = {"methods": ["zero_shot"], "prompt_model": QWEN3, "sample_size": 10} | baseline
    spec = {"kind": "baseline", "base_model": base_model, "baseline": asked, "train": {"max_length": 32}}
    (folder / "job.json").write_text(json.dumps({"spec": spec, "models_dir": str(models_dir)}))
    Experiment(folder, Reporter(said or io.StringIO())).run()
    return folder / "out"


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text(), newline="")))


@pytest.mark.parametrize("decoding", ["free", "constrained"])
def test_the_prompt_its_version_and_the_raw_answers_are_kept(decoding: str, tmp_path: Path, tiny_models: Path) -> None:
    out = run(tmp_path, tiny_models, decoding=decoding, few_shot=4, label_descriptions=DESCRIPTIONS)
    shown = json.loads((out / "prompt.json").read_text())
    assert (shown["prompt_model"], shown["template_version"]) == (QWEN3, "zero-shot-v2")
    assert (shown["decoding"], shown["label_descriptions"]) == (decoding, DESCRIPTIONS)
    asked = [row for row in rows(out / "predictions.csv") if row["in_baseline_subset"] == "1"]
    listed = "Categories:\n- billing\n- delivery\n- login: cannot get into the account\n- praise: says {thanks}\n"
    for method in ("zero_shot_prompt", "few_shot_prompt"):
        user = shown[method]["user"]
        assert user.startswith(listed)
        assert user.rpartition("\nText: ")[2] in {row["text"] for row in asked}
        figures = json.loads((out / "metrics.json").read_text())["methods"][method]["baseline_subset"]
        failed = figures["n_invalid"] + figures["n_ambiguous"] + figures["n_empty"]
        assert failed == sum(row[method] == "" for row in asked)
        # Without an answer is wrong.
        assert figures["accuracy"] == pytest.approx(sum(row[method] == row["label"] for row in asked) / len(asked))
        if decoding == "constrained":
            assert failed == 0
            assert all(row[f"{method}_raw"] == row[method] for row in asked)
        else:
            assert any(row[f"{method}_raw"] not in KEYWORDS for row in asked)


def test_the_examples_shown_are_rows_of_train_one_per_label(tmp_path: Path, tiny_models: Path) -> None:
    out = run(tmp_path, tiny_models, few_shot=4)
    shown = json.loads((out / "prompt.json").read_text())
    assert shown["template_version"] == "zero-shot-v1"
    given = rows(tmp_path / "dataset")
    train = {given[int(row["row_id"])]["text"] for row in rows(out / "split.csv") if row["split"] == "train"}
    *examples, _asked = shown["few_shot_prompt"]["user"].split("\nText: ")[1:]
    texts, labels = zip(*(example.strip().split("\nCategory: ") for example in examples), strict=True)
    assert set(texts) <= train
    assert sorted(labels) == sorted(KEYWORDS)
    assert "\nCategory: " not in shown["zero_shot_prompt"]["user"]


def test_a_description_of_a_label_that_is_not_there_is_refused_by_name(tmp_path: Path, tiny_models: Path) -> None:
    with pytest.raises(InvalidData, match=r"'refunds'.*no usable row") as refused:
        run(tmp_path, tiny_models, label_descriptions={"login": "x", "refunds": "y"})
    assert "login" not in refused.value.detail
    assert refused.value.hint


def test_where_nothing_can_be_prompted_summary_and_report_say_so_and_the_job_warns(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prepare.locate

    def without_the_default(base: BaseModel, *, download: bool = True) -> Located:
        if base.name == PROMPT_DEFAULT:
            raise ModelUnavailable("It is not here.")
        return found(base, download=download)

    monkeypatch.setattr(prepare, "locate", without_the_default)
    said = io.StringIO()
    out = run(tmp_path, tiny_models, BERT, said, methods=["majority", "zero_shot"], prompt_model="auto")
    *_, result = messages = [json.loads(line) for line in said.getvalue().splitlines()]
    sentence = "Prompting was not tested, because no generative model is at hand: fetch one with `tuneproof models pull"
    assert f" {sentence}" in result["summary"]["recommendation"]["reason"]
    _before, _verdict, box = (out / "report.html").read_text().partition('<div class="verdict">')
    assert sentence.replace("`", "<code>") in html.unescape(box.partition("</div>")[0])
    (warning,) = [message for message in messages if sentence in message.get("message", "")]
    assert warning["level"] == "warning"
    assert "remote endpoint in `baseline.prompt_model`" in warning["message"]
