"""An experiment on a small local decoder, against stock transformers and PEFT."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.tiny import labelled_texts
from worker.methods.prompts import PromptTemplate, parse_answer

pytestmark = pytest.mark.more


@pytest.fixture(scope="module", params=["tiny-qwen3", "tiny-qwen3-eos"])
def experiment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    """The folder of a finished experiment: the tokenizer without a pad token, appending EOS by itself or not."""
    folder = tmp_path_factory.mktemp(request.param)
    texts, labels = labelled_texts(400)
    with (folder / "dataset").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    spec = {
        "base_model": request.param,
        "baseline": {"methods": ["majority", "embedding_logreg", "zero_shot"], "sample_size": 20, "few_shot": 3},
        "train": {"epochs": 2, "max_length": 32},
    }
    (folder / "job.json").write_text(json.dumps({"spec": spec, "models_dir": str(tiny_models), "serve_dtype": "fp32"}))
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "worker.run", str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    (folder / "base").symlink_to(tiny_models / request.param)
    return folder


def predictions(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "out" / "predictions.csv").read_text(), newline="")))


def test_stock_transformers_and_peft_give_the_fine_tunes_predictions(experiment: Path) -> None:
    adapter = experiment / "out" / "adapter"
    manifest = json.loads((adapter / "manifest.json").read_text())
    labels = manifest["labels"]
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = AutoModelForSequenceClassification.from_pretrained(
        experiment / "base", num_labels=len(labels), dtype=torch.float32
    )
    base.config.pad_token_id = tokenizer.pad_token_id
    stock = PeftModel.from_pretrained(base, adapter).eval()
    rows = predictions(experiment)
    inputs = tokenizer([row["text"] for row in rows], padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.inference_mode():
        probabilities = (stock(**inputs).logits / manifest["temperature"]).softmax(-1)
    assert [labels[i] for i in probabilities.argmax(1)] == [row["lora"] for row in rows]
    assert manifest["temperature"] != 1
    confidence = [float(row["lora_confidence"]) for row in rows]
    assert probabilities.max(1).values.tolist() == pytest.approx(confidence, abs=1e-4)


def test_stock_generate_gives_the_prompts_answers_row_by_row(experiment: Path) -> None:
    asked = [row for row in predictions(experiment) if row["in_baseline_subset"] == "1"]
    labels = json.loads((experiment / "out" / "metrics.json").read_text())["labels"]
    tokenizer = AutoTokenizer.from_pretrained(experiment / "base")
    precision = torch.bfloat16 if _ran_in_bf16(experiment) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(experiment / "base", dtype=precision).eval()
    longest = max(len(tokenizer(f" {label}", add_special_tokens=False)["input_ids"]) for label in labels) + 8
    same = 0
    for row in asked:
        system, user = PromptTemplate().fill(labels, row["text"])
        ids = tokenizer(f"{system}\n\n{user}\nLabel:")["input_ids"]
        while ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=longest,
                do_sample=False, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        raw = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        same += raw == row["zero_shot_prompt_raw"]
        assert row["zero_shot_prompt"] == (parse_answer(row["zero_shot_prompt_raw"], labels).label or "")
    # A model of random weights has near-ties, and a batch rounds otherwise than a single row.
    assert same >= 0.8 * len(asked)


def _ran_in_bf16(folder: Path) -> bool:
    return bool(json.loads((folder / "out" / "metrics.json").read_text())["training"]["precision"] == "bf16")
