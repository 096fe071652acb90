"""A histogram of durations that stays small, and merges exactly, however many steps it counts."""

from __future__ import annotations

import math
from collections import Counter
from typing import Iterable, Mapping

_GROWTH = math.log(1.05)


class Histogram:
    """Counts of positive values in bins that are 5 % wide each, so that a quantile is right to 2.5 %."""

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts: Counter[int] = Counter(counts or {})

    def add(self, value: float) -> None:
        """Counts one value; anything below 0.01 as 0.01."""
        self.counts[math.floor(math.log(max(value, 1e-2)) / _GROWTH)] += 1

    def __len__(self) -> int:
        return sum(self.counts.values())

    def quantile(self, q: float) -> float:
        """The value that a share `q` (0 to 1) of the counted ones do not exceed. Raises ValueError when empty."""
        if not self.counts:
            raise ValueError("an empty histogram has no quantiles")
        rank, seen = q * len(self), 0
        for index in sorted(self.counts):
            seen += self.counts[index]
            if seen >= rank:
                break
        return math.exp((index + 0.5) * _GROWTH)

    def columns(self, most: int) -> tuple[list[float], list[int]]:
        """Edges (n + 1) and counts (n, at most `most`) of columns of equal width in the logarithm. The outermost
        thousandth on either side is left out. Raises ValueError when empty."""
        first, last = (math.floor(math.log(self.quantile(q)) / _GROWTH) for q in (0.001, 0.999))
        width = math.ceil((last + 1 - first) / most)
        starts = range(first, last + 1, width)
        counts = [sum(self.counts[start + offset] for offset in range(width)) for start in starts]
        return [math.exp((first + width * index) * _GROWTH) for index in range(len(counts) + 1)], counts

    def to_json(self) -> dict[str, int]:
        return {str(index): self.counts[index] for index in sorted(self.counts)}

    @classmethod
    def from_json(cls, counts: Mapping[str, int]) -> Histogram:
        return cls({int(index): int(count) for index, count in counts.items()})

    @classmethod
    def merged(cls, histograms: Iterable[Histogram]) -> Histogram:
        total = cls()
        for histogram in histograms:
            total.counts.update(histogram.counts)
        return total
