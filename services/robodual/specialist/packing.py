"""A linear layer laid out for where it runs, for a second copy of the weight: a tenth faster than a plain one and more.

On a CPU a weight is kept in blocks that match the library's kernels. Which library is a matter of the CPU's maker, so
that a machine gives the same bits at each start:

- oneDNN's applies a GELU or adds a residual while the product is in cache. These are the operators that torch.compile
  uses when it freezes a model.
- On Intel's CPUs, in float32 and where it is known how many rows a request has, MKL's products are a tenth faster for
  hundreds of rows, and twice as fast for a few. Other numbers of rows take a plain product there.

A small weight is not worth looking up how it was laid out, which oneDNN does at each call: its layer is a plain one, as
it is in bfloat16 without AVX-512, and in a build without oneDNN. So it is on a GPU, but that in float32 it may be a
Triton kernel, which has the tensor cores compute at float32's precision, as three products in TF32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robodual import cpu
from robodual.specialist import fusing

Gelu = Literal["none", "tanh"]  # the approximation

SMALL = 4096  # values of a weight, up to which it is not laid out
LEAST = 64  # rows from which Triton's product is used: it cannot fill a GPU with fewer


class Linear:
    """x @ weight.T + bias, then GELU or a residual if asked for. For inference only.

    Args:
        weight: [out, in]
        bias: [out], or None
        gelu: the approximation of a GELU to apply, or None for no GELU
        rows: of x in one request, if they are known; a batch may have more
        triton: allows the Triton kernel, for `LEAST` rows and more
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        gelu: Gelu | None = None,
        *,
        rows: int | None = None,
        triton: bool = False,
    ) -> None:
        self._weight = weight.detach()
        self._bias = None if bias is None else bias.detach()
        self._gelu = gelu
        self._operation = ("none", "") if gelu is None else ("gelu", gelu)
        self._kernel = _kernel(weight) if triton else None
        self._request = rows
        self._by_mkl: Tensor | None = None  # the weight as MKL has it
        self._by_onednn = False
        if can_pack(weight) and weight.numel() > SMALL:
            if rows is not None and prefers_mkl(weight):
                self._by_mkl = torch.ops.mkl._mkl_reorder_linear_weight(self._weight, rows)
            else:
                self._by_onednn = True
                self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight)

    @classmethod
    def of(cls, layer: nn.Linear, gelu: Gelu | None = None, *, rows: int | None = None, triton: bool = False) -> Linear:
        return cls(layer.weight, layer.bias, gelu, rows=rows, triton=triton)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if self._by_onednn:
            operation, algorithm = self._operation
            packed: Tensor = torch.ops.mkldnn._linear_pointwise.default(
                x, self._weight, self._bias, operation, [], algorithm
            )
            return packed
        if self._kernel is not None and _rows(x) >= LEAST:
            return self._kernel(x, self._weight, self._bias, self._gelu)
        out = self._product(x)
        return out if self._gelu is None else F.gelu(out, approximate=self._gelu)

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        """The product plus a residual of its shape; for a layer without GELU."""
        if self._by_onednn:
            packed: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
            return packed
        if self._kernel is not None and _rows(x) >= LEAST:
            return self._kernel(x, self._weight, self._bias, residual=residual)
        return self._product(x).add_(residual)

    def _product(self, x: Tensor) -> Tensor:
        if self._by_mkl is not None:  # for other rows it takes the weight as it was
            packed: Tensor = torch.ops.mkl._mkl_linear(x, self._by_mkl, self._weight, self._bias, self._request)
            return packed
        return F.linear(x, self._weight, self._bias)


def can_pack(weight: Tensor) -> bool:
    """Whether a layer with this weight is laid out for a CPU, unless it is small."""
    if not weight.is_cpu or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    # bfloat16 takes a CPU that has AVX-512; oneDNN has no kernels of it for others.
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and supported)


def prefers_mkl(weight: Tensor) -> bool:
    """Whether MKL's layout is the faster one for a weight that can be packed."""
    if weight.dtype != torch.float32 or cpu.says("vendor_id") != "GenuineIntel":
        return False
    available: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return available


def _kernel(weight: Tensor) -> Callable[..., Tensor] | None:
    if weight.dtype != torch.float32 or not fusing.can_launch(weight.device):
        return None
    from robodual.specialist.products import linear  # it imports Triton

    return linear


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]
