"""Setting a held block down: in the cabinet, in the drawer, on another block. One that was dropped is taken again."""

from __future__ import annotations

import math
from typing import Callable

import numpy as np

from robodual_client.playtable.skills.grasping import SHELF_TILT, cabinet_yaw, grasp_yaw, pick_up, uncover
from robodual_client.playtable.skills.motion import CLOSED, OPEN, Skill, hold, lean, move, retreat, shift, travel
from robodual_client.playtable.view import DESK_EDGE, DRAWER_FLOOR, HOME_YAW, SHELF_TOP, TABLE_TOP, View, downward

BESIDE = 0.085  # metres: clear of a block below, and near enough for the oracle to count a later turn in place
PLACE_TILT = 0.45  # radians: keeps the hand clear of the sliding door


def setting_down(bring: Callable[[View, str], Skill], out: tuple[float, float, float]) -> Callable[[View], Skill]:
    """The skill that brings the held block to its place, lets go and backs off by `out` metres; where it went wrong, it
    takes the block again."""

    def skill(view: View) -> Skill:
        held = view.held()
        name = held.name if held is not None else view.nearest().name
        while True:
            if view.held() is None:
                yield from pick_up(view, name)
            for goal in bring(view, name):
                if view.held() is None:
                    break
                yield goal
            yield from let_go(view, out)

    return skill


def level_tilt(view: View, name: str) -> float:
    """The tilt at which the held block is level: it was taken with some tilt, and may have turned in the grip."""
    return float(-view.euler[1] - view.blocks[name].lean(view.euler[2]))


def free_spot(view: View, spots: list[np.ndarray], name: str) -> np.ndarray:
    """The spot [2] that is farthest from every other block, the first such one."""
    others = [block.position[:2] for block in view.blocks.values() if block.name != name]
    return max(spots, key=lambda spot: min(0.1, *(float(np.linalg.norm(spot - other)) for other in others)))


def over(view: View, name: str, spot: np.ndarray, height: float) -> np.ndarray:
    """Where the tool centre is [3] when the held block's lowest corner is at `height` above `spot` [2]."""
    block = view.blocks[name]
    offset = view.tool - block.position
    return shift(offset, float(spot[0]), float(spot[1]), height + block.position[2] - block.bottom)


def let_go(view: View, out: tuple[float, float, float]) -> Skill:
    """Opens the gripper and backs off by `out` metres."""
    yield from hold(view, OPEN, 6)
    yield from move(view, shift(view.tool, *out), view.euler.copy(), OPEN, tolerance=0.02)
    yield from retreat(view)


def release(view: View) -> Skill:
    """Lets go of a block that is still held: where it is if it lies, on a free part of the desk if it is in the air."""
    block = view.held()
    if block is None:
        return
    over_desk = block.position[1] > DESK_EDGE and not view.on_shelf(block)
    if over_desk and block.bottom > TABLE_TOP + 0.02:
        yield from bring_onto_desk(view, block.name)
    yield from hold(view, OPEN, 6)
    yield from move(view, shift(view.tool, 0, 0, 0.09), view.euler.copy(), OPEN, tolerance=0.02)


def bring_onto_desk(view: View, name: str) -> Skill:
    """Onto the desk, beside whatever it is above."""
    around = [view.tool[:2] + BESIDE * np.array([math.cos(turn), math.sin(turn)]) for turn in np.arange(0, 6.2, 0.5)]
    desk = [spot for spot in around if -0.02 < spot[0] < 0.32 and -0.14 < spot[1] < -0.05]
    spot = free_spot(view, desk or around, name)
    euler = downward(float(view.euler[2]), max(level_tilt(view, name), lean(spot)))
    yield from travel(view, over(view, name, spot, TABLE_TOP + 0.08), euler, CLOSED)
    yield from move(view, lambda: over(view, name, spot, TABLE_TOP + 0.003), euler, CLOSED, 0.006, 0.4)


def bring_into_slider(view: View, name: str) -> Skill:
    """Into the open side of the cabinet, past the door's path and beside what lies there."""
    left = view.slide < 0.14
    yield from uncover(view, -0.2 if left else 0.03)
    depth = 0.045 + view.blocks[name].size[0] / 2  # the door's inner face passes over the shelf up to there
    places = (-0.23, -0.2, -0.255, -0.18, -0.165) if left else (0.03, 0.0, 0.056, -0.02, -0.035)
    spot = free_spot(view, [np.array([x, depth]) for x in places], name)
    tilt = float(np.clip(level_tilt(view, name), PLACE_TILT, SHELF_TILT))
    euler = downward(cabinet_yaw(view, float(spot[0]), HOME_YAW), tilt)
    front = spot - np.array([0.0, 0.13])

    yield from travel(view, over(view, name, front, SHELF_TOP + 0.1), euler, CLOSED)
    yield from move(view, lambda: over(view, name, front, SHELF_TOP + 0.09), euler, CLOSED, tolerance=0.015)
    near = spot - np.array([0.0, 0.02])
    yield from move(view, lambda: over(view, name, near, SHELF_TOP + 0.05), euler, CLOSED, 0.015, speed=0.5)
    yield from move(view, lambda: over(view, name, spot, SHELF_TOP + 0.003), euler, CLOSED, 0.004, 0.3, limit=40)


def bring_into_drawer(view: View, name: str) -> Skill:
    """Into the open drawer."""
    spot = free_spot(view, [np.array([x, -0.08 - view.drawer]) for x in (0.14, 0.08, 0.22)], name)
    euler = downward(HOME_YAW, float(np.clip(level_tilt(view, name), 0.0, PLACE_TILT)))
    yield from travel(view, over(view, name, spot, DRAWER_FLOOR + 0.1), euler, CLOSED)
    yield from move(view, lambda: over(view, name, spot, DRAWER_FLOOR + 0.1), euler, CLOSED, tolerance=0.02)
    yield from move(view, lambda: over(view, name, spot, DRAWER_FLOOR + 0.006), euler, CLOSED, 0.006, 0.4, limit=50)


def bring_onto_block(view: View, name: str) -> Skill:
    """On top of another block, one on the desk if there is one."""
    others = [block for block in view.blocks.values() if block.name != name]
    lying = [block for block in others if not view.on_shelf(block) and not view.in_drawer(block)] or others
    below = min(lying, key=lambda block: float(np.linalg.norm(block.position - view.tool))).name
    yaw = grasp_yaw(view, view.blocks[below], float(view.euler[2]))
    euler = downward(yaw, max(level_tilt(view, name), lean(view.blocks[below].position)))

    def above(height: float) -> np.ndarray:
        base = view.blocks[below]
        return over(view, name, base.position[:2], 2 * base.position[2] - base.bottom + height)

    yield from travel(view, above(0.08), euler, CLOSED)
    yield from move(view, lambda: above(0.06), euler, CLOSED, tolerance=0.008)
    yield from move(view, lambda: above(0.002), euler, CLOSED, tolerance=0.004, speed=0.3, limit=50)


UP = (0.0, 0.0, 0.1)
place_in_slider = setting_down(bring_into_slider, (0.0, -0.04, 0.08))
place_in_drawer = setting_down(bring_into_drawer, UP)
stack = setting_down(bring_onto_block, UP)
