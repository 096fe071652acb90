"""A sequence as an MP4 that browsers play, or a GIF: both cameras, instruction, chain so far. Extra `report`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from robodual_client.calvin.records import FULL
from robodual_client.calvin.roles import Observation

RATE = 30  # frames a second, CALVIN's control rate
PANEL, CAPTION = 320, 68
WIDTH, HEIGHT = 2 * PANEL, PANEL + CAPTION
_MARKS = WIDTH - 150  # where the chain's marks begin
HOLD = 15  # frames for which a subtask's last picture stays, with its verdict

_H264 = ("-c:v", "libx264", "-preset", "veryfast", "-crf", "27", "-pix_fmt", "yuv420p", "-movflags", "+faststart")
# A palette for each picture, so that none has to wait for the last one.
_PALETTE = "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1:dither=none"
_ENCODING = {".mp4": _H264, ".gif": ("-vf", f"fps=10,scale=480:-2:flags=lanczos,{_PALETTE}")}

_INK, _MUTED, _GROUND, _TRACK = (236, 239, 244), (146, 155, 168), (17, 20, 25), (44, 50, 60)
_GOOD, _BAD, _ACCENT = (52, 199, 124), (240, 92, 92), (92, 156, 255)


def encoder() -> str:
    """ffmpeg's path. Raises RuntimeError, with what to do, where there is none."""
    path: str = imageio_ffmpeg.get_ffmpeg_exe()
    if shutil.which(path) is None:
        raise RuntimeError(f"IMAGEIO_FFMPEG_EXE is {path}, which is no program; correct it, or unset it")
    return path


class Video:
    """Encodes while the sequence runs; a rollout's watcher, and a context manager.

    The file, .mp4 or .gif, appears at `path` when the block ends without an error, with a JPEG of its last picture
    beside it; a sequence that was cut short leaves neither.
    """

    def __init__(self, path: Path, tasks: int, ep_len: int) -> None:
        self._path, self._ep_len = path, ep_len
        self._part = path.with_suffix(f".part{path.suffix}")
        self._verdicts: list[bool] = []
        self._tasks = tasks
        self._large, self._small = ImageFont.load_default(18), ImageFont.load_default(14)
        self._caption: Image.Image
        self._last: Image.Image
        path.parent.mkdir(parents=True, exist_ok=True)
        self._ffmpeg = subprocess.Popen(
            [
                *(encoder(), "-y", "-loglevel", "error"),
                *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", str(RATE), "-i", "-"),
                *_ENCODING[path.suffix],
                *("-threads", "1", str(self._part)),
            ],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._ffmpeg.kill()
            self._ffmpeg.communicate()
            self._part.unlink(missing_ok=True)
            return
        failure = self._failure()
        if self._ffmpeg.returncode != 0 or failure.errno in FULL:  # ffmpeg 4 loses a film's end with status 0
            self._part.unlink(missing_ok=True)
            raise failure
        self._last.save(self._path.with_suffix(".jpg"), quality=82)
        self._part.replace(self._path)

    def start(self, obs: Observation, subtask: int, instruction: str) -> None:
        self._instruction, self._subtask = " ".join(instruction.split()), subtask
        self._caption = self._draw_caption()
        self._title = f"task {subtask + 1} of {self._tasks}"
        self._show(obs, 0, None)

    def step(self, obs: Observation, step: int, age: int | None) -> None:
        self._show(obs, step + 1, age)

    def finish(self, success: bool) -> None:
        self._verdicts.append(success)
        self._last.paste(self._draw_caption().crop((_MARKS, 36, WIDTH, CAPTION)), (_MARKS, PANEL + 36))
        draw = ImageDraw.Draw(self._last)
        text, colour = ("solved", _GOOD) if success else ("failed", _BAD)
        width = draw.textlength(text, font=self._large)
        draw.rounded_rectangle((14, 14, 14 + width + 24, 46), 8, fill=colour)
        draw.text((26, 19), text, fill=_GROUND, font=self._large)
        for _ in range(HOLD):
            self._write(self._last)

    def _draw_caption(self) -> Image.Image:
        """What stays over a subtask: its instruction, and a mark for each task of the chain."""
        caption = Image.new("RGB", (WIDTH, CAPTION), _GROUND)
        draw = ImageDraw.Draw(caption)
        large = draw.textlength(self._instruction, font=self._large) <= WIDTH - 28
        draw.text((14, 12 if large else 15), self._instruction, fill=_INK, font=self._large if large else self._small)
        for index in range(self._tasks):
            known = index < len(self._verdicts)
            colour = _TRACK if not known else _GOOD if self._verdicts[index] else _BAD
            outline = _ACCENT if index == self._subtask and not known else colour
            left = WIDTH - 14 - 26 * (self._tasks - index)
            draw.rounded_rectangle((left + 4, 46, left + 25, 54), 4, fill=colour, outline=outline)
        return caption

    def _show(self, obs: Observation, step: int, age: int | None) -> None:
        picture = Image.new("RGB", (WIDTH, HEIGHT), _GROUND)
        for index, camera in enumerate(("rgb_static", "rgb_gripper")):
            if camera in obs["rgb_obs"]:  # of a simulator with one camera, the other half stays dark
                frame = Image.fromarray(np.asarray(obs["rgb_obs"][camera]))
                picture.paste(frame.resize((PANEL, PANEL), Image.Resampling.BICUBIC), (index * PANEL, 0))
        picture.paste(self._caption, (0, PANEL))
        draw = ImageDraw.Draw(picture)
        draw.rectangle((0, PANEL, WIDTH, PANEL + 2), fill=_TRACK)
        draw.rectangle((0, PANEL, WIDTH * step // self._ep_len, PANEL + 2), fill=_ACCENT)
        thought = "" if age is None else f"conditioning {age} steps old"
        for left, text in ((14, self._title), (104, f"step {step}"), (184, thought)):
            draw.text((left, PANEL + 41), text, fill=_MUTED, font=self._small)
        self._last = picture
        self._write(picture)

    def _write(self, picture: Image.Image) -> None:
        assert self._ffmpeg.stdin is not None
        try:
            self._ffmpeg.stdin.write(picture.tobytes())
        except BrokenPipeError:
            raise self._failure() from None

    def _failure(self) -> OSError:
        """Waits for ffmpeg's end, and gives what it had to say; with the error's number if the disk is full."""
        _, output = self._ffmpeg.communicate()
        said = output.decode(errors="replace").strip()
        for number in FULL:
            if os.strerror(number) in said:
                return OSError(number, os.strerror(number), str(self._path))
        return OSError(f"ffmpeg could not write {self._path}: {said}")
