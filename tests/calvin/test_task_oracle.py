from __future__ import annotations

import numpy as np
import pytest
from fake_table import ROBOT, TABLE, FakeTable

from robodual_client.calvin.sequences import published
from robodual_client.calvin.tasks import TASKS, achieved, euler_degrees


@pytest.fixture
def table() -> FakeTable:
    fake = FakeTable()
    fake.reset(*published()[0].observations())
    return fake


def put(table: FakeTable, block: str, link: str) -> None:
    table.contacts[block] = {(TABLE, {"base_link": -1, "plank_link": 3, "drawer_link": 4}[link])}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_fires_when_it_is_done_and_only_then(task: str, table: FakeTable) -> None:
    rest = task.split("_")[1:]
    for block in ("block_red", "block_blue", "block_pink"):
        put(table, block, {"slider": "plank_link", "drawer": "drawer_link"}.get(rest[-1], "base_link"))
    if task in ("push_into_drawer", "stack_block", "unstack_block", "place_in_slider", "place_in_drawer"):
        put(table, "block_blue", "base_link")
    if task in ("place_in_slider", "place_in_drawer", "stack_block", "unstack_block"):
        put(table, "block_red", "plank_link")
        table.do("lift_red_block_slider")
    if task == "unstack_block":
        table.do("stack_block")
    table.doors = {"base__slide": 0.14, "base__drawer": 0.12}
    table.lights = {"lightbulb": int(rest[0] == "off"), "led": int(rest[0] == "off")}
    start = table.get_info()
    assert achieved(start, table.get_info()) == set()
    table.do(task)
    assert achieved(start, table.get_info()) == {task}
    assert achieved(start, table.get_info(), {task}) == {task}
    assert achieved(start, table.get_info(), set(TASKS) - {task}) == set()


def test_rotating_needs_more_than_sixty_degrees_on_the_spot_and_upright(table: FakeTable) -> None:
    start = table.get_info()
    block = "block_blue"
    for degrees, fires in ((59, set()), (61, {"rotate_blue_block_left"}), (-61, {"rotate_blue_block_right"})):
        table.reset(*published()[0].observations())
        table.yaw[block] += np.radians(degrees)
        assert achieved(start, table.get_info()) == fires
    table.position[block][1] += 0.11
    assert achieved(start, table.get_info()) == set()
    table.position[block][1] -= 0.11
    assert achieved(start, table.get_info()) == {"rotate_blue_block_right"}
    table.contacts[block] = {(ROBOT, 9)}
    assert achieved(start, table.get_info()) == set()
    table.contacts[block] = {(TABLE, -1)}
    info = table.get_info()
    tilted = np.array([np.sin(np.radians(20)), 0.0, 0.0, np.cos(np.radians(20))])  # 40 degrees about x
    info["scene_info"]["movable_objects"][block]["current_orn"] = tuple(tilted)
    assert not achieved(start, info)


def test_pushing_needs_the_same_surface_at_both_ends(table: FakeTable) -> None:
    start = table.get_info()
    table.position["block_blue"][0] -= 0.101
    assert achieved(start, table.get_info()) == {"push_blue_block_left"}
    table.contacts["block_blue"] = {(TABLE, 4)}
    assert "push_blue_block_left" not in achieved(start, table.get_info())
    table.contacts["block_blue"] = {(ROBOT, 9)}
    assert achieved(start, table.get_info()) == set()
    table.contacts["block_blue"] = {(TABLE, -1), (ROBOT, 9), (2, -1)}
    assert achieved(start, table.get_info()) == {"push_blue_block_left"}


def test_lifting_needs_its_height_and_nothing_but_the_robot_in_touch(table: FakeTable) -> None:
    start = table.get_info()
    table.contacts["block_blue"] = {(ROBOT, 9), (ROBOT, 10)}
    table.position["block_blue"][2] += 0.049
    assert achieved(start, table.get_info()) == set()
    table.position["block_blue"][2] += 0.002
    assert achieved(start, table.get_info()) == {"lift_blue_block_table"}
    table.contacts["block_blue"].add((TABLE, -1))
    assert achieved(start, table.get_info()) == set()


def test_doors_and_lights_count_from_where_they_started(table: FakeTable) -> None:
    table.doors["base__slide"] = 0.1
    start = table.get_info()
    table.doors["base__slide"] = 0.249
    assert achieved(start, table.get_info()) == set()
    table.doors["base__slide"] = 0.251
    assert achieved(start, table.get_info()) == {"move_slider_left"}
    table.lights["led"] = 0
    assert achieved(start, table.get_info()) == {"move_slider_left", "turn_off_led"}


def test_a_fast_block_is_not_stacked_yet(table: FakeTable) -> None:
    table.do("lift_red_block_slider")
    start = table.get_info()
    table.do("stack_block")
    end = table.get_info()
    end["scene_info"]["movable_objects"]["block_red"]["current_lin_vel"] = (0.0, 0.0, -1.2)
    assert achieved(start, end) == set()


def test_an_unknown_task_is_an_error(table: FakeTable) -> None:
    with pytest.raises(KeyError, match="juggle"):
        achieved(table.get_info(), table.get_info(), ["juggle"])


@pytest.mark.parametrize(
    ("quaternion", "angles"),
    [
        ((0, 0, 0, 1), (0, 0, 0)),
        ((np.sin(np.pi / 8), 0, 0, np.cos(np.pi / 8)), (45, 0, 0)),
        ((0, 0, -np.sin(np.pi / 3), np.cos(np.pi / 3)), (0, 0, -120)),
        # SciPy 1.17: Rotation.from_quat(...).as_euler("xyz", degrees=True)
        ((1, 2, 3, 4), (45.0, 19.47122063, 81.86989765)),
        ((-3, 1, 0.5, 2), (-117.59729587, 29.42133107, -18.79988516)),
    ],
)
def test_euler_angles_follow_the_fixed_axes_xyz(quaternion: tuple[float, ...], angles: tuple[float, ...]) -> None:
    np.testing.assert_allclose(euler_degrees(np.array(quaternion, dtype=float)), angles, atol=1e-6)
