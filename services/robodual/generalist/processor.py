"""What goes into the generalist: frames as the towers want them, instructions as prompt tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from robodual.generalist.config import ImageConfig, TokenConfig
from robodual.generalist.tokenizer import prompt_text
from robodual.images import square


class ImageProcessor:
    """OpenVLA's image processor (prismatic/extern/hf/processing_prismatic.py), with Pillow alone."""

    def __init__(self, config: ImageConfig) -> None:
        self.config = config
        self._means = torch.tensor(config.means).view(-1, 1, 1)  # [6, 1, 1]
        self._deviations = torch.tensor(config.deviations).view(-1, 1, 1)

    def __call__(self, frame: npt.NDArray[np.uint8]) -> Tensor:
        """uint8 [H, W, 3] -> float32 [6, S, S]: the square image, normalised for each tower."""
        config = self.config
        # The square is padded, where it is, with the last tower's mean.
        pixels = torch.from_numpy(square(frame, config.size, config.strategy, config.means[-1]))  # [S, S, 3]
        image = pixels.permute(2, 0, 1).to(torch.float32) / 255
        return image.repeat(2, 1, 1).sub_(self._means).div_(self._deviations)


class Processor:
    """Frames and instructions to model inputs."""

    def __init__(self, images: ImageConfig, tokens: TokenConfig, tokenizer: Tokenizer) -> None:
        self.image = ImageProcessor(images)
        self.tokens = tokens
        self.tokenizer = tokenizer

    def pixels(self, frames: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        """B frames uint8 [H, W, 3], of any sizes -> float32 [B, 6, S, S]."""
        return torch.stack([self.image(frame) for frame in frames])

    def prompt(self, instruction: str) -> list[int]:
        """Token ids of OpenVLA's prompt for an instruction: BOS first, the separator that it was trained with last."""
        ids: list[int] = self.tokenizer.encode(prompt_text(instruction)).ids
        if ids[:1] != [self.tokens.bos]:
            ids = [self.tokens.bos, *ids]
        return [*ids, self.tokens.separator]
