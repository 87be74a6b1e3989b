"""The image, the compose file, the pins and the make targets, read as their tools read them."""

import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))


@pytest.fixture(scope="module")
def image() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, in order: keyword and the rest."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(keyword, rest.strip()) for keyword, _, rest in (line.partition(" ") for line in lines) if keyword]


def instructions(image: list[tuple[str, str]], keyword: str) -> list[str]:
    return [rest for name, rest in image if name == keyword]


# The image ----------------------------------------------------------------------------------------
def test_the_image_runs_the_command_as_a_user_who_owns_the_data(image: list[tuple[str, str]]) -> None:
    assert instructions(image, "FROM") == ["python:3.11-slim-bookworm"]
    assert instructions(image, "USER") == ["tuneproof"]
    assert instructions(image, "ENTRYPOINT") == ['["tuneproof"]']
    assert instructions(image, "VOLUME") == ["/data"]
    assert any("install --directory --owner tuneproof" in run and "/data" in run for run in instructions(image, "RUN"))
    assert "TUNEPROOF_DATA_DIR=/data" in " ".join(instructions(image, "ENV"))


def test_the_images_health_is_the_apis(image: list[tuple[str, str]]) -> None:
    (check,) = instructions(image, "HEALTHCHECK")
    assert "/healthz" in check
    assert "TUNEPROOF_PORT" in check


def test_every_install_in_the_image_is_pinned(image: list[tuple[str, str]]) -> None:
    installs = [run for run in instructions(image, "RUN") if "pip install" in run]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in run for run in installs)


def test_the_image_gets_the_extras_that_are_asked_for(image: list[tuple[str, str]], project: dict[str, Any]) -> None:
    assert instructions(image, "ARG") == ["EXTRAS=server,remote"]
    extras = project["project"]["optional-dependencies"]
    listing, install = [run for run in instructions(image, "RUN") if "pip install" in run]
    program = re.search(r'python -c "(.+?)" >', listing)
    assert program
    for asked in ("server,remote", "server,remote,postgres,s3,ray"):
        code = program[1].replace("${EXTRAS}", asked)
        told = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).splitlines()
        wanted = [line for name in asked.split(",") for line in extras[name]]
        assert told == [*project["project"]["dependencies"], *wanted]
    assert install.endswith('".[${EXTRAS}]"')


def test_the_image_gets_all_that_the_wheel_is_made_of(image: list[tuple[str, str]], project: dict[str, Any]) -> None:
    copied = {source for copy in instructions(image, "COPY") for source in copy.split()[:-1]}
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {Path(source).parts[0] for source in (*wheel["packages"], *wheel["force-include"])}
    assert needed | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == copied
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]
    assert set(sent) == copied


# docker-compose.yml; its profiles are in test_compose.py -----------------------------------------
def test_api_and_worker_share_image_gpu_and_volumes(compose: dict[str, Any]) -> None:
    services = {name: compose["services"][name] for name in ("api", "worker")}
    for service in services.values():
        assert service["image"] == "tuneproof"
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert device["capabilities"] == ["gpu"]
        assert service["volumes"] == ["data:/data", "huggingface:/home/tuneproof/.cache/huggingface"]
        assert service["restart"] == "unless-stopped"
        assert service["stop_grace_period"] == "60s"
        assert service["init"] is True
    assert [services[name]["command"] for name in ("api", "worker")] == [["serve"], ["worker"]]


def test_the_port_is_open_to_this_machine_alone_and_needs_a_first_key(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert services["api"]["ports"] == ["127.0.0.1:8000:8000"]
    assert "ports" not in services["worker"]
    assert services["api"]["environment"]["TUNEPROOF_HOST"] == "0.0.0.0"
    assert services["api"]["environment"]["TUNEPROOF_BOOTSTRAP_KEY"].startswith("${TUNEPROOF_BOOTSTRAP_KEY:?")


def test_the_worker_waits_for_the_api_which_makes_the_tables(compose: dict[str, Any]) -> None:
    worker = compose["services"]["worker"]
    assert worker["depends_on"] == {"api": {"condition": "service_healthy"}}
    assert worker["healthcheck"] == {"disable": True}, "it serves no /healthz"


# The pins, the targets, the licence ---------------------------------------------------------------
def test_every_requirement_is_pinned_within_its_range(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in lines if line[0] != "#"}
    extras = project["project"]["optional-dependencies"]
    asked = [*project["project"]["dependencies"], *itertools.chain(*extras.values())]
    assert asked.pop(asked.index("tuneproof[docs,postgres,s3]"))  # these, once more
    for requirement in map(Requirement, asked):
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier
    assert str(pinned["torch"]) == "2.13.0"
    assert not [name for name, version in pinned.items() if version.local], "local versions exist in one index only"
    assert not {"pip", "setuptools", "tuneproof"} & set(pinned)


def test_make_lists_its_targets() -> None:
    shown = subprocess.check_output(["make", "--directory", ROOT, "--no-print-directory"], text=True)
    targets = {line.split()[1] for line in shown.splitlines()}
    assert targets == {
        "help",
        "setup",
        "demo",
        "run",
        "test",
        "test-more",
        "test-scale",
        "test-gpu",
        "acceptance",
        "audit",
        "calibrate",
        "chaos",
        "check",
        "bench-scale",
        "bench",
        "vendor",
        "bench-gpu",
        "verify-f2llm",
        "soak",
        "docs",
        "lock",
    }


def test_ci_runs_the_checks_and_all_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.findall(r"^run make (\S+)$", script.read_text("utf-8"), re.MULTILINE) == ["check", "test", "test-more"]


def test_the_licence_is_the_one_declared(project: dict[str, Any]) -> None:
    assert project["project"]["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text("utf-8")


def test_one_machine_loads_nothing_of_what_several_need(tmp_path: Path) -> None:
    program = """if True:
        import sys
        from service.core.settings import Settings
        from service.main import create_app
        from worker.supervisor import Supervisor
        settings = Settings()
        create_app(settings), Supervisor(settings)
        print(*{name.partition(".")[0] for name in sys.modules})
    """
    env = os.environ | {"TUNEPROOF_DATA_DIR": str(tmp_path)}
    loaded = set(subprocess.check_output([sys.executable, "-c", program], env=env, text=True).split())
    assert {"service", "worker", "sqlalchemy"} <= loaded
    assert not loaded & {"psycopg", "s3fs", "aiobotocore", "botocore", "boto3", "moto", "ray", "pyarrow"}
