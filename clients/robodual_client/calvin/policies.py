"""The policies that an evaluation knows by name, each built once a sequence: (env, seed, **options) -> Policy."""

from __future__ import annotations

import os
from typing import Any, Mapping

import numpy as np

from robodual_client import DualSystemClient, Tls
from robodual_client.calvin.roles import Environment, Observation, Policy


class Zero:
    """Holds still with an open gripper: a run's floor, and the cost of a run without a policy."""

    def reset(self, instruction: str) -> None:
        pass

    def step(self, obs: Observation) -> np.ndarray:
        return np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])


class Random:
    """Uniform actions, the gripper half the time open."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def reset(self, instruction: str) -> None:
        pass

    def step(self, obs: Observation) -> np.ndarray:
        action = self._random.uniform(-1.0, 1.0, 7)
        action[6] = 1.0 if action[6] > 0 else -1.0
        return action


def zero(env: Environment, seed: int) -> Policy:
    return Zero()


def random(env: Environment, seed: int) -> Policy:
    return Random(seed)


def expert(env: Any, seed: int) -> Policy:
    """The scripted controller that reads the simulator's state."""
    from robodual_client.playtable.expert import Expert

    return Expert(env)


def services(env: Environment, seed: int, tls: Mapping[str, str] | bool = False, **options: Any) -> Policy:
    """The generalist and the specialist over gRPC, as one policy.

    `options` are DualSystemClient's, `tls` the fields of a `Tls` or True. The token is read from ROBODUAL_TOKEN, so
    that it never stands in a command line or a file.
    """
    return client(seed=seed, tls=tls, **options)


def client(**options: Any) -> DualSystemClient:
    """The client that `services` drives. Raises ValueError for a malformed option."""
    return DualSystemClient(**arguments(**options))


def arguments(tls: Mapping[str, str] | bool = False, **options: Any) -> dict[str, Any]:
    """DualSystemClient's arguments for the options of `services`."""
    secured = tls if isinstance(tls, bool) else Tls(**tls)
    return {"tls": secured, "token": os.environ.get("ROBODUAL_TOKEN") or None, **options}
