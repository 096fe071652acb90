"""The adapter's protocol, and the published code's habits that must not show through it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robodual_client.calvin.checkout import SimulatorError
from robodual_client.calvin.sequences import published
from robodual_client.calvin.tasks import achieved

STILL = np.array([0.0, 0, 0, 0, 0, 0, 1])


def _environment() -> Any:
    from robodual_client.calvin.environment import CalvinEnvironment

    return CalvinEnvironment


def test_observations_are_what_the_models_take(calvin_root: Path) -> None:
    simulator = _environment()(calvin_root, render="cpu")
    observation = simulator.reset(*published()[0].observations())
    simulator.close()
    frames = {**observation["rgb_obs"], **observation["depth_obs"]}
    assert {name: (frame.shape, str(frame.dtype)) for name, frame in frames.items()} == {
        "rgb_static": ((200, 200, 3), "uint8"),
        "rgb_gripper": ((84, 84, 3), "uint8"),
        "depth_static": ((200, 200), "float32"),
        "depth_gripper": ((84, 84), "float32"),
    }
    assert all(frame.flags.c_contiguous for frame in frames.values())
    assert observation["robot_obs"].shape == (15,)
    assert observation["scene_obs"].shape == (24,)


def test_cameras_can_be_left_out(calvin_root: Path) -> None:
    simulator = _environment()(calvin_root, render="cpu", cameras=("gripper",))
    observation = simulator.reset()
    simulator.close()
    assert list(observation["rgb_obs"]) == ["rgb_gripper"]
    with pytest.raises(SimulatorError, match="no camera 'tactile'"):
        _environment()(calvin_root, cameras=("tactile",))


@pytest.mark.parametrize("scene", ["A", "B", "C", "D"])
def test_every_scene_starts_with_its_state_in_the_published_order(calvin_root: Path, scene: str) -> None:
    simulator = _environment()(calvin_root, scene, cameras=())
    robot_obs, scene_obs = published()[0].observations()
    observation = simulator.reset(robot_obs, scene_obs)
    blocks = list(simulator.get_info()["scene_info"]["movable_objects"])
    facts = simulator.facts
    simulator.close()
    assert np.abs(observation["scene_obs"][:6] - scene_obs[:6]).max() < 0.01
    assert facts["scene"] == f"scene {scene}"
    assert sorted(blocks) == ["block_blue", "block_pink", "block_red"]


def test_info_serves_the_oracle(simulator: Any) -> None:
    robot_obs, scene_obs = published()[0].observations()
    scene_obs[1] = 0.0
    simulator.reset(robot_obs, scene_obs)
    before = simulator.get_info()
    scene_obs[1] = 0.2
    simulator.reset(robot_obs, scene_obs)
    assert achieved(before, simulator.get_info(), ["open_drawer", "close_drawer"]) == {"open_drawer"}


def test_info_tells_the_pose_that_actions_are_added_to(simulator: Any) -> None:
    simulator.reset(*published()[0].observations())
    before = simulator.get_info()["robot_info"]
    after = simulator.step(np.array([0.5, 0, -1, 0, 0.2, 0, 1]))[3]["robot_info"]
    np.testing.assert_allclose(after["target_pos"] - before["target_pos"], [0.01, 0, -0.02], atol=1e-9)
    np.testing.assert_allclose(after["target_orn"] - before["target_orn"], [0, 0.01, 0], atol=1e-9)


@pytest.mark.parametrize(
    ("action", "complaint"),
    [
        (np.zeros(7), r"action\[6\] \(gripper\) is 0.0; it must be -1"),
        (np.ones(6), r"action has shape \(6,\); it must be 7 finite numbers"),
        (np.array([np.nan, 0, 0, 0, 0, 0, 1]), "7 finite numbers"),
    ],
)
def test_a_malformed_action_is_refused_and_does_no_harm(simulator: Any, action: np.ndarray, complaint: str) -> None:
    before = simulator.reset(*published()[0].observations())
    with pytest.raises(ValueError, match=complaint):
        simulator.step(action)
    np.testing.assert_array_equal(simulator.get_obs()["robot_obs"], before["robot_obs"])


def test_a_malformed_state_is_refused(simulator: Any) -> None:
    with pytest.raises(ValueError, match="scene_obs has shape"):
        simulator.reset(None, np.zeros(23))


def test_a_second_simulator_in_the_process_is_refused_until_the_first_is_closed(simulator: Any) -> None:
    again = _environment()
    with pytest.raises(SimulatorError, match="another pybullet simulator is open"):
        again(simulator.checkout.repository, cameras=())
    simulator.close()
    simulator.close()
    second = again(simulator.checkout.repository, cameras=())
    second.reset()
    second.close()


def test_placeholders_are_gone_once_the_simulator_is_imported(simulator: Any) -> None:
    for name in ("gym", "git", "quaternion", "cv2", "scipy"):
        module = sys.modules.get(name)
        assert module is None or module.__spec__ is not None


def test_it_starts_without_git_from_anywhere_and_prints_nothing(calvin_root: Path, tmp_path: Path) -> None:
    decoy = tmp_path / "franka_panda"
    decoy.mkdir()
    (decoy / "panda_longer_finger.urdf").write_text("not a robot")
    (tmp_path / "calvin_env").mkdir()
    script = (
        "import sys, warnings\n"
        "warnings.simplefilter('error')\n"
        "from robodual_client.calvin.environment import CalvinEnvironment\n"
        "simulator = CalvinEnvironment(sys.argv[1], render='cpu')\n"
        "simulator.reset()\n"
        "simulator.reset()\n"
        "print(simulator.facts['simulator'])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PATH"}
    answer = subprocess.run(
        [sys.executable, "-c", script, str(calvin_root.resolve())],
        cwd=str(tmp_path),
        env={**environment, "PATH": str(tmp_path)},
        capture_output=True,
    )
    assert answer.returncode == 0, answer.stderr.decode()
    assert answer.stdout.decode() == "calvin_env of unknown commit\n"
    assert "Exception ignored" not in answer.stderr.decode()


def test_a_reset_does_not_ask_git_again(simulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", refuse)
    simulator.reset()
    simulator.reset()


def test_another_calvin_env_in_the_process_is_told(calvin_root: Path, tmp_path: Path) -> None:
    package = tmp_path / "calvin_env"
    package.mkdir()
    (package / "__init__.py").write_text("")
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]); import calvin_env\n"
        "from robodual_client.calvin.environment import CalvinEnvironment\n"
        "CalvinEnvironment(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", script, str(calvin_root.resolve()), str(tmp_path)]
    answer = subprocess.run(command, stderr=subprocess.PIPE)
    assert f"calvin_env is already imported from {package}" in answer.stderr.decode()
