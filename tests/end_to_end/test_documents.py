"""The documents say what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from robodual.serving.settings import GeneralistSettings, SpecialistSettings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "clients" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("kind", [GeneralistSettings, SpecialistSettings])
def test_every_setting_is_in_the_deployment_page(kind: type[GeneralistSettings | SpecialistSettings]) -> None:
    described = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "deployment.md").read_text()))

    assert set(kind.model_fields) <= described


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())

    missing = [t for t in targets if not t.startswith(("http://", "https://")) and not (page.parent / t).exists()]
    assert not missing
