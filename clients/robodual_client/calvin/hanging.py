"""What a worker process's simulator is in the middle of, in memory shared with its parent, which ends one that hangs.

Only time inside the simulator counts: to wait for the services, or for the clock, is no hang and has its own limits.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import weakref
from contextlib import suppress
from typing import Any, Callable, TypeVar

import numpy as np

from robodual_client.calvin.roles import Environment, Info, Observation

T = TypeVar("T")

LOOK = 1.0  # seconds between two looks at a worker, at most
STARTING = 4  # times the limit, until a process has made its first step: files are read, and shaders compiled
_CALLS = ("its start", "", "reset()", "step()", "get_obs()", "get_info()")
_IDLE = _CALLS.index("")
_STATE = struct.Struct("=QIBB")  # calls so far, the sequence's control steps, which of _CALLS, whether a step was made


class Watch:
    """The parent's view of one worker process, which maps the file at `path`. `period`: seconds between two looks, 0
    for a `limit` of 0, under which nobody looks."""

    def __init__(self, limit: float) -> None:
        self.period = min(LOOK, limit / 10)
        self._limit, self._looks = limit, 0
        descriptor, self.path = tempfile.mkstemp(prefix="robodual-worker-")
        weakref.finalize(self, _remove, self.path)  # of a worker that did not live to do it
        with os.fdopen(descriptor, "r+b") as file:
            file.write(bytes(_STATE.size))  # _CALLS[0]
            file.flush()
            self._memory = mmap.mmap(file.fileno(), _STATE.size)
        self._seen = self._memory[:]

    def look(self) -> str | None:
        """To be called every `period` seconds: says what hangs, if something does.

        Looks are counted and not the time, which goes on while the machine sleeps and while both processes are stopped.
        """
        state = self._memory[:]
        self._looks = self._looks + 1 if state == self._seen else 0
        self._seen = state
        _, steps, call, started = _STATE.unpack(state)
        seconds = self._looks * self.period
        if call == _IDLE or seconds < self._limit * (1 if started else STARTING):
            return None
        return (
            f"the simulator hung for {seconds:.0f} s in {_CALLS[call]}, after {steps} control steps, and was killed; "
            "if it was only slow, raise --hang-limit; if a GPU's driver is stuck under EGL, mend it or use --render cpu"
        )


def share(path: str) -> mmap.mmap:
    """The worker's side of a Watch, whose file needs no name any more."""
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), _STATE.size)
    _remove(path)
    return memory


def _remove(path: str) -> None:
    with suppress(OSError):  # it may be gone, and Windows keeps what is mapped
        os.unlink(path)


class Watched:
    """An Environment that is `env`, and notes in `memory` which of its calls is under way."""

    def __init__(self, env: Environment, memory: mmap.mmap) -> None:
        self._env, self._memory = env, memory
        self._calls = self._steps = 0
        self._started = False
        self._note(_IDLE)

    def reset(self, robot_obs: np.ndarray | None = None, scene_obs: np.ndarray | None = None) -> Observation:
        self._steps = 0
        return self._call("reset()", self._env.reset, robot_obs=robot_obs, scene_obs=scene_obs)

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, Info]:
        result = self._call("step()", self._env.step, action)
        self._steps += 1
        self._started = True
        return result

    def get_obs(self) -> Observation:
        return self._call("get_obs()", self._env.get_obs)

    def get_info(self) -> Info:
        return self._call("get_info()", self._env.get_info)

    def close(self) -> None:
        self._env.close()  # the parent waits for a process that ends, but not for long

    def _call(self, name: str, call: Callable[..., T], *args: Any, **named: Any) -> T:
        self._calls += 1
        self._note(_CALLS.index(name))
        try:
            return call(*args, **named)
        finally:
            self._note(_IDLE)

    def _note(self, call: int) -> None:
        _STATE.pack_into(self._memory, 0, self._calls, self._steps, call, self._started)
