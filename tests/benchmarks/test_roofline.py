"""The roofline: what it counts is what the shapes say, and each stage has its bound."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robodual import cpu
from robodual.specialist import packing


@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD"])
@torch.inference_mode()
def test_products_and_attention_are_counted_packed_or_not(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, maker: str
) -> None:
    monkeypatch.setattr(cpu, "says", {"vendor_id": maker}.get)
    counter = load("roofline").Counter()
    x, weight = torch.randn(16, 64), torch.randn(128, 64)
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    with counter:
        packing.Linear(weight, rows=16)(x)
    assert counter.flops == 2 * 16 * 64 * 128
    read = 4 * (x.numel() + weight.numel() + 16 * 128)
    assert read <= counter.bytes < read + 4 * weight.numel()  # the weight once, though its layout may be wider
    with counter:
        nn.Linear(64, 128)(x)
    assert counter.flops == 4 * 16 * 64 * 128
    before = counter.flops
    with counter:
        F.scaled_dot_product_attention(query, key, key)
    assert counter.flops - before == 2 * (2 * 2 * 5 * 7 * 8)  # both products, in two heads


@pytest.mark.parametrize(
    ("system", "names"),
    [
        ("specialist", {"vision encoder", "depth encoder", "denoising", "a step"}),
        (
            "generalist",
            {"vision and projector", "a conditioning, dynamic cache", "a conditioning, static cache"},
        ),
    ],
)
def test_each_stage_has_its_bound_and_a_step_a_trace(
    load: Callable[[str], ModuleType], tmp_path: Path, system: str, names: set[str]
) -> None:
    record, trace = tmp_path / "record.json", tmp_path / "trace.json"
    arguments = ["--system", system, "--profile", "toy", "--device", "cpu", "--threads", "1", "--rounds", "2"]
    assert load("roofline").main([*arguments, "--json", str(record), "--trace", str(trace)]) == 0

    stages = {stage["name"]: stage for stage in json.loads(record.read_text())["stages"]}
    assert names <= set(stages)
    for name in names:
        stage = stages[name]
        assert min(stage["gigaflops"], stage["megabytes"], stage["bound"], stage["median"]) > 0
        assert stage["near"] == pytest.approx(stage["bound"] / stage["median"])
    if system == "specialist":
        parts = sum(stage["gigaflops"] for name, stage in stages.items() if name != "a step")
        assert stages["a step"]["gigaflops"] == pytest.approx(parts, rel=0.02)
    assert json.loads(trace.read_text())["traceEvents"]
