"""docker-compose.yml, read as compose reads it: what starts, in which profile, with which settings."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.core.settings import Settings
from tests.s3_server import s3_server

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
STARTED = {
    "": (["api", "worker"], {"api", "worker"}),
    "postgres-s3": (["api-shared", "worker-shared"], {"api-shared", "worker-shared", "postgres", "s3", "bucket"}),
    "ray": (
        ["api-ray", "worker-ray"],
        {"api-ray", "worker-ray", "postgres", "s3", "bucket", "ray-head", "ray-node", "ray-serve"},
    ),
}
"""By profile: the services that are named on the command line, and all that start with them."""
OF_THE_STORES = (
    "TUNEPROOF_DATABASE_URL", "TUNEPROOF_STORAGE_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION",
)  # fmt: skip
by_profile = pytest.mark.parametrize("profile", STARTED)


def with_what_they_wait_for(names: list[str]) -> set[str]:
    waited_for = [other for name in names for other in SERVICES[name].get("depends_on", {})]
    return {*names, *(with_what_they_wait_for(waited_for) if waited_for else ())}


def filled_in(value: str, given: dict[str, str]) -> str:
    """As compose does it, for the forms that the file has: `${NAME-other}`, `${NAME:?message}`, `$$`."""

    def put(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        name, must, other = found["name"], found["must"], found["other"]
        assert not (must and not given.get(name)), f"{name} must be set"
        return given.get(name, other or "")

    return re.sub(r"\$\$|\$\{(?P<name>\w+)(?:(?P<must>:\?)[^}]*|-(?P<other>[^}]*))\}", put, value)


def ours(profile: str) -> dict[str, dict[str, Any]]:
    started = {name: SERVICES[name] for name in STARTED[profile][1]}
    return {name: service for name, service in started.items() if "build" in service}


@by_profile
def test_what_a_profile_starts(profile: str) -> None:
    named, started = STARTED[profile]
    assert with_what_they_wait_for(named) == started
    for name in started:
        assert (profile in SERVICES[name].get("profiles", [])) == bool(profile), name
    in_it = {name for name, service in SERVICES.items() if profile in service.get("profiles", [""])}
    assert in_it == started, "none that nothing named waits for"


def test_every_service_is_in_a_profile_that_is_told_of() -> None:
    assert set().union(*(started for _, started in STARTED.values())) == set(SERVICES)
    page = (ROOT / "docs" / "several-machines.md").read_text("utf-8")
    for profile in filter(None, STARTED):
        command = f"docker compose --profile {profile} up --build {' '.join(STARTED[profile][0])}"
        assert command in page
        assert command in (ROOT / "docker-compose.yml").read_text("utf-8")


def test_without_a_profile_only_the_first_key_is_asked_for() -> None:
    """Compose fills in the whole file, whatever the profile: a secret of another one must not stop this one."""
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    asked = set(re.findall(r"(?<!\$)\$\{(\w+):\?", re.sub(r"#.*", "", text)))
    assert asked == {"TUNEPROOF_BOOTSTRAP_KEY"}
    assert not re.findall(r"(?<!\$)\$\{\w+\}", re.sub(r"#.*", "", text)), "one that is not set would be warned of"


@pytest.mark.parametrize(("name", "secret"), [
    ("postgres", "POSTGRES_PASSWORD"), ("s3", "MINIO_ROOT_PASSWORD"), ("ray-head", "RAY_AUTH_TOKEN"),
])  # fmt: skip
def test_what_needs_a_secret_does_not_start_without(name: str, secret: str, tmp_path: Path) -> None:
    service = SERVICES[name]
    command = [filled_in(word, {}) for word in service["entrypoint"]]
    for program in ("docker-entrypoint.sh", "minio", "ray"):
        (tmp_path / program).write_text("#!/bin/sh\necho started\n")
        (tmp_path / program).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    set_to = {key: filled_in(value, {}) for key, value in service["environment"].items()}
    assert set_to[secret] == "", "no secret has a default"
    without = subprocess.run(command, env=set_to | {"PATH": path}, capture_output=True, text=True, check=False)
    assert without.returncode != 0
    assert "started" not in without.stdout
    assert "set" in without.stderr
    assert subprocess.check_output(command, env=set_to | {secret: "a", "PATH": path}, text=True) == "started\n"


@by_profile
def test_every_setting_is_one_and_holds_together(profile: str) -> None:
    secrets = dict.fromkeys(
        ("TUNEPROOF_BOOTSTRAP_KEY", "POSTGRES_PASSWORD", "S3_PASSWORD", "RAY_AUTH_TOKEN"), "0f" * 16
    )
    for name, service in ours(profile).items():
        given = {key: filled_in(value, secrets) for key, value in service.get("environment", {}).items()}
        settings = {
            key.removeprefix("TUNEPROOF_").lower(): v for key, v in given.items() if key.startswith("TUNEPROOF_")
        }
        assert set(settings) <= set(Settings.model_fields), name
        Settings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("profile", ["postgres-s3", "ray"])
def test_all_of_a_profile_share_one_database_and_one_bucket(profile: str) -> None:
    services = ours(profile)
    for variable in OF_THE_STORES:
        assert len({service["environment"][variable] for service in services.values()}) == 1
    environment = services["bucket"]["environment"]
    assert environment["TUNEPROOF_DATABASE_URL"] == "postgresql://tuneproof:${POSTGRES_PASSWORD-}@postgres/tuneproof"
    assert SERVICES["postgres"]["environment"]["POSTGRES_PASSWORD"] == "${POSTGRES_PASSWORD-}"
    assert environment["AWS_ENDPOINT_URL_S3"] == "http://s3:9000"
    assert environment["AWS_SECRET_ACCESS_KEY"] == SERVICES["s3"]["environment"]["MINIO_ROOT_PASSWORD"]
    assert environment["AWS_ACCESS_KEY_ID"] == SERVICES["s3"]["environment"]["MINIO_ROOT_USER"]
    for name, service in services.items():
        assert not [volume for volume in service.get("volumes", []) if volume.startswith("data:")], name


def test_the_bucket_is_the_one_that_is_made_and_making_it_again_does_no_harm(bucket_command: list[str]) -> None:
    import boto3

    def buckets() -> set[str]:
        return {found["Name"] for found in boto3.client("s3").list_buckets()["Buckets"]}

    with s3_server():
        others = buckets()  # moto's servers in one process share their buckets, and other tests make some
        for _ in range(2):
            subprocess.run(bucket_command, check=True, env=os.environ | {"AWS_DEFAULT_REGION": "us-east-1"})
        assert buckets() - others == {"tuneproof"}
        boto3.client("s3").delete_bucket(Bucket="tuneproof")
    assert SERVICES["bucket"]["environment"]["TUNEPROOF_STORAGE_URL"].startswith("s3://tuneproof/")


@pytest.fixture
def bucket_command() -> list[str]:
    program, *words = SERVICES["bucket"]["entrypoint"]
    assert program == "python"
    return [sys.executable, *words]


def test_images_are_ours_or_pinned_to_a_tag() -> None:
    extras = {}
    for name, service in SERVICES.items():
        image, _, tag = service["image"].rpartition(":") if ":" in service["image"] else (service["image"], "", "")
        if "build" in service:
            built = service["build"]
            extras.setdefault(service["image"], set()).add(built if isinstance(built, str) else built["args"]["EXTRAS"])
            continue
        assert image, name
        assert re.search(r"\d", tag), name
        assert tag != "latest"
    assert extras == {"tuneproof": {"."}, "tuneproof:shared": {"server,remote,postgres,s3,ray"}}


def test_ports_are_open_to_this_machine_alone() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {key: ["127.0.0.1:8000:8000"] for key in ["api", "api-shared", "api-ray"]}
    assert not any("network_mode" in service or "expose" in service for service in SERVICES.values())


@by_profile
def test_whatever_is_waited_for_can_be_seen_to_be_ready(profile: str) -> None:
    for name in STARTED[profile][1]:
        for other, how in SERVICES[name].get("depends_on", {}).items():
            waited_for = SERVICES[other]
            if how["condition"] == "service_completed_successfully":
                assert waited_for["restart"] == "no"
            else:
                assert how["condition"] == "service_healthy"
                its_own = waited_for.get("healthcheck")
                assert (its_own is None and waited_for["command"] == ["serve"]) or its_own["test"][0] == "CMD"


def test_everything_that_stays_has_a_volume_that_is_declared() -> None:
    mounted = {volume.partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert mounted == set(COMPOSE["volumes"]) == {"data", "huggingface", "postgres", "s3"}


def test_on_ray_a_gpu_holds_a_replica_a_training_and_a_bulk_prediction_and_only_nodes_have_one() -> None:
    share = float(filled_in(SERVICES["ray-node"]["environment"]["TUNEPROOF_RAY_GPUS"], {}))
    assert 3 * share <= 1
    assert {name for name in STARTED["ray"][1] if "deploy" in SERVICES[name]} == {"ray-node"}
    assert SERVICES["api-ray"]["environment"]["TUNEPROOF_ENGINE"] == "ray"
    assert SERVICES["worker-ray"]["environment"]["TUNEPROOF_LAUNCHER"] == "ray"
    for name in ("ray-head", "ray-node", "ray-serve", "api-ray", "worker-ray"):
        assert SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token"
