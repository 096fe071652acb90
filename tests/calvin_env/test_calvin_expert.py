"""The scripted expert does published sequences in the published simulator: environment, oracle and runner agree."""

from __future__ import annotations

from typing import Any

import pytest

from robodual_client.calvin.annotations import load
from robodual_client.calvin.rollout import run_sequence
from robodual_client.calvin.sequences import published
from robodual_client.playtable.expert import Expert


def _run(simulator: Any, number: int) -> tuple[int, list[int]]:
    record = run_sequence(simulator, Expert(simulator), published()[number], load())
    return record.solved, record.steps


@pytest.mark.slow
def test_the_expert_completes_most_of_the_first_sequences(simulator: Any) -> None:
    solved = [_run(simulator, number)[0] for number in range(3)]
    assert sum(solved) >= 11


def test_a_sequence_goes_the_same_way_whatever_the_worker_ran_before(simulator: Any) -> None:
    first = _run(simulator, 5)
    _run(simulator, 8)
    assert _run(simulator, 5) == first
