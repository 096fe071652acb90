"""The specialist reproduces the published one's recorded values, by the plain path and by the engine's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from parity_cases import FOLDER, Case, arrays, cases, draw, fill_state_dict, state_dict_shapes
from torch import Tensor

from robodual.images import STRATEGIES, Strategy
from robodual.specialist.config import CHUNK, SpecialistConfig
from robodual.specialist.depth import resize
from robodual.specialist.frames import Preparation
from robodual.specialist.policy import Observation, Policy
from robodual.specialist.step import Inputs, Step

CASES = cases("specialist")
NOT_FILLED = ("rotary_emb.freqs", "temp_embed")


def config_of(case: dict[str, Any]) -> SpecialistConfig:
    return SpecialistConfig(
        with_depth=case["depth"],
        with_gripper=case["gripper"],
        with_tactile=case["tactile"],
        diffusion_steps=case["steps"],
        guidance_scale=3.0 if case["guidance"] else 1.0,
    )


def policy_of(config: SpecialistConfig) -> Policy:
    policy = Policy(config).eval()
    fill_state_dict(policy, skip=NOT_FILLED)
    return policy


def inputs_of(prefix: str, config: SpecialistConfig, batch: int, context_length: int) -> dict[str, Any]:
    """Everything that `Policy.sample` takes, drawn under `prefix`."""

    def value(name: str, *shape: int, low: float | None = None, high: float | None = None) -> Tensor:
        return torch.from_numpy(draw(f"{prefix}/{name}", (batch, *shape), low, high))

    observation = Observation(
        rgb_static=value("rgb_static", 3, 224, 224),
        rgb_static_previous=value("rgb_static_previous", 3, 224, 224),
        proprio=value("proprio", 7),
        depth_static=value("depth_static", 200, 200, low=3.5, high=6.2) if config.with_depth else None,
        rgb_gripper=value("rgb_gripper", 3, 224, 224) if config.with_gripper else None,
        depth_gripper=value("depth_gripper", 84, 84, low=0, high=2) if config.with_gripper else None,
        rgb_tactile=value("rgb_tactile", 6, 160, 120, low=0, high=1) if config.with_tactile else None,
    )
    return {
        "observation": observation,
        "reference": value("ref_action", CHUNK, 7, low=-1, high=1),
        "hidden_states": value("action_cond", context_length, config.context_width),
        "noise": value("noise", CHUNK, 7),
    }


def error(actual: Tensor, recorded: Any) -> float:
    return float((actual - torch.from_numpy(recorded)).abs().max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.short)
def test_plain_path_reproduces_the_published_values(case: Case) -> None:
    config = config_of(case.config)
    policy = policy_of(config)
    inputs = inputs_of(case.short, config, case.config["batch"], case.config["context_length"])
    with torch.inference_mode():
        tokens = policy.encode(inputs["observation"])
        first = (
            inputs["noise"],
            100 // config.diffusion_steps * (config.diffusion_steps - 1),
            tokens,
            inputs["observation"].proprio,
            inputs["reference"],
            inputs["hidden_states"],
        )
        measured = {
            "dino_static_current_mean": tokens.static[:, 0].mean(dim=1),
            "dino_static_current_first_patch": tokens.static[:, 0, 1],
            "first_eps_conditional": policy.predict(*first),
            "first_eps_unconditional": policy.predict(*first, keep=False),
        }
        if tokens.static_depth is not None:
            measured["depth_encoder_cls"] = tokens.static_depth[:, 0]
    for name, value in measured.items():
        if name in case.recorded:
            assert error(value, case.recorded[name]) < 2e-5, name
    assert error(policy.sample(**inputs), case.recorded["actions"]) < 2e-4


@pytest.mark.skipif(not (FOLDER / "specialist_state_dict.json").exists(), reason="the folder has no list of names")
def test_parameter_names_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        state = Policy(SpecialistConfig.published()).state_dict()
    shapes = {name: (list(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in state.items()}
    assert shapes == state_dict_shapes("specialist")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.short)
def test_fast_path_reproduces_the_published_actions(case: Case) -> None:
    config = config_of(case.config)
    policy = policy_of(config)
    batch = case.config["batch"]
    inputs = inputs_of(case.short, config, batch, case.config["context_length"])
    seen: Observation = inputs["observation"]
    with torch.inference_mode():
        step = Step(policy)
        projected = [step.project(states) for states in inputs["hidden_states"]]
        maps = [
            resize(depth[:, None], config.image_size)
            for depth in (seen.depth_static, seen.depth_gripper)
            if depth is not None
        ]
        actions, _ = step(
            Inputs(
                pixels=torch.cat([image for image in (seen.rgb_static, seen.rgb_gripper) if image is not None]),
                maps=torch.cat(maps) if maps else None,
                tactile=None,
                proprio=seen.proprio,
                previous=step.following(seen.rgb_static_previous),
                first=torch.zeros(batch, 1, 1, dtype=torch.bool),
                keys_values=torch.stack([keys_values for keys_values, _ in projected]),
                mean=torch.stack([mean for _, mean in projected]),
                mask=None,
                reference=inputs["reference"],
                noise=inputs["noise"],
            )
        )
    assert error(actions, case.recorded["actions"]) < 2e-4
    assert error(actions, policy.sample(**inputs).numpy()) < 1e-4


@pytest.mark.skipif(not (FOLDER / "image_processor.npz").exists(), reason="the folder has no frames")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frames_become_the_published_pixels(strategy: Strategy) -> None:
    sizes = {"static": (200, 200), "gripper": (84, 84), "wide": (120, 160), "odd": (121, 160), "tall": (97, 60)}
    recorded = arrays(FOLDER / "image_processor.npz")
    preparation = Preparation(SpecialistConfig(), strategy, torch.device("cpu"), torch.float32)
    for name, size in sizes.items():
        frame = draw(f"image/{name}", (*size, 3), 0, 256).astype(np.uint8)
        pixels = preparation.colour([frame])[0, :, ::16, ::16]
        assert error(pixels, recorded[f"{strategy}/{name}"][:3]) < 1e-6, name
