"""Writes small recordings in CALVIN's format, every value of which follows from its step."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from robodual.training.annotations import Span, write_annotations

TASKS = ("open_drawer", "turn_on_led", "lift_red_block_table")


def step_arrays(step: int, size: int = 20, gripper: int = 12) -> dict[str, Any]:
    """One control step; float64 where CALVIN's has it."""
    random = np.random.default_rng(step)
    relative = random.uniform(-1, 1, 7)
    relative[6] = random.choice([-1.0, 1.0])
    return {
        "rgb_static": random.integers(0, 256, (size, size, 3), dtype=np.uint8),
        "rgb_gripper": random.integers(0, 256, (gripper, gripper, 3), dtype=np.uint8),
        "rgb_tactile": random.integers(0, 256, (16, 12, 6), dtype=np.uint8),
        "depth_static": random.uniform(3.5, 6.2, (size, size)).astype(np.float32),
        "depth_gripper": random.uniform(0, 2, (gripper, gripper)).astype(np.float32),
        "depth_tactile": random.random((16, 12, 2), dtype=np.float32),
        "robot_obs": random.standard_normal(15),
        "scene_obs": random.standard_normal(24),
        "actions": random.standard_normal(7),
        "rel_actions": relative,
    }


def write_split(folder: Path, lengths: Iterable[int] = (40, 30), first: int = 100, gap: int = 7) -> Path:
    """A split of one annotated span an episode; returns its folder.

    Every episode has 2 steps before its span and 1 after it; `gap` numbers lie between episodes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spans, limits = [], []
    for number, length in enumerate(lengths):
        last = first + 2 + length
        for step in range(first, last + 1):
            np.savez_compressed(folder / f"episode_{step:07d}.npz", **step_arrays(step))
        limits.append((first, last))
        spans.append(Span(first + 2, last - 1, TASKS[number % len(TASKS)], f"Do thing {number}"))
        first = last + gap
    np.save(folder / "ep_start_end_ids.npy", np.array(limits))
    write_annotations(folder, spans)
    return folder
