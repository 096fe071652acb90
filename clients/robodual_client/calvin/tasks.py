"""The 34 CALVIN tasks, and the oracle that says which of them happened between two moments.

A task is a change between the simulator's `get_info()` at a subtask's start and now. The meaning is the published one
(mees/calvin_env, envs/tasks.py, with the thresholds of mees/calvin's rollout/tasks/new_playtable_tasks.yaml), including
its odd corners, which are pointed out below. Works on any environment whose info has calvin_env's structure.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, Iterable, Mapping

import numpy as np

Info = Mapping[str, Any]
Predicate = Callable[[Info, Info], bool]

BLOCKS = ("red", "blue", "pink")

# Fields of a pybullet contact tuple: the other body, and its link.
_BODY, _LINK = 2, 4


def achieved(start_info: Info, end_info: Info, tasks: Iterable[str] | None = None) -> set[str]:
    """Names of the tasks (of `tasks`, or of all 34) that were achieved between the two infos.

    Raises KeyError for a name that is not a task.
    """
    names = TASKS if tasks is None else tasks
    return {name for name in names if TASKS[name](start_info, end_info)}


def euler_degrees(quaternion: np.ndarray) -> np.ndarray:
    """Angles (3, degrees) about the fixed axes x, y, z, applied in this order, of a quaternion (x, y, z, w).

    The convention of SciPy's `as_euler("xyz")`. At y = +-90 degrees x and z are not unique.
    """
    x, y, z, w = quaternion / np.linalg.norm(quaternion)
    return np.degrees(
        [
            np.arctan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y)),
            np.arcsin(np.clip(2 * (w * y - x * z), -1.0, 1.0)),
            np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)),
        ]
    )


def _rotation(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The quaternion (x, y, z, w) that turns `start` into `end`, both (x, y, z, w): end times the inverse of start."""
    start_vector, start_scalar = -start[:3], start[3]
    end_vector, end_scalar = end[:3], end[3]
    vector = end_scalar * start_vector + start_scalar * end_vector + np.cross(end_vector, start_vector)
    scalar = end_scalar * start_scalar - end_vector @ start_vector
    turn: np.ndarray = np.array([*vector, scalar])
    return turn


