"""The moving average of the weights that is evaluated and served."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

POWER = 0.75
BETA = 0.9999
START = 101  # updates that only copy


def decay(update: int) -> float:
    """How much of the average update number `update` (from 1) keeps: 1 - (1 + n)^-0.75, at most 0.9999.

    ema-pytorch's schedule with the published power and beta, and its defaults otherwise: n counts from update 101 on,
    before which the average is a copy. At n = 10,000 it is 0.999.
    """
    counted = max(update - START, 0)
    return min(1 - float((1 + counted) ** -POWER), BETA)


class Average:
    """The average of named parameters, updated after every optimiser step.

    The published script updates before the optimiser's step, so that its average lags by one of 100,000 steps.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.values = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], update: int) -> None:
        """Takes in the parameters after optimiser step `update` (from 1)."""
        weight = 1 - decay(update)
        torch._foreach_lerp_(list(self.values.values()), [parameters[name].detach() for name in self.values], weight)
