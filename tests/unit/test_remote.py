"""Remote models, against a real server on 127.0.0.1 that misbehaves on request."""

import io
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from service.core.endpoints import Endpoint
from service.core.errors import BudgetSpent, EndpointUnavailable
from service.ml.base_models import find_base, locate
from service.ml.encode import load_tokenizer
from service.ml.labels import LabelSet
from tests.chat_server import KEY, ChatServer, Reply, chat_server, completion
from tests.tiny import BERT, KEYWORDS, QWEN3, labelled_texts
from worker.methods.prompts import PromptTemplate
from worker.methods.remote import RemoteModel
from worker.methods.zero_shot import Prompted
from worker.metrics import score
from worker.predictions import NO_ANSWER
from worker.progress import Reporter
from worker.run import Experiment

LABELS = LabelSet.of(KEYWORDS)
TEXTS, NAMES = labelled_texts(12)
SECRET_TEXT = "my iban is DE00 1234"


@pytest.fixture
def server():
    with chat_server() as running:
        yield running


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client would have waited before it tried again; here it does not."""
    waited: list[float] = []

    async def note(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("openai._base_client.anyio.sleep", note)
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "of-another-account")
    monkeypatch.setenv("CHAT_KEY", KEY)
    return waited


def remote(server: ChatServer, tokenizer: Any = None, **given: Any) -> RemoteModel:
    values = {"base_url": server.url, "model": "m", "api_key_env": "CHAT_KEY", "max_retries": 1} | given
    return RemoteModel(Endpoint.model_validate(values), "here", 7, tokenizer)


def ask(model: RemoteModel, n: int = 12, on_progress: Any = lambda *_: None) -> list[str]:
    return model.answer([("system", f"text {i}") for i in range(n)], LABELS.names, on_progress)[0]


# What is sent ---------------------------------------------------------------------------------------------
def test_every_text_is_asked_once_and_the_answers_stand_in_order(server: ChatServer) -> None:
    server.script = lambda _n, body: Reply(completion(f"answer to {body['messages'][1]['content']}"))
    seen: list[float] = []
    assert ask(remote(server), on_progress=lambda share, _: seen.append(share)) == [
        f"answer to text {i}" for i in range(12)
    ]
    assert sorted(server.texts()) == sorted(f"text {i}" for i in range(12))
    assert seen == [i / 12 for i in range(1, 13)]
    for body in server.requests:
        assert {key: body[key] for key in ("model", "temperature", "seed")} == {
            "model": "m",
            "temperature": 0,
            "seed": 7,
        }
        assert body["max_tokens"] == 256
        assert body["messages"][0] == {"role": "system", "content": "system"}


@pytest.mark.parametrize(("key_env", "sent"), [("CHAT_KEY", f"Bearer {KEY}"), (None, None)])
def test_the_endpoints_key_is_sent_and_no_other_account_of_the_environment(
    key_env: str | None, sent: str | None, server: ChatServer
) -> None:
    remote(server, api_key_env=key_env).check()
    assert server.headers[0].get("authorization") == sent
    assert "of-another-account" not in json.dumps(server.headers)


def test_calls_at_a_time_reach_the_bound_and_never_pass_it(server: ChatServer) -> None:
    meet = threading.Barrier(3)

    def script(_n: int, _body: Any) -> Reply:
        meet.wait(5)
        server.stopping.wait(0.03)  # room for one too many to come
        return Reply()

    server.script = script
    ask(remote(server, max_concurrency=3))
    assert server.most_at_once == 3


def test_a_text_is_cut_where_the_base_model_stops_reading(tiny_models: Path) -> None:
    text = "Where is  my PARCEL? päckchen " * 9
    for name in (BERT, QWEN3):
        tokenizer = load_tokenizer(locate(find_base(name, tiny_models)).folder, decoder=name == QWEN3)
        stock = AutoTokenizer.from_pretrained(tiny_models / name)
        model = remote(ChatServer("http://127.0.0.1:9"), tokenizer)
        assert model.cut("short", 20) == "short"
        for most in (1, 5, 20):
            cut = model.cut(text, most)
            assert text.startswith(cut)
            assert len(stock(cut, add_special_tokens=False)["input_ids"]) == most


# Servers that stumble -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "stumble",
    [Reply("{}", 429), Reply("{}", 500), Reply("<html>", 503), Reply("{}", 408), Reply(breaks=True)],
    ids=["429", "500", "503", "408", "broken connection"],
)
def test_a_server_that_stumbles_once_a_text_is_asked_again(
    stumble: Reply, server: ChatServer, waits: list[float]
) -> None:
    seen: set[str] = set()

    def script(_n: int, body: dict[str, Any]) -> Reply:
        text = body["messages"][1]["content"]
        with server.lock:
            again = text in seen
            seen.add(text)
        return Reply() if again else stumble

    server.script = script
    assert ask(remote(server)) == ["billing"] * 12
    assert len(server.requests) == 24
    assert len(waits) == 12
    assert all(0 < seconds < 1 for seconds in waits)


def test_retry_after_is_waited_for(server: ChatServer, waits: list[float]) -> None:
    server.script = lambda n, _: Reply("{}", 429, {"Retry-After": "7"}) if n < 2 else Reply()
    ask(remote(server, max_retries=2), 1)
    assert waits == [7.0, 7.0]
    server.script = lambda n, _: Reply("{}", 429, {"Retry-After": "0"}) if n == 3 else Reply()
    ask(remote(server), 1)
    assert waits[2] < 1


def choices(message: str, **usage: int) -> str:
    return f'{{"choices": [{{"message": {message}}}], "usage": {json.dumps(usage or None)}}}'


NONSENSE = [
    "", "{", "[]", '"hello"', "null", "<html>a login page</html>", '{"choices": []}', '{"choices": [{}]}',
    '{"choices": null}', choices('{"content": 3}'), choices('{"content": "a"}', prompt_tokens=-1, completion_tokens=1),
]  # fmt: skip


@pytest.mark.parametrize("body", NONSENSE)
def test_an_answer_that_is_no_completion_is_told(body: str, server: ChatServer) -> None:
    server.script = lambda _n, _: Reply(body)
    with pytest.raises(EndpointUnavailable, match="no chat completion"):
        ask(remote(server))
    with pytest.raises(EndpointUnavailable, match="no chat completion"):
        remote(server).check()


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply('{"error": {"message": "Incorrect key: sk-very-secret"}}', 401), "status 401"),
        (Reply("{}", 403), "status 403"),
        (Reply("{}", 404), "status 404"),
        (Reply("{}", 429), "status 429"),
        (Reply("{}", 500), "status 500"),
        (Reply("", 307, {"Location": "http://127.0.0.1:9/v1/chat/completions"}), "status 307"),
        (Reply(hangs=True), "in time"),
        (Reply(drips=True), "in time"),
        (Reply(breaks=True), "cannot be reached, or hung up"),
    ],
)
def test_what_fails_to_the_last_is_one_typed_error_without_key_or_text(
    reply: Reply, words: str, server: ChatServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    server.script = lambda _n, _: reply
    model = remote(server, max_retries=0, timeout_seconds=0.1 if reply.hangs or reply.drips else 10)
    for call in (model.check, lambda: model.answer([("s", SECRET_TEXT)], LABELS.names)):
        with pytest.raises(EndpointUnavailable, match=words) as failed:
            call()
        assert failed.value.hint
        assert "'here' (127.0.0.1:" in failed.value.detail
        told = failed.value.detail + failed.value.hint + caplog.text
        assert KEY not in told
        assert SECRET_TEXT not in told


def test_an_endpoint_that_is_down_is_told() -> None:
    with chat_server() as gone:
        model = remote(gone)
    with pytest.raises(EndpointUnavailable, match="cannot be reached"):
        model.check()


def test_a_key_that_is_not_in_the_environment_is_told_before_any_call(server: ChatServer) -> None:
    with pytest.raises(EndpointUnavailable, match="NO_SUCH_KEY"):
        remote(server, api_key_env="NO_SUCH_KEY")
    assert not server.requests


def test_the_probe_sends_no_text_and_asks_for_one_token(server: ChatServer) -> None:
    remote(server).check()
    assert [body["max_tokens"] for body in server.requests] == [1]
    server.script = lambda _n, _: Reply("{}", 400)
    with pytest.raises(EndpointUnavailable, match="status 400"):
        remote(server).check()


def test_a_failure_ends_the_run_and_leaves_the_rest_unsent(server: ChatServer) -> None:
    server.script = lambda n, _: Reply("{}", 401) if n == 4 else Reply()
    model = remote(server, max_concurrency=1)
    with pytest.raises(EndpointUnavailable):
        ask(model)
    assert len(server.requests) == 5
    assert model.account().startswith("5 texts were sent to model 'm' at 127.0.0.1:")


# Texts a model will not answer ----------------------------------------------------------------------------
def prompted(model: RemoteModel, tiny_models: Path) -> Any:
    model.tokenizer = load_tokenizer(locate(find_base(BERT, tiny_models)).folder, decoder=False)
    return Prompted(model, PromptTemplate(), LABELS).predict(TEXTS)


def test_wrong_empty_refused_and_cut_answers_count_as_wrong_and_are_told(server: ChatServer, tiny_models: Path) -> None:
    odd = [
        completion("weather"),
        completion(None),
        completion("billing or login"),
        completion("", finish_reason="length"),
    ]
    server.script = lambda n, _: Reply("{}", 400) if n == 4 else Reply(odd[n] if n < 4 else completion())
    model = remote(server, max_concurrency=1)
    got = prompted(model, tiny_models)
    assert got.outcomes[:5] == ("invalid", "empty", "ambiguous", "empty", "empty")
    assert got.label_ids[:5].tolist() == [NO_ANSWER] * 5
    assert set(got.label_ids[5:]) == {LABELS.id_of("billing")}
    assert "refused 1 of them" in model.account()
    assert "1 answers were cut at 256 tokens" in model.account()


def test_an_endpoint_that_refuses_every_text_is_no_method_that_is_always_wrong(server: ChatServer) -> None:
    server.script = lambda _n, _: Reply("{}", 400)
    with pytest.raises(EndpointUnavailable, match="refused every one of 12"):
        ask(remote(server))


# What it costs --------------------------------------------------------------------------------------------
PRICES = {"input_price_per_million": 3.0, "output_price_per_million": 15.0}


def test_tokens_cost_and_latency_are_among_the_figures(server: ChatServer, tiny_models: Path) -> None:
    model = remote(server, **PRICES)
    figures = score(prompted(model, tiny_models), LABELS.ids(NAMES), LABELS.names)
    assert figures["prompt_tokens"] == 120
    assert figures["completion_tokens"] == 24
    assert figures["cost"] == pytest.approx((120 * 3 + 24 * 15) / 1e6)
    assert 0 < figures["latency_p50_seconds"] <= figures["latency_p95_seconds"]
    assert figures["seconds_per_row"] > 0
    assert model.account().endswith("120 + 24 tokens, cost 0.00072.")


def test_where_one_answer_is_uncounted_no_sum_is_made_up(server: ChatServer, tiny_models: Path) -> None:
    server.script = lambda n, _: Reply(completion(usage=None if n == 3 else (10, 2)))
    model = remote(server, **PRICES)
    figures = score(prompted(model, tiny_models), LABELS.ids(NAMES), LABELS.names)
    assert [figures[name] for name in ("prompt_tokens", "completion_tokens", "cost")] == [None] * 3
    assert "no token counts" in model.account()


@pytest.mark.parametrize("budget", [{"budget_tokens": 60}, {"budget_cost": 5 * (10 * 3 + 2 * 15) / 1e6}])
@pytest.mark.parametrize("at_once", [1, 4])
def test_a_spent_budget_ends_the_run(budget: dict[str, float], at_once: int, server: ChatServer) -> None:
    model = remote(server, max_concurrency=at_once, **PRICES, **budget)
    with pytest.raises(BudgetSpent, match="of 12 texts") as spent:
        ask(model)
    assert "budget_tokens" in str(spent.value.hint)
    assert 5 <= len(server.requests) < 5 + at_once
    with pytest.raises(BudgetSpent, match="after 0 of 12"):
        ask(model)
    assert len(server.requests) < 5 + at_once


def test_a_budget_needs_a_server_that_counts(server: ChatServer) -> None:
    server.script = lambda _n, _: Reply(completion(usage=None))
    with pytest.raises(EndpointUnavailable, match="budget cannot be kept"):
        remote(server, budget_tokens=100).check()


# In an experiment -----------------------------------------------------------------------------------------
class Stopped(BaseException):
    """As the child's own: no `except Exception` holds it up."""


