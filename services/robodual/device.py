"""Where a model runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

CHAINS = (9, 0)  # from an H100 on: a kernel may be launched before the one before has ended


def choose(name: str) -> torch.device:
    """The device called `name`: auto (CUDA where there is one), cpu, cuda (the first one) or cuda:N; with its number.

    On CUDA, float32 is float32 from then on: cuDNN's convolutions would round to TF32, by PyTorch's default, which its
    matrix products do not and a CPU does not.

    Raises:
        ValueError: for another name, or a device that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    number = device.index or 0
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"device: {name} is not there; PyTorch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices: "
            "is it a CUDA build, is the driver new enough for it (nvidia-smi), and does a container get the GPU?"
        )
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", number)


def current(device: torch.device) -> AbstractContextManager[None]:
    """Makes a GPU the current one, on which Triton launches; nothing elsewhere."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def can_chain(device: torch.device) -> bool:
    """Whether kernels may be launched there before those before them have ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CHAINS


def milliseconds(launch: Callable[[], object]) -> float:
    """How long the current GPU takes for what is launched, for whose end it waits."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    launch()
    end.record()
    end.synchronize()
    taken: float = start.elapsed_time(end)
    return taken


def padded(size: int) -> int:
    """The least power of two that is not below a size, nor below 16, the least that a GPU's products take."""
    return max(16, 1 << (size - 1).bit_length())


class Side:
    """A second stream of a GPU, for what does not fill it; on a CPU one thing comes after the other.

    What is made on it is used after `join`, and it waits before it makes more, so that no memory is taken too early.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Has the GPU do what is in it beside what comes after it."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Has what comes next wait for what was done beside."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
