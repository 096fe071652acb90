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

from robodual.device import choose
from robodual.facts import EngineFacts, count_parameters, count_weight_bytes, device_memory, hash_state_dict
from robodual.graphs import Graphs
from robodual.images import Strategy
from robodual.profiles import PROFILES
from robodual.specialist.checkpoint import load
from robodual.specialist.frames import Frame, Preparation
from robodual.specialist.packing import can_pack
from robodual.specialist.policy import Policy
from robodual.specialist.step import Inputs, Step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

GPU_LENGTHS = 64  # a GPU's conditionings are padded to multiples of it: one captured graph for each

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
        weight = policy.vision_encoder.pos_embed
        self.policy = policy.eval()
        self.facts = facts
        self.width = policy.config.context_width
        self.sensors = policy.config.sensors
        self.preparation = Preparation(policy.config, strategy, weight.device, weight.dtype)
        self.captures = weight.is_cuda  # a graph for each batch size and padded length
        with torch.inference_mode():
            self._step = Step(policy)
        self._graphs = (
            Graphs(lambda *inputs: self._step(Inputs(*inputs)), weight.device, "steps run") if self.captures else None
        )

    @torch.inference_mode()
    def project(self, hidden_states: Tensor) -> Projected:
        """The generalist's hidden states [L, width], on any device, to what `act` reads; once per conditioning.

        Raises:
            ValueError: if the shape is another.
        """
        if hidden_states.dim() != 2 or hidden_states.shape[1] != self.width or not len(hidden_states):
            raise ValueError(f"hidden_states must have shape (L, {self.width}), not {tuple(hidden_states.shape)}")
        preparation = self.preparation
        return Projected(*self._step.project(hidden_states.to(preparation.device, torch.float32)))

    @torch.inference_mode()
    def act(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers a batch of any size, with contexts of any lengths; no answer depends on the other requests.

        Raises:
            ValueError: naming the sensor, if a frame lacks one that the model reads.
        """
        if not requests:
            return []
        inputs = self._gather(requests)
        chunks, following = self._step(inputs) if self._graphs is None else self._graphs(*vars(inputs).values())
        # A copy, so that a session keeps its own few kilobytes and not the batch's.
        kept = [Features(latents.clone()) for latents in following]
        return [Answer(chunk, features) for chunk, features in zip(chunks.cpu().numpy(), kept)]

    def _gather(self, requests: Sequence[Request]) -> Inputs:
        preparation, config = self.preparation, self.policy.config
        frames = [request.frame for request in requests]
        pixels, maps = [preparation.static(frames)], []
        if config.with_depth:
            maps.append(preparation.static_depth(frames))
        if config.with_gripper:
            pixels.append(preparation.gripper(frames))
            maps.append(preparation.gripper_depth(frames))
        conditionings = [request.conditioning for request in requests]
        keys_values, mask = _pad([c.keys_values for c in conditionings], GPU_LENGTHS if self.captures else None)
        return Inputs(
            pixels=torch.cat(pixels),
            maps=torch.cat(maps) if maps else None,
            tactile=preparation.tactile(frames) if config.with_tactile else None,
            proprio=preparation.vectors([frame.proprio for frame in frames]),
            previous=self._previous(requests),
            first=preparation.flags([request.previous is None for request in requests]).view(-1, 1, 1),
            keys_values=keys_values,
            mean=torch.stack([conditioning.mean for conditioning in conditionings]),
            mask=None if mask is None else preparation.to_device(mask),
            reference=preparation.vectors([request.reference_actions for request in requests]),
            noise=preparation.vectors([request.noise for request in requests]),
        )

    def _previous(self, requests: Sequence[Request]) -> Tensor:
        """Latents [B, latents, D]: those that were kept, or of the frames that were given, or zeros at step 0."""
        given = [request.previous for request in requests if isinstance(request.previous, np.ndarray)]
        replayed = iter(self._step.following(self.preparation.colour(given)) if given else ())
        preparation, config = self.preparation, self.policy.config
        none = torch.zeros(config.latents, config.width, device=preparation.device)
        latents = []
        for previous in (request.previous for request in requests):
            if isinstance(previous, Features):
                latents.append(previous.latents)
            else:
                latents.append(none if previous is None else next(replayed))
        return torch.stack(latents)


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
