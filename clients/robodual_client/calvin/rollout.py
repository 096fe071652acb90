"""CALVIN's evaluation protocol for one sequence, with any environment and any policy.

As published (mees/calvin, calvin_agent/evaluation/evaluate_policy.py): the scene is reset once, then five instructions
follow one another, each with at most 360 control steps, and the first that fails ends the chain.
"""

from __future__ import annotations

import time
from typing import Any, Dict, Mapping, Protocol, runtime_checkable

import numpy as np

from robodual_client.answer import Answer, Conditioning
from robodual_client.calvin.histogram import Histogram
from robodual_client.calvin.records import Record
from robodual_client.calvin.sequences import Sequence
from robodual_client.calvin.tasks import achieved

EPISODE_STEPS = 360

Observation = Dict[str, Any]
Info = Dict[str, Any]


class Environment(Protocol):
    """A simulator or robot in CALVIN's terms: observations and infos as calvin_env gives them."""

    def reset(self, robot_obs: np.ndarray | None = None, scene_obs: np.ndarray | None = None) -> Observation: ...

    def step(self, action: np.ndarray, /) -> tuple[Observation, float, bool, Info]: ...

    def get_obs(self) -> Observation: ...

    def get_info(self) -> Info: ...

    def close(self) -> None: ...


class Policy(Protocol):
    """Anything that acts: told the instruction once a subtask, then asked for an action (7) at each step."""

    def reset(self, instruction: str, /) -> None: ...

    def step(self, obs: Observation, /) -> np.ndarray: ...


@runtime_checkable
class Served(Protocol):
    """A policy that tells what the services answered to its last step, as DualSystemClient does."""

    @property
    def last(self) -> Answer | None: ...


class Watcher(Protocol):
    """Sees every step as it happens: a video, for one."""

    def start(self, obs: Observation, subtask: int, instruction: str) -> None: ...

    def step(self, obs: Observation, step: int, age: int | None) -> None: ...

    def finish(self, success: bool) -> None: ...


def run_sequence(
    env: Environment,
    policy: Policy,
    sequence: Sequence,
    instructions: Mapping[str, str],
    *,
    ep_len: int = EPISODE_STEPS,
    watcher: Watcher | None = None,
) -> Record:
    """Runs the chain of `sequence` until its first failure. Raises what the environment or the policy raises, and
    ValueError for an action that is not seven finite numbers."""
    began = time.perf_counter()
    robot_obs, scene_obs = sequence.observations()
    env.reset(robot_obs=robot_obs, scene_obs=scene_obs)
    record = Record(sequence.number, sequence.tasks, solved=0, steps=[], seconds=0.0)
    record.milliseconds = {"policy": Histogram(), "env": Histogram()}
    for index, task in enumerate(sequence.tasks):
        success = _run_subtask(env, policy, record, index, task, instructions[task], ep_len, watcher)
        if not success:
            break
        record.solved += 1
    record.seconds = time.perf_counter() - began
    return record


def _run_subtask(
    env: Environment,
    policy: Policy,
    record: Record,
    index: int,
    task: str,
    instruction: str,
    ep_len: int,
    watcher: Watcher | None,
) -> bool:
    obs = env.get_obs()
    policy.reset(instruction)
    start_info = env.get_info()
    if watcher is not None:
        watcher.start(obs, index, instruction)
    success = False
    thought: Conditioning | None = None
    record.steps.append(0)
    while not success and record.steps[-1] < ep_len:
        asked = time.perf_counter()
        action = np.asarray(policy.step(obs))
        answered = time.perf_counter()
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"the policy's action must be 7 finite numbers, got {action!r}")
        obs, _, _, info = env.step(action)
        stepped = time.perf_counter()
        record.milliseconds["policy"].add((answered - asked) * 1e3)
        record.milliseconds["env"].add((stepped - answered) * 1e3)
        answer = policy.last if isinstance(policy, Served) else None
        if answer is not None:
            _note(record, answer, thought)
            thought = answer.conditioning
        if watcher is not None:
            watcher.step(obs, record.steps[-1], answer.age if answer is not None else None)
        record.steps[-1] += 1
        success = task in achieved(start_info, info, (task,))
    if watcher is not None:
        watcher.finish(success)
    return success


def _note(record: Record, answer: Answer, known: Conditioning | None) -> None:
    """Adds the services' answer to the record; the generalist's only where it is not the one already `known`."""
    record.milliseconds.setdefault("act", Histogram()).add(answer.round_trip)
    if answer.conditioning is not None and answer.conditioning != known:
        record.milliseconds.setdefault("condition", Histogram()).add(answer.conditioning.round_trip)
    record.ages[answer.age] = record.ages.get(answer.age, 0) + 1
    record.degraded += answer.degraded
