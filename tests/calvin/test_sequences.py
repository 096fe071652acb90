from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from robodual_client.calvin.sequences import generate, published

RECORDED = Path(__file__).parents[1] / "data" / "calvin" / "sequences.json.gz"


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, Any]]:
    """All 1000, as the published code gave them."""
    rows: list[dict[str, Any]] = json.loads(gzip.decompress(RECORDED.read_bytes()))
    return rows


def test_the_thousand_sequences_are_the_published_ones(recorded: list[dict[str, Any]]) -> None:
    assert len(published()) == len(recorded) == 1000
    for sequence, row in zip(published(), recorded):
        assert (sequence.initial_state, list(sequence.tasks)) == (row["initial_state"], row["tasks"])


def test_each_initial_state_stands_for_the_published_observations(recorded: list[dict[str, Any]]) -> None:
    for sequence, row in zip(published(), recorded):
        robot_obs, scene_obs = sequence.observations()
        assert robot_obs.tolist() == row["robot_obs"]
        assert scene_obs.tolist() == row["scene_obs"]


@pytest.mark.slow
def test_the_generator_draws_exactly_the_sequences_that_are_shipped() -> None:
    assert generate() == published()


def test_first_tasks_are_spread_as_published() -> None:
    first = Counter(sequence.tasks[0] for sequence in published())
    assert not {"stack_block", "place_in_slider", "unstack_block"} & set(first)
    assert sum(first.values()) == 1000
