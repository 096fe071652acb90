"""The adapter gives what the published simulator gave, bit for bit, in a fresh process and after any history."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robodual_client.calvin import trace
from robodual_client.calvin.sequences import published

DATA = Path(os.environ.get("ROBODUAL_CALVIN_DATA") or Path(__file__).parents[1] / "data" / "calvin")
TRACES = sorted(DATA.glob("trace_*.npz"))


def _drive(simulator: Any, number: int, seed: int, steps: int) -> np.ndarray:
    """Robot and scene [steps + 1, 39] of a gripper that goes for a block with some noise, and shoves it about."""
    draw = np.random.RandomState(seed)
    block = f"block_{draw.choice(['red', 'blue', 'pink'])}"
    observation = simulator.reset(*published()[number].observations())
    rows = [np.concatenate([observation["robot_obs"], observation["scene_obs"]])]
    info = simulator.get_info()
    for _ in range(steps):
        way = np.subtract(info["scene_info"]["movable_objects"][block]["current_pos"], info["robot_info"]["tcp_pos"])
        arm = [*(way / 0.02 + draw.normal(0, 0.3, 3)), *draw.uniform(-0.5, 0.5, 3)]
        action = np.array([*np.clip(arm, -1, 1), draw.choice([-1.0, 1.0])])
        observation, _, _, info = simulator.step(action)
        rows.append(np.concatenate([observation["robot_obs"], observation["scene_obs"]]))
    return np.array(rows)


@pytest.mark.parametrize("file", TRACES, ids=[file.stem for file in TRACES])
def test_a_fresh_process_reproduces_the_recorded_run(calvin_root: Path, file: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "CALVIN_ROOT": str(calvin_root.resolve())}
    command = [sys.executable, "-m", "robodual_client.calvin.trace", str(file.resolve())]
    answer = subprocess.run(command, env=environment, cwd=str(tmp_path), stdout=subprocess.PIPE, check=True)
    differences = json.loads(answer.stdout.decode())
    recorded = {name for name in trace.load(file) if name in trace.STATES + trace.FRAMES}
    assert differences == dict.fromkeys(recorded)


def test_recordings_are_there() -> None:
    assert TRACES, f"no trace_*.npz in {DATA}"


def test_an_episode_does_not_depend_on_those_before_it(simulator: Any) -> None:
    first = _drive(simulator, number=3, seed=1, steps=80)
    blocks = first[:, 21:].reshape(-1, 3, 6)[:, :, :3]  # [T, block, xyz]
    assert np.ptp(blocks, axis=0).max() > 0.02, "the gripper moved no block: this would compare too little"
    _drive(simulator, number=3, seed=1, steps=75)
    _drive(simulator, number=250, seed=2, steps=60)
    np.testing.assert_array_equal(_drive(simulator, number=3, seed=1, steps=80), first)


def test_a_reset_opens_the_gripper_whatever_was_commanded_last(simulator: Any) -> None:
    observations = published()[0].observations()
    simulator.reset(*observations)
    simulator.step(np.array([0.0, 0, 0, 0, 0, 0, -1]))
    assert simulator.get_obs()["robot_obs"][14] == -1
    assert simulator.reset(*observations)["robot_obs"][14] == 1


def test_single_precision_actions_give_the_same_as_double_ones(simulator: Any) -> None:
    observations = published()[0].observations()
    actions = np.random.RandomState(0).uniform(-1, 1, (20, 7)).astype(np.float32)
    actions[:, 6] = 1
    ends = []
    for dtype in (np.float32, np.float64):
        simulator.reset(*observations)
        for action in actions:
            observation = simulator.step(action.astype(dtype))[0]
        ends.append(observation["robot_obs"])
    np.testing.assert_array_equal(*ends)


def test_a_replay_that_leaves_its_recording_is_told_with_step_and_column() -> None:
    recorded = np.zeros((3, 4))
    replayed = recorded.copy()
    replayed[1, 2], replayed[2, 0] = 1e-9, -0.5
    found = trace.difference(recorded, replayed)
    assert found == trace.Difference(index=(1, 2), recorded=0.0, replayed=1e-9, largest=0.5)


def test_a_file_that_is_no_recording_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trace_x.npz"
    np.savez(file, actions=np.zeros((3, 7)))
    with pytest.raises(ValueError, match="has no sequence, robot_obs, scene_obs"):
        trace.load(file)
