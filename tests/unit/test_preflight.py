import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from service.core.spec import JobSpec, auto_epochs
from service.ml import preflight
from service.ml.base_models import EMBEDDED
from service.ml.dataset import UploadOptions, profile
from service.ml.encode import encode, load_tokenizer
from service.ml.eta import KNOWN, TWO_CORES, Speed, Work, estimates, measured_speed
from service.ml.preflight import look
from tests.tiny import BERT, QWEN3, QWEN3_EOS, QWEN3_STOCK, labelled_texts
from worker.prepare import prepare

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def written(path: Path, rows, header=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def looked(path, *, base=EMBEDDED, folder=None, max_length=192, seed=42, shares=SHARES):
    return look(path, profile(path, UploadOptions()).format, shares, seed, base, folder, max_length)


def by_code(found):
    return {warning.code: warning for warning in found.warnings}


@pytest.fixture
def table(tmp_path):
    """80 texts and 80 that differ from them by their end, one of them with another label."""
    texts, labels = labelled_texts(80, seed=1)
    texts = [f"{text} when i asked for it" for text in texts]
    rows = list(zip(texts, labels, strict=True))
    rows += [(f"{text}!", label) for text, label in rows[1:]] + [(f"{texts[0]}!", labels[1])]
    return written(tmp_path / "t.csv", rows)


@pytest.mark.parametrize(
    "asked", [{}, {"seed": 7, "split": {"train": 0.5, "validation": 0.25, "test": 0.25}}], ids=["usual", "own"]
)
def test_the_split_it_looks_at_is_the_one_a_job_makes(table, tiny_models, asked):
    spec = JobSpec(base_model=BERT, train={"max_length": 64}, baseline={"methods": ["majority"]}, **asked)
    ready = prepare(spec, table, profile(table, UploadOptions()).format, tiny_models, torch.device("cpu"), print)
    found = looked(table, seed=spec.seed, shares=spec.split.model_dump())
    part_of = {int(row): part for part in SHARES for row in ready.table.row_ids[ready.split.part(part)]}
    assert found.work.rows == {part: len(ready.split.part(part)) for part in SHARES}
    assert found.algorithm == ready.split_algorithm
    pairs = found.near_duplicates.pairs
    assert all(pair.parts == tuple(part_of[row] for row in pair.rows) for pair in pairs)
    across = {(i, i + 80 - 1) for i in range(1, 80)} | {(0, 159)}
    across = {pair for pair in across if part_of[pair[0]] != part_of[pair[1]]}
    assert 0 < len(pairs) <= found.near_duplicates.count
    concerned = by_code(found)["near_duplicate_across_parts"]
    assert concerned.count >= 2 * len(across) > 0
    assert list(concerned.rows) == sorted(concerned.rows)


def test_near_duplicates_say_whether_their_labels_differ(tmp_path):
    rows = [(f"{word} is what this text is about and nothing else", "ab"[i % 2]) for i, word in enumerate(
        ["apples", "bread", "cheese", "doors", "eagles", "flags", "grapes", "houses"])]  # fmt: skip
    split = ["train", "train", "train", "train", "test", "test", "validation", "validation"]
    path = written(tmp_path / "t.csv", [(*row, part) for row, part in zip(rows, split, strict=True)],
                   ("text", "label", "split"))  # fmt: skip
    form = profile(path, UploadOptions(split_column="split")).format
    found = look(path, form, SHARES, 42, EMBEDDED, None, 192)
    assert found.algorithm == "as-given"
    assert found.near_duplicates.count == 4 * 4 + 2 * 2
    for pair in found.near_duplicates.pairs:
        assert pair.labels_differ == (pair.rows[0] % 2 != pair.rows[1] % 2)
        assert pair.parts == tuple(split[row] for row in pair.rows)
        assert 0.7 <= pair.similarity < 1


@pytest.mark.parametrize("name", [BERT, QWEN3, QWEN3_EOS, QWEN3_STOCK])
def test_tokens_and_truncated_texts_are_those_that_training_counts(table, tiny_models, name):
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    tokenizer = load_tokenizer(tiny_models / name, decoder=name != BERT)
    whole = encode(tokenizer, [row["text"] for row in rows], 10_000).lengths
    max_length = int(np.median(whole))
    encoded = encode(tokenizer, [row["text"] for row in rows], max_length)
    found = looked(table, base=name, folder=tiny_models / name, max_length=max_length)
    labels = np.array([row["label"] for row in rows])
    assert 0 < encoded.truncated.sum() < len(rows)
    assert found.truncation.n_texts == len(rows)
    assert found.truncation.n_truncated == by_code(found)["truncated_text"].count == encoded.truncated.sum()
    assert list(by_code(found)["truncated_text"].rows) == np.flatnonzero(encoded.truncated)[:20].tolist()
    assert sum(found.work.tokens.values()) == encoded.lengths.sum()
    shares = [row.share_of_tokens_lost for row in found.truncation.by_label]
    assert shares == sorted(shares, reverse=True)
    for row in found.truncation.by_label:
        of_label = labels == row.label
        assert row.n_truncated == encoded.truncated[of_label].sum()
        assert row.share_of_tokens_lost == pytest.approx(1 - encoded.lengths[of_label].sum() / whole[of_label].sum())


def test_labels_that_do_not_stand_in_every_part_are_named(tmp_path):
    rows = [(f"text {label} {i}", label, part) for label in "abc" for i, part in enumerate(("train",) * 4 + ("test",))]
    rows = [row for row in rows if row[1:] != ("b", "test")]
    path = written(tmp_path / "t.csv", rows, ("text", "label", "split"))
    form = profile(path, UploadOptions(split_column="split")).format
    warning = by_code(look(path, form, SHARES, 42, EMBEDDED, None, 192))["label_missing_from_part"]
    missing = [i for i, row in enumerate(rows) if row[1] == "b"]
    assert list(warning.rows) == missing
    assert "b (none in test)" in warning.message
    assert "a (" not in warning.message


@pytest.mark.parametrize("damaged", [False, True])
def test_without_the_base_models_tokenizer_the_rest_is_told(table, tmp_path, damaged):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    found = looked(table, base="mine", folder=folder if damaged else None)
    assert (found.truncation, found.work.tokens) == (None, None)
    assert "mine" in by_code(found)["base_model_not_at_hand"].message
    assert str(folder) not in by_code(found)["base_model_not_at_hand"].message
    assert found.near_duplicates.count > 0


def test_of_too_many_rows_some_are_looked_at_and_all_are_split(table, tiny_models, monkeypatch):
    whole = looked(table, base=BERT, folder=tiny_models / BERT, max_length=16)
    monkeypatch.setattr(preflight, "MAX_ROWS", 60)
    found = looked(table, base=BERT, folder=tiny_models / BERT, max_length=16)
    assert found.work.rows == whole.work.rows
    assert (found.near_duplicates.sampled, whole.near_duplicates.sampled) == (True, False)
    assert found.truncation.n_texts == -(-160 // 3)
    assert sum(found.work.tokens.values()) == pytest.approx(sum(whole.work.tokens.values()), rel=0.15)
    assert {row % 3 for pair in found.near_duplicates.pairs for row in pair.rows} <= {0}


# How long it takes ---------------------------------------------------------------------------------
WORK = Work({"train": 8000, "validation": 1000, "test": 1000}, {"train": 80_000, "validation": 10_000, "test": 10_000},
            400_000, 20)  # fmt: skip


def test_an_earlier_job_gives_its_own_speed_back():
    """Its run of 3 epochs over 50,000 tokens in 100 s, scored at 0.01 s a row, is foreseen for the same rows."""
    metrics = {
        "split": {"n_train": 5000},
        "training": {"tokens_per_second": 1500.0, "train_seconds": 100.0, "epochs_run": 3},
        "methods": {"lora": {"test": {"seconds_per_row": 0.01}},
                    "zero_shot_prompt": {"baseline_subset": {"seconds_per_row": 0.5}}},
    }  # fmt: skip
    speed = measured_speed(metrics, "job_1")
    assert speed == Speed(1500.0, pytest.approx(1000.0), 0.5, "job_1")
    found = estimates(WORK, speed)
    assert found["zero_shot_prompt"].seconds == 300 * 0.5
    assert found["zero_shot_similarity"].seconds == 20.0
    trained = auto_epochs(8000) * (80_000 / 1500 + 10)
    assert found["lora"].seconds == pytest.approx(found["embedding_logreg"].seconds + trained, abs=0.2)
    assert {found[name].basis for name in ("lora", "embedding_logreg", "zero_shot_prompt")} == {"job_1"}
    assert found["tfidf_logreg"].basis == TWO_CORES


@pytest.mark.parametrize(
    "metrics", [{}, {"training": None}, {"training": {"epochs_run": 0, "tokens_per_second": 0.0, "train_seconds": 0.0}}]
)
def test_a_job_that_did_not_train_tells_no_speed(metrics):
    assert measured_speed(metrics, "job_1") is None


def test_what_is_not_known_is_left_open():
    for work, speed in ((WORK, None), (Work(WORK.rows, None, 400_000, 20), KNOWN[EMBEDDED])):
        found = estimates(work, speed)
        assert {name for name, estimate in found.items() if estimate.seconds is not None} == {
            "majority", "tfidf_logreg"}  # fmt: skip
    assert estimates(WORK, KNOWN[EMBEDDED])["zero_shot_prompt"].seconds is None


def test_the_api_that_offers_it_imports_none_of_what_it_needs():
    program = "import sys, service.main; print(*{'torch', 'transformers', 'pandas', 'sklearn'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == ""
