"""`robodual data check` finds what would spoil a training, and draws what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calvin_data import TASKS, step_arrays, write_split
from PIL import Image
from typer.testing import CliRunner

from robodual.training.data_cli import data
from robodual.training.examination import examine


@pytest.fixture
def split(tmp_path: Path) -> Path:
    return write_split(tmp_path / "training", lengths=[20, 18])


def test_a_whole_data_set_has_no_faults_and_true_statistics(split: Path) -> None:
    found = examine(split)
    assert found.faults == []
    assert (found.steps, found.episodes, found.examined) == (23 + 21, 2, 44)
    assert found.tasks == {TASKS[0]: 1, TASKS[1]: 1}
    stacked = [np.load(path) for path in sorted(split.glob("episode_*.npz"))]
    robot = np.stack([step["robot_obs"] for step in stacked])
    frames = np.stack([step["rgb_static"] for step in stacked])
    np.testing.assert_allclose(found.ranges["robot_obs"].mean, robot.mean(axis=0))
    np.testing.assert_allclose(found.ranges["robot_obs"].deviation, robot.std(axis=0))
    np.testing.assert_allclose(found.ranges["robot_obs"].high, robot.max(axis=0))
    np.testing.assert_allclose(found.ranges["rgb_static"].mean, frames.mean())


def test_missing_orphaned_and_left_over_files_are_counted(split: Path) -> None:
    (split / "episode_0000105.npz").unlink()
    (split / "episode_0000106.npz").unlink()
    np.savez(split / "episode_0000001.npz", **step_arrays(1))
    (split / "episode_0000200.npz.partial").write_bytes(b"half")
    faults = "\n".join(examine(split).faults)
    assert "2 steps of ep_start_end_ids.npy are missing; copy them again; the first is episode_0000105.npz" in faults
    assert "2 steps of annotated spans are missing" in faults
    assert "1 steps belong to no episode of ep_start_end_ids.npy (orphans); the first is episode_0000001.npz" in faults
    assert "episode_0000200.npz.partial: left over" in faults


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rel_actions": np.array([0, 0, 3.0, 0, 0, 0, 1])}, "rel_actions reaches 3.000"),
        ({"rel_actions": np.array([0, 0, 0, 0, 0, 0, 0.5])}, "rel_actions[6] (gripper) is 0.500"),
        ({"robot_obs": np.full(15, np.nan)}, "robot_obs has values that are not finite"),
        ({"scene_obs": np.zeros(3)}, "scene_obs is float64 [3], expected float [24]"),
        ({"rgb_gripper": None}, "no rgb_gripper"),
    ],
)
def test_a_bad_step_is_named(split: Path, change: dict[str, Any], message: str) -> None:
    arrays = {name: value for name, value in (step_arrays(110) | change).items() if value is not None}
    np.savez(split / "episode_0000110.npz", **arrays)
    (fault,) = examine(split).faults
    assert "episode_0000110.npz" in fault
    assert message in fault


def test_the_command_draws_a_contact_sheet_and_exits_by_what_it_found(split: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    good = CliRunner().invoke(data, ["check", str(split), "--sheet", str(sheet)])
    assert good.exit_code == 0, good.output
    assert "44 steps in 2 episodes, 2 annotated spans of 2 tasks" in " ".join(good.output.split())
    with Image.open(sheet) as picture:
        assert len(picture.getcolors(1 << 20) or []) > 1000
    (split / "episode_0000110.npz").write_bytes(b"")
    bad = CliRunner().invoke(data, ["check", str(split), "--steps", "100"])
    assert bad.exit_code == 1
    assert "damaged or cut short" in bad.output
    nothing = CliRunner().invoke(data, ["check", str(tmp_path)])
    assert nothing.exit_code == 1
    assert "expected a split of a CALVIN data set" in " ".join(nothing.stderr.split())
