"""What is known of a scenario once its robots came through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Report = Callable[..., None]


@dataclass(frozen=True)
class Row:
    """One scenario: what went away and for how long, how long after it was back everybody had an answer."""

    scenario: str
    away: float
    recovered: float
    longest: float
    answers: int
    errors: int
