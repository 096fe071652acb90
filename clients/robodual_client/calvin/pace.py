"""How a policy's answers meet the simulator's clock: in lock-step, late by whole steps, or in real time."""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Mapping

import numpy as np

from robodual_client.answer import Answer
from robodual_client.calvin.roles import Observation, Policy

HOLD = ("repeat", "zero")
"""What the arm does while an answer is late: the last action again, or no motion with the gripper's command kept."""

WAKING = 0.002  # seconds that a thread may take to go on after waiting


@dataclass(frozen=True)
class Response:
    """The policy's answer to the observation of `step`."""

    step: int
    action: np.ndarray  # [7]
    milliseconds: float
    answer: Answer | None  # what the services said, where the policy is served by them


@dataclass(frozen=True)
class Tick:
    """What the arm does in control step `step`."""

    step: int
    action: np.ndarray  # [7]
    source: Response | None  # where the action comes from; None: the arm is held still
    arrived: tuple[Response, ...]  # the policy's answers since the tick before, oldest first; none: a deadline missed

    @property
    def action_age(self) -> int | None:
        """Steps between the observation that the action was made of and its execution."""
        return None if self.source is None else self.step - self.source.step

    @property
    def conditioning_age(self) -> int | None:
        """Steps between the generalist's frame and the action's execution."""
        if self.source is None or self.source.answer is None:
            return None
        return self.source.answer.age + self.step - self.source.step


class Asker:
    """Asks one policy about one subtask's observations. For one thread at a time."""

    def __init__(self, policy: Policy, delay: float) -> None:
        self._policy, self._delay = policy, delay
        self._next = 0  # the step after the one that was asked about last

    def ask(self, obs: Observation, step: int) -> Response:
        """The answer to the observation of `step`, `delay` seconds after the policy gave it.

        Raises what the policy raises, and ValueError for an action that is not seven finite numbers.
        """
        began = time.perf_counter()
        skip = getattr(self._policy, "skip", None)
        if step > self._next and callable(skip):
            skip(step - self._next)
        self._next = step + 1
        action = np.asarray(self._policy.step(obs))
        time.sleep(self._delay)
        milliseconds = (time.perf_counter() - began) * 1e3
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"the policy's action must be 7 finite numbers, got {action!r}")
        last = getattr(self._policy, "last", None)
        return Response(step, action, milliseconds, last if isinstance(last, Answer) else None)


class Pace:
    """The simulated clock: an action is executed `delay_steps` after the step whose observation it was made of, and
    then the policy is asked again. 0 is lock-step.

    `begin` a subtask, `tick` before each step of the environment and `stepped` after it, and `end` the subtask.
    `answer_delay` is added to each answer, in seconds.
    """

    overruns = 0  # steps that the simulator itself was too slow for
    late = 0.0  # seconds that these took too long

    def __init__(self, hold: str = "repeat", delay_steps: int = 0, answer_delay: float = 0.0) -> None:
        self._hold, self._delay_steps, self._answer_delay = hold, delay_steps, answer_delay

    def begin(self, policy: Policy) -> None:
        """A subtask starts; `policy` has its instruction."""
        self._asker = Asker(policy, self._answer_delay)
        self._step = -1
        self._latest: Response | None = None
        self._waiting: Response | None = None

    def tick(self, obs: Observation) -> Tick:
        """What the arm does now. Raises what `Asker.ask` does."""
        self._step += 1
        arrived = self._arrived(obs)
        if arrived:
            self._latest = arrived[-1]
        source = self._latest if arrived or self._hold == "repeat" else None
        action = self._still(obs) if source is None else source.action
        return Tick(self._step, action, source, tuple(arrived))

    def stepped(self) -> None:
        """The environment has made its step."""

    def end(self) -> None:
        """The subtask is over."""

    def _arrived(self, obs: Observation) -> list[Response]:
        arrived = []
        if self._waiting is not None and self._step == self._waiting.step + self._delay_steps:
            arrived.append(self._waiting)
            self._waiting = None
        if self._waiting is None:
            response = self._asker.ask(obs, self._step)
            if self._delay_steps == 0:
                arrived.append(response)
            else:
                self._waiting = response
        return arrived

    def _still(self, obs: Observation) -> np.ndarray:
        """No motion, and the gripper's last command: the policy's, or before its first the one in the observation."""
        command = obs["robot_obs"][14] if self._latest is None else self._latest.action[6]
        return np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0 if command > 0 else -1.0])


class RealTime(Pace):
    """The wall clock: `rate` control steps a second, whether the policy has answered or not.

    The policy runs on a thread of its own. Whenever it is free it gets the newest observation, which becomes known at
    its step's time and not before. A step waits for the answer as long as the simulator, at its recent speed, still
    makes the step before the next is due. A simulator that is too slow delays the clock: no step is caught up on.
    """

    def __init__(self, rate: float, hold: str = "repeat", answer_delay: float = 0.0) -> None:
        super().__init__(hold, answer_delay=answer_delay)
        self._period = 1 / rate
        self._step_seconds = deque([self._period / 2], maxlen=15)

    def begin(self, policy: Policy) -> None:
        super().begin(policy)
        self._questions: queue.SimpleQueue[tuple[Observation, int] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Response | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._answer, name="policy", daemon=True)
        self._thread.start()
        self._busy = False
        self._asked = -1
        self._due = time.perf_counter()

    def stepped(self) -> None:
        now = time.perf_counter()
        self._step_seconds.append(now - self._began)
        if now > self._due:
            self.overruns += 1
            self.late += now - self._due
            self._due = now

    def end(self) -> None:
        """Waits for the answer that is still to come: the policy is for one thread at a time."""
        self._questions.put(None)
        self._thread.join()

    def _answer(self) -> None:
        while True:
            question = self._questions.get()
            if question is None:
                return
            try:
                self._answers.put(self._asker.ask(*question))
            except Exception as error:  # raised by the tick that waits for the answer
                self._answers.put(error)

    def _arrived(self, obs: Observation) -> list[Response]:
        time.sleep(max(0.0, self._due - time.perf_counter()))
        self._due += self._period
        last_moment = self._due - WAKING - 1.25 * statistics.median(self._step_seconds)
        arrived = []
        while self._busy or self._asked < self._step:
            if not self._busy:
                self._questions.put((obs, self._step))
                self._busy, self._asked = True, self._step
            try:
                answer = self._answers.get(timeout=max(0.0, last_moment - time.perf_counter()))
            except queue.Empty:
                break
            self._busy = False
            if isinstance(answer, Exception):
                raise answer
            arrived.append(answer)
        self._began = time.perf_counter()
        return arrived


def choose(settings: Mapping[str, Any] | None, answer_delay: float = 0.0) -> Pace:
    """The pace that a run's settings (those of `Options.pace`) name; lock-step for None."""
    if settings is None:
        return Pace(answer_delay=answer_delay)
    if "realtime" in settings:
        return RealTime(settings["realtime"], settings["hold"], answer_delay)
    return Pace(settings["hold"], settings["delay_steps"], answer_delay)


def describe(settings: Mapping[str, Any] | None) -> str:
    """A run's pace, for people."""
    if settings is None:
        return "lock-step"
    held = {"repeat": "late actions repeated", "zero": "held still while late"}[settings["hold"]]
    if "realtime" in settings:
        return f"real time at {settings['realtime']:g} Hz, {held}"
    return f"{settings['delay_steps']} steps late, {held}"
