"""What a function does on a GPU, captured as a CUDA graph: one launch instead of hundreds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import structlog
import torch

logger = structlog.get_logger(__name__)

Key = TypeVar("Key", bound=Hashable)
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
        """Has the graphs to come share new memory, once all are dropped or one failed: a pool without may be gone."""
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


class Shapes(Generic[Key, Outputs]):
    """The graphs of one function, a graph for each shape of what it works on."""

    def __init__(self, record: Recorder, name: str, most: int) -> None:
        """`name` is what the function does, for the log; a shape beyond `most` has no graph."""
        self.works = True
        self._record = record
        self._name = name
        self._most = most
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        self._too_large: set[Key] = set()

    def is_to_come(self, key: Key) -> bool:
        """Whether `find` will run the function to capture it."""
        known = key in self._graphs or key in self._too_large
        return not known and self.works and len(self._graphs) < self._most

    def find(self, key: Key, function: Callable[[], Outputs]) -> tuple[torch.cuda.CUDAGraph, Outputs] | None:
        """The graph of a shape and its outputs, captured from `function` when the shape first comes.

        None where there is none: too many, no memory for this one, or a driver or an operator that cannot be captured,
        once and for all.
        """
        if self.is_to_come(key):
            try:
                self._graphs[key] = self._record(function)
            except torch.OutOfMemoryError as error:
                self._too_large.add(key)
                self._record.renew()
                logger.warning(f"{self._name} without a CUDA graph for one shape", shape=key, reason=str(error))
            except RuntimeError as error:  # slower, but as right
                self.works = False
                self._record.renew()
                logger.warning(f"{self._name} without CUDA graphs", reason=str(error))
        return self._graphs.get(key)

    def clear(self) -> None:
        """Drops them all."""
        self._graphs.clear()
