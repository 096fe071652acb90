"""Whether the specialist's Triton kernels can run, without importing Triton."""

from __future__ import annotations

import functools
import importlib.util

import structlog
import torch

from robodual.specialist.config import SpecialistConfig

logger = structlog.get_logger(__name__)

CAPABILITY = (8, 0)  # from an A100 on: tensor cores that take TF32


@functools.cache
def can_launch(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device; if it is a GPU and they do not, the log says once why."""
    if device.type != "cuda":
        return False
    reason = _obstacle(device)
    if reason:
        logger.info("the specialist runs without its Triton kernels", device=str(device), reason=reason)
    return not reason


def _obstacle(device: torch.device) -> str:
    if torch.version.cuda is None:
        return "this PyTorch is not built with CUDA"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        return f"compute capability {found} is below {CAPABILITY}: no TF32"
    return _try(device)


def _try(device: torch.device) -> str:
    """What Triton says of a first launch, if it fails: it takes a C compiler, Python's headers and the driver."""
    try:
        from robodual.specialist.products import linear  # it imports Triton, of which 3.3 has not all

        ones = torch.ones(16, 16, device=device)
        found = float(linear(ones, ones).sum())
    except Exception as error:  # Triton's own, its compiler's, the system's
        return f"Triton's first kernel failed: {type(error).__name__}: {error}"
    return "" if found == 16**3 else f"Triton's first kernel gave {found}, not {16**3}"


def can_fuse(config: SpecialistConfig) -> bool:
    """Whether the denoiser's kernels can take these shapes: up to these, what they keep fits any such GPU."""
    return config.width <= 512 and config.width // config.heads <= 32


def fuses(config: SpecialistConfig, device: torch.device) -> bool:
    """Whether the denoiser runs as Triton kernels there."""
    return can_fuse(config) and can_launch(device)
