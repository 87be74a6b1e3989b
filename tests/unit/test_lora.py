import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoModelForSequenceClassification, Qwen3Config, Qwen3ForSequenceClassification

from service.core.errors import ModelUnavailable, OutOfMemory
from service.core.spec import TrainSpec, auto_epochs
from service.ml.adapter import WEIGHTS
from service.ml.backbone import load_backbone
from service.ml.base_models import find_base, locate
from service.ml.encode import encode
from service.ml.engine import Engine
from service.ml.labels import LabelSet
from tests.adapters import TARGETS, manifest, stock_logits, stock_peft
from tests.tiny import BERT, DECODERS, DISTILBERT, ENCODERS, KEYWORDS, QWEN3, QWEN3_EOS, ROBERTA, labelled_texts
from worker.artifacts import write_json
from worker.methods import training
from worker.methods.checkpoint import Checkpoint, newest
from worker.methods.frozen import FrozenBase, fit_probe
from worker.methods.lora import Lora
from worker.methods.parts import Part, without_some
from worker.methods.protocol import Rows
from worker.methods.recipe import LoraRecipe, auto_learning_rate
from worker.methods.trainable import LORA, Trainable, lora_layout
from worker.methods.training import Run, epoch_batches
from worker.stop import Stop, Stopped

CPU = torch.device("cpu")
MAX_LENGTH = 24
RECIPE = LoraRecipe(
    epochs=2, batch_size=16, learning_rate=1e-2, max_length=MAX_LENGTH, rank=4, alpha=8, dropout=0.05,
    precision="fp32", gradient_checkpointing=False, balanced=False, patience=0, seed=7,
)  # fmt: skip
LABELS = LabelSet.of(KEYWORDS)
TWO = LabelSet.of(("billing", "login"))


def rows(n, seed, labels=LABELS):
    texts, names = labelled_texts(n, seed, labels.names)
    return Rows(tuple(texts), labels.ids(names), labels)


TRAIN, VALIDATION = rows(48, 1), rows(24, 2)


def recipe(**changes):
    return LoraRecipe(**{**RECIPE.__dict__, **changes})


def frozen(models_dir, name):
    source = locate(find_base(name, models_dir))
    return FrozenBase(Engine(load_backbone(source, device=CPU, dtype=torch.float32)), MAX_LENGTH)


def fine_tune(base, tmp_path, train=TRAIN, validation=VALIDATION, on_checkpoint=lambda _path: None, **changes):
    return Lora(base, recipe(**changes), tmp_path / "checkpoints", on_checkpoint).fit(train, validation)


def last(folder):
    """The newest checkpoint of a run: its last weights, not its best, which on random ones may be the probe's."""
    return newest(
        folder / "checkpoints", RECIPE.__dict__ | json.loads(next(folder.rglob("state.json")).read_text())["recipe"]
    )


def probe_logits(base, train, validation):
    """By the head that scikit-learn fits, on the states the stock head sees."""
    probe = fit_probe(base, train, validation, "head", intercept=base.engine.head_has_bias)
    return base.states(validation.texts)["head"] @ probe.weight.T + probe.bias


