"""Taking a block, and what is done while it is held: lifting, rotating, unstacking."""

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
from robodual_client.playtable.view import HOME_YAW, Block, View, downward, wrapped

CLOSE_STEPS = 8
SHELF_TILT = 0.6  # radians: keeps the hand clear of the cabinet's roof and sides
TURN = math.radians(80)
FINGER_REACH = 0.06  # metres from the tool centre to the outside of an open finger
WRIST = 1.9  # radians that the wrist turns either way from the home yaw
HALF_HAND = 0.104
SLACK = 0.016  # metres by which the fingers may close on a block beside their middle
SWING = 0.6
GRIP = 0.06  # metres that the fingers close on with room to spare


def grasp_yaw(view: View, block: Block, centre: float = HOME_YAW) -> float:
    """The yaw nearest `centre` at which the fingers close on the narrow side, clear of other blocks and of walls."""
    others = [other.position[:2] for other in view.blocks.values() if other.name != block.name]
    walled = view.in_drawer(block) or view.on_shelf(block)

    def cost(option: tuple[float, float]) -> float:
        yaw, span = option
        fingers = np.array([math.sin(yaw), -math.cos(yaw)])
        tips = [block.position[:2] + side * FINGER_REACH * fingers for side in (-1, 1)]
        blocked = any(np.linalg.norm(tip - other) < 0.035 for tip in tips for other in others)
        across = abs(math.cos(yaw)) if walled else 0.0  # drawer and cabinet are wide, and not deep
        far = abs(wrapped(yaw - HOME_YAW)) > WRIST
        return abs(wrapped(yaw - centre)) + 3.0 * blocked + 2.0 * (span > GRIP) + 2.0 * across + 5.0 * far

    options = [(yaw + half * math.pi, span) for yaw, span in block.grips for half in (-1, 0, 1)]
    return min(options, key=cost)[0]


def take(view: View, name: str, yaw: float, tilt: float = 0.0) -> Skill:
    """Opens, goes above the block, down around it, and closes."""
    euler = downward(yaw, tilt)

    def at(height: float) -> np.ndarray:
        block = view.blocks[name]
        spot = shift(block.position, 0.0, -math.tan(tilt) * height, height)
        if view.in_drawer(block) and abs(math.sin(yaw)) > 0.7:  # the outer finger fits between block and wall
            spot[0] = np.clip(spot[0], 0.062, 0.298)
        elif view.on_shelf(block):  # and the hand, if it can, between door and cabinet
            left, right = opening(view, spot[0])
            if left + HALF_HAND - SLACK < spot[0] < right - HALF_HAND + SLACK:
                spot[0] = np.clip(spot[0], left + HALF_HAND, right - HALF_HAND)
        return spot

    yield from travel(view, at(0.1), euler, OPEN)
    yield from move(view, lambda: at(0.08), euler, OPEN, tolerance=0.02)
    yield from move(view, lambda: at(0.0), euler, OPEN, tolerance=0.006, speed=0.4)
    yield from hold(view, CLOSED, CLOSE_STEPS)


def cabinet_yaw(view: View, x: float, yaw: float) -> float:
    """The yaw nearest `yaw` at which the hand, 0.21 m wide, reaches into the open side of the cabinet at `x`: an end
    that would hit door or cabinet stays in front. The block turns between the closing fingers."""
    left, right = opening(view, x)
    low, high = HOME_YAW - SWING, HOME_YAW + SWING
    if x + HALF_HAND > right - SLACK:
        high = HOME_YAW - SWING if x + HALF_HAND > right + SLACK else HOME_YAW
    if x - HALF_HAND < left + SLACK:
        low = HOME_YAW + SWING if x - HALF_HAND < left - SLACK else HOME_YAW
    return float(np.clip(yaw, low, max(low, high)))


def opening(view: View, x: float) -> tuple[float, float]:
    """The left and right end in metres of the gap between door and cabinet on the side where `x` is."""
    return (-0.36, -0.1 - view.slide) if x < -0.1 else (0.18 - view.slide, 0.16)


def uncover(view: View, x: float) -> Skill:
    """Slides the door on if it stands half in front of `x`, where the hand is to reach into the cabinet."""
    if x < -0.1 and view.slide > 0.05:
        yield from slide_door(view, 1)
    elif x > -0.1 and view.slide < 0.23:
        yield from slide_door(view, -1)


def pick_up(view: View, name: str) -> Skill:
    """Takes the block from wherever it lies and raises it, out of the cabinet if it lay there."""
    block = view.blocks[name]
    inside = view.on_shelf(block)
    if inside:
        yield from uncover(view, float(block.position[0]))
        block = view.blocks[name]
    yaw = grasp_yaw(view, block)
    if inside:
        yaw = cabinet_yaw(view, float(block.position[0]), yaw)
    yield from take(view, name, yaw, SHELF_TILT if inside else lean(block.position))
    up = shift(view.tool, 0.0, -0.08 if inside else 0.0, 0.1)
    yield from move(view, up, view.euler.copy(), CLOSED, speed=0.4, limit=40)


def lift(view: View, name: str) -> Skill:
    """Takes the block and raises it; again if it slips."""
    while True:
        yield from pick_up(view, name)
        held = view.held()
        if held is not None and held.name == name:
            yield from move(view, shift(view.tool, 0, 0, 0.05), view.euler.copy(), CLOSED, limit=30)


def rotate(view: View, name: str, direction: int) -> Skill:
    """Takes the block and turns it in place: direction 1 counter-clockwise (left), -1 clockwise (right)."""
    while True:
        # Start turned the other way, so that the wrist stays in range.
        yaw = grasp_yaw(view, view.blocks[name], HOME_YAW - direction * 0.4)
        yield from take(view, name, yaw, lean(view.blocks[name].position))
        target = view.euler.copy()
        target[2] = yaw + direction * TURN
        position = view.tool.copy()
        for _ in range(60):
            if abs(turn(view, target)[2]) < 0.05:
                break
            yield Goal(position, target, CLOSED)
        yield from hold(view, OPEN, 8)
        yield from retreat(view)


def unstack(view: View) -> Skill:
    """Takes the upper block of a stack off."""
    top = max(view.blocks.values(), key=lambda block: float(block.position[2]) - 10.0 * view.on_shelf(block))
    yield from lift(view, top.name)
