"""Camera frames made square the ways that OpenVLA's image processor knows."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

Strategy = Literal["resize-naive", "letterbox", "resize-crop"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
GREY = (0.5, 0.5, 0.5)


def square(
    frame: npt.NDArray[np.uint8], size: int, strategy: Strategy, padding: tuple[float, float, float] = GREY
) -> npt.NDArray[np.uint8]:
    """A frame [H, W, 3] as [size, size, 3], by Pillow's bicubic on uint8 (OpenVLA, processing_prismatic.py).

    resize-naive stretches; letterbox pads the shorter side alike on both ends (so up to one pixel short of a square)
    with the colour `padding`, 0 to 1, then goes on as resize-crop does: the shorter edge becomes `size` and the centre
    is cut out.
    """
    image = Image.fromarray(frame)
    if strategy == "resize-naive":
        return np.array(image.resize((size, size), Image.Resampling.BICUBIC))
    if strategy == "letterbox":
        longest = max(image.size)
        side, top = (longest - image.width) // 2, (longest - image.height) // 2
        red, green, blue = (int(channel * 255) for channel in padding)
        padded = Image.new("RGB", (image.width + 2 * side, image.height + 2 * top), (red, green, blue))
        padded.paste(image, (side, top))
        image = padded
    short, long = sorted(image.size)
    scaled = int(size * long / short)
    width, height = (size, scaled) if image.width == short else (scaled, size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + size, top + size)))
