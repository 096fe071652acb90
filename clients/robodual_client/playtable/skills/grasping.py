"""Taking a block, and what is done with one that is held: lift, rotate, place, stack, unstack."""

from __future__ import annotations

import math

import numpy as np

from robodual_client.playtable.skills.furniture import slide_door
from robodual_client.playtable.skills.motion import (
    CLOSED,
    OPEN,
    Goal,
    Skill,
    hold,
    lean,
    move,
    retreat,
    shift,
    travel,
    turn,
)
from robodual_client.playtable.view import DRAWER_FLOOR, HOME_YAW, SHELF_TOP, Block, View, downward, wrapped

CLOSE_STEPS = 8
SHELF_TILT = 0.6  # radians: keeps the hand clear of the cabinet's roof
PLACE_TILT = 0.45  # keeps it clear of the door
TURN = math.radians(80)
FINGER_REACH = 0.06  # metres from the tool centre to the outside of an open finger


def grasp_yaw(view: View, block: Block, centre: float = HOME_YAW) -> float:
    """The yaw nearest `centre` at which the fingers close on the block's narrow side, clear of the other blocks."""
    options = [block.long_axis + quarter * math.pi for quarter in (-1, 0, 1)]
    if block.size[0] < 0.05:
        options += [yaw + math.pi / 2 for yaw in options]

    def cost(yaw: float) -> float:
        fingers = np.array([math.sin(yaw), -math.cos(yaw)])
        tips = [block.position[:2] + side * FINGER_REACH * fingers for side in (-1, 1)]
        others = [other.position[:2] for other in view.blocks.values() if other.name != block.name]
        blocked = any(np.linalg.norm(tip - other) < 0.035 for tip in tips for other in others)
        return abs(wrapped(yaw - centre)) + 3.0 * blocked

    return min(options, key=cost)


def take(view: View, name: str, yaw: float, tilt: float = 0.0) -> Skill:
    """Opens, goes above the block, down around it, and closes."""
    euler = downward(yaw, tilt)

    def at(height: float) -> np.ndarray:
        block = view.blocks[name]
        spot = shift(block.position, 0.0, -math.tan(tilt) * height, height)
        if view.in_drawer(block) and abs(math.sin(yaw)) > 0.7:  # the outer finger fits between block and wall
            spot[0] = np.clip(spot[0], 0.062, 0.298)
        elif view.on_shelf(block):  # and the hand between the cabinet's sides
            spot[0] = np.clip(spot[0], -0.255, 0.056)
        return spot

    yield from travel(view, at(0.1), euler, OPEN)
    yield from move(view, lambda: at(0.08), euler, OPEN, tolerance=0.02)
    yield from move(view, lambda: at(0.0), euler, OPEN, tolerance=0.006, speed=0.4)
    yield from hold(view, CLOSED, CLOSE_STEPS)


def uncover(view: View, x: float) -> Skill:
    """Slides the door on if it stands half in front of `x`, where the hand is to reach into the cabinet."""
    if x < -0.1 and view.slide > 0.05:
        yield from slide_door(view, 1)
    elif x > -0.1 and view.slide < 0.2:
        yield from slide_door(view, -1)


def take_from(view: View, name: str) -> Skill:
    """Takes a block from wherever it lies."""
    block = view.blocks[name]
    tilt = SHELF_TILT if view.on_shelf(block) else lean(block.position)
    yield from take(view, name, grasp_yaw(view, block), tilt)


def lift(view: View, name: str) -> Skill:
    """Takes the block and raises it, out of the cabinet if it lay there; again if it slips."""
    while True:
        inside = view.on_shelf(view.blocks[name])
        if inside:
            yield from uncover(view, float(view.blocks[name].position[0]))
        yield from take_from(view, name)
        up = shift(view.tool, 0.0, -0.08 if inside else 0.0, 0.1)
        yield from move(view, up, view.euler.copy(), CLOSED, speed=0.4, limit=40)
        held = view.held()
        if held is not None and held.name == name:
            yield from move(view, shift(up, 0, 0, 0.05), view.euler.copy(), CLOSED, limit=30)


def rotate(view: View, name: str, direction: int) -> Skill:
    """Takes the block and turns it in place: direction 1 counter-clockwise (left), -1 clockwise (right)."""
    while True:
        # Start turned the other way, so that the wrist stays in range.
        yaw = grasp_yaw(view, view.blocks[name], HOME_YAW - direction * 0.4)
        yield from take(view, name, yaw)
        target = view.euler.copy()
        target[2] = yaw + direction * TURN
        position = view.tool.copy()
        for _ in range(60):
            if abs(turn(view, target)[2]) < 0.05:
                break
            yield Goal(position, target, CLOSED)
        yield from hold(view, OPEN, 8)
        yield from retreat(view, OPEN)


