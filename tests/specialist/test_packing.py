"""Packed layers give what plain ones do, and stand back where they cannot run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from robodual import cpu
from robodual.specialist import packing
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
    check(partial(Linear, rows=None), plain, x, residual, CLOSE[dtype])


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="PyTorch was built without MKL")
@pytest.mark.parametrize("rows", [15, 16], ids=["rows of one request", "other rows"])
@torch.inference_mode()
def test_layers_packed_by_mkl_give_what_plain_ones_do(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(cpu, "says", {"vendor_id": "GenuineIntel"}.get)
    plain, x, residual = layer(torch.float32)
    assert packing.prefers_mkl(plain.weight)
    assert not packing.prefers_mkl(plain.weight.bfloat16())
    check(partial(Linear, rows=rows), plain, x, residual, CLOSE[torch.float32])


@pytest.mark.parametrize(("maker", "operator"), [("GenuineIntel", "mkl"), ("AuthenticAMD", "mkldnn")])
@torch.inference_mode()
def test_the_maker_of_the_cpu_chooses_the_library(monkeypatch: pytest.MonkeyPatch, maker: str, operator: str) -> None:
    if operator == "mkl" and not torch.backends.mkl.is_available():
        pytest.skip("PyTorch was built without MKL")
    monkeypatch.setattr(cpu, "says", {"vendor_id": maker}.get)
    plain, x, _ = layer(torch.float32)
    assert called(Linear.of(plain, rows=15), x) == {operator}
    assert called(Linear.of(plain), x) == {"mkldnn"}  # whose rows are not known
    with_few = nn.Linear(64, packing.SMALL // 64)
    assert called(Linear.of(with_few, rows=15), x) == set()


def called(layer: Linear, x: Tensor) -> set[str]:
    """The libraries' operators among those that the layer runs."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        layer(x)
    return {event.name.split("::")[0] for event in trace.events() or []} & {"mkl", "mkldnn"}


def check(make: Callable[..., Linear], plain: nn.Linear, x: Tensor, residual: Tensor, within: float) -> None:
    """A packed layer against the plain one: alone, without a bias, with a residual, with each GELU."""
    weight, bias = plain.weight, plain.bias
    close = {"rtol": within, "atol": within}
    torch.testing.assert_close(make(weight, bias)(x), plain(x), **close)
    torch.testing.assert_close(make(weight)(x), F.linear(x, weight), **close)
    torch.testing.assert_close(make(weight, bias).add(residual, x), residual + plain(x), **close)
    for gelu in ("none", "tanh"):
        torch.testing.assert_close(make(weight, bias, gelu)(x), F.gelu(plain(x), approximate=gelu), **close)
    assert torch.equal(x, layer(x.dtype)[1])
    assert torch.equal(residual, layer(x.dtype)[2])


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
