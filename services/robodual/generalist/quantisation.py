"""8-bit and 4-bit weights for the Llama's layers; all other parts stay as they are.

fp8 is plain torch and runs anywhere; int8 and nf4 go through bitsandbytes on CUDA.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robodual.generalist.model import Generalist

QUANTISATIONS = ("none", "int8", "fp8", "nf4")
BITSANDBYTES = ("int8", "nf4")
LAYERS = "language_model.model.layers."
FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0  # its largest value


class Float8Linear(nn.Module):
    """A linear layer without bias whose weight is float8 (e4m3) with a scale a row, which scales what comes out."""

    def __init__(self, weight: Tensor) -> None:
        """Quantises `weight` [out, in], in whose dtype the layer computes."""
        super().__init__()
        least = torch.finfo(weight.dtype).smallest_normal  # a row of zeros has a scale too
        scale = (weight.abs().amax(dim=1, keepdim=True) / FP8_MOST).clamp(min=least)
        values = (weight.float() / scale.float()).clamp(-FP8_MOST, FP8_MOST)  # beyond, there is only NaN
        self.weight = nn.Parameter(values.to(FP8), requires_grad=False)
        self.scale = nn.Parameter(scale.squeeze(1), requires_grad=False)  # [out]

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        weight = self.weight.to(self.scale.dtype)
        if weight.dtype == torch.float16:  # in which products with values up to 448 may be infinite
            return F.linear(x, weight * self.scale.unsqueeze(1))
        return F.linear(x, weight) * self.scale


def check_quantisation(mode: str, device: torch.device) -> None:
    """Raises ValueError for a mode that is unknown or that the machine cannot do."""
    if mode not in QUANTISATIONS:
        raise ValueError(f"quantisation: expected one of {QUANTISATIONS}, got {mode!r}")
    if mode in BITSANDBYTES and device.type != "cuda":
        raise ValueError(f"quantisation: {mode} needs a CUDA device, not {device}; use none or fp8 here")
    if mode in BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"quantisation: {mode} needs the package bitsandbytes; install it, or use none or fp8")


def quantisable(model: Generalist) -> frozenset[str]:
    """Names of the weights that `quantise` may replace: the linear ones inside the Llama's layers."""
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if name.startswith(LAYERS) and isinstance(module, nn.Linear)
    )


def quantise(model: Generalist, weights: Iterable[str], mode: str, device: torch.device) -> None:
    """Replaces linear layers, named by their weights, by layers of mode "int8", "fp8" or "nf4" on the device.

    int8: LLM.int8() (arXiv 2208.07339) with its outlier threshold of 6; fp8: `Float8Linear`; nf4: QLoRA's normal
    floats with doubly quantised scales (arXiv 2305.14314). All take the whole weights one layer at a time.
    """
    for weight in weights:
        path = weight.removesuffix(".weight")
        old = model.get_submodule(path)
        assert isinstance(old, nn.Linear)
        new = Float8Linear(old.weight.data.to(device)) if mode == "fp8" else _of_bitsandbytes(old, mode, device)
        model.set_submodule(path, new.eval())


def _of_bitsandbytes(old: nn.Linear, mode: str, device: torch.device) -> nn.Module:
    import bitsandbytes

    # int8 computes in float16, and says so at every call of every layer.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    shape, values = (old.in_features, old.out_features), old.weight.data.cpu()
    new: nn.Module
    with torch.device("meta"):
        if mode == "int8":
            new = bitsandbytes.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=6.0)
        else:
            new = bitsandbytes.nn.Linear4bit(*shape, bias=False, compute_dtype=values.dtype, quant_type="nf4")
    if mode == "int8":
        whole = bitsandbytes.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False)
    else:
        whole = bitsandbytes.nn.Params4bit(values, requires_grad=False, quant_type="nf4")
    # Moving such a parameter to the device is what quantises it.
    new.weight = whole.to(device)
    return new
