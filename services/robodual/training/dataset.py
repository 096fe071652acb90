"""CALVIN's language-annotated recordings as a PyTorch data set of published windows."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from robodual.specialist.config import CHUNK
from robodual.specialist.frames import Frame
from robodual.training.annotations import DatasetError, Span, find_annotations, read_annotations
from robodual.training.augment import Augmentation
from robodual.training.frame_cache import FrameCache
from robodual.training.recording import Recording, step_name
from robodual.training.window import DETOUR, WINDOW, Window, starts

Key = tuple[int, int]  # epoch and index


@dataclass(frozen=True)
class Sample:
    """One window, at the cameras' sizes and unnormalised.

    The generalist learns from `first_frame` (uint8 [H, W, 3]), `instruction` and `first_actions` (float32 [8, 7]); the
    specialist from `frame`, `previous` (uint8 [H, W, 3]) and `actions` (float32 [8, 7]), given the generalist's
    conditioning on the former. history: [4, 7]; valid_cond_mask: [8].
    """

    key: Key  # epoch, and the window's number in the data set
    window: Window
    task: str
    instruction: str
    first_frame: npt.NDArray[np.uint8]
    first_actions: npt.NDArray[np.float32]
    frame: Frame
    previous: npt.NDArray[np.uint8]
    actions: npt.NDArray[np.float32]
    history: npt.NDArray[np.float32]
    valid_cond_mask: npt.NDArray[np.float32]
    scene: npt.NDArray[np.float32] | None = None  # [24], of the specialist's step, where it is asked for


class CalvinDataset(Dataset[Sample]):
    """The windows of one split, read as they are asked for; in memory are the annotations and 16 bytes a window.

    What a sample holds depends on (seed, epoch, index) alone: not on the worker that reads it, nor on what was read
    before. Its key is that pair (epoch, index), so that workers need not be told of epochs.

    Args:
        split: the folder `training` or `validation`
        sensors: what to read, by the names of the wire format (`SpecialistConfig.sensors`); rgb_static always is
        chunk: 8 for the specialist, 0 for the generalist (no shift)
        partial: fraction of the annotations to keep, chosen by `seed` (published: 0.05 and 0.1)
        enriched: task to further instructions; one of them or the annotated one is drawn for each sample
        augment: whether to augment the images
        stride: only every so many steps does a window start (published: 1); shifts still reach every step below 8
        frames: a cache to read the steps from instead of the split's files
        scene: whether samples say where everything is

    Raises:
        DatasetError: which file is missing or damaged and how many are, or that no window fits.
    """

    def __init__(
        self,
        split: Path,
        *,
        sensors: Collection[str] = ("rgb_static", "proprio"),
        chunk: int = CHUNK,
        seed: int = 0,
        partial: float = 1.0,
        enriched: Mapping[str, Sequence[str]] | None = None,
        augment: bool = False,
        stride: int = 1,
        frames: Path | None = None,
        scene: bool = False,
    ) -> None:
        if not 0 < partial <= 1:
            raise DatasetError(f"partial: expected more than 0 and at most 1, got {partial}")
        self.recording = Recording(split)
        self.stride = stride
        self.scene = scene
        self.frames = None if frames is None else FrameCache(frames, self.recording)
        self.sensors = frozenset(sensors)
        self.shifts = max(chunk, 1)
        self.seed = seed
        self.enriched = enriched or {}
        self.augment = augment
        spans = read_annotations(find_annotations(split))
        self.spans = _part(spans, partial, seed)
        ranges = [starts(span, chunk)[::stride] for span in self.spans]
        self.starts = np.concatenate([np.asarray(r, np.int64) for r in ranges] or [np.zeros(0, np.int64)])
        self.span_of = np.repeat(np.arange(len(ranges)), [len(r) for r in ranges])
        if not len(self.starts):
            longest = max((span.end - span.start + 1 for span in self.spans), default=0)
            raise DatasetError(
                f"{split}: no window fits; {len(self.spans)} annotated spans, the longest of {longest} steps, "
                f"expected at least {WINDOW + chunk}"
            )
        self._check_complete()

    def _check_complete(self) -> None:
        """A window that misses a step moves on by 10, as published; one that then still misses some is an error."""
        length = WINDOW + self.shifts - 1
        direct = self.recording.complete(self.starts, length)
        moved = self.recording.complete(self.starts + DETOUR, length)
        self.detours = int(np.count_nonzero(~direct & moved))
        lost = self.starts[~direct & ~moved]
        if not len(lost):
            return
        needed = np.unique(np.concatenate([np.arange(span.start, span.end + 1) for span in self.spans]))
        missing = np.setdiff1d(needed, self.recording.steps)
        raise DatasetError(
            f"{self.recording.split}: {len(missing)} of the {len(needed)} annotated steps are missing, the first is "
            f"{step_name(int(missing[0]))}; copy the rest of the data set"
        )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key
        random = np.random.default_rng((self.seed, epoch, index))
        shift = int(random.integers(self.shifts))
        span = self.spans[self.span_of[index]]
        instruction = str(random.choice([*self.enriched.get(span.task, ()), span.instruction]))
        start = int(self.starts[index])
        if not self.recording.complete(np.array([start]), WINDOW + shift).all():
            start += DETOUR
        sample = self._read(key, Window(start, shift), span.task, instruction)
        return _augmented(sample, random) if self.augment else sample

    def _read(self, key: Key, window: Window, task: str, instruction: str) -> Sample:
        wanted: dict[int, set[str]] = {step: {"rel_actions"} for step in window.steps}
        wanted[window.start].add("rgb_static")
        wanted[window.previous].add("rgb_static")
        wanted[window.current] |= {"robot_obs", "rgb_static", *(self.sensors - {"proprio"})}
        if self.scene:
            wanted[window.current].add("scene_obs")
        source = self.recording if self.frames is None else self.frames
        try:
            steps = {step: source.read(step, names) for step, names in wanted.items()}
        except FileNotFoundError as error:
            raise DatasetError(f"{error.filename}: no such step, and it was there before; copy it again") from None
        actions = np.stack([steps[step]["rel_actions"] for step in window.steps]).astype(np.float32)
        current = steps[window.current]
        return Sample(
            key=key,
            window=window,
            task=task,
            instruction=instruction,
            first_frame=steps[window.start]["rgb_static"],
            first_actions=actions[:WINDOW],
            frame=_frame(current),
            previous=steps[window.previous]["rgb_static"],
            actions=window.targets(actions),
            history=window.history(actions),
            valid_cond_mask=window.valid_cond_mask,
            scene=current["scene_obs"].astype(np.float32) if self.scene else None,
        )


def read_enriched(path: Path) -> dict[str, list[str]]:
    """Further instructions for each task, from a JSON file {task: [instruction, ...]}.

    Raises:
        DatasetError: if the file has another layout.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: expected {{task: [instruction, ...]}}")
    for task, phrases in content.items():
        if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
            raise DatasetError(f"{path}: {task}: expected a list of instructions")
    return content


