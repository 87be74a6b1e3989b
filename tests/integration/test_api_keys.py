"""`/keys` and `/base-models`: made once, shown once, revoked for good, and never so that nobody is left."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.db import catalog
from service.db.models import ApiKey
from service.ml.base_models import allowed_models
from tests.integration.conftest import ELSEWHERE, api
from tests.problems import problem_of
from tests.rows import START, StillClock

Start = Callable[..., TestClient]
FIELDS = {"id", "name", "scope", "created_at", "expires_at", "revoked_at"}


class Admin:
    """An API with one admin key, and whoever holds it."""

    def __init__(self, client: TestClient) -> None:
        self.client, self.clock = client, StillClock()
        self.context = client.app.state.context  # type: ignore[attr-defined]
        self.context.clock = self.clock
        with self.context.db.write() as session:
            key, self.secret = catalog.create_key(session, "admin", "admin", START)
        self.id = key.id
        client.headers["authorization"] = f"Bearer {self.secret}"

    def make(self, idempotency_key: str | None = None, **given: Any) -> Any:
        headers = {} if idempotency_key is None else {"idempotency-key": idempotency_key}
        return self.client.post("/keys", json={"name": "app", "scope": "read"} | given, headers=headers)

    def listed(self, query: str = "") -> Any:
        return self.client.get(f"/keys{query}").json()

    def opens(self, secret: str, path: str = "/jobs") -> int:
        return self.client.get(path, headers={"authorization": f"Bearer {secret}"}).status_code


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[Admin]:
    with api(tmp_path / "data", client=ELSEWHERE) as client:
        yield Admin(client)


def test_a_key_is_made_shown_once_and_works(admin: Admin) -> None:
    answer = admin.make(expires_days=1.5)
    assert answer.status_code == 201
    made = answer.json()
    secret = made.pop("key")
    assert set(made) == FIELDS
    assert (made["name"], made["scope"], made["revoked_at"]) == ("app", "read", None)
    assert (made["created_at"], made["expires_at"]) == ("2026-03-01T12:00:00Z", "2026-03-03T00:00:00Z")
    assert secret.startswith("tp_")
    assert len(secret) == len(admin.secret)
    assert admin.opens(secret) == 200
    assert admin.opens(secret, "/keys") == 403
    assert admin.listed()["data"][0] == made
    assert secret not in admin.client.get("/keys").text
    admin.clock.now = START + timedelta(days=1.5)
    assert admin.opens(secret) == 401


def test_secrets_differ_and_are_nowhere_in_the_database(admin: Admin, tmp_path: Path) -> None:
    secrets = [admin.make(key).json()["key"] for key in (None, None, "one", "another")]
    assert len(set(secrets)) == 4
    for file in (tmp_path / "data").glob("tuneproof.db*"):
        content = file.read_bytes()
        for secret in secrets:
            assert secret.removeprefix("tp_").encode() not in content


def test_sent_again_the_same_secret_is_told_again_and_to_nobody_else(admin: Admin) -> None:
    first = admin.make("once")
    again = admin.make("once")
    assert again.headers["idempotency-replayed"] == "true"
    assert (again.status_code, again.content) == (201, first.content)
    assert admin.opens(first.json()["key"]) == 200
    assert len(admin.listed()["data"]) == 2
    problem_of(admin.make("once", name="other"), 422, "idempotency_key_reused")
    other = admin.make(scope="admin").json()["key"]
    theirs = admin.client.post(
        "/keys", json={"name": "app", "scope": "read"},
        headers={"idempotency-key": "once", "authorization": f"Bearer {other}"},
    )  # fmt: skip
    assert theirs.json()["key"] != first.json()["key"]
    assert "idempotency-replayed" not in theirs.headers


@pytest.mark.parametrize(
    "body",
    [{}, {"name": "", "scope": "read"}, {"name": "x" * 201, "scope": "read"}, {"name": "x", "scope": "root"},
     {"name": "x", "scope": "read", "expires_days": 0}, {"name": "x", "scope": "read", "expires_days": 1e6},
     {"name": "x", "scope": "read", "expires_days": "9"}, {"name": "x", "scope": "read", "key": "tp_mine"}, []],
    ids=str,
)  # fmt: skip
def test_what_is_no_key_is_refused(admin: Admin, body: Any) -> None:
    problem_of(admin.client.post("/keys", json=body), 422, "invalid_input")
    assert len(admin.listed()["data"]) == 1


def test_keys_are_listed_newest_first_by_the_page(admin: Admin) -> None:
    ids = [*(admin.make(name=f"k{i}").json()["id"] for i in range(4))][::-1]
    ids.append(admin.id)
    first = admin.listed("?limit=2")
    assert ([key["id"] for key in first["data"]], first["has_more"]) == (ids[:2], True)
    rest = admin.listed(f"?limit=3&after={ids[1]}")
    assert ([key["id"] for key in rest["data"]], rest["has_more"]) == (ids[2:], False)
    problem_of(admin.client.get("/keys?after=mdl_1"), 422, "invalid_input")


def test_a_revoked_key_opens_nothing_and_can_be_revoked_again(admin: Admin) -> None:
    made = admin.make().json()
    assert admin.client.delete(f"/keys/{made['id']}").status_code == 204
    assert admin.opens(made["key"]) == 401
    admin.clock.advance(60)
    assert admin.client.delete(f"/keys/{made['id']}").status_code == 204
    assert admin.listed()["data"][0]["revoked_at"] == "2026-03-01T12:00:00Z"
    problem_of(admin.client.delete("/keys/key_0"), 404, "not_found")


def test_the_last_admin_key_is_not_revoked_over_http(admin: Admin) -> None:
    admin.make(scope="write")
    gone = admin.make(scope="admin", expires_days=1).json()["id"]
    admin.clock.now = START + timedelta(days=1)
    detail = problem_of(admin.client.delete(f"/keys/{admin.id}"), 409, "conflict")["detail"]
    assert f"tuneproof keys revoke {admin.id}" in detail
    assert admin.client.delete(f"/keys/{gone}").status_code == 204
    other = admin.make(scope="admin").json()
    assert admin.client.delete(f"/keys/{admin.id}").status_code == 204
    admin.client.headers["authorization"] = f"Bearer {other['key']}"
    problem_of(admin.client.delete(f"/keys/{other['id']}"), 409, "conflict")


def test_the_first_key_made_over_http_must_be_one_that_can_make_others(start: Start) -> None:
    client = start()
    refused = client.post("/keys", json={"name": "app", "scope": "write"})
    assert "admin" in problem_of(refused, 409, "conflict")["detail"]
    assert client.get("/session").json()["keys_exist"] is False
    made = client.post("/keys", json={"name": "me", "scope": "admin"}, headers={"idempotency-key": "first"}).json()
    problem_of(client.get("/keys"), 401, "unauthorized")
    client.headers["authorization"] = f"Bearer {made['key']}"
    assert client.post("/keys", json={"name": "app", "scope": "write"}).status_code == 201


def test_revoking_a_key_ends_the_sessions_that_it_opened(admin: Admin) -> None:
    made = admin.make(scope="admin").json()
    admin.client.post("/session", json={"key": made["key"]})
    del admin.client.headers["authorization"]
    assert admin.client.get("/keys").status_code == 200
    with admin.context.db.write() as session:
        session.get_one(ApiKey, made["id"]).revoked_at = START
    problem_of(admin.client.get("/keys"), 401, "unauthorized")


# What a job may name ------------------------------------------------------------------------------
def test_the_base_models_are_those_of_the_allow_list(start: Start, tmp_path: Path) -> None:
    for name, architecture in (("mine", "BertModel"), ("writes", "Qwen3ForCausalLM"), ("minilm", "BertModel")):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "model.safetensors").write_bytes(b"")
        config = f'{{"max_position_embeddings": 64, "architectures": ["{architecture}"]}}'
        (tmp_path / "models" / name / "config.json").write_text(config)
    remote = {"ollama": {"base_url": "http://127.0.0.1:9/v1", "model": "llama3.2"}}
    answer = start(models_dir=tmp_path / "models", prompt_endpoints=remote).get("/base-models").json()
    assert answer["has_more"] is False
    assert answer["prompt_endpoints"] == ["remote:ollama"]
    assert answer["auto_prompt_model"] is None
    found = {base["name"]: base for base in answer["data"]}
    assert list(found) == list(allowed_models(tmp_path / "models"))
    assert found["mine"] == {"name": "mine", "max_length": 64, "generative": False, "at_hand": True}
    assert found["writes"]["generative"] is True
    assert found["minilm"]["max_length"] == 64  # the folder's, not the embedded one's
    assert found["qwen3-0.6b"] == {"name": "qwen3-0.6b", "max_length": 32768, "generative": True, "at_hand": False}


def test_what_auto_prompts_is_told_where_it_is_at_hand(start: Start, tmp_path: Path) -> None:
    (tmp_path / "qwen3-0.6b").mkdir()
    (tmp_path / "qwen3-0.6b" / "model.safetensors").write_bytes(b"")
    (tmp_path / "qwen3-0.6b" / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    assert start(models_dir=tmp_path).get("/base-models").json()["auto_prompt_model"] == "qwen3-0.6b"