# By itself: pytest-xdist has threads of its own, and a signal may be heard by the wrong one first.
@pytest.mark.more
def test_a_signal_ends_it_at_once(server: ChatServer) -> None:
    def script(n: int, _body: Any) -> Reply:
        if n == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return Reply(hangs=True)

    def stop(*_: Any) -> None:
        raise Stopped

    server.script = script
    before = signal.signal(signal.SIGUSR1, stop)
    start = time.monotonic()
    try:
        with pytest.raises(Stopped):
            ask(remote(server))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert time.monotonic() - start < 10


def run(folder: Path, tiny_models: Path, endpoint: dict[str, Any] | None, **baseline: Any) -> list[dict[str, Any]]:
    """An experiment's messages."""
    texts, names = labelled_texts(200)
    (folder / "dataset").write_text("text,label\n" + "".join(map("{},{}\n".format, texts, names)))
    spec = {"kind": "baseline", "base_model": BERT, "train": {"max_length": 64}}
    spec["baseline"] = {"prompt_model": "remote:here"} | baseline
    job = {"spec": spec, "models_dir": str(tiny_models), "endpoint": endpoint}
    (folder / "job.json").write_text(json.dumps(job))
    said = io.StringIO()
    Experiment(folder, Reporter(said)).run()
    return [json.loads(line) for line in said.getvalue().splitlines()]


