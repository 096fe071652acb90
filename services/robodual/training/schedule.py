"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0, then `cycles` of a cosine; constant where `cycles` is 0.

    torchtune's get_cosine_schedule_with_warmup, which the published specialist is trained with (0.4 cycles: the rate
    ends at a tenth of its peak).
    """

    peak: float
    steps: int
    warmup: int = 0
    cycles: float = 0.0

    def __call__(self, step: int) -> float:
        """The rate of optimiser step `step`, from 0."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak * max(0.0, 0.5 * (1 + math.cos(2 * math.pi * self.cycles * progress)))