def _object(info: Info, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = info["scene_info"]["movable_objects"][name]
    return found


def _moved(start: Mapping[str, Any], end: Mapping[str, Any]) -> np.ndarray:
    moved: np.ndarray = np.subtract(end["current_pos"], start["current_pos"])
    return moved


def _touched_bodies(thing: Mapping[str, Any]) -> set[int]:
    return {contact[_BODY] for contact in thing["contacts"]}


def _touched_links(thing: Mapping[str, Any]) -> set[tuple[int, int]]:
    return {(contact[_BODY], contact[_LINK]) for contact in thing["contacts"]}


def _table_link(info: Info, link: str) -> tuple[int, int]:
    table = info["scene_info"]["fixed_objects"]["table"]
    return table["uid"], table["links"][link]


def _slow(thing: Mapping[str, Any], limit: float = 1.0) -> bool:
    """Every component of the velocity below `limit` (m/s, rad/s)."""
    return bool(np.all(np.abs([*thing["current_lin_vel"], *thing["current_ang_vel"]]) < limit))


def rotate(start_info: Info, end_info: Info, *, block: str, degrees: float) -> bool:
    """Turned about z by more than `degrees` (positive: counter-clockwise), by less than 30 about x and y, not moved by
    more than 10 cm, and touching something other than the robot."""
    start, end = _object(start_info, block), _object(end_info, block)
    if np.linalg.norm(_moved(start, end)) > 0.1:
        return False
    if not _touched_bodies(end) - {start_info["robot_info"]["uid"]}:
        return False
    x, y, z = euler_degrees(_rotation(np.asarray(start["current_orn"]), np.asarray(end["current_orn"])))
    turned = degrees < z < 180 if degrees > 0 else -180 < z < degrees
    return bool(turned and abs(x) < 30 and abs(y) < 30)


def push(start_info: Info, end_info: Info, *, block: str, distance: float) -> bool:
    """Moved along x by more than `distance` (metres; negative: to the left), resting at the end on everything that it
    rested on at the start, the robot aside."""
    start, end = _object(start_info, block), _object(end_info, block)
    robot = start_info["robot_info"]["uid"]
    start_surfaces = {contact for contact in _touched_links(start) if contact[0] != robot}
    end_surfaces = {contact for contact in _touched_links(end) if contact[0] != robot}
    if not start_surfaces or not start_surfaces <= end_surfaces:
        return False
    moved = _moved(start, end)[0]
    return bool(moved > distance if distance > 0 else moved < distance)


def lift(start_info: Info, end_info: Info, *, block: str, height: float, link: str) -> bool:
    """Raised by more than `height` (metres) from the table's `link`, and touching nothing but the robot."""
    start, end = _object(start_info, block), _object(end_info, block)
    return bool(
        _moved(start, end)[2] > height
        and _touched_bodies(end) == {start_info["robot_info"]["uid"]}
        and _table_link(start_info, link) in _touched_links(start)
    )


def place(start_info: Info, end_info: Info, *, link: str) -> bool:
    """The block that the robot held at the start (robot and block touched nothing else) now lies on the table's `link`,
    and the robot does not touch it."""
    held = _touched_bodies(start_info["robot_info"])
    if len(held) != 1 or held & _touched_bodies(end_info["robot_info"]):
        return False
    blocks = start_info["scene_info"]["movable_objects"]
    names = [name for name, block in blocks.items() if block["uid"] in held]
    if len(names) != 1:
        return False
    return _touched_bodies(blocks[names[0]]) == {start_info["robot_info"]["uid"]} and _table_link(
        end_info, link
    ) in _touched_links(_object(end_info, names[0]))


def push_into_drawer(start_info: Info, end_info: Info) -> bool:
    """Some block touched the table top, and nothing else, at the start, and touches the drawer now.

    The published code means to forbid the robot's touch at the end too, but looks for a body among (body, link) pairs
    and so never finds it; success is counted the same here.
    """
    source, destination = _table_link(start_info, "base_link"), _table_link(end_info, "drawer_link")
    return any(
        _touched_links(_object(start_info, f"block_{color}")) == {source}
        and destination in _touched_links(_object(end_info, f"block_{color}"))
        for color in BLOCKS
    )


def move_door(start_info: Info, end_info: Info, *, door: str, distance: float) -> bool:
    """The joint moved by more than `distance` (metres) in its direction since the start."""
    start, end = (info["scene_info"]["doors"][door]["current_state"] for info in (start_info, end_info))
    moved = end - start
    return bool(moved > distance if distance > 0 else moved < distance)


def toggle(start_info: Info, end_info: Info, *, light: str, on: int) -> bool:
    """The light was in the other state at the start and is in state `on` (0 or 1) now."""
    start, end = (info["scene_info"]["lights"][light]["logical_state"] for info in (start_info, end_info))
    return bool(start == 1 - on and end == on)


def stack(start_info: Info, end_info: Info) -> bool:
    """Some block touched no other block at the start, and now touches blocks only, at rest."""
    blocks = start_info["scene_info"]["movable_objects"]
    uids = {block["uid"] for block in blocks.values()}
    for name, start in blocks.items():
        end = _object(end_info, name)
        below = _touched_bodies(end)
        if not uids & _touched_bodies(start) and below and below <= uids and _slow(end):
            return True
    return False


def unstack(start_info: Info, end_info: Info) -> bool:
    """Some block touched blocks only, at rest, at the start, and touches no block now.

    As published it is the start's velocity that counts, and nothing is asked about where the block is now.
    """
    blocks = start_info["scene_info"]["movable_objects"]
    uids = {block["uid"] for block in blocks.values()}
    for name, start in blocks.items():
        below = _touched_bodies(start)
        if below and below <= uids and not uids & _touched_bodies(_object(end_info, name)) and _slow(start):
            return True
    return False


def _tasks() -> dict[str, Predicate]:
    tasks: dict[str, Predicate] = {}
    for color in BLOCKS:
        block = f"block_{color}"
        tasks[f"rotate_{color}_block_right"] = partial(rotate, block=block, degrees=-60)
        tasks[f"rotate_{color}_block_left"] = partial(rotate, block=block, degrees=60)
    for color in BLOCKS:
        block = f"block_{color}"
        tasks[f"push_{color}_block_right"] = partial(push, block=block, distance=0.1)
        tasks[f"push_{color}_block_left"] = partial(push, block=block, distance=-0.1)
    tasks["move_slider_left"] = partial(move_door, door="base__slide", distance=0.15)
    tasks["move_slider_right"] = partial(move_door, door="base__slide", distance=-0.15)
    tasks["open_drawer"] = partial(move_door, door="base__drawer", distance=0.12)
    tasks["close_drawer"] = partial(move_door, door="base__drawer", distance=-0.12)
    for color in BLOCKS:
        block = f"block_{color}"
        tasks[f"lift_{color}_block_table"] = partial(lift, block=block, height=0.05, link="base_link")
        tasks[f"lift_{color}_block_slider"] = partial(lift, block=block, height=0.03, link="plank_link")
        tasks[f"lift_{color}_block_drawer"] = partial(lift, block=block, height=0.05, link="drawer_link")
    tasks["place_in_slider"] = partial(place, link="plank_link")
    tasks["place_in_drawer"] = partial(place, link="drawer_link")
    tasks["stack_block"] = stack
    tasks["unstack_block"] = unstack
    tasks["turn_on_lightbulb"] = partial(toggle, light="lightbulb", on=1)
    tasks["turn_off_lightbulb"] = partial(toggle, light="lightbulb", on=0)
    tasks["turn_on_led"] = partial(toggle, light="led", on=1)
    tasks["turn_off_led"] = partial(toggle, light="led", on=0)
    tasks["push_into_drawer"] = push_into_drawer
    return tasks


TASKS: dict[str, Predicate] = _tasks()
"""Every task's name and its predicate of (start_info, end_info), in the published order."""