# What moves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", [QWEN3, DISTILBERT])
def test_lora_and_head_learn_and_the_base_does_not_move(name, checkpointing, tiny_models, tmp_path):
    base = frozen(tiny_models, name)
    head = f"{base.engine.backbone.head_name}.weight"
    probe = fit_probe(base, TRAIN, VALIDATION, "head", intercept=base.engine.head_has_bias)

    trained = fine_tune(base, tmp_path, gradient_checkpointing=checkpointing)

    weights = last(tmp_path).weights
    layout = trained.trainable.layout
    assert len(layout.layers) == 2 * 4  # layers x projections
    for (_name, rank, n_in, _n_out), part in zip(layout.layers, weights[LORA].split(layout.sizes), strict=True):
        assert part[rank * n_in :].abs().max() > 1e-4  # B starts at zero
    assert trained.state.gradient_checkpointing is checkpointing
    assert (weights[head] - torch.from_numpy(probe.weight)).abs().max() > 1e-4
    stock = AutoModelForSequenceClassification.from_pretrained(tiny_models / name, dtype=torch.float32).state_dict()
    after = {key.replace(".base.", "."): tensor for key, tensor in base.engine.backbone.model.state_dict().items()
             if "classifier" not in key and "score" not in key}  # fmt: skip
    assert len(after) > 20
    for key, tensor in after.items():
        assert torch.equal(tensor, stock[key]), key


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("labels", [TWO, LABELS])
@pytest.mark.parametrize("name", [QWEN3, *ENCODERS])
def test_gradients_are_those_of_stock_peft(name, labels, checkpointing, tiny_models, tmp_path):
    engine = frozen(tiny_models, name).engine
    ours = Trainable.start(engine, 4, 12, 0.0, len(labels), None, 3)
    for weights in ours.weights.values():  # B and the head start at zero, where half of the gradients are
        weights.data += 0.3 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
    batch = rows(9, 5, labels)
    ids = sorted(encode(engine.backbone.tokenizer, batch.texts, MAX_LENGTH).ids, key=len)
    target = torch.from_numpy(batch.label_ids)
    if checkpointing:
        engine.backbone.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with engine.changed(ours.change):
        loss = torch.nn.functional.cross_entropy(ours.logits(ids), target)
        loss.backward()
    got = tmp_path / "gradients"
    got.mkdir()
    ours.save(tmp_path, ours.weights, alpha=12)
    ours.save(got, {key: weights.grad for key, weights in ours.weights.items()}, alpha=12)

    stock = stock_peft(tiny_models / name, tmp_path, len(labels))
    longest = max(map(len, ids))
    padded = torch.tensor([row + [engine.backbone.pad_id] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    expected = torch.nn.functional.cross_entropy(stock(input_ids=padded, attention_mask=mask).logits, target)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    found = {key.removeprefix("base_model.model."): tensor for key, tensor in load_file(got / WEIGHTS).items()}
    moved = {key.removeprefix("base_model.model.").replace(".default", "").replace("modules_to_save.", ""): p.grad
             for key, p in stock.named_parameters() if p.grad is not None}  # fmt: skip
    assert found.keys() == moved.keys()
    for key, gradient in moved.items():
        assert (found[key] - gradient).norm() <= 1e-3 * gradient.norm(), key


def test_a_batch_cut_into_parts_has_the_gradient_of_the_whole(tiny_models, tmp_path):
    whole, parts = (
        Run(Trainable.start(frozen(tiny_models, BERT).engine, 4, 8, 0.0, 4, None, 3),
            recipe(dropout=0.0, balanced=True), TRAIN, VALIDATION, None, print)
        for _ in range(2)
    )  # fmt: skip
    parts.state.rows_at_once = 3
    for run in (whole, parts):
        for weights in run.trainable.weights.values():
            weights.data += 0.1
    batch = np.argsort(whole.lengths)[:16]
    assert float(whole._step(batch)) == pytest.approx(float(parts._step(batch)), rel=1e-5)
    for key, weights in whole.trainable.weights.items():
        torch.testing.assert_close(parts.trainable.weights[key].grad, weights.grad, atol=1e-6, rtol=1e-3)


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(training, "LEAST_TOKENS", 1)
    monkeypatch.setattr(training, "LEAST_STEPS", 1)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def a_run(models_dir, **changes):
    trainable = Trainable.start(frozen(models_dir, BERT).engine, 4, 8, 0.05, 4, None, 3)
    return Run(trainable, recipe(**changes), TRAIN, VALIDATION, None, print)


@pytest.mark.usefixtures("two_cores")
def test_a_process_beside_it_computes_the_same_and_where_it_is_killed_the_attempt_can_be_gone_on_with(tiny_models):
    alone, helped = a_run(tiny_models), a_run(tiny_models)
    alone.state.rows_at_once = 8  # the same two parts of a batch
    with helped.helped():
        losses = [loss.item() for loss in helped.epoch()]
        assert len(helped._helpers) == 1
        assert torch.get_num_threads() == 2
        weights = helped.weights()
        helped._helpers[0]._process.kill()
        with pytest.raises(Stopped):
            list(helped.epoch())
    assert not helped._helpers[0]._process.is_alive()
    torch.set_num_threads(1)
    assert [loss.item() for loss in alone.epoch()] == losses
    for key, expected in alone.trainable.weights.items():
        assert torch.equal(weights[key], expected), key


def test_a_short_run_starts_no_processes_nor_does_one_on_a_large_base(tiny_models, monkeypatch):
    torch.set_num_threads(2)
    try:
        with a_run(tiny_models).helped() as helpers:
            assert not helpers
        monkeypatch.setattr(training, "LEAST_TOKENS", 1)
        monkeypatch.setattr(training, "LEAST_STEPS", 1)
        monkeypatch.setattr(training, "LARGEST_BASE_BYTES", 1000)
        with a_run(tiny_models).helped() as helpers:
            assert not helpers
    finally:
        torch.set_num_threads(1)


def test_a_layer_that_reads_now_with_these_and_now_with_others_is_a_product_of_its_own(tiny_models, monkeypatch):
    engine, expected = (frozen(tiny_models, BERT).engine for _ in range(2))
    readers = Trainable._readers

    def shared(self):
        first, *rest = readers(self)
        query = next(iter(first))
        return [first, {query: first[query]}, *rest]

    ids = encode(engine.backbone.tokenizer, ["a few words"], MAX_LENGTH).ids
    together = Trainable.start(expected, 4, 8, 0.0, 4, None, 3)
    monkeypatch.setattr(Trainable, "_readers", shared)
    alone = Trainable.start(engine, 4, 8, 0.0, 4, None, 3)
    assert (len(alone._together), len(together._together)) == (8, 4)
    for ours in (alone, together):
        for weights in ours.weights.values():
            weights.data += 0.1
    with engine.changed(alone.change), expected.changed(together.change):
        torch.testing.assert_close(alone.logits(ids), together.logits(ids))


def test_after_rows_that_did_not_fit_nothing_of_them_is_held(tiny_models, monkeypatch):
    run = a_run(tiny_models)

    def refuse(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(run._here, "_loss", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        run._here.compute(Part(np.arange(4), 1.0, 0))
    assert run.trainable._at_hand.read is None
    assert not run.trainable._at_hand.parts


def test_what_is_computed_together_may_be_written_to(tiny_models):
    engine = frozen(tiny_models, BERT).engine
    ours = Trainable.start(engine, 4, 8, 0.0, 4, None, 3)
    name, x = next(iter(ours._together)), torch.randn(1, 3, 64)
    ours._at_hand.parts, ours._at_hand.positions = ours.weights[LORA].split(ours.layout.sizes), (3, 3)
    y = ours.change(name, None, x)
    y /= 2  # as Longformer's attention does with its queries
    y.sum().backward()
    assert ours.weights[LORA].grad.abs().sum() > 0


def test_a_base_whose_attention_reads_something_else_than_tokens_is_refused(tiny_models):
    engine = frozen(tiny_models, BERT).engine
    ours = Trainable.start(engine, 4, 8, 0.0, 4, None, 3)
    with engine.changed(ours.change):
        ours.logits([[1, 2, 3]])
        with pytest.raises(ModelUnavailable, match="something else than the tokens"):
            ours.change(ours.layout.layers[0][0], None, torch.zeros(512, 64))


def test_dropout_takes_its_share_and_keeps_the_mean(tiny_models):
    engine = frozen(tiny_models, BERT).engine
    ours = Trainable.start(engine, 4, 8, 0.25, 4, None, 3)
    ids = sorted(encode(engine.backbone.tokenizer, TRAIN.texts, MAX_LENGTH).ids, key=len)
    with engine.changed(ours.change):
        ours.logits(ids, torch.Generator().manual_seed(1))
    kept = ours._at_hand.kept
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float((kept == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(kept.mean()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", ENCODERS)
def test_in_bf16_what_is_trained_stays_float32(name, tiny_models, tmp_path):
    """Small updates are lost in bf16's eight bits."""
    trained = fine_tune(frozen(tiny_models, name), tmp_path, precision="bf16", epochs=1)
    assert {p.dtype for p in trained.trainable.weights.values()} == {torch.float32}
    assert {p.dtype for p in trained.backbone.model.parameters()} == {torch.bfloat16}
    trained.save(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}


def test_a_tokenizer_without_a_pad_token_trains_in_batches_above_one(tiny_models, tmp_path):
    assert "pad_token" not in json.loads((tiny_models / QWEN3 / "tokenizer_config.json").read_text())
    assert json.loads((tiny_models / QWEN3 / "config.json").read_text()).get("pad_token_id") is None
    base = frozen(tiny_models, QWEN3)
    # Nothing left out: one word decides in these texts, so one without it is mislabelled.
    trained = fine_tune(base, tmp_path, rows(300, 3), batch_size=16, epochs=10, dropout=0.0)
    tokenizer, config = trained.backbone.tokenizer, trained.backbone.model.config
    assert config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
    assert trained.state.best_macro_f1 > trained.state.history[0]["validation_macro_f1"] + 0.1


# Step 0 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "labels"), [(QWEN3, LABELS), (QWEN3, TWO), (BERT, TWO), (DISTILBERT, LABELS)])
def test_the_head_starts_as_the_probe(name, labels, tiny_models, tmp_path):
    base = frozen(tiny_models, name)
    train, validation = rows(40, 1, labels), rows(30, 2, labels)
    trained = fine_tune(base, tmp_path, train, validation, learning_rate=0.0, epochs=1)
    expected = probe_logits(base, train, validation)
    np.testing.assert_allclose(trained.logits(validation.texts), expected, atol=1e-3)
    assert expected.shape == (30, len(labels))


def test_for_two_labels_the_head_is_half_of_scikit_learns_one_row_either_way(tiny_models):
    base = frozen(tiny_models, QWEN3)
    train, validation = rows(60, 1, TWO), rows(30, 2, TWO)
    probe = fit_probe(base, train, validation, "head", intercept=False)
    np.testing.assert_allclose(probe.weight[0], -probe.weight[1])
    np.testing.assert_array_equal(probe.bias, 0)
    states = base.states(train.texts)
    x, x_validation = states["head"], base.states(validation.texts)["head"]
    scale = 1 / float(np.sqrt((x.astype(np.float64) ** 2).sum(1).mean()))
    fits = [
        LogisticRegression(C=c, max_iter=300, fit_intercept=False).fit(x * scale, train.label_ids)
        for c in (30.0, 300.0)
    ]
    got = base.states(validation.texts)["head"] @ (probe.weight[1] - probe.weight[0])
    assert any(np.allclose(got, fit.decision_function(x_validation * scale), atol=1e-3) for fit in fits)


def test_steps_too_small_to_matter_leave_the_probes_answers(tiny_models, tmp_path):
    base = frozen(tiny_models, QWEN3)
    trained = fine_tune(base, tmp_path, learning_rate=1e-7)
    expected = probe_logits(base, TRAIN, VALIDATION)
    np.testing.assert_array_equal(trained.logits(VALIDATION.texts).argmax(1), expected.argmax(1))
    np.testing.assert_allclose(trained.logits(VALIDATION.texts), expected, atol=1e-2)


@pytest.mark.parametrize("rate", [10.0, 1e30])
def test_steps_that_destroy_the_model_leave_it_as_it_was_before_the_first(rate, tiny_models, tmp_path):
    base = frozen(tiny_models, BERT)
    trained = fine_tune(base, tmp_path, learning_rate=rate)
    assert trained.state.best_epoch == 0
    assert trained.state.epoch == 2
    np.testing.assert_allclose(trained.logits(VALIDATION.texts), probe_logits(base, TRAIN, VALIDATION), atol=1e-3)
    assert trained.state.best_macro_f1 == trained.state.history[0]["validation_macro_f1"]


def test_patience_ends_a_run_that_no_longer_improves(tiny_models, tmp_path):
    trained = fine_tune(frozen(tiny_models, BERT), tmp_path, learning_rate=10.0, epochs=6, patience=2)
    assert trained.state.epoch == 2


def test_the_loss_is_told_as_it_falls_and_its_mean_over_an_epoch_is_the_epochs(tiny_models, tmp_path):
    events = []
    lora = Lora(
        frozen(tiny_models, DISTILBERT), recipe(), tmp_path, lambda _path: None, lambda *told: events.append(told)
    )
    lora.fit(TRAIN, VALIDATION)
    assert {kind for kind, _message, _data in events} == {"metric"}
    steps = [data for _kind, _message, data in events if "learning_rate" in data]
    epochs = [data for _kind, _message, data in events if "validation_macro_f1" in data]
    assert [step["epoch"] for step in steps] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])  # 48 rows by 16
    assert np.mean([step["train_loss"] for step in steps[3:]]) == pytest.approx(epochs[2]["train_loss"], rel=1e-5)
    assert epochs[2]["train_loss"] < epochs[1]["train_loss"]
    assert steps[-1]["learning_rate"] == pytest.approx(0, abs=1e-9)


def test_a_loss_that_diverged_is_told_as_none(tiny_models, tmp_path):
    events = []
    lora = Lora(
        frozen(tiny_models, DISTILBERT), recipe(learning_rate=1e20, epochs=1), tmp_path, lambda _path: None,
        lambda *told: events.append(told),
    )  # fmt: skip
    trained = lora.fit(TRAIN, VALIDATION)
    assert events[-2][2]["train_loss"] is None
    assert trained.state.log == [data for _kind, _message, data in events]


def test_a_run_that_diverged_is_written_down_to_its_end(tiny_models, tmp_path):
    facts = fine_tune(frozen(tiny_models, DISTILBERT), tmp_path, epochs=1, learning_rate=1e20).facts()
    assert [epoch["validation_loss"] is None for epoch in facts["history"]] == [False, True]
    write_json(tmp_path / "metrics.json", {"training": facts})


def test_the_best_epoch_is_the_one_with_the_highest_macro_f1_and_then_the_lowest_loss(tiny_models, tmp_path):
    trained = fine_tune(frozen(tiny_models, QWEN3), tmp_path, epochs=4)
    order = [(epoch["validation_macro_f1"], -epoch["validation_loss"]) for epoch in trained.state.history]
    assert [epoch["epoch"] for epoch in trained.state.history] == [0, 1, 2, 3, 4]
    assert trained.state.best_epoch == int(max(range(5), key=lambda i: order[i]))
    assert trained.state.best_macro_f1 == max(order)[0]


def test_labels_that_stand_in_no_train_row_and_balanced_weights_train_without_nan(tiny_models, tmp_path):
    three = np.flatnonzero(TRAIN.label_ids != 2)
    train = Rows(tuple(TRAIN.texts[i] for i in three), TRAIN.label_ids[three], LABELS)
    trained = fine_tune(frozen(tiny_models, QWEN3), tmp_path, train, balanced=True)
    logits = trained.logits(VALIDATION.texts)
    assert logits.shape == (24, 4)
    assert np.isfinite(logits).all()
    assert np.isfinite([epoch["train_loss"] for epoch in trained.state.history[1:]]).all()


# Memory ---------------------------------------------------------------------------------------------


class Device:
    """Has room for so many rows at a time, and for one more once activations are not kept."""

    def __init__(self, monkeypatch, room):
        logits = Trainable.logits

        def tight(trainable, ids, drawn=None):
            if len(ids) > room + trainable.engine.backbone.model.is_gradient_checkpointing:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return logits(trainable, ids, drawn)

        monkeypatch.setattr(Trainable, "logits", tight)


def lora_that_tells(models_dir, tmp_path, **changes):
    events = []
    recipe_ = recipe(**{"epochs": 1, "dropout": 0.0, **changes})
    return Lora(frozen(models_dir, BERT), recipe_, tmp_path, on_event=lambda *told: events.append(told)), events


def test_where_memory_runs_out_fewer_rows_are_computed_at_a_time_and_the_result_is_the_same(
    tiny_models, tmp_path, monkeypatch
):
    lora, _ = lora_that_tells(tiny_models, tmp_path / "a")
    whole = lora.fit(TRAIN, VALIDATION)
    Device(monkeypatch, room=5)
    lora, events = lora_that_tells(tiny_models, tmp_path / "b")
    tight = lora.fit(TRAIN, VALIDATION)
    monkeypatch.undo()
    assert tight.state.rows_at_once == 4
    assert tight.state.gradient_checkpointing is False
    messages = [message for kind, message, _data in events if kind == "message"]
    assert [message.split()[5] for message in messages] == ["8", "4"]
    np.testing.assert_allclose(tight.logits(VALIDATION.texts), whole.logits(VALIDATION.texts), atol=1e-3)


def test_where_not_even_one_row_fits_activations_are_computed_twice(tiny_models, tmp_path, monkeypatch):
    Device(monkeypatch, room=0)
    lora, events = lora_that_tells(tiny_models, tmp_path, gradient_checkpointing=None)
    trained = lora.fit(TRAIN, VALIDATION)
    assert trained.facts()["gradient_checkpointing"] is True
    assert trained.state.rows_at_once == 1
    assert any("computed twice" in message for _kind, message, _data in events)


@pytest.mark.parametrize(("checkpointing", "room"), [(False, 0), (None, -1)])
def test_what_does_not_fit_at_all_fails_with_its_length(tiny_models, tmp_path, monkeypatch, checkpointing, room):
    Device(monkeypatch, room)
    lora, _ = lora_that_tells(tiny_models, tmp_path, gradient_checkpointing=checkpointing)
    with pytest.raises(OutOfMemory, match=r"One text of up to \d+ tokens does not fit"):
        lora.fit(TRAIN, VALIDATION)


# Stopped and resumed -------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def kill(_path):
    raise Killed


@pytest.mark.parametrize("name", [QWEN3, DISTILBERT])
def test_a_run_that_was_killed_and_resumed_ends_with_the_same_weights(name, tiny_models, tmp_path):
    in_one_go = fine_tune(frozen(tiny_models, name), tmp_path / "a", epochs=3)
    for _ in range(3):  # killed before the first step, after the first epoch, and again after the second
        with pytest.raises(Killed):
            fine_tune(frozen(tiny_models, name), tmp_path / "b", epochs=3, on_checkpoint=kill)
    saved = []
    resumed = fine_tune(frozen(tiny_models, name), tmp_path / "b", epochs=3, on_checkpoint=saved.append)
    assert [path.name for path in saved] == ["step-9"]
    for key, tensor in last(tmp_path / "a").weights.items():
        assert torch.equal(last(tmp_path / "b").weights[key], tensor)
    assert [e["epoch"] for e in resumed.state.history] == [0, 1, 2, 3]
    assert resumed.state.best_epoch == in_one_go.state.best_epoch
    assert resumed.state.train_tokens == in_one_go.state.train_tokens


def test_a_run_killed_after_its_last_epoch_has_nothing_left_to_train(tiny_models, tmp_path):
    for _ in range(2):  # before its first step, and after its last
        with pytest.raises(Killed):
            fine_tune(frozen(tiny_models, QWEN3), tmp_path, epochs=1, on_checkpoint=kill)
    whole = fine_tune(frozen(tiny_models, QWEN3), tmp_path / "other", epochs=1)
    resumed = fine_tune(frozen(tiny_models, QWEN3), tmp_path, epochs=1, on_checkpoint=kill)
    np.testing.assert_allclose(resumed.logits(VALIDATION.texts), whole.logits(VALIDATION.texts), atol=1e-5)


def test_two_runs_of_one_seed_are_the_same_and_of_two_seeds_are_not(tiny_models, tmp_path):
    for i, seed in enumerate((7, 7, 2**32 - 1)):
        fine_tune(frozen(tiny_models, QWEN3), tmp_path / str(i), seed=seed, epochs=1)
    one, again, other = (last(tmp_path / str(i)).weights[LORA] for i in range(3))
    assert torch.equal(one, again)
    assert (one - other).abs().max() > 1e-3


def test_a_checkpoint_of_another_recipe_is_not_continued(tiny_models, tmp_path):
    fine_tune(frozen(tiny_models, QWEN3), tmp_path, epochs=1)
    trained = fine_tune(frozen(tiny_models, QWEN3), tmp_path, epochs=2)
    assert [e["epoch"] for e in trained.state.history] == [0, 1, 2]


def test_a_checkpoint_of_code_that_trained_otherwise_is_not_continued(tiny_models, tmp_path):
    fine_tune(frozen(tiny_models, QWEN3), tmp_path, epochs=1)
    found = newest(tmp_path / "checkpoints", recipe(epochs=1).__dict__)
    assert found is not None
    assert newest(tmp_path / "checkpoints", recipe(epochs=1).__dict__ | {"method": 3}) is None


def test_a_checkpoint_half_written_when_the_machine_stopped_is_passed_over(tiny_models, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    fine_tune(frozen(tiny_models, QWEN3), tmp_path, epochs=1)
    shutil.copytree(checkpoints / "step-3", checkpoints / "step-6.partial")
    found = newest(checkpoints, recipe(epochs=1).__dict__)
    assert found is not None
    assert found.state.epoch == 1
    trained = fine_tune(frozen(tiny_models, QWEN3), tmp_path, epochs=1, on_checkpoint=kill)  # nothing left to train
    assert trained.state.epoch == 1


def test_checkpoints_of_another_recipe_do_not_outlive_its_own(tiny_models, tmp_path):
    fine_tune(frozen(tiny_models, BERT), tmp_path, epochs=4)
    fine_tune(frozen(tiny_models, BERT), tmp_path, epochs=1, seed=8)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-0", "step-3"}


def test_a_run_told_to_stop_between_two_steps_leaves_a_checkpoint_and_goes_on_from_it(tiny_models, tmp_path):
    whole = fine_tune(frozen(tiny_models, BERT), tmp_path / "whole")
    stop, saved = Stop(), []

    def asked(_kind, _message, data):
        stop.asked = data["epoch"] == pytest.approx(1 / 3)

    lora = Lora(frozen(tiny_models, BERT), recipe(), tmp_path / "checkpoints", saved.append, asked, stop=stop)
    with pytest.raises(Stopped):
        lora.fit(TRAIN, VALIDATION)
    assert [path.name for path in saved] == ["step-0", "step-1"]
    resumed = fine_tune(frozen(tiny_models, BERT), tmp_path)
    np.testing.assert_array_equal(resumed.logits(VALIDATION.texts), whole.logits(VALIDATION.texts))


@pytest.mark.parametrize(("stopped_at", "where"), [(2, "epoch 1, step 2 of 3"), (3, "epoch 1, step 3 of 3")])
def test_a_run_that_goes_on_says_from_where(stopped_at, where, tiny_models, tmp_path):
    stop, told = Stop(), []

    def ask(_share, message):
        stop.asked = f"step {stopped_at}/3" in message

    def say(*given):
        told.append(given)

    lora = Lora(frozen(tiny_models, BERT), recipe(), tmp_path, stop=stop, on_resume=say)
    with pytest.raises(Stopped):
        lora.fit(TRAIN, VALIDATION, ask)
    assert not told
    Lora(frozen(tiny_models, BERT), recipe(), tmp_path, on_resume=say).fit(TRAIN, VALIDATION)
    share = pytest.approx(0.1 + 0.9 * stopped_at / 6)
    assert told == [(share, f"Training goes on from its checkpoint: {where}.")]


def test_a_run_killed_before_its_first_step_keeps_its_probe(tiny_models, tmp_path, monkeypatch):
    whole = fine_tune(frozen(tiny_models, BERT), tmp_path / "whole")
    with pytest.raises(Killed):
        fine_tune(frozen(tiny_models, BERT), tmp_path, on_checkpoint=kill)
    monkeypatch.delattr("worker.methods.lora.fit_probe")
    told = []
    lora = Lora(
        frozen(tiny_models, BERT), recipe(), tmp_path / "checkpoints", on_resume=lambda *given: told.append(given)
    )
    resumed = lora.fit(TRAIN, VALIDATION)
    assert told == [(0.1, "Training goes on from its checkpoint: before the first step.")]
    np.testing.assert_array_equal(resumed.logits(VALIDATION.texts), whole.logits(VALIDATION.texts))


def test_a_run_told_to_stop_at_its_very_end_still_stops():
    stop = Stop()
    with pytest.raises(Stopped), stop.waits():
        stop._on_signal(15, None)


def test_a_second_signal_leaves_what_the_first_one_has_to_clean_up_alone():
    stop = Stop()
    with pytest.raises(Stopped):
        stop._on_signal(15, None)
    stop._on_signal(15, None)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(tiny_models, tmp_path):
    """Else one torn write would fail every attempt."""
    fine_tune(frozen(tiny_models, QWEN3), tmp_path, epochs=2)
    for file in (
        "weights.safetensors",
        "average.safetensors",
        "best.safetensors",
        "optimizer.safetensors",
        "state.json",
    ):
        folder = tmp_path / file
        shutil.copytree(tmp_path / "checkpoints", folder)
        found = []
        for number in (6, 3):
            damaged = folder / f"step-{number}" / file
            damaged.write_bytes(damaged.read_bytes()[:-20])
            found.append(newest(folder, recipe(epochs=2).__dict__))
        assert found[0] is not None
        assert found[0].state.epoch == 1
        assert found[1] is None


def test_a_checkpoint_is_made_of_safetensors_and_json_alone(tiny_models, tmp_path):
    fine_tune(frozen(tiny_models, QWEN3), tmp_path, epochs=3)
    files = {str(f.relative_to(tmp_path / "checkpoints")) for f in (tmp_path / "checkpoints").rglob("*") if f.is_file()}
    names = ("weights.safetensors", "average.safetensors", "best.safetensors", "optimizer.safetensors", "state.json")
    # The last, and the one before it: that one may be on its way to the storage still.
    assert files == {f"step-{number}/{name}" for number in (6, 9) for name in names}
    assert Checkpoint.load(tmp_path / "checkpoints" / "step-9").state.epoch == 3


# What is saved -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "labels"), [(QWEN3, TWO), *((name, LABELS) for name in (*DECODERS, *ENCODERS))])
def test_the_saved_model_answers_the_same_when_stock_peft_loads_it(name, labels, tiny_models, tmp_path):
    train, validation = rows(40, 1, labels), rows(30, 2, labels)
    trained = fine_tune(frozen(tiny_models, name), tmp_path, train, validation, epochs=1)
    folder = tmp_path / "adapter"
    trained.save(folder)
    texts = [*validation.texts, "", "late parcel " * 40]
    stock = stock_logits(tiny_models / name, folder, texts, len(labels), MAX_LENGTH)
    np.testing.assert_allclose(stock, trained.logits(texts), atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(stock.argmax(1), trained.logits(texts).argmax(1))


def test_no_path_of_the_machine_is_written_into_the_adapter(tiny_models, tmp_path):
    trained = fine_tune(frozen(tiny_models, QWEN3), tmp_path, epochs=1)
    folder = tmp_path / "adapter"
    trained.save(folder)
    manifest(4).write(folder)
    for file in folder.rglob("*"):
        for secret in (str(tiny_models), str(tmp_path)):
            assert secret.encode() not in file.read_bytes(), file.name
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == QWEN3
    assert config["revision"].startswith("sha256:")


def test_the_facts_say_what_was_trained(tiny_models, tmp_path):
    train = Rows((*TRAIN.texts[:-1], "late parcel " * 40), TRAIN.label_ids, LABELS)
    trained = fine_tune(frozen(tiny_models, QWEN3_EOS), tmp_path, train)
    facts = trained.facts()
    trained.save(tmp_path)
    peft = stock_peft(tiny_models / QWEN3_EOS, tmp_path, len(LABELS))
    assert facts["trainable_parameters"] == peft.get_nb_trainable_parameters()[0]
    assert facts["total_parameters"] - facts["trainable_parameters"] == sum(
        p.numel() for p in AutoModel.from_pretrained(tiny_models / QWEN3_EOS).parameters()
    )
    assert facts["truncated_texts"] == 1
    tokens = encode(trained.backbone.tokenizer, train.texts, MAX_LENGTH).lengths.sum()
    assert trained.state.train_tokens == 2 * tokens
    assert facts["tokens_per_second"] == pytest.approx(2 * tokens / facts["train_seconds"])
    json.dumps(facts, allow_nan=False)


def test_about_seven_in_a_thousand_weights_of_an_f2llm_train():
    """On the meta device: shapes without memory. The head is not counted, its size is the labels'."""
    config = Qwen3Config(
        hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        intermediate_size=3072, vocab_size=151_936, tie_word_embeddings=True, num_labels=77, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        backbone = _backbone_of(Qwen3ForSequenceClassification(config))
    assert sorted(name.rpartition(".")[2] for name in backbone.attention_projections()) == sorted(TARGETS["qwen3"])
    lora = sum(lora_layout(backbone, 16).sizes)
    base = sum(p.numel() for name, p in backbone.model.named_parameters() if "score" not in name)
    assert lora == 28 * 16 * ((1024 + 2048) + 2 * (1024 + 1024) + (2048 + 1024))  # r (in + out) of q, k, v, o
    assert 0.006 < lora / (base + lora) < 0.009


def _backbone_of(model):
    from service.ml.backbone import Backbone

    model.requires_grad_(False)
    return Backbone(model, None, True, "score", (), "last", None)


def test_the_projections_are_those_of_the_architecture_at_hand(tiny_models):
    for name, kind in ((QWEN3, "qwen3"), (BERT, "bert"), (DISTILBERT, "distilbert"), (ROBERTA, "roberta")):
        backbone = frozen(tiny_models, name).engine.backbone
        wanted = sorted(target.rpartition(".")[2] for target in TARGETS[kind])
        assert sorted(target.rpartition(".")[2] for target in backbone.attention_projections()) == wanted


def test_an_architecture_without_linear_attention_is_told_and_not_a_crash(tiny_models, tmp_path):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_models / QWEN3)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    base = frozen(tmp_path, "gpt2")
    assert np.isfinite(base.states(VALIDATION.texts)["head"]).all()  # as a frozen base it serves
    with pytest.raises(ModelUnavailable):
        base.engine.backbone.attention_projections()


# Small pieces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 16, 17, 600])
def test_an_epoch_sees_every_row_once(n):
    lengths = np.random.default_rng(0).integers(1, 50, n)
    batches = list(epoch_batches(lengths, 16, np.random.default_rng(1)))
    assert len(batches) == -(-n // 16)
    assert max(len(batch) for batch in batches) <= 16
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))


@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=40), min_size=1, max_size=9),
    st.floats(0, 0.5), st.integers(0, 99),
)  # fmt: skip
def test_texts_lose_tokens_between_their_first_and_last_in_order_and_stay_sorted_by_length(ids, share, seed):
    ids.sort(key=len)
    kept = without_some(ids, share, np.random.default_rng(seed))
    assert [len(row) for row in kept] == sorted(len(row) for row in kept)
    for before, after in zip(ids, kept, strict=True):
        assert abs(len(before) - len(after) - share * max(len(before) - 2, 0)) <= 1
        assert (after[0], after[-1]) == (before[0], before[-1])
        assert len(before) < 4 or len(after) > 2  # something of the text itself
        left = iter(before)
        assert all(token in left for token in after)


def test_each_token_between_is_left_out_one_time_in_ten():
    rng, row = np.random.default_rng(0), list(range(9))
    kept = [token for _ in range(10_000) for token in without_some([row], 0.1, rng)[0]]
    counts = np.bincount(kept)
    assert counts[[0, 8]].tolist() == [10_000, 10_000]
    np.testing.assert_allclose(counts[1:8] / 10_000, 0.9, atol=0.015)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_tokens_are_left_out_where_anything_is_dropped(dropout, tiny_models):
    run = Run(Trainable.start(frozen(tiny_models, BERT).engine, 4, 8, dropout, 4, None, 3),
              recipe(dropout=dropout), TRAIN, VALIDATION, None, print)  # fmt: skip
    seen = []
    ours = run.trainable.logits
    run.trainable.logits = lambda ids, generator: seen.append(ids) or ours(ids, generator)
    batch = np.argsort(run.lengths)
    run._here.compute(Part(batch, 1.0, 7))
    whole = [run.encoded.ids[i] for i in batch]
    assert (seen[0] == whole) is (dropout == 0)


def test_length_sorted_batches_hold_little_padding():
    lengths = np.random.default_rng(0).integers(1, 190, 2000)
    padded = sum(len(b) * lengths[b].max() for b in epoch_batches(lengths, 16, np.random.default_rng(1)))
    assert padded < 1.1 * lengths.sum()


def test_the_recipe_is_the_notebooks_where_a_job_says_nothing():
    spec = TrainSpec().model_copy(
        update={"epochs": auto_epochs(8000), "batch_size": 32, "learning_rate": 2e-3, "precision": "fp32"}
    )
    found = LoraRecipe.of(spec, 42)
    assert (found.rank, found.alpha, found.dropout, found.max_length, found.seed) == (16, 32, 0.05, 192, 42)
    assert found.gradient_checkpointing is None


@pytest.mark.parametrize("n", [1, 300, 8000, 49_999, 50_000, 1_000_000])
def test_auto_epochs_stay_in_the_contracts_range(n):
    assert 1 <= auto_epochs(n) <= 12
    assert auto_epochs(n) >= auto_epochs(n + 1000)


def test_auto_learning_rate_falls_with_width():
    rates = [auto_learning_rate(width) for width in (64, 384, 1024, 2048, 8192)]
    assert rates == sorted(rates, reverse=True)
    assert rates[1] == 2e-3
