"""Dashboard and alerts: every metric in them is one that the services expose, and every alert has its page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from robodual.pair import Options, Pair

yaml = pytest.importorskip("yaml", reason="needs PyYAML, which the extra dev brings")

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
ALERTS = [
    rule for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "robodual.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ADAPTER = (ROOT / "deploy" / "kubernetes" / "specialist.yaml").read_text()
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in ALERTS)
    yield from (target["expr"] for panel in PANELS for target in panel["targets"])


def plain(expression: str) -> str:
    """Without Grafana's variables."""
    return expression.replace("$__rate_interval", "5m").replace("$instance", ".*")


def names(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:robodual|process)_\w+", expression))


@pytest.fixture(scope="module")
def exposed() -> dict[str, dict[str, set[str]]]:
    """By service: each sample's name and its labels, scraped from the processes."""
    found: dict[str, dict[str, set[str]]] = {}
    with Pair(Options()) as pair:
        for service, port in pair.http_ports.items():
            text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
            samples: dict[str, set[str]] = {}
            for family in text_string_to_metric_families(text):
                for suffix in SUFFIXES.get(family.type, ("",)):
                    samples[family.name + suffix] = set()
                for sample in family.samples:
                    samples.setdefault(sample.name, set()).update(sample.labels)
            found[service] = samples
    return found


def test_every_metric_in_dashboard_and_alerts_is_exposed(exposed: dict[str, dict[str, set[str]]]) -> None:
    both = set(exposed["generalist"]) & set(exposed["specialist"])

    asked = set().union(*(names(expression) for expression in expressions()), names(ADAPTER))
    assert len(asked) > 15
    assert asked <= both


def test_every_metric_of_ours_is_looked_at(exposed: dict[str, dict[str, set[str]]]) -> None:
    families = {re.sub(r"_(total|bucket|sum|count|created)$", "", name) for name in exposed["specialist"]}

    shown = {re.sub(r"_(total|bucket|sum|count)$", "", name) for e in expressions() for name in names(e)}
    assert {name for name in families if name.startswith("robodual_")} <= shown


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_every_expression_is_promql(expression: str) -> None:
    parser = pytest.importorskip("promql_parser", reason="needs promql-parser, of the extra dev")

    parser.parse(plain(expression))


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_is_well_formed_and_has_its_section(rule: dict[str, Any]) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"]
    assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))
    page = (ROOT / "docs" / "operations.md").read_text()
    section = re.search(rf"^### {rule['alert']}\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
    assert section, "docs/operations.md says nothing of it"
    assert "**Do**" in section[1]


def test_the_page_has_no_alert_that_is_gone() -> None:
    sections = re.findall(r"^### (Robodual\w+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)

    assert sections == [rule["alert"] for rule in ALERTS]


def test_promtool_accepts_rules_and_configuration_and_the_alerts_fire_when_they_should() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool, of Debian's package prometheus")
    for command in (["check", "rules", "alerts.yml"], ["check", "config", "--syntax-only", "prometheus.yml"]):
        subprocess.run([promtool, *command], cwd=PROMETHEUS, check=True)
    subprocess.run([promtool, "test", "rules", str(Path(__file__).with_name("alerts_fire.yml"))], check=True)


def test_the_dashboard_can_be_loaded() -> None:
    assert DASHBOARD["uid"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken = {(x, y) for p in DASHBOARD["panels"] for x, y in _cells(p["gridPos"])}
    assert len(taken) == sum(p["gridPos"]["w"] * p["gridPos"]["h"] for p in DASHBOARD["panels"]), "panels overlap"
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    assert source["datasources"][0]["type"] == "prometheus"


def _cells(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    for x in range(place["x"], place["x"] + place["w"]):
        for y in range(place["y"], place["y"] + place["h"]):
            yield x, y
