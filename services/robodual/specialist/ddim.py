"""DDIM sampling (arXiv 2010.02502) as Diffusers' DDIMScheduler does it, with every coefficient tabulated.

The published setting: 100 training steps, `squaredcos_cap_v2` (the cosine schedule of arXiv 2102.09672), epsilon
prediction, leading spacing with offset 0, eta 0, x0 clipped to [-1, 1].
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robodual.specialist.config import TRAINING_STEPS


@functools.lru_cache(maxsize=16)
def alphas_cumprod(device: torch.device | None = None) -> Tensor:
    """Signal variance after each training step, float32 [100], not to be changed; on the CPU if no device is given."""

    def signal(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [
        min(1 - signal((step + 1) / TRAINING_STEPS) / signal(step / TRAINING_STEPS), 0.999)
        for step in range(TRAINING_STEPS)
    ]
    return torch.cumprod(1.0 - torch.tensor(betas, dtype=torch.float32), dim=0).to(device)


@dataclass(frozen=True)
class Step:
    """One denoising step from `timestep`: x0 = clamp(x * inverse_signal - eps * noise_ratio), then the next x.

    next x = sqrt(a_prev) * x0 + sqrt(1 - a_prev) * eps, with the eps that was predicted, not one made from x0.
    """

    timestep: int
    inverse_signal: float  # 1 / sqrt(a_t)
    noise_ratio: float  # sqrt(1 - a_t) / sqrt(a_t)
    next_signal: float  # sqrt(a_prev)
    next_noise: float  # sqrt(1 - a_prev)

    def apply(self, x: Tensor, eps: Tensor) -> Tensor:
        """The sample one step less noisy; x and eps have one shape."""
        x0 = (x * self.inverse_signal - eps * self.noise_ratio).clamp(-1, 1)
        return x0 * self.next_signal + eps * self.next_noise


@functools.lru_cache(maxsize=16)
def schedule(steps: int) -> tuple[Step, ...]:
    """The denoising steps in order, from the noisiest; `steps` is 1 to 100 (10 published: t = 90, 80, ..., 0)."""
    alphas = alphas_cumprod().double()
    stride = TRAINING_STEPS // steps
    table = []
    for index in reversed(range(steps)):
        timestep = index * stride
        alpha = float(alphas[timestep])
        alpha_prev = float(alphas[timestep - stride]) if index else 1.0
        table.append(
            Step(
                timestep,
                alpha**-0.5,
                ((1 - alpha) / alpha) ** 0.5,
                alpha_prev**0.5,
                (1 - alpha_prev) ** 0.5,
            )
        )
    return tuple(table)


def loss_weights(gamma: float) -> Tensor:
    """How much each timestep's loss counts, float32 [100] with mean 1: min(SNR, gamma) / SNR (arXiv 2303.09556).

    SNR is a / (1 - a). At a gamma well below 1 it is the error of the actions that counts, not that of the noise: the
    noise of nearly clean samples, which nobody can tell from them, no longer drowns what the conditioning says.
    """
    alphas = alphas_cumprod()
    ratio = alphas / (1 - alphas)
    weights = ratio.clamp(max=gamma) / ratio
    return weights / weights.mean()


def add_noise(x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The forward process: x0 and noise [B, ...], timesteps int64 [B]."""
    alphas = alphas_cumprod(x0.device)[timesteps].view(-1, *[1] * (x0.dim() - 1))
    return alphas.sqrt() * x0 + (1 - alphas).sqrt() * noise
