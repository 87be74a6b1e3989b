"""The gate before an alias moves: uploads and artifacts as they really are, a scripted engine, other people's tests."""

import asyncio
import concurrent.futures
import contextlib
import csv
import hashlib
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm.exc import StaleDataError
from statsmodels.stats.contingency_tables import mcnemar

from service.api import gate
from service.core.errors import AppError, BaseLoading, BaseNotServed, EngineUnavailable, QueueFull
from service.db import catalog
from service.db.jobs import NewArtifact
from service.inference.handle import Scores
from service.inference.wire import ServedModel
from service.ml.dataset import TableFormat
from service.ml.labels import LabelSet
from service.ml.split import read_split
from service.storage import StoredText
from tests.integration.conftest import QuietEngine, api
from tests.problems import problem_of
from tests.rows import GRACE, START, add_job, claim, model, publish_stored
from tests.storing import put_folder
from worker.artifacts import write_json, write_predictions, write_split
from worker.predictions import NO_ANSWER, Predictions

LABELS = ("card, lost", "Gebühr", 'the "other"')
SHARES = {"train": 0.4, "validation": 0.1, "test": 0.5}
Truth = Mapping[str, str]
Answer = Callable[[str], str]


def truth_of(n: int, *, start: int = 0, labels: Sequence[str] = LABELS) -> dict[str, str]:
    """Texts with quotes, commas, line breaks, accents and more, and their labels in turn."""
    breaks = ("\n", "\r", "\r\n")
    return {
        f'Größe {i},{breaks[i % 3]}"said" he; 你好 🙂\u2028\u0301': labels[i % len(labels)]
        for i in range(start, start + n)
    }


def right_on(truth: Truth, share: float, salt: str = "") -> Answer:
    """Answers that are right on about that share of the texts, always on the same ones; else the next label."""

    def answer(text: str) -> str:
        draw = int.from_bytes(hashlib.sha256(f"{salt}{text}".encode()).digest()[:4], "big") / 2**32
        if draw < share:
            return truth[text]
        labels = sorted(set(truth.values()))
        return labels[(labels.index(truth[text]) + 1) % len(labels)]

    return answer


