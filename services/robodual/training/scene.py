"""What a picture shows, as numbers: an auxiliary target for encoders that start from nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZE = 21
DEVIATION = 1e-3  # what hardly ever changes in the data is not blown up


def described(scene_obs: Tensor) -> Tensor:
    """scene_obs [B, 24] to [B, 21]: doors, button, switch and lamps (6), the blocks' places (9), cosine and sine of
    twice their yaw (6), since a block turned by half a turn looks the same."""
    poses = scene_obs[:, 6:].reshape(-1, 3, 6)
    yaw = 2 * poses[..., 5]
    return torch.cat((scene_obs[:, :6], poses[..., :3].flatten(1), yaw.cos(), yaw.sin()), dim=1)


class SceneHead(nn.Module):
    """Reads the scene off the specialist's sensor latents; trained beside it and left out of what is served.

    Args:
        width: of all latents together
        scenes: scene_obs [N, 24] that say in what units to measure
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, scenes: Tensor) -> None:
        super().__init__()
        values = described(scenes)
        self.register_buffer("mean", values.mean(dim=0))
        self.register_buffer("deviation", values.std(dim=0).clamp(min=DEVIATION))
        self.read = nn.Linear(width, SIZE)

    def forward(self, latents: Tensor, scene_obs: Tensor) -> Tensor:
        """Mean squared error in the data's standard deviations, a scalar. latents: [B, K, D]; scene_obs: [B, 24]."""
        wanted = (described(scene_obs) - self.mean) / self.deviation
        out: Tensor = nn.functional.mse_loss(self.read(latents.flatten(1)).float(), wanted)
        return out
