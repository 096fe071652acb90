"""The generalist's adapters train, resume to the bit, and are served alone or merged."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from calvin_data import write_split
from peft.tuners.lora import Linear as LoraLinear
from tiny import SOURCE, data, settings
from torch import Tensor

from robodual.facts import CheckpointError
from robodual.generalist.checkpoint import read_checkpoint, save_checkpoint
from robodual.generalist.engine import load_generalist
from robodual.generalist.model import build
from robodual.generalist.processor import Processor
from robodual.generalist.weights import load_weights
from robodual.training.generalist import GeneralistCollate, GeneralistLearner, Lora
from robodual.training.loop import Report
from robodual.training.runs import GeneralistOptions, Source, train_generalist

LORA = GeneralistOptions(lora_rank=4, merged=True)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("generalist") / "training", lengths=[24, 20])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base checkpoint in the published format."""
    folder = tmp_path_factory.mktemp("base") / "generalist"
    engine = load_generalist("tiny", device="cpu", seed=3)
    save_checkpoint(folder, engine.model, engine.processor.tokenizer)
    return folder


def test_adapter_and_merged_weights_are_served_alike(split: Path, base: Path, tmp_path: Path) -> None:
    source = Source("tiny", str(base), device="cpu")
    reports: list[Report] = []
    quick = settings(tmp_path, 5, learning_rate=1e-2)
    train_generalist(source, data(split), LORA, quick, report=reports.append)
    assert reports[-1].loss < reports[0].loss
    assert set(reports[0].metrics) == {"action_accuracy", "action_l1"}
    checkpoint = tmp_path / "checkpoints" / "step-00000005"
    permissions = {path.name: path.stat().st_mode for path in (checkpoint / "adapter").iterdir()}
    assert permissions["adapter_model.safetensors"] == permissions["adapter_config.json"]
    merged = load_generalist("tiny", checkpoint=checkpoint / "generalist", device="cpu")
    adapted = load_generalist("tiny", checkpoint=base, adapters=[checkpoint / "adapter"], device="cpu")
    plain = load_generalist("tiny", checkpoint=base, device="cpu")
    frame = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    hidden = [engine.think([frame], ["lift"])[0].hidden_states.float() for engine in (merged, adapted, plain)]
    torch.testing.assert_close(hidden[0], hidden[1], atol=2e-2, rtol=2e-2)
    assert (hidden[0] - hidden[2]).abs().max() > 0.1
    names = {name for name, _ in merged.model.named_modules() if name.endswith(("q_proj", "qkv", "fc1", "gate_proj"))}
    moved = {
        name
        for name in names
        if not torch.equal(merged.model.get_submodule(name).weight, plain.model.get_submodule(name).weight)
    }
    assert any("language_model" in name for name in moved)
    assert any("vision_backbone" in name for name in moved)
    assert "projector.fc1" in moved


def test_merging_holds_one_layers_product_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_generalist("tiny", device="cpu")
    learner = GeneralistLearner(engine.model, engine.processor.tokenizer, lora=Lora(2), constrained=True)
    multiply, alive, most = LoraLinear.get_delta_weight, weakref.WeakSet[Tensor](), 0

    def watched(layer: LoraLinear, adapter: str) -> Tensor:
        nonlocal most
        product = multiply(layer, adapter)
        alive.add(product)
        most = max(most, len(alive))
        return product

    monkeypatch.setattr(LoraLinear, "get_delta_weight", watched)
    learner.merge({})
    assert most == 1


