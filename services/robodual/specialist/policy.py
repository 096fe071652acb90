"""The specialist as published: encoders and denoiser, plain sampling and the training loss.

This is the reference implementation: every denoising step recomputes what the published code recomputes. The engine's
fast path (`sampler.py`) must agree with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robodual.specialist import ddim
from robodual.specialist.config import SpecialistConfig
from robodual.specialist.denoiser import CrossAttention, Denoiser, SelfAttention, Tokens
from robodual.specialist.depth import PlainViT, resize
from robodual.specialist.vision import VisionEncoder

T = TypeVar("T")

TACTILE_CHANNELS = 6  # both finger sensors' colours


@dataclass(frozen=True)
class Observation:
    """A batch of sensor readings, ready for the encoders; None where the model does not read the sensor.

    Colour is normalised, [B, 3, S, S]; depth is [B, H, W] at the camera's size, tactile [B, 6, H, W] in [0, 1].
    """

    rgb_static: Tensor
    rgb_static_previous: Tensor
    proprio: Tensor  # [B, 7]
    depth_static: Tensor | None = None
    rgb_gripper: Tensor | None = None
    depth_gripper: Tensor | None = None
    rgb_tactile: Tensor | None = None


DENOISER = "model."  # what the names of the denoiser's weights begin with


class Policy(nn.Module):
    """All weights of a specialist, under their published names."""

    def __init__(self, config: SpecialistConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_encoder = VisionEncoder(config).requires_grad_(False)

        def plain_vit(image_size: int, channels: int) -> PlainViT:
            return PlainViT(
                image_size=image_size,
                patch_size=config.patch_size,
                channels=channels,
                width=config.depth_width,
                blocks=config.depth_blocks,
                heads=config.depth_heads,
                head_width=config.depth_head_width,
            )

        self.depth_encoder = plain_vit(config.image_size, 1) if config.with_depth else None
        self.tactile_encoder = plain_vit(config.tactile_size, TACTILE_CHANNELS) if config.with_tactile else None
        self.model = Denoiser(config)

    def serve_in(self, dtype: torch.dtype) -> None:
        """Casts the encoders. The denoiser stays in float32: in bfloat16 it takes as long, and guidance and ten steps
        make fifty times the error of the encoders'.
        """
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(served_dtype(name, dtype))

    def encode(self, observation: Observation) -> Tokens:
        """Runs the encoders, one call a frame and a map, as published; float32 tokens."""
        frames = (observation.rgb_static, observation.rgb_static_previous)
        static = torch.stack([self.vision_encoder(frame).float() for frame in frames], dim=1)
        static_depth = gripper = gripper_depth = tactile = None
        if self.depth_encoder is not None:
            size = self.config.image_size
            maps = needed(observation.depth_static, "depth_static").unsqueeze(1)
            static_depth = self.depth_encoder(resize(maps, size)).float()
            if self.config.with_gripper:
                gripper = self.vision_encoder(needed(observation.rgb_gripper, "rgb_gripper")).float().unsqueeze(1)
                maps = needed(observation.depth_gripper, "depth_gripper").unsqueeze(1)
                gripper_depth = self.depth_encoder(resize(maps, size)).float()
        if self.tactile_encoder is not None:
            images = needed(observation.rgb_tactile, "rgb_tactile")
            tactile = self.tactile_encoder(resize(images, self.config.tactile_size)).float()
        return Tokens(static, static_depth, gripper, gripper_depth, tactile)

    @torch.inference_mode()
    def sample(self, observation: Observation, reference: Tensor, hidden_states: Tensor, noise: Tensor) -> Tensor:
        """Denoises a chunk of actions the published way.

        The published sampler forgets the tactile tokens in its conditional pass; here both passes have them, as the
        training does. No published result uses tactile sensing.

        Args:
            observation: the sensors
            reference: [B, 8, 7]
            hidden_states: [B, L, context width]
            noise: the starting sample [B, 8, 7]

        Returns:
            Actions [B, 8, 7].
        """
        tokens = self.encode(observation)
        x = noise
        for step in ddim.schedule(self.config.diffusion_steps):
            eps = self.predict(x, step.timestep, tokens, observation.proprio, reference, hidden_states)
            if self.config.guidance_scale != 1:
                free = self.predict(x, step.timestep, tokens, observation.proprio, reference, hidden_states, keep=False)
                eps = free + self.config.guidance_scale * (eps - free)
            x = step.apply(x, eps)
        return x

    def predict(
        self,
        x: Tensor,
        timestep: int,
        tokens: Tokens,
        proprio: Tensor,
        reference: Tensor,
        hidden_states: Tensor,
        *,
        keep: bool = True,
    ) -> Tensor:
        """One evaluation of the denoiser with one timestep for the batch, with its conditioning vector or without."""
        batch = len(x)
        out: Tensor = self.model(
            x,
            torch.full((batch,), timestep, device=x.device),
            reference=reference,
            tokens=tokens,
            hidden_states=hidden_states,
            proprio=proprio,
            keep_conditioning=None if keep else x.new_zeros(batch),
        )
        return out

    def loss(
        self,
        observation: Observation,
        actions: Tensor,
        reference: Tensor,
        hidden_states: Tensor,
        *,
        noise: Tensor,
        timesteps: Tensor,
        keep_conditioning: Tensor,
        hidden_mask: Tensor | None = None,
        tokens: Tokens | None = None,
        sensors: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error between the added and the predicted noise, over everything (a scalar).

        In training mode the denoiser's attention weights have dropout. The frozen colour encoder gets no gradient.

        Args:
            observation: the sensors
            actions: what was demonstrated, [B, 8, 7]
            reference: [B, 8, 7]
            hidden_states: [B, L, context width]
            noise: [B * N, 8, 7]: N draws for each sample, one after the other (published: N is 1)
            timesteps: int64 [B * N], 0 to 99
            keep_conditioning: [B * N] of 0 and 1: which draws keep their conditioning vector
            hidden_mask: bool [B, L], False where a sample's hidden states are padding; all count without it
            tokens, sensors: the observation's, for who has them already
            weights: [100], of each timestep's loss (`ddim.loss_weights`); all alike without them, as published
        """
        repeated = actions.repeat_interleave(len(noise) // len(actions), dim=0)
        predicted = self.model(
            ddim.add_noise(repeated, noise, timesteps),
            timesteps,
            reference=reference,
            tokens=self.encode(observation) if tokens is None else tokens,
            hidden_states=hidden_states,
            proprio=observation.proprio,
            keep_conditioning=keep_conditioning,
            hidden_mask=hidden_mask,
            sensors=sensors,
        )
        if weights is None:
            return F.mse_loss(predicted, noise)
        each: Tensor = (predicted - noise).square().mean(dim=(1, 2))
        return (each * weights[timesteps]).mean()

    def set_attention_dropout(self, chance: float) -> None:
        """Of the denoiser's attention weights, in training; nothing in service depends on it."""
        for module in self.model.modules():
            if isinstance(module, (SelfAttention, CrossAttention)):
                module.dropout = chance

    @torch.no_grad()
    def initialize(self, seed: int) -> Policy:
        """Seeded random weights with activations of order one, for tests and the toy profile. Returns self.

        Unlike a training's start, nothing is zero here: every part of the network changes the answer. Only the last
        layer is small, so that guidance and the first, noisiest steps do not amplify rounding, as they would not in
        a trained network, where both passes nearly agree.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            value = torch.randn(parameter.shape, generator=generator)
            if leaf == "gamma_v":
                value = 0.5 + 0.1 * value
            elif leaf == "g" or (leaf == "weight" and value.dim() == 1):
                value = 1 + 0.1 * value
            elif leaf == "bias":
                value = 0.1 * value
            elif leaf in ("latents", "pos_embed", "pos_embedding", "cls_token", "media_pos_emb"):
                value = 0.5 * value
            else:
                value = 0.8 * value / value[0].numel() ** 0.5
            parameter.copy_(value)
        self.model.final_layer.linear.weight.mul_(0.25)
        return self


def served_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What the weight `name` is cast to by `Policy.serve_in(dtype)`."""
    return torch.float32 if name.startswith(DENOISER) else dtype


def needed(value: T | None, name: str) -> T:
    """The value.

    Raises:
        ValueError: naming the sensor, if there is none.
    """
    if value is None:
        raise ValueError(f"the model reads {name}, and the observation has none")
    return value
