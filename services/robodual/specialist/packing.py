"""A linear layer laid out for the CPU: a tenth faster than a plain one, in bfloat16 a fifth, for a second copy of the
weight.

oneDNN, which PyTorch's CPU builds carry, keeps a weight in blocks that match its kernels, and applies a GELU or adds a
residual while the product is in cache. These are the operators that torch.compile uses when it freezes a model. On a
GPU, in bfloat16 on a CPU without AVX-512, or in a build without oneDNN, the layer is a plain one; but on a GPU in
float32 it may be a Triton kernel, which has the tensor cores compute at float32's precision, as three products in TF32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robodual.specialist import fusing

Gelu = Literal["none", "tanh"]  # the approximation

LEAST = 64  # rows from which Triton's product is used: it cannot fill a GPU with fewer


class Linear:
    """x @ weight.T + bias, then GELU or a residual if asked for. For inference only.

    Args:
        weight: [out, in]
        bias: [out], or None
        gelu: the approximation of a GELU to apply, or None for no GELU
        triton: allows the Triton kernel, for `LEAST` rows and more
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, gelu: Gelu | None = None, *, triton: bool = False
    ) -> None:
        self._packed = can_pack(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach()) if self._packed else weight.detach()
        self._bias = None if bias is None else bias.detach()
        self._gelu = gelu
        self._kernel = _kernel(weight) if triton else None
        self._operation = ("none", "") if gelu is None else ("gelu", gelu)

    @classmethod
    def of(cls, layer: nn.Linear, gelu: Gelu | None = None, *, triton: bool = False) -> Linear:
        return cls(layer.weight, layer.bias, gelu, triton=triton)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if self._packed:
            operation, algorithm = self._operation
            out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
                x, self._weight, self._bias, operation, [], algorithm
            )
            return out
        if self._kernel is not None and _rows(x) >= LEAST:
            return self._kernel(x, self._weight, self._bias, self._gelu)
        out = F.linear(x, self._weight, self._bias)
        return out if self._gelu is None else F.gelu(out, approximate=self._gelu)

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        """The product plus a residual of its shape; for a layer without GELU."""
        if self._packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
            return out
        if self._kernel is not None and _rows(x) >= LEAST:
            return self._kernel(x, self._weight, self._bias, residual=residual)
        return residual + F.linear(x, self._weight, self._bias)


def can_pack(weight: Tensor) -> bool:
    """Whether a layer with this weight is packed."""
    if not weight.is_cpu or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    # bfloat16 takes a CPU that has AVX-512; oneDNN has no kernels of it for others.
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and supported)


def _kernel(weight: Tensor) -> Callable[..., Tensor] | None:
    if weight.dtype != torch.float32 or not fusing.can_launch(weight.device):
        return None
    from robodual.specialist.products import linear  # it imports Triton

    return linear


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]
