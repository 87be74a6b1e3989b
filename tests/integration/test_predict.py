"""`/predict` from the HTTP call to the real engine process and back, held against stock transformers and PEFT."""

import concurrent.futures
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from service.core.settings import Settings
from service.main import create_app
from service.ml.base_models import find_base, locate
from service.ml.manifest import Manifest
from tests.adapters import labels, save_random_adapter, stock_logits
from tests.databases import fresh_database
from tests.problems import problem_of
from tests.rows import GRACE, START, add_job, claim, model, publish_stored
from tests.storing import put_folder
from tests.tiny import BERT, DISTILBERT, labelled_texts
from tests.waiting import until

TEXTS = [*labelled_texts(8, seed=3)[0], "late parcel " * 40]
# Of 50 validation rows, all: 30 right; the surest 40: 36 right; the surest 10: 10 right.
POINTS = {"rows": 50, "points": [[0.0, 50, 30], [0.5, 40, 36], [0.875, 10, 10]]}
PATIENCE_SECONDS = 120  # two cores, shared with others: an engine takes a while to import torch


@dataclass
class Serving:
    """An API with its engine process, and what was published by hand."""

    client: TestClient
    folder: Path
    models_dir: Path
    ids: dict[str, str] = field(default_factory=dict)
    logits: dict[str, Any] = field(default_factory=dict)
    early: list[Any] = field(default_factory=list)

    @property
    def app(self) -> FastAPI:
        return self.client.app  # type: ignore[return-value]

    @property
    def engine_pid(self) -> int | None:
        return self.app.state.context.engine.pid if self.app.state.context.engine.running else None

    def ask(self, model_id: str, **body: Any) -> Any:
        return self.client.post(
            "/predict", json={"model": model_id} | ({} if "text" in body else {"texts": TEXTS}) | body
        )

    def answered(self, model_id: str) -> Any:
        """The first answer that is not `in a moment`."""

        def look() -> Any:
            answer = self.ask(model_id, text="hello")
            if answer.status_code == 503 and answer.json()["code"] in ("engine_unavailable", "base_loading"):
                self.early.append(answer)
                return None
            return answer

        return until(look, PATIENCE_SECONDS, "the engine answers")

    def publish(
        self, name: str, base: str, n_labels: int, seed: int, *, temperature: float = 1.0,
        calibration: dict[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """A random LoRA model with its bytes in the storage, as a worker would leave it."""
        ctx = self.app.state.context
        folder = self.folder / name
        tokenizer = AutoTokenizer.from_pretrained(self.models_dir / base)
        save_random_adapter(folder, self.models_dir / base, tokenizer, n_labels, seed=seed)
        replace(Manifest.read(folder), temperature=temperature, calibration=calibration).write(folder)
        self.logits[name] = stock_logits(self.models_dir / base, folder, TEXTS, n_labels) / temperature
        source = locate(find_base(base, self.models_dir))
        made = model(
            base_model=base, base_revision=source.revision, labels=list(labels(n_labels)),
            files=sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
            calibration=calibration,
        )  # fmt: skip
        put_folder(ctx.storage, folder, made.storage_prefix)
        add_job(ctx.db, name=name)
        publish_stored(ctx.db, claim(ctx.db).lease, [], [made], {}, START, GRACE)
        self.ids[name] = made.id
        return made.id


def started(folder: Path, models_dir: Path, **settings: Any) -> FastAPI:
    data_dir = folder / "data"
    data_dir.mkdir()
    fresh_database(data_dir).close()
    values = {"min_free_bytes": 0, "serve_threads": 1, "serve_device": "cpu", "serve_dtype": "fp32"} | settings
    return create_app(Settings(data_dir=data_dir, models_dir=models_dir, **values))


@pytest.fixture(scope="module")
def models_dir(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny bases, and one whose weights are no weights."""
    folder = tmp_path_factory.mktemp("bases")
    for name in (BERT, DISTILBERT):
        (folder / name).symlink_to(tiny_models / name)
    shutil.copytree(tiny_models / BERT, folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(b"not weights")
    return folder


@pytest.fixture(scope="module")
def serving(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("serving")
    with TestClient(started(folder, models_dir, preload="early"), client=("127.0.0.1", 1)) as client:
        serving = Serving(client, folder, models_dir)
        serving.publish("four", BERT, 4, seed=1)
        serving.publish("seven", BERT, 7, seed=2)
        serving.publish("other base", DISTILBERT, 3, seed=3)
        serving.publish("calibrated", BERT, 4, seed=4, temperature=3.0, calibration=POINTS)
        serving.early.append(serving.ask("mdl_unknown"))
        for model_id in serving.ids.values():
            assert serving.answered(model_id).status_code == 200
        yield serving


def softmax(logits: Any) -> Any:
    exps = np.exp(logits - logits.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def assert_right(serving: Serving, name: str, answer: Any, rows: slice = slice(None)) -> None:
    """The answer is stock PEFT's, for exactly this model."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["model_id"] == serving.ids[name]
    expected = softmax(serving.logits[name][rows])
    assert len(body["predictions"]) == len(expected)
    for prediction, row in zip(body["predictions"], expected, strict=True):
        names = labels(len(row))
        assert prediction["label"] == names[int(row.argmax())]
        assert prediction["confidence"] == pytest.approx(float(row.max()), abs=1e-4)
        for label, probability in prediction["probabilities"].items():
            assert probability == pytest.approx(float(row[names.index(label)]), abs=1e-4)


def test_metrics_tell_what_the_engine_did(serving: Serving) -> None:
    def figures() -> dict[str, float]:
        found = text_string_to_metric_families(serving.client.get("/metrics").text)
        return {s.name: s.value for family in found for s in family.samples if not s.labels}

    until(lambda: figures().get("tuneproof_bases") == 3, 10, "both bases and the embedded one are told")
    seen: tuple[dict[str, float], float] = ({}, 0.0)

    def settled() -> dict[str, float] | None:
        """The figures, once they stood for longer than it takes to tell them: nothing of other tests is on its way."""
        nonlocal seen
        now = figures()
        if now != seen[0]:
            seen = (now, time.monotonic())
        return now if time.monotonic() - seen[1] > 2 else None

    before = until(settled, 10, "earlier calls are told")
    tokens = [serving.ask(serving.ids[name]).json()["usage"]["tokens"] for name in ("four", "seven", "four")]

    def gained(name: str) -> float:
        return figures()[name] - before[name]

    until(lambda: gained("tuneproof_engine_batch_texts_sum") == 3 * len(TEXTS), 10, "the texts are told")
    assert gained("tuneproof_engine_tokens_total") == sum(tokens)
    assert 3 <= gained("tuneproof_engine_batch_texts_count") <= 3 * len(TEXTS)
    assert (gained("tuneproof_adapter_cache_hits_total"), gained("tuneproof_adapter_cache_misses_total")) == (3, 0)
    now = figures()
    assert now["tuneproof_adapter_cache_misses_total"] >= 4
    assert now["tuneproof_adapter_cache_bytes"] > 0
    weights = sum(locate(find_base(name, serving.models_dir)).size_bytes for name in (BERT, DISTILBERT, "minilm"))
    assert now["tuneproof_bases_bytes"] == pytest.approx(weights, rel=0.05)
    assert (now["tuneproof_engine_up"], now["tuneproof_engine_restarts_total"]) == (1, 0)
    assert (now["tuneproof_predict_waiting_calls"], now["tuneproof_predict_waiting_characters"]) == (0, 0)
    assert "tuneproof_gpu_memory_allocated_bytes" not in now


def test_while_the_engine_loads_a_known_model_is_503_and_an_unknown_one_404(serving: Serving) -> None:
    problem_of(serving.early[0], 404, "not_found")
    assert {answer.json()["code"] for answer in serving.early[1:]} <= {"engine_unavailable", "base_loading"}
    assert len(serving.early) > 1
    for answer in serving.early[1:]:
        problem_of(answer, 503, answer.json()["code"])


@pytest.mark.parametrize("name", ["four", "seven", "other base", "calibrated"])
def test_a_model_answers_as_stock_peft_does(serving: Serving, name: str) -> None:
    answer = serving.ask(serving.ids[name])
    assert_right(serving, name, answer)
    body = answer.json()
    assert body["usage"]["texts"] == len(TEXTS)
    assert body["usage"]["tokens"] > len(TEXTS)
    assert [prediction["truncated"] for prediction in body["predictions"]] == [False] * 8 + [True]
    assert not any(prediction["abstained"] for prediction in body["predictions"])


def test_calls_to_different_models_at_once_do_not_get_each_others_answers(serving: Serving) -> None:
    calls = [(name, i) for i in range(len(TEXTS)) for name in serving.ids] * 3
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(lambda call: serving.ask(serving.ids[call[0]], texts=TEXTS[call[1] : call[1] + 1]), calls)
        )
    for (name, i), answer in zip(calls, answers, strict=True):
        assert_right(serving, name, answer, slice(i, i + 1))


def test_an_alias_answers_with_the_model_it_points_to_now(serving: Serving) -> None:
    for name in ("four", "seven", "four"):
        assert serving.client.put("/aliases/live", json={"model_id": serving.ids[name]}).status_code == 200
        assert_right(serving, name, serving.ask("live"))


def test_an_alias_that_moves_never_mixes_two_versions_in_one_answer(serving: Serving) -> None:
    by_id = {model_id: name for name, model_id in serving.ids.items()}
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            for name in ("four", "seven"):
                serving.client.put("/aliases/moving", json={"model_id": serving.ids[name]})

    serving.client.put("/aliases/moving", json={"model_id": serving.ids["four"]})
    mover = threading.Thread(target=move)
    mover.start()
    try:
        answers = [serving.ask("moving") for _ in range(20)]
    finally:
        stop.set()
        mover.join()
    for answer in answers:
        assert_right(serving, by_id[answer.json()["model_id"]], answer)


@pytest.mark.parametrize(("top_k", "given"), [(None, 3), (1, 1), (3, 3), (4, 4), (5, 4), (1_000_000, 4)])
def test_top_k_is_clamped_to_the_number_of_labels(serving: Serving, top_k: int | None, given: int) -> None:
    answer = serving.ask(serving.ids["four"], **({} if top_k is None else {"top_k": top_k}))
    assert_right(serving, "four", answer)
    for prediction in answer.json()["predictions"]:
        probabilities = list(prediction["probabilities"].values())
        assert len(probabilities) == given
        assert probabilities == sorted(probabilities, reverse=True)
        assert next(iter(prediction["probabilities"])) == prediction["label"]


def test_under_min_confidence_a_prediction_abstains_and_still_shows_its_figures(serving: Serving) -> None:
    sure = serving.ask(serving.ids["four"]).json()["predictions"]
    middle = sorted(prediction["confidence"] for prediction in sure)[4]
    answer = serving.ask(serving.ids["four"], min_confidence=middle).json()["predictions"]
    for with_threshold, without in zip(answer, sure, strict=True):
        abstains = without["confidence"] < middle
        assert with_threshold["abstained"] is abstains
        assert with_threshold["label"] == (None if abstains else without["label"])
        assert with_threshold["probabilities"] == pytest.approx(without["probabilities"], abs=1e-6)
    assert {prediction["abstained"] for prediction in answer} == {True, False}
    assert all(p["abstained"] for p in serving.ask(serving.ids["seven"], min_confidence=1).json()["predictions"])


@pytest.mark.parametrize(
    ("target", "kept", "right", "least"),
    [(0.5, 50, 30, 0.0), (0.6, 50, 30, 0.0), (0.61, 40, 36, 0.5), (1, 10, 10, 0.875)],
)
def test_a_target_precision_picks_the_lowest_threshold_that_reached_it(
    serving: Serving, target: float, kept: int, right: int, least: float
) -> None:
    answer = serving.ask(serving.ids["calibrated"], target_precision=target).json()
    chosen = answer["threshold"]
    assert (chosen["min_confidence"], chosen["validation_precision"]) == (least, right / kept)
    assert (chosen["validation_coverage"], chosen["validation_rows"]) == (kept / 50, 50)
    few = "Only 10 of 50 validation rows were that sure, too few to rely on."
    assert chosen["note"] == (few if kept < 30 else None)
    low, high = chosen["validation_precision_ci95"]
    assert low < chosen["validation_precision"] <= high + 1e-9
    asked_so = serving.ask(serving.ids["calibrated"], min_confidence=least).json()
    assert asked_so["threshold"] is None
    assert [p["label"] for p in answer["predictions"]] == [p["label"] for p in asked_so["predictions"]]


def test_where_no_threshold_reached_the_target_every_prediction_abstains_and_the_answer_says_so(
    serving: Serving,
) -> None:
    never = {"rows": 12, "points": [[0.0, 12, 6], [0.7, 4, 3]]}
    model_id = serving.publish("unsure", BERT, 4, seed=5, calibration=never)
    answer = serving.ask(model_id, target_precision=0.9).json()
    assert answer["threshold"]["min_confidence"] is None
    assert answer["threshold"]["validation_coverage"] == 0
    assert "0.9 on the 12 validation rows; the best was 0.750, on the 4 rows" in answer["threshold"]["note"]
    assert all(p["abstained"] and p["label"] is None for p in answer["predictions"])
    assert all(p["confidence"] > 0.25 for p in answer["predictions"])


def test_a_model_published_without_thresholds_says_what_to_do(serving: Serving) -> None:
    body = problem_of(serving.ask(serving.ids["four"], target_precision=0.9), 409, "conflict")
    assert "Train it again, or give min_confidence" in body["detail"]


def test_one_text_may_be_given_without_a_list(serving: Serving) -> None:
    assert_right(serving, "four", serving.ask(serving.ids["four"], text=TEXTS[0]), slice(0, 1))


def test_any_text_is_answered(serving: Serving) -> None:
    odd = ["\x00", "\u200b", " ", "\n", "<|im_end|>", "[SEP] [CLS]", "🙂" * 50, "a" * 100_000, "עברית", "\ufffe"]
    answer = serving.ask(serving.ids["four"], texts=odd)
    assert len(answer.json()["predictions"]) == len(odd)
    assert sum(answer.json()["predictions"][0]["probabilities"].values()) <= 1 + 1e-6


BAD: dict[str, dict[str, Any]] = {
    "no text": {"texts": []},
    "1,025 texts": {"texts": ["x"] * 1025},
    "an empty text": {"texts": ["x", ""]},
    "an empty lone text": {"text": ""},
    "100,001 characters": {"texts": ["x" * 100_001]},
    "both ways": {"text": "x", "texts": ["x"]},
    "neither": {"texts": None},
    "a number": {"texts": [1]},
    "a null": {"texts": [None]},
    "a string": {"texts": "x"},
    "top_k 0": {"top_k": 0},
    "top_k 1.5": {"top_k": 1.5},
    "top_k 2^63": {"top_k": 2**63},
    "min_confidence 1.1": {"min_confidence": 1.1},
    "min_confidence -1": {"min_confidence": -1},
    "target_precision 0.49": {"target_precision": 0.49},
    "target_precision 1.01": {"target_precision": 1.01},
    "two thresholds": {"target_precision": 0.9, "min_confidence": 0.0},
    "an unknown field": {"topk": 3},
}


@pytest.mark.parametrize("what", BAD)
def test_a_call_out_of_bounds_is_422(serving: Serving, what: str) -> None:
    problem_of(serving.ask(serving.ids["four"], **BAD[what]), 422, "invalid_input")


def test_the_most_texts_a_call_may_have_are_answered(serving: Serving) -> None:
    assert len(serving.ask(serving.ids["four"], texts=["x"] * 1024, top_k=1).json()["predictions"]) == 1024


@pytest.mark.parametrize(("missing", "said"), [("model", "Field required"), ("texts", "give either `texts`")])
def test_what_is_missing_is_said_to_be_missing(serving: Serving, missing: str, said: str) -> None:
    body = {name: value for name, value in {"model": "live", "texts": ["x"]}.items() if name != missing}
    answer = serving.client.post("/predict", json=body)
    problem_of(answer, 422, "invalid_input")
    assert said in answer.json()["detail"]


RAW = {
    "NaN": '{"model": "live", "text": "x", "min_confidence": NaN}',
    "Infinity": '{"model": "live", "text": "x", "top_k": Infinity}',
    "a lone surrogate": '{"model": "live", "text": "\\ud800"}',
    "deep": "[" * 100_000,
    "cut short": '{"model": "live"',
    "empty": "",
}


@pytest.mark.parametrize("what", RAW)
def test_a_broken_body_is_422(serving: Serving, what: str) -> None:
    answer = serving.client.post("/predict", content=RAW[what], headers={"content-type": "application/json"})
    problem_of(answer, 422, "invalid_input")


@pytest.mark.parametrize("name", ["mdl_0", "nobody", "LIVE", "../x", " ", "\u0000"])
def test_an_unknown_model_is_404(serving: Serving, name: str) -> None:
    problem_of(serving.ask(name), 404, "not_found")


@pytest.mark.parametrize(
    "damage", ["cut short", "another file's bytes", "gone", "no manifest", "changed manifest", "one bit"]
)
def test_a_damaged_model_is_an_error_and_never_a_wrong_answer(serving: Serving, damage: str) -> None:
    model_id = serving.publish(f"damaged {damage}", BERT, 4, seed=9)
    lies = Path(serving.app.state.context.storage._root) / "models" / model_id
    weights, manifest = lies / "adapter_model.safetensors", lies / "manifest.json"
    whole = weights.read_bytes()
    if damage == "cut short":
        weights.write_bytes(whole[:-10])
    elif damage == "another file's bytes":
        weights.write_bytes((serving.folder / "four" / "adapter_model.safetensors").read_bytes())
    elif damage == "gone":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "changed manifest":
        manifest.write_text(manifest.read_text().replace("label_01", "label_00"))
    else:
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    answer = serving.ask(model_id)
    problem_of(answer, 500, "model_damaged")
    assert answer.status_code >= 400
    assert_right(serving, "four", serving.ask(serving.ids["four"]))


def test_a_base_of_another_revision_or_with_broken_weights_is_not_served_and_says_so(serving: Serving) -> None:
    ctx = serving.app.state.context
    for base in (BERT, "broken"):
        made = model(base_model=base, base_revision="sha256:another" if base == BERT else locate(
            find_base(base, serving.models_dir)).revision)  # fmt: skip
        add_job(ctx.db, name=base)
        publish_stored(ctx.db, claim(ctx.db).lease, [], [made], {}, START, GRACE)
        body = problem_of(serving.answered(made.id), 503, "base_not_served")
        assert base in body["detail"]
    assert_right(serving, "four", serving.ask(serving.ids["four"]))


def stands_still(pid: int) -> bool:
    return all(thread.status() == psutil.STATUS_STOPPED for thread in threads_of(pid))


def threads_of(pid: int) -> list[psutil.Process]:
    return [psutil.Process(thread.id) for thread in psutil.Process(pid).threads()]


def test_an_engine_that_is_killed_fails_open_calls_with_503_and_comes_back(serving: Serving) -> None:
    pid = until(lambda: serving.engine_pid, 10, "the engine runs")
    os.kill(pid, signal.SIGSTOP)  # so that a call is open, surely, when it dies
    until(lambda: stands_still(pid), 10, "every thread of the engine's process stands still")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(serving.ask, serving.ids["four"]) for _ in range(4)]
        until(lambda: len(serving.app.state.context.engine._open) == 4, 20, "four calls are open")
        os.kill(pid, signal.SIGKILL)
        for call in calls:
            problem_of(call.result(20), 503, "engine_unavailable")
    assert serving.client.get("/jobs").status_code == 200
    serving.early.clear()
    assert serving.answered(serving.ids["four"]).status_code == 200
    assert serving.engine_pid not in (None, pid)
    for answer in serving.early:
        problem_of(answer, 503, answer.json()["code"])
    assert_right(serving, "seven", serving.ask(serving.ids["seven"]))


def test_who_stops_a_whole_group_of_processes_does_not_take_the_engine_from_open_calls(serving: Serving) -> None:
    """As systemd does: the API is told too, answers what is open, and then ends the engine itself."""
    assert serving.answered(serving.ids["seven"]).status_code == 200
    pid = until(lambda: serving.engine_pid, 10, "the engine runs")
    os.kill(pid, signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(serving.ask, serving.ids["seven"])
        until(lambda: serving.app.state.context.engine._open, 20, "a call is open")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
            os.kill(pid, number)
        assert_right(serving, "seven", call.result(20))
    assert serving.engine_pid == pid


def test_after_a_restart_the_models_to_preload_are_loaded_before_anybody_asks(serving: Serving) -> None:
    engine = serving.app.state.context.engine
    assert "cannot preload 'early'" in serving.client.get("/readyz").json()["checks"]["engine"]
    assert serving.client.put("/aliases/early", json={"model_id": serving.ids["seven"]}).status_code == 200
    pid = until(lambda: serving.engine_pid, 10, "the engine runs")
    os.kill(pid, signal.SIGKILL)
    until(lambda: serving.engine_pid not in (None, pid), 20, "another engine runs")
    until(lambda: engine.warm, PATIENCE_SECONDS, "the engine is warm")
    assert engine.figures.adapter_bytes
    assert (engine.figures.adapter_misses, engine.figures.texts) == (1, 0)
    assert_right(serving, "seven", serving.ask("early"))


# An engine with little of everything --------------------------------------------------------------
@pytest.fixture(scope="module")
def scarce(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("scarce")
    app = started(folder, models_dir, serve_memory_bytes=1000, predict_timeout_seconds=2.0, predict_max_chars=400_000,
                  predict_queue_tokens=8000)  # fmt: skip
    with TestClient(app, client=("127.0.0.1", 1)) as client:
        serving = Serving(client, folder, models_dir)
        serving.publish("four", BERT, 4, seed=1)
        yield serving


def test_a_base_that_does_not_fit_is_503_with_a_code_of_its_own(scarce: Serving) -> None:
    def look() -> Any:
        answer = scarce.ask(scarce.ids["four"])
        return answer if answer.json()["code"] == "base_not_served" else None

    body = problem_of(until(look, PATIENCE_SECONDS, "the engine refuses the base"), 503, "base_not_served")
    assert "TUNEPROOF_SERVE_MEMORY_BYTES" in body["detail"]


@pytest.mark.parametrize("size", [10, 400_000], ids=["a small call", "one that fills the pipe"])
def test_a_call_that_takes_too_long_is_504_and_too_much_waiting_is_429(scarce: Serving, size: int) -> None:
    assert scarce.answered(scarce.ids["four"]).status_code == 503
    pid = scarce.engine_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: stands_still(pid), 10, "every thread of the engine's process stands still")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            slow = pool.submit(scarce.ask, scarce.ids["four"], texts=["x" * size])
            until(lambda: scarce.app.state.context.engine._open or slow.done(), 10, "a call is open")
            assert not slow.done(), slow.result().text
            if size > 100_000:
                problem_of(scarce.ask(scarce.ids["four"], texts=["x" * 200_000]), 429, "queue_full")
            problem_of(slow.result(30), 504, "deadline_passed")
    finally:
        os.kill(pid, signal.SIGCONT)
    # Nothing of it is left to pay for.
    assert scarce.app.state.context.engine.waiting_chars == 0
    assert scarce.answered(scarce.ids["four"]).json()["code"] == "base_not_served"
