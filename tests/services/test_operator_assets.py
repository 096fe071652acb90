"""The operator's page as files: it needs nothing from elsewhere, and can be read."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from robodual.specialist.operator import pages

ASSETS = Path(pages.__file__).parent / "assets"


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing_inline() -> None:
    page = (ASSETS / "index.html").read_text()
    assert re.findall(r"<script[^>]*>[^<]+", page) == []
    assert re.findall(r"\s(?:on\w+|style)=", page) == []
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert {name for name in named if not (ASSETS / name).is_file()} == set()
    for file in ASSETS.iterdir():
        addresses = re.findall(r"(?:https?:)?//[a-z][^\s\"')]+", file.read_text())
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, file.name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_of_text_stands_out_from_what_is_behind_it(scheme: str) -> None:
    palettes = re.findall(r":root \{([^}]+)\}", (ASSETS / "page.css").read_text())
    colours = dict(re.findall(r"--(\w+): (#\w{6});", palettes[0 if scheme == "light" else 1]))

    def luminance(colour: str) -> float:  # WCAG 2.2
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    everywhere = ("text", "muted", "blue", "orange", "green", "amber", "red")
    pairs = [(text, ground) for text in everywhere for ground in ("ground", "card")]
    for text, ground in [*pairs, ("text", "wash"), ("muted", "wash"), ("amber", "wash")]:
        bright, dim = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (text, ground)
