"""A CUDA graph for a CPU: the operations that a function ran, run again on the same tensors, without its Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import pretended
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robodual import staging


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = operation(*arguments, **(named or {}))
        self.operations.append((operation, arguments, named or {}, result))
        return result


class Graph:
    """What `torch.cuda.CUDAGraph` is on a GPU."""

    replays = 0

    def __init__(self) -> None:
        self.recording = Recording()

    def replay(self) -> None:
        type(self).replays += 1
        for operation, arguments, named, result in self.recording.operations:
            again = operation(*arguments, **named)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # else a view, or in place
                    old.copy_(new)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class Cuda:
    """What a capture asks of torch.cuda. `capturable` False: as a driver that refuses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures = 0
        self.pools: list[WeakSet[Graph]] = []
        self.capturable = True
        self._used: set[int] = set()
        self.graphs = type("CUDAGraph", (Graph,), {})  # counts its own replays
        fakes = {
            "Stream": lambda device: Stream(),
            "Event": pretended.Event,
            "current_stream": lambda device: Stream(),
            "graph_pool_handle": self._pool,
            "device": lambda device: nullcontext(),
            "stream": lambda stream: nullcontext(),
            "CUDAGraph": self.graphs,
            "graph": self._graph,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(staging, "_pinned", pretended.pageable)

    def _pool(self) -> int:
        self.pools.append(WeakSet())
        return len(self.pools) - 1

    @contextmanager
    def _graph(self, graph: Graph, *, pool: int, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        # As torch's allocator: memory that graphs have used, and whose graphs are gone, is not to be asked for.
        assert self.pools[pool] or pool not in self._used, "memory of graphs that were dropped"
        self.captures += 1
        self._used.add(pool)
        self.pools[pool].add(graph)
        with graph.recording:
            yield
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