class ScriptedEngine(QuietEngine):
    """Answers as each model was said to; `before` may do something else at a call."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[tuple[str, ...], Answer]] = {}
        self.calls: list[tuple[str, list[str]]] = []
        self.before: Callable[[], Any] = lambda: None

    async def predict(self, model: ServedModel, texts: list[str]) -> Scores:
        self.calls.append((model.id, texts))
        waited = self.before()
        if waited is not None:
            await waited
        labels, answer = self.answers[model.id]
        rows = [[0.9 if label == answer(text) else 0.05 for label in labels] for text in texts]
        return Scores(labels, rows, [False] * len(texts), 1)

    @property
    def asked(self) -> list[str]:
        return [text for _model, texts in self.calls for text in texts]


@dataclass
class World:
    """A service, and what was uploaded to it and trained."""

    client: TestClient
    folder: Path
    engine: ScriptedEngine = field(default_factory=ScriptedEngine)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def ctx(self) -> Any:
        return self.client.app.state.context  # type: ignore[attr-defined]

    def upload(self, rows: Sequence[tuple[str, ...]], header: Sequence[str] = ("text", "label"), **form: str) -> str:
        content = io.StringIO(newline="")
        csv.writer(content, quoting=csv.QUOTE_ALL).writerows([header, *rows])
        named = {"text_column": "text", "label_column": "label"} | form
        answer = self.client.post("/datasets", files={"file": content.getvalue().encode()}, data=named)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def train(
        self, dataset_id: str, answer: Answer, *, seed: int = 42, served: Answer | None = None, method: str = "lora"
    ) -> str:
        """A model as a succeeded job leaves it: by the real split, in the worker's own files."""
        with self.ctx.db.read() as session:
            dataset = catalog.get_dataset(session, dataset_id)
        file = StoredText(self.ctx.storage, dataset.storage_key)
        table, split, algorithm = read_split(file, TableFormat(**dataset.profile["format"]), SHARES, seed)  # type: ignore[arg-type]
        parts = {part: Predictions(self._ids(table, split.part(part), answer)) for part in ("validation", "test")}  # type: ignore[arg-type]
        folder = self.folder / f"job-{next(self._numbers)}"
        folder.mkdir()
        write_split(folder / "split.csv", table, split)
        write_predictions(folder / "predictions.csv", table, split, np.arange(0), {method: parts})
        facts = {"dataset": {"sha256": dataset.sha256}, "split": {"algorithm": algorithm, "seed": seed}}
        write_json(folder / "metrics.json", facts)
        add_job(self.ctx.db, dataset_id)
        lease = claim(self.ctx.db).lease
        stored = put_folder(self.ctx.storage, folder, lease.prefix)
        left = [
            NewArtifact(f.key.rpartition("/")[2], f.size_bytes, f.sha256, f.key, f.key.endswith("predictions.csv"))
            for f in stored
        ]
        made = model(method, labels=list(table.labels.names))
        publish_stored(self.ctx.db, lease, left, [made], {}, START, GRACE)
        self.engine.answers[made.id] = (table.labels.names, served or answer)
        return made.id

    def put(self, model_id: str, alias: str = "live", **body: Any) -> Any:
        return self.client.put(f"/aliases/{alias}", json={"model_id": model_id} | body)

    def promote(self, model_id: str, **body: Any) -> Any:
        answer = self.put(model_id, **body)
        assert answer.status_code == 200, answer.text
        assert self.live == model_id == answer.json()["model_id"]
        return answer.json()["gate"]

    def refused(self, model_id: str, code: str = "promotion_refused") -> Any:
        before = self.live
        problem = problem_of(self.put(model_id), 409, code)
        assert self.live == before
        return problem

    def dry_run(self, model_id: str, alias: str = "live") -> Any:
        answer = self.client.get(f"/aliases/{alias}/gate", params={"model_id": model_id})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def job_of(self, model_id: str) -> Any:
        return self.client.get(f"/jobs/{self.client.get(f'/models/{model_id}').json()['job_id']}").json()

    def parts_of(self, model_id: str) -> dict[str, list[int]]:
        """Row ids by part, as split.csv has them."""
        content = self.client.get(f"/jobs/{self.job_of(model_id)['id']}/artifacts/split.csv").text
        parts: dict[str, list[int]] = {}
        for line in csv.DictReader(io.StringIO(content)):
            parts.setdefault(line["split"], []).append(int(line["row_id"]))
        return parts

    @property
    def live(self) -> str:
        return str(self.client.get("/aliases").json()["data"][0]["model_id"])

    @staticmethod
    def _ids(table: Any, rows: Any, answer: Answer) -> Any:
        labels: LabelSet = table.labels
        found = [labels.id_of(answer(table.texts[i])) for i in rows]
        return np.array([NO_ANSWER if label_id is None else label_id for label_id in found])


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with opened(tmp_path) as world:
        yield world


@contextlib.contextmanager
def opened(folder: Path, **settings: Any) -> Iterator[World]:
    with api(folder / "data", **settings) as client:
        world = World(client, folder)
        world.ctx.engine = world.engine
        yield world


TRUTH = truth_of(600)


def stock_figures(
    truth: Truth, texts: Sequence[str], candidate: Answer, incumbent: Answer
) -> tuple[float, float, float]:
    """Both accuracies, and McNemar's p as statsmodels has it."""
    right = [np.array([answer(text) == truth[text] for text in texts]) for answer in (candidate, incumbent)]
    fixed, broken = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    return float(right[0].mean()), float(right[1].mean()), float(mcnemar([[0, fixed], [broken, 0]], exact=True).pvalue)


def assert_figures(found: Any, truth: Truth, texts: Sequence[str], candidate: Answer, incumbent: Answer) -> None:
    ours, theirs, p = stock_figures(truth, texts, candidate, incumbent)
    assert (found["checked"], found["n"]) == (True, len(texts))
    assert (found["candidate_accuracy"], found["incumbent_accuracy"]) == pytest.approx((ours, theirs))
    assert found["accuracy_delta"] == pytest.approx(ours - theirs)
    assert found["mcnemar_p"] == pytest.approx(p, abs=1e-12, rel=1e-9)
    low, high = found["accuracy_delta_ci95"]
    assert low <= found["accuracy_delta"] <= high