def _part(spans: list[Span], fraction: float, seed: int) -> list[Span]:
    if fraction == 1:
        return spans
    count = int(len(spans) * fraction)
    chosen = np.random.default_rng(seed).choice(len(spans), size=count, replace=False)
    return [spans[index] for index in sorted(chosen)]


def _frame(arrays: Mapping[str, npt.NDArray[Any]]) -> Frame:
    """The sensors of one step; pose and gripper action as proprioception."""

    def depth(name: str) -> npt.NDArray[np.float32] | None:
        return arrays[name].astype(np.float32) if name in arrays else None

    robot = arrays["robot_obs"]
    return Frame(
        rgb_static=arrays["rgb_static"],
        rgb_gripper=arrays.get("rgb_gripper"),
        depth_static=depth("depth_static"),
        depth_gripper=depth("depth_gripper"),
        rgb_tactile=arrays.get("rgb_tactile"),
        proprio=np.concatenate([robot[:6], robot[14:]]).astype(np.float32),
    )


def _augmented(sample: Sample, random: np.random.Generator) -> Sample:
    static, gripper = Augmentation.draw(random), Augmentation.draw(random)
    frame = sample.frame
    return replace(
        sample,
        first_frame=static.colour(sample.first_frame),
        previous=static.colour(sample.previous),
        frame=replace(
            frame,
            rgb_static=static.colour(frame.rgb_static),
            depth_static=None if frame.depth_static is None else static.depth(frame.depth_static),
            rgb_gripper=None if frame.rgb_gripper is None else gripper.colour(frame.rgb_gripper),
            depth_gripper=None if frame.depth_gripper is None else gripper.depth(frame.depth_gripper),
        ),
    )
