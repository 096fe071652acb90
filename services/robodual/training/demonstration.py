"""One demonstration: a scripted expert does a chain of tasks on the play table, and every step is written down."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from robodual.training.annotations import Span
from robodual.training.recording import step_name
from robodual.training.replacement import replacing
from robodual_client.calvin import sequences, tasks
from robodual_client.playtable import PlayTable
from robodual_client.playtable.expert import Expert

TASK_STEPS = 240  # an expert that needs more has failed
TAIL = 8  # steps that are kept after a task is done, so that the policy learns what being done looks like
NUMBERS = 2000  # step numbers set aside for each demonstration: 5 tasks of at most 248 steps
SPREAD = (0.03, 0.015)  # metres by which blocks lie off the evaluation's places, along x and y
TURN = np.pi / 8
JOINT_NOISE = 0.02  # radians, of the arm's first pose


@dataclass(frozen=True)
class Plan:
    """What to collect. A demonstration follows from (seed, number) and these values alone.

    noise: standard deviation of what is added to the expert's motion when it is executed, in units of the action's
    range; the action that is written down is the expert's own, so that the policy learns to come back.
    """

    output: Path  # the split folder
    seed: int = 0
    noise: float = 0.0
    chain: int = sequences.CHAIN  # tasks one after the other, at most
    sentences: Mapping[str, Sequence[str]] = field(default_factory=dict)  # task: instructions


@dataclass(frozen=True)
class Record:
    """A demonstration that is on disk: its seed, noise, tasks asked for, first and last step, annotated spans.

    Where the expert failed at its first task there are no spans and no steps (`last` is `first` - 1).
    """

    seed: int
    noise: float
    tasks: list[str]
    first: int
    last: int
    spans: list[Span]

    @classmethod
    def read(cls, path: Path) -> Record:
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**(content | {"spans": [Span(**span) for span in content["spans"]]}))


def record_path(output: Path, number: int) -> Path:
    return output / "demonstrations" / f"{number:05d}.json"


def demonstrate(plan: Plan, number: int) -> Record:
    """Collects demonstration `number` and writes its steps, then its record; a demonstration without one is redone.

    A task that the expert fails ends the chain; its steps are not kept.
    """
    random = np.random.default_rng((plan.seed, number))
    states = sequences.initial_states()
    state = states[random.integers(len(states))]
    # Evaluation chains are drawn with seeds below the number of states.
    (chain,) = sequences.draw_chains(state, 1, seed=int(random.integers(len(states), 2**32)))
    robot, scene = sequences.observations(state)
    first = step = number * NUMBERS
    spans: list[Span] = []
    with PlayTable() as table:
        observation = table.reset(*_scattered(robot, scene, random))
        expert = Expert(table)
        for task in chain[: plan.chain]:
            steps = _attempt(table, expert, observation, task, plan.noise, random)
            if steps is None:
                break
            for offset, arrays in enumerate(steps):
                write_step(plan.output, step + offset, arrays)
            instruction = str(random.choice(list(plan.sentences[task])))
            spans.append(Span(step, step + len(steps) - 1, task, instruction))
            step += len(steps)
            observation = table.get_obs()
    record = Record(plan.seed, plan.noise, list(chain[: plan.chain]), first, step - 1, spans)
    _write_whole(record_path(plan.output, number), json.dumps(asdict(record), indent=1).encode())
    return record


def _scattered(
    robot: npt.NDArray[np.float64], scene: npt.NDArray[np.float64], random: np.random.Generator
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The evaluation's scene with every block a little off its place, and the arm a little off its pose."""
    robot, scene = robot.copy(), scene.copy()
    robot[7:14] += random.normal(0, JOINT_NOISE, 7)
    for block in scene[6:].reshape(3, 6):
        block[:2] += random.uniform(-1, 1, 2) * SPREAD
        block[5] += random.uniform(-TURN, TURN)
    return robot, scene


def _attempt(
    table: PlayTable,
    expert: Expert,
    observation: dict[str, Any],
    task: str,
    noise: float,
    random: np.random.Generator,
) -> list[dict[str, npt.NDArray[Any]]] | None:
    """The steps of a task up to `TAIL` after it was achieved; None if the expert did not achieve it."""
    expert.reset(task)
    before = table.get_info()
    steps: list[dict[str, npt.NDArray[Any]]] = []
    left = None
    while left != 0:
        action = np.clip(expert.step(observation), -1.0, 1.0)
        steps.append(_arrays(observation, action))
        executed = action.copy()
        executed[:6] = np.clip(executed[:6] + random.normal(0, noise, 6), -1.0, 1.0)
        observation, _, _, info = table.step(executed)
        if left is not None:
            left -= 1
        elif tasks.achieved(before, info, [task]):
            left = TAIL
        elif len(steps) == TASK_STEPS:
            return None
    return steps


def _arrays(observation: dict[str, Any], action: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[Any]]:
    """A step in CALVIN's format; the play table has no tactile sensors, so those are zeros."""
    robot = observation["robot_obs"]
    absolute = np.concatenate([robot[:3] + action[:3] / 50, robot[3:6] + action[3:6] / 20, action[6:]])
    return {
        **observation["rgb_obs"],
        **observation["depth_obs"],
        "rgb_tactile": np.zeros((160, 120, 6), np.uint8),
        "depth_tactile": np.zeros((160, 120, 2), np.float32),
        "robot_obs": robot,
        "scene_obs": observation["scene_obs"],
        "actions": absolute,
        "rel_actions": action,
    }


def write_step(split: Path, step: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Writes one control step; a reader never sees half of it."""
    with replacing(split / step_name(step)) as partial, partial.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def _write_whole(path: Path, content: bytes) -> None:
    with replacing(path) as partial, partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