def free_spot(view: View, spots: list[np.ndarray], name: str) -> np.ndarray:
    """The spot [2] that is farthest from every other block."""
    others = [block.position[:2] for block in view.blocks.values() if block.name != name and not view.in_drawer(block)]
    return max(spots, key=lambda spot: min(float(np.linalg.norm(spot - other)) for other in others))


def let_go(view: View, euler: np.ndarray, out: np.ndarray) -> Skill:
    """Opens the gripper and backs off by `out` [3]."""
    yield from hold(view, OPEN, 6)
    yield from move(view, view.tool + out, euler, OPEN, tolerance=0.02)
    yield from retreat(view, OPEN)


def place_in_slider(view: View) -> Skill:
    """Puts the held block into the open side of the cabinet, past the door's path and beside what lies there."""
    block = view.held()
    if block is None:
        return
    left = view.slide < 0.14
    yield from uncover(view, -0.2 if left else 0.03)
    depth = 0.045 + block.size[0] / 2  # the door's inner face passes over the shelf up to there
    low, high = (-0.255, -0.17) if left else (-0.03, 0.056)
    spot = free_spot(view, [np.array([x, depth]) for x in np.linspace(low, high, 6)], block.name)
    euler = downward(HOME_YAW, PLACE_TILT)

    def inside(height: float) -> np.ndarray:
        held = view.blocks[block.name]
        tool: np.ndarray = view.tool - held.position
        return shift(tool, spot[0], spot[1], SHELF_TOP + height + held.position[2] - held.bottom)

    yield from travel(view, inside(0.1), euler, CLOSED)
    yield from move(view, lambda: shift(inside(0.09), 0, -0.13, 0), euler, CLOSED, tolerance=0.015)
    yield from move(view, lambda: shift(inside(0.05), 0, -0.02, 0), euler, CLOSED, tolerance=0.015, speed=0.5)
    yield from move(view, lambda: inside(0.003), euler, CLOSED, tolerance=0.004, speed=0.3, limit=40)
    yield from let_go(view, euler, np.array([0.0, -0.04, 0.08]))


def place_in_drawer(view: View) -> Skill:
    """Puts the held block into the open drawer."""
    block = view.held()
    if block is None:
        return
    inside_drawer = [other for other in view.blocks.values() if view.in_drawer(other)]
    spots = [np.array([x, -0.08 - view.drawer]) for x in (0.14, 0.08, 0.22)]
    spot = max(spots, key=lambda s: min([0.1] + [float(np.linalg.norm(s - b.position[:2])) for b in inside_drawer]))
    euler = downward(HOME_YAW)
    offset = view.tool - block.position
    inside = np.array([*spot, DRAWER_FLOOR + 0.026]) + offset
    yield from travel(view, inside, euler, CLOSED)
    yield from move(view, shift(inside, 0, 0, 0.1), euler, CLOSED, tolerance=0.02)
    yield from move(view, inside, euler, CLOSED, tolerance=0.006, speed=0.4, limit=50)
    yield from let_go(view, euler, np.array([0.0, 0.0, 0.1]))


def stack(view: View) -> Skill:
    """Sets the held block on another that lies on the table."""
    top = view.held()
    if top is None:
        return
    others = [block for block in view.blocks.values() if block.name != top.name]
    lying = [block for block in others if not view.on_shelf(block) and not view.in_drawer(block)] or others
    below = min(lying, key=lambda block: float(np.linalg.norm(block.position - view.tool)))
    euler = downward(grasp_yaw(view, below), lean(below.position))

    def over(height: float) -> np.ndarray:
        centre = shift(view.blocks[below.name].position, 0.0, 0.0, 0.04 + height)
        tool: np.ndarray = centre + view.tool - view.blocks[top.name].position
        return tool

    yield from travel(view, over(0.08), euler, CLOSED)
    yield from move(view, lambda: over(0.06), euler, CLOSED, tolerance=0.01)
    yield from move(view, lambda: over(0.002), euler, CLOSED, tolerance=0.004, speed=0.3, limit=50)
    yield from let_go(view, euler, np.array([0.0, 0.0, 0.1]))


def unstack(view: View) -> Skill:
    """Takes the upper block of a stack and sets it down beside."""
    top = max(view.blocks.values(), key=lambda block: float(block.position[2]) - 10.0 * view.on_shelf(block))
    yield from lift(view, top.name)
