"""What the soak calls a leak."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

STRETCH = 60  # seconds, a look at each


@pytest.mark.parametrize(
    ("growth", "dip", "found"),
    [
        (0.0, 0.0, []),
        (10.0, 0.0, ["memory of generalist: at least 460.0 MiB, then 490.0; in the median 470.0 MiB, then 500.0"]),
        (0.0, 20.0, []),  # given back for a moment, and taken again
    ],
    ids=["steady", "a leak", "a dip"],
)
def test_a_leak_is_told_from_what_an_allocator_gives_back_for_a_moment(
    load: Callable[[str], ModuleType], growth: float, dip: float, found: list[str]
) -> None:
    soak = load("soak")
    record = soak.Record(STRETCH)
    record.began -= STRETCH
    for second in range(STRETCH):
        record.steps[second] = second, 0.03
        for name in soak.PROCESSES:
            leaked = growth * (second // 10) if name == "generalist" else 0.0
            record.looks[name][second] = second, (460.0 + leaked - dip * (second == 20)) * 2**20, 30
    assert soak.complaints(record, 0.0, growth=1.02, flat=1.2) == found
