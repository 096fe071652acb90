"""The image processor against the published one, for every strategy and image in the recorded cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from parity_cases import arrays, draw, paths

from robodual.generalist.config import ImageConfig
from robodual.generalist.processor import ImageProcessor

SIZES = {"static": (200, 200), "gripper": (84, 84), "wide": (120, 160), "odd": (121, 160), "tall": (97, 60)}
CASES = [(path, key) for path in paths("image_processor*.npz") for key in arrays(path)]


@pytest.mark.parametrize(("path", "key"), CASES, ids=[f"{path.stem}-{key}" for path, key in CASES])
def test_image_matches_the_published_processor(path: Path, key: str) -> None:
    strategy, name = key.split("/")
    image = draw(f"image/{name}", (*SIZES[name], 3), 0, 256).astype(np.uint8)
    pixels = ImageProcessor(ImageConfig(strategy=strategy))(image).numpy()
    assert pixels.shape == (6, 224, 224)
    np.testing.assert_allclose(pixels[:, ::16, ::16], arrays(path)[key], rtol=0, atol=1e-6)
