from __future__ import annotations

import pytest

from robodual_client import wire
from robodual_client.schedule import Schedule


def test_published_schedule_asks_at_the_steps_of_the_published_evaluation():
    schedule = Schedule.parse("published")
    assert [step for step in range(40) if schedule.waits(step)] == [0, 7, 15, 23, 31, 39]
    assert schedule.reference_window == wire.REFERENCE_WINDOW_PUBLISHED


@pytest.mark.parametrize(("name", "steps"), [("every-1", [0, 1, 2, 3]), ("every-3", [0, 3]), ("every-8", [0])])
def test_every_n_asks_at_multiples_of_n(name, steps):
    schedule = Schedule.parse(name)
    assert [step for step in range(4) if schedule.waits(step)] == steps
    assert schedule.reference_window == wire.REFERENCE_WINDOW_AGE


def test_async_waits_at_step_0_alone():
    schedule = Schedule.parse("async")
    assert [step for step in range(100) if schedule.waits(step)] == [0]
    assert schedule.asynchronous
    assert schedule.reference_window == wire.REFERENCE_WINDOW_AGE


@pytest.mark.parametrize(
    "name", ["", "every-0", "every--1", "every-n", "every-1.5", "Published", "every-123456", "sync"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="schedule must be 'published', 'async' or 'every-N'"):
        Schedule.parse(name)
