"""Adapters that stay beside their layers give what merged ones give, and spare quantised weights the rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from robodual.generalist.adapters import Adapted, read_adapter
from robodual.generalist.checkpoint import read_checkpoint
from robodual.generalist.engine import GeneralistEngine, load_generalist
from robodual.generalist.model import Generalist, build
from robodual.generalist.weights import load_weights

NAMES = ("adapter", "second")
LAYER = "language_model.model.layers.1.mlp.down_proj"


def engine(published: Path, *, merge: bool) -> GeneralistEngine:
    folders = [published / name for name in NAMES]
    return load_generalist(
        "toy", checkpoint=published / "generalist", adapters=folders, merge_adapters=merge, device="cpu"
    )


def test_adapters_kept_apart_give_the_conditionings_of_merged_ones(published: Path) -> None:
    apart, merged = engine(published, merge=False), engine(published, merge=True)
    plain = load_generalist("toy", checkpoint=published / "generalist", device="cpu")
    frame = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    ours, theirs, without = (e.think([frame], ["lift the red block"])[0] for e in (apart, merged, plain))
    np.testing.assert_array_equal(ours.reference_actions, theirs.reference_actions)
    torch.testing.assert_close(ours.hidden_states.float(), theirs.hidden_states.float(), rtol=0, atol=0.05)
    assert not torch.allclose(ours.hidden_states.float(), without.hidden_states.float(), rtol=0, atol=0.5)


def test_facts_say_how_they_are_held(published: Path) -> None:
    apart, merged = engine(published, merge=False).facts, engine(published, merge=True).facts
    assert apart.details["adapters"] == "adapter, second (kept apart)"
    assert merged.details["adapters"] == "adapter, second"
    assert apart.weight_bytes > merged.weight_bytes
    assert apart.parameters == merged.parameters
    assert apart.checkpoint != merged.checkpoint


def load(published: Path, *adapters: str, quantisation: str, merge: bool) -> Generalist:
    found = read_checkpoint(published / "generalist")
    model = build(found.config, attention="sdpa", dtype=torch.bfloat16)
    read = tuple(read_adapter(published / name) for name in adapters)
    load_weights(model, found.folder, torch.device("cpu"), read, quantisation, merge=merge)
    return model


def test_quantised_weights_stay_as_they_are_beside_adapters(published: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="quantisation needs bitsandbytes")
    plain = load(published, quantisation="nf4", merge=True).get_submodule(LAYER)
    adapted = load(published, "adapter", quantisation="nf4", merge=False).get_submodule(LAYER)
    assert isinstance(adapted, Adapted)
    assert torch.equal(adapted.base.weight, plain.weight)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    adapter = read_adapter(published / "adapter")
    change = adapter.scale * (adapter.high[f"{LAYER}.weight"] @ adapter.low[f"{LAYER}.weight"])
    difference = (adapted(x) - plain(x)).float()
    expected = x.float() @ change.T
    assert ((difference - expected).norm() / expected.norm()).item() < 0.02
