"""What Triton kernels that may start before the one before them has ended have in common."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(CHAINED: tl.constexpr):
    """Waits until the kernel before has ended. Only then may the next one start: when it does, all older ones have."""
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()


def chaining(chained: bool) -> dict[str, Any]:
    """What kernels that `wait` are launched with."""
    return {"CHAINED": chained, **({"launch_pdl": True} if chained else {})}
