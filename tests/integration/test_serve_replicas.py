"""`/predict` through replicas on Ray Serve, on a cluster of several raylets, held against the local engine."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from transformers import AutoTokenizer

from service.core.errors import AppError, BaseLoading, EngineUnavailable, InvalidData
from service.core.settings import Settings
from service.inference import wire
from service.main import create_app
from service.ml.base_models import EMBEDDED, find_base, locate
from tests.adapters import labels, save_random_adapter
from tests.databases import fresh_database
from tests.integration.conftest import listening
from tests.problems import problem_of
from tests.ray_cluster import add_node, ray_cluster
from tests.rows import GRACE, START, add_job, claim, model, publish_stored
from tests.storing import put_folder
from tests.tiny import labelled_texts
from tests.waiting import until
from tuneproof.demo import free_port

pytestmark = [pytest.mark.scale, pytest.mark.timeout(600)]
pytest.importorskip("ray", reason="needs tuneproof[ray]")

TEXTS = [*labelled_texts(8, seed=3)[0], "late parcel " * 40]
SIZES = {"two": 2, "five": 5, "nine": 9}
PATIENCE_SECONDS = 180
ALIVE = {200: {None}, 503: {"engine_unavailable", "base_loading"}, 504: {"deadline_passed"}}
NODE = {
    "TUNEPROOF_ENGINE": "ray", "TUNEPROOF_SERVE_DEVICE": "cpu", "TUNEPROOF_SERVE_DTYPE": "fp32",
    "TUNEPROOF_PREDICT_QUEUE_TOKENS": "4096",
}  # fmt: skip
SERVE = """
proxy_location: Disabled
applications:
- name: tuneproof
  import_path: service.inference.replicas:app
  args: {replicas: 2, cpus: 1, gpus: 0}
"""


@dataclass
class House:
    """A cluster with replicas, an API that asks them, one with an engine of its own, and what both can serve."""

    cluster: Any
    settings: dict[str, Any]
    ids: dict[str, str] = field(default_factory=dict)
    api: TestClient = field(init=False)
    local: TestClient = field(init=False)

    @property
    def engine(self) -> Any:
        return self.api.app.state.context.engine  # type: ignore[attr-defined]

    @property
    def replicas(self) -> int:
        return self.engine.figures.replicas if self.engine.figures else 0

    def ask(self, name: str, *, by: TestClient | None = None, **body: Any) -> httpx.Response:
        return (by or self.api).post("/predict", json={"model": self.ids.get(name, name), "texts": TEXTS} | body)

    def publish(self, name: str, n_labels: int, *, base: str = EMBEDDED, damaged: bool = False) -> None:
        ctx = self.api.app.state.context  # type: ignore[attr-defined]
        source, folder = locate(find_base(EMBEDDED, None)), ctx.settings.data_dir.parent / name
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        save_random_adapter(folder, source.folder, tokenizer, n_labels, seed=n_labels)
        made = model(
            base_model=base, base_revision=source.revision, labels=list(labels(n_labels)),
            files=sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
        )  # fmt: skip
        if damaged:
            (folder / "adapter_model.safetensors").write_bytes(b"no weights")
        put_folder(ctx.storage, folder, made.storage_prefix)
        add_job(ctx.db, name=name)
        publish_stored(ctx.db, claim(ctx.db).lease, [], [made], {}, START, GRACE)
        self.ids[name] = made.id


def application(data_dir: Path, **settings: Any) -> FastAPI:
    """An API; of what the environment has for the nodes it takes nothing that a test is about."""
    given = {
        "min_free_bytes": 0, "serve_threads": 1, "serve_device": "cpu", "serve_dtype": "fp32", "engine": "local",
        "storage_url": f"file://{data_dir / 'storage'}", "predict_queue_tokens": 1 << 18,
    } | settings  # fmt: skip
    return create_app(Settings(data_dir=data_dir, **given))


def run(address: str, folder: Path, *words: str | Path) -> str:
    """What a program prints that goes to this cluster alone, as whoever operates it starts one."""
    done = subprocess.run(
        words, env=os.environ | NODE | {"RAY_ADDRESS": address}, cwd=folder, text=True, timeout=PATIENCE_SECONDS,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def serve(address: str, folder: Path) -> None:
    (folder / "serve.yaml").write_text(SERVE)
    run(address, folder, Path(sys.executable).with_name("serve"), "run", "--non-blocking", "serve.yaml")


def shut_down(address: str, folder: Path) -> None:
    """Not by `serve shutdown`: that asks whichever dashboard is on port 8265, which may be another cluster's."""
    program = f"import ray; from ray import serve; ray.init({address!r}, log_to_driver=False); serve.shutdown()"
    run(address, folder, sys.executable, "-c", program)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    data_dir = folder / "data"
    data_dir.mkdir()
    fresh_database(data_dir).close()
    env = {
        "TUNEPROOF_DATA_DIR": str(folder / "node"), "TUNEPROOF_STORAGE_URL": f"file://{data_dir / 'storage'}",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    } | NODE  # fmt: skip
    with contextlib.ExitStack() as stack:
        address, cluster = stack.enter_context(ray_cluster(nodes=2, cpus=1, env=env))
        serve(address, folder)
        house = House(cluster, {"engine": "ray", "ray_address": address})
        host = ("127.0.0.1", 1)
        house.api = stack.enter_context(TestClient(application(data_dir, **house.settings), client=host))
        house.local = stack.enter_context(TestClient(application(data_dir), client=host))
        for name, n_labels in SIZES.items():
            house.publish(name, n_labels)
        house.publish("damaged", 3, damaged=True)
        house.publish("homeless", 4, base="nobody-has-it")
        for api in (house.api, house.local):
            until(lambda api=api: api.get("/readyz").status_code == 200, PATIENCE_SECONDS, "the API is ready")
        until(lambda: house.replicas == 2, PATIENCE_SECONDS, "both replicas run")
        yield house


