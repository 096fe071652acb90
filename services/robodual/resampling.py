"""Frames made square on a GPU: what `images.square` does with Pillow, bit for bit, as tensor operations.

Pillow resizes bytes by fixed-point weights, across and then down, and rounds to bytes after each
(Pillow, src/libImaging/Resample.c). On a GPU the frames travel as they are, and the host is spared a millisecond.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from robodual.images import GREY, Strategy, layout

BITS = 22  # of a weight's fraction
REACH = 2.0  # of the bicubic filter, in pixels
SHARPNESS = -0.5  # its parameter


def squares(frames: Tensor, size: int, strategy: Strategy, padding: tuple[float, float, float] = GREY) -> Tensor:
    """`images.square` of each of the frames, uint8 [B, H, W, 3] to [B, size, size, 3], on their device."""
    place = layout(frames.shape[2], frames.shape[1], size, strategy)
    if place.side or place.top:
        batch, height, width, channels = frames.shape
        padded = frames.new_empty(batch, height + 2 * place.top, width + 2 * place.side, channels)
        for channel, value in enumerate(padding):
            padded[..., channel].fill_(int(value * 255))
        padded[:, place.top : place.top + height, place.side : place.side + width] = frames
        frames = padded
    frames = _across(_across(frames, 2, place.width), 1, place.height)
    return frames[:, place.above : place.above + size, place.before : place.before + size]


def _across(frames: Tensor, dim: int, wanted: int) -> Tensor:
    """One dimension of uint8 [B, H, W, 3] resized."""
    if frames.shape[dim] == wanted:
        return frames
    places, weights = _taps(frames.shape[dim], wanted, frames.device)  # [wanted, K]
    before, after = frames.shape[:dim], frames.shape[dim + 1 :]
    taken = frames.index_select(dim, places.flatten()).view(*before, *places.shape, *after)
    products = taken * weights.view(*weights.shape, *[1] * len(after))
    total = products.sum(dim=dim + 1, dtype=torch.int32) + (1 << BITS - 1)
    return torch.clamp(total >> BITS, 0, 255).to(torch.uint8)


@functools.cache  # for good: a captured graph reads them, and does not keep them
def _taps(given: int, wanted: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of the `wanted` pixels: the places of those that it is made of, and their weights, int [wanted, K]."""
    scale = given / wanted
    stretch = max(1.0, scale)
    reach = REACH * stretch
    rows: list[tuple[int, list[int]]] = []
    for pixel in range(wanted):
        centre = (pixel + 0.5) * scale
        first, end = max(0, int(centre - reach + 0.5)), min(given, int(centre + reach + 0.5))
        values = [_bicubic((place - centre + 0.5) * (1 / stretch)) for place in range(first, end)]
        total = sum(values)
        rows.append((first, [_fixed(value / total) for value in values]))
    longest = max(len(weights) for _, weights in rows)
    places = [[min(first + k, given - 1) for k in range(longest)] for first, _ in rows]
    padded = [weights + [0] * (longest - len(weights)) for _, weights in rows]
    return torch.tensor(places, device=device), torch.tensor(padded, dtype=torch.int32, device=device)


def _bicubic(x: float) -> float:
    a, x = SHARPNESS, abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    if x < REACH:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0


def _fixed(value: float) -> int:
    return int(math.copysign(0.5, value) + value * (1 << BITS))
