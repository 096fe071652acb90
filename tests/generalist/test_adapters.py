"""LoRA adapters that are merged into a generalist's weights, as PEFT merges them, and those that cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from robodual.facts import CheckpointError
from robodual.generalist.adapters import Adapter, read_adapter
from robodual.generalist.checkpoint import save_checkpoint
from robodual.generalist.engine import load_generalist
from robodual.generalist.model import Generalist


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = load_generalist("toy", device="cpu", seed=5)
    folder = tmp_path_factory.mktemp("published") / "generalist"
    save_checkpoint(folder, engine.model, engine.processor.tokenizer)
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "generalist"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def lora(model: Generalist, folder: Path, seed: int, **options: object) -> None:
    """A LoRA adapter written by PEFT itself, on a copy of the model, with random values in both halves."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj", "fc1", "qkv"], **options)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    adapted.merge_and_unload()


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_adapters_merge_in_order_as_peft_merges_them(published: Path, tmp_path: Path) -> None:
    reference = load_generalist("toy", checkpoint=published, device="cpu").model
    lora(reference, tmp_path / "first", seed=1)
    lora(reference, tmp_path / "second", seed=2, use_rslora=True)
    folders = [tmp_path / "first", tmp_path / "second"]
    merged = load_generalist("toy", checkpoint=published, adapters=folders, device="cpu")
    expected = reference.state_dict()
    for name, value in merged.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    plain = load_generalist("toy", checkpoint=published, device="cpu").facts.checkpoint
    assert merged.facts.checkpoint != plain
    assert merged.facts.parameters == sum(value.numel() for value in expected.values())


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_adapter_that_cannot_be_merged_is_refused(published: Path, tmp_path: Path) -> None:
    model = load_generalist("toy", checkpoint=published, device="cpu").model
    folder = tmp_path / "adapter"
    lora(model, folder, seed=1)
    adapter = read_adapter(folder)
    with pytest.raises(CheckpointError, match="adapts weights that this model lacks; give its base model"):
        adapter.check({"projector.fc1.weight": (512, 128)})
    with pytest.raises(CheckpointError, match="the model has"):
        adapter.check(dict.fromkeys(adapter.low, (1, 1)))

    edit(folder / "adapter_config.json", use_dora=True)
    with pytest.raises(CheckpointError, match=r"adapter_config.json: \{'use_dora': True\} is not supported; merge it"):
        read_adapter(folder)
    edit(folder / "adapter_config.json", use_dora=False, init_lora_weights="pissa")
    with pytest.raises(CheckpointError, match=r"\{'init_lora_weights': 'pissa'\} is not supported; merge it"):
        read_adapter(folder)
    edit(folder / "adapter_config.json", init_lora_weights=True, r=5)
    with pytest.raises(CheckpointError, match="is not of rank 5"):
        read_adapter(folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    edit(folder / "adapter_config.json", r=4)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: truncated or not safetensors"):
        read_adapter(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: missing; its weights are pickled"):
        read_adapter(folder)
    with pytest.raises(CheckpointError, match=r"adapter_config.json: missing"):
        read_adapter(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_adapter_given_as_checkpoint_says_so(published: Path, folder: Path, tmp_path: Path) -> None:
    engine = load_generalist("toy", checkpoint=published, device="cpu")
    lora(engine.model, tmp_path / "adapter", seed=1)
    for file in folder.glob("model*"):
        file.unlink()
    shutil.copy(tmp_path / "adapter" / "adapter_model.safetensors", folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a LoRA adapter; give it with --adapter"):
        load_generalist("toy", checkpoint=folder, device="cpu")


def test_adapter_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapters: need the checkpoint"):
        load_generalist("toy", adapters=[tmp_path], device="cpu")


def test_merged_weights_do_not_depend_on_the_order_of_the_sums(tmp_path: Path) -> None:
    """A GPU, or another kind of CPU, sums otherwise; the checkpoint's hash is to be the same."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn((1024, 1024), generator=generator)).bfloat16()
    low = torch.randn((32, 1024), generator=generator)
    high = 0.01 * torch.randn((1024, 32), generator=generator)
    order = torch.randperm(32, generator=generator)
    one = Adapter(tmp_path, 0.5, {"w": low}, {"w": high})
    other = Adapter(tmp_path, 0.5, {"w": low[order]}, {"w": high[:, order]})
    assert torch.equal(one.merge("w", weight), other.merge("w", weight))
    assert not torch.equal(one.merge("w", weight), weight)
