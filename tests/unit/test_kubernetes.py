"""`deploy/kubernetes/`: what can be said of manifests without a cluster."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.routing import APIRoute

from service.core.settings import Settings
from service.main import create_app

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
PAGE = (ROOT / "docs" / "kubernetes.md").read_text("utf-8")
MANIFESTS: list[dict[str, Any]] = [
    document for file in sorted(FOLDER.glob("*.yaml")) for document in yaml.safe_load_all(file.read_text("utf-8"))
]
IMAGE = "registry.example.com/tuneproof:0.1.0"
OF_RAY = {"/api/gcs_healthz", "/api/local_raylet_healthz"}
"""Health endpoints of Ray's own, which ask for no token (seen on Ray 2.60)."""
UVICORN_GRACE_SECONDS = 25  # `timeout_graceful_shutdown` in service/__main__.py


def the(kind: str, name: str) -> dict[str, Any]:
    (found,) = [one for one in MANIFESTS if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template, named."""

    def of(value: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(value, dict):
            if "template" in value:
                yield f"{name}: {value.get('groupName', '')}", value["template"]
            for key, inside in value.items():
                if key != "template":
                    yield from of(inside, name)
        elif isinstance(value, list):
            for inside in value:
                yield from of(inside, name)

    for manifest in MANIFESTS:
        yield from of(manifest, f"{manifest['kind']} {manifest['metadata']['name']}")


PODS = dict(pods())
by_pod = pytest.mark.parametrize("pod", PODS.values(), ids=PODS)


def ray_clusters() -> dict[str, dict[str, Any]]:
    serving = the("RayService", "tuneproof-serving")["spec"]["rayClusterConfig"]
    return {"training": the("RayCluster", "tuneproof-training")["spec"], "serving": serving}


def test_the_kinds_are_these_and_each_is_in_the_namespace() -> None:
    kinds = [manifest["kind"] for manifest in MANIFESTS]
    assert sorted(set(kinds)) == [
        "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "Ingress", "Namespace", "NetworkPolicy",
        "PodDisruptionBudget", "RayCluster", "RayService", "Service",
    ]  # fmt: skip
    assert not [kind for kind in kinds if kind == "Secret"], "no secret in the repository"
    for manifest in MANIFESTS:
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "tuneproof"
    assert len(PODS) == 6


@by_pod
def test_every_pod_runs_our_image_with_resources_and_without_rights(pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert f"--uid {spec['securityContext']['runAsUser']} " in (ROOT / "Dockerfile").read_text("utf-8")
    for container in spec["containers"]:
        assert container["image"] == IMAGE
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        rights = container["securityContext"]
        assert rights == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}


def test_every_pod_has_the_settings_of_all_and_no_secret_that_it_can_do_without() -> None:
    held = {}
    for name, pod in PODS.items():
        (container,) = pod["spec"]["containers"]
        settings, *secrets = container["envFrom"]
        assert settings == {"configMapRef": {"name": "tuneproof"}}
        held[name] = [secret["secretRef"]["name"] for secret in secrets]
    assert held == {
        "Deployment tuneproof-api: ": ["tuneproof", "tuneproof-bucket"],
        "Deployment tuneproof-worker: ": ["tuneproof", "tuneproof-bucket"],
        "RayCluster tuneproof-training: ": [],
        "RayCluster tuneproof-training: gpu": ["tuneproof-endpoints"],
        "RayService tuneproof-serving: ": [],
        "RayService tuneproof-serving: gpu": ["tuneproof-bucket"],
    }
    made = set(re.findall(r"create secret generic ([\w-]+)", PAGE))
    assert made == {"tuneproof-ray"}.union(*held.values())


def test_every_variable_is_a_setting_and_can_work() -> None:
    given = dict(the("ConfigMap", "tuneproof")["data"])
    for pod in PODS.values():
        given |= {one["name"]: one.get("value", "") for one in pod["spec"]["containers"][0].get("env", [])}
    told = re.findall(r"--from-literal=(\w+)=", PAGE)
    assert {"TUNEPROOF_DATABASE_URL", "TUNEPROOF_BOOTSTRAP_KEY"} <= {*told}
    ours = {name.removeprefix("TUNEPROOF_").lower() for name in (*given, *told) if name.startswith("TUNEPROOF_")}
    assert ours <= set(Settings.model_fields)
    made = Settings(**{name.removeprefix("TUNEPROOF_").lower(): value for name, value in given.items()
                       if name.startswith("TUNEPROOF_")})  # type: ignore[arg-type]  # fmt: skip
    assert (made.engine, made.launcher, made.host) == ("ray", "ray", "0.0.0.0")
    assert all(isinstance(value, str) for value in the("ConfigMap", "tuneproof")["data"].values())


def test_every_probe_asks_for_a_path_that_is_there(tmp_path: Path) -> None:
    app = create_app(Settings(data_dir=tmp_path))
    routes = {route.path for route in app.routes if isinstance(route, APIRoute)} | set(app.openapi()["paths"])
    asked = set()
    for pod in PODS.values():
        (container,) = pod["spec"]["containers"]
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container.get(name, {})
            if "httpGet" in probe:
                assert probe["httpGet"]["port"] in {port["name"] for port in container["ports"]}
                assert probe["httpGet"]["path"] in routes
                asked.add((name, probe["httpGet"]["path"]))
            elif probe:
                program, flag, code = probe["exec"]["command"]
                assert (program, flag) == ("python", "-c")
                compile(code, name, "exec")
                assert set(re.findall(r"http://127\.0\.0\.1:\d+(/[\w/]+)", code)) <= OF_RAY
                assert probe["timeoutSeconds"] > 4
    assert asked == {("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")}
    (worker,) = the("Deployment", "tuneproof-worker")["spec"]["template"]["spec"]["containers"]
    assert "readinessProbe" not in worker
    assert "ports" not in worker


@by_pod
def test_every_pod_is_given_the_time_that_it_needs_to_end(pod: dict[str, Any]) -> None:
    stops = (ROOT / "service" / "__main__.py").read_text("utf-8")
    assert f"timeout_graceful_shutdown={UVICORN_GRACE_SECONDS}" in stops
    (container,) = pod["spec"]["containers"]
    before = container.get("lifecycle", {}).get("preStop", {}).get("exec", {"command": ["sleep", "0"]})["command"]
    assert pod["spec"]["terminationGracePeriodSeconds"] >= UVICORN_GRACE_SECONDS + 5 + int(before[1]) + 20


@pytest.mark.parametrize(("name", "which"), [("tuneproof-api", "serving"), ("tuneproof-worker", "training")])
def test_who_gives_ray_work_is_a_node_of_that_cluster_without_cores(name: str, which: str) -> None:
    template = the("Deployment", name)["spec"]["template"]
    (container,) = template["spec"]["containers"]
    join, then = re.split("&+ (?=exec)", container["command"][2])
    assert f"--address=tuneproof-{which}-head-svc:6379 --num-cpus=0 --num-gpus=0" in join
    assert then.split() == ["exec", "tuneproof", "serve" if which == "serving" else "worker"]
    # A worker ends with its part of Ray, and the container is started again; an API lives on.
    assert ("while :; do ray start" in join and " --block; sleep 1; done)" in join) is (which == "serving")
    assert template["metadata"]["labels"]["tuneproof/ray"] == which
    env = {one["name"]: one for one in container["env"]}
    assert env["RAY_AUTH_MODE"]["value"] == "token"
    secret = env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert secret == {"name": "tuneproof-ray", "key": "auth_token"}


def test_both_ray_clusters_ask_for_the_token_scale_by_themselves_and_compute_nothing_on_the_head() -> None:
    for which, cluster in ray_clusters().items():
        assert cluster["authOptions"] == {"mode": "token", "secretName": "tuneproof-ray"}
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert re.fullmatch(r"2\.\d+\.\d+", cluster["rayVersion"])
        (group,) = cluster["workerGroupSpecs"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        for part in (cluster["headGroupSpec"], group):
            assert part["template"]["metadata"]["labels"]["tuneproof/ray"] == which


def test_a_node_has_what_one_training_or_replica_sets_aside() -> None:
    settings = the("ConfigMap", "tuneproof")["data"]
    for cluster in ray_clusters().values():
        (container,) = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
        asked = container["resources"]["requests"]
        assert float(asked["cpu"]) >= float(settings["TUNEPROOF_RAY_CPUS"])
        assert float(asked["nvidia.com/gpu"]) >= float(settings["TUNEPROOF_RAY_GPUS"])
        assert asked["nvidia.com/gpu"] == container["resources"]["limits"]["nvidia.com/gpu"]
    serving = ray_clusters()["serving"]["workerGroupSpecs"][0]
    assert serving["minReplicas"] == int(settings["TUNEPROOF_SERVE_REPLICAS"])


def test_serving_names_the_application_as_the_compose_file_does_and_the_api_looks_for_it() -> None:
    (application,) = yaml.safe_load(the("RayService", "tuneproof-serving")["spec"]["serveConfigV2"])["applications"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    command = compose["services"]["ray-serve"]["entrypoint"]
    looked_for = (ROOT / "service" / "inference" / "replicas.py").read_text("utf-8").partition('\nAPP = "')[2]
    name = looked_for.partition('"')[0]
    assert application == {"name": name, "import_path": command[-1]}
    assert f"--name={name}" in command


def test_the_autoscaler_goes_by_a_metric_that_is_there() -> None:
    metrics = the("HorizontalPodAutoscaler", "tuneproof-api")["spec"]["metrics"]
    named = [metric["pods"]["metric"]["name"] for metric in metrics if metric["type"] == "Pods"]
    documented = (ROOT / "docs" / "operations.md").read_text("utf-8")
    assert named
    assert all(
        f"| `{name}` |" in documented
        for name in (*named, *re.findall(r"`(tuneproof_\w+)`", PAGE))
        if name != "tuneproof_jobs"
    )
    target = the("HorizontalPodAutoscaler", "tuneproof-api")["spec"]["scaleTargetRef"]["name"]
    (container,) = the("Deployment", target)["spec"]["template"]["spec"]["containers"]
    assert "cpu" in container["resources"]["requests"], "or its utilization is not known"
    assert "replicas" not in the("Deployment", target)["spec"], "applying it again would undo the autoscaler"


def test_everything_is_closed_but_what_is_named_and_ray_is_open_to_its_own_alone() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in MANIFESTS if one["kind"] == "NetworkPolicy"}
    assert policies["closed"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    (calls,) = policies["api"]["ingress"]
    assert calls["ports"] == [{"protocol": "TCP", "port": 8000}]
    for which in ray_clusters():
        own, operator = policies[f"ray-{which}"]["ingress"]
        assert own == {"from": [policies[f"ray-{which}"]["egress"][0]["to"][0]]}
        assert own["from"] == [{"podSelector": {"matchLabels": {"tuneproof/ray": which}}}]
        assert operator["from"] == [
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}}}
        ]
        assert 6379 not in {port["port"] for port in operator["ports"]}
    out, database = ({port["port"] for rule in policies[name]["egress"] for port in rule["ports"]}
                     for name in ("out", "database"))  # fmt: skip
    assert (out, database) == ({53, 443, 6443}, {5432})
    (who,) = policies["database"]["podSelector"]["matchExpressions"]
    assert who["values"] == ["tuneproof-api", "tuneproof-worker"]
    labels = [pod["metadata"]["labels"] for pod in PODS.values()]
    assert all(label["app.kubernetes.io/part-of"] == "tuneproof" for label in labels)


def test_the_page_links_every_manifest_and_says_what_has_not_been_run() -> None:
    for file in FOLDER.glob("*.yaml"):
        assert f"../deploy/kubernetes/{file.name})" in PAGE
    assert "None of this has been run on a cluster." in PAGE