def test_replicas_answer_as_the_local_engine_does(house: House) -> None:
    for name in SIZES:
        remote = until(lambda name=name: answered(house, name), PATIENCE_SECONDS, "a replica answers").json()
        local = until(lambda name=name: answered(house, name, house.local), PATIENCE_SECONDS, "it answers").json()
        assert remote["usage"] == local["usage"]
        for ours, theirs in zip(remote["predictions"], local["predictions"], strict=True):
            assert ours["label"] == theirs["label"]
            assert ours["truncated"] == theirs["truncated"]
            assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-4)


def answered(house: House, name: str, by: TestClient | None = None) -> httpx.Response | None:
    answer = house.ask(name, by=by)
    assert answer.status_code == 200 or answer.json()["code"] == "base_loading", answer.text
    return answer if answer.status_code == 200 else None


def test_a_models_calls_go_to_the_replica_that_has_it(house: House) -> None:
    """Asked as an API's process asks, in a process of its own; what a replica gives says which one it is."""
    ctx = house.api.app.state.context  # type: ignore[attr-defined]
    with ctx.db.read() as session:
        from service.api.predict import served_model
        from service.db import catalog

        served = [vars(served_model(catalog.find_model(session, house.ids[name]))) for name in SIZES]
    program = """if True:
        import json, sys, time, uuid, ray
        from ray import serve
        address, models = json.loads(sys.argv[1])
        ray.init(address, log_to_driver=False)
        handle = serve.get_app_handle("tuneproof").options(method_name="predict")
        def ask(model):
            call = handle.options(multiplexed_model_id=model["id"]).remote(model, ["a text"], 30, None)
            return call.result()["replica"]
        for seconds in (1, 2, 4, 8, 16):  # within which every router has heard who has what
            fresh = [model | {"id": str(uuid.uuid4())} for model in models for _ in range(3)]
            for model in fresh:
                ask(model)
            time.sleep(seconds)
            places = [{ask(model) for _ in range(10)} for model in fresh]
            if all(len(place) == 1 for place in places) and len(set.union(*places)) == 2:
                break
        print(json.dumps([sorted(place) for place in places]))
    """
    given = json.dumps([house.settings["ray_address"], served])
    said = subprocess.run([sys.executable, "-c", program, given], capture_output=True, text=True, check=True).stdout
    places = json.loads(said.splitlines()[-1])
    assert {len(place) for place in places} == {1}, "each model is asked of one replica alone"
    assert len({place for [place] in places}) == 2, "and the models are spread"


