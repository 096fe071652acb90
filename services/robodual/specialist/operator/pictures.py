"""A session's latest frame as pictures for people."""

from __future__ import annotations

import asyncio
import base64
import io
import time

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robodual.specialist.frames import Frame

INTERVAL = 0.2  # seconds between two frames that are encoded
LARGEST = 480  # pixels a side
QUALITY = 82


class Pictures:
    """Encodes one session's frames in a thread, at most one every `INTERVAL` however many observers ask."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._frame: Frame | None = None
        self._made_at = -INTERVAL
        self._made: dict[str, str] = {}
        self._count = 0

    async def latest(self, frame: Frame, count: int) -> tuple[int, dict[str, str]]:
        """JPEGs by camera, in base64, of `frame` or of one just before it; empty where they are the `count`-th that
        were made, as told here the last time."""
        async with self._lock:
            if frame is not self._frame and time.monotonic() - self._made_at >= INTERVAL:
                self._frame, self._made_at = frame, time.monotonic()
                self._made = await asyncio.to_thread(_encode, frame)
                self._count += 1
            return self._count, self._made if count != self._count else {}


def _encode(frame: Frame) -> dict[str, str]:
    cameras = {"static": frame.rgb_static, "gripper": frame.rgb_gripper}
    return {name: jpeg(image) for name, image in cameras.items() if image is not None}


def jpeg(image: NDArray[np.uint8]) -> str:
    """A uint8 [H, W, 3] image as JPEG in base64, scaled down where it is large."""
    picture = Image.fromarray(image)
    picture.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY)
    return base64.b64encode(file.getvalue()).decode()
