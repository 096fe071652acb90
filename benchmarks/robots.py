"""Simulated robots: real clients that ask for an action at a fixed rate, several in one process."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robodual_client import AsyncDualSystemClient

FRAMES = 4  # different observations, in turn


@dataclass(frozen=True)
class Drill:
    """What the robots of one process do. `phases`, one for each robot: which part of a period it begins after."""

    addresses: Mapping[str, str]
    phases: Sequence[float]
    schedule: str
    period: float  # seconds
    warmup: int  # control steps that are not counted
    steps: int  # that are


@dataclass
class Log:
    """What happened to robots, in the steps that count.

    A step's latency (milliseconds) begins when its frame is due. A missed deadline is a step at whose beginning no
    action of the frame before was there. Ages are in control steps, of every step's action in force: the action's from
    its frame on, the conditioning's at its answer.
    """

    latencies: list[float] = field(default_factory=list)
    deadlines: int = 0
    missed: int = 0
    action_ages: list[int] = field(default_factory=list)
    conditioning_ages: list[int] = field(default_factory=list)
    conditionings: int = 0

    def add(self, other: Log) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def endpoints(addresses: Mapping[str, str]) -> tuple[str, str]:
    """Of a pair's addresses by name, the generalist's and the specialist's: a client's first arguments."""
    return addresses["generalist"], addresses["specialist"]


def observation(number: int) -> dict[str, Any]:
    """CALVIN's observation, of noise."""
    draw = np.random.default_rng(number)
    return {
        "rgb_obs": {
            "rgb_static": draw.integers(0, 256, (200, 200, 3), np.uint8),
            "rgb_gripper": draw.integers(0, 256, (84, 84, 3), np.uint8),
        },
        "depth_obs": {
            "depth_static": draw.uniform(3.5, 6.2, (200, 200)).astype(np.float32),
            "depth_gripper": draw.uniform(0, 2, (84, 84)).astype(np.float32),
        },
        "robot_obs": np.concatenate([draw.uniform(-1, 1, 14), [1.0]]),
    }


# The processes of a pool meet here before they begin.
_barrier: threading.Barrier | None = None


def join(barrier: threading.Barrier) -> None:
    """The pool's initializer."""
    global _barrier
    _barrier = barrier


def work(drill: Drill) -> tuple[Log, float, int]:
    """Runs a drill in a pool's process: the log, its CPU seconds, and its process id."""
    log, seconds = asyncio.run(_run(drill))
    return log, seconds, os.getpid()


async def _run(drill: Drill) -> tuple[Log, float]:
    assert _barrier is not None
    services = endpoints(drill.addresses)
    clients = [AsyncDualSystemClient(*services, schedule=drill.schedule, seed=0) for _ in drill.phases]
    observations = [observation(number) for number in range(FRAMES)]
    total = Log()
    try:
        for client in clients:
            await client.reset("push the sliding door to the left side")
            await client.step(observations[0])
        await asyncio.to_thread(_barrier.wait, 120)
        cpu, start = time.process_time(), time.perf_counter()
        robots = [
            _drive(client, observations, start + phase * drill.period, drill)
            for client, phase in zip(clients, drill.phases)
        ]
        for log in await asyncio.gather(*robots):
            total.add(log)
        return total, time.process_time() - cpu
    except BaseException:
        _barrier.abort()
        raise
    finally:
        await asyncio.gather(*(client.close() for client in clients), return_exceptions=True)


async def _drive(
    client: AsyncDualSystemClient, observations: Sequence[dict[str, Any]], start: float, drill: Drill
) -> Log:
    """One robot. An answer that is late takes the place of the steps that went by, as on a robot that cannot wait."""
    log, step, in_force, conditioning = Log(), 0, 0, -1
    last = drill.warmup + drill.steps
    while step < last:
        due = start + step * drill.period
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await client.step(observations[step % FRAMES])
        answer = client.last
        assert answer is not None
        arrived = time.perf_counter()
        following = max(step + 1, math.ceil((arrived - start) / drill.period))
        if step >= drill.warmup:
            log.latencies.append((arrived - due) * 1e3)
            log.deadlines += following - step
            log.missed += following - step - 1
            log.action_ages += [*(passed - in_force for passed in range(step + 1, following)), following - step]
            log.conditioning_ages.append(answer.age)
            log.conditionings += answer.conditioning_step != conditioning
        in_force, conditioning = step, answer.conditioning_step
        client.skip(following - step - 1)
        step = following
    return log
