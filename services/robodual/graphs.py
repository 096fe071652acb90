"""A function of tensors captured as a CUDA graph for each shape of its inputs: one launch instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robodual.capture import Recorder, Shapes

MOST = 32  # graphs kept; a shape beyond them runs without

Inputs = list[Tensor | None]
Outputs = tuple[Tensor, ...]


class Graphs:
    """Calls a function on a GPU by replaying what it did on inputs of the same shapes.

    The graphs share their memory, so one thread calls, and what a replay gives is copied before the next.
    """

    def __init__(self, function: Callable[..., Outputs], device: torch.device, name: str) -> None:
        """`name` is what the function does, for the log."""
        self._function = function
        self._shapes: Shapes[tuple[torch.Size | None, ...], tuple[Inputs, Outputs]] = Shapes(
            Recorder(device), name, MOST
        )

    def __call__(self, *inputs: Tensor | None) -> Outputs:
        """What the function gives; the tensors are the caller's own."""
        key = tuple(None if tensor is None else tensor.shape for tensor in inputs)
        static: Inputs = []

        def function() -> tuple[Inputs, Outputs]:
            if not static:  # before the capture, in the first of the runs that warm up
                with torch.inference_mode(False):  # in which others are never written to outside of it
                    static.extend(None if tensor is None else tensor.detach().clone() for tensor in inputs)
            return static, self._function(*static)

        found = self._shapes.find(key, function)
        if found is None:
            return self._function(*inputs)
        graph, (targets, outputs) = found
        for target, source in zip(targets, inputs, strict=True):
            if target is not None and source is not None:
                target.copy_(source, non_blocking=True)
        graph.replay()
        return tuple(output.clone() for output in outputs)
