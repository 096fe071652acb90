"""What the fuzz tests share: how many inputs there are, and a real pair to send them to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from robodual.pair import Options, Pair

# A conditioning once is enough for a session, and nobody waits long for one.
SETTINGS = {"ROBODUAL_SPECIALIST_MAX_AGE_STEPS": "1000000", "ROBODUAL_SPECIALIST_MAX_WAIT": "0.2"}


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    with Pair(Options(settings=SETTINGS)) as started:
        yield started
