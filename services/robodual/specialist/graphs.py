"""A step captured as a CUDA graph for each shape of its inputs: one launch instead of two thousand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import structlog
import torch
from torch import Tensor

from robodual.capture import Recorder
from robodual.specialist.step import Inputs

logger = structlog.get_logger(__name__)

MOST = 32  # graphs kept; a shape beyond them runs without


class Graphs:
    """Calls a function of `Inputs` on a GPU by replaying what it did on inputs of the same shapes.

    The graphs share their memory, so one thread calls, and what a replay gives is copied before the next.
    """

    def __init__(self, function: Callable[[Inputs], tuple[Tensor, Tensor]], device: torch.device) -> None:
        self._function = function
        self._record = Recorder(device)
        self._captured: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Inputs, tuple[Tensor, Tensor]]] = {}
        self._works = True

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """What the function gives; the tensors are the caller's own."""
        key = tuple(None if tensor is None else tensor.shape for tensor in vars(inputs).values())
        if key not in self._captured:
            if not self._works or len(self._captured) >= MOST:
                return self._function(inputs)
            try:
                self._captured[key] = self._capture(inputs)
            except RuntimeError as error:  # a driver or an operator that cannot be captured: slower, but as right
                self._works = False
                logger.warning("steps run without CUDA graphs", reason=str(error))
                return self._function(inputs)
        graph, static, outputs = self._captured[key]
        for field in fields(Inputs):
            target, source = getattr(static, field.name), getattr(inputs, field.name)
            if target is not None:
                target.copy_(source, non_blocking=True)
        graph.replay()
        chunks, following = outputs
        return chunks.clone(), following.clone()

    def _capture(self, inputs: Inputs) -> tuple[torch.cuda.CUDAGraph, Inputs, tuple[Tensor, Tensor]]:
        static = replace(inputs, **{name: t.clone() for name, t in vars(inputs).items() if t is not None})
        graph, outputs = self._record(lambda: self._function(static))
        return graph, static, outputs
