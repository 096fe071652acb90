"""One training step of the specialist has the published loss and gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from parity_cases import draw, paths
from test_specialist_parity import inputs_of, policy_of

from robodual.specialist.config import CHUNK, SpecialistConfig


@pytest.mark.parametrize("path", paths("training*.json"), ids=lambda path: path.stem)
def test_loss_and_gradients_are_the_published_ones(path: Path) -> None:
    recorded = json.loads(path.read_text())
    config = SpecialistConfig.published()
    policy = policy_of(config)
    batch = recorded["batch"]
    inputs = inputs_of(recorded["prefix"], config, batch, recorded["context_length"])
    actions = torch.from_numpy(draw(f"{recorded['prefix']}/action", (batch, CHUNK, 7), -1, 1))
    loss = policy.loss(
        **inputs,
        actions=actions,
        timesteps=torch.tensor(recorded["timesteps"]),
        keep_conditioning=torch.tensor(recorded["keep_conditioning"]),
    )
    loss.backward()
    assert loss.item() == pytest.approx(recorded["loss"], rel=1e-4)
    norms = {
        name: float(parameter.grad.norm())
        for name, parameter in policy.named_parameters()
        if parameter.grad is not None
    }
    # Keys' biases cancel in the softmax: their gradient is zero but for rounding.
    assert norms == pytest.approx(recorded["gradient_norms"], rel=1e-4, abs=1e-8)
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    assert total == pytest.approx(recorded["gradient_norm"], rel=1e-4)
