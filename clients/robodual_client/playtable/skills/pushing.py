"""Pushing a block with closed fingers: sideways, or over the desk's edge into the drawer."""

from __future__ import annotations

from typing import Callable

import numpy as np

from robodual_client.playtable.skills.grasping import grasp_yaw, take
from robodual_client.playtable.skills.motion import (
    CABINET_EDGE,
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
)
from robodual_client.playtable.view import BUTTON, HOME_YAW, View, downward

PUSH_HEIGHT = 0.462  # metres: fingertips a few millimetres above the desk
HANDLE_TILT = 0.5  # radians: keeps the hand clear of the sliding door's handle
STEPS = 60  # that a push may take
SLOWING = 3.4  # m/s2: a sliding block's
FINGER = 0.012  # metres: half a closed pair of fingers


def push_to(view: View, name: str, goal: np.ndarray, enough: Callable[[np.ndarray], bool]) -> Skill:
    """Pushes the block towards `goal` [2] from behind, steering by its centre, and backs off once `enough` says that
    where it will have slid to [2] suffices."""

    def behind(gap: float) -> np.ndarray:
        block = view.blocks[name]
        away = block.position[:2] - goal
        away = away / np.linalg.norm(away)
        return np.array([*(block.position[:2] + away * (block.reach(away) + FINGER + gap)), PUSH_HEIGHT])

    near_cabinet = behind(0.03)[1] > CABINET_EDGE - 0.02
    tilt = max(lean(view.blocks[name].position), HANDLE_TILT if near_cabinet else 0.0)
    euler = downward(HOME_YAW, tilt)
    yield from travel(view, behind(0.03), euler, CLOSED)
    yield from move(view, shift(behind(0.03), 0, 0, 0.06), euler, CLOSED, tolerance=0.015)
    yield from move(view, behind(0.025), euler, CLOSED, tolerance=0.008)
    last = view.blocks[name].position[:2]
    for _ in range(STEPS):
        now = view.blocks[name].position[:2]
        velocity = (now - last) * 30
        if enough(now + velocity * np.linalg.norm(velocity) / (2 * SLOWING)):
            break
        last = now
        yield Goal(behind(-0.035), euler, CLOSED, 0.5)
    yield from move(view, behind(0.03), euler, CLOSED, tolerance=0.015, limit=12)


def push(view: View, name: str, direction: int) -> Skill:
    """Pushes the block along x by more than 0.1 m: direction 1 to the right, -1 to the left."""
    block = view.blocks[name]
    start = block.position[:2].copy()
    end = start[0] + direction * (0.11 + block.reach(np.array([1.0, 0.0])))
    if end < BUTTON[0] + 0.025 and start[0] > BUTTON[0] and abs(start[1] - BUTTON[1]) < 0.07:
        yield from drag(view, name, np.array([start[0] - 0.125, -0.04]))
    away_from_button = 0.06 if direction < 0 and start[0] < 0.1 and start[1] < -0.04 else 0.0
    goal = start + np.array([direction * 0.2, away_from_button])
    while True:
        yield from push_to(view, name, goal, lambda spot: bool((spot[0] - start[0]) * direction > 0.106))


def drag(view: View, name: str, spot: np.ndarray) -> Skill:
    """Takes the block and slides it along the desk to `spot` [2], past the button, which is in a push's way."""
    yield from take(view, name, grasp_yaw(view, view.blocks[name]))
    tool, euler = view.tool.copy(), view.euler.copy()
    for target in (np.array([tool[0], spot[1]]), spot):
        yield from move(view, np.array([*target, tool[2]]), euler, CLOSED, speed=0.4)
    yield from hold(view, OPEN, 6)
    yield from retreat(view)


def push_into_drawer(view: View) -> Skill:
    """Pushes the block that lies on the desk over its front edge into the open drawer."""
    while True:
        lying = [b for b in view.blocks.values() if not view.on_shelf(b) and not view.in_drawer(b)]
        if not lying:
            return
        block = min(lying, key=lambda b: abs(float(b.position[0]) - 0.18))
        goal = np.array([np.clip(block.position[0], 0.10, 0.28), -0.30])
        yield from push_to(view, block.name, goal, lambda spot: bool(spot[1] < -0.21))
