"""Image augmentation: a random crop and colour jitter, as OpenVLA's fine-tuning has it. Off by default.

The published RoboDual scripts have the flag and never read it. The values are those of OpenVLA's
(prismatic/vla/datasets/rlds: 90 % of the area, brightness 0.2, contrast and saturation 0.8 to 1.2), less its hue shift,
since CALVIN's instructions name colours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

AREA = 0.9
JITTER = 0.2


@dataclass(frozen=True)
class Augmentation:
    """One drawing, for every frame of one camera in a sample, so that motion and depth stay true.

    left and top place the crop (0 to 1 of the room that it has); the others are factors around 1.
    """

    left: float
    top: float
    brightness: float
    contrast: float
    saturation: float

    @classmethod
    def draw(cls, random: np.random.Generator) -> Augmentation:
        left, top = random.random(2).tolist()
        brightness, contrast, saturation = random.uniform(1 - JITTER, 1 + JITTER, 3).tolist()
        return cls(left, top, brightness, contrast, saturation)

    def colour(self, frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """uint8 [H, W, 3] to the same shape."""
        image = self._crop(Image.fromarray(frame), Image.Resampling.BILINEAR)
        image = ImageEnhance.Brightness(image).enhance(self.brightness)
        image = ImageEnhance.Contrast(image).enhance(self.contrast)
        return np.array(ImageEnhance.Color(image).enhance(self.saturation))

    def depth(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Metres [H, W] to the same shape: cropped as the colours are."""
        return np.array(self._crop(Image.fromarray(values), Image.Resampling.NEAREST))

    def _crop(self, image: Image.Image, resampling: Image.Resampling) -> Image.Image:
        width, height = (side * AREA**0.5 for side in image.size)
        left, top = self.left * (image.width - width), self.top * (image.height - height)
        return image.resize(image.size, resampling, box=(left, top, left + width, top + height))