# On the same file and split -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("share", "verdict"),
    [(0.6, "incumbent_wins"), (0.95, "candidate_wins"), (0.81, "inconclusive"), (0.77, "inconclusive")],
)
def test_only_a_candidate_that_is_shown_to_be_worse_is_refused(world: World, share: float, verdict: str) -> None:
    dataset_id = world.upload(list(TRUTH.items()))
    good, other = right_on(TRUTH, 0.8), right_on(TRUTH, share, "other")
    incumbent, candidate = world.train(dataset_id, good), world.train(dataset_id, other)
    assert world.promote(incumbent) is None
    dry = world.dry_run(candidate)
    texts = [list(TRUTH)[i] for i in world.parts_of(candidate)["test"]]
    assert_figures(dry, TRUTH, texts, other, good)
    assert (len(texts), dry["verdict"], dry["note"]) == (300, verdict, None)
    if verdict == "incumbent_wins":
        detail = world.refused(candidate)["detail"]
        for figure in (
            "300 rows",
            f"{dry['candidate_accuracy']:.1%}",
            f"{dry['incumbent_accuracy']:.1%}",
            '"force": true',
        ):
            assert figure in detail
    else:
        assert world.promote(candidate) == dry
    assert world.engine.calls == []


def test_a_first_model_and_the_same_one_again_pass_without_a_gate(world: World) -> None:
    made = world.train(world.upload(list(TRUTH.items())), right_on(TRUTH, 0.5))
    assert world.dry_run(made) is None
    assert world.promote(made) is None
    assert world.dry_run(made) is None
    assert world.promote(made) is None


def test_forced_a_worse_model_passes_and_rolling_back_finds_what_stood_there_before(world: World) -> None:
    dataset_id = world.upload(list(TRUTH.items()))
    good, bad = (world.train(dataset_id, right_on(TRUTH, share)) for share in (0.9, 0.5))
    world.promote(good)
    world.refused(bad)
    found = world.promote(bad, force=True)
    assert (found["checked"], set(found)) == (False, {"checked", "note"})
    assert "Forced" in found["note"]
    [alias] = world.client.get("/aliases").json()["data"]
    assert [move["model_id"] for move in alias["history"]] == [bad, good]
    assert all(move["created_at"] for move in alias["history"])
    world.promote(alias["history"][1]["model_id"], force=True)
    assert world.client.get("/aliases/live/history").json()["data"][0]["model_id"] == good


def test_another_method_of_the_same_job_is_held_to_its_own_answers(world: World) -> None:
    dataset_id = world.upload(list(TRUTH.items()))
    good, bad = right_on(TRUTH, 0.9), right_on(TRUTH, 0.5)
    world.promote(world.train(dataset_id, good))
    candidate = world.train(dataset_id, bad, method="embedding_logreg")
    texts = [list(TRUTH)[i] for i in world.parts_of(candidate)["test"]]
    assert_figures(world.dry_run(candidate), TRUTH, texts, bad, good)
    world.refused(candidate)


def test_silence_counts_as_wrong_and_no_win_goes_to_a_candidate_that_does_not_beat_a_constant_answer(
    world: World,
) -> None:
    dataset_id = world.upload(list(TRUTH.items()))
    constant = world.train(dataset_id, lambda text: LABELS[0])
    silent = world.train(dataset_id, lambda text: "")
    world.promote(silent)
    found = world.promote(constant)
    assert (found["incumbent_accuracy"], found["verdict"]) == (0.0, "inconclusive")
    assert found["mcnemar_p"] < 1e-9
    assert "most common label" in found["note"]


def test_where_one_label_is_nearly_all_what_is_worse_is_refused_though_the_incumbent_proves_little(
    world: World,
) -> None:
    truth = {f"text {i}": "no" if i % 20 else "yes" for i in range(3000)}
    dataset_id = world.upload(list(truth.items()))
    incumbent = world.train(dataset_id, lambda text: "no")  # never better than the constant answer: it is that
    coin = world.train(dataset_id, lambda text: ("no", "yes")[int(text.split()[1]) % 2])
    world.promote(incumbent)
    assert world.dry_run(coin)["verdict"] == "incumbent_wins"
    world.refused(coin)


