"""One control step as one function of tensors, for a batch of requests: what a GPU captures and replays.

Everything is computed once: the frames of both cameras in one batch, the maps of both in another, the context's keys
and values for all blocks, and nothing of the previous frame, whose latents are an input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import structlog
import torch
from torch import Tensor
from torch.nn import functional as F

from robodual.device import Side
from robodual.specialist import fusing
from robodual.specialist.config import SpecialistConfig
from robodual.specialist.denoiser import Denoiser
from robodual.specialist.encoder import Encoder
from robodual.specialist.latents import ColourLatents, MapLatents
from robodual.specialist.policy import Policy, needed
from robodual.specialist.sampler import Sampler

logger = structlog.get_logger(__name__)

M = TypeVar("M")
T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """What a step reads, on the device. B requests, L the longest conditioning's tokens."""

    pixels: Tensor  # [B or 2 B, 3, S, S], normalised: all static frames, then all gripper frames
    maps: Tensor | None  # [B or 2 B, 1, S, S]: all static depth maps, then all gripper ones
    tactile: Tensor | None  # [B, 6, S', S']
    proprio: Tensor  # [B, 7]
    previous: Tensor  # [B, latents, D]: the previous static frame's latents; anything where there is none
    first: Tensor  # bool [B, 1, 1]: whether there is none, so that the current frame stands in
    keys_values: Tensor  # [B, L, blocks * 2 * D], of the generalist's tokens
    mean: Tensor  # [B, D], of the generalist's projected tokens
    mask: Tensor | None  # bool [B, L], False where they are padding; None where there is none
    reference: Tensor  # [B, 8, 7]
    noise: Tensor  # float32 [B, 8, 7]


class Step:
    """Runs steps with a policy's weights, which are laid out once: later changes of the policy are not followed.

    `fuse` and `products` allow Triton's kernels, where they can run: of the denoiser, and of the encoders' products.
    """

    def __init__(self, policy: Policy, *, fuse: bool = True, products: bool = True) -> None:
        model = policy.model
        cameras = 2 if policy.config.with_gripper else 1
        self._see = Encoder(policy.vision_encoder, cameras, triton=products)
        self._colour = ColourLatents(model.visual_adapter)
        self._gripper_colour = _made(ColourLatents, model.gripper_visual_adapter)
        self._feel = None if policy.depth_encoder is None else Encoder(policy.depth_encoder, cameras, triton=products)
        self._depth = _made(MapLatents, model.depth_adapter)
        self._gripper_depth = _made(MapLatents, model.gripper_depth_adapter)
        self._touch = None if policy.tactile_encoder is None else Encoder(policy.tactile_encoder, 1, triton=products)
        self._tactile = _made(MapLatents, model.tactile_adapter)
        self._proprio = model.proprio_embedder
        self._context = model.context_adapter
        self._sampler = choose_sampler(model, policy.config, fuse)
        self._side = Side(model.x_embedder.weight.device)  # for maps and touch, beside the frames: neither fills a GPU

    @property
    def is_fused(self) -> bool:
        """Whether the denoiser runs as fused kernels."""
        return type(self._sampler) is not Sampler

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The generalist's hidden states [L, context width] to keys and values [L, blocks * 2 * D] and mean [D]."""
        tokens = self._context(hidden_states)
        return self._sampler.keys_values(tokens), tokens.mean(dim=0)

    def following(self, pixels: Tensor) -> Tensor:
        """Static frames [B, 3, S, S] to their latents in the place of the previous frame, [B, latents, D]."""
        return self._colour(self._see(pixels))[:, 1]

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Actions, float32 [B, 8, 7], and the static frames' latents as the next step needs them, [B, latents, D]."""
        count = len(inputs.noise)
        with self._side.beside():
            depth, gripper_depth, touch = self._felt(inputs)
            prepared = self._sampler.prepare(inputs.reference, self._proprio(inputs.proprio) + inputs.mean)
        seen = self._see(inputs.pixels)  # [B or 2 B, N, vision width]
        current, following = self._colour(seen[:count]).unbind(1)
        gripper = None if self._gripper_colour is None else self._gripper_colour(seen[count:])[:, 0]
        self._side.join()
        previous = torch.where(inputs.first, following, inputs.previous)
        parts = (current, previous, depth, gripper, gripper_depth, touch)
        sensors = self._sampler.keys_values(torch.cat([part for part in parts if part is not None], dim=1))
        mask = None if inputs.mask is None else F.pad(inputs.mask, (sensors.shape[1], 0), value=True)
        context = torch.cat((sensors, inputs.keys_values), dim=1)
        chunks = self._sampler.denoise(inputs.noise, prepared, context, mask)
        return chunks, following

    def _felt(self, inputs: Inputs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The latents [B, latents, D] of the static map, the gripper's map and the touch; None where there are none."""
        count = len(inputs.noise)
        depth = gripper_depth = touch = None
        if self._feel is not None and self._depth is not None:
            felt = self._feel(needed(inputs.maps, "depth_static"))
            depth = self._depth(felt[:count])
            gripper_depth = None if self._gripper_depth is None else self._gripper_depth(felt[count:])
        if self._touch is not None and self._tactile is not None:
            touch = self._tactile(self._touch(needed(inputs.tactile, "rgb_tactile")))
        return depth, gripper_depth, touch


def choose_sampler(model: Denoiser, config: SpecialistConfig, fuse: bool = True) -> Sampler:
    """Triton's kernels where they are allowed and can run, or else plain operations."""
    if not fuse or not fusing.fuses(config, model.x_embedder.weight.device):
        return Sampler(model, config)
    try:
        from robodual.specialist.fused import FusedSampler  # it imports Triton

        sampler = FusedSampler(model, config)
        sampler.try_one()
    except Exception as error:  # of the compiler, for a GPU that has too little of something: slower, but as right
        logger.warning("the specialist denoises without fused kernels", reason=f"{type(error).__name__}: {error}")
        return Sampler(model, config)
    return sampler


def _made(kind: Callable[[M], T], module: M | None) -> T | None:
    return None if module is None else kind(module)
