import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from service.core.errors import InvalidData
from service.ml.adapter import CONFIG, HEAD, WEIGHTS, load_adapter, save_head
from service.ml.backbone import load_backbone
from service.ml.base_models import find_base, locate
from service.ml.calibration import softmax
from service.ml.encode import encode
from service.ml.engine import TOKEN_BUDGET, Engine
from service.ml.manifest import FILE
from tests.adapters import manifest, save_random_adapter, stock_logits
from tests.tiny import BERT, DECODERS, DISTILBERT, ENCODERS, HIDDEN, QWEN3, labelled_texts

CPU = torch.device("cpu")
MAX_LENGTH = 32
# Short, long, cut, empty, with a trailing space, with markup that must stay text.
TEXTS = [*labelled_texts(9, seed=5)[0], "", "refund", "late parcel " * 40, "thanks ", "a\nb\t", "code <b>", "ünïcödé £"]


def engine_of(models_dir, name):
    source = locate(find_base(name, models_dir))
    return Engine(load_backbone(source, device=CPU, dtype=torch.float32))


def attached(engine, folder):
    adapter = load_adapter(folder, head_name=engine.backbone.head_name, device=CPU, dtype=torch.float32)
    engine.attach(adapter)
    return adapter


def ids_of(engine, texts, max_length=MAX_LENGTH):
    return encode(engine.backbone.tokenizer, texts, max_length).ids


def adapter_folder(models_dir, tmp_path, engine, name, n_labels, **more):
    folder = tmp_path / f"adapter-{n_labels}-{more.get('seed', 0)}"
    return save_random_adapter(folder, models_dir / name, engine.backbone.tokenizer, n_labels, **more)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_adapters_of_different_label_counts_in_one_batch_answer_as_stock_peft(name, tiny_models, tmp_path):
    engine = engine_of(tiny_models, name)
    folders = {
        k: adapter_folder(tiny_models, tmp_path, engine, name, k, seed=k, rank=rank)
        for k, rank in ((2, 4), (3, 8), (7, 1))
    }
    adapters = [attached(engine, folder) for folder in folders.values()]
    texts = [text for text in TEXTS for _ in adapters]
    mixed = engine.score(ids_of(engine, texts), adapters * len(TEXTS))
    for i, (k, folder) in enumerate(folders.items()):
        got = np.stack(mixed[i :: len(adapters)])
        expected = stock_logits(tiny_models / name, folder, TEXTS, k, MAX_LENGTH)
        assert got.shape == (len(TEXTS), k)
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
        assert np.ptp(expected, axis=0).max() > 0.1  # the texts do differ, so equality says something


@pytest.mark.parametrize("name", [*DECODERS, BERT])
def test_a_row_alone_and_in_a_padded_batch_gets_the_same_logits(name, tiny_models, tmp_path):
    engine = engine_of(tiny_models, name)
    adapter = attached(engine, adapter_folder(tiny_models, tmp_path, engine, name, 3))
    ids = ids_of(engine, TEXTS)
    together = engine.score(ids, [adapter] * len(ids))
    for row, logits in zip(ids, together, strict=True):
        np.testing.assert_allclose(engine.score([row], [adapter])[0], logits, atol=1e-4)


