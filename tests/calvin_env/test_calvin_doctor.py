"""The doctor names what is off in an observation, a replay or a policy's actions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robodual_client.calvin.checkout import find
from robodual_client.calvin.doctor import Options, check, judge_replay
from robodual_client.calvin.examination import Finding, examine, examine_actions, stage


@pytest.fixture(scope="module")
def observation() -> dict[str, Any]:
    """The stage in the built-in simulator, which has CALVIN's cameras and geometry."""
    from robodual_client.playtable import PlayTable

    simulator = PlayTable()
    seen = simulator.reset(*stage())
    simulator.close()
    return seen


def _examined(observation: dict[str, Any], **changes: Callable[[np.ndarray], np.ndarray]) -> dict[str, Finding]:
    changed = {name: dict(value) if isinstance(value, dict) else value for name, value in observation.items()}
    for name, change in changes.items():
        group = changed.get(f"{name[: name.find('_')]}_obs")
        holder, key = (group, name) if isinstance(group, dict) else (changed, name)
        holder[key] = change(holder[key])
    return {finding.subject: finding for finding in examine(changed)}


def test_a_right_observation_has_no_fault(observation: dict[str, Any]) -> None:
    assert {finding.state for finding in examine(observation)} <= {"ok", "note"}
    assert len(examine(observation)) == 6
    assert "depth_static 2.47 to 4.90" in _examined(observation)["model inputs"].found  # metres less 3.5 / 2.7


@pytest.mark.parametrize(
    ("sensor", "change", "found"),
    [
        ("rgb_static", lambda frame: frame[..., ::-1], "BGR, upright"),
        ("rgb_gripper", lambda frame: frame[..., ::-1], "BGR, upright"),
        ("rgb_static", np.flipud, "RGB, upside down"),
        ("rgb_static", np.fliplr, "RGB, mirrored left to right"),
        ("rgb_static", lambda frame: np.rot90(frame, 2), "RGB, rotated by 180 degrees"),
        ("rgb_gripper", lambda frame: np.rot90(frame, 2), "RGB, rotated by 180 degrees"),
        ("rgb_static", lambda frame: frame.transpose(1, 0, 2), "RGB, transposed"),
        ("rgb_static", lambda frame: np.fliplr(frame)[..., ::-1], "BGR, mirrored left to right"),
        ("rgb_static", lambda frame: frame / 255.0, "float64, 0 to "),
        ("rgb_static", lambda frame: frame.transpose(2, 0, 1), "shape (3, 200, 200)"),
        ("rgb_static", np.zeros_like, "not where the published camera sees them"),
        ("depth_static", lambda depth: depth * 1000, "millimetres"),
        ("depth_static", lambda depth: 10 * (1 - 0.01 / depth) / 9.99, "raw depth buffer"),
        ("depth_gripper", lambda depth: 2 * (1 - 0.01 / depth) / 1.99, "raw depth buffer"),
        ("depth_static", lambda depth: (depth - 3.5) / 2.7, "normalised"),
        ("depth_static", lambda depth: depth - 3.5 / 2.7, "metres less 3.5 / 2.7"),
        ("depth_static", np.flipud, "metres, 3.77 to 6.2, upside down"),
        ("depth_gripper", lambda depth: 1 / depth, "at the red block, 0.279 m away"),
    ],
)
def test_a_wrong_frame_is_named(
    observation: dict[str, Any], sensor: str, change: Callable[[np.ndarray], np.ndarray], found: str
) -> None:
    finding = _examined(observation, **{sensor: change})[sensor]
    assert finding.state == "fault"
    assert found in finding.found
    assert finding.remedy


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda robot: robot - [-0.34, -0.46, 0.24, *[0.0] * 12], "add the base"),
        (lambda robot: robot - [0, 0, -0.1034, *[0.0] * 12], "another link?"),
        (lambda robot: np.r_[robot[:3], np.degrees(robot[3:6]), robot[6:]], "in degrees"),
        (lambda robot: np.r_[robot[:3], robot[5:2:-1], robot[6:]], "Euler angles about the fixed axes"),
        (lambda robot: np.r_[robot[:6], robot[6] / 2, robot[7:]], "sum over both fingers"),
        (lambda robot: np.r_[robot[:14], 0.0], "last gripper command"),
        (lambda robot: np.r_[robot, 0.0], "15 numbers"),
    ],
)
def test_proprioception_in_another_frame_is_named(
    observation: dict[str, Any], change: Callable[[np.ndarray], np.ndarray], remedy: str
) -> None:
    finding = _examined(observation, robot_obs=change)["robot_obs"]
    assert finding.state == "fault"
    assert remedy in finding.remedy


