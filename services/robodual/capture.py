"""What a function does on a GPU, captured as a CUDA graph: one launch instead of hundreds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

Outputs = TypeVar("Outputs")

WARMUP = 3  # runs before a capture, so that libraries have chosen and allocated

_capturing = threading.Lock()  # a process captures one graph at a time: beginning one empties every device's cache


class Recorder:
    """Captures functions as graphs that share their memory, so one thread replays them, and one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Of this device: torch's own capture stream belongs to the device that captured first.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.renew()

    def renew(self) -> None:
        """Once all graphs are dropped: those to come share new memory, since a pool without graphs may be gone."""
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Outputs]) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        """The graph, and what the function returned, which a replay fills anew; the function is run `WARMUP` times.

        Raises RuntimeError if a driver or an operator cannot be captured; the current stream stays what it was.
        """
        own = torch.cuda.current_stream(self._device)
        # The outer stream context: a capture that fails leaves its stream behind as the current one.
        with _capturing, torch.cuda.device(self._device), torch.cuda.stream(own):
            self._stream.wait_stream(own)
            with torch.cuda.stream(self._stream):
                for _ in range(WARMUP):
                    function()
            own.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use their devices meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = function()
        return graph, outputs
