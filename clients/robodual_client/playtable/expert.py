"""A scripted policy for the 34 CALVIN tasks, which reads the simulator's state instead of its pictures."""

from __future__ import annotations

from functools import partial
from typing import Any, Callable

import numpy as np

from robodual_client.calvin.annotations import load
from robodual_client.calvin.tasks import BLOCKS
from robodual_client.playtable.skills import furniture, grasping, placing, pushing
from robodual_client.playtable.skills.motion import CLOSED, OPEN, Goal, Skill, hold, retreat, turn
from robodual_client.playtable.view import View

GAIN = 0.35  # of the distance left, each step; the arm follows its target about one step late
JERK = 0.2  # largest change of an action from one step to the next
UNITS = np.array([0.02, 0.02, 0.02, 0.05, 0.05, 0.05])  # metres and radians of an action of 1
AHEAD = np.array([0.06, 0.06, 0.06, 0.3, 0.3, 0.3])  # how far the arm's target may run ahead of the arm
HOLDING = ("place_in_slider", "place_in_drawer", "stack_block")


MakeSkill = Callable[[View], Skill]


def _skills() -> dict[str, MakeSkill]:
    skills: dict[str, MakeSkill] = {
        "move_slider_left": partial(furniture.slide_door, direction=-1),
        "move_slider_right": partial(furniture.slide_door, direction=1),
        "open_drawer": furniture.open_drawer,
        "close_drawer": furniture.close_drawer,
        "turn_on_lightbulb": partial(furniture.flip_switch, direction=1),
        "turn_off_lightbulb": partial(furniture.flip_switch, direction=-1),
        "turn_on_led": furniture.press_button,
        "turn_off_led": furniture.press_button,
        "place_in_slider": placing.place_in_slider,
        "place_in_drawer": placing.place_in_drawer,
        "stack_block": placing.stack,
        "unstack_block": grasping.unstack,
        "push_into_drawer": pushing.push_into_drawer,
    }
    for colour in BLOCKS:
        name = f"block_{colour}"
        for place in ("table", "slider", "drawer"):
            skills[f"lift_{colour}_block_{place}"] = partial(grasping.lift, name=name)
        skills[f"rotate_{colour}_block_left"] = partial(grasping.rotate, name=name, direction=1)
        skills[f"rotate_{colour}_block_right"] = partial(grasping.rotate, name=name, direction=-1)
        skills[f"push_{colour}_block_left"] = partial(pushing.push, name=name, direction=-1)
        skills[f"push_{colour}_block_right"] = partial(pushing.push, name=name, direction=1)
    return skills


SKILLS: dict[str, MakeSkill] = _skills()
"""Every task's skill, by the task's name."""


class Expert:
    """Does one task after another in an environment of CALVIN's kind (playtable, or the published simulator).

    Noise-free and deterministic: actions move in proportion to the distance left, at moderate speed and without jumps.
    """

    def __init__(self, env: Any) -> None:
        self._env = env
        self._task_of = {sentence: task for task, sentence in load().items()}
        self._view = View()
        self._skill: Skill = iter(())
        self._task = ""
        self._started = False
        self._last = np.zeros(6)
        self._pose = np.zeros(6)
        self._ahead = np.zeros(6)

    def reset(self, instruction: str) -> None:
        """Begins a task, given by its name or by its validation instruction.

        Raises ValueError if it is neither.
        """
        task = instruction if instruction in SKILLS else self._task_of.get(instruction, "")
        if not task:
            raise ValueError(
                f"instruction {instruction!r} is neither a task's name nor its validation sentence; "
                f"tasks are {', '.join(SKILLS)}"
            )
        self._task, self._started = task, False

    def step(self, observation: dict[str, Any]) -> np.ndarray:
        """The relative action [7] for an observation with robot_obs [15] and scene_obs [24]."""
        self._view.update(observation)
        if not self._started:
            self._skill, self._started = self._begin(), True
        goal = next(self._skill, None)
        if goal is None:  # done, and nobody has said so: rest above the table, then try again
            self._skill = self._rest()
            goal = next(self._skill)
        return self._servo(goal)

    def _begin(self) -> Skill:
        if self._task not in HOLDING:
            yield from placing.release(self._view)
        yield from SKILLS[self._task](self._view)

    def _rest(self) -> Skill:
        gripper = CLOSED if self._task in HOLDING and self._view.held() else OPEN
        yield from retreat(self._view)
        yield from hold(self._view, gripper, 10)
        yield from SKILLS[self._task](self._view)

    def _servo(self, goal: Goal) -> np.ndarray:
        self._account()
        translation = (goal.position - self._view.tool) * 50 * GAIN
        translation *= min(1.0, goal.speed / max(float(np.linalg.norm(translation)), 1e-9))
        rotation = np.clip(turn(self._view, goal.euler) * 20 * GAIN, -0.8, 0.8)
        motion = np.concatenate([translation, rotation])
        motion = self._last + np.clip(motion - self._last, -JERK, JERK)
        motion = (np.clip(self._ahead + motion * UNITS, -AHEAD, AHEAD) - self._ahead) / UNITS
        self._last = np.clip(motion, -1.0, 1.0)
        return np.array([*self._last, goal.gripper])

    def _account(self) -> None:
        """Finds how far the target pose, to which the environment adds actions, is ahead of the arm, so that pushing
        against something does not carry it off. Playtable tells it; elsewhere it follows from the actions so far."""
        pose = np.concatenate([self._view.tool, self._view.euler])
        moved = _wrapped_pose(pose - self._pose)
        self._pose = pose
        robot = self._env.get_info()["robot_info"]
        if self._view.jumped:
            self._last = np.zeros(6)
        if "target_pos" in robot:
            self._ahead = _wrapped_pose(np.concatenate([robot["target_pos"], robot["target_orn"]]) - pose)
        elif self._view.jumped:
            self._ahead = np.zeros(6)
        else:
            self._ahead += self._last * UNITS - moved


def _wrapped_pose(difference: np.ndarray) -> np.ndarray:
    difference[3:] = (difference[3:] + np.pi) % (2 * np.pi) - np.pi
    return difference
