"""Who takes part in a rollout: an environment, a policy, and whoever watches."""

from __future__ import annotations

from typing import Any, Dict, Protocol

import numpy as np

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
    """Anything that acts: told the instruction once a subtask, then asked for actions (7).

    As DualSystemClient has them, and only then, it may have a method `skip(steps)`, which is told of control steps that
    it was not asked about, and an attribute `last`, the services' Answer to its last step.
    """

    def reset(self, instruction: str, /) -> None: ...

    def step(self, obs: Observation, /) -> np.ndarray: ...


class Watcher(Protocol):
    """Sees every step as it happens: a video, for one. `age` is the conditioning's, in steps."""

    def start(self, obs: Observation, subtask: int, instruction: str) -> None: ...

    def step(self, obs: Observation, step: int, age: int | None) -> None: ...

    def finish(self, success: bool) -> None: ...