@pytest.mark.parametrize(("name", "code"), [("damaged", "model_damaged"), ("homeless", "base_not_served")])
def test_errors_are_those_of_the_local_engine(house: House, name: str, code: str) -> None:
    def look(by: TestClient) -> httpx.Response | None:
        answer = house.ask(name, by=by)
        return None if answer.json()["code"] == "base_loading" else answer

    ours, theirs = (until(lambda by=by: look(by), 60, "an error") for by in (house.api, house.local))
    assert ours.status_code == theirs.status_code
    same = ("code", "detail", "title", "status")
    assert [ours.json()[key] for key in same] == [theirs.json()[key] for key in same]
    assert ours.json()["code"] == code


def test_a_full_queue_is_429_and_says_when_to_come_back(house: House) -> None:
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: house.ask("five", texts=["late parcel " * 40] * 64), range(24)))
    kinds = Counter((answer.status_code, answer.json().get("code")) for answer in answers)
    assert set(kinds) == {(200, None), (429, "queue_full")}, kinds
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)


def test_a_call_that_takes_too_long_is_504_and_its_replica_drops_it(house: House) -> None:
    before = house.engine._settings
    with replicas_count_calls(house) as calls, suspended_engines():
        house.engine._settings = before.model_copy(update={"predict_timeout_seconds": 3.0})
        try:
            with ThreadPoolExecutor(1) as pool:
                call = pool.submit(house.ask, "five")
                until(lambda: calls() == 1, 3, "a replica has the call")
                problem_of(call.result(), 504, "deadline_passed")
        finally:
            house.engine._settings = before
        until(lambda: calls() == 0, 20, "the replica has dropped it")
    assert until(lambda: answered(house, "five"), PATIENCE_SECONDS, "it answers again")


def test_a_caller_who_hangs_up_is_dropped(house: House) -> None:
    ctx = house.api.app.state.context  # type: ignore[attr-defined]
    app = application(ctx.settings.data_dir, **house.settings)  # one that is asked over a real connection
    engine = app.state.context.engine
    with listening(app) as url, replicas_count_calls(house) as calls, ThreadPoolExecutor(1) as pool:
        until(lambda: engine.warm, PATIENCE_SECONDS, "the API is ready")
        with suspended_engines():
            body = {"model": house.ids["five"], "texts": TEXTS}
            call = pool.submit(httpx.post, f"{url}/predict", json=body, timeout=5)
            until(lambda: calls() == 1, 5, "a replica has the call")
            with pytest.raises(httpx.ReadTimeout):
                call.result()
            until(
                lambda: engine.waiting_calls == calls() == 0, 20, "nobody waits for it, long before its 60 s are over"
            )
    assert until(lambda: answered(house, "five"), PATIENCE_SECONDS, "it answers again")


@contextlib.contextmanager
def replicas_count_calls(house: House) -> Iterator[Callable[[], int]]:
    """How many calls the replicas are at, as each of them counts."""
    program = """if True:
        import sys, ray
        ray.init(sys.argv[1], namespace="serve", log_to_driver=False)
        names = ray.util.list_named_actors()
        replicas = [ray.get_actor(name) for name in names if name.startswith("SERVE_REPLICA::tuneproof#")]
        for _ in sys.stdin:
            print("calls", sum(ray.get([one.get_num_ongoing_requests.remote() for one in replicas])), flush=True)
    """
    words = [sys.executable, "-c", program, house.settings["ray_address"]]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, said = process.stdin, process.stdout

        def count() -> int:
            asked.write("\n")
            return int(next(line for line in said if line.startswith("calls")).split()[1])

        assert count() == 0
        yield count
        asked.close()