def told(messages: list[dict[str, Any]]) -> list[str]:
    return [f"{message['level']}: {message['message']}" for message in messages if message["type"] == "event"]


def at(server: ChatServer, **given: Any) -> dict[str, Any]:
    return {"base_url": server.url, "model": "m", "api_key_env": "CHAT_KEY", "max_retries": 0} | given


def keyword_label(_n: int, body: dict[str, Any]) -> Reply:
    """Answers by the text alone, the last line of the prompt."""
    words = body["messages"][1]["content"].rpartition("Text: ")[2].split()
    return Reply(completion(next((label for label, keys in KEYWORDS.items() if set(keys) & set(words)), "other")))


def test_an_experiment_judges_a_remote_model_on_the_subset(
    server: ChatServer, tmp_path: Path, tiny_models: Path
) -> None:
    server.script = keyword_label
    messages = run(tmp_path, tiny_models, at(server), methods=["majority", "zero_shot"], few_shot=4, sample_size=15)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for method in ("zero_shot_prompt", "few_shot_prompt"):
        figures = metrics["methods"][method]["baseline_subset"]
        assert figures["n"] == 15
        assert figures["accuracy"] == 1
        assert figures["prompt_tokens"] == 150
        assert f"info: {method}: 15 texts were sent to model 'm' at 127.0.0.1:{server.url.split(':')[2][:-3]}: " in str(
            told(messages)
        )
    assert len(server.requests) == 1 + 15 + 15
    assert "15 texts were sent to model" in (tmp_path / "out" / "report.html").read_text()
    shown = json.loads((tmp_path / "out" / "prompt.json").read_text())
    assert (shown["prompt_model"], shown["model"]) == ("remote:here", "m")
    everything = "".join(file.read_text() for file in (tmp_path / "out").iterdir()) + json.dumps(messages)
    assert KEY not in everything
    assert "/v1" not in everything


