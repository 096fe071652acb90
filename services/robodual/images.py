"""Camera frames made square the ways that OpenVLA's image processor knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

Strategy = Literal["resize-naive", "letterbox", "resize-crop"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
GREY = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Layout:
    """How a frame becomes a square: padded on both ends, resized, and cut out."""

    side: int  # pixels of padding on the left, and as many on the right
    top: int  # and above and below
    width: int  # to which the padded frame is resized
    height: int
    before: int  # pixels on the left that are cut off
    above: int


def layout(width: int, height: int, size: int, strategy: Strategy) -> Layout:
    """Of a frame of that width and height (OpenVLA, processing_prismatic.py).

    resize-naive stretches; letterbox pads the shorter side alike on both ends (so up to one pixel short of a square),
    then goes on as resize-crop does: the shorter edge becomes `size` and the centre is cut out.
    """
    if strategy == "resize-naive":
        return Layout(0, 0, size, size, 0, 0)
    side = top = 0
    if strategy == "letterbox":
        longest = max(width, height)
        side, top = (longest - width) // 2, (longest - height) // 2
        width, height = width + 2 * side, height + 2 * top
    short, long = sorted((width, height))
    scaled = int(size * long / short)
    width, height = (size, scaled) if width == short else (scaled, size)
    return Layout(side, top, width, height, round((width - size) / 2), round((height - size) / 2))


def square(
    frame: npt.NDArray[np.uint8], size: int, strategy: Strategy, padding: tuple[float, float, float] = GREY
) -> npt.NDArray[np.uint8]:
    """A frame [H, W, 3] as [size, size, 3], by Pillow's bicubic on uint8; where it is padded, with that colour, 0 to 1.

    See `layout`, and `resampling.squares` for frames on a GPU.
    """
    image = Image.fromarray(frame)
    place = layout(image.width, image.height, size, strategy)
    if place.side or place.top:
        red, green, blue = (int(channel * 255) for channel in padding)
        padded = Image.new("RGB", (image.width + 2 * place.side, image.height + 2 * place.top), (red, green, blue))
        padded.paste(image, (place.side, place.top))
        image = padded
    # Across and then down, as published; in one call, Pillow 13 does it the other way round for some shapes.
    resized = image.resize((place.width, image.height), Image.Resampling.BICUBIC)
    resized = resized.resize((place.width, place.height), Image.Resampling.BICUBIC)
    if place.width != size or place.height != size:
        resized = resized.crop((place.before, place.above, place.before + size, place.above + size))
    return np.array(resized)
