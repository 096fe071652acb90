"""The Llama's layers in 8 and 4 bits: all run on a CPU too, where the same code is tested that CUDA runs."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from robodual.facts import count_weight_bytes
from robodual.generalist import quantisation, service
from robodual.generalist.adapters import read_adapter
from robodual.generalist.checkpoint import read_checkpoint
from robodual.generalist.decoding import decode
from robodual.generalist.engine import load_generalist
from robodual.generalist.model import Generalist, build
from robodual.generalist.processor import Processor
from robodual.generalist.quantisation import Float8Linear
from robodual.generalist.weights import load_weights
from robodual.serving.settings import GeneralistSettings

bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantisation needs bitsandbytes")

CPU = torch.device("cpu")
# How far one layer's output may be from the unquantised one, relative to it: nf4 has 4 bits a weight.
ERROR = {"int8": 0.03, "fp8": 0.04, "nf4": 0.2}
BITS = {"int8": 8, "fp8": 8, "nf4": 4}


def load(published: Path, mode: str, *adapters: str) -> Generalist:
    found = read_checkpoint(published / "generalist")
    model = build(found.config, attention="sdpa", dtype=torch.bfloat16)
    load_weights(model, found.folder, CPU, tuple(read_adapter(published / name) for name in adapters), mode)
    return model


def linears(model: Generalist) -> dict[str, torch.nn.Module]:
    """The layers that are quantised, by the names that they have in an unquantised model."""
    weights = quantisation.quantisable(build(model.config, attention="sdpa", dtype=torch.bfloat16))
    return {name: model.get_submodule(name) for name in sorted(w.removesuffix(".weight") for w in weights)}


@pytest.mark.parametrize("mode", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize("adapters", [(), ("adapter", "second")])
def test_each_layer_of_the_llama_answers_nearly_as_before(
    published: Path, mode: str, adapters: tuple[str, ...]
) -> None:
    plain, quantised = load(published, "none", *adapters), load(published, mode, *adapters)
    before, after = linears(plain), linears(quantised)
    assert len(before) == 7 * plain.config.language.layers
    generator = torch.Generator().manual_seed(0)
    for name, layer in before.items():
        assert isinstance(layer, torch.nn.Linear)
        x = torch.randn(5, layer.in_features, generator=generator).bfloat16()
        expected, got = layer(x).float(), after[name](x).float()
        assert ((got - expected).norm() / expected.norm()).item() < ERROR[mode], name
        assert after[name].weight.dtype in (torch.int8, torch.float8_e4m3fn, torch.uint8)


@pytest.mark.parametrize("mode", ["int8", "fp8", "nf4"])
def test_everything_outside_those_layers_stays_as_it_was(published: Path, mode: str) -> None:
    plain, quantised = load(published, "none"), load(published, mode)
    expected = {name: value for name, value in plain.state_dict().items() if "_proj" not in name}
    found = quantised.state_dict()
    assert expected
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["int8", "fp8", "nf4"])
def test_the_layers_take_the_memory_of_their_bits(published: Path, mode: str) -> None:
    plain, quantised = load(published, "none"), load(published, mode)
    values = sum(layer.weight.numel() for layer in linears(plain).values())
    saved = count_weight_bytes(plain) - count_weight_bytes(quantised)
    # Beside the weights, int8 and fp8 keep a scale a row.
    assert saved == pytest.approx(values * (16 - BITS[mode]) / 8, rel=0.05)


@pytest.mark.parametrize("mode", ["int8", "fp8", "nf4"])
def test_a_whole_conditioning_runs_quietly(published: Path, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    model = load(published, mode)
    found = read_checkpoint(published / "generalist")
    processor = Processor(found.config.images, found.config.tokens, found.tokenizer)
    frame = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    prompt = torch.tensor(processor.prompt("lift the red block"))
    with caplog.at_level(logging.WARNING):
        decoded = decode(model, processor.pixels([frame]).bfloat16(), [prompt], constrained=True)
    assert decoded.hidden[0].isfinite().all()
    assert [record for record in caplog.records if "MatMul8bitLt" in record.message] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_keeps_every_row_within_its_rounding_whatever_its_size(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    weight *= torch.tensor([1.0, 300.0, 1e-2, 1.0, 0.0, 30.0])[:, None]
    weight[3, 7] = 100.0  # an outlier sets its row's scale, and no other's
    weight = weight.to(dtype)
    kept = Float8Linear(weight)(torch.eye(64, dtype=dtype)).T.float()
    # Three bits of mantissa; what is small beside the row's largest value has a fixed step, 2^-9 of the scale.
    step = weight.float().abs().amax(dim=1, keepdim=True) / 448 * 2**-9
    assert ((kept - weight.float()).abs() <= 0.07 * weight.float().abs() + step).all()


def test_fp8_in_float16_is_finite_where_the_weights_products_are() -> None:
    weight = torch.full((4, 512), 0.01, dtype=torch.float16)
    x = torch.full((1, 512), 100.0, dtype=torch.float16)  # times 448, 512 times over: 23 million
    found = quantisation.Float8Linear(weight)(x)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, x @ weight.T, rtol=0.05, atol=0)


def test_fp8_serves_on_a_cpu_and_says_so() -> None:
    plain = load_generalist("toy", device="cpu", dtype="bfloat16")
    small = load_generalist("toy", device="cpu", dtype="bfloat16", quantisation="fp8")
    frame = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    (thought,) = small.think([frame], ["lift the red block"])
    (expected,) = plain.think([frame], ["lift the red block"])
    assert thought.malformed_tokens == 0
    assert thought.hidden_states.shape == expected.hidden_states.shape
    assert np.abs(thought.reference_actions).max() <= 1
    first, before = thought.hidden_states[0].float(), expected.hidden_states[0].float()
    assert 0 < ((first - before).norm() / before.norm()).item() < 0.2  # of the last patch, before any token
    assert small.facts.details["quantisation"] == "fp8"
    assert small.facts.checkpoint != plain.facts.checkpoint
    assert small.facts.parameters == plain.facts.parameters


def test_weights_that_do_not_fit_the_device_are_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 86.00 MiB.\nGPU 0 has ...")

    monkeypatch.setattr(service, "load_generalist", full)
    with pytest.raises(
        ValueError, match=r"device: cuda:0 has no room .* quantisation none; choose int8, fp8 or nf4"
    ) as error:
        service._load(GeneralistSettings(device="cuda:0"))
    assert "\n" not in str(error.value)