def test_a_method_whose_endpoint_fails_on_the_way_is_left_out_and_the_others_are_judged(
    server: ChatServer, tmp_path: Path, tiny_models: Path
) -> None:
    server.script = lambda n, _: Reply("{}", 500) if n == 6 else Reply()
    messages = run(
        tmp_path, tiny_models, at(server, max_concurrency=1), methods=["zero_shot", "majority"], sample_size=15
    )
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics["methods"]) == {"majority"}
    (warning,) = [line for line in told(messages) if line.startswith("warning")]
    assert "zero_shot_prompt: left out" in warning
    assert "Prompting was not tested, because the endpoint failed" in (tmp_path / "out" / "report.html").read_text()
    assert "status 500" in warning
    assert "6 texts were sent" in str(told(messages))


def test_with_nothing_else_to_judge_the_job_fails_as_the_endpoint_did(
    server: ChatServer, tmp_path: Path, tiny_models: Path
) -> None:
    with pytest.raises(BudgetSpent):
        run(tmp_path, tiny_models, at(server, budget_tokens=50), methods=["zero_shot"], sample_size=15)


def test_an_endpoint_that_is_misconfigured_fails_the_job_before_any_text_is_sent(
    server: ChatServer, tmp_path: Path, tiny_models: Path
) -> None:
    server.script = lambda _n, _: Reply("{}", 401)
    with pytest.raises(EndpointUnavailable, match="status 401"):
        run(tmp_path, tiny_models, at(server), methods=["majority", "zero_shot"])
    assert len(server.requests) == 1
    with pytest.raises(EndpointUnavailable, match="knows no endpoint 'here'"):
        run(tmp_path, tiny_models, None, methods=["majority", "zero_shot"])


@pytest.mark.parametrize("baseline", [{"methods": ["majority"]}, {"prompt_model": "auto", "methods": ["zero_shot"]}])
def test_an_endpoint_is_asked_nothing_where_no_prompt_is_wanted_of_it(
    baseline: dict[str, Any], server: ChatServer, tmp_path: Path, tiny_models: Path
) -> None:
    run(tmp_path, tiny_models, at(server), **baseline)
    assert not server.requests