def test_an_observation_that_the_client_refuses_says_why(observation: dict[str, Any]) -> None:
    finding = _examined(observation, depth_static=lambda depth: depth * 1000)["model inputs"]
    assert finding.state == "fault"
    assert "millimetres" in finding.found


@pytest.mark.parametrize(
    ("actions", "state", "words"),
    [
        (np.random.RandomState(0).uniform(-0.6, 0.6, (24, 7)), "ok", "24 steps"),
        (np.random.RandomState(0).uniform(-3, 3, (24, 7)), "fault", "absolute"),
        (np.full((24, 7), np.nan), "fault", "not finite"),
        (np.zeros((24, 7)), "fault", "every step is the same"),
        (np.sign(np.random.RandomState(0).uniform(-1, 1, (24, 7))), "fault", "at the limit"),
    ],
)
def test_actions_of_an_untrained_or_wrongly_scaled_policy_are_named(
    actions: np.ndarray, state: str, words: str
) -> None:
    actions = actions.copy()
    actions[:, 6] = 1 if np.isfinite(actions).all() else np.nan
    finding = examine_actions(actions)
    assert finding.state == state
    assert words in f"{finding.found} {finding.remedy}"


def test_a_replay_is_judged_by_where_and_how_far_it_leaves() -> None:
    exact: dict[str, Any] = {"robot_obs": None, "scene_obs": None, "rgb_static_mean": None}
    assert judge_replay("t", exact).state == "ok"
    far = {"index": [12, 2], "recorded": 0.5, "replayed": 0.6, "largest": 0.3}
    finding = judge_replay("t", {**exact, "robot_obs": far})
    assert finding.state == "fault"
    assert "robot_obs[2] (z) first differs at step 12: 0.6 instead of 0.5" in finding.found
    assert "start elsewhere" in judge_replay("t", {**exact, "scene_obs": {**far, "index": [0, 6]}}).remedy
    near = {**far, "replayed": 0.5000001, "largest": 1e-6}
    assert judge_replay("t", {**exact, "robot_obs": near}).state == "note"
    light = {"index": [0], "recorded": 131.0, "replayed": 140.0, "largest": 9.0}
    assert "the motion is exact" in judge_replay("t", {**exact, "rgb_static_mean": light}).found


def test_a_missing_checkout_is_a_fault_and_not_an_exception(tmp_path: Path) -> None:
    last = check(Options(root=tmp_path))[-1]
    assert (last.subject, last.state) == ("simulator", "fault")


def test_the_published_simulator_is_found_well(calvin_root: Path) -> None:
    findings = check(Options(root=calvin_root, render="cpu"))
    assert [finding for finding in findings if finding.state == "fault"] == []
    assert {"trace_sequence0", "rgb_static", "depth_gripper", "robot_obs"} <= {finding.subject for finding in findings}


def test_a_changed_checkout_is_caught_by_the_trace(calvin_root: Path, tmp_path: Path) -> None:
    shutil.copytree(str(find(calvin_root).repository), str(tmp_path / "c"), symlinks=True)
    robot = tmp_path / "c" / "conf" / "robot" / "panda.yaml"
    robot.write_text(robot.read_text() + "max_rel_pos: 0.01\n")
    (finding,) = [f for f in check(Options(root=tmp_path / "c", render="cpu")) if f.subject == "trace_sequence0"]
    assert finding.state == "fault"
    assert "max_rel_pos" in finding.remedy
