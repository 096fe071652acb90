"""Trains the specialist against a frozen generalist."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robodual.generalist.processor import Processor
from robodual.specialist import checkpoint, ddim
from robodual.specialist.config import ACTION, CHUNK, TRAINING_STEPS
from robodual.specialist.denoiser import Tokens
from robodual.specialist.frames import Preparation
from robodual.specialist.policy import Observation, Policy
from robodual.training.conditioner import Conditioner, Conditioning
from robodual.training.conditioning_cache import ConditioningCache
from robodual.training.dataset import Sample
from robodual.training.loop import Learner
from robodual.training.prompting import Prompts
from robodual.training.scene import SceneHead

WEIGHTS = "specialist.safetensors"
_DIFFUSION = 1  # tells the draws below from those of the data set


@dataclass(frozen=True)
class SpecialistBatch:
    """actions: [B, 8, 7]; noise: [B * N, 8, 7]; timesteps: int64 [B * N]; keep: [B * N] of 0 and 1; left: [B], rows of
    the chunk to come.

    The conditioning is there already, or `prompts` to compute it from.
    """

    observation: Observation
    actions: Tensor
    noise: Tensor
    timesteps: Tensor
    keep: Tensor
    left: Tensor
    prompts: Prompts | None
    conditioning: Conditioning | None
    scene: Tensor | None = None  # scene_obs [B, 24], where a scene head learns to read it

    def to(self, device: torch.device) -> SpecialistBatch:
        observation: dict[str, Any] = {
            field.name: None if (value := getattr(self.observation, field.name)) is None else value.to(device)
            for field in fields(Observation)
        }
        return SpecialistBatch(
            observation=Observation(**observation),
            actions=self.actions.to(device),
            noise=self.noise.to(device),
            timesteps=self.timesteps.to(device),
            keep=self.keep.to(device),
            left=self.left.to(device),
            prompts=None if self.prompts is None else self.prompts.to(device),
            conditioning=None if self.conditioning is None else self.conditioning.to(device),
            scene=None if self.scene is None else self.scene.to(device),
        )


@dataclass(frozen=True)
class SpecialistCollate:
    """Makes batches in the data loader's workers.

    noise_draws: N, how many noisy chunks each observation is looked at with. The published training has one; more of
    them cost a small model little, since the encoders run once.

    The noise, the timestep and whether the conditioning vector is dropped follow from (seed, epoch, index), as the
    sample does: they are the same on one process or on many.
    """

    preparation: Preparation
    processor: Processor
    seed: int
    cond_drop_chance: float
    cache: ConditioningCache | None = None
    noise_draws: int = 1

    def __call__(self, samples: list[Sample]) -> SpecialistBatch:
        noise, timesteps, keep = zip(*(draw for sample in samples for draw in self._draws(sample)))
        return SpecialistBatch(
            observation=_stack([self.preparation.observation(sample.frame, sample.previous) for sample in samples]),
            actions=torch.from_numpy(np.stack([sample.actions for sample in samples])),
            noise=torch.from_numpy(np.stack(noise)),
            timesteps=torch.tensor(timesteps),
            keep=torch.tensor(keep),
            left=torch.tensor([CHUNK - sample.window.shift for sample in samples]),
            prompts=Prompts.collate(samples, self.processor) if self.cache is None else None,
            conditioning=None if self.cache is None else self.cache.read(samples),
            scene=_scene(samples),
        )

    def _draws(self, sample: Sample) -> Iterator[tuple[np.ndarray, int, float]]:
        random = np.random.default_rng((self.seed, *sample.key, _DIFFUSION))
        for _ in range(self.noise_draws):
            noise = random.standard_normal((CHUNK, ACTION), dtype=np.float32)
            timestep = int(random.integers(TRAINING_STEPS))
            yield noise, timestep, float(random.random() >= self.cond_drop_chance)


def _scene(samples: Sequence[Sample]) -> Tensor | None:
    scenes = [sample.scene for sample in samples if sample.scene is not None]
    return torch.from_numpy(np.stack(scenes)) if scenes else None


def _stack(observations: Sequence[Observation]) -> Observation:
    def joined(name: str) -> Tensor | None:
        values = [getattr(observation, name) for observation in observations]
        return None if values[0] is None else torch.cat(values)

    return Observation(**{field.name: joined(field.name) for field in fields(Observation)})  # type: ignore[arg-type]


class SpecialistLearner(Learner[SpecialistBatch]):
    """The policy with the published loss; the generalist is no part of it."""

    averaged = True
    weights: Tensor | None

    def __init__(
        self,
        policy: Policy,
        conditioner: Conditioner | None,
        scene_head: SceneHead | None = None,
        scene_weight: float = 0.0,
        min_snr_gamma: float | None = None,
    ) -> None:
        """scene_head: reads the scene off the sensors' latents, with a loss that counts `scene_weight` times.
        min_snr_gamma: of the noise's loss (`ddim.loss_weights`)"""
        super().__init__()
        weights = None if min_snr_gamma is None else ddim.loss_weights(min_snr_gamma)
        self.register_buffer("weights", weights, persistent=False)
        self.policy = policy
        self.conditioner = conditioner
        self.scene_head = scene_head
        self.scene_weight = scene_weight

    def forward(self, batch: SpecialistBatch) -> tuple[Tensor, dict[str, Tensor]]:
        conditioning = conditioned(batch, self.conditioner)
        if self.scene_head is None or batch.scene is None:
            return specialist_loss(self.policy, batch, conditioning, weights=self.weights)
        tokens = self.policy.encode(batch.observation)
        sensors = self.policy.model.sensor_context(tokens)
        loss, shown = specialist_loss(self.policy, batch, conditioning, tokens, sensors, self.weights)
        seen = self.scene_head(sensors, batch.scene)
        return loss + self.scene_weight * seen, {"noise_loss": loss, "scene_loss": seen, **shown}

    def export(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """`specialist.safetensors` with the averaged weights, ready to be served."""
        export_policy(self.policy, folder, trained)


def conditioned(batch: SpecialistBatch, conditioner: Conditioner | None) -> Conditioning:
    """The batch's conditioning, computed where it is not there."""
    if batch.conditioning is not None:
        return batch.conditioning
    if conditioner is None or batch.prompts is None:
        raise ValueError("a batch without conditioning needs a generalist")
    return conditioner(batch.prompts)


def specialist_loss(
    policy: Policy,
    batch: SpecialistBatch,
    conditioning: Conditioning,
    tokens: Tokens | None = None,
    sensors: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The published loss, and how far the reference is from the demonstrated actions that it covers."""
    reference = cut(conditioning.chunk, batch.left)
    loss = policy.loss(
        batch.observation,
        batch.actions,
        reference,
        conditioning.hidden.to(batch.actions.dtype),
        noise=batch.noise,
        timesteps=batch.timesteps,
        keep_conditioning=batch.keep,
        hidden_mask=conditioning.mask,
        tokens=tokens,
        sensors=sensors,
        weights=weights,
    )
    covered = torch.arange(CHUNK, device=reference.device) < batch.left[:, None]
    off = (reference - batch.actions).abs().mean(dim=-1)
    return loss, {"reference_l1": (off * covered).sum() / covered.sum()}


def export_policy(policy: Policy, folder: Path, trained: Mapping[str, Tensor]) -> None:
    """Writes a policy with these values of its parameters, which are named from `policy.` on."""
    policy = copy.deepcopy(policy).requires_grad_(False)
    for name, parameter in policy.named_parameters(prefix="policy"):
        if name in trained:
            parameter.copy_(trained[name])
    checkpoint.save(policy.cpu(), folder / WEIGHTS)


def cut(chunk: Tensor, left: Tensor) -> Tensor:
    """The last `left` rows (int64 [B]) of each chunk [B, 8, 7], then zeros: `Window.reference` for a batch."""
    rows = torch.arange(CHUNK, device=chunk.device)
    source = (rows + CHUNK - left[:, None]).clamp(max=CHUNK - 1)  # [B, 8]
    moved = chunk.gather(1, source[..., None].expand_as(chunk))
    return moved * (rows < left[:, None])[..., None]
