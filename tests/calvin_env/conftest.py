"""A calvin_env checkout for these tests: the one that CALVIN_ROOT names, or a visible skip."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def calvin_root() -> Path:
    root = os.environ.get("CALVIN_ROOT")
    if not root:
        pytest.skip("CALVIN_ROOT is not set: needs a checkout of mees/calvin_env (docs/evaluation.md)")
    return Path(root)


@pytest.fixture
def simulator(calvin_root: Path) -> Iterator[object]:
    """One that draws nothing, which makes a step fifty times faster."""
    from robodual_client.calvin.environment import CalvinEnvironment

    simulator = CalvinEnvironment(calvin_root, cameras=())
    yield simulator
    simulator.close()
