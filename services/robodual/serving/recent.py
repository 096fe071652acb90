"""The latest of what happened, of bounded number."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Keeps the latest `most` things, and counts all: a reader asks for what was added after a count it has seen."""

    def __init__(self, most: int) -> None:
        self.count = 0
        self._kept: deque[T] = deque(maxlen=most)

    def add(self, thing: T) -> None:
        self._kept.append(thing)
        self.count += 1

    @property
    def newest(self) -> T | None:
        return self._kept[-1] if self._kept else None

    def since(self, count: int) -> list[T]:
        """What was added after the first `count`, as far as it is kept; oldest first."""
        return list(islice(self._kept, max(0, len(self._kept) - (self.count - count)), None))
