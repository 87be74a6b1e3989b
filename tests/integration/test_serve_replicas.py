"""`/predict` through replicas on Ray Serve, on a cluster of several raylets, held against the local engine."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from transformers import AutoTokenizer

from service.core.settings import Settings
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
    "TUNEPROOF_ENGINE": "ray", "TUNEPROOF_SERVE_REPLICAS": "2", "TUNEPROOF_RAY_CPUS": "1", "TUNEPROOF_RAY_GPUS": "0",
    "TUNEPROOF_SERVE_DEVICE": "cpu", "TUNEPROOF_SERVE_DTYPE": "fp32", "TUNEPROOF_PREDICT_QUEUE_TOKENS": "4096",
}  # fmt: skip
SERVE = "proxy_location: Disabled\napplications: [{name: tuneproof, import_path: 'service.inference.replicas:app'}]\n"


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
        import json, sys, time, ray
        from ray import serve
        address, models = json.loads(sys.argv[1])
        ray.init(address, log_to_driver=False)
        handle = serve.get_app_handle("tuneproof").options(method_name="predict")
        def ask(model):
            call = handle.options(multiplexed_model_id=model["id"]).remote(model, ["a text"], 30, None)
            return call.result()["replica"]
        for model in models:
            ask(model)
        time.sleep(2)  # until every router has heard who has what
        print(json.dumps([[model["id"], ask(model)] for _ in range(10) for model in models]))
    """
    given = json.dumps([house.settings["ray_address"], served])
    said = subprocess.run([sys.executable, "-c", program, given], capture_output=True, text=True, check=True).stdout
    places = Counter(map(tuple, json.loads(said.splitlines()[-1])))
    assert set(places.values()) == {10}, "each model is asked of one replica alone"
    assert len({replica for _model, replica in places}) == 2, "and the models are spread"


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
    engines = engine_processes()
    assert len(engines) == 2
    for engine in engines:
        engine.suspend()
    ctx = house.api.app.state.context  # type: ignore[attr-defined]
    before = ctx.engine._settings
    ctx.engine._settings = before.model_copy(update={"predict_timeout_seconds": 1.0})
    try:
        problem_of(house.ask("five"), 504, "deadline_passed")
    finally:
        ctx.engine._settings = before
        for engine in engines:
            engine.resume()
    assert ctx.engine.waiting_calls == 0
    assert until(lambda: answered(house, "five"), PATIENCE_SECONDS, "it answers again")


def test_a_caller_who_hangs_up_is_dropped(house: House) -> None:
    ctx = house.api.app.state.context  # type: ignore[attr-defined]
    app = application(ctx.settings.data_dir, **house.settings)  # one that is asked over a real connection
    engine = app.state.context.engine
    with listening(app) as url, contextlib.ExitStack() as stack:
        until(lambda: engine.warm, PATIENCE_SECONDS, "the API is ready")
        for process in engine_processes():
            process.suspend()
            stack.callback(process.resume)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/predict", json={"model": house.ids["five"], "texts": TEXTS}, timeout=2)
        until(lambda: engine.waiting_calls == 0, 20, "nobody waits for it any more")
    assert until(lambda: answered(house, "five"), PATIENCE_SECONDS, "it answers again")


def engine_processes() -> list[psutil.Process]:
    """Of the replicas: children of Ray's workers, which are children of raylets, which are this process's."""
    return [
        process for process in psutil.Process().children(recursive=True)
        if "service.inference.process" in process.cmdline() and process.parent() != psutil.Process()
    ]  # fmt: skip


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
    until(lambda: "serve run" in house.api.get("/readyz").text, PATIENCE_SECONDS, "it says what to do")
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
    app = application(tmp_path / "data", engine="ray", ray_address=f"127.0.0.1:{free_port()}")
    with TestClient(app, client=("127.0.0.1", 1)) as api:
        house = House(None, {})
        house.api = api
        house.publish("two", 2)
        assert api.get("/healthz").status_code == 200
        until(lambda: "cannot be reached" in api.get("/readyz").text, 60, "it says what is missing")
        answer = api.get("/readyz")
        assert answer.status_code == 503
        assert "TUNEPROOF_RAY_ADDRESS" in answer.json()["checks"]["engine"]
        started = time.monotonic()
        assert "TUNEPROOF_RAY_ADDRESS" in problem_of(house.ask("two"), 503, "engine_unavailable")["detail"]
        assert time.monotonic() - started < 2
        assert "\ntuneproof_replicas 0.0" in api.get("/metrics").text
