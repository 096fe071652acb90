"""Confidence intervals for success rates and average chain lengths."""

from __future__ import annotations

import math
from typing import Sequence

import numpy as np

RESAMPLES = 10_000


def wilson(successes: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion (E. B. Wilson, 1927), 95 % by default; (0, 1) for no trials."""
    if total == 0:
        return 0.0, 1.0
    share = successes / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def sign_flip(differences: Sequence[int]) -> float:
    """The probability of a mean as far from 0 if each paired difference could as well have had the other sign: R. A.
    Fisher's randomisation test, two-sided and exact. Over 5 % wherever fewer than six differ.
    """
    reach = sum(map(abs, differences))
    chances = np.zeros(2 * reach + 1)  # of each sum from -reach to reach
    chances[reach] = 1.0
    for difference in differences:
        chances = (np.roll(chances, difference) + np.roll(chances, -difference)) / 2
    far = np.abs(np.arange(-reach, reach + 1)) >= abs(sum(differences))
    return min(1.0, float(chances[far].sum()))


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean, from 10,000 resamples. Raises ValueError for no values."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise ValueError("a bootstrap needs at least one value")
    random = np.random.default_rng(seed)
    means = [sample[random.integers(0, sample.size, sample.size)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
