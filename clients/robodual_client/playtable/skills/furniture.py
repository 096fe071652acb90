"""Door, drawer, switch and button."""

from __future__ import annotations

import numpy as np

from robodual_client.playtable.skills.motion import CLOSED, HOME, Goal, Skill, move, shift, travel
from robodual_client.playtable.view import BUTTON, HOME_YAW, OUTWARD, SLOPE, View, downward

TIP = 0.015  # metres from the tool centre to the fingertips
TILT = 0.6  # radians: enough for the fingers to reach behind the switch
STEPS = 90  # that a push may take before the skill gives up
LEAD = 0.035  # metres that the goal runs ahead of a handle while it is pushed


def slide_door(view: View, direction: int) -> Skill:
    """Pushes the sliding door's handle along x with closed fingers: direction 1 to the right, -1 to the left."""

    def beside(gap: float) -> np.ndarray:
        return shift(view.slide_handle, -direction * (0.0325 + view.width / 2 + gap), -0.026, -0.045)

    start = beside(0.03)
    yield from travel(
        view, shift(start, 0, -0.1, 0), HOME, CLOSED
    )  # well in front of the handle, with a held block too
    yield from move(view, shift(start, 0, -0.06, 0.02), HOME, CLOSED, tolerance=0.02)
    yield from move(view, start, HOME, CLOSED)
    end = 0.01 if direction > 0 else 0.27
    for _ in range(STEPS):
        if (view.slide - end) * direction < 0:
            break
        yield Goal(beside(-LEAD), HOME, CLOSED, 0.5)
    yield from move(view, shift(view.tool, 0, -0.08, 0.03), HOME, CLOSED, tolerance=0.02)


def open_drawer(view: View) -> Skill:
    """Hooks closed fingers behind the drawer's handle and pulls."""

    def behind() -> np.ndarray:
        return shift(view.drawer_handle, 0, 0.026, 0.008)

    yield from travel(view, behind(), HOME, CLOSED)
    yield from move(view, shift(behind(), 0, 0, 0.1), HOME, CLOSED, tolerance=0.02)
    yield from move(view, behind(), HOME, CLOSED)
    for _ in range(STEPS):
        if view.drawer > 0.2:
            break
        yield Goal(shift(behind(), 0, -LEAD, 0), HOME, CLOSED, 0.5)
    yield from move(view, shift(behind(), 0, 0.01, 0.12), HOME, CLOSED, tolerance=0.02)


def close_drawer(view: View) -> Skill:
    """Pushes the drawer's handle home with closed fingers."""

    def before() -> np.ndarray:
        return shift(view.drawer_handle, 0, -0.02, 0.008)

    yield from travel(view, shift(before(), 0, -0.03, 0), HOME, CLOSED)
    yield from move(view, shift(before(), 0, -0.03, 0.08), HOME, CLOSED, tolerance=0.02)
    yield from move(view, shift(before(), 0, -0.02, 0), HOME, CLOSED)
    for _ in range(STEPS):
        if view.drawer < 0.01:
            break
        yield Goal(shift(before(), 0, LEAD, 0), HOME, CLOSED, 0.5)
    yield from move(view, shift(before(), 0, -0.03, 0.1), HOME, CLOSED, tolerance=0.02)


def flip_switch(view: View, direction: int) -> Skill:
    """Reaches behind the switch's bar with tilted fingers and moves it along the face: 1 up (on), -1 down (off)."""
    euler = downward(HOME_YAW, TILT)
    fingers = np.array([0.0, np.sin(TILT), -np.cos(TILT)])

    def behind(gap: float) -> np.ndarray:
        beyond = view.switch_handle - direction * (0.026 + gap) * SLOPE - 0.012 * OUTWARD
        tool: np.ndarray = beyond - TIP * fingers
        return tool

    yield from travel(view, behind(0.03), euler, CLOSED)
    yield from move(view, behind(0.03) + 0.07 * OUTWARD, euler, CLOSED, tolerance=0.02)
    yield from move(view, behind(0.015), euler, CLOSED)
    end = 0.08 if direction > 0 else 0.008
    for _ in range(STEPS):
        if (view.switch - end) * direction > 0:
            break
        yield Goal(behind(0.0) + direction * LEAD * SLOPE, euler, CLOSED, 0.5)
    yield from move(view, view.tool + 0.06 * OUTWARD - direction * 0.02 * SLOPE, euler, CLOSED, tolerance=0.02)


def press_button(view: View) -> Skill:
    """Presses the button with closed fingertips and lets go."""
    top = shift(BUTTON, 0, 0, TIP)
    yield from travel(view, top, HOME, CLOSED)
    yield from move(view, shift(top, 0, 0, 0.03), HOME, CLOSED, tolerance=0.01)
    for _ in range(40):
        if view.button > 0.014:
            break
        yield Goal(shift(top, 0, 0, -0.03), HOME, CLOSED, 0.35)
    yield from move(view, shift(top, 0, 0, 0.06), HOME, CLOSED, tolerance=0.01)
