"""One camera reading as NumPy arrays, and what the published control loop makes of it before the encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robodual.images import Strategy, square
from robodual.resampling import squares
from robodual.specialist.config import SpecialistConfig
from robodual.specialist.depth import resize
from robodual.specialist.policy import Observation, needed
from robodual.staging import bring, stacked

# ImageNet's statistics as the published processor has them, rounded to bfloat16.
MEANS = (0.484375, 0.455078125, 0.40625)
DEVIATIONS = (0.228515625, 0.2236328125, 0.224609375)
# Subtracted from depth in metres: min / (max - min) of CALVIN's cameras. The published code means to normalise, but
# does not divide, and the published weights were trained that way (vla-scripts/dual_sys_evaluation.py).
STATIC_DEPTH_OFFSET = 3.5 / (6.2 - 3.5)
GRIPPER_DEPTH_OFFSET = 0.0


@dataclass(frozen=True)
class Frame:
    """One decoded observation at the cameras' sizes; a sensor that the model does not read may be None.

    Colour is uint8 [H, W, 3], depth float32 [H, W] in metres, tactile uint8 [H, W, 6] (both finger sensors),
    proprioception float32 [7]: TCP position and Euler angles, last gripper command.
    """

    rgb_static: npt.NDArray[np.uint8]
    rgb_gripper: npt.NDArray[np.uint8] | None
    depth_static: npt.NDArray[np.float32] | None
    depth_gripper: npt.NDArray[np.float32] | None
    rgb_tactile: npt.NDArray[np.uint8] | None
    proprio: npt.NDArray[np.float32]


class Preparation:
    """Makes encoder inputs of arrays, on one device and in the encoders' dtype; all else is float32."""

    def __init__(self, config: SpecialistConfig, strategy: Strategy, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.strategy, self.device, self.dtype = config, strategy, device, dtype
        self._means, self._deviations = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEANS, DEVIATIONS))
        self._on_gpu = device.type == "cuda"

    def static(self, frames: Sequence[Frame]) -> Tensor:
        """[B, 3, S, S]."""
        return self.colour([frame.rgb_static for frame in frames])

    def gripper(self, frames: Sequence[Frame]) -> Tensor:
        """[B, 3, S, S]."""
        return self.colour([needed(frame.rgb_gripper, "rgb_gripper") for frame in frames])

    def static_depth(self, frames: Sequence[Frame]) -> Tensor:
        """[B, 1, S, S]."""
        return self._depth([needed(frame.depth_static, "depth_static") for frame in frames], STATIC_DEPTH_OFFSET)

    def gripper_depth(self, frames: Sequence[Frame]) -> Tensor:
        """[B, 1, S, S]."""
        return self._depth([needed(frame.depth_gripper, "depth_gripper") for frame in frames], GRIPPER_DEPTH_OFFSET)

    def tactile(self, frames: Sequence[Frame]) -> Tensor:
        """[B, 6, S, S] in [0, 1]."""
        images = [needed(frame.rgb_tactile, "rgb_tactile") for frame in frames]
        return torch.cat([self.touches(self.to_device(group)) for group in stacked(images)])

    def colour(self, images: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        """B images [H, W, 3] of any sizes to normalised [B, 3, S, S]. Bytes travel to the device, not floats."""
        if not self._on_gpu:
            size = self.config.image_size
            return self._normalised(torch.from_numpy(np.stack([square(i, size, self.strategy) for i in images])))
        return self.pixels([self.to_device(frames) for frames in stacked(images)])

    def pixels(self, groups: Sequence[Tensor]) -> Tensor:
        """What `colour` makes of frames that are on the device, uint8 [B, H, W, 3], in groups of one size."""
        size, strategy = self.config.image_size, self.strategy
        return self._normalised(torch.cat([squares(frames, size, strategy) for frames in groups]))

    def maps(self, values: Tensor, offset: float) -> Tensor:
        """Depth maps [B, H, W] to [B, 1, S, S], less the constant."""
        return resize(values[:, None] - offset, self.config.image_size).to(self.dtype)

    def touches(self, images: Tensor) -> Tensor:
        """Tactile images uint8 [B, H, W, 6] to [B, 6, S, S] in [0, 1]."""
        return resize(_scaled(images), self.config.tactile_size).to(self.dtype)

    def _normalised(self, frames: Tensor) -> Tensor:
        """Bytes [B, S, S, 3] to [B, 3, S, S]."""
        pixels = frames.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        return pixels.sub_(self._means).div_(self._deviations).to(self.dtype)

    def vectors(self, values: Sequence[npt.NDArray[np.float32]]) -> Tensor:
        """B arrays of one shape to float32 [B, ...]."""
        return self.to_device(torch.from_numpy(np.stack(values)))

    def flags(self, values: Sequence[bool]) -> Tensor:
        """Bool [B]."""
        return self.to_device(torch.tensor(values))

    def observation(self, frame: Frame, previous: npt.NDArray[np.uint8]) -> Observation:
        """What the plain path reads: one frame, and the static image before it (at step 0, the current one)."""
        config = self.config
        depth_static = depth_gripper = rgb_gripper = rgb_tactile = None
        if config.with_depth:
            depth_static = self._shifted(needed(frame.depth_static, "depth_static"), STATIC_DEPTH_OFFSET)
        if config.with_gripper:
            rgb_gripper = self.gripper([frame])
            depth_gripper = self._shifted(needed(frame.depth_gripper, "depth_gripper"), GRIPPER_DEPTH_OFFSET)
        if config.with_tactile:
            [images] = stacked([needed(frame.rgb_tactile, "rgb_tactile")])
            rgb_tactile = _scaled(self.to_device(images)).to(self.dtype)
        return Observation(
            rgb_static=self.static([frame]),
            rgb_static_previous=self.colour([previous]),
            proprio=self.vectors([frame.proprio]),
            depth_static=depth_static,
            rgb_gripper=rgb_gripper,
            depth_gripper=depth_gripper,
            rgb_tactile=rgb_tactile,
        )

    def _depth(self, maps: Sequence[npt.NDArray[np.float32]], offset: float) -> Tensor:
        return torch.cat([self.maps(self.to_device(values), offset) for values in stacked(maps)])

    def _shifted(self, values: npt.NDArray[np.float32], offset: float) -> Tensor:
        """One map [H, W] to [1, H, W], less the constant."""
        return (self.to_device(torch.tensor(values, dtype=torch.float32))[None] - offset).to(self.dtype)

    def to_device(self, values: Tensor) -> Tensor:
        """Values of the host, without waiting for the device."""
        return bring(values, self.device)


def _scaled(images: Tensor) -> Tensor:
    """Tactile images uint8 [B, H, W, 6] to float32 [B, 6, H, W] in [0, 1]."""
    return images.permute(0, 3, 1, 2).to(torch.float32) / 255
