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
from robodual.resampling import squares


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
        return self.normalised(pixels.permute(2, 0, 1))

    def normalised(self, pixels: Tensor) -> Tensor:
        """Bytes [3, H, W] -> float32 [6, H, W]."""
        image = pixels.to(torch.float32) / 255
        return image.repeat(2, 1, 1).sub_(self._means).div_(self._deviations)


class DevicePixels:
    """Makes frames square and normalises them on a device: what `Processor.pixels` makes of them, bit for bit."""

    def __init__(self, image: ImageProcessor, device: torch.device, dtype: torch.dtype) -> None:
        self._config = image.config
        # A device may divide otherwise, but there are only so many bytes: what the host makes of each, [6 * 256].
        every = image.normalised(torch.arange(256, dtype=torch.uint8).expand(3, 1, 256))
        self._values = every.flatten().to(device, dtype)
        self._starts = (256 * torch.arange(len(every))).view(-1, 1, 1).to(device)

    def __call__(self, frames: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] on the device -> [B, 6, S, S]."""
        config = self._config
        found = squares(frames, config.size, config.strategy, config.means[-1])
        return self._values.take(found.permute(0, 3, 1, 2).repeat(1, 2, 1, 1) + self._starts)


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
