"""Whatever is sent, no answer is a 500, and each is one that the OpenAPI document tells: schemathesis sends it."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from schemathesis.python import asgi

from service.api import preflight
from service.core.ids import new_token
from service.db import catalog
from service.db.models import Base
from service.ml.preflight import look
from tests.integration.conftest import make_app
from tests.problems import problem_of
from tests.rows import ARTIFACTS, START, add_dataset, add_job, add_published

GOLDEN = Path(__file__).parents[1] / "golden" / "openapi.json"  # test_contract holds it to what is served
TICKETS = b"text,label\n" + b"".join(b"words of ticket %d,%s\n" % (i, (b"fee", b"refund")[i % 2]) for i in range(12))
FILES = (TICKETS, TICKETS.decode().encode("utf-16"), TICKETS.replace(b",", b";"), TICKETS + b"one\n", TICKETS + b'"x,y')
SPECS = ("{}", '{"kind":"baseline"}', '{"kind":"predict","model":"the-alias"}', '{"base_model":"../../etc"}')
# Half of what is generated names what is there: else little but 404 would be seen.
KNOWN: dict[str, tuple[str | float, ...]] = {
    "path.dataset_id": ("the-dataset",),
    "path.job_id": ("the-ended-job", "the-queued-job"),
    "path.model_id": ("the-model", "the-alias"),
    "path.key_id": ("the-key",),
    "path.alias": ("the-alias",),
    "path.name": tuple(ARTIFACTS),
    "query.dataset_id": ("the-dataset",),
    "query.model_id": ("the-model",),
    "query.jobs": ("the-ended-job,the-queued-job",),
    "body.dataset_id": ("the-dataset",),
    "body.model": ("the-model", "the-alias"),
    "body.model_id": ("the-model",),
    "body.text": ("words of ticket 1",),
    "body.top_k": (1, 3),
    "body.kind": ("experiment", "train", "baseline"),
    "body.split.train": (0.8,),
    "body.split.validation": (0.1,),
    "body.split.test": (0.1,),
    "body.seed": (42,),
    "body.train.max_length": (64,),
    "body.base_model": ("auto", "../../etc", "https://example.com/model"),
    "body.spec": SPECS,
    "body.text_column": ("text", "0"),
    "body.label_column": ("label", "1"),
    "body.split_column": ("label",),
    "body.delimiter": (",", ";"),
    "body.encoding": ("utf-8", "utf-16", "cp1252"),
}
schemathesis.openapi.format("binary", st.sampled_from(FILES) | st.binary(max_size=200))


def document(*, boundaries: bool) -> Any:
    """The service's own, for schemathesis; with `boundaries` the edges of every field are sent one by one, too."""
    names = {key: f"values-{i}" for i, key in enumerate(KNOWN)}
    config = {
        "dictionaries": {names[key]: {"values": list(values)} for key, values in KNOWN.items()},
        "parameters": {key: {"dictionary": name, "probability": 0.6} for key, name in names.items()},
        "phases": {
            "coverage": {"enabled": boundaries},
            # What one operation answered is no input of the next: an order of tests would be part of the outcome.
            "fuzzing": {"extra-data-sources": {"responses": False}, "error-feedback": {"enabled": False}},
            "stateful": {"link-calibration": False, "checks": {"negative_data_rejection": {"enabled": False}}},
        },
        "request-timeout": 60,
        "checks": {
            "not_a_server_error": {"expected-statuses": ["2xx", "4xx", 503, 507]},
            "allow_header_conformance": {"enabled": False},  # Starlette names the methods of one route of a path alone
            "positive_data_acceptance": {"enabled": False},  # more is asked of a body than a schema can say
        },
    }
    return schemathesis.openapi.from_path(GOLDEN, config=schemathesis.Config.from_dict(config))


def sends(n: int, **more: Any) -> settings:
    return settings(
        max_examples=n, derandomize=True, database=None, deadline=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck), **more,
    )  # fmt: skip


