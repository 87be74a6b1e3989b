"""A whole file labelled with one model: the answers, the rows that have none, and going on after a break."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from service.core.errors import InvalidData
from service.ml.adapter import save_head
from service.ml.base_models import find_base, locate
from service.ml.dataset import UploadOptions, profile
from service.ml.engine import Engine
from service.ml.manifest import Manifest
from tests.adapters import labels, manifest, save_random_adapter, stock_logits
from tests.tiny import BERT, HIDDEN, QWEN3, labelled_texts
from worker import bulk
from worker.bulk import Bulk, Parts
from worker.progress import Reporter
from worker.stop import Stopped

K = 5
TEXTS = [*labelled_texts(40, seed=5)[0], "late parcel " * 60, "a\rb", 'quoted "text", twice', "=1+1"]


@dataclass
class Job:
    """A child's folder, as the supervisor stages it."""

    folder: Path
    base: Path

    def run(self, n: int = 0) -> list[dict[str, Any]]:
        """One attempt; one that is broken off after `n` parts where that is asked."""
        said, parts = io.StringIO(), 0
        reporter = Reporter(said)

        def checkpoint(_folder: Path) -> None:
            nonlocal parts
            parts += 1
            if parts == n:
                raise KeyboardInterrupt

        reporter.checkpoint = checkpoint  # type: ignore[method-assign]
        try:
            Bulk(self.folder, reporter).run()
        except KeyboardInterrupt:
            assert n
        return [json.loads(line) for line in said.getvalue().splitlines()]

    @property
    def written(self) -> bytes:
        return (self.folder / "out" / "predictions.csv").read_bytes()

    @property
    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(self.written.decode("utf-8"), newline="")))


Make = Callable[..., Job]


@pytest.fixture
def make(tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(bulk, "serving_precision", lambda *_: "fp32")
    monkeypatch.setattr(bulk, "pick_device", lambda: torch.device("cpu"))

    def made(
        table: bytes, *, base: str = BERT, method: str = "lora", name: str = "job", temperature: float = 1.0,
        upload: dict[str, Any] | None = None, **spec: Any,
    ) -> Job:  # fmt: skip
        folder = tmp_path / name
        (folder / "model").mkdir(parents=True)
        (folder / "dataset").write_bytes(table)
        source = locate(find_base(base, tiny_models))
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        if base == QWEN3:
            tokenizer.pad_token = tokenizer.eos_token
        if method == "lora":
            save_random_adapter(folder / "model", source.folder, tokenizer, K)
            known = Manifest.read(folder / "model")
        else:
            torch.manual_seed(1)
            save_head(folder / "model", torch.randn(K, HIDDEN), torch.randn(K))
            known = manifest(K, method=method, states="pooled")
        known = replace(known, base_model=base, base_revision=source.revision, temperature=temperature)
        known.write(folder / "model")
        found = profile(folder / "dataset", UploadOptions(**{"labelled": False} | (upload or {})))
        job = {
            "spec": {"kind": "predict", "model": "mdl_1"} | spec, "models_dir": str(tiny_models),
            "table": vars(found.format), "dataset": {"n_rows": found.n_rows},
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(job))
        return Job(folder, source.folder)

    return made


def table_of(texts: list[str]) -> bytes:
    file = io.StringIO(newline="")
    write = csv.writer(file, quoting=csv.QUOTE_ALL)
    write.writerow(("text", "id"))  # a second column: a blank line is a row then
    write.writerows((text, i) for i, text in enumerate(texts))
    return file.getvalue().encode("utf-8")


def small(monkeypatch: pytest.MonkeyPatch, rows: int = 4) -> None:
    """Every block of so many rows is a part."""
    monkeypatch.setattr(bulk, "BLOCK_ROWS", {"cpu": rows})
    monkeypatch.setattr(bulk, "PART_SECONDS", 0.0)


# The answers --------------------------------------------------------------------------------------
def test_answers_are_those_of_stock_transformers_and_peft_in_the_order_of_the_file(make: Make) -> None:
    job = make(table_of(TEXTS), temperature=2.0, top_k=2)
    said = job.run()
    logits = stock_logits(job.base, job.folder / "model", TEXTS, K) / 2.0
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = np.argsort(-shares, 1)
    assert [row["row_id"] for row in job.rows] == [str(i) for i in range(len(TEXTS))]
    assert [row["text"] for row in job.rows] == TEXTS
    assert [row["label"] for row in job.rows] == [labels(K)[i] for i in order[:, 0]]
    np.testing.assert_allclose([float(row["confidence"]) for row in job.rows], shares.max(1), atol=1e-5)
    assert list(job.rows[0]) == [
        "row_id", "text", "label", "confidence", "label_1", "probability_1", "label_2", "probability_2"
    ]  # fmt: skip
    for row, ids, share in zip(job.rows, order, shares, strict=True):
        assert (row["label_1"], row["label_2"]) == (labels(K)[ids[0]], labels(K)[ids[1]])
        assert float(row["probability_2"]) == pytest.approx(share[ids[1]], abs=1e-5)
    summary = said[-1]["summary"]
    counts = {one["label"]: one["count"] for one in summary["labels"]}
    assert counts == {name: n for name in labels(K) if (n := sum(row["label"] == name for row in job.rows))}
    assert (summary["n_rows"], summary["n_empty"], summary["n_abstained"]) == (len(TEXTS), 0, 0)
    assert (summary["model_id"], summary["scored_in"]) == ("mdl_1", "fp32")
    assert summary["n_truncated"] == 1
    assert summary["tokens"] > 0 < summary["rows_per_second"]


@pytest.mark.parametrize("base", [BERT, QWEN3])
@pytest.mark.parametrize("method", ["lora", "embedding_logreg"])
def test_blocks_of_any_size_give_the_same_answers(
    make: Make, monkeypatch: pytest.MonkeyPatch, base: str, method: str
) -> None:
    whole = make(table_of(TEXTS), base=base, method=method, name="whole")
    whole.run()
    small(monkeypatch, 3)
    cut = make(table_of(TEXTS), base=base, method=method, name="cut")
    cut.run()
    assert [row["label"] for row in cut.rows] == [row["label"] for row in whole.rows]
    assert len({row["label"] for row in cut.rows}) > 1
    for one, other in zip(cut.rows, whole.rows, strict=True):
        assert float(one["confidence"]) == pytest.approx(float(other["confidence"]), abs=1e-5)


def test_rows_without_a_text_stay_without_a_label_and_are_counted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 2)  # one block has no text at all
    job = make(table_of(["hello parcel", "", "  ", "\t", "late courier"]), top_k=1)
    said = job.run()
    assert [bool(row["label"]) for row in job.rows] == [True, False, False, False, True]
    assert [row["text"] for row in job.rows] == ["hello parcel", "", "  ", "\t", "late courier"]
    assert job.rows[1]["confidence"] == job.rows[1]["label_1"] == ""
    assert said[-1]["summary"]["n_empty"] == 3
    assert said[-1]["summary"]["headline"] == "2 of 5 rows labelled; 3 without a text."
    [warning] = [message for message in said if message.get("level") == "warning"]
    assert warning["data"] == {"count": 3}


