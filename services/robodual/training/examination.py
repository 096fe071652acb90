"""Looks a data set over before it is trained on: what is missing, damaged or left over, and every value's range."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from robodual.training.annotations import DatasetError, Span, find_annotations, read_annotations
from robodual.training.recording import LAYOUT, Recording, check_shape, step_name

DEFAULT_STEPS = 500
# The sensors that only some recordings have.
OPTIONAL = {"rgb_tactile", "depth_tactile"}


@dataclass
class Range:
    """Running statistics of one array over steps: per component for vectors, over all pixels for images."""

    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    total: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]
    count: int = 0

    @classmethod
    def empty(cls, size: int) -> Range:
        return cls(np.full(size, np.inf), np.full(size, -np.inf), np.zeros(size), np.zeros(size))

    def add(self, values: npt.NDArray[Any]) -> None:
        """Adds rows [N, size]."""
        rows = values.astype(np.float64)
        self.low = np.minimum(self.low, rows.min(axis=0))
        self.high = np.maximum(self.high, rows.max(axis=0))
        self.total += rows.sum(axis=0)
        self.squares += (rows**2).sum(axis=0)
        self.count += len(rows)

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        return self.total / self.count

    @property
    def deviation(self) -> npt.NDArray[np.float64]:
        variance: npt.NDArray[np.float64] = np.maximum(self.squares / self.count - self.mean**2, 0)
        return np.sqrt(variance)


@dataclass(frozen=True)
class Examination:
    """What was found. `faults` are one line each; a data set without any can be trained on."""

    steps: int
    episodes: int
    spans: list[Span]
    tasks: Counter[str]
    ranges: dict[str, Range]
    examined: int
    faults: list[str]


def examine(split: Path, steps: int | None = DEFAULT_STEPS) -> Examination:
    """Examines a split folder.

    Args:
        split: the folder `training` or `validation`
        steps: how many step files to open, evenly spread; None for all

    Raises:
        DatasetError: if the folder, its index or its annotations cannot be read at all.
    """
    recording = Recording(split)
    spans = read_annotations(find_annotations(split))
    limits = _episodes(split)
    present = recording.steps
    recorded = np.concatenate([np.arange(first, last + 1) for first, last in limits])
    annotated = np.unique(np.concatenate([np.arange(span.start, span.end + 1) for span in spans] or [present[:0]]))
    faults = [
        *_listed(np.setdiff1d(recorded, present), "of ep_start_end_ids.npy are missing; copy them again"),
        *_listed(np.setdiff1d(annotated, present), "of annotated spans are missing; copy them again"),
        *_listed(np.setdiff1d(present, recorded), "belong to no episode of ep_start_end_ids.npy (orphans)"),
        *(f"{path.name}: left over from an interrupted write; delete it" for path in sorted(split.glob("*.partial"))),
    ]
    opened = present
    if steps is not None and len(present) > steps:
        opened = present[np.linspace(0, len(present) - 1, steps).astype(np.int64)]
    ranges: dict[str, Range] = {}
    for step in opened:
        faults += _step_faults(recording, int(step), ranges)
    return Examination(
        steps=len(present),
        episodes=len(limits),
        spans=spans,
        tasks=Counter(span.task for span in spans),
        ranges=ranges,
        examined=len(opened),
        faults=faults,
    )


def _episodes(split: Path) -> npt.NDArray[np.int64]:
    path = split / "ep_start_end_ids.npy"
    try:
        limits = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{path}: cannot be read ({error}); copy it again") from None
    if limits.ndim != 2 or limits.shape[1] != 2 or limits.dtype.kind not in "iu" or not len(limits):
        raise DatasetError(f"{path}: expected whole numbers [episodes, 2], got {limits.dtype} {list(limits.shape)}")
    found: npt.NDArray[np.int64] = limits.astype(np.int64)
    return found


def _listed(steps: npt.NDArray[np.int64], what: str) -> list[str]:
    if not len(steps):
        return []
    return [f"{len(steps)} steps {what}; the first is {step_name(int(steps[0]))}"]


def _step_faults(recording: Recording, step: int, ranges: dict[str, Range]) -> list[str]:
    """Adds the step to the ranges; what is wrong with it otherwise."""
    path = recording.split / step_name(step)
    try:
        arrays = recording.read_all(step)
        if lacking := LAYOUT.keys() - OPTIONAL - arrays.keys():
            return [f"{path.name}: no {', '.join(sorted(lacking))}"]
        for name in arrays.keys() & LAYOUT.keys():
            check_shape(path, name, arrays[name])
    except DatasetError as error:
        return [str(error)]
    faults = []
    for name in sorted(arrays.keys() & LAYOUT.keys()):
        values = arrays[name]
        if not np.isfinite(values).all():
            faults.append(f"{path.name}: {name} has values that are not finite")
            continue
        rows = values.reshape(1, -1) if values.ndim == 1 else values.reshape(-1, 1)
        ranges.setdefault(name, Range.empty(rows.shape[1])).add(rows)
    relative = arrays["rel_actions"]
    if np.abs(relative).max() > 1 + 1e-6:
        faults.append(f"{path.name}: rel_actions reaches {np.abs(relative).max():.3f}, expected at most 1")
    if abs(relative[6]) != 1:
        faults.append(f"{path.name}: rel_actions[6] (gripper) is {relative[6]:.3f}, expected -1 or 1")
    return faults
