"""The scripted expert does every task, and the oracle fires for what happened and for nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from robodual_client.calvin.annotations import load
from robodual_client.calvin.sequences import published
from robodual_client.calvin.tasks import TASKS, achieved
from robodual_client.playtable import PlayTable
from robodual_client.playtable.expert import Expert

EPISODE = 360


@pytest.fixture(scope="module")
def env() -> Iterator[PlayTable]:
    with PlayTable(render=False) as table:
        yield table


def attempt(env: PlayTable, expert: Expert, task: str) -> list[np.ndarray] | None:
    """The actions that it took to do the task, or None if it was not done in an episode."""
    start, observation = env.get_info(), env.get_obs()
    expert.reset(load()[task])
    actions = []
    for _ in range(EPISODE):
        actions.append(expert.step(observation))
        observation, _, _, info = env.step(actions[-1])
        if achieved(start, info, [task]):
            return actions
    return None


def earliest(task: str) -> tuple[Any, int]:
    """The published sequence that asks for the task soonest, and when it does."""
    return min(((s, s.tasks.index(task)) for s in published() if task in s.tasks), key=lambda pair: pair[1])


@pytest.mark.parametrize("task", list(TASKS))
def test_the_expert_does_the_task(env: PlayTable, task: str) -> None:
    sequence, place = earliest(task)
    env.reset(*sequence.observations())
    expert = Expert(env)
    for earlier in sequence.tasks[:place]:
        assert attempt(env, expert, earlier) is not None, f"{earlier}, on the way to {task}"
    actions = attempt(env, expert, task)
    assert actions is not None
    motion = np.array(actions)
    assert np.abs(motion[:, :6]).max() <= 1.0
    assert set(motion[:, 6]) <= {-1.0, 1.0}
    # Smooth: no jump of more than a third of the range between control steps.
    assert np.abs(np.diff(motion[:, :6], axis=0)).max() < 0.67


def test_chains_of_five_tasks(env: PlayTable) -> None:
    expert = Expert(env)
    lengths = []
    for sequence in published()[100:106]:
        env.reset(*sequence.observations())
        done = [attempt(env, expert, task) is not None for task in sequence.tasks]
        lengths.append([*done, False].index(False))
    assert np.mean(lengths) >= 3.5


def test_an_instruction_that_is_no_task_is_refused(env: PlayTable) -> None:
    with pytest.raises(ValueError, match="neither a task's name nor its validation sentence"):
        Expert(env).reset("make me a sandwich")


def test_nothing_fires_while_nothing_happens(env: PlayTable) -> None:
    for sequence in published()[:200:20]:
        env.reset(*sequence.observations())
        start = env.get_info()
        for _ in range(40):
            assert achieved(start, env.step([0, 0, 0, 0, 0, 0, 1])[3]) == set()


def yaw_change(start: np.ndarray, end: np.ndarray) -> float:
    return float(np.degrees((end[5] - start[5] + np.pi) % (2 * np.pi) - np.pi))


def confirmed(task: str, start: np.ndarray, end: np.ndarray, seen: dict[str, Any]) -> bool:
    """Whether scene_obs [24] at the start and now bear the task out, without contacts or the oracle's code."""
    blocks = {colour: slice(6 + 6 * k, 12 + 6 * k) for k, colour in enumerate(("red", "blue", "pink"))}
    words = task.split("_")
    if words[0] in ("rotate", "push") and words[1] in blocks:
        before, after = start[blocks[words[1]]], end[blocks[words[1]]]
        side = 1 if words[-1] == "left" else -1
        if words[0] == "rotate":
            return side * yaw_change(before, after) > 55 and bool(np.linalg.norm(after[:3] - before[:3]) < 0.1)
        return bool(-side * (after[0] - before[0]) > 0.1)
    if task.startswith("move_slider"):
        return bool((end[0] - start[0]) * (1 if words[-1] == "left" else -1) > 0.15)
    if task in ("open_drawer", "close_drawer"):
        return bool((end[1] - start[1]) * (1 if task == "open_drawer" else -1) > 0.12)
    if words[0] == "lift":
        before, after = start[blocks[words[1]]], end[blocks[words[1]]]
        near = np.linalg.norm(after[:3] - seen["tool"]) < 0.12
        return bool(near and after[2] - before[2] > (0.03 if words[-1] == "slider" else 0.05))
    if "lightbulb" in task:
        return bool(start[4] == (words[1] == "off") and end[4] == (words[1] == "on") and seen["switch_crossed"])
    if "led" in task:
        return bool(start[5] == (words[1] == "off") and end[5] == (words[1] == "on") and seen["presses"] % 2 == 1)
    if task == "push_into_drawer":
        return any(start[b][2] > 0.44 and end[b][2] < 0.44 and end[b][1] < -0.12 for b in blocks.values())
    if task == "stack_block":
        pairs = [(end[a], end[b]) for a in blocks.values() for b in blocks.values() if a != b]
        return any(top[2] - low[2] > 0.03 and np.linalg.norm(top[:2] - low[:2]) < 0.07 for top, low in pairs)
    return False  # nothing is held or stacked at the start, so nothing can be placed or unstacked


def test_random_actions_fire_only_what_they_did(env: PlayTable) -> None:
    generator = np.random.default_rng(3)
    steps, fired = 0, 0
    for sequence in published()[::40]:
        observation = env.reset(*sequence.observations())
        start, before = env.get_info(), observation["scene_obs"]
        seen: dict[str, Any] = {"switch_crossed": False, "presses": 0, "tool": None}
        pressed = False
        # Actions are held for some steps and lean downwards, so that the arm gets somewhere and hits something.
        for _ in range(10):
            action = generator.uniform(-1, 1, 7) * [1, 1, 1, 0.3, 0.3, 0.3, 1] - [0, -0.2, 0.3, 0, 0, 0, 0]
            for _ in range(8):
                observation, _, _, info = env.step(action)
                scene = observation["scene_obs"]
                seen["tool"] = observation["robot_obs"][:3]
                seen["switch_crossed"] |= (scene[3] > 0.044) != (before[3] > 0.044)
                seen["presses"] += bool(scene[2] > 0.01 and not pressed)
                pressed = bool(scene[2] > 0.01)
                steps += 1
                for task in achieved(start, info):
                    fired += 1
                    assert confirmed(task, before, scene, seen), f"{task} fired in {sequence.number} at {steps}"
    assert steps == 2000
    assert fired > 20  # or the check was idle
