"""Arrays of the host that a GPU reads: those of a step in one pinned buffer, by one copy, or others as they come."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes at which every array begins


class Staging:
    """Named arrays on the host, and tensors of the same shapes on a device, which stay where they are.

    A step writes `arrays` between `begin` and `send`, and the device then has them in `tensors`, in its stream's order.
    """

    def __init__(self, layout: Mapping[str, tuple[tuple[int, ...], npt.DTypeLike]], device: torch.device) -> None:
        """`layout`: each array's shape and type. All are zero at first."""
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        self.tensors: dict[str, Tensor] = {}
        places, end = {}, 0
        for name, (shape, kind) in layout.items():
            size = math.prod(shape) * np.dtype(kind).itemsize
            places[name] = slice(end, end + size)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self._device = device
        self._here, own = _pinned(end)
        self._there = torch.zeros(end, dtype=torch.uint8, device=device)
        self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        for name, (shape, kind) in layout.items():
            array = self.arrays[name] = own[places[name]].view(kind).reshape(shape)
            self.tensors[name] = self._there[places[name]].view(torch.from_numpy(array).dtype).view(shape)

    def begin(self) -> None:
        """Waits until the last copy is over, as it long is where its answer was waited for."""
        self._sent.synchronize()

    def send(self) -> None:
        """Brings the arrays over without waiting."""
        self._there.copy_(self._here, non_blocking=True)
        self._sent.record(torch.cuda.current_stream(self._device))


def _pinned(size: int) -> tuple[Tensor, npt.NDArray[np.uint8]]:
    """Zeros in memory that a GPU copies from by itself, as a tensor and as an array."""
    values = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
    return values, values.numpy()


def stacked(arrays: Sequence[npt.NDArray[Any]]) -> list[Tensor]:
    """Arrays as one tensor [B, ...] if they are of one shape, else as one each."""
    groups = [arrays] if len({array.shape for array in arrays}) == 1 else [[array] for array in arrays]
    return [torch.from_numpy(np.stack(group)) for group in groups]


def bring(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host, without waiting for the device."""
    if device.type == "cpu":
        return values
    # From pinned memory the copy needs no wait: the device's stream keeps the order.
    return values.pin_memory().to(device, non_blocking=True)
