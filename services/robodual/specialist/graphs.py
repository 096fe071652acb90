"""A step captured as a CUDA graph for each shape of its inputs: one launch instead of two thousand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import structlog
import torch
from torch import Tensor

from robodual.specialist.step import Inputs

logger = structlog.get_logger(__name__)

MOST = 32  # graphs kept; a shape beyond them runs without
WARMUP = 3  # runs before a capture, so that libraries have chosen and allocated

_capturing = threading.Lock()  # a process captures one graph at a time: beginning one empties every device's cache


class Graphs:
    """Calls a function of `Inputs` on a GPU by replaying what it did on inputs of the same shapes.

    The graphs share their memory, so one thread calls, and what a replay gives is copied before the next.
    """

    def __init__(self, function: Callable[[Inputs], tuple[Tensor, Tensor]], device: torch.device) -> None:
        self._function = function
        self._device = device
        # Of this device: torch's own capture stream belongs to the device that captured first.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._captured: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Inputs, tuple[Tensor, Tensor]]] = {}
        self._pool = torch.cuda.graph_pool_handle()
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
        own = torch.cuda.current_stream(self._device)
        # The outer stream context: a capture that fails leaves its stream behind as the current one.
        with _capturing, torch.cuda.device(self._device), torch.cuda.stream(own):
            self._stream.wait_stream(own)
            with torch.cuda.stream(self._stream):
                for _ in range(WARMUP):
                    self._function(static)
            own.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use their devices meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = self._function(static)
        return graph, static, outputs
