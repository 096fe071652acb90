"""Packed layers give what plain ones do, and stand back where they cannot run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robodual.specialist.packing import Linear, can_pack

BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not BF16, reason="needs a CPU with AVX-512")),
]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # of values around 1; a bfloat16 has 8 bits


def layer(dtype: torch.dtype) -> tuple[nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = nn.Linear(64, 96)
    with torch.no_grad():
        made.weight.normal_(std=0.125, generator=generator)
        made.bias.normal_(generator=generator)
    x, residual = (torch.randn(3, 5, width, generator=generator).to(dtype) for width in (64, 96))
    return made.to(dtype), x, residual


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_packed_layers_give_what_plain_ones_do(dtype: torch.dtype) -> None:
    plain, x, residual = layer(dtype)
    assert can_pack(plain.weight)
    close = {"rtol": CLOSE[dtype], "atol": CLOSE[dtype]}
    torch.testing.assert_close(Linear.of(plain)(x), plain(x), **close)
    torch.testing.assert_close(Linear(plain.weight)(x), F.linear(x, plain.weight), **close)
    torch.testing.assert_close(Linear.of(plain).add(residual, x), residual + plain(x), **close)
    for gelu in ("none", "tanh"):
        torch.testing.assert_close(Linear.of(plain, gelu)(x), F.gelu(plain(x), approximate=gelu), **close)


@torch.inference_mode()
def test_what_cannot_be_packed_is_computed_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, x, residual = layer(torch.float32)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not can_pack(plain.weight)
    assert torch.equal(Linear.of(plain)(x), plain(x))
    assert torch.equal(Linear.of(plain).add(residual, x), residual + plain(x))
    assert torch.equal(Linear.of(plain, "tanh")(x), F.gelu(plain(x), approximate="tanh"))
    monkeypatch.undo()
    assert not can_pack(plain.weight.half())
