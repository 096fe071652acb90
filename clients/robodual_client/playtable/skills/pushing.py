"""Pushing a block with closed fingers: sideways, or over the desk's edge into the drawer."""

from __future__ import annotations

import numpy as np

from robodual_client.playtable.skills.motion import CLOSED, Goal, Skill, lean, move, shift, travel
from robodual_client.playtable.view import HOME_YAW, View, downward

PUSH_HEIGHT = 0.462  # metres: fingertips a few millimetres above the desk
FINGER = 0.012  # metres: half a closed pair of fingers


def push_to(view: View, name: str, goal: np.ndarray, steps: int) -> Skill:
    """Pushes the block towards `goal` [2] from behind, steering by its centre."""

    def behind(gap: float) -> np.ndarray:
        block = view.blocks[name]
        away = block.position[:2] - goal
        away = away / np.linalg.norm(away)
        return np.array([*(block.position[:2] + away * (block.reach(away) + FINGER + gap)), PUSH_HEIGHT])

    euler = downward(HOME_YAW, lean(view.blocks[name].position))
    yield from travel(view, behind(0.03), euler, CLOSED)
    yield from move(view, shift(behind(0.03), 0, 0, 0.06), euler, CLOSED, tolerance=0.015)
    yield from move(view, behind(0.025), euler, CLOSED, tolerance=0.008)
    for _ in range(steps):
        yield Goal(behind(-0.03), euler, CLOSED, 0.4)


def push(view: View, name: str, direction: int) -> Skill:
    """Pushes the block along x by more than 0.1 m: direction 1 to the right, -1 to the left."""
    while True:
        start = view.blocks[name].position[:2].copy()
        away_from_button = 0.03 if direction < 0 and start[0] < 0.1 and start[1] < -0.04 else 0.0
        yield from push_to(view, name, start + np.array([direction * 0.16, 2 * away_from_button]), 60)


def push_into_drawer(view: View) -> Skill:
    """Pushes the block that lies on the desk over its front edge into the open drawer."""
    while True:
        lying = [b for b in view.blocks.values() if not view.on_shelf(b) and not view.in_drawer(b)]
        if not lying:
            return
        block = min(lying, key=lambda b: abs(float(b.position[0]) - 0.18))
        goal = np.array([np.clip(block.position[0], 0.10, 0.28), -0.30])
        yield from push_to(view, block.name, goal, 60)
