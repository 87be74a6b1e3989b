"""The settings: told completely in the README, refused where they cannot work, read from the environment alone."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.core.settings import Settings, read_settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_readmes_table_is_the_one_that_the_settings_make() -> None:
    made = subprocess.run(
        [sys.executable, "tools/settings_table.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    found = README.partition("<!-- settings -->\n")[2].partition("<!-- /settings -->")[0]
    assert found == made, "run: python tools/settings_table.py --write"


def test_every_setting_is_described() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert "|" not in field.description, name


def test_nobody_else_reads_settings_from_the_environment() -> None:
    for file in [*(ROOT / "service").rglob("*.py"), *(ROOT / "worker").rglob("*.py")]:
        if file.name in ("endpoints.py", "ranks.py"):
            continue  # an endpoint's key, from the variable that its setting names; and what torchrun tells
        text = file.read_text("utf-8")
        assert not re.search(r"getenv|environ(\[|\.get)", text), file


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TUNEPROOF_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("TUNEPROOF_PORT", "0")
    monkeypatch.setenv("TUNEPROOF_BOOTSTRAP_KEY", "sesame")
    settings = Settings()
    assert settings.resolved_database_url == f"sqlite:///{tmp_path / 'tuneproof.db'}"
    assert settings.resolved_storage_url == f"file://{tmp_path / 'storage'}"
    assert settings.port == 0
    assert "sesame" not in repr(settings)
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "-1"),
        ("PORT", "65536"),
        ("PORT", "http"),
        ("LEASE_SECONDS", "1.9"),
        ("LEASE_SECONDS", "nan"),
        ("MAX_ATTEMPTS", "0"),
        ("MAX_LABELS", "1"),
        ("MAX_UPLOAD_BYTES", "0"),
        ("LOG_LEVEL", "loud"),
        ("SERVE_DTYPE", "fp16"),
        ("POLL_SECONDS", "0"),
        ("PREDICT_MAX_TEXTS", "0"),
        ("PREDICT_TIMEOUT_SECONDS", "0"),
        ("DELETE_GRACE_SECONDS", "-1"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"TUNEPROOF_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()


def test_names_to_preload_may_stand_with_spaces_and_commas_too_many() -> None:
    assert Settings(preload=" live, mdl_1,,").preloaded == ["live", "mdl_1"]
    assert Settings().preloaded == []


@pytest.mark.parametrize(
    ("host", "beyond"),
    [("127.0.0.1", False), ("127.1.2.3", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("::", True),
     ("192.168.1.2", True), ("example.org", True), ("localhost.example.org", True), ("", True), ("0", True)],
)  # fmt: skip
def test_only_loopback_is_loopback(host: str, beyond: bool) -> None:
    assert Settings(host=host).listens_beyond_loopback is beyond


# Remote endpoints -----------------------------------------------------------------------------------------
ENDPOINT = {"base_url": "http://127.0.0.1:11434/v1", "model": "qwen3:0.6b"}


def test_endpoints_are_read_from_json(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().prompt_endpoints == {}
    monkeypatch.setenv("TUNEPROOF_PROMPT_ENDPOINTS", json.dumps({"ollama": ENDPOINT | {"api_key_env": "MY_KEY"}}))
    endpoint = read_settings().prompt_endpoints["ollama"]
    assert (str(endpoint.base_url), endpoint.model) == (ENDPOINT["base_url"], ENDPOINT["model"])
    assert endpoint.host == "127.0.0.1:11434"
    assert endpoint.api_key() is None
    monkeypatch.setenv("MY_KEY", "sk-hidden")
    assert endpoint.api_key().get_secret_value() == "sk-hidden"  # type: ignore[union-attr]
    assert "sk-hidden" not in repr(endpoint) + json.dumps(endpoint.as_json())


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("{", "prompt_endpoints"),
        ("", "prompt_endpoints"),
        ('["a"]', "TUNEPROOF_PROMPT_ENDPOINTS"),
        ({"Upper": ENDPOINT}, "TUNEPROOF_PROMPT_ENDPOINTS.Upper"),
        ({"a/b": ENDPOINT}, "TUNEPROOF_PROMPT_ENDPOINTS.a/b"),
        ({"a": {}}, "TUNEPROOF_PROMPT_ENDPOINTS.a.base_url"),
        ({"a": ENDPOINT | {"base_url": "ftp://host/"}}, "TUNEPROOF_PROMPT_ENDPOINTS.a.base_url"),
        ({"a": ENDPOINT | {"base_url": "http://me:sk-hidden@host/v1"}}, "api_key_env"),
        ({"a": ENDPOINT | {"base_url": "http://host/v1?key=sk-hidden"}}, "api_key_env"),
        ({"a": ENDPOINT | {"api_key": "sk-hidden"}}, "TUNEPROOF_PROMPT_ENDPOINTS.a.api_key"),
        ({"a": ENDPOINT | {"api_key_env": "sk-hidden"}}, "TUNEPROOF_PROMPT_ENDPOINTS.a.api_key_env"),
        ({"a": ENDPOINT | {"model": ""}}, "TUNEPROOF_PROMPT_ENDPOINTS.a.model"),
        ({"a": ENDPOINT | {"max_concurrency": 0}}, "TUNEPROOF_PROMPT_ENDPOINTS.a.max_concurrency"),
        ({"a": ENDPOINT | {"timeout_seconds": 0}}, "TUNEPROOF_PROMPT_ENDPOINTS.a.timeout_seconds"),
        ({"a": ENDPOINT | {"input_price_per_million": -1}}, "TUNEPROOF_PROMPT_ENDPOINTS.a.input_price_per_million"),
        ({"a": ENDPOINT | {"budget_cost": 5}}, "budget_cost needs"),
    ],
)
@pytest.mark.parametrize("module", ["service.__main__", "worker.__main__"])
def test_endpoints_that_cannot_work_are_told_at_start_without_what_was_in_them(
    module: str, given: Any, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TUNEPROOF_PROMPT_ENDPOINTS", given if isinstance(given, str) else json.dumps(given))
    main = importlib.import_module(module).main
    assert (main(["keys", "list"]) if module.startswith("service") else main()) == 2
    told = capsys.readouterr().err
    assert named in told
    assert "sk-hidden" not in told


@pytest.mark.parametrize(
    "command", [["service", "serve"], ["service", "migrate"], ["service", "keys", "list"], ["worker"]]
)
def test_a_data_folder_that_cannot_be_one_is_told_in_a_line(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").touch()
    given = os.environ | {"TUNEPROOF_DATA_DIR": str(tmp_path / "file")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", *command], env=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"TUNEPROOF_DATA_DIR: {tmp_path / 'file'} is no folder that can be written to (Not a directory). Name another "
        "one, or give it to the service's user."
    )