def engine_processes() -> list[psutil.Process]:
    """Of the replicas: children of Ray's workers, which are children of raylets, which are this process's."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "service.inference.process" in process.cmdline() and process.parent() != psutil.Process():
                found.append(process)
    return found


@contextlib.contextmanager
def suspended_engines() -> Iterator[None]:
    engines = engine_processes()
    assert len(engines) == 2
    with contextlib.ExitStack() as stack:
        for engine in engines:
            engine.suspend()
            stack.callback(engine.resume)
        yield


def test_a_replica_whose_engine_was_lost_refuses_no_call(house: House) -> None:
    """One after the other: whichever has the models, its calls wait for the new engine or go to the other replica."""
    for engine in engine_processes():
        with ThreadPoolExecutor(40) as pool:
            calls = [pool.submit(house.ask, list(SIZES)[i % 3], texts=TEXTS[:4]) for i in range(40)]
            engine.kill()
            calls += [pool.submit(house.ask, list(SIZES)[i % 3], texts=TEXTS[:4]) for i in range(80)]
            kinds = Counter((call.result().status_code, call.result().json().get("code")) for call in calls)
        assert set(kinds) == {(200, None)}, kinds
        until(lambda: len(engine_processes()) == 2, 60, "it has an engine again")


def test_a_lost_node_costs_no_call_more_than_a_typed_503(house: House) -> None:
    lost = min(house.cluster.worker_nodes, key=lambda node: node.node_id)

    def ask(i: int) -> httpx.Response:
        return house.ask(list(SIZES)[i % 3], texts=TEXTS[:4])

    with ThreadPoolExecutor(40) as pool:
        calls = [pool.submit(ask, i) for i in range(40)]
        house.cluster.remove_node(lost, allow_graceful=False)
        calls += [pool.submit(ask, i) for i in range(40)]
        answers = [call.result() for call in calls]
    kinds = Counter((answer.status_code, answer.json().get("code")) for answer in answers)
    print(dict(kinds), end=" ")
    assert all(code in ALIVE[status] for status, code in kinds), kinds
    until(lambda: house.replicas == 1, 60, "the API knows that one is left")
    with ThreadPoolExecutor(40) as pool:
        assert {answer.status_code for answer in pool.map(ask, range(40))} == {200}
    add_node(house.cluster, 1)
    until(lambda: house.replicas == 2, PATIENCE_SECONDS, "the replica is there again, elsewhere")
    with ThreadPoolExecutor(40) as pool:
        assert {answer.status_code for answer in pool.map(ask, range(40))} == {200}


def test_what_the_operator_is_told(house: House) -> None:
    assert house.api.get("/readyz").json()["checks"]["engine"] == "ok"
    said = house.api.get("/metrics").text
    assert "\ntuneproof_replicas 2.0" in said
    assert "tuneproof_engine_tokens" not in said


def test_an_application_that_is_started_anew_is_found_again(house: House, tmp_path: Path) -> None:
    address = house.settings["ray_address"]
    shut_down(address, tmp_path)
    until(lambda: not house.engine.warm, 30, "the API knows")
    problem_of(house.ask("five"), 503, "engine_unavailable")
    until(lambda: not engine_processes(), 20, "the replicas' engines have ended with them")
    todo = "serve run --name tuneproof service.inference.replicas:app"
    until(lambda: todo in house.api.get("/readyz").text, PATIENCE_SECONDS, "it says what to do")
    serve(address, tmp_path)
    until(lambda: answered_or_away(house), PATIENCE_SECONDS, "a new replica answers")


def test_a_cluster_that_is_lost_whole_and_made_anew_is_joined_again(house: House, tmp_path: Path) -> None:
    cluster, address = house.cluster, house.settings["ray_address"]
    for node in [*cluster.worker_nodes, cluster.head_node]:
        cluster.remove_node(node, allow_graceful=False)
    until(lambda: not house.engine.warm, 60, "the API knows")
    assert house.api.get("/healthz").status_code == 200
    assert house.ask("five").status_code in ALIVE
    add_node(cluster, 0, gcs_server_port=int(address.rpartition(":")[2]))
    for _ in range(2):
        add_node(cluster, 1)
    assert cluster.address == address
    serve(address, tmp_path)
    until(lambda: answered_or_away(house), PATIENCE_SECONDS, "a new replica answers")


def answered_or_away(house: House) -> bool:
    answer = house.ask("five")
    assert answer.status_code in ALIVE, answer.text
    return answer.status_code == 200


def test_without_a_cluster_the_api_runs_and_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    address = f"127.0.0.1:{free_port()}"
    app = application(tmp_path / "data", engine="ray", ray_address=address)
    with TestClient(app, client=("127.0.0.1", 1)) as api:
        house = House(None, {})
        house.api = api
        house.publish("two", 2)
        assert api.get("/healthz").status_code == 200
        until(lambda: "cannot be reached" in api.get("/readyz").text, 60, "it says what is missing")
        answer = api.get("/readyz")
        assert answer.status_code == 503
        assert "TUNEPROOF_RAY_ADDRESS" in (engine := answer.json()["checks"]["engine"])
        assert address in engine
        started = time.monotonic()
        said = problem_of(house.ask("two"), 503, "engine_unavailable")["detail"]
        assert "127.0.0.1" not in said, "callers are not told where the cluster is"
        assert "RAY" not in said
        assert time.monotonic() - started < 2
        assert "\ntuneproof_replicas 0.0" in api.get("/metrics").text


# How a call is handed on, with replicas that a test speaks for ------------------------------------
MODEL = {"id": "a-model", "files": ["manifest.json"]}
ANSWER = {"labels": ["a", "b"], "truncated": [False], "tokens": 3}


class Replicas:
    """Gives or raises one thing after the other; notes for which model each call was to find a replica."""

    def __init__(self, *outcomes: dict[str, Any] | Exception) -> None:
        self._outcomes = iter(outcomes)
        self.wanted: list[str | None] = []

    def options(self, *, method_name: str, multiplexed_model_id: str | None = None) -> "Replicas":
        assert method_name == "predict"
        self.wanted.append(multiplexed_model_id)
        return self

    async def remote(self, *_given: Any) -> dict[str, Any]:
        outcome = next(self._outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return dict(outcome)


def relayed(replicas: Replicas, kind: str = "_answer", **given: Any) -> list[dict[str, Any]]:
    """What the API is told."""
    from service.inference.replicas import Relay

    told = BytesIO()
    relay = Relay("nowhere:1", told)
    relay._replicas = replicas
    relay._there.set()
    asyncio.run(getattr(relay, kind)(model=MODEL, **given))
    told.seek(0)
    return list(iter(lambda: wire.read(told), None))


def answer_by(replicas: Replicas) -> dict[str, Any]:
    given = {"number": 7, "texts": ["a secret text"], "deadline": time.monotonic() + 60, "request_id": None}
    [answer] = relayed(replicas, **given)
    assert answer.pop("number") == 7
    return answer


def failed(kind: type[AppError], detail: str = "said by a replica") -> dict[str, Any]:
    return wire.told(kind(detail))


def test_a_call_that_loses_its_replica_is_made_once_more() -> None:
    from ray.exceptions import ActorUnavailableError, RayError

    replicas = Replicas(ActorUnavailableError("gone", None), ANSWER)
    assert answer_by(replicas) == ANSWER
    assert replicas.wanted == ["a-model", "a-model"]
    replicas = Replicas(RayError(), RayError(), ANSWER)
    assert answer_by(replicas)["error"]["code"] == "engine_unavailable"
    assert len(replicas.wanted) == 2


def test_a_call_whose_replica_has_no_engine_is_made_once_more_of_any() -> None:
    replicas = Replicas(failed(EngineUnavailable), ANSWER)
    assert answer_by(replicas) == ANSWER
    assert replicas.wanted == ["a-model", None]
    replicas = Replicas(failed(EngineUnavailable), failed(EngineUnavailable), ANSWER)
    assert answer_by(replicas) == failed(EngineUnavailable)


@pytest.mark.parametrize("kind", [BaseLoading, InvalidData])
def test_what_another_replica_would_say_as_well_is_not_asked_of_it(kind: type[AppError]) -> None:
    replicas = Replicas(failed(kind), ANSWER)
    assert answer_by(replicas) == failed(kind)


def test_whatever_fails_on_the_way_is_answered_and_no_text_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    answer = answer_by(Replicas(ValueError("a secret text")))
    assert answer["error"]["code"] == "engine_failed"
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text + json.dumps(answer)


def test_a_model_is_warm_once_its_base_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("service.inference.replicas._SECONDS_BETWEEN_LOOKS", 0.0)
    loading, away = failed(BaseLoading), failed(EngineUnavailable)
    replicas = Replicas(loading, loading, away, away, ANSWER)
    [told] = relayed(replicas, "_warm")
    assert len(replicas.wanted) == 5
    assert told["figures"]["warmed"] == 1
    assert caplog.text == ""
    [told] = relayed(Replicas(failed(InvalidData), ANSWER), "_warm")
    assert told["figures"]["warmed"] == 1
    assert "not warmed: said by a replica" in caplog.text


def test_the_application_takes_no_arguments_that_it_does_not_know() -> None:
    from service.inference.replicas import app

    with pytest.raises(RuntimeError, match=r"takes replicas, cpus, gpus in its args, not num_gpus"):
        app({"replicas": 2, "num_gpus": 1})
    with pytest.raises(RuntimeError, match=r"TUNEPROOF_SERVE_REPLICAS: .* greater than or equal to 1"):
        app({"replicas": 0})
