"""What helps a small specialist that starts from nothing: whitened inputs, and reading the scene as a second task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calvin_data import write_split
from safetensors.torch import load_file
from tiny import SOURCE, SPECIALIST, TINY, data, settings
from torch import Tensor

from robodual.specialist.ddim import alphas_cumprod, loss_weights
from robodual.specialist.engine import load_specialist
from robodual.training.loop import Report
from robodual.training.runs import GeneralistOptions, train_specialist
from robodual.training.scene import SceneHead, described
from robodual.training.starting_weights import starting_policy, whiten


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("start") / "training", lengths=[24, 20])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_whitened_inputs_make_the_conditioning_vector_vary_by_about_one() -> None:
    config = replace(TINY.specialist, width=64, heads=4, context_width=96)
    scales = torch.tensor([0.1, 0.1, 0.05, 3.0, 0.02, 0.5, 1.0])
    proprio = 0.4 + draw(400, 7) * scales
    means = 5 + 0.03 * draw(400, 96, seed=1)
    plain, whitened = starting_policy(config, 0).model, starting_policy(config, 0)
    whiten(whitened, proprio, means)
    first, adapter = whitened.model.proprio_embedder[0], whitened.model.context_adapter
    with torch.no_grad():
        for layer, values in ((first, proprio), (adapter, means)):
            out = layer(values)
            assert out.mean(dim=0).abs().max() < 1e-3
            assert 0.7 < out.std(dim=0).mean() < 1.4
        assert plain.context_adapter(means).std(dim=0).mean() < 0.1


def test_what_never_changes_is_not_blown_up() -> None:
    policy = starting_policy(TINY.specialist, 0)
    proprio = draw(100, 7)
    proprio[:, 3] = 3.14
    whiten(policy, proprio, draw(100, TINY.specialist.context_width))
    assert policy.model.proprio_embedder[0].weight.abs().max() < 500


def test_a_scene_is_described_without_the_half_turn_that_cannot_be_seen() -> None:
    scene = draw(5, 24)
    turned = scene.clone()
    turned[:, [11, 17, 23]] += torch.pi
    torch.testing.assert_close(described(turned), described(scene), atol=1e-5, rtol=0)
    moved = scene.clone()
    moved[:, 12] += 0.1
    assert (described(moved) - described(scene)).abs().max() == pytest.approx(0.1, abs=1e-5)
    head = SceneHead(8, scene)
    torch.nn.init.zeros_(head.read.weight)
    torch.nn.init.zeros_(head.read.bias)
    # Predicting the mean leaves the variance, which is measured in itself.
    assert head(draw(5, 2, 4), scene).item() == pytest.approx(4 / 5, abs=1e-4)


def test_the_scene_is_learnt_beside_the_actions_and_left_out_of_what_is_served(split: Path, tmp_path: Path) -> None:
    options = replace(SPECIALIST, whiten_inputs=True, scene_weight=0.5)
    reports: list[Report] = []
    values = settings(tmp_path, 60, learning_rate=3e-3, save_steps=30)
    train_specialist(SOURCE, data(split), options, values, report=reports.append)
    first, last = reports[0], reports[-1]
    assert first.loss == pytest.approx(first.metrics["noise_loss"] + 0.5 * first.metrics["scene_loss"], rel=1e-5)
    assert last.metrics["scene_loss"] < 0.5 * first.metrics["scene_loss"]
    checkpoint = tmp_path / "checkpoints" / "step-00000060"
    assert load_specialist("tiny", checkpoint=checkpoint / "specialist.safetensors", device="cpu")
    assert "parameter.scene_head.read.weight" in load_file(checkpoint / "state.safetensors")
    # Resumed from the middle, whitening does not start over.
    whole = (checkpoint / "state.safetensors").read_bytes()
    for path in checkpoint.iterdir():
        path.unlink()
    checkpoint.rmdir()
    train_specialist(SOURCE, data(split), options, values, resume=True)
    assert (checkpoint / "state.safetensors").read_bytes() == whole


def test_they_are_not_for_joint_training(split: Path, tmp_path: Path) -> None:
    options = replace(SPECIALIST, whiten_inputs=True, unfreeze=GeneralistOptions(use_lora=False))
    with pytest.raises(ValueError, match="scene_weight and whiten_inputs are for a specialist's own training"):
        train_specialist(SOURCE, data(split), options, settings(tmp_path, 1))


def test_a_small_gamma_makes_the_loss_that_of_the_actions() -> None:
    """Below the clamp, weighted noise errors are the errors of the actions that they stand for, up to a factor."""
    weights, signal = loss_weights(0.01), alphas_cumprod()
    assert weights.mean() == pytest.approx(1)
    noise_error = 0.1
    actions_error = noise_error * ((1 - signal) / signal).sqrt()
    ratio = weights * noise_error**2 / actions_error**2
    clamped = signal / (1 - signal) < 0.01
    torch.testing.assert_close(ratio[~clamped], ratio[0].expand_as(ratio[~clamped]))
    assert weights[clamped].unique().numel() == 1
    assert (loss_weights(1e9) == 1).all()


def test_weighted_losses_train_the_noisiest_steps_more(split: Path, tmp_path: Path) -> None:
    losses = []
    for gamma in (None, 0.05, 1e9):
        reports: list[Report] = []
        options = replace(SPECIALIST, min_snr_gamma=gamma)
        train_specialist(SOURCE, data(split), options, settings(tmp_path / str(gamma), 2), report=reports.append)
        losses.append(reports[0].loss)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)