class Served(NamedTuple):
    """An application, a key to call it with, and the ids that stand behind the names in `KNOWN`."""

    app: FastAPI
    headers: dict[str, str]
    ids: dict[str, str]

    def ask(self, case: schemathesis.Case) -> Any:
        """Sends the case, and checks its answer."""
        self.prepare(case)
        answer = case.call(app=self.app, headers=self.headers)
        self.check(case, answer)
        return answer

    def prepare(self, case: schemathesis.Case) -> None:
        """Puts ids in the place of their names, and lets no long poll wait."""
        for values in (case.path_parameters, case.query, case.body):
            if isinstance(values, dict):
                values.update({key: self._real(value) for key, value in values.items() if type(value) is str})
        if case.path.endswith("/wait"):
            case.query = case.query or {}
            if _is_time(case.query.get("timeout_seconds", 30)):
                case.query["timeout_seconds"] = 0.01

    def check(self, case: schemathesis.Case, answer: Any) -> None:
        case.validate_response(answer)
        if answer.status_code >= 400 and "application/json" not in answer.headers["content-type"]:
            headers = [(name, value) for name, values in answer.headers.items() for value in values]
            told = httpx.Response(answer.status_code, headers=headers, content=answer.content)
            problem_of(told, told.status_code, told.json()["code"])

    def _real(self, value: str) -> str:
        for name, found in self.ids.items():
            value = value.replace(name, found)
        return value


def _is_time(value: Any) -> bool:
    try:
        return 0 <= float(value) <= 60
    except (TypeError, ValueError):
        return False


def seeded(app: FastAPI) -> Served:
    """With objects of its own, which may be deleted."""
    ctx = app.state.context
    stored = ctx.storage.put(io.BytesIO(TICKETS), f"datasets/{new_token()}/file")
    ended, model = add_published(ctx.db, ctx.storage)
    dataset = add_dataset(ctx.db, labels=("fee", "refund"), storage_key=stored.key)
    queued = add_job(ctx.db)
    with ctx.db.write() as session:
        key, _ = catalog.create_key(session, "spare", "read", START)
        _, secret = catalog.create_key(session, "caller", "admin", START)
        catalog.point_alias(session, "the-alias", model, START)
    ids = {"the-dataset": dataset, "the-ended-job": ended, "the-queued-job": queued, "the-model": model}
    return Served(app, {"Authorization": f"Bearer {secret}"}, ids | {"the-key": key.id})


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    yield make_app(tmp_path_factory.mktemp("api") / "data", max_upload_bytes=300_000)
    asgi.shutdown_lifespans()


@pytest.fixture
def served(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setattr(preflight, "_look_in_a_process_of_its_own", look)  # starting one takes seconds each time
    return seeded(app)


few, many = document(boundaries=False), document(boundaries=True)


@few.exclude(path_regex="/preflight$").parametrize()  # it imports what training imports
@sends(6)
def test_a_few_inputs_to_each_route(case: schemathesis.Case, served: Served) -> None:
    served.ask(case)


@pytest.mark.more
@many.parametrize()
@sends(15)
def test_many_inputs_to_each_route(case: schemathesis.Case, served: Served) -> None:
    served.ask(case)


def follow(app: FastAPI, given: settings) -> set[tuple[str, int]]:
    """Calls one route after the other with the ids that answers gave; what was answered, by route."""
    answered = set()
    # Not the keys: the one that is revoked may be the caller's own.
    routes = few.exclude(path_regex="/preflight$|/keys/")

    class Journey(routes.as_state_machine()):  # type: ignore[misc]
        def setup(self) -> None:
            with app.state.context.db.write() as session:  # each journey begins at the same state
                for table in reversed(Base.metadata.sorted_tables):
                    session.execute(table.delete())
            self.served = seeded(app)

        def before_call(self, case: schemathesis.Case) -> None:
            if isinstance(case.body, dict) and case.operation.label in ("POST /datasets", "POST /jobs"):
                # What leads on alone: where every field is drawn, hardly anything is taken.
                case.body = {name: value for name, value in case.body.items() if name in ("file", "dataset_id")}
                case.headers.pop("Idempotency-Key", None)
            self.served.prepare(case)

        def get_call_kwargs(self, case: schemathesis.Case) -> dict[str, Any]:
            return {"app": self.served.app, "headers": self.served.headers}

        def validate_response(self, response: Any, case: schemathesis.Case, **_more: Any) -> None:
            answered.add((case.operation.label, response.status_code))
            self.served.check(case, response)

    Journey.run(settings=given)
    return answered


def well_answered(answered: set[tuple[str, int]]) -> set[str]:
    return {route for route, status in answered if status < 300}


def test_calls_that_follow_each_other(app: FastAPI) -> None:
    assert len(well_answered(follow(app, sends(10, stateful_step_count=8)))) >= 8


@pytest.mark.more
def test_many_calls_that_follow_each_other(app: FastAPI) -> None:
    well = well_answered(follow(app, sends(30, stateful_step_count=20)))
    assert well >= {"POST /datasets", "POST /jobs", "POST /jobs/{job_id}/cancel", "DELETE /jobs/{job_id}"}
    assert len(well) >= 15