def test_an_incumbent_that_always_gives_one_label_keeps_nobody_out_that_finds_the_other(world: World) -> None:
    truth = {f"text {i}": "no" if i % 20 else "yes" for i in range(3000)}
    finds, cries = right_on(truth, 0.9), right_on(truth, 0.92)
    dataset_id = world.upload(list(truth.items()))
    constant = world.train(dataset_id, lambda text: "no")
    finder = world.train(dataset_id, lambda text: (finds if truth[text] == "yes" else cries)(text))
    world.promote(constant)
    found = world.promote(finder)
    assert (found["verdict"], found["accuracy_delta"] < 0, found["mcnemar_p"] < 0.05) == ("inconclusive", True, True)
    assert "the better macro-F1" in found["note"]
    assert world.promote(constant)["verdict"] == "inconclusive"


def test_repeated_texts_are_no_further_evidence(world: World) -> None:
    truth = truth_of(100)
    rows = [(text if i % 2 else f" {text.upper()} ", label) for text, label in truth.items() for i in range(8)]
    every = truth | dict(rows)
    dataset_id = world.upload(rows)
    good = world.train(dataset_id, every.__getitem__)
    tested = {rows[i][0].strip().casefold() for i in world.parts_of(good)["test"]}
    wrong = set(sorted(tested)[:5])
    bad = world.train(dataset_id, lambda text: every[text] if text.strip().casefold() not in wrong else LABELS[0] + "x")
    world.promote(good)
    found = world.promote(bad)
    assert (found["n"], found["verdict"]) == (400, "inconclusive")
    assert found["mcnemar_p"] == pytest.approx(mcnemar([[0, 0], [40, 0]], exact=True).pvalue, rel=1e-9)
    assert "Repeated texts" in found["note"]


# On other files -----------------------------------------------------------------------------------
def test_texts_the_incumbent_learned_from_never_count_for_it(world: World) -> None:
    """It knows by heart what it was trained on, and is no better elsewhere."""
    ours = world.upload(list(TRUTH.items()))
    plain = right_on(TRUTH, 0.6)
    candidate = world.train(ours, plain)
    texts = [list(TRUTH)[i] for i in world.parts_of(candidate)["test"]]
    other_rows = [(f"  {text.upper()} ", TRUTH[text]) for text in texts] + list(truth_of(60, start=2000).items())
    theirs = world.upload(other_rows)
    seen: set[str] = set()

    def by_heart(text: str) -> str:
        return TRUTH[text] if text in seen else right_on(TRUTH, 0.6, "else")(text)

    incumbent = world.train(theirs, lambda text: LABELS[0], served=by_heart)
    parts = world.parts_of(incumbent)
    learned = {other_rows[i][0] for part in ("train", "validation") for i in parts[part]}
    seen |= {text for text in texts if f"  {text.upper()} " in learned}
    fair = [text for text in texts if text not in seen]
    assert 120 < len(seen) < 180
    candidate_right, incumbent_right, p = stock_figures(TRUTH, texts, plain, by_heart)
    assert (candidate_right < incumbent_right, p < 0.001) == (True, True), "counted, they would make it win"
    world.promote(incumbent)
    found = world.promote(candidate)
    assert_figures(found, TRUTH, fair, plain, by_heart)
    assert found["verdict"] == "inconclusive"
    assert f"{len(seen)} test rows whose text one of the two was trained or chosen on" in found["note"]
    assert world.engine.asked == fair, "the texts arrive as they are, and no other"
    assert {model_id for model_id, _ in world.engine.calls} == {incumbent}
    assert max(len(sent) for _, sent in world.engine.calls) <= gate.TEXTS_A_CALL < len(fair)


