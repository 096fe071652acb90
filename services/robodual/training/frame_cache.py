"""Steps decoded and resized once into memory-mapped arrays, for trainings that read faster than a CPU can inflate."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from robodual.images import STRATEGIES, Strategy, square
from robodual.specialist.depth import resize
from robodual.training.annotations import DatasetError
from robodual.training.pool import pool, resumable
from robodual.training.recording import Recording, step_name
from robodual.training.replacement import replacing

ALWAYS = ("rel_actions", "robot_obs", "scene_obs")
SENSORS = ("rgb_static", "rgb_gripper", "depth_static", "depth_gripper", "rgb_tactile")
DEPTH_UNIT = 1e-4  # metres; 16 bits of it reach 6.5 m, and CALVIN's cameras end at 6.2 m
PART = 512  # steps that a worker process does at a time


@dataclass(frozen=True)
class Contents:
    """What a cache holds. size: the side of a frame in pixels, or None for the cameras' own."""

    steps: int
    first: int
    last: int
    sensors: tuple[str, ...]
    size: int | None
    strategy: Strategy


class FrameCache:
    """The steps of one recording; `read` gives what `Recording.read` gives, at the cache's size.

    A model whose images have that size gets what it would get without the cache: resizing twice to one size changes
    nothing, and depth is kept to a tenth of a millimetre.

    Raises:
        DatasetError: if the folder holds no finished cache of this recording.
    """

    def __init__(self, folder: Path, recording: Recording) -> None:
        self.folder = folder
        self.contents = read_contents(folder)
        self._steps = recording.steps
        found = (self.contents.steps, self.contents.first, self.contents.last)
        here = (len(self._steps), int(self._steps[0]), int(self._steps[-1]))
        if found != here:
            raise DatasetError(
                f"{folder}: holds {found[0]} steps from {found[1]} to {found[2]}, and {recording.split} has "
                f"{here[0]} from {here[1]} to {here[2]}; run `robodual data cache` again, into another folder"
            )
        if not _done(folder, self.contents).all():
            raise DatasetError(f"{folder}: unfinished; run `robodual data cache` again to go on")
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Each process maps the arrays for itself."""
        return {**self.__dict__, "_arrays": {}}

    def check(self, strategy: Strategy, *sizes: int) -> None:
        """Raises DatasetError unless models of these image sizes see what they would see of the recording."""
        held = self.contents
        if held.size is not None and (held.strategy, {held.size}) != (strategy, set(sizes)):
            wanted = " and ".join(map(str, sorted(set(sizes))))
            raise DatasetError(
                f"{self.folder}: holds frames of {held.size} pixels ({held.strategy}), expected the models' {wanted} "
                f"({strategy}); run `robodual data cache` for those, or without --size for all, into another folder"
            )

    def read(self, step: int, names: Collection[str]) -> dict[str, npt.NDArray[Any]]:
        """The named arrays of a step.

        Raises:
            FileNotFoundError: if the recording has no such step.
            DatasetError: if the cache was made without the sensor.
        """
        row = int(np.searchsorted(self._steps, step))
        if row == len(self._steps) or self._steps[row] != step:
            raise FileNotFoundError(2, "no such step", step_name(step))
        return {name: self._row(name, row) for name in names}

    def _row(self, name: str, row: int) -> npt.NDArray[Any]:
        if name not in self._arrays:
            if name not in (*self.contents.sensors, *ALWAYS):
                raise DatasetError(f"{self.folder}: has no {name}; run `robodual data cache` with it, or leave it out")
            self._arrays[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        values = np.array(self._arrays[name][row])
        return values * np.float32(DEPTH_UNIT) if name.startswith("depth") else values


def read_contents(folder: Path) -> Contents:
    path = folder / "frames.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Contents(**(found | {"sensors": tuple(found["sensors"])}))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DatasetError(f"{path}: no frame cache ({error}); make one with `robodual data cache`") from None


def _done(folder: Path, contents: Contents) -> npt.NDArray[np.bool_]:
    """For each part of the cache whether its file says that it is written."""
    parts = range(0, contents.steps, PART)
    return np.array([(folder / "parts" / f"{first:07d}").exists() for first in parts])


def build(
    split: Path,
    folder: Path,
    *,
    size: int | None = None,
    strategy: Strategy = "resize-naive",
    sensors: Collection[str] = SENSORS[:4],
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Contents:
    """Writes the cache of a split; interrupted, it goes on where it was.

    size: the side of colour frames and depth maps in pixels; the cameras' own without it. progress: called with how
    many steps are done, of how many.

    Raises:
        DatasetError: if the split is damaged, the folder holds another cache, or the disk is full.
    """
    if strategy not in STRATEGIES:
        raise DatasetError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if unknown := sorted(set(sensors) - set(SENSORS)):
        raise DatasetError(f"sensors: expected some of {', '.join(SENSORS)}, got {', '.join(unknown)}")
    steps = Recording(split).steps
    contents = Contents(len(steps), int(steps[0]), int(steps[-1]), tuple(sensors), size, strategy)
    with resumable(folder):
        _claim(split, folder, contents, int(steps[0]))
        missing = np.flatnonzero(~_done(folder, contents)) * PART
        done = len(steps) - sum(min(PART, len(steps) - int(first)) for first in missing)
        progress(done, len(steps))
        with pool(workers, len(missing)) as processes:
            futures = [processes.submit(_write_part, split, folder, contents, int(first)) for first in missing]
            for future in as_completed(futures):
                done += future.result()
                progress(done, len(steps))
    return contents


def _claim(split: Path, folder: Path, contents: Contents, step: int) -> None:
    path = folder / "frames.json"
    if path.exists():
        if (before := read_contents(folder)) != contents:
            raise DatasetError(f"{folder}: holds another cache ({before}, not {contents}); give another folder")
        return
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    for name, values in _converted(Recording(split), step, contents).items():
        shape = (contents.steps, *values.shape)
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=values.dtype, shape=shape)
    with replacing(path) as partial:
        partial.write_text(json.dumps(asdict(contents), indent=2) + "\n", encoding="utf-8")


def _write_part(split: Path, folder: Path, contents: Contents, first: int) -> int:
    torch.set_num_threads(1)
    recording = Recording(split)
    steps = recording.steps[first : first + PART]
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="r+") for name in (*contents.sensors, *ALWAYS)
    }
    for row, step in enumerate(steps, first):
        for name, values in _converted(recording, int(step), contents).items():
            if values.shape != arrays[name].shape[1:]:
                raise DatasetError(f"{split / step_name(int(step))}: {name} has another shape than in the first step")
            arrays[name][row] = values
    for array in arrays.values():
        array.flush()
    (folder / "parts" / f"{first:07d}").touch()
    return len(steps)


def _converted(recording: Recording, step: int, contents: Contents) -> dict[str, npt.NDArray[Any]]:
    size = contents.size

    def stored(name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if name in ALWAYS:
            return values
        if name.startswith("depth"):
            depth = values.astype(np.float32)
            if size is not None:
                depth = resize(torch.from_numpy(depth)[None, None], size)[0, 0].numpy()
            return (depth / DEPTH_UNIT).round().clip(0, np.iinfo(np.uint16).max).astype(np.uint16)
        return values if size is None or name == "rgb_tactile" else square(values, size, contents.strategy)

    read = recording.read(step, (*contents.sensors, *ALWAYS))
    return {name: stored(name, values) for name, values in read.items()}
