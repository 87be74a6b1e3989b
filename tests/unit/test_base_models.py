import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from service.core.errors import ModelUnavailable, UnknownBaseModel
from service.ml import base_models
from service.ml.backbone import load_backbone
from service.ml.base_models import EMBEDDED, GPU_DEFAULT, PROMPT_DEFAULT, allowed_models, find_base, locate
from tests.tiny import BERT, DISTILBERT, QWEN3, ROBERTA

CPU = torch.device("cpu")


def load(models_dir, name):
    return load_backbone(locate(find_base(name, models_dir)), device=CPU, dtype=torch.float32)


def copy_of(models_dir, tmp_path, name=BERT):
    shutil.copytree(models_dir / name, tmp_path / "mine")
    return tmp_path / "mine"


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# The allow-list ------------------------------------------------------------------------------------


def test_the_list_without_a_folder_is_the_hubs_and_the_embedded_one():
    models = allowed_models(None)
    assert set(models) == {"f2llm-0.6b", "f2llm-1.7b", "qwen3-0.6b", "minilm"}
    assert models[GPU_DEFAULT].repo == "codefuse-ai/F2LLM-0.6B"
    assert all(len(base.revision) == 40 for base in models.values() if base.repo)
    assert [name for name, base in models.items() if base.generative] == [PROMPT_DEFAULT]


def test_local_folders_are_allowed_by_their_names(tiny_models):
    models = allowed_models(tiny_models)
    assert {QWEN3, BERT, DISTILBERT, ROBERTA, EMBEDDED} <= set(models)
    assert models[QWEN3].generative
    assert not models[BERT].generative
    assert (models[QWEN3].max_length, models[BERT].max_length) == (512, 128)
    assert models[ROBERTA].max_length == 129  # of 130 positions, those up to the padding's are not used