def test_a_worse_candidate_from_another_file_is_refused_on_served_answers(world: World) -> None:
    other = truth_of(300, start=5000)
    incumbent = world.train(world.upload(list(other.items())), right_on(other, 0.2), served=right_on(TRUTH, 0.9))
    bad = right_on(TRUTH, 0.5, "bad")
    candidate = world.train(world.upload(list(TRUTH.items())), bad)
    world.promote(incumbent)
    world.refused(candidate)
    texts = [list(TRUTH)[i] for i in world.parts_of(candidate)["test"]]
    assert_figures(world.dry_run(candidate), TRUTH, texts, bad, right_on(TRUTH, 0.9))


def test_another_seed_of_the_same_file_leaves_the_rows_neither_was_trained_on(world: World) -> None:
    dataset_id, good, bad = world.upload(list(TRUTH.items())), right_on(TRUTH, 0.9), right_on(TRUTH, 0.4)
    incumbent, candidate = world.train(dataset_id, good, seed=1), world.train(dataset_id, bad, seed=2)
    both = sorted(set(world.parts_of(incumbent)["test"]) & set(world.parts_of(candidate)["test"]))
    assert 100 < len(both) < 200
    world.promote(incumbent)
    assert_figures(world.dry_run(candidate), TRUTH, [list(TRUTH)[i] for i in both], bad, good)
    world.refused(candidate)


