"""A GPU that is pretended: tensors that have a shape, a type and the device "cuda", but no values.

What PyTorch says of devices, types and shapes is what it says on a GPU, and at any size: 7 B parameters take no memory.
What waits for the device raises, since there is no value to wait for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robodual import staging
from robodual.generalist.greedy import chunk_layout, standing_still
from robodual.resampling import _taps
from robodual.specialist import ddim

DEVICE = torch.device("cuda:0")
PRODUCTS = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "conv", "scaled_dot", "_scaled_dot", "_efficient")
CUDA, META, KINDS = 1, 14, 15  # places in PyTorch's table of devices

needed = pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has what it takes for a real GPU")


class Gpu:
    """What was captured on it."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.kernels = _Strict()

    @contextmanager
    def capture(self, graph: Any, **options: Any) -> Iterator[None]:
        self.captures += 1
        self.kernels.capturing = True
        try:
            yield
        finally:
            self.kernels.capturing = False

    def replay(self) -> None:
        self.replays += 1


@contextmanager
def gpu() -> Iterator[Gpu]:
    """Tensors made within are without values, and "cuda" is a device, on which graphs can be captured."""
    found = Gpu()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.may_turn_const = lambda value: False  # type: ignore[method-assign]  # it would compute small values, on CUDA
    ddim.schedule(10)  # plain numbers, from values
    names = {
        "Stream": _Stream,
        "current_stream": _Stream,
        "Event": Event,
        "graph_pool_handle": object,
        "device": nullcontext,
        "stream": nullcontext,
        "CUDAGraph": type("CUDAGraph", (), {"replay": found.replay}),
        "graph": found.capture,
    }
    with ExitStack() as stack:
        for name, fake in names.items():
            stack.enter_context(patch.object(torch.cuda, name, fake))
        stack.enter_context(patch.object(torch.Tensor, "pin_memory", lambda values: values))
        stack.enter_context(patch.object(staging, "_pinned", pageable))
        stack.enter_context(_device_guard())
        stack.enter_context(mode)
        stack.enter_context(found.kernels)
        for kept in (chunk_layout, standing_still, ddim.alphas_cumprod, _taps):  # tensors of the device
            stack.callback(kept.cache_clear)
        yield found


def place(module: nn.Module) -> None:
    """Puts a module that is on the meta device on the GPU."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(_like(value), requires_grad=value.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _like(buffer)


@contextmanager
def autocast() -> Iterator[None]:
    """`torch.autocast("cuda", torch.bfloat16)`, which does nothing where there is no GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def pageable(size: int) -> tuple[Tensor, npt.NDArray[np.uint8]]:
    """In the place of pinned memory, which takes CUDA."""
    values = np.zeros(size, np.uint8)
    return torch.from_numpy(values), values


class Event:
    """What `torch.cuda.Event` is where all is over at once."""

    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Stream:
    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass


class _Strict(TorchDispatchMode):
    """Raises as a GPU's kernels do at products of different types, which without values are let pass, and as CUDA does
    in a capture, at a copy between the host and the device.
    """

    capturing = False

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        result = operation(*arguments, **named)
        given = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)]
        if operation.overloadpacket.__name__.startswith(PRODUCTS):
            kinds = {tensor.dtype for tensor in given if tensor.dtype != torch.bool}
            if len(kinds) > 1:
                raise RuntimeError(f"{operation}: expected tensors of one type, got {kinds}")
        if self.capturing:
            # A lone number of the host is passed by value, unless it is copied.
            copies = operation.overloadpacket.__name__ in ("_to_copy", "copy_")
            places = {tensor.device.type for tensor in given if (copies or tensor.dim()) and tensor.numel()}
            places |= {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.numel()}
            if len(places) > 1:
                raise RuntimeError(f"operation not permitted when stream is capturing: {operation} between {places}")
        return result


def _like(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device=DEVICE)


@contextmanager
def _device_guard() -> Iterator[None]:
    """PyTorch's CPU builds have nothing that changes the current CUDA device, and stop where one would: here nothing
    is done, as on the meta device."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * KINDS).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = table[CUDA]
    table[CUDA] = table[META]
    try:
        yield
    finally:
        table[CUDA] = before
