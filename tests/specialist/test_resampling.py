"""Frames made square by tensor operations are Pillow's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from robodual.generalist.config import ImageConfig
from robodual.generalist.processor import DevicePixels, ImageProcessor
from robodual.images import STRATEGIES, Strategy, square
from robodual.profiles import PROFILES
from robodual.resampling import squares
from robodual.specialist.frames import Preparation

PADDING = (0.485, 0.456, 0.406)


def frames(height: int, width: int) -> NDArray[np.uint8]:
    """Noise, the extremes beside each other (where the filter overshoots), and a slope."""
    random = np.random.default_rng(height * 2000 + width)
    noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    extremes = random.integers(0, 2, (height, width, 3), dtype=np.uint8) * np.uint8(255)
    slope = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8)[:, None], (height, width, 3))
    return np.stack([noise, extremes, slope])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [224, 96, 56])
@pytest.mark.parametrize(
    ("height", "width"),
    [(200, 200), (84, 84), (224, 224), (480, 640), (640, 480), (160, 120), (97, 61), (8, 1024), (1024, 9)],
)
def test_squares_are_pillows(height: int, width: int, size: int, strategy: Strategy) -> None:
    given = frames(height, width)
    found = squares(torch.from_numpy(given), size, strategy, PADDING).numpy()
    for one, frame in zip(found, given, strict=True):
        np.testing.assert_array_equal(one, square(frame, size, strategy, PADDING))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_squares_of_every_side(strategy: Strategy) -> None:
    for side in range(8, 400, 7):
        given = frames(side, 300 - side // 2)[1:2]
        found = squares(torch.from_numpy(given), 224, strategy).numpy()
        np.testing.assert_array_equal(found[0], square(given[0], 224, strategy), err_msg=str(side))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_are_prepared_on_a_gpu_as_on_the_host(dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    preparation = Preparation(PROFILES["robodual-7b"].specialist, "resize-naive", cpu, dtype)
    for shapes in ([(200, 200)] * 3, [(200, 200), (84, 84), (97, 61)]):
        images = [frames(*shape)[0] for shape in shapes]
        expected = preparation.colour(images)
        preparation._on_gpu = True
        assert torch.equal(preparation.colour(images), expected)
        preparation._on_gpu = False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_generalists_frames_too(strategy: Strategy, dtype: torch.dtype) -> None:
    image = ImageProcessor(ImageConfig(strategy=strategy))
    prepare = DevicePixels(image, torch.device("cpu"), dtype)
    for shape in ((200, 200), (84, 97), (480, 640)):
        given = frames(*shape)
        expected = torch.stack([image(frame) for frame in given]).to(dtype)
        assert torch.equal(prepare(torch.from_numpy(given)), expected)
