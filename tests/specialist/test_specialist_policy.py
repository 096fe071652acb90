"""The specialist in training: dropout, the frozen encoder, masked conditioning; and what its configuration refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from robodual.specialist.config import SpecialistConfig
from robodual.specialist.policy import Observation, Policy

TOY = SpecialistConfig.toy()


def batch(count: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator)

    size = TOY.image_size
    return {
        "observation": Observation(
            rgb_static=normal(3, size, size),
            rgb_static_previous=normal(3, size, size),
            proprio=normal(7),
            depth_static=normal(50, 50),
            rgb_gripper=normal(3, size, size),
            depth_gripper=normal(21, 21),
        ),
        "actions": normal(8, 7),
        "reference": normal(8, 7),
        "hidden_states": normal(12, TOY.context_width),
        "noise": normal(8, 7),
        "timesteps": torch.tensor([0, 50, 99]),
        "keep_conditioning": torch.tensor([1, 0, 1]),
    }


@pytest.fixture
def policy() -> Policy:
    return Policy(TOY).initialize(0)


def test_attention_drops_out_in_training_alone(policy: Policy) -> None:
    inputs = batch()
    policy.eval()
    assert policy.loss(**inputs).item() == policy.loss(**inputs).item()
    torch.manual_seed(0)
    policy.train()
    assert len({policy.loss(**inputs).item() for _ in range(4)}) == 4


def test_colour_encoder_is_frozen(policy: Policy) -> None:
    policy.loss(**batch()).backward()
    assert all(parameter.grad is None for parameter in policy.vision_encoder.parameters())
    trained = [parameter for name, parameter in policy.named_parameters() if not name.startswith("vision_encoder.")]
    assert all(parameter.grad is not None for parameter in trained)


def test_masked_conditioning_vector_forgets_proprioception(policy: Policy) -> None:
    inputs = batch()
    policy.eval()
    for keep, same in ((0, True), (1, False)):
        inputs["keep_conditioning"] = torch.full((3,), keep)
        moved = replace(inputs["observation"], proprio=inputs["observation"].proprio + 1)
        before, after = policy.loss(**inputs), policy.loss(**{**inputs, "observation": moved})
        assert (before.item() == after.item()) is same


def test_padding_of_hidden_states_changes_nothing(policy: Policy) -> None:
    inputs = batch()
    policy.eval()
    padding = torch.full((3, 5, TOY.context_width), 9.0)
    padded = {**inputs, "hidden_states": torch.cat((inputs["hidden_states"], padding), dim=1)}
    mask = torch.arange(17).expand(3, -1) < 12
    torch.testing.assert_close(policy.loss(**padded, hidden_mask=mask), policy.loss(**inputs))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"with_depth": False}, "with_gripper"),
        ({"image_size": 60}, "image_size"),
        ({"tactile_size": 30}, "tactile_size"),
        ({"vision_heads": 5}, "vision_width"),
        ({"heads": 3}, "width"),
        ({"diffusion_steps": 0}, "diffusion_steps"),
    ],
)
def test_configuration_that_does_not_fit_together_is_refused(change: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        replace(TOY, **change)
