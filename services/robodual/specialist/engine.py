"""The specialist as the services run it: requests in, chunks out, each thing computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from robodual.facts import EngineFacts, count_parameters, count_weight_bytes, device_memory, hash_state_dict
from robodual.images import Strategy
from robodual.profiles import PROFILES
from robodual.specialist.checkpoint import load
from robodual.specialist.encoder import Encoder
from robodual.specialist.frames import Frame, Preparation
from robodual.specialist.policy import Policy, needed
from robodual.specialist.sampler import Sampler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

__all__ = ["Answer", "Features", "Frame", "Projected", "Request", "SpecialistEngine", "load_specialist"]


@dataclass(frozen=True)
class Projected:
    """A conditioning's part of the context, projected: keys and values of all blocks, and the mean."""

    keys_values: Tensor  # [L, blocks * 2 * width]
    mean: Tensor  # [width]


@dataclass(frozen=True)
class Features:
    """What the next step needs of a static frame: its latents in the place of the previous frame."""

    latents: Tensor  # [latents, width]


@dataclass(frozen=True)
class Request:
    """One control step of one session.

    `previous` is what the last step's answer gave, or the previous static frame (uint8 [H, W, 3]), or None at step 0,
    where the current frame stands in, as published.
    """

    frame: Frame
    previous: Features | npt.NDArray[np.uint8] | None
    conditioning: Projected
    reference_actions: npt.NDArray[np.float32]  # [8, 7], cut by the reference window
    noise: npt.NDArray[np.float32]  # [8, 7], the starting sample


@dataclass(frozen=True)
class Answer:
    """The chunk that the diffusion gave, and the frame's features, to give back as `previous` at the next step."""

    chunk: npt.NDArray[np.float32]  # [8, 7]
    features: Features


