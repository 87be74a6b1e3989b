"""Rows laid end to end: what it saves, and where it is not to be had."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, Qwen3Config, Qwen3ForCausalLM

from service.ml import engine as engine_module
from service.ml.adapter import Adapter, Linear, laid_flat
from service.ml.backbone import load_backbone
from service.ml.base_models import EMBEDDED, find_base, locate
from service.ml.encode import encode
from service.ml.engine import TOKEN_BUDGET, Engine
from service.ml.mixture import Mixture
from service.ml.packed import Rows
from tests.tiny import BERT, DECODERS, DISTILBERT, ENCODERS, EOS, HIDDEN, QWEN3, SPREAD, labelled_texts

CPU = torch.device("cpu")
TEXTS = [*labelled_texts(20, seed=3)[0], "", "refund", "late parcel " * 40]


def engine_of(models_dir, name, dtype=torch.float32):
    return Engine(load_backbone(locate(find_base(name, models_dir)), device=CPU, dtype=dtype))


def ids_of(engine, texts=TEXTS):
    return encode(engine.backbone.tokenizer, texts, 64).ids


def drawn(engine, n_labels, rank, seed, names=None):
    """An adapter of the engine's base whose numbers are all drawn at random."""
    torch.manual_seed(seed)
    ends = tuple(names or engine.backbone.attention_projections())
    lora = {
        name.removesuffix(".base"): tuple(
            0.1 * torch.randn(shape).numpy() for shape in ((rank, m.in_features), (m.out_features, rank))
        )
        for name, m in engine.backbone.model.named_modules()
        if isinstance(m, torch.nn.Linear) and name.removesuffix(".base").endswith(ends)
    }
    head = Linear(torch.randn(n_labels, engine.head_width), torch.randn(n_labels))
    adapter = Adapter(tuple(map(str, range(n_labels))), head, "head", 64, *laid_flat(lora))
    engine.attach(adapter)
    return adapter


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_no_layer_multiplies_padding(name, tiny_models, monkeypatch):
    engine = engine_of(tiny_models, name)
    ids = ids_of(engine)
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", sum(map(len, ids)))  # one batch
    projections = tuple(engine.backbone.attention_projections())
    seen = []
    for module_name, module in engine.backbone.model.named_modules():
        if module_name.endswith(projections):
            module.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[:-1].numel()))
    engine.states(ids)
    assert set(seen) == {sum(map(len, ids))}


@pytest.mark.parametrize("name", ENCODERS)
def test_for_the_head_alone_a_berts_last_block_computes_first_tokens_and_the_same_states(name, tiny_models):
    engine = engine_of(tiny_models, name)
    ids = sorted(ids_of(engine), key=len)
    seen = []
    for module_name, module in engine.backbone.model.named_modules():
        if module_name.endswith((".intermediate", ".ffn.lin1")):
            module.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[:-1].numel()))
    with torch.inference_mode():
        got = engine.head_states(ids)
    n_tokens = sum(map(len, ids))
    assert seen == [n_tokens, n_tokens if name == DISTILBERT else len(ids)]  # whose blocks have another shape
    torch.testing.assert_close(got, torch.from_numpy(engine.states(ids)["head"]))


def test_a_base_that_gives_another_answer_without_its_other_tokens_keeps_them(tiny_models, monkeypatch):
    right = engine_module._firsts_alone

    def wrong(module, inputs, named, output):
        states, *rest = right(module, inputs, named, output)
        return (states.roll(1, 0) if "packed_rows" in named else states, *rest)  # of the first tokens alone, rows

    assert engine_of(tiny_models, BERT)._firsts_alone
    monkeypatch.setattr(engine_module, "_firsts_alone", wrong)
    engine = engine_of(tiny_models, BERT)
    assert engine._longest_packed
    assert not engine._firsts_alone