def test_a_header_in_doubt_is_a_warning_of_the_job_and_other_findings_are_not(make: Make) -> None:
    job = make(table_of(["hello parcel"]), top_k=1)
    known = json.loads((job.folder / "job.json").read_text())
    warned = [{"code": code, "message": code, "count": 1, "rows": [0]} for code in ("unclear_header", "duplicate_text")]
    (job.folder / "job.json").write_text(json.dumps(known | {"dataset": known["dataset"] | {"warnings": warned}}))
    assert [said["message"] for said in job.run() if said.get("level") == "warning"] == ["unclear_header"]


def test_under_the_confidence_asked_for_the_label_is_left_open_and_the_guess_can_be_seen(make: Make) -> None:
    free = make(table_of(TEXTS), name="free")
    free.run()
    confidences = sorted(float(row["confidence"]) for row in free.rows)
    job = make(table_of(TEXTS), min_confidence=confidences[10], top_k=20)
    summary = job.run()[-1]["summary"]
    assert [row["label"] for row in job.rows] == [
        row["label"] if float(row["confidence"]) >= confidences[10] else "" for row in free.rows
    ]
    assert [row["label_1"] for row in job.rows] == [row["label"] for row in free.rows]
    assert f"probability_{K}" in job.rows[0]
    assert summary["n_abstained"] == 10
    assert sum(one["count"] for one in summary["labels"]) == len(TEXTS) - 10


@pytest.mark.parametrize(
    ("table", "upload"),
    [
        ("text;id\r\nGr\xfc\xdfe, parcel;1\r\n\"two\r\nlines\";2\r\n".encode("cp1252"), {"encoding": "cp1252"}),
        (b'he said "no"\t1\n"open parcel\t2\n', {"has_header": False, "text_column": "0"}),
        ("\ufefftext,label\nparcel,a\n,b\nlate,\n".encode(), {"labelled": False}),
    ],
    ids=["cp1252 and semicolons", "literal quotes, no header", "a mark, and labels nobody needs"],
)  # fmt: skip
def test_a_file_is_read_as_it_was_profiled(make: Make, table: bytes, upload: dict[str, Any]) -> None:
    job = make(table, upload=upload)
    job.run()
    assert [row["text"] for row in job.rows] in (
        ["Gr\xfc\xdfe, parcel", "two\r\nlines"], ['he said "no"', '"open parcel'], ["parcel", "", "late"]
    )  # fmt: skip
    assert [row["row_id"] for row in job.rows] == [str(i) for i in range(len(job.rows))]


