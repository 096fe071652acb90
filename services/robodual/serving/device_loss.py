"""A GPU that fails under a service. CUDA takes no more calls from the process then: only a new one can use it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import structlog
import torch

from robodual.serving.errors import Unavailable

logger = structlog.get_logger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def guarded(work: Callable[P, R], device: str, end: Callable[[], None]) -> Callable[P, R]:
    """`work`, which when it fails together with its device calls `end` and raises `Unavailable`."""

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return work(*args, **kwargs)
        except RuntimeError as error:
            if not lost(device):
                raise
            logger.error("device lost", device=device, reason=str(error))
            end()
            raise Unavailable(f"{device} has failed and the service ends; go on with another replica") from error

    return run


def lost(device: str) -> bool:
    """Whether CUDA answers every call with an error, as it does for good after some (an illegal address, ECC)."""
    if torch.device(device).type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
