from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from robodual_client.calvin import Options  # noqa: E402


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Options]:
    """Options of a run on the fake table, in a folder of its own."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))

    def make(name: str = "run", numbers: tuple[int, ...] = tuple(range(8)), **changes: Any) -> Options:
        given = {"env": "fake_table:FakeTable", "policy": "fake_table:Scripted", "ep_len": 20, **changes}
        return Options(out=tmp_path / name, numbers=numbers, **given)

    return make
