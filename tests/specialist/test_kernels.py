"""Triton's kernels give what the plain operations do: compiled on a GPU, or else in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from robodual.profiles import PROFILES
from robodual.specialist import fusing
from robodual.specialist.config import SpecialistConfig
from robodual.specialist.control import noise
from robodual.specialist.engine import Frame, Request, SpecialistEngine, load_specialist
from robodual.specialist.policy import Policy
from robodual.specialist.sampler import Sampler

pytest.importorskip("triton")
from robodual.specialist import attention, encoder, fused, products

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLOSE = 1e-5 if DEVICE.type == "cpu" else 1e-4  # of actions in [-1, 1]; three products in TF32 round otherwise
FEW = {"blocks": 2, "diffusion_steps": 2, "vision_blocks": 1, "depth_blocks": 1, "context_width": 64}
CONFIGS = {
    "toy": replace(PROFILES["toy"].specialist, **FEW),
    "toy, unguided": replace(PROFILES["toy"].specialist, guidance_scale=1.0, **FEW),
    "playtable": replace(PROFILES["playtable"].specialist, **FEW | {"diffusion_steps": 1}),
    "robodual-7b": replace(PROFILES["robodual-7b"].specialist, **FEW | {"diffusion_steps": 1, "blocks": 1}),
}
# What a kernel takes at a time, so that all loops run: a context of 150, and 640 channels.
AT_A_TIME = {"toy, unguided": {"WIDE": 16, "KEYS": 128}, "playtable": {"GROUPS": 1, "SLAB": 256}}


def lively(config: SpecialistConfig) -> Policy:
    """A policy with no weight at zero, as the gates are at the start of a training."""
    policy = Policy(config).initialize(0).eval().to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            spread = 0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return policy


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":  # each takes the interpreter 10 ms
        monkeypatch.setattr(fused, "WIDE", 128)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_the_fused_denoiser(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[name]
    assert fusing.can_fuse(config)
    for what, size in AT_A_TIME.get(name, {}).items():
        monkeypatch.setattr(fused, what, size)
    model = lively(config).model
    plain, kernels = Sampler(model, config), fused.FusedSampler(model, config)
    generator = torch.Generator().manual_seed(2)
    for batch, length, masked in ((1, 31, False), (2, 150, True)):

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE)

        keys_values = plain.keys_values(normal(batch, length, config.width))
        mask = torch.rand(batch, length, generator=generator).to(DEVICE) < 0.6 if masked else None
        if mask is not None:
            mask[:, 0] = True
        given = (normal(batch, 8, 7), normal(batch, 8, 7), normal(batch, config.width), keys_values, mask)
        torch.testing.assert_close(kernels(*given), plain(*given), rtol=0, atol=CLOSE)


def test_a_step_with_it() -> None:
    """What an engine answers to a batch whose contexts are padded, against the published path."""
    engine = load_specialist("toy", device=str(DEVICE), seed=1, diffusion_steps=1)
    with torch.inference_mode():
        engine._step._sampler = fused.FusedSampler(engine.policy.model, engine.policy.config)
    states = [torch.randn(length, engine.width, generator=torch.Generator().manual_seed(length)) for length in (5, 9)]
    requests = [_request(engine, seed, hidden) for seed, hidden in enumerate(states)]
    for request, hidden, answer in zip(requests, states, engine.act(requests)):
        expected = engine.policy.sample(
            engine.preparation.observation(request.frame, request.frame.rgb_static),
            torch.from_numpy(request.reference_actions)[None].to(DEVICE),
            hidden[None].to(DEVICE),
            torch.tensor(request.noise)[None].to(DEVICE),
        )
        np.testing.assert_allclose(answer.chunk, expected[0].cpu().numpy(), rtol=0, atol=CLOSE)


def _request(engine: SpecialistEngine, seed: int, hidden: Tensor) -> Request:
    random = np.random.default_rng(seed)
    frame = Frame(
        rgb_static=random.integers(0, 256, (200, 200, 3), dtype=np.uint8),
        rgb_gripper=random.integers(0, 256, (84, 84, 3), dtype=np.uint8),
        depth_static=random.uniform(3.5, 6.2, (200, 200)).astype(np.float32),
        depth_gripper=random.uniform(0, 2, (84, 84)).astype(np.float32),
        rgb_tactile=np.zeros((160, 120, 6), np.uint8),
        proprio=random.normal(size=7).astype(np.float32),
    )
    reference = random.uniform(-1, 1, (8, 7)).astype(np.float32)
    return Request(frame, None, engine.project(hidden), reference, noise(seed, 0, 0))


@torch.inference_mode()
def test_products() -> None:
    generator = torch.Generator().manual_seed(3)
    for tile, (rows, depth, columns) in product((None, *products.TILES), ((70, 48, 144), (2, 33, 40))):
        x = torch.randn(2, rows, depth, generator=generator).to(DEVICE)[:, ::2]  # not contiguous
        weight = (torch.randn(columns, depth, generator=generator) * depth**-0.5).to(DEVICE)
        bias = torch.randn(columns, generator=generator).to(DEVICE)
        residual = torch.randn(2, (rows + 1) // 2, columns, generator=generator).to(DEVICE)
        plain = F.linear(x, weight, bias)
        for expected, found in (
            (F.linear(x, weight), products.linear(x, weight, tile=tile)),
            (F.gelu(plain), products.linear(x, weight, bias, "none", tile=tile)),
            (F.gelu(plain, approximate="tanh"), products.linear(x, weight, bias, "tanh", tile=tile)),
            (residual + plain, products.linear(x, weight, bias, residual=residual, tile=tile)),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_encoders_attention() -> None:
    generator = torch.Generator().manual_seed(4)
    for batch, count, heads, channels in ((2, 70, 3, 16), (1, 197, 2, 64), (3, 5, 1, 24)):
        qkv = torch.randn(batch * count, 3 * heads * channels, generator=generator).to(DEVICE) * 2
        expected = encoder.attend(qkv, batch, heads)
        torch.testing.assert_close(attention.attend(qkv, batch, heads), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_an_encoder_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "can_launch", lambda device: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # whose packed layers come first
    policy = lively(replace(CONFIGS["toy"], with_tactile=True))
    for module, channels, size in (
        (policy.vision_encoder, 3, policy.config.image_size),
        (policy.depth_encoder, 1, policy.config.image_size),
        (policy.tactile_encoder, 6, policy.config.tactile_size),
    ):
        assert module is not None
        images = torch.randn(5, channels, size, size, generator=torch.Generator().manual_seed(5)).to(DEVICE)
        found = encoder.Encoder(module, 1)
        torch.testing.assert_close(found(images), module(images), rtol=1e-5, atol=2e-5)
        assert found._attend is attention.attend


def test_tiles_fill_a_gpu() -> None:
    for rows, columns in product((394, 512, 3152), (384, 1152, 1536)):
        height, width, _ = products.choose_tile(rows, columns)
        assert -(-rows // height) * -(-columns // width) >= products.PROGRAMS
    assert products.choose_tile(3152, 384) == products.TILES[0]
    assert products.choose_tile(70, 48) == products.TILES[-1]
