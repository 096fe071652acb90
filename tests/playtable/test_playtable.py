"""The built-in simulator: published start states, determinism, control, cameras, lights."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robodual_client.playtable import PlayTable

SEQUENCES = Path(__file__).parents[1] / "data" / "calvin" / "sequences.json.gz"
OPEN = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


@pytest.fixture(scope="module")
def sequences() -> list[dict[str, Any]]:
    with gzip.open(SEQUENCES, "rt") as file:
        loaded: list[dict[str, Any]] = json.load(file)
    return loaded


@pytest.fixture(scope="module")
def table() -> Any:
    with PlayTable(render=False) as env:
        yield env


def rollout(env: PlayTable, start: dict[str, Any], steps: int) -> list[Any]:
    generator = np.random.default_rng(7)
    first = env.reset(start["robot_obs"], start["scene_obs"])
    return [first, *(env.step(generator.uniform(-1, 1, 7))[0] for _ in range(steps))]


def digest(observations: list[Any]) -> str:
    total = hashlib.sha256()
    for observation in observations:
        for value in (observation["robot_obs"], observation["scene_obs"]):
            total.update(value.tobytes())
        for group in ("rgb_obs", "depth_obs"):
            for image in observation.get(group, {}).values():
                total.update(image.tobytes())
    return total.hexdigest()


def test_a_reset_shows_exactly_the_published_start_state(table: PlayTable, sequences: list[dict[str, Any]]) -> None:
    for start in sequences[::25]:
        observation = table.reset(start["robot_obs"], start["scene_obs"])
        np.testing.assert_allclose(observation["scene_obs"], start["scene_obs"], atol=1e-9)
        # Published poses were recorded with a few micrometres of joint error.
        np.testing.assert_allclose(observation["robot_obs"], start["robot_obs"], atol=1e-5)
        np.testing.assert_allclose(observation["robot_obs"][7:14], start["robot_obs"][7:14], atol=1e-12)


def test_start_states_stay_put_while_the_arm_holds_still(table: PlayTable, sequences: list[dict[str, Any]]) -> None:
    for start in sequences[:200:20]:
        table.reset(start["robot_obs"], start["scene_obs"])
        for _ in range(30):
            observation = table.step(OPEN)[0]
        np.testing.assert_allclose(observation["scene_obs"], start["scene_obs"], atol=1e-3)
        np.testing.assert_allclose(observation["robot_obs"], start["robot_obs"], atol=1e-3)


def test_blocks_touch_their_surface_already_in_the_first_info(
    table: PlayTable, sequences: list[dict[str, Any]]
) -> None:
    for start in sequences[:40:4]:
        table.reset(start["robot_obs"], start["scene_obs"])
        info = table.get_info()["scene_info"]
        furniture = info["fixed_objects"]["table"]
        for colour in ("red", "blue", "pink"):
            place = start["initial_state"][f"{colour}_block"]
            link = furniture["links"]["base_link" if place == "table" else "plank_link"]
            contacts = {(contact[2], contact[4]) for contact in info["movable_objects"][f"block_{colour}"]["contacts"]}
            assert contacts == {(furniture["uid"], link)}


def test_the_same_actions_give_the_same_frames_after_earlier_episodes(sequences: list[dict[str, Any]]) -> None:
    with PlayTable(seed=1) as first, PlayTable(seed=2) as second:
        expected = digest(rollout(first, sequences[0], 25))
        rollout(first, sequences[3], 15)
        assert digest(rollout(first, sequences[0], 25)) == expected
        rollout(second, sequences[5], 10)
        assert digest(rollout(second, sequences[0], 25)) == expected


def test_another_process_gives_the_same_states(table: PlayTable, sequences: list[dict[str, Any]]) -> None:
    script = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); import test_playtable as t\n"
        "env = t.PlayTable(render=False)\n"
        "print(t.digest(t.rollout(env, json.loads(sys.argv[2]), 40)))"
    )
    arguments = [sys.executable, "-c", script, str(Path(__file__).parent), json.dumps(sequences[11])]
    answer = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert digest(rollout(table, sequences[11], 40)) in answer


def test_resets_without_a_scene_follow_the_seed() -> None:
    with PlayTable(seed=4, render=False) as first, PlayTable(seed=4, render=False) as second:
        scenes = [env.reset()["scene_obs"] for env in (first, second, first)]
    np.testing.assert_array_equal(scenes[0], scenes[1])
    assert not np.array_equal(scenes[0], scenes[2])


def test_relative_actions_move_the_tool_by_their_units(table: PlayTable, sequences: list[dict[str, Any]]) -> None:
    start = sequences[0]
    for axis in range(6):
        before = table.reset(start["robot_obs"], start["scene_obs"])["robot_obs"]
        action = np.array(OPEN)
        action[axis] = 0.5
        for _ in range(5):
            table.step(action)
        for _ in range(15):
            after = table.step(OPEN)[0]["robot_obs"]
        moved = after[:6] - before[:6]
        moved[3:] = (moved[3:] + np.pi) % (2 * np.pi) - np.pi
        expected = np.zeros(6)
        expected[axis] = 5 * 0.5 * (0.02 if axis < 3 else 0.05)
        np.testing.assert_allclose(moved, expected, atol=2e-3)


def test_the_gripper_closes_on_minus_one_and_opens_on_one(table: PlayTable, sequences: list[dict[str, Any]]) -> None:
    table.reset(sequences[0]["robot_obs"], sequences[0]["scene_obs"])
    for _ in range(20):
        closed = table.step([0, 0, 0, 0, 0, 0, -1])[0]["robot_obs"]
    for _ in range(20):
        opened = table.step(OPEN)[0]["robot_obs"]
    assert closed[6] < 0.002
    assert closed[14] == -1
    assert opened[6] > 0.078
    assert opened[14] == 1


def test_frames_have_calvins_shapes_and_metric_depth(sequences: list[dict[str, Any]]) -> None:
    with PlayTable() as env:
        observation = env.reset(sequences[0]["robot_obs"], sequences[0]["scene_obs"])
    rgb, depth = observation["rgb_obs"], observation["depth_obs"]
    assert (rgb["rgb_static"].shape, rgb["rgb_static"].dtype) == ((200, 200, 3), np.uint8)
    assert (rgb["rgb_gripper"].shape, rgb["rgb_gripper"].dtype) == ((84, 84, 3), np.uint8)
    assert (depth["depth_static"].shape, depth["depth_static"].dtype) == ((200, 200), np.float32)
    assert (depth["depth_gripper"].shape, depth["depth_gripper"].dtype) == ((84, 84), np.float32)
    # The camera is 4.2 m from the middle of the table, and the blue block of this state stands there.
    assert depth["depth_static"][100, 100] == pytest.approx(4.15, abs=0.15)
    blue = (rgb["rgb_static"][:, :, 2] > 130) & (rgb["rgb_static"][:, :, :2].max(axis=2) < 40)
    rows, columns = np.nonzero(blue)
    assert len(rows) > 50
    assert rows.mean() == pytest.approx(103, abs=3)
    assert columns.mean() == pytest.approx(94, abs=3)


def test_lamps_change_colour_in_the_picture(sequences: list[dict[str, Any]]) -> None:
    start = np.array(sequences[0]["scene_obs"])
    frames = {}
    with PlayTable() as env:
        for lit in (0.0, 1.0):
            start[4:6] = lit
            frames[lit] = env.reset(sequences[0]["robot_obs"], start)["rgb_obs"]["rgb_static"].astype(int)
    changed = np.abs(frames[0.0] - frames[1.0]).max(axis=2) > 60
    assert changed[:25, 55:100].sum() > 100  # the LED
    assert changed[:20, 145:175].sum() > 50  # the bulb
    assert changed[40:].sum() == 0


def test_it_goes_the_way_of_the_published_simulators_recorded_run(sequences: list[dict[str, Any]]) -> None:
    trace = np.load(SEQUENCES.with_name("trace_sequence0.npz"))
    with PlayTable() as env:
        first = env.reset(sequences[0]["robot_obs"], sequences[0]["scene_obs"])
        env.render = False
        rest = [env.step(action)[0] for action in trace["actions"]]
    robot = np.array([observation["robot_obs"] for observation in [first, *rest]])
    scene = np.array([observation["scene_obs"] for observation in [first, *rest]])
    assert np.linalg.norm(robot[:, :3] - trace["robot_obs"][:, :3], axis=1).max() < 0.004
    assert np.abs(scene - trace["scene_obs"]).max() < 0.004
    depth = np.abs(first["depth_obs"]["depth_static"][::4, ::4] - trace["first_depth_static"])
    assert np.median(depth) < 0.001
    assert np.percentile(depth, 90) < 0.005


@pytest.mark.parametrize("action", [[0.0] * 6, [float("nan")] * 7, [[0.0] * 7]])
def test_a_bad_action_is_refused_by_name(table: PlayTable, action: Any) -> None:
    with pytest.raises(ValueError, match="action must be 7 finite numbers"):
        table.step(action)


def test_a_bad_start_state_is_refused_by_name(table: PlayTable) -> None:
    with pytest.raises(ValueError, match="scene_obs must be 24 finite numbers"):
        table.reset(scene_obs=np.zeros(23))
    with pytest.raises(ValueError, match="robot_obs must be 15 finite numbers"):
        table.reset(robot_obs=np.full(15, np.inf))
