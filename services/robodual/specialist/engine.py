"""The specialist as the services run it: requests in, chunks out, each thing computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from robodual.device import choose
from robodual.facts import EngineFacts, count_parameters, count_weight_bytes, device_memory, hash_state_dict
from robodual.images import Strategy
from robodual.profiles import PROFILES
from robodual.specialist.captured import LENGTHS, CapturedSteps, Sides
from robodual.specialist.checkpoint import load
from robodual.specialist.frames import Frame, Preparation
from robodual.specialist.packing import can_pack
from robodual.specialist.policy import Policy
from robodual.specialist.request import Answer, Features, Projected, Request
from robodual.specialist.step import Inputs, Step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

__all__ = ["Answer", "Features", "Frame", "Projected", "Request", "SpecialistEngine", "load_specialist"]


class SpecialistEngine:
    """Runs a policy's weights by the fast path; `policy.sample` is the plain one.

    All methods block, and keep no state between calls.
    """

    def __init__(self, policy: Policy, facts: EngineFacts, strategy: Strategy = "resize-naive") -> None:
        weight = policy.vision_encoder.pos_embed
        self.policy = policy.eval()
        self.facts = facts
        self.width = policy.config.context_width
        self.sensors = policy.config.sensors
        self.preparation = Preparation(policy.config, strategy, weight.device, weight.dtype)
        self.captures = weight.is_cuda  # a graph for each batch size, padded length and shape of frames
        with torch.inference_mode():
            self._step = Step(policy)
        if self.captures:
            facts.details["denoiser"] = "fused kernels" if self._step.is_fused else "plain operations"
        self._captured = CapturedSteps(self._step, self.preparation) if self.captures else None

    @torch.inference_mode()
    def project(self, hidden_states: Tensor) -> Projected:
        """The generalist's hidden states [L, width], on any device, to what `act` reads; once per conditioning.

        Raises:
            ValueError: if the shape is another.
        """
        if hidden_states.dim() != 2 or hidden_states.shape[1] != self.width or not len(hidden_states):
            raise ValueError(f"hidden_states must have shape (L, {self.width}), not {tuple(hidden_states.shape)}")
        there = hidden_states.to(self.preparation.device)  # as they are, 16 bits wide
        return Projected(*self._step.project(there.to(torch.float32)))

    @torch.inference_mode()
    def act(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers a batch of any size, with contexts of any lengths; no answer depends on the other requests.

        Raises:
            ValueError: naming the sensor, if a frame lacks one that the model reads.
        """
        if self._captured is None:
            return _answers(*self._step(self._gather(requests))) if requests else []
        alike: dict[Sides, list[int]] = {}  # places in the batch of frames of the same shapes
        for place, request in enumerate(requests):
            alike.setdefault(self._captured.sides(request.frame), []).append(place)
        answers: dict[int, Answer] = {}
        for places in alike.values():
            group = [requests[place] for place in places]
            outputs = self._captured(group, self._previous(group))
            if outputs is None:
                outputs = self._step(self._gather(group))
            answers.update(zip(places, _answers(*outputs)))
        return [answers[place] for place in range(len(requests))]

    def _gather(self, requests: Sequence[Request]) -> Inputs:
        preparation, config = self.preparation, self.policy.config
        frames = [request.frame for request in requests]
        pixels, maps = [preparation.static(frames)], []
        if config.with_depth:
            maps.append(preparation.static_depth(frames))
        if config.with_gripper:
            pixels.append(preparation.gripper(frames))
            maps.append(preparation.gripper_depth(frames))
        none = torch.zeros(config.latents, config.width, device=preparation.device)
        conditionings = [request.conditioning for request in requests]
        keys_values, mask = _pad([c.keys_values for c in conditionings], LENGTHS if self.captures else None)
        return Inputs(
            pixels=torch.cat(pixels),
            maps=torch.cat(maps) if maps else None,
            tactile=preparation.tactile(frames) if config.with_tactile else None,
            proprio=preparation.vectors([frame.proprio for frame in frames]),
            previous=torch.stack([none if latents is None else latents for latents in self._previous(requests)]),
            first=preparation.flags([request.previous is None for request in requests]).view(-1, 1, 1),
            keys_values=keys_values,
            mean=torch.stack([conditioning.mean for conditioning in conditionings]),
            mask=None if mask is None else preparation.to_device(mask),
            reference=preparation.vectors([request.reference_actions for request in requests]),
            noise=preparation.vectors([request.noise for request in requests]),
        )

    def _previous(self, requests: Sequence[Request]) -> list[Tensor | None]:
        """Latents [latents, D]: those that were kept, or of the frame that was given, or None at step 0."""
        given = [request.previous for request in requests if isinstance(request.previous, np.ndarray)]
        replayed = iter(self._step.following(self.preparation.colour(given)) if given else ())
        latents: list[Tensor | None] = []
        for previous in (request.previous for request in requests):
            if isinstance(previous, Features):
                latents.append(previous.latents)
            else:
                latents.append(None if previous is None else next(replayed))
        return latents


def _answers(chunks: Tensor, following: Tensor) -> list[Answer]:
    """Waits for the chunks [B, 8, 7]."""
    # A copy, so that a session keeps its own few kilobytes and not the batch's.
    kept = [Features(latents.clone()) for latents in following]
    return [Answer(chunk, features) for chunk, features in zip(chunks.cpu().numpy(), kept)]


def _pad(sequences: Sequence[Tensor], multiple: int | None) -> tuple[Tensor, Tensor | None]:
    """Sequences [L, K] as one tensor [B, longest, K]; and on the host, a mask bool [B, longest] of what is no padding.

    With `multiple`, the length is rounded up to it and there is always a mask, so that few shapes occur; without,
    there is none where all lengths are the same.
    """
    lengths = [len(sequence) for sequence in sequences]
    longest = max(lengths)
    if multiple is not None:
        longest = -(-longest // multiple) * multiple
    padded = torch.stack([F.pad(s, (0, 0, 0, longest - n)) for s, n in zip(sequences, lengths)])
    if multiple is None and min(lengths) == longest:
        return padded, None
    return padded, torch.arange(longest) < torch.tensor(lengths)[:, None]


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
        dtype: "float32", or "bfloat16" for the encoders; auto is float32. The denoiser is always float32
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
    place = choose(device)
    if checkpoint is None:
        policy = Policy(replace(config, **(sensors or {}))).initialize(seed)
    else:
        policy = load(checkpoint, config, sensors)
    if diffusion_steps is not None:
        policy.config = replace(policy.config, diffusion_steps=diffusion_steps)
    if guidance_scale is not None:
        policy.config = replace(policy.config, guidance_scale=guidance_scale)
    policy.to(place)
    policy.serve_in(DTYPES["float32" if dtype == "auto" else dtype])
    return SpecialistEngine(policy, _facts(profile, policy, strategy), strategy)


def _facts(profile: str, policy: Policy, strategy: Strategy) -> EngineFacts:
    weight, config = policy.vision_encoder.pos_embed, policy.config
    execution = "CUDA graphs" if weight.is_cuda else "packed layers" if can_pack(weight) else "eager"
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
            "execution": execution,
            **device_memory(weight.device),
        },
    )