def test_progress_goes_by_rows_and_never_falls(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    monkeypatch.setattr("worker.progress._LEAST_SECONDS_BETWEEN", 0.0)
    told = [message for message in make(table_of(TEXTS)).run() if message["type"] == "progress"]
    assert {message["stage"] for message in told} == {"prepare", "evaluate"}
    fractions = [message["fraction"] for message in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(0.97)
    assert told[-1]["message"].startswith(f"{len(TEXTS)} of {len(TEXTS)} rows")
    assert told[-1]["eta_seconds"] == 0.0


def test_a_model_whose_files_are_not_the_published_ones_labels_nothing(make: Make) -> None:
    job = make(table_of(TEXTS))
    (job.folder / "model" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InvalidData):
        job.run()
    assert not (job.folder / "out" / "predictions.csv").exists()


def test_a_file_that_is_not_the_one_that_was_profiled_fails(make: Make) -> None:
    job = make(table_of(TEXTS))
    with (job.folder / "dataset").open("ab") as file:
        file.write(b"ragged\r\n")
    with pytest.raises(InvalidData):
        job.run()


# Going on -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("broken_at", [1, 4, 10])
def test_a_job_that_was_broken_off_goes_on_and_leaves_the_same_bytes(
    make: Make, monkeypatch: pytest.MonkeyPatch, broken_at: int
) -> None:
    small(monkeypatch)
    table = table_of([*TEXTS, "", "the end"])
    whole, broken = make(table, name="whole", top_k=3), make(table, name="broken", top_k=3)
    at_once = whole.run()[-1]["summary"]
    broken.run(broken_at)
    shutil.rmtree(broken.folder / "out")
    scored = []
    monkeypatch.setattr(bulk, "encode", lambda *given, real=bulk.encode: scored.append(len(given[1])) or real(*given))
    summary = broken.run()[-1]["summary"]
    assert broken.written == whole.written
    assert sum(scored) <= len(TEXTS) + 1 - 4 * broken_at
    timed = ("seconds", "rows_per_second")
    assert {k: v for k, v in summary.items() if k not in timed} == {k: v for k, v in at_once.items() if k not in timed}


def test_a_part_that_is_damaged_and_all_after_it_are_written_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    whole, broken = make(table_of(TEXTS), name="whole"), make(table_of(TEXTS), name="broken")
    whole.run()
    broken.run(6)
    folder = broken.folder / "checkpoints" / "parts"
    kept = {path.name for path in folder.iterdir()}
    assert {"000005.csv", "000005.json"} <= kept
    with (folder / "000002.csv").open("ab") as file:
        file.write(b"torn")
    assert Parts(folder).tally.rows == 8
    assert {path.name for path in folder.iterdir()} == {f"00000{i}.{end}" for i in (0, 1) for end in ("csv", "json")}
    broken.run()
    assert broken.written == whole.written


def test_parts_that_stand_are_never_touched_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    job = make(table_of(TEXTS))
    job.run(3)
    folder = job.folder / "checkpoints" / "parts"
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}
    job.run()
    after = {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}
    assert before.items() <= after.items()
    assert len(after) == 2 * len(TEXTS) / 4


def test_a_job_told_to_stop_keeps_the_blocks_that_were_scored_though_no_part_is_full(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    monkeypatch.setattr(bulk, "PART_SECONDS", 3600.0)
    whole, stopped = make(table_of(TEXTS), name="whole"), make(table_of(TEXTS), name="stopped")
    whole.run()
    real, scored = Engine.score, 0

    def score(*given: Any) -> Any:
        nonlocal scored
        scored += 1
        if scored == 4:
            raise Stopped
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "score", score)
        said = io.StringIO()
        with pytest.raises(Stopped):
            Bulk(stopped.folder, Reporter(said)).run()
    last = json.loads(said.getvalue().splitlines()[-1])
    assert last == {"type": "checkpoint", "folder": str(stopped.folder / "checkpoints" / "parts")}
    told = [message["message"] for message in stopped.run() if message["type"] == "event"]
    assert "Goes on after 12 rows." in told
    assert stopped.written == whole.written


def test_a_job_told_to_stop_while_its_parts_are_joined_keeps_the_last_one(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, said = make(table_of(TEXTS)), io.StringIO()

    def join(*_: Any) -> None:
        raise Stopped

    monkeypatch.setattr(Parts, "join", join)
    with pytest.raises(Stopped):
        Bulk(job.folder, Reporter(said)).run()
    assert json.loads(said.getvalue().splitlines()[-1])["type"] == "checkpoint"


def test_a_part_that_could_not_be_written_is_not_kept(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(make(table_of(TEXTS)).folder / "checkpoints" / "parts")
    parts.write("0,fits,,\n")

    def full(*_: Any, **__: Any) -> Any:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(OSError, match="no space"):
            parts.write("1,does not,,\n")
    assert not parts.end()


def test_a_job_goes_on_in_the_precision_it_began_in(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    job = make(table_of(TEXTS))
    job.run(2)
    monkeypatch.setattr(bulk, "serving_precision", lambda *_: "bf16")
    assert job.run()[-1]["summary"]["scored_in"] == "fp32"
