"""The specialist at published size on a GPU that is pretended: devices, types, shapes, and what a capture permits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pretended
import pytest
import torch

from robodual.device import choose
from robodual.facts import EngineFacts
from robodual.profiles import PROFILES
from robodual.specialist.captured import LENGTHS
from robodual.specialist.engine import Features, Frame, Projected, Request, SpecialistEngine
from robodual.specialist.policy import Policy

pytestmark = pretended.needed

CONFIG = PROFILES["robodual-7b"].specialist
CHUNK = np.zeros((8, 7), np.float32)
FRAME = Frame(
    rgb_static=np.zeros((200, 200, 3), np.uint8),
    rgb_gripper=np.zeros((84, 84, 3), np.uint8),
    depth_static=np.zeros((200, 200), np.float32),
    depth_gripper=np.zeros((84, 84), np.float32),
    rgb_tactile=np.zeros((160, 120, 6), np.uint8),
    proprio=np.zeros(7, np.float32),
)


def run(engine: SpecialistEngine, *requests: Request) -> None:
    """What `act` does, but for bringing the values to the host."""
    assert engine._captured is not None
    inputs = engine._gather(requests)
    captured = engine._captured(requests, engine._previous(requests))
    *_, (_, (memory, _)) = engine._captured._shapes._graphs.values()
    for given in (inputs, engine._captured._prepared(memory)):
        assert {tensor.device for tensor in vars(given).values() if tensor is not None} == {pretended.DEVICE}
        assert given.keys_values.shape[1] == LENGTHS * 2
    for found in (captured, engine._step(inputs)):
        assert found is not None
        for tensor, shape in zip(found, ((8, 7), (CONFIG.latents, CONFIG.width)), strict=True):
            assert (tensor.shape, tensor.dtype) == ((len(requests), *shape), torch.float32)
            assert tensor.device == pretended.DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sensors", ["published", "all", "static"])
def test_captured_steps(dtype: torch.dtype, sensors: str) -> None:
    chosen = {"published": {}, "all": {"with_tactile": True}, "static": {"with_depth": False, "with_gripper": False}}
    with torch.device("meta"):
        policy = Policy(replace(CONFIG, **chosen[sensors]))
    with pretended.gpu() as gpu, torch.inference_mode():
        pretended.place(policy)
        policy.serve_in(dtype)
        engine = SpecialistEngine(policy, EngineFacts("robodual-7b", "", "cuda:0", str(dtype), 0, 0))

        def context(length: int) -> Projected:
            return engine.project(torch.zeros((length, CONFIG.context_width), dtype=torch.bfloat16))

        features = Features(torch.zeros((CONFIG.latents, CONFIG.width), device=pretended.DEVICE))
        for _ in range(2):
            run(engine, Request(FRAME, None, context(83), CHUNK, CHUNK))
            run(
                engine,
                Request(FRAME, features, context(90), CHUNK, CHUNK),
                Request(FRAME, FRAME.rgb_static, context(83), CHUNK, CHUNK),
            )
    assert engine.captures
    assert gpu.captures == 2, "steps of one and of two"
    assert gpu.replays == 2 * 2


def test_float32_is_float32_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # PyTorch's default
    assert (choose("cuda"), choose("cuda:1")) == (torch.device("cuda:0"), torch.device("cuda:1"))
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
