"""The published simulator through both real services: `robodual-client evaluate --env calvin`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from robodual_client.calvin.results import load
from robodual_client.cli import main

pytestmark = pytest.mark.skipif(
    "CALVIN_ROOT" not in os.environ, reason="CALVIN_ROOT is not set: needs a checkout of calvin_env"
)


@pytest.fixture
def addresses() -> Iterator[dict[str, str]]:
    pairs: Any = pytest.importorskip("robodual.pair", reason="needs the services, on Python 3.10 or newer")
    with pairs.Pair(pairs.Options()) as pair:
        yield pair.addresses


@pytest.mark.slow
def test_sequences_run_end_to_end_and_say_what_they_ran_on(addresses: dict[str, str], tmp_path: Path) -> None:
    command = ["evaluate", "--env", "calvin", "--render", "cpu", "--num-sequences", "2", "--ep-len", "18"]
    out = tmp_path / "run"
    main([*command, *(f"--{name}={address}" for name, address in addresses.items()), "--out", str(out)])
    run = load(out)
    assert sorted(run.sequences) == [0, 1]
    assert run.steps >= 36
    assert max(run.ages()) == 7  # the published schedule
    assert len(run.milliseconds("act")) == run.steps
    assert run.provenance[0]["environment"]["scene"] == "scene D"
    assert run.provenance[0]["environment"]["simulator"].startswith("calvin_env ")
    assert {info["profile"] for info in run.provenance[0]["services"].values()} == {"toy"}
    assert (out / "report.html").is_file()