class SpecialistEngine:
    """Runs a policy's weights by the fast path; `policy.sample` is the plain one.

    All methods block, and keep no state between calls.
    """

    def __init__(self, policy: Policy, facts: EngineFacts, strategy: Strategy = "resize-naive") -> None:
        weight = policy.model.x_embedder.weight
        self.policy = policy.eval()
        self.facts = facts
        self.width = policy.config.context_width
        self.sensors = policy.config.sensors
        self.preparation = Preparation(policy.config, strategy, weight.device, weight.dtype)
        with torch.inference_mode():
            self._vision_encoder = Encoder(policy.vision_encoder)
            self._depth_encoder = Encoder(policy.depth_encoder) if policy.depth_encoder is not None else None
            self._tactile_encoder = Encoder(policy.tactile_encoder) if policy.tactile_encoder is not None else None
            self._sampler = Sampler(policy.model, policy.config)

    @torch.inference_mode()
    def project(self, hidden_states: Tensor) -> Projected:
        """The generalist's hidden states [L, width], on any device, to what `act` reads; once per conditioning.

        Raises:
            ValueError: if the shape is another.
        """
        if hidden_states.dim() != 2 or hidden_states.shape[1] != self.width or not len(hidden_states):
            raise ValueError(f"hidden_states must have shape (L, {self.width}), not {tuple(hidden_states.shape)}")
        preparation = self.preparation
        tokens = self.policy.model.context_adapter(hidden_states.to(preparation.device, preparation.dtype))
        return Projected(self._sampler.keys_values(tokens), tokens.mean(dim=0))

    @torch.inference_mode()
    def act(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers a batch of any size, with contexts of any lengths; no answer depends on the other requests.

        Raises:
            ValueError: naming the sensor, if a frame lacks one that the model reads.
        """
        if not requests:
            return []
        sensor_tokens, following = self._encode(requests)  # [B, tokens, D], [B, latents, D]
        keys_values, mask = _join(self._sampler.keys_values(sensor_tokens), [r.conditioning for r in requests])
        vectors = self.preparation.vectors
        proprio = self.policy.model.proprio_embedder(vectors([request.frame.proprio for request in requests]))
        chunks = self._sampler(
            vectors([request.noise for request in requests]).float(),
            vectors([request.reference_actions for request in requests]),
            proprio + torch.stack([request.conditioning.mean for request in requests]),
            keys_values,
            mask,
        )
        # A copy, so that a session keeps its own few kilobytes and not the batch's.
        return [Answer(chunk, Features(latents.clone())) for chunk, latents in zip(chunks.cpu().numpy(), following)]

    def _encode(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        """The sensors' part of the context [B, tokens, D], and the static latents as the next step will see them."""
        policy, model, preparation = self.policy, self.policy.model, self.preparation
        frames = [request.frame for request in requests]
        count = len(frames)
        before = [request.previous for request in requests if isinstance(request.previous, np.ndarray)]
        colour = [frame.rgb_static for frame in frames] + before
        if policy.config.with_gripper:
            colour += [needed(frame.rgb_gripper, "rgb_gripper") for frame in frames]
        seen = self._vision_encoder(preparation.colour(colour))  # [B + before (+ B), N, D]
        static = seen[: count + len(before), None].expand(-1, 2, -1, -1)
        latents = model.visual_adapter(static)  # [B + before, 2, latents, D]: in the current and the previous place
        current, following = latents[:count].unbind(1)
        replayed = iter(latents[count:, 1])
        previous = []
        for request, own in zip(requests, following):
            if isinstance(request.previous, Features):
                previous.append(request.previous.latents)
            else:
                previous.append(own if request.previous is None else next(replayed))
        parts = [current, torch.stack(previous)]
        if self._depth_encoder is not None and model.depth_adapter is not None:
            maps = [preparation.static_depth(frames)]
            if policy.config.with_gripper:
                maps.append(preparation.gripper_depth(frames))
            tokens = self._depth_encoder(torch.cat(maps))
            parts.append(model.depth_adapter(tokens[:count]))
            if model.gripper_visual_adapter is not None and model.gripper_depth_adapter is not None:
                parts.append(model.gripper_visual_adapter(seen[-count:, None])[:, 0])
                parts.append(model.gripper_depth_adapter(tokens[count:]))
        if self._tactile_encoder is not None and model.tactile_adapter is not None:
            parts.append(model.tactile_adapter(self._tactile_encoder(preparation.tactile_images(frames))))
        return torch.cat(parts, dim=1), following


def _join(sensors: Tensor, conditionings: Sequence[Projected]) -> tuple[Tensor, Tensor | None]:
    """Sensors' keys and values [B, T, K] before each request's [L, K], padded to one length, with a mask if need be."""
    lengths = [len(conditioning.keys_values) for conditioning in conditionings]
    longest = max(lengths)
    padded = [F.pad(c.keys_values, (0, 0, 0, longest - n)) for c, n in zip(conditionings, lengths)]
    joined = torch.cat((sensors, torch.stack(padded)), dim=1)
    if min(lengths) == longest:
        return joined, None
    ends = torch.tensor(lengths, device=sensors.device) + sensors.shape[1]
    return joined, torch.arange(joined.shape[1], device=sensors.device) < ends[:, None]


def load_specialist(
    profile: str,
    *,
    checkpoint: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    strategy: Strategy = "resize-naive",
    sensors: Mapping[str, bool] | None = None,
    diffusion_steps: int | None = None,
    guidance_scale: float | None = None,
) -> SpecialistEngine:
    """Builds an engine.

    Args:
        profile: a name in `robodual.profiles.PROFILES`; its shapes hold where the checkpoint does not carry its own
        checkpoint: a published EMA `.pt` or our `.safetensors`; None for random weights made from `seed`
        device: "cpu", "cuda", "cuda:1", ...; auto takes a GPU where there is one
        dtype: "float32" or "bfloat16"; auto is float32
        seed: of the random weights
        strategy: how frames become square; the generalist's checkpoint says it in `image_resize_strategy`
        sensors: `with_depth`, `with_gripper`, `with_tactile` where they are to differ from the profile's, or from the
            checkpoint's own
        diffusion_steps: DDIM steps of one answer, 1 to 100, where they are to differ; so does `guidance_scale`, the
            weight of classifier-free guidance (1: none)

    Raises:
        ValueError: naming the argument, if it is none of these.
        CheckpointError: naming the file and the fix, if the checkpoint cannot be used.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, not {profile!r}")
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype must be auto, {' or '.join(DTYPES)}, not {dtype!r}")
    config = PROFILES[profile].specialist
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if checkpoint is None:
        policy = Policy(replace(config, **(sensors or {}))).initialize(seed)
    else:
        policy = load(checkpoint, config, sensors)
    if diffusion_steps is not None:
        policy.config = replace(policy.config, diffusion_steps=diffusion_steps)
    if guidance_scale is not None:
        policy.config = replace(policy.config, guidance_scale=guidance_scale)
    policy.to(torch.device(device), DTYPES["float32" if dtype == "auto" else dtype])
    return SpecialistEngine(policy, _facts(profile, policy, strategy), strategy)


def _facts(profile: str, policy: Policy, strategy: Strategy) -> EngineFacts:
    weight = policy.model.x_embedder.weight
    config = policy.config
    return EngineFacts(
        profile=profile,
        checkpoint=hash_state_dict(policy),
        device=str(weight.device),
        dtype=str(weight.dtype).removeprefix("torch."),
        parameters=count_parameters(policy),
        weight_bytes=count_weight_bytes(policy),
        details={
            "diffusion_steps": str(config.diffusion_steps),
            "guidance_scale": f"{config.guidance_scale:g}",
            "image_resize_strategy": strategy,
            **device_memory(weight.device),
        },
    )
