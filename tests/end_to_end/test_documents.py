"""The documents say what is there."""

from __future__ import annotations

import re
from itertools import cycle
from pathlib import Path

import pytest
from pydantic import SecretStr

from robodual.serving.settings import GeneralistSettings, Settings, SpecialistSettings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "clients" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("kind", [GeneralistSettings, SpecialistSettings])
def test_every_setting_is_in_the_deployment_page(kind: type[GeneralistSettings | SpecialistSettings]) -> None:
    described = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "deployment.md").read_text()))

    assert set(kind.model_fields) <= described


@pytest.mark.parametrize(
    ("heading", "kind"),
    [("Both services", Settings), ("Generalist", GeneralistSettings), ("Specialist", SpecialistSettings)],
)
def test_the_settings_tables_are_those_of_the_code(heading: str, kind: type[Settings]) -> None:
    page = (ROOT / "docs" / "deployment.md").read_text()
    section = re.search(rf"^### {heading}\n\n\| setting \| default \| \|\n\|.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert section
    documented: dict[str, str] = {}
    for row in section[1].splitlines():
        names, default = row.strip("|").split("|")[:2]
        for name, value in zip(re.findall(r"`(\w+)`", names), cycle(default.split(","))):
            documented[name] = value.strip().strip("`")

    inherited = set() if kind is Settings else set(Settings.model_fields)
    assert set(documented) == set(kind.model_fields) - inherited
    for name, value in documented.items():
        default = kind.model_fields[name].default
        plain = default.get_secret_value() if isinstance(default, SecretStr) else default
        if isinstance(plain, bool):
            assert value == str(plain).lower(), name
        elif isinstance(plain, int | float):
            assert float(value) == plain, name
        elif isinstance(plain, str):
            assert value == plain, name
        else:
            assert value.startswith(("none", "the ")), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())

    missing = [t for t in targets if not t.startswith(("http://", "https://")) and not (page.parent / t).exists()]
    assert not missing
