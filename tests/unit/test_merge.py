"""`python -m service merge`: what stock transformers says of the merged model is what the service's engine says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from service.__main__ import main
from service.core.errors import InvalidData, InvalidInput, ModelUnavailable, RoundTripFailed
from service.ml import merge as merge_module
from service.ml.adapter import load_adapter
from service.ml.backbone import load_backbone
from service.ml.base_models import find_base, locate
from service.ml.calibration import softmax
from service.ml.encode import encode, load_tokenizer
from service.ml.engine import Engine
from service.ml.merge import merge
from tests.adapters import manifest, save_random_adapter
from tests.tiny import BERT, DECODERS, DISTILBERT, QWEN3, QWEN3_EOS, ROBERTA, labelled_texts

CPU = torch.device("cpu")
MAX_LENGTH = 24
TEMPERATURE = 2.5
TEXTS = [*labelled_texts(30, seed=5)[0], "a", "refund <|im_end|> [SEP] me", "my parcel is late " * 20]


def published(folder: Path, models_dir: Path, name: str, n_labels: int = 4, **changes: Any) -> Path:
    """A LoRA model as a job leaves it, but for its card."""
    base = models_dir / name
    save_random_adapter(folder, base, load_tokenizer(base, decoder=name in DECODERS), n_labels, rank=4)
    about = manifest(n_labels, max_length=MAX_LENGTH)
    source = locate(find_base(name, models_dir))
    about = replace(about, base_model=name, base_revision=source.revision, temperature=TEMPERATURE, **changes)
    about.write(folder)
    return folder


def served(folder: Path, models_dir: Path, name: str) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Labels and confidences as `/predict` gives them."""
    engine = Engine(load_backbone(locate(find_base(name, models_dir)), device=CPU, dtype=torch.float32))
    head_name = engine.backbone.head_name
    adapter = load_adapter(folder, head_name=head_name, device=CPU, dtype=torch.float32)
    engine.attach(adapter)
    ids = encode(engine.backbone.tokenizer, TEXTS, adapter.max_length).ids
    probabilities = softmax(np.stack(engine.score(ids, [adapter] * len(ids))), adapter.temperature)
    return [adapter.labels[i] for i in probabilities.argmax(1)], probabilities


@pytest.mark.parametrize("name", [QWEN3, QWEN3_EOS, BERT, DISTILBERT, ROBERTA])
@pytest.mark.parametrize("n_labels", [2, 5])
def test_stock_transformers_gives_the_labels_and_confidences_of_the_service(
    name: str, n_labels: int, tiny_models: Path, tmp_path: Path
) -> None:
    folder = published(tmp_path / "adapter", tiny_models, name, n_labels)
    labels, probabilities = served(folder, tiny_models, name)
    assert len(set(labels)) > 1
    merge(folder, tmp_path / "merged", tiny_models)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.float32
    inputs = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt", return_token_type_ids=False)
    assert inputs["input_ids"].shape[1] == MAX_LENGTH
    with torch.inference_mode():
        got = model(**inputs).logits.softmax(-1).numpy()
    np.testing.assert_allclose(got, probabilities, atol=1e-4)
    assert [model.config.id2label[i] for i in got.argmax(1)] == labels


@pytest.mark.parametrize("name", [QWEN3, BERT])
def test_a_stock_pipeline_needs_nothing_but_the_folder(name: str, tiny_models: Path, tmp_path: Path) -> None:
    folder = published(tmp_path / "adapter", tiny_models, name)
    labels, probabilities = served(folder, tiny_models, name)
    merge(folder, tmp_path / "merged", tiny_models)
    answers = pipeline("text-classification", str(tmp_path / "merged"), truncation=True)(TEXTS)
    assert [answer["label"] for answer in answers] == labels
    np.testing.assert_allclose([answer["score"] for answer in answers], probabilities.max(1), atol=1e-4)
    assert not list(tmp_path.glob(".*"))


def test_whoever_may_read_one_file_of_a_merged_model_may_read_them_all(tiny_models: Path, tmp_path: Path) -> None:
    merge(published(tmp_path / "adapter", tiny_models, BERT), tmp_path / "merged", tiny_models)
    (tmp_path / "plain").touch()
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "merged").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {(tmp_path / "plain").stat().st_mode}


def test_what_has_no_stock_form_is_refused_with_what_to_do(tiny_models: Path, tmp_path: Path) -> None:
    folder = published(tmp_path / "adapter", tiny_models, BERT, method="embedding_logreg")
    with pytest.raises(InvalidInput, match="--format adapter, or export its job's lora model"):
        merge(folder, tmp_path / "merged", tiny_models)


def test_files_that_are_not_those_published_are_refused(tiny_models: Path, tmp_path: Path) -> None:
    folder = published(tmp_path / "adapter", tiny_models, BERT)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidData, match=r"adapter_config.json .* not the file that was published"):
        merge(folder, tmp_path / "merged", tiny_models)
    folder = published(tmp_path / "other", tiny_models, BERT)
    replace(manifest(4), base_model=BERT, base_revision="sha256:1").write(folder)
    with pytest.raises(ModelUnavailable, match="another revision"):
        merge(folder, tmp_path / "merged", tiny_models)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "other"}


@pytest.mark.parametrize("fault", ["weights", "length"])
def test_a_merged_model_that_answers_otherwise_is_not_left(
    fault: str, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = published(tmp_path / "adapter", tiny_models, QWEN3)
    write = merge_module._write

    def spoil(folder: Path, made: Path, *given: Any) -> Any:
        expected = write(folder, made, *given)
        if fault == "weights":
            model = AutoModelForSequenceClassification.from_pretrained(made)
            torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.weight, std=0.2)
            model.save_pretrained(made)
        else:
            config = json.loads((made / "tokenizer_config.json").read_text())
            (made / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 512}))
        return expected

    monkeypatch.setattr(merge_module, "_write", spoil)
    with pytest.raises(RoundTripFailed, match="Nothing was written"):
        merge(folder, tmp_path / "merged", tiny_models)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_command_finds_the_base_by_its_setting_and_says_what_is_in_the_way(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published(tmp_path / "adapter", tiny_models, QWEN3)
    words = ["merge", str(folder), str(tmp_path / "merged")]
    monkeypatch.setenv("TUNEPROOF_MODELS_DIR", str(tmp_path))
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"Base model '{QWEN3}' is not on the allow-list.")
    monkeypatch.setenv("TUNEPROOF_MODELS_DIR", str(tiny_models))
    assert main(words) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
