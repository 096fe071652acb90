"""A picture of a data set: for each task, one span's first, middle and last frame, in both cameras."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from robodual.training.annotations import Span
from robodual.training.recording import Recording

CELL = 100
CAPTION = 16
COLUMNS = 2  # spans side by side


def contact_sheet(split: Path, spans: Sequence[Span], path: Path, *, seed: int = 0) -> None:
    """Writes a PNG with one drawn span of every task.

    Raises:
        DatasetError: if a step that is shown is missing or damaged.
    """
    recording = Recording(split)
    random = np.random.default_rng(seed)
    tasks: dict[str, list[Span]] = {}
    for span in spans:
        tasks.setdefault(span.task, []).append(span)
    chosen = [tasks[task][random.integers(len(tasks[task]))] for task in sorted(tasks)]
    rows = -(-len(chosen) // COLUMNS)
    width = 6 * CELL + 4
    sheet = Image.new("RGB", (COLUMNS * width, max(rows, 1) * (CELL + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, span in enumerate(chosen):
        left, top = (index % COLUMNS) * width, (index // COLUMNS) * (CELL + CAPTION)
        caption = f"{span.task} ({len(tasks[span.task])}): {span.instruction} [{span.start}..{span.end}]"
        draw.text((left + 2, top + 2), caption[:95], fill="black")
        for column, step in enumerate((span.start, (span.start + span.end) // 2, span.end)):
            frames = recording.read(step, ("rgb_static", "rgb_gripper"))
            for camera, name in enumerate(("rgb_static", "rgb_gripper")):
                corner = (left + (2 * column + camera) * CELL, top + CAPTION)
                sheet.paste(_thumbnail(frames[name]), corner)
    sheet.save(path, format="PNG")


def _thumbnail(frame: npt.NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(frame).resize((CELL, CELL), Image.Resampling.BICUBIC)
