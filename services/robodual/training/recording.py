"""A split folder in CALVIN's format: one `.npz` file a step, read member by member."""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.npyio import NpzFile

from robodual.training.annotations import DatasetError

_STEP = re.compile(r"episode_(\d{7})\.npz")

# Name, dimensions and kind of what a step holds; sizes follow the cameras (CALVIN: 200 x 200, 84 x 84, 160 x 120).
LAYOUT: dict[str, tuple[int | None, ...]] = {
    "rgb_static": (None, None, 3),
    "rgb_gripper": (None, None, 3),
    "rgb_tactile": (None, None, 6),
    "depth_static": (None, None),
    "depth_gripper": (None, None),
    "depth_tactile": (None, None, 2),
    "robot_obs": (15,),
    "scene_obs": (24,),
    "actions": (7,),
    "rel_actions": (7,),
}


def step_name(step: int) -> str:
    """`episode_0000123.npz`."""
    return f"episode_{step:07d}.npz"


class Recording:
    """The steps that are there, found in one scan; four bytes of memory a step."""

    def __init__(self, split: Path) -> None:
        """Raises DatasetError if the folder is not there or holds no step."""
        if not split.is_dir():
            raise DatasetError(f"{split}: no such folder; expected a split of a CALVIN data set (training, validation)")
        self.split = split
        with os.scandir(split) as entries:
            steps = [int(match[1]) for entry in entries if (match := _STEP.fullmatch(entry.name))]
        if not steps:
            raise DatasetError(f"{split}: no {step_name(0)} or other step; expected a split of a CALVIN data set")
        present = np.zeros(max(steps) + 2, dtype=np.int32)
        present[np.array(steps) + 1] = 1
        self._before = np.cumsum(present, dtype=np.int32)  # how many steps below each number are there

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """The numbers of the steps that are there, in order."""
        return np.flatnonzero(np.diff(self._before))

    def complete(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.bool_]:
        """For each start, whether `length` steps from it on are all there."""
        last = len(self._before) - 1
        counted = self._before[np.minimum(starts + length, last)] - self._before[np.minimum(starts, last)]
        whole: npt.NDArray[np.bool_] = counted == length
        return whole

    def read(self, step: int, names: Collection[str]) -> dict[str, npt.NDArray[Any]]:
        """The named arrays of a step; what is not named is not decompressed.

        Raises:
            FileNotFoundError: if the step is not there.
            DatasetError: naming the file, if it is damaged, or an array is not there or of another shape.
        """
        path = self.split / step_name(step)
        arrays = _members(path, names)
        for name, array in arrays.items():
            check_shape(path, name, array)
        return arrays

    def read_all(self, step: int) -> dict[str, npt.NDArray[Any]]:
        """Every array of a step, whatever its shape. Raises as `read` does."""
        return _members(self.split / step_name(step), None)


def _members(path: Path, names: Collection[str] | None) -> dict[str, npt.NDArray[Any]]:
    try:
        with path.open("rb") as stream, NpzFile(stream, allow_pickle=False) as members:
            return {name: members[name] for name in (members.files if names is None else names)}
    except FileNotFoundError:
        raise
    except KeyError as error:
        raise DatasetError(f"{path}: no {error.args[0]}; leave that sensor out or record it") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DatasetError(f"{path}: damaged or cut short ({error}); copy it again") from None


def check_shape(path: Path, name: str, array: npt.NDArray[Any]) -> None:
    """Raises DatasetError unless the array has CALVIN's dimensions and kind of values."""
    expected = LAYOUT[name]
    same = len(array.shape) == len(expected) and all(e in (None, n) for e, n in zip(expected, array.shape))
    kind = "u" if name.startswith("rgb") else "f"
    if not same or array.dtype.kind != kind or (kind == "u" and array.dtype != np.uint8):
        shape = "x".join("?" if size is None else str(size) for size in expected)
        wanted = "uint8" if kind == "u" else "float"
        raise DatasetError(f"{path}: {name} is {array.dtype} {list(array.shape)}, expected {wanted} [{shape}]")