def test_texts_that_a_files_own_split_repeats_in_train_count_for_nobody(world: World) -> None:
    truth = list(truth_of(300).items())
    rows = [(text, label, ("train", "val", "test")[i // 3 % 3]) for i, (text, label) in enumerate(truth)]
    tested = [row for row in rows if row[2] == "test"]
    repeated = [(text.upper(), label, "train") for text, label, _part in tested[:50]]
    every = dict(truth) | {text: label for text, label, _ in repeated}
    dataset_id = world.upload([*rows, *repeated], ("text", "label", "part"), split_column="part")
    good, bad = right_on(every, 0.9), right_on(every, 0.3)
    world.promote(world.train(dataset_id, good))
    candidate = world.train(dataset_id, bad)
    fair = [text for text, _label, _part in tested[50:]]
    found = world.dry_run(candidate)
    assert_figures(found, every, fair, bad, good)
    assert "50 test rows whose text" in found["note"]
    world.refused(candidate)


def test_only_rows_whose_label_both_know_are_counted(world: World) -> None:
    truth = truth_of(600, labels=(*LABELS, "new"))
    known = {text: label for text, label in truth.items() if label != "new"}
    old_rows = truth_of(300, start=5000, labels=(*LABELS, "retired"))
    answer = right_on(truth, 0.9)
    incumbent = world.train(
        world.upload(list(old_rows.items())),
        old_rows.__getitem__,
        served=lambda text: answer(text) if answer(text) != "new" else "retired",
    )
    mine = right_on(truth, 0.85, "mine")
    candidate = world.train(world.upload(list(truth.items())), mine)
    texts = [list(truth)[i] for i in world.parts_of(candidate)["test"]]
    shared = [text for text in texts if text in known]
    assert len(shared) < len(texts)
    world.promote(incumbent)
    found = world.promote(candidate)
    served = world.engine.answers[incumbent][1]
    assert_figures(found, truth, shared, mine, served)
    assert found["note"].startswith(
        "The labels differ: 1 new (new), 1 gone (retired). Only rows of the others are compared. "
        f"{len(texts) - len(shared)} test rows whose label one of the two does not know"
    )


def test_no_more_rows_are_asked_than_the_gate_takes_and_none_that_predict_would_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MOST_ASKED", 120)
    long = {text + "x" * 100 if i % 5 == 0 else text: label for i, (text, label) in enumerate(TRUTH.items())}
    with opened(tmp_path, predict_max_chars=60, predict_queue_tokens=200) as world:
        other = truth_of(200, start=5000)
        incumbent = world.train(world.upload(list(other.items())), other.__getitem__, served=right_on(long, 0.8))
        candidate = world.train(world.upload(list(long.items())), right_on(long, 0.8, "b"))
        world.promote(incumbent)
        found = world.promote(candidate)
        texts = [list(long)[i] for i in world.parts_of(candidate)["test"]]
        assert found["n"] == len(set(world.engine.asked)) == len(world.engine.asked) == 120
        assert set(world.engine.asked) <= {text for text in texts if len(text) <= 60}
        n_long = sum(len(text) > 60 for text in texts)
        assert f"{n_long} texts longer" in found["note"]
        assert f"120 of {300 - n_long} rows were drawn by seed 42" in found["note"]
        assert_figures(found, long, world.engine.asked, right_on(long, 0.8, "b"), right_on(long, 0.8))
        drawn = list(world.engine.asked)
        world.engine.calls.clear()
        world.promote(incumbent, force=True)
        world.dry_run(candidate)
        assert world.engine.asked == drawn


# Where nothing can be shown -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("deleted", "side", "reason"),
    [
        ("dataset", "incumbent", "can no longer be told"),
        ("job", "incumbent", "can no longer be told"),
        ("dataset", "candidate", "train it again"),
        ("job", "candidate", "train it again"),
    ],
)
def test_where_texts_are_gone_the_alias_moves_and_the_reason_is_told(
    world: World, deleted: str, side: str, reason: str
) -> None:
    other = truth_of(300, start=5000)
    incumbent = world.train(world.upload(list(other.items())), other.__getitem__, served=right_on(TRUTH, 0.9))
    candidate = world.train(world.upload(list(TRUTH.items())), right_on(TRUTH, 0.3))
    world.promote(incumbent)
    world.refused(candidate)
    job = world.job_of({"incumbent": incumbent, "candidate": candidate}[side])
    gone = {"dataset": f"/datasets/{job['dataset_id']}", "job": f"/jobs/{job['id']}"}[deleted]
    assert world.client.delete(gone).status_code == 204
    found = world.dry_run(candidate)
    assert (found["checked"], set(found)) == (False, {"checked", "note"})
    assert reason in found["note"]
    assert world.promote(candidate) == found


def test_the_same_file_uploaded_twice_is_still_checked_once_the_older_upload_is_deleted(world: World) -> None:
    first, second = (world.upload(list(TRUTH.items())) for _ in range(2))
    good, bad = right_on(TRUTH, 0.9), right_on(TRUTH, 0.5)
    incumbent, candidate = world.train(first, good), world.train(second, bad)
    world.promote(incumbent)
    before = world.dry_run(candidate)
    assert world.engine.calls == []
    assert world.client.delete(f"/datasets/{first}").status_code == 204
    assert world.dry_run(candidate) == before
    assert {model_id for model_id, _ in world.engine.calls} == {incumbent}
    world.refused(candidate)


def test_another_text_column_of_the_same_file_and_split_is_another_set_of_texts(world: World) -> None:
    """The file brings its split, so split.csv is the same for both; the answers are to other texts."""
    part, texts = ("train", "val", "test"), list(truth_of(300).items())
    subjects = [f"subject {i}" for i in range(300)]
    for i in range(0, 90, 9):
        subjects[i] = texts[i + 6][0]  # a text of the test part, in a train row's other column
    rows = [(text, subjects[i], label, part[i // 3 % 3]) for i, (text, label) in enumerate(texts)]
    truth = {row[0]: row[2] for row in rows}
    header, split = ("text", "subject", "label", "part"), {"split_column": "part"}
    theirs = world.upload(rows, header, text_column="subject", **split)
    ours = world.upload(rows, header, **split)
    incumbent = world.train(theirs, lambda text: LABELS[0], served=right_on(truth, 0.9))
    candidate = world.train(ours, right_on(truth, 0.4))
    fair = [row[0] for row in rows if row[3] == "test" and row[0] not in subjects]
    assert len(fair) == 99 - 10
    world.promote(incumbent)
    assert_figures(world.dry_run(candidate), truth, fair, right_on(truth, 0.4), right_on(truth, 0.9))
    assert world.engine.asked == fair


def test_too_few_rows_are_no_evidence(world: World) -> None:
    truth = truth_of(36)
    dataset_id = world.upload(list(truth.items()))
    good, bad = world.train(dataset_id, truth.__getitem__), world.train(dataset_id, lambda text: "")
    world.promote(good)
    found = world.promote(bad)
    assert found["checked"] is False
    assert "only 18 distinct texts" in found["note"]
    assert "20" in found["note"]
    assert "train it on more rows" in found["note"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BaseLoading("The base is loading."), 503),
        (EngineUnavailable("The engine is starting."), 503),
        (QueueFull("Too much is waiting."), 429),
    ],
)
def test_while_the_engine_cannot_answer_the_alias_stays(world: World, error: AppError, status: int) -> None:
    other = truth_of(300, start=5000)
    incumbent = world.train(world.upload(list(other.items())), other.__getitem__, served=right_on(TRUTH, 0.5))
    candidate = world.train(world.upload(list(TRUTH.items())), right_on(TRUTH, 0.9))
    world.promote(incumbent)
    world.engine.before = lambda: fail(error)
    for answer in (world.put(candidate), world.client.get("/aliases/live/gate", params={"model_id": candidate})):
        problem_of(answer, status, error.code)
        assert int(answer.headers["retry-after"]) > 0
        assert world.live == incumbent
    world.engine.before = lambda: None
    assert world.promote(candidate)["verdict"] == "candidate_wins"


def test_an_incumbent_that_will_never_answer_here_stands_in_nobodys_way(world: World) -> None:
    other = truth_of(300, start=5000)
    incumbent = world.train(world.upload(list(other.items())), other.__getitem__)
    candidate = world.train(world.upload(list(TRUTH.items())), right_on(TRUTH, 0.9))
    world.promote(incumbent)
    world.engine.answers[incumbent] = (("other", "labels"), lambda text: "other")
    assert "manifest" in world.dry_run(candidate)["note"]
    world.engine.before = lambda: fail(BaseNotServed("The base does not fit. Raise TUNEPROOF_SERVE_MEMORY_BYTES."))
    found = world.promote(candidate)
    assert found["checked"] is False
    assert "TUNEPROOF_SERVE_MEMORY_BYTES" in found["note"]


def fail(error: AppError) -> None:
    raise error


# Two at once --------------------------------------------------------------------------------------
@pytest.fixture
def rivals(world: World) -> tuple[World, str, str, str]:
    """An incumbent whose answers must be asked for, one that is better than it, and one in between."""
    other, dataset_id = truth_of(300, start=5000), world.upload(list(TRUTH.items()))
    first = world.train(world.upload(list(other.items())), other.__getitem__, served=right_on(TRUTH, 0.3))
    middle, best = (world.train(dataset_id, right_on(TRUTH, share)) for share in (0.6, 0.95))
    world.promote(first)
    return world, first, middle, best


def test_a_verdict_holds_for_the_model_that_is_replaced(rivals: tuple[World, str, str, str]) -> None:
    """While it is compared with the first, the best takes its place: the one in between is then worse."""
    world, first, middle, best = rivals

    def overtaken() -> None:
        world.engine.before = lambda: None
        with world.ctx.db.write() as session:
            catalog.point_alias(session, "live", best, START)

    world.engine.before = overtaken
    assert best in problem_of(world.put(middle), 409, "promotion_refused")["detail"]
    history = world.client.get("/aliases/live/history").json()["data"]
    assert [move["model_id"] for move in history] == [best, first]


def test_of_two_promotions_at_once_the_second_is_checked_against_the_first(
    rivals: tuple[World, str, str, str],
) -> None:
    world, first, middle, best = rivals
    both_here = asyncio.Event()

    async def meet() -> None:
        if len(world.engine.calls) == 2:
            both_here.set()
        await asyncio.wait_for(both_here.wait(), 20)

    world.engine.before = meet
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        calls = {model_id: pool.submit(world.put, model_id) for model_id in (middle, best)}
    answers = {model_id: call.result() for model_id, call in calls.items()}
    assert answers[best].status_code == 200
    history = [move["model_id"] for move in world.client.get("/aliases/live/history").json()["data"]]
    if answers[middle].status_code == 200:
        assert history == [best, middle, first]
    else:
        problem_of(answers[middle], 409, "promotion_refused")
        assert history == [best, first]
    assert world.live == best


def test_an_alias_that_is_deleted_meanwhile_is_made_anew_and_one_that_never_rests_is_409(
    rivals: tuple[World, str, str, str],
) -> None:
    world, first, _middle, best = rivals
    alone = world.train(world.upload(list(truth_of(300, start=9000).items())), right_on(truth_of(300, start=9000), 0.9))
    world.engine.answers |= {made: (LABELS, lambda text: LABELS[0]) for made in (first, alone)}

    def deleted() -> None:
        world.engine.before = lambda: None
        with world.ctx.db.write() as session:
            catalog.remove_alias(session, "live")

    world.engine.before = deleted
    assert world.promote(best) is None

    world.promote(first, force=True)
    turns = itertools.cycle([alone, first])

    def moved() -> None:
        if world.engine.calls[-1][1][0] == world.engine.calls[0][1][0]:  # the first piece of each check
            with world.ctx.db.write() as session:
                catalog.point_alias(session, "live", next(turns), START)

    world.engine.calls.clear()
    world.engine.before = moved
    problem = problem_of(world.put(best), 409, "conflict")
    assert "moved by others" in problem["detail"]


def test_for_a_caller_who_left_nothing_more_is_asked_and_nothing_is_moved(
    rivals: tuple[World, str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, _first, _middle, best = rivals

    async def left(_request: Request) -> bool:
        return len(world.engine.calls) > 0

    monkeypatch.setattr(Request, "is_disconnected", left)
    assert "before the two were compared" in world.refused(best, "conflict")["detail"]
    assert len(world.engine.calls) == 1
    assert "it stays" in problem_of(world.put(best, alias="other"), 409, "conflict")["detail"]
    assert [alias["alias"] for alias in world.client.get("/aliases").json()["data"]] == ["live"]


@pytest.mark.parametrize("error", [IntegrityError("INSERT", None, Exception()), StaleDataError()])
def test_where_the_alias_is_made_or_deleted_in_the_moment_of_the_move_all_is_looked_at_anew(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    made = world.train(world.upload(list(TRUTH.items())), TRUTH.__getitem__)
    point, errors = catalog.point_alias, [error]

    def meanwhile(*given: Any) -> Any:
        if errors:
            raise errors.pop()
        return point(*given)

    monkeypatch.setattr(catalog, "point_alias", meanwhile)
    assert world.promote(made) is None


# Names --------------------------------------------------------------------------------------------
def test_a_deleted_alias_frees_its_model_and_leaves_its_history(world: World) -> None:
    dataset_id = world.upload(list(TRUTH.items()))
    first, second = (world.train(dataset_id, right_on(TRUTH, 0.8)) for _ in range(2))
    world.promote(first)
    world.promote(second)
    problem_of(world.client.delete(f"/models/{second}"), 409, "conflict")
    assert world.client.delete("/aliases/live").status_code == 204
    problem_of(world.client.delete("/aliases/live"), 404, "not_found")
    assert world.client.get("/aliases").json()["data"] == []
    assert world.client.delete(f"/models/{second}").status_code == 204
    moves = world.client.get("/aliases/live/history").json()
    assert [move["model_id"] for move in moves["data"]] == [second, first]
    assert moves["has_more"] is False
    assert world.promote(first) is None
    assert len(world.client.get("/aliases").json()["data"][0]["history"]) == 3


def test_what_is_not_there_is_404_and_what_is_no_name_422(world: World) -> None:
    world.promote(world.train(world.upload(list(TRUTH.items())), right_on(TRUTH, 0.8)))
    for path in ("/aliases/live/gate?model_id=mdl_0", "/aliases/none/gate?model_id=mdl_0", "/aliases/none/history"):
        problem_of(world.client.get(path), 404, "not_found")
    problem_of(world.put("mdl_0"), 404, "not_found")
    for path in ("/aliases/mdl_0/gate?model_id=mdl_0", "/aliases/live/gate", "/aliases/Live/history"):
        problem_of(world.client.get(path), 422, "invalid_input")
    problem_of(world.client.delete("/aliases/mdl_0"), 422, "invalid_input")
    problem_of(world.put("mdl_0", force="yes"), 422, "invalid_input")
