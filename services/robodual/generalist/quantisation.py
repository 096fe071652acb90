"""8-bit and 4-bit weights for the Llama's layers, through bitsandbytes on CUDA; all other parts stay as they are."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable

import torch
from torch import nn

from robodual.generalist.model import Generalist

QUANTISATIONS = ("none", "int8", "nf4")
LAYERS = "language_model.model.layers."


def check_quantisation(mode: str, device: torch.device) -> None:
    """Raises ValueError for a mode that is unknown or that the machine cannot do."""
    if mode not in QUANTISATIONS:
        raise ValueError(f"quantisation: expected one of {QUANTISATIONS}, got {mode!r}")
    if mode != "none" and device.type != "cuda":
        raise ValueError(f"quantisation: {mode} needs a CUDA device, not {device}; use none here")
    if mode != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"quantisation: {mode} needs the package bitsandbytes; install it, or use none")


def quantisable(model: Generalist) -> frozenset[str]:
    """Names of the weights that `quantise` may replace: the linear ones inside the Llama's layers."""
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if name.startswith(LAYERS) and isinstance(module, nn.Linear)
    )


def quantise(model: Generalist, weights: Iterable[str], mode: str, device: torch.device) -> None:
    """Replaces linear layers, named by their weights, by bitsandbytes' of mode "int8" or "nf4" on the device.

    int8: LLM.int8() (arXiv 2208.07339) with its outlier threshold of 6; nf4: QLoRA's normal floats with doubly
    quantised scales (arXiv 2305.14314). Both take the whole weights from the host, one layer at a time.
    """
    import bitsandbytes

    # int8 computes in float16, and says so at every call of every layer.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for weight in weights:
        path = weight.removesuffix(".weight")
        old = model.get_submodule(path)
        assert isinstance(old, nn.Linear)
        shape, values = (old.in_features, old.out_features), old.weight.data.cpu()
        with torch.device("meta"):
            if mode == "int8":
                new = bitsandbytes.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=6.0)
            else:
                new = bitsandbytes.nn.Linear4bit(*shape, bias=False, compute_dtype=model.dtype, quant_type="nf4")
        if mode == "int8":
            whole = bitsandbytes.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False)
        else:
            whole = bitsandbytes.nn.Params4bit(values, requires_grad=False, quant_type="nf4")
        # Moving such a parameter to the device is what quantises it.
        new.weight = whole.to(device)
        model.set_submodule(path, new.eval())
