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

from robodual.specialist.packing import Linear


@torch.inference_mode()
def test_products_and_attention_are_counted_packed_or_not(load: Callable[[str], ModuleType]) -> None:
    counter = load("roofline").Counter()
    x, weight = torch.randn(10, 32), torch.randn(48, 32)
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    with counter:
        Linear(weight)(x)
    assert counter.flops == 2 * 10 * 32 * 48
    assert counter.bytes >= 4 * (x.numel() + weight.numel() + 10 * 48)
    with counter:
        nn.Linear(32, 48)(x)
    assert counter.flops == 4 * 10 * 32 * 48
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
