"""Decoding over a shared prefix, against stock greedy `generate` row by row."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM as Models
from transformers import (
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from worker.methods import decoding, shared_prefix
from worker.methods.decoding import Constrained, Free, generate, stock_generate
from worker.methods.label_trie import ROOT, LabelTrie
from worker.methods.shared_prefix import SharedPrefix

END, VOCABULARY, N_NEW = 0, 120, 7
LEAST_MARGIN = 1e-4
# The first is a prefix of the second; the last two part late.
PATHS = [[7, 8], [7, 8, 9], [7, 9, 10, 11, 12], [20], [21, 22, 23, 24], [21, 22, 23, 25, 26]]
TRIE = LabelTrie(PATHS, [END])
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": END,
    "bos_token_id": None, "pad_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
SHARED = {
    "qwen3, grouped heads": Qwen3Config(**SIZES, head_dim=8),
    "llama": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "mistral, a window never reached": MistralConfig(**SIZES, sliding_window=100),
    "gpt2, learned positions": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        eos_token_id=END,
        bos_token_id=None,
        initializer_range=0.3,
    ),
}
STOCK = {
    "a window shorter than the prompt": MistralConfig(**SIZES, sliding_window=20),
    "a window that the answer would leave": MistralConfig(**SIZES, sliding_window=54),
    "capped scores": Gemma2Config(**SIZES, head_dim=8),
    "scaled logits": GraniteConfig(**SIZES, logits_scaling=4.0),
    "attention sinks": GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
}


def built(config, dtype=torch.float32):
    torch.manual_seed(1)
    model = Models.from_config(config).eval().to(dtype)
    # Else an untied head of a tiny spread gives nothing but near-ties.
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
    return model


def prompts(n=9, n_shared=40, seed=0):
    rng = np.random.default_rng(seed)
    shared = rng.integers(30, VOCABULARY, n_shared).tolist()
    return [shared + rng.integers(30, VOCABULARY, size).tolist() for size in rng.integers(1, 12, n)]


def answered(model, rows, by=generate, trie=TRIE, ends=(END,)):
    free, constrained = Free(model, len(rows), N_NEW, ends), Constrained(model, len(rows), trie)
    for rule in (free, constrained):
        by(model, rows, rule, lambda _n: None)
    return [[token for token in row if token not in ends] for row in free.answers], constrained.labels


def stock_answers(model, rows, trie=TRIE):
    """By `generate`, one row at a time: ids and label, None where the smallest margin is a near-tie."""
    free, labels = [], []
    for row in rows:
        for found, limit in ((free, None), (labels, trie)):
            allowed = limit and partial(lambda n, _, ids: spelled(ids[n:].tolist()), len(row))
            given = model.generate(
                torch.tensor([row]), attention_mask=torch.ones(1, len(row)), do_sample=False, pad_token_id=END,
                max_new_tokens=trie.longest + 1 if limit else N_NEW, return_dict_in_generate=True, output_scores=True,
                prefix_allowed_tokens_fn=allowed,
            )  # fmt: skip
            best = torch.stack(given.scores)[:, 0].topk(2).values
            ids = [token for token in given.sequences[0, len(row) :].tolist() if token != END]
            answer = PATHS.index(ids) if limit else ids
            found.append(answer if float((best[:, 0] - best[:, 1]).min()) > LEAST_MARGIN else None)
    return free, labels


def spelled(generated):
    """What may follow, written anew from the labels alone."""
    paths = [[*path, END] for path in PATHS]
    return [path[len(generated)] for path in paths if path[: len(generated)] == generated]


def agree(got, expected):
    assert sum(answer is not None for answer in expected) >= 0.7 * len(expected)
    assert [g for g, e in zip(got, expected, strict=True) if e is not None] == [e for e in expected if e is not None]


@pytest.mark.parametrize("name", SHARED)
def test_answers_equal_stock_greedy_generate_row_by_row(name):
    model, rows = built(SHARED[name]), prompts()
    before = model.config._attn_implementation
    with torch.inference_mode():
        assert SharedPrefix.of(model, rows, N_NEW) is not None
    got, expected = answered(model, rows), stock_answers(model, rows)
    for mine, stock in zip(got, expected, strict=True):
        agree(mine, stock)
    assert len(set(got[1])) > 1
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", STOCK)
def test_what_cannot_be_computed_here_is_left_to_stock_code_with_the_same_answers(name):
    model, rows = built(STOCK[name]), prompts()
    with torch.inference_mode():
        assert SharedPrefix.of(model, rows, N_NEW) is None
    for mine, stock in zip(answered(model, rows), stock_answers(model, rows), strict=True):
        agree(mine, stock)


@pytest.mark.parametrize(
    "rows",
    [prompts(5, 0), prompts(1), [[5], [5]], [[30, 31, 32]] * 3, [[30, 31], [30, 31, 32, 33]], [[40], [41, 42]]],
    ids=["nothing shared", "one row", "one token", "all equal", "one the beginning of another", "no prefix at all"],
)
def test_prompts_may_share_anything_or_nothing(rows):
    model = built(SHARED["qwen3, grouped heads"])
    for mine, stock in zip(answered(model, rows), answered(model, rows, stock_generate), strict=True):
        assert mine == stock
    with torch.inference_mode():
        shared = SharedPrefix.of(model, rows, N_NEW)
    assert shared is not None
    assert shared.length < min(map(len, rows))


def test_batches_of_any_size_give_the_same(monkeypatch):
    model, rows = built(SHARED["qwen3, grouped heads"]), prompts(12)
    whole = answered(model, rows)
    for size in (1, 5):
        cut = [np.arange(start, min(start + size, 12)) for start in range(0, 12, size)]
        monkeypatch.setattr(decoding, "token_batches", lambda *_, cut=cut: cut)
        assert answered(model, rows) == whole
    monkeypatch.setitem(shared_prefix._SCORES_AT_ONCE, "cpu", 1)
    assert answered(model, rows) == whole


def test_in_bf16_the_first_tokens_of_an_answer_are_stocks():
    model, rows = built(SHARED["qwen3, grouped heads"], torch.bfloat16), prompts()
    with torch.inference_mode():
        assert SharedPrefix.of(model, rows, N_NEW) is not None
    mine, stock = answered(model, rows)[1], answered(model, rows, stock_generate)[1]
    assert sum(a == b for a, b in zip(mine, stock, strict=True)) >= 7


def test_progress_is_told_between_the_steps_and_ends_with_all_rows():
    model, rows = built(SHARED["qwen3, grouped heads"]), prompts()
    told = []
    generate(model, rows, Free(model, len(rows), N_NEW, [END]), told.append)
    assert len(told) > 5
    assert told == sorted(told)
    assert told[-1] == len(rows)


def test_whoever_stops_the_decoding_leaves_the_model_as_it_was():
    model, rows = built(SHARED["qwen3, grouped heads"]), prompts()
    before = model.config._attn_implementation

    def stop(_finished):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, rows, Free(model, len(rows), N_NEW, [END]), stop)
    assert model.config._attn_implementation == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_answers_as_stock_code_does_there():
    model, rows = built(SHARED["qwen3, grouped heads"]).to("cuda"), prompts()
    with torch.inference_mode():
        assert SharedPrefix.of(model, rows, N_NEW) is not None
    assert answered(model, rows) == answered(model, rows, stock_generate)


# The trie ------------------------------------------------------------------------------------------


def test_a_label_that_begins_another_is_told_apart_by_the_end_token():
    assert TRIE.allowed_after([7, 8]) == [END, 9]
    assert TRIE.label(TRIE.step(ROOT, 7)[1], 9) == 2
    _, node = TRIE.step(TRIE.step(ROOT, 7)[1], 8)
    assert (TRIE.label(node, END), TRIE.label(node, 9)) == (0, 1)
    assert TRIE.label_of([7, 8, END]) == 0
    assert TRIE.label_of([7, 8, 9, END, END]) == 1
    assert TRIE.label_of([7]) is None
    assert TRIE.allowed_after([7, 8, END, END]) == [END]


def test_tokens_that_can_only_follow_one_another_are_fed_at_once():
    assert TRIE.step(ROOT, 21)[0] == [21, 22, 23]
    assert LabelTrie([[5, 6, 7], [5, 6, 8]], [END]).forced(ROOT)[0] == [5, 6]
    assert LabelTrie([[5, 6], [5, 6, 8]], [END]).forced(ROOT)[0] == [5, 6]


@pytest.mark.parametrize("paths", [[[5], [6]], [[5], [5, 6]], [[5, 6, 7], [5, 6, 8]], [[], [5]]])
def test_labels_of_one_token_and_labels_with_one_stem_are_answered_as_stock_does(paths):
    model, rows, trie = built(SHARED["llama"]), prompts(), LabelTrie(paths, [END])
    labels = answered(model, rows, trie=trie)[1]
    assert labels == answered(model, rows, stock_generate, trie)[1]
    assert set(labels) <= {0, 1}


def test_any_of_several_end_tokens_ends_an_answer():
    model, rows, trie = built(SHARED["llama"]), prompts(20), LabelTrie([[5], [5, 6]], [1, 2, 3])
    free, labels = answered(model, rows, trie=trie, ends=range(60))
    assert (free, labels) == answered(model, rows, stock_generate, trie, ends=range(60))
    assert any(len(row) < N_NEW for row in free)


@given(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=5), min_size=2, max_size=8, unique_by=tuple), st.data()
)
def test_every_walk_through_the_trie_ends_at_the_label_it_spells(paths, data):
    trie = LabelTrie(paths, [END])
    fed, node = trie.forced(ROOT)
    label = None
    while label is None:
        token = data.draw(st.sampled_from(trie.allowed(node)))
        label = trie.label(node, token)
        if label is None:
            more, node = trie.step(node, token)
            fed = [*fed, *more]
        else:
            fed = fed if token == END else [*fed, token]
    assert paths[label][: len(fed)] == fed
    assert [i for i, path in enumerate(paths) if path[: len(fed)] == fed and (token != END or path == fed)] == [label]
