"""deploy/kubernetes: against Kubernetes' published schemas, and against itself."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from robodual.serving.settings import GeneralistSettings, Settings, SpecialistSettings

yaml = pytest.importorskip("yaml", reason="needs PyYAML, which the extra dev brings")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
RESOURCES: list[dict[str, Any]] = [
    resource for name in KUSTOMIZATION["resources"] for resource in yaml.safe_load_all((FOLDER / name).read_text())
]
NAMES = [f"{resource['kind']} {resource['metadata']['name']}" for resource in RESOURCES]


def of(kind: str) -> dict[str, dict[str, Any]]:
    return {resource["metadata"]["name"]: resource for resource in RESOURCES if resource["kind"] == kind}


def pod(deployment: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("resource", RESOURCES, ids=NAMES)
def test_every_manifest_follows_the_schema_of_its_kind(resource: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate, of the extra dev")

    for version in ("1.30", "1.34"):
        validator.validate(resource, version, strict=True)


def test_an_unknown_field_would_be_noticed() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate, of the extra dev")
    wrong = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"porst": []}}

    with pytest.raises(validator.ValidationError):
        validator.validate(wrong, "1.34", strict=True)


def test_every_file_is_in_the_kustomization() -> None:
    files = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}

    assert files == set(KUSTOMIZATION["resources"])


@pytest.mark.parametrize("overlay", ["kubernetes", "kubernetes-cpu"])
def test_kustomize_builds_it(overlay: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl")
    built = subprocess.run(
        [kubectl, "kustomize", str(ROOT / "deploy" / overlay)], capture_output=True, text=True, check=True
    )
    resources = list(yaml.safe_load_all(built.stdout))

    containers = [c for r in resources if r["kind"] == "Deployment" for c in pod(r)["containers"]]
    assert len(containers) == 3
    gpus = sum("nvidia.com/gpu" in container["resources"]["limits"] for container in containers)
    images = {container["image"] for container in containers}
    if overlay == "kubernetes":
        assert gpus == 2
        assert images > {"robodual-generalist:0.1.0", "robodual-specialist:0.1.0-cuda"}
    else:
        assert gpus == 0
        assert images > {"robodual-specialist:0.1.0-cpu"}
        assert all("models" not in str(container) for container in containers)


def test_secrets_are_referred_to_and_never_written() -> None:
    assert not of("Secret")
    mounted = {
        volume["secret"]["secretName"]
        for d in of("Deployment").values()
        for volume in pod(d)["volumes"]
        if "secret" in volume
    }
    created = set(re.findall(r"create secret generic (\S+)", (FOLDER / "kustomization.yaml").read_text()))
    assert mounted == created


def test_selectors_find_their_pods() -> None:
    labels = {name: d["spec"]["template"]["metadata"]["labels"] for name, d in of("Deployment").items()}
    for name, service in of("Service").items():
        assert service["spec"]["selector"] == labels[name]
    for name, budget in of("PodDisruptionBudget").items():
        assert budget["spec"]["selector"]["matchLabels"] == labels[name]
    assert set(of("PodDisruptionBudget")) == set(labels)
    for name, deployment in of("Deployment").items():
        assert deployment["spec"]["selector"]["matchLabels"] == labels[name]


@pytest.mark.parametrize("name", of("Deployment"))
def test_every_pod_is_probed_and_locked_down(name: str) -> None:
    spec = pod(of("Deployment")[name])
    (container,) = spec["containers"]

    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {"readinessProbe", "livenessProbe"} <= set(container)
    assert "memory" in container["resources"]["limits"]
    names = {port["name"] for port in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        check = container.get(probe, {}).get("httpGet")
        if check:
            assert check["port"] in names
            assert check["path"] == ("/healthz" if probe == "livenessProbe" else "/readyz")


@pytest.mark.parametrize("kind", [GeneralistSettings, SpecialistSettings])
def test_the_services_are_told_only_what_they_know(kind: type[GeneralistSettings | SpecialistSettings]) -> None:
    (container,) = pod(of("Deployment")[kind.service])["containers"]
    for variable in (entry["name"] for entry in container["env"]):
        own = variable.removeprefix(f"ROBODUAL_{kind.service.upper()}_").lower()
        assert own in kind.model_fields or variable.removeprefix("ROBODUAL_").lower() in Settings.model_fields
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": kind.model_fields["port"].default, "http": kind.model_fields["http_port"].default}


def test_a_pod_gets_longer_to_end_than_its_service_takes_to_drain() -> None:
    for name in ("generalist", "specialist"):
        grace = pod(of("Deployment")[name])["terminationGracePeriodSeconds"]
        assert grace > 2 * Settings.model_fields["shutdown_grace"].default


def test_clients_see_every_specialist_and_the_autoscaler_owns_their_number() -> None:
    assert of("Service")["specialist"]["spec"]["clusterIP"] == "None"
    scaler = of("HorizontalPodAutoscaler")["specialist"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == "specialist"
    assert [metric["pods"]["metric"]["name"] for metric in scaler["metrics"]] == ["robodual_queue_depth"]
    assert "replicas" not in of("Deployment")["specialist"]["spec"]


def test_the_network_is_closed_but_for_what_is_named() -> None:
    policies = of("NetworkPolicy")
    everything = policies["default-deny"]["spec"]
    assert (everything["podSelector"], sorted(everything["policyTypes"])) == ({}, ["Egress", "Ingress"])
    names = {port["name"] for d in of("Deployment").values() for c in pod(d)["containers"] for port in c["ports"]}
    for policy in policies.values():
        for rule in [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]:
            assert rule["ports"], "a rule without ports opens all of them"
            assert all(isinstance(port["port"], int) or port["port"] in names for port in rule["ports"])