def test_a_local_folder_takes_the_place_of_a_listed_name(tiny_models, tmp_path):
    shutil.copytree(tiny_models / QWEN3, tmp_path / GPU_DEFAULT)
    located = locate(find_base(GPU_DEFAULT, tmp_path))
    assert located.folder == tmp_path / GPU_DEFAULT
    assert located.revision.startswith("sha256:")
    assert located.size_bytes == (tmp_path / GPU_DEFAULT / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "name",
    ["../../etc", "..", ".", "/etc/passwd", "", "auto", "https://example.org/model", "codefuse-ai/F2LLM-0.6B",
     "hf://x", "minilm/../minilm", "minilm\n", "MINILM", "nobody/has-it", "\0"],
)  # fmt: skip
def test_names_off_the_list_are_refused(name, tiny_models):
    with pytest.raises(UnknownBaseModel) as refused:
        find_base(name, tiny_models)
    assert EMBEDDED in refused.value.detail
    assert str(tiny_models) not in refused.value.detail


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.pt", "model.pkl", None])
def test_a_folder_without_safetensors_is_not_on_the_list(weights, tiny_models, tmp_path):
    folder = copy_of(tiny_models, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if weights:
        torch.save(tensors, folder / weights)
    assert "mine" not in allowed_models(tmp_path)


def test_a_folder_without_a_config_a_file_and_an_odd_name_are_not_on_the_list(tiny_models, tmp_path):
    (copy_of(tiny_models, tmp_path) / "config.json").unlink()
    (tmp_path / "file.safetensors").write_bytes(b"")
    for name in (".hidden", "-rf", "two words", "x" * 129):
        shutil.copytree(tiny_models / BERT, tmp_path / name)
    assert set(allowed_models(tmp_path)) == set(allowed_models(None))
    assert set(allowed_models(tmp_path / "nowhere")) == set(allowed_models(None))


@pytest.mark.parametrize(
    "config",
    ["", "{", "[]", "null", '"x"', '{"max_position_embeddings": "many", "architectures": {"a": 1}}',
     '{"architectures": [], "max_position_embeddings": -5}',
     '{"architectures": null, "model_type": ["x"]}', b"\xff\xfe"],
)  # fmt: skip
def test_one_damaged_config_does_not_take_the_list_down(config, tiny_models, tmp_path):
    folder = copy_of(tiny_models, tmp_path)
    (folder / "config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
    assert allowed_models(tmp_path)["mine"].max_length == 512
    with pytest.raises(ModelUnavailable):
        load(tmp_path, "mine")


# Files at hand, and the right ones -----------------------------------------------------------------


def test_the_embedded_model_is_at_hand_and_the_pinned_one():
    located = locate(find_base(EMBEDDED, None))
    assert located.revision == "sha256:53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert (located.folder / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_an_embedded_model_that_was_tampered_with_is_refused(monkeypatch, tmp_path, name):
    for file in locate(find_base(EMBEDDED, None)).folder.glob("*.*"):
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.setattr(base_models, "_embedded_folder", lambda: tmp_path)
    assert locate(find_base(EMBEDDED, None)).folder == tmp_path
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(bytes(data))
    with pytest.raises(ModelUnavailable, match="not the pinned ones") as refused:
        locate(find_base(EMBEDDED, None))
    assert refused.value.hint


def test_an_embedded_model_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr(base_models.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModelUnavailable) as refused:
        locate(find_base(EMBEDDED, None))
    assert "pip install" in refused.value.hint


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize("name", ["f2llm-0.6b", "f2llm-1.7b", "qwen3-0.6b"])
def test_a_hub_model_without_a_hub_is_unavailable_at_once_and_says_what_to_do(name, download):
    start = time.perf_counter()
    with pytest.raises(ModelUnavailable) as refused:
        locate(find_base(name, None), download=download)
    assert time.perf_counter() - start < 5
    assert "TUNEPROOF_MODELS_DIR" in refused.value.hint
    assert EMBEDDED in refused.value.hint


def cached(monkeypatch, tmp_path, base, files):
    """A hub cache that holds `files` of the pinned revision, as a download that was cut off leaves it."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / f"models--{base.repo.replace('/', '--')}" / "snapshots" / base.revision
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_a_download_that_was_cut_off_is_not_taken_for_the_model(monkeypatch, tmp_path):
    base = find_base(GPU_DEFAULT, None)
    cached(monkeypatch, tmp_path, base, {"config.json": "{}", "tokenizer.json": "{}"})
    with pytest.raises(ModelUnavailable):
        locate(base)


@pytest.mark.parametrize("second", [True, False])
def test_of_sharded_weights_every_shard_must_be_there(second, monkeypatch, tmp_path):
    base = find_base("f2llm-1.7b", None)
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    files = {
        "config.json": "{}",
        "tokenizer.json": "{}",
        "model.safetensors.index.json": index,
        "model-1.safetensors": "",
    }
    folder = cached(monkeypatch, tmp_path, base, files)
    if second:
        (folder / "model-2.safetensors").write_text("")
        assert locate(base).folder == folder
    else:
        with pytest.raises(ModelUnavailable):
            locate(base)


def test_the_revision_of_a_local_model_follows_its_weights(tiny_models, tmp_path):
    folder = copy_of(tiny_models, tmp_path)
    before = locate(find_base("mine", tmp_path)).revision
    tensors = load_file(folder / "model.safetensors")
    tensors["pooler.dense.bias"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert locate(find_base("mine", tmp_path)).revision != before


def test_a_local_model_taken_away_after_it_was_named_is_unavailable(tiny_models, tmp_path):
    folder = copy_of(tiny_models, tmp_path)
    base = find_base("mine", tmp_path)
    shutil.rmtree(folder)
    with pytest.raises(ModelUnavailable):
        locate(base)


# Damage --------------------------------------------------------------------------------------------


def cut_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


def change(folder, how):
    tensors = load_file(folder / "model.safetensors")
    how(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def nan_weight(folder):
    change(folder, lambda t: t["encoder.layer.1.attention.self.query.weight"].view(-1)[7].fill_(float("nan")))


def infinite_weight(folder):
    change(folder, lambda t: t["embeddings.word_embeddings.weight"].view(-1)[7].fill_(float("inf")))


def a_missing_norm(folder):
    change(folder, lambda t: t.pop("embeddings.LayerNorm.weight"))


def a_missing_projection(folder):
    change(folder, lambda t: t.pop("encoder.layer.1.attention.self.query.weight"))


def half_of_the_layers(folder):
    change(folder, lambda t: [t.pop(name) for name in list(t) if ".layer.1." in name])


def a_missing_bias(folder):
    change(folder, lambda t: t.pop("encoder.layer.0.output.dense.bias"))


def a_wrong_shape(folder):
    change(folder, lambda t: t.update({"encoder.layer.0.output.dense.bias": torch.zeros(3)}))


def another_architecture(folder):
    edit(folder / "config.json", model_type="qwen3", architectures=["Qwen3ForCausalLM"])


def an_unknown_architecture(folder):
    edit(folder / "config.json", model_type="nobody-knows", architectures=["Nobody"])


def code_of_its_own(folder):
    """Never run: nothing is loaded with trust_remote_code."""
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    auto = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    edit(folder / "config.json", model_type="evil", auto_map=auto)


def no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"')


@pytest.mark.parametrize(
    "damage",
    [
        cut_weights, empty_weights, nan_weight, infinite_weight, a_missing_norm, a_missing_projection,
        half_of_the_layers, a_missing_bias, a_wrong_shape, another_architecture, an_unknown_architecture,
        code_of_its_own, no_tokenizer, a_damaged_tokenizer,
    ],
)  # fmt: skip
def test_a_damaged_base_model_is_unavailable_and_says_what_to_do(damage, tiny_models, tmp_path):
    folder = copy_of(tiny_models, tmp_path)
    load(tmp_path, "mine")  # whole, it loads
    damage(folder)
    with pytest.raises(ModelUnavailable) as refused:
        load(tmp_path, "mine")
    assert refused.value.hint
    assert "mine" in refused.value.detail
    assert str(tmp_path) not in refused.value.detail + refused.value.hint


def test_pickled_weights_beside_the_safetensors_are_not_touched(tiny_models, tmp_path):
    folder = copy_of(tiny_models, tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    assert load(tmp_path, "mine").head_name == "classifier"


def test_layers_a_checkpoint_lacks_are_named_and_only_those(tiny_models):
    fresh = {name: load(tiny_models, name).fresh for name in (QWEN3, BERT, DISTILBERT, ROBERTA)}
    assert fresh == {QWEN3: (), BERT: (), DISTILBERT: ("pre_classifier",), ROBERTA: ("classifier.dense",)}


def test_a_bert_saved_without_its_pooler_trains_one(tiny_models, tmp_path):
    folder = copy_of(tiny_models, tmp_path)
    change(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith("pooler")])
    assert load(tmp_path, "mine").fresh == ("bert.pooler.dense",)


@pytest.mark.parametrize("n_labels", [2, 64, 96])
def test_the_head_is_found_even_where_other_layers_are_as_wide_as_there_are_labels(n_labels, tiny_models):
    heads = {QWEN3: "score", BERT: "classifier", DISTILBERT: "classifier", ROBERTA: "classifier.out_proj"}
    for name, head in heads.items():
        source = locate(find_base(name, tiny_models))
        assert load_backbone(source, device=CPU, dtype=torch.float32, num_labels=n_labels).head_name == head


def test_the_loaded_base_is_frozen_without_dropout_in_eval_mode_and_in_the_dtype_asked_for(tiny_models):
    source = locate(find_base(BERT, tiny_models))
    backbone = load_backbone(source, device=CPU, dtype=torch.bfloat16)
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert {p.dtype for p in backbone.model.parameters()} == {torch.bfloat16}
    assert {m.p for m in backbone.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
