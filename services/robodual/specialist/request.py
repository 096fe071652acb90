"""What a specialist's engine is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from robodual.specialist.frames import Frame


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