def test_no_memory_to_merge_in_costs_that_checkpoint_alone(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(layer: LoraLinear, adapter: str) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def report(shown: Report) -> None:
        if shown.step == 3:
            monkeypatch.setattr(LoraLinear, "get_delta_weight", full)

    with pytest.raises(CheckpointError, match=r"step-00000006: could not be written \(CUDA out .* free some memory"):
        train_generalist(SOURCE, data(split), LORA, settings(tmp_path, 6, save_steps=2), report=report)
    assert "the training goes on, the newest checkpoint is of step 2" in caplog.text
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("options", [LORA, GeneralistOptions(use_lora=False)], ids=["lora", "all weights"])
def test_stopped_and_resumed_equals_never_stopped(split: Path, tmp_path: Path, options: GeneralistOptions) -> None:
    class Killed(BaseException):
        pass

    def kill(report: Report) -> None:
        if report.step == 3:
            raise Killed

    def last(output: Path) -> bytes:
        return (output / "checkpoints" / "step-00000004" / "state.safetensors").read_bytes()

    whole, broken = (settings(tmp_path / name, 4, grad_accumulation_steps=2, batch_size=2, save_steps=2)
                     for name in ("whole", "broken"))  # fmt: skip
    train_generalist(SOURCE, data(split), options, whole)
    with pytest.raises(Killed):
        train_generalist(SOURCE, data(split), options, broken, report=kill)
    train_generalist(SOURCE, data(split), options, broken, resume=True)
    assert last(tmp_path / "whole") == last(tmp_path / "broken")


def test_accumulation_and_checkpointing_change_memory_and_not_the_result(split: Path, tmp_path: Path) -> None:
    losses = []
    variants = [
        (settings(tmp_path / "a", 3, batch_size=4), LORA),
        (settings(tmp_path / "b", 3, batch_size=2, grad_accumulation_steps=2), LORA),
        (settings(tmp_path / "c", 3, batch_size=4), replace(LORA, gradient_checkpointing=True)),
    ]
    for values, options in variants:
        reports: list[Report] = []
        train_generalist(SOURCE, data(split), options, values, report=reports.append)
        losses.append([report.loss for report in reports])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_adapters_learn_on_a_quantised_base(split: Path, base: Path, tmp_path: Path, mode: str) -> None:
    """bitsandbytes runs on a CPU too, where what CUDA runs is tested; `--quantisation` itself asks for CUDA."""
    found = read_checkpoint(base, constrained=True)
    model = build(found.config, attention="sdpa", dtype=torch.bfloat16)
    load_weights(model, base, torch.device("cpu"), (), mode)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    learner = GeneralistLearner(model, found.tokenizer, lora=Lora(8), constrained=True, quantisation=mode)
    quantised = [name for name, module in learner.model.named_modules() if name.endswith("_proj.base_layer")]
    assert len(quantised) == 7 * found.config.language.layers
    batch = GeneralistCollate(Processor(found.config.images, found.config.tokens, found.tokenizer))(
        [data(split).open(0, ("rgb_static",), 0)[0, index] for index in (0, 9)]
    )
    optimizer = torch.optim.AdamW([value for value in learner.parameters() if value.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = learner(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    learner.export(tmp_path, {})
    for name, value in learner.model.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(value, frozen[name.replace(".base_layer.", ".")]), name
    assert load_generalist("tiny", checkpoint=base, adapters=[tmp_path / "adapter"], device="cpu")


def test_what_cannot_be_combined_is_one_line(split: Path, tmp_path: Path) -> None:
    four_bits = replace(SOURCE, quantisation="nf4")
    for source, options, values, message in (
        (SOURCE, LORA, {"fsdp": True}, "fsdp: is for all weights"),
        (four_bits, GeneralistOptions(use_lora=False), {}, "quantisation: quantised weights cannot be trained"),
        (replace(SOURCE, quantisation="fp8"), GeneralistOptions(), {}, "quantisation: adapters are not trained on fp8"),
        (four_bits, LORA, {}, "merged: adapters are merged into whole weights"),
        (four_bits, GeneralistOptions(), {}, "quantisation: nf4 needs a CUDA device"),
    ):
        with pytest.raises(ValueError, match=message):
            train_generalist(source, data(split), options, settings(tmp_path, 1, **values))
