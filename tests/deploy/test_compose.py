"""docker-compose.yml: against its published schema, and against what it refers to."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from robodual.serving.settings import GeneralistSettings, Settings, SpecialistSettings

yaml = pytest.importorskip("yaml", reason="needs PyYAML, which the extra dev brings")

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
PAIR = ["generalist", "specialist", "generalist-cpu", "specialist-cpu"]


def test_it_follows_the_compose_specification() -> None:
    pytest.importorskip("check_jsonschema", reason="the schema comes with check-jsonschema, of the extra dev")
    jsonschema = pytest.importorskip("jsonschema")
    schema = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"

    jsonschema.validate(COMPOSE, json.loads(schema.read_text()))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"services": {"redis": {"imagge": "valkey"}}}, json.loads(schema.read_text()))


def test_the_profiles_are_those_of_the_deployment_page() -> None:
    profiles = {profile for service in SERVICES.values() for profile in service.get("profiles", [])}

    assert profiles == {"gpu", "cpu", "calvin", "monitoring"}
    page = (ROOT / "docs" / "deployment.md").read_text()
    assert all(f"`{profile}`" in page for profile in profiles)


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_mounts_and_builds_is_there(name: str) -> None:
    service = SERVICES[name]
    for mount in service.get("volumes", []):
        source = mount.partition(":")[0]
        if source.startswith("./deploy"):
            assert (ROOT / source).exists(), mount
    build = service.get("build")
    if build:
        stages = re.findall(r"^FROM \S+ AS (\S+)", (ROOT / build["dockerfile"]).read_text(), re.MULTILINE)
        assert build.get("target") in (None, *stages)
    assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])


@pytest.mark.parametrize("name", PAIR)
def test_the_pair_is_told_only_what_it_knows(name: str) -> None:
    kind = GeneralistSettings if name.startswith("generalist") else SpecialistSettings
    for variable in SERVICES[name]["environment"]:
        own = variable.removeprefix(f"ROBODUAL_{kind.service.upper()}_").lower()
        assert own in kind.model_fields or variable.removeprefix("ROBODUAL_").lower() in Settings.model_fields


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_has_more_rights_than_it_needs_or_a_port_beyond_this_machine(name: str) -> None:
    service = SERVICES[name]
    if name != "calvin":
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_passwords_and_tokens_come_as_files() -> None:
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            if re.search("TOKEN|PASSWORD|SECRET|REDIS_URL", variable):
                assert variable.endswith("__FILE") or value == "${ROBODUAL_TOKEN:-}", variable


@pytest.mark.parametrize("name", ["specialist", "specialist-cpu"])
def test_a_specialist_can_be_scaled(name: str) -> None:
    service: dict[str, Any] = SERVICES[name]

    assert "container_name" not in service
    # A range that is longer than the replicas are many gives one that restarts another port each time.
    assert service["ports"] == [
        "127.0.0.1:${SPECIALIST_PORTS:-50052}:50052",
        "127.0.0.1:${SPECIALIST_HTTP_PORTS:-8052}:8052",
    ]


def test_gpus_are_reserved() -> None:
    for name in ("generalist", "specialist"):
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
        assert SERVICES[name]["environment"]["ROBODUAL_DEVICE"] == "cuda", "without a GPU it would serve from the CPU"
