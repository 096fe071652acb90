"""CALVIN's evaluation protocol for one sequence, with any environment and any policy.

As published (mees/calvin, calvin_agent/evaluation/evaluate_policy.py): the scene is reset once, then five instructions
follow one another, each with at most 360 control steps, and the first that fails ends the chain.
"""

from __future__ import annotations

import time
from typing import Mapping

from robodual_client.answer import Conditioning
from robodual_client.calvin.histogram import Histogram
from robodual_client.calvin.pace import Pace, Tick
from robodual_client.calvin.records import Record
from robodual_client.calvin.roles import Environment, Observation, Policy, Watcher
from robodual_client.calvin.sequences import Sequence
from robodual_client.calvin.tasks import achieved

EPISODE_STEPS = 360


def run_sequence(
    env: Environment,
    policy: Policy,
    sequence: Sequence,
    instructions: Mapping[str, str],
    *,
    ep_len: int = EPISODE_STEPS,
    watcher: Watcher | None = None,
    pace: Pace | None = None,
) -> Record:
    """Runs the chain of `sequence` until its first failure, in lock-step or at another pace.

    Raises what the environment or the policy raises, and ValueError for an action that is not seven finite numbers.
    """
    began = time.perf_counter()
    pace = pace or Pace()
    robot_obs, scene_obs = sequence.observations()
    env.reset(robot_obs=robot_obs, scene_obs=scene_obs)
    record = Record(sequence.number, sequence.tasks, solved=0, steps=[], seconds=0.0)
    record.milliseconds = {"policy": Histogram(), "env": Histogram()}
    for index, task in enumerate(sequence.tasks):
        obs = env.get_obs()
        policy.reset(instructions[task])
        if watcher is not None:
            watcher.start(obs, index, instructions[task])
        pace.begin(policy)
        try:
            success = _run_subtask(env, pace, obs, record, task, ep_len, watcher)
        finally:
            pace.end()
        if watcher is not None:
            watcher.finish(success)
        if not success:
            break
        record.solved += 1
    record.overruns, record.late = pace.overruns, pace.late
    record.seconds = time.perf_counter() - began
    return record


def _run_subtask(
    env: Environment,
    pace: Pace,
    obs: Observation,
    record: Record,
    task: str,
    ep_len: int,
    watcher: Watcher | None,
) -> bool:
    start_info = env.get_info()
    success = False
    thought: Conditioning | None = None
    record.steps.append(0)
    while not success and record.steps[-1] < ep_len:
        tick = pace.tick(obs)
        began = time.perf_counter()
        obs, _, _, info = env.step(tick.action)
        record.milliseconds["env"].add((time.perf_counter() - began) * 1e3)
        pace.stepped()
        thought = _note(record, tick, thought)
        if watcher is not None:
            watcher.step(obs, tick.step, tick.conditioning_age)
        record.steps[-1] += 1
        success = task in achieved(start_info, info, (task,))
    return success


def _note(record: Record, tick: Tick, known: Conditioning | None) -> Conditioning | None:
    """Adds a step to the record. A generalist's answer counts once: where it is not the one already `known`. Returns
    the latest."""
    for response in tick.arrived:
        record.milliseconds["policy"].add(response.milliseconds)
        answer = response.answer
        if answer is not None:
            record.milliseconds.setdefault("act", Histogram()).add(answer.round_trip)
            if answer.conditioning is not None and answer.conditioning != known:
                record.milliseconds.setdefault("condition", Histogram()).add(answer.conditioning.round_trip)
            known = answer.conditioning
    record.held += not tick.arrived
    if tick.action_age is not None:
        record.action_ages[tick.action_age] = record.action_ages.get(tick.action_age, 0) + 1
    if tick.conditioning_age is not None:
        record.ages[tick.conditioning_age] = record.ages.get(tick.conditioning_age, 0) + 1
    if tick.source is not None and tick.source.answer is not None:
        record.degraded += tick.source.answer.degraded
    return known
