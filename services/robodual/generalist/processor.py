"""What goes into the generalist: frames as the towers want them, instructions as prompt tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from robodual.generalist.config import ImageConfig, TokenConfig
from robodual.generalist.tokenizer import prompt_text


class ImageProcessor:
    """OpenVLA's image processor (prismatic/extern/hf/processing_prismatic.py), with Pillow alone."""

    def __init__(self, config: ImageConfig) -> None:
        self.config = config
        self._means = torch.tensor(config.means).view(-1, 1, 1)  # [6, 1, 1]
        self._deviations = torch.tensor(config.deviations).view(-1, 1, 1)

    def __call__(self, frame: npt.NDArray[np.uint8]) -> Tensor:
        """uint8 [H, W, 3] -> float32 [6, S, S]: the square image, normalised for each tower."""
        square = np.array(self._square(Image.fromarray(frame)))  # [S, S, 3]
        image = torch.from_numpy(square).permute(2, 0, 1).to(torch.float32) / 255
        return image.repeat(2, 1, 1).sub_(self._means).div_(self._deviations)

    def _square(self, image: Image.Image) -> Image.Image:
        size = self.config.size
        if self.config.strategy == "resize-naive":
            return image.resize((size, size), Image.Resampling.BICUBIC)
        if self.config.strategy == "letterbox":
            image = _letterbox(image, self.config.means[-1])
        short, long = sorted(image.size)
        scaled = int(size * long / short)
        width, height = (size, scaled) if image.width == short else (scaled, size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + size, top + size))


def _letterbox(image: Image.Image, mean: tuple[float, float, float]) -> Image.Image:
    """Pads the shorter side alike on both ends, so up to one pixel short of a square, with the last tower's mean."""
    longest = max(image.size)
    horizontal, vertical = (longest - image.width) // 2, (longest - image.height) // 2
    red, green, blue = (int(channel * 255) for channel in mean)
    padded = Image.new("RGB", (image.width + 2 * horizontal, image.height + 2 * vertical), (red, green, blue))
    padded.paste(image, (horizontal, vertical))
    return padded


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