def test_many_small_batches_give_the_answers_in_the_rows_own_order(tiny_models, tmp_path, monkeypatch):
    engine = engine_of(tiny_models, QWEN3)
    adapters = [attached(engine, adapter_folder(tiny_models, tmp_path, engine, QWEN3, k, seed=k)) for k in (2, 5)]
    ids = ids_of(engine, TEXTS)
    mixed = [adapters[i % 2] for i in range(len(ids))]
    at_once = engine.score(ids, mixed)
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 40)
    seen = []
    batched = engine.score(ids, mixed, lambda done, n: seen.append((done, n)))
    for one, other in zip(at_once, batched, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert len(seen) > 3
    assert seen[-1] == (len(ids), len(ids))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_frozen_base_is_unchanged_by_adapters_attached_and_used(tiny_models, tmp_path):
    engine = engine_of(tiny_models, DISTILBERT)
    ids = ids_of(engine, TEXTS)
    before = engine.states(ids)
    adapter = attached(engine, adapter_folder(tiny_models, tmp_path, engine, DISTILBERT, 3))
    engine.score(ids, [adapter] * len(ids))
    for kind, states in engine.states(ids).items():
        np.testing.assert_array_equal(states, before[kind])


def test_a_failed_batch_leaves_no_adapter_behind_for_the_next(tiny_models, tmp_path):
    engine = engine_of(tiny_models, QWEN3)
    adapter = attached(engine, adapter_folder(tiny_models, tmp_path, engine, QWEN3, 3))
    ids = ids_of(engine, TEXTS)
    before = engine.states(ids)["head"]
    with pytest.raises(IndexError):
        engine.score([[10**6]], [adapter])
    np.testing.assert_array_equal(engine.states(ids)["head"], before)


def test_no_texts_give_no_logits(tiny_models):
    assert engine_of(tiny_models, QWEN3).score([], []) == []


@pytest.mark.parametrize("name", DECODERS)
def test_the_position_pooled_is_the_one_stock_pools_though_pad_is_eos(name, tiny_models):
    engine = engine_of(tiny_models, name)
    tokenizer = engine.backbone.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ids = ids_of(engine, ["refund my parcel", "late"])
    states = engine.states(ids)
    # By hand: the token before the one EOS, in a row of its own without padding.
    model = AutoModel.from_pretrained(tiny_models / name, dtype=torch.float32)
    for i, row in enumerate(ids):
        assert row[-1] == tokenizer.eos_token_id
        with torch.inference_mode():
            hidden = model(torch.tensor([row])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(states["head"][i], hidden[-2], atol=1e-5)
        np.testing.assert_allclose(states["pooled"][i], hidden[-2] / np.linalg.norm(hidden[-2]), atol=1e-5)


def test_the_states_of_a_bert_are_its_pooler_and_the_mean_of_its_real_tokens(tiny_models):
    engine = engine_of(tiny_models, BERT)
    states = engine.states(ids_of(engine, TEXTS))
    tokenizer = AutoTokenizer.from_pretrained(tiny_models / BERT)
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    with torch.inference_mode():
        output = AutoModel.from_pretrained(tiny_models / BERT, dtype=torch.float32)(**batch)
    mask = batch["attention_mask"][:, :, None]
    mean = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(states["head"], output.pooler_output, atol=1e-5)
    np.testing.assert_allclose(states["pooled"], torch.nn.functional.normalize(mean), atol=1e-5)


def test_the_states_pooled_follow_the_file_that_says_cls(tiny_models, tmp_path):
    folder = tmp_path / "says-cls"
    shutil.copytree(tiny_models / BERT, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    engine = engine_of(tmp_path, "says-cls")
    ids = ids_of(engine, ["refund my parcel"])
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(folder, dtype=torch.float32)(torch.tensor(ids)).last_hidden_state[0, 0]
    np.testing.assert_allclose(engine.states(ids)["pooled"][0], hidden / hidden.norm(), atol=1e-5)


def test_the_head_states_of_a_distilbert_are_what_its_stock_classifier_is_given(tiny_models):
    engine = engine_of(tiny_models, DISTILBERT)
    ids = ids_of(engine, ["refund my parcel"])
    stock = AutoModelForSequenceClassification.from_pretrained(tiny_models / DISTILBERT, dtype=torch.float32)
    stock.pre_classifier.load_state_dict(engine.backbone.model.pre_classifier.state_dict())
    seen = []
    stock.classifier.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        stock.eval()(torch.tensor(ids))
    np.testing.assert_allclose(engine.states(ids)["head"], seen[0], atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_layers_the_checkpoint_lacks_start_the_same_in_every_process(name, tiny_models):
    """Else two runs of one seed on a DistilBERT would differ."""
    torch.manual_seed(1)
    one = engine_of(tiny_models, name)
    torch.manual_seed(2)
    other = engine_of(tiny_models, name)
    ids = ids_of(one, TEXTS)
    np.testing.assert_array_equal(one.states(ids)["head"], other.states(ids)["head"])


def test_a_head_alone_multiplies_the_pooled_states(tiny_models, tmp_path):
    engine = engine_of(tiny_models, BERT)
    torch.manual_seed(0)
    weight, bias = torch.randn(3, HIDDEN), torch.randn(3)
    save_head(tmp_path, weight, bias)
    manifest(3, method="embedding_logreg", states="pooled").write(tmp_path)
    adapter = attached(engine, tmp_path)
    ids = ids_of(engine, TEXTS)
    expected = engine.states(ids)["pooled"] @ weight.numpy().T + bias.numpy()
    np.testing.assert_allclose(np.stack(engine.score(ids, [adapter] * len(ids))), expected, atol=1e-5)


def test_lora_and_a_head_alone_share_a_batch(tiny_models, tmp_path):
    engine = engine_of(tiny_models, QWEN3)
    lora = attached(engine, adapter_folder(tiny_models, tmp_path, engine, QWEN3, 4))
    (tmp_path / "head").mkdir()
    save_head(tmp_path / "head", torch.randn(2, HIDDEN), torch.zeros(2))
    manifest(2, method="embedding_logreg", states="pooled").write(tmp_path / "head")
    head = attached(engine, tmp_path / "head")
    ids = ids_of(engine, ["refund"] * 6)
    answers = engine.score(ids, [lora, head, lora, head, head, lora])
    assert [len(logits) for logits in answers] == [4, 2, 4, 2, 2, 4]
    np.testing.assert_allclose(answers[1], engine.score(ids[:1], [head])[0], atol=1e-5)
    np.testing.assert_allclose(answers[5], engine.score(ids[:1], [lora])[0], atol=1e-5)


def test_probabilities_sum_to_one_and_do_not_overflow():
    logits = np.array([[1000.0, 0.0], [-1000.0, -1000.0], [3.0, 1.0]], dtype=np.float32)
    probabilities = softmax(logits)
    np.testing.assert_allclose(probabilities.sum(-1), 1.0, atol=1e-15)
    np.testing.assert_allclose(probabilities[:2], [[1.0, 0.0], [0.5, 0.5]], atol=1e-15)


# Damage --------------------------------------------------------------------------------------------


def rewritten(folder, change):
    """Changes the saved tensors and signs the folder anew: what a bug of ours would publish, hashes and all."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    body = json.loads((folder / FILE).read_text())
    replace(manifest(len(body["labels"])), files={}).write(folder)


def first(tensors, end):
    return next(name for name in sorted(tensors) if name.endswith(end))


def flip_byte(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-5] ^= 0xFF
    (folder / WEIGHTS).write_bytes(bytes(data))


def cut_short(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def cut_short_and_sign(folder):
    cut_short(folder)
    manifest(3).write(folder)


def take_away_weights(folder):
    (folder / WEIGHTS).unlink()


def take_away_weights_and_sign(folder):
    (folder / WEIGHTS).unlink()
    manifest(3).write(folder)


def change_config(folder):
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace('"lora_alpha": 12', '"lora_alpha": 13'))


def empty_config_and_sign(folder):
    (folder / CONFIG).write_text("{}")
    manifest(3).write(folder)


def rank_zero_and_sign(folder):
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | {"r": 0}))
    manifest(3).write(folder)


def no_json_config_and_sign(folder):
    (folder / CONFIG).write_text("{")
    manifest(3).write(folder)


def take_away_manifest(folder):
    (folder / FILE).unlink()


def half_a_manifest(folder):
    (folder / FILE).write_text((folder / FILE).read_text()[:200])


def manifest_without_labels(folder):
    body = json.loads((folder / FILE).read_text())
    del body["labels"]
    (folder / FILE).write_text(json.dumps(body))


def manifest_of_another_version(folder):
    (folder / FILE).write_text(json.dumps(json.loads((folder / FILE).read_text()) | {"unheard_of": 1}))


def no_temperature_there_is(folder):
    (folder / FILE).write_text(json.dumps(json.loads((folder / FILE).read_text()) | {"temperature": 0}))


def not_a_number_for_a_temperature(folder):
    (folder / FILE).write_text(json.dumps(json.loads((folder / FILE).read_text()) | {"temperature": float("nan")}))


def manifest_that_lists_no_weights(folder):
    """Weights that nobody signed are not the ones that were published."""
    body = json.loads((folder / FILE).read_text())
    del body["files"][WEIGHTS]
    (folder / FILE).write_text(json.dumps(body))


def other_label_count(folder):
    manifest(4).write(folder)


def nan_in_lora(folder):
    rewritten(folder, lambda t: t[first(t, "lora_B.weight")].view(-1)[0].fill_(float("nan")))


def infinity_in_head(folder):
    rewritten(folder, lambda t: t[first(t, "score.weight")].view(-1)[0].fill_(float("inf")))


def half_a_pair(folder):
    rewritten(folder, lambda t: t.pop(first(t, "lora_B.weight")))


def the_other_half(folder):
    rewritten(folder, lambda t: t.pop(first(t, "lora_A.weight")))


def ranks_that_differ(folder):
    rewritten(folder, lambda t: t.update({first(t, "lora_A.weight"): torch.ones(3, HIDDEN)}))


def a_pair_without_shape(folder):
    rewritten(
        folder, lambda t: t.update({first(t, "lora_A.weight"): torch.ones(4), first(t, "lora_B.weight"): torch.ones(4)})
    )


def inputs_that_differ(folder):
    rewritten(folder, lambda t: t.update({first(t, "lora_A.weight"): torch.ones(4, HIDDEN + 1)}))


def outputs_that_differ(folder):
    rewritten(folder, lambda t: t.update({first(t, "lora_B.weight"): torch.ones(HIDDEN + 1, 4)}))


def a_layer_nobody_has(folder):
    def rename(tensors):
        for end in ("lora_A.weight", "lora_B.weight"):
            tensors["base_model.model.model.layers.9.self_attn.q_proj." + end] = tensors.pop(
                first(tensors, "q_proj." + end)
            )

    rewritten(folder, rename)


def a_layer_that_is_not_linear(folder):
    def rename(tensors):
        for end in ("lora_A.weight", "lora_B.weight"):
            tensors["base_model.model.model.norm." + end] = tensors.pop(first(tensors, "q_proj." + end))

    rewritten(folder, rename)


def no_head(folder):
    rewritten(folder, lambda t: t.pop(first(t, "score.weight")))


def a_narrow_head(folder):
    rewritten(folder, lambda t: t.update({first(t, "score.weight"): torch.ones(3, HIDDEN - 1)}))


def a_tensor_of_unknown_meaning(folder):
    """Stock PEFT would use it; leaving it out would answer differently."""
    rewritten(folder, lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 9)}))


@pytest.mark.parametrize(
    "damage",
    [
        flip_byte, cut_short, cut_short_and_sign, take_away_weights, take_away_weights_and_sign, change_config,
        empty_config_and_sign, no_json_config_and_sign, rank_zero_and_sign, take_away_manifest, half_a_manifest,
        manifest_without_labels, manifest_of_another_version, manifest_that_lists_no_weights, other_label_count,
        nan_in_lora, infinity_in_head, half_a_pair, the_other_half, ranks_that_differ, a_pair_without_shape,
        inputs_that_differ, outputs_that_differ, a_layer_nobody_has, a_layer_that_is_not_linear, no_head,
        a_narrow_head, a_tensor_of_unknown_meaning, no_temperature_there_is, not_a_number_for_a_temperature,
    ],
)  # fmt: skip
def test_a_damaged_adapter_is_refused(damage, tiny_models, tmp_path):
    engine = engine_of(tiny_models, QWEN3)
    folder = adapter_folder(tiny_models, tmp_path, engine, QWEN3, 3)
    attached(engine, folder)  # whole, it is taken
    damage(folder)
    with pytest.raises(InvalidData) as refused:
        attached(engine, folder)
    assert str(tmp_path) not in refused.value.detail


def test_a_manifest_of_before_there_were_temperatures_is_read_as_one_of_1(tiny_models, tmp_path):
    engine = engine_of(tiny_models, QWEN3)
    folder = adapter_folder(tiny_models, tmp_path, engine, QWEN3, 3)
    body = json.loads((folder / FILE).read_text())
    del body["temperature"], body["calibration"]
    (folder / FILE).write_text(json.dumps(body))
    assert attached(engine, folder).temperature == 1


def test_an_adapter_of_another_base_is_refused(tiny_models, tmp_path):
    bert = engine_of(tiny_models, BERT)
    folder = adapter_folder(tiny_models, tmp_path, bert, BERT, 3)
    with pytest.raises(InvalidData):
        attached(engine_of(tiny_models, QWEN3), folder)


def test_an_adapter_without_the_layers_its_base_lacks_is_refused(tiny_models, tmp_path):
    engine = engine_of(tiny_models, DISTILBERT)
    folder = adapter_folder(tiny_models, tmp_path, engine, DISTILBERT, 3)
    rewritten(folder, lambda t: [t.pop(name) for name in list(t) if "pre_classifier" in name])
    with pytest.raises(InvalidData):
        attached(engine, folder)


@pytest.mark.parametrize("more", [{"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"q_proj": 3}}])
def test_an_adapter_of_another_formula_is_refused_not_answered_wrongly(more, tiny_models, tmp_path):
    engine = engine_of(tiny_models, QWEN3)
    folder = adapter_folder(tiny_models, tmp_path, engine, QWEN3, 3)
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | more))
    manifest(3).write(folder)
    with pytest.raises(InvalidData):
        attached(engine, folder)


def test_an_adapter_that_is_refused_leaves_the_engine_as_it_was(tiny_models, tmp_path):
    engine = engine_of(tiny_models, QWEN3)
    good = attached(engine, adapter_folder(tiny_models, tmp_path, engine, QWEN3, 3, seed=1))
    ids = ids_of(engine, TEXTS)
    before = engine.score(ids, [good] * len(ids))
    bad = adapter_folder(tiny_models, tmp_path, engine, QWEN3, 3, seed=2)
    a_layer_nobody_has(bad)
    with pytest.raises(InvalidData):
        attached(engine, bad)
    for one, other in zip(before, engine.score(ids, [good] * len(ids)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("tensors", [{}, {"weight": torch.ones(3, HIDDEN)},
                                     {"weight": torch.ones(3), "bias": torch.ones(3)},
                                     {"weight": torch.ones(3, HIDDEN), "bias": torch.ones(2)}])  # fmt: skip
def test_a_damaged_head_is_refused(tensors, tiny_models, tmp_path):
    save_file(tensors, tmp_path / HEAD)
    manifest(3, method="embedding_logreg", states="pooled").write(tmp_path)
    with pytest.raises(InvalidData):
        attached(engine_of(tiny_models, BERT), tmp_path)
