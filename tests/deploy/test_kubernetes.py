"""The manifests in deploy/kubernetes: their structure, and what they promise to the service."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
VERSIONS = {
    "Deployment": "apps/v1",
    "HorizontalPodAutoscaler": "autoscaling/v2",
    "NetworkPolicy": "networking.k8s.io/v1",
    "PersistentVolumeClaim": "v1",
    "PodDisruptionBudget": "policy/v1",
    "Service": "v1",
    "ServiceMonitor": "monitoring.coreos.com/v1",
}
OBJECTS: dict[tuple[str, str], dict[str, Any]] = {
    (document["kind"], document["metadata"]["name"]): document
    for path in FILES
    for document in yaml.safe_load_all(path.read_text())
}
DEPLOYMENTS = {name: document for (kind, name), document in OBJECTS.items() if kind == "Deployment"}
SERVICE = DEPLOYMENTS["dinov2"]


def pod(deployment: dict[str, Any]) -> dict[str, Any]:
    return deployment["spec"]["template"]["spec"]


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    [only] = pod(deployment)["containers"]
    return only


def seconds_until_given_up(probe: dict[str, Any]) -> int:
    return probe["periodSeconds"] * probe["failureThreshold"]


def test_the_schemas_of_kubernetes_accept_every_object() -> None:
    """Needs the package kubernetes-validate, which is too large (108 MB) to be a dependency of the tests."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    for document in [*OBJECTS.values(), *yaml.safe_load_all((FOLDER.parent / "training/kubernetes.yaml").read_text())]:
        if document["kind"] != "ServiceMonitor":
            kubernetes_validate.validate(document, "1.37", strict=True)


def test_every_object_has_the_current_version_and_its_own_name() -> None:
    documents = [document for path in FILES for document in yaml.safe_load_all(path.read_text())]
    assert len(documents) == len(OBJECTS)
    for (kind, _), document in OBJECTS.items():
        assert document["apiVersion"] == VERSIONS[kind]
        assert set(document) == {"apiVersion", "kind", "metadata", "spec"}


def test_the_kustomization_names_every_file_that_needs_nothing_else() -> None:
    optional = {"worker.yaml", "servicemonitor.yaml"}  # a large image, and the Prometheus operator
    assert set(KUSTOMIZATION["resources"]) == {path.name for path in FILES} - optional
    assert all((FOLDER / name).is_file() for name in KUSTOMIZATION["resources"])


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_pods_keep_only_what_they_need(name: str) -> None:
    spec, only = pod(DEPLOYMENTS[name]), container(DEPLOYMENTS[name])
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert only["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert only["resources"]["limits"]["memory"]
    assert only["resources"]["limits"]["ephemeral-storage"]
    assert only["resources"]["requests"]["cpu"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)


def test_a_training_keeps_only_what_it_needs() -> None:
    documents = list(yaml.safe_load_all((FOLDER.parent / "training" / "kubernetes.yaml").read_text()))
    [job] = [document for document in documents if document["kind"] == "Job"]
    spec = pod(job)
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }


def test_nothing_connects_to_the_worker() -> None:
    policy = OBJECTS["NetworkPolicy", "dinov2-worker"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    assert "ingress" not in policy
    assert policy["podSelector"] == DEPLOYMENTS["dinov2-worker"]["spec"]["selector"]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_kubernetes_sets_no_variables_for_services(name: str) -> None:
    """DINOV2_PORT=tcp://... of a Service named dinov2 would be read as a setting, and the service would not start."""
    assert pod(DEPLOYMENTS[name])["enableServiceLinks"] is False


@pytest.mark.parametrize("name", ["dinov2", "dinov2-worker"])
def test_settings_exist_and_the_user_is_that_of_the_image(name: str) -> None:
    given = {variable["name"] for variable in container(DEPLOYMENTS[name])["env"]}
    assert given <= {f"DINOV2_{field.upper()}" for field in Settings.model_fields}
    dockerfile = (FOLDER.parents[1] / "Dockerfile").read_text()
    context = pod(DEPLOYMENTS[name])["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}" in dockerfile
    assert context["fsGroup"] == context["runAsGroup"]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_volume_is_mounted_and_every_mount_has_a_volume(name: str) -> None:
    volumes = {volume["name"] for volume in pod(DEPLOYMENTS[name])["volumes"]}
    mounts = {mount["name"] for mount in container(DEPLOYMENTS[name])["volumeMounts"]}
    assert volumes == mounts
    assert "/tmp" in {mount["mountPath"] for mount in container(DEPLOYMENTS[name])["volumeMounts"]}


def test_pods_that_share_the_data_are_on_one_node() -> None:
    claim = OBJECTS["PersistentVolumeClaim", "dinov2-data"]["spec"]
    assert claim["accessModes"] == ["ReadWriteOnce"]
    for name in ("dinov2", "dinov2-worker"):
        spec = pod(DEPLOYMENTS[name])
        [rule] = spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert rule["topologyKey"] == "kubernetes.io/hostname"
        assert rule["labelSelector"] == SERVICE["spec"]["selector"]
        [data] = [volume for volume in spec["volumes"] if volume["name"] == "data"]
        assert data["persistentVolumeClaim"] == {"claimName": "dinov2-data"}


def test_probes_ask_the_right_routes_and_a_first_start_has_an_hour() -> None:
    only = container(SERVICE)
    assert only["startupProbe"]["httpGet"] == only["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    assert only["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "http"}
    assert seconds_until_given_up(only["startupProbe"]) >= 3600
    assert seconds_until_given_up(only["livenessProbe"]) >= 30
    assert seconds_until_given_up(only["readinessProbe"]) < seconds_until_given_up(only["livenessProbe"])
    port = Settings.model_fields["port"].default
    assert only["ports"] == [{"name": "http", "containerPort": port}]


def test_a_stopping_pod_first_leaves_the_service_and_then_has_its_grace() -> None:
    pause_s = int(container(SERVICE)["lifecycle"]["preStop"]["exec"]["command"][1])
    grace_s = Settings.model_fields["shutdown_grace_s"].default
    assert pause_s >= 3
    assert pod(SERVICE)["terminationGracePeriodSeconds"] > pause_s + grace_s + 8


def test_an_update_never_mixes_two_models() -> None:
    """Old and new pods serve at the same time, so the model has a name and is not the newest one."""
    [model] = [variable["value"] for variable in container(SERVICE)["env"] if variable["name"] == "DINOV2_MODEL"]
    assert model not in ("", "auto")
    assert SERVICE["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert container(SERVICE)["image"] == KUSTOMIZATION["images"][0]["name"]


def test_selectors_select_the_pods() -> None:
    for name, deployment in DEPLOYMENTS.items():
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
        service = OBJECTS.get(("Service", name))
        if service:
            assert service["spec"]["selector"].items() <= labels.items()
            named = {port["name"] for port in container(deployment)["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= named
    monitor = OBJECTS["ServiceMonitor", "dinov2"]["spec"]
    service = OBJECTS["Service", "dinov2"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_the_number_of_pods_is_that_of_the_autoscaler() -> None:
    scaler = OBJECTS["HorizontalPodAutoscaler", "dinov2"]["spec"]
    budget = OBJECTS["PodDisruptionBudget", "dinov2"]["spec"]
    assert "replicas" not in SERVICE["spec"]  # each `kubectl apply` would undo the scaling
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "dinov2"}
    assert 1 <= budget["minAvailable"] < scaler["minReplicas"] <= scaler["maxReplicas"]
    assert budget["selector"] == SERVICE["spec"]["selector"]


def test_only_our_pods_reach_redis_and_its_password_is_a_secret() -> None:
    [rule] = OBJECTS["NetworkPolicy", "dinov2-redis"]["spec"]["ingress"]
    [source] = rule["from"]
    ours = source["podSelector"]["matchLabels"].items()
    for name in ("dinov2", "dinov2-worker"):
        assert ours <= DEPLOYMENTS[name]["spec"]["template"]["metadata"]["labels"].items()
    assert not ours <= DEPLOYMENTS["dinov2-redis"]["spec"]["template"]["metadata"]["labels"].items()
    for deployment in DEPLOYMENTS.values():
        [secret] = [volume["secret"] for volume in pod(deployment)["volumes"] if "secret" in volume]
        assert secret == {"secretName": "dinov2-redis"}
    assert not [kind for kind, _ in OBJECTS if kind == "Secret"]


def patched(document: dict[str, Any], operations: list[dict[str, Any]]) -> dict[str, Any]:
    """Apply the operations `add` and `replace` of a JSON patch, as kustomize does."""
    result = copy.deepcopy(document)
    for operation in operations:
        *parents, last = (
            part.replace("~1", "/").replace("~0", "~") for part in operation["path"].removeprefix("/").split("/")
        )
        target: Any = result
        for part in parents:
            target = target[int(part) if isinstance(target, list) else part]
        assert operation["op"] in ("add", "replace")
        assert operation["op"] == "add" or last in target
        target[last] = operation["value"]
    return result


def test_the_overlay_for_gpus_asks_for_one_gpu_and_no_spare_one() -> None:
    overlay = yaml.safe_load((FOLDER / "gpu" / "kustomization.yaml").read_text())
    assert overlay["resources"] == [".."]
    changed = {}
    for patch in overlay["patches"]:
        target = (patch["target"]["kind"], patch["target"]["name"])
        changed[target] = patched(OBJECTS[target], yaml.safe_load(patch["patch"]))
    deployment = changed["Deployment", "dinov2"]
    assert container(deployment)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    scaler = changed["HorizontalPodAutoscaler", "dinov2"]["spec"]
    assert scaler["minReplicas"] == scaler["maxReplicas"]