@pytest.mark.parametrize(("window", "packs_short_texts"), [(24, False), (50, True)])
def test_a_decoder_with_windows_shorter_than_its_texts_is_padded_and_answers_as_stock(
    window, packs_short_texts, tiny_models, tmp_path
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_models / QWEN3)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
        use_sliding_window=True, sliding_window=window, max_window_layers=1, initializer_range=SPREAD,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "windowed")
    tokenizer.save_pretrained(tmp_path / "windowed")
    engine = engine_of(tmp_path, "windowed")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "windowed", dtype=torch.float32)
    ids = ids_of(engine)
    assert max(map(len, ids)) > window  # it is felt
    assert engine._longest_packed == (window if packs_short_texts else 0)
    seen = []
    engine.backbone.model.model.layers[0].mlp.register_forward_hook(
        lambda _module, inputs, _output: seen.append(inputs[0].shape[:2])
    )
    got = engine.states(ids)["head"]
    for row, states in zip(ids, got, strict=True):
        with torch.inference_mode():
            hidden = stock.model(torch.tensor([row])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(states, hidden[engine._last(row)], atol=1e-4)
    if packs_short_texts:  # one row that must be padded pads no other
        assert seen == [(1, sum(len(row) for row in ids if len(row) <= window)), (1, max(map(len, ids)))]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_blocks_of_tokens_give_each_token_its_own_adapters_products(data):
    """Against one product per token."""
    lengths = np.sort(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=12)))
    padded = data.draw(st.booleans())
    starts = np.arange(len(lengths)) * lengths[-1] if padded else np.cumsum(lengths) - lengths
    rows = Rows(lengths, starts, CPU, None if padded else "by_length")
    torch.manual_seed(data.draw(st.integers(0, 9)))
    # Of two ranks, one that wraps another layer, and one without any.
    loras = [{"a": (torch.randn(r, 5), torch.randn(4, r))} for r in (2, 2, 2, 3)] + [
        {"b": (torch.randn(2, 5), torch.randn(4, 2))},
        {},
    ]
    head = Linear(torch.zeros(2, 3))
    arrays = [{name: (a.numpy(), b.numpy()) for name, (a, b) in lora.items()} for lora in loras]
    adapters = [Adapter(("x", "y"), head, "head", 8, *laid_flat(lora)) for lora in arrays]
    chosen = data.draw(st.lists(st.integers(0, 5), min_size=len(lengths), max_size=len(lengths)))
    mixture = Mixture.of([adapters[i] for i in chosen], rows)
    x = torch.randn(int(starts[-1] + lengths[-1]), 5)
    y = torch.zeros(len(x), 4)
    for share in mixture.shares:
        share.add("a", x, y)
    expected = torch.zeros_like(y)
    for i, start, length in zip(chosen, starts.tolist(), lengths.tolist(), strict=True):
        if "a" in loras[i]:
            down, up = loras[i]["a"]
            expected[start : start + length] = x[start : start + length] @ down.T @ up.T
    torch.testing.assert_close(y, expected)
    assert sorted(row for _, of in mixture.rows_of for row in of.tolist()) == list(range(len(lengths)))


@pytest.mark.parametrize("name", [QWEN3, BERT])
def test_adapters_of_several_ranks_and_layers_in_one_batch_answer_as_alone(name, tiny_models):
    engine = engine_of(tiny_models, name)
    one_layer = engine.backbone.attention_projections()[:1]
    adapters = [
        drawn(engine, 2, 4, 0),
        drawn(engine, 5, 4, 1),
        drawn(engine, 3, 8, 2),
        drawn(engine, 4, 2, 3, one_layer),
    ]
    ids = ids_of(engine)
    mixed = engine.score(ids, [adapters[i % 4] for i in range(len(ids))])
    for i, logits in enumerate(mixed):
        alone = engine.score([ids[i]], [adapters[i % 4]])[0]
        np.testing.assert_allclose(logits, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.more
def test_in_bf16_at_least_995_of_1000_rows_keep_their_label():
    """MiniLM, a head fitted on its states, and an adapter beside it: labels in bf16 against those in fp32."""
    from sklearn.linear_model import LogisticRegression

    texts, labels = labelled_texts(1200, seed=1)
    answers = {}
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(load_backbone(locate(find_base(EMBEDDED, None)), device=CPU, dtype=dtype))
        ids = ids_of(engine, texts)
        if not answers:
            probe = LogisticRegression(C=10, max_iter=300).fit(engine.states(ids[:600])["head"], labels[:600])
        adapter = drawn(engine, len(probe.classes_), 8, seed=0)
        flat = adapter.flat * 0.2
        head = Linear(torch.from_numpy(probe.coef_).float(), torch.from_numpy(probe.intercept_).float())
        object.__setattr__(adapter, "head", head)
        object.__setattr__(adapter, "flat", flat.to(dtype))
        answers[dtype] = np.stack(engine.score(ids[600:], [adapter] * 600)).argmax(1)
    same = (answers[torch.float32] == answers[torch.bfloat16]).mean()
    assert same >= 0.995
