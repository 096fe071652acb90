"""Goals for the gripper, and the moves that all skills share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Iterator, Union

import numpy as np

from robodual_client.playtable.view import HOME_YAW, View, downward, wrapped

OPEN, CLOSED = 1.0, -1.0
TRAVEL = 0.55  # metres: the height at which the gripper passes over everything in front of the cabinet
CABINET_EDGE = -0.05  # metres: behind this y there are handles above the desk


@dataclass(frozen=True)
class Goal:
    """Where the tool centre should be [3], its Euler angles [3], the gripper command, and the largest action."""

    position: np.ndarray
    euler: np.ndarray
    gripper: float
    speed: float = 0.6


def shift(position: np.ndarray, x: float, y: float, z: float) -> np.ndarray:
    """`position` [3] moved by x, y and z metres."""
    moved: np.ndarray = position + np.array([x, y, z])
    return moved


Skill = Iterator[Goal]
Position = Union[np.ndarray, Callable[[], np.ndarray]]

HOME = downward(HOME_YAW)


def turn(view: View, euler: np.ndarray) -> np.ndarray:
    """The rotation [3] still to go, never through the far side of the wrist."""
    yaw = wrapped(euler[2] - HOME_YAW) - wrapped(view.euler[2] - HOME_YAW)
    return np.array([wrapped(euler[0] - view.euler[0]), wrapped(euler[1] - view.euler[1]), yaw])


def move(
    view: View,
    position: Position,
    euler: np.ndarray,
    gripper: float,
    tolerance: float = 0.008,
    speed: float = 0.6,
    limit: int = 70,
    angle: float = 0.08,
) -> Skill:
    """Goes to a position, fixed or followed, until within `tolerance` metres and `angle` radians, or `limit` steps."""
    for _ in range(limit):
        target = position() if callable(position) else position
        arrived = np.linalg.norm(target - view.tool) < tolerance
        if arrived and np.abs(turn(view, euler)).max() < angle:
            return
        yield Goal(target, euler, gripper, speed)


def hold(view: View, gripper: float, steps: int) -> Skill:
    """Stays where it is while the gripper opens or closes."""
    position, euler = view.tool.copy(), view.euler.copy()
    for _ in range(steps):
        yield Goal(position, euler, gripper)


def retreat(view: View) -> Skill:
    """Out of wherever the last skill ended, up to where moving sideways is safe. The gripper stays as it is, so that it
    neither takes nor shoves what is beside it."""
    grip = CLOSED if view.closing else OPEN
    if view.tool[1] > CABINET_EDGE:
        out = np.array([view.tool[0], CABINET_EDGE - 0.02, max(view.tool[2], 0.5)])
        yield from move(view, out, view.euler.copy(), grip, tolerance=0.03)
    height, block = TRAVEL, view.nearest()
    if grip == OPEN and np.linalg.norm((block.position - view.tool)[:2]) < 0.06:
        height = max(height, float(block.position[2]) + 0.1)  # until the fingers are off it
    if view.tool[2] < height - 0.05:
        up = np.array([view.tool[0], view.tool[1], height])
        yield from move(view, up, view.euler.copy(), grip, tolerance=0.04)


def lean(position: np.ndarray) -> float:
    """The tilt in radians that keeps a downward grasp at `position` within the arm's reach (its base: -0.34, -0.46)."""
    distance = math.hypot(position[0] + 0.34, position[1] + 0.46)
    return min(0.7, max(0.0, 7.0 * (distance - 0.71)))


def travel(view: View, position: np.ndarray, euler: np.ndarray, gripper: float) -> Skill:
    """Retreats, then goes above `position` at travelling height, without stopping there."""
    yield from retreat(view)
    above = np.array([position[0], min(position[1], CABINET_EDGE), max(position[2], TRAVEL)])
    yield from move(view, above, euler, gripper, tolerance=0.03, angle=0.15)
