"""Robots that step through an episode beside each other, remember every answer, and know what they should have been."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from deployment import Deployment, until
from fake_services import observation
from numpy.typing import NDArray

from robodual_client import DualSystemClient, Timeouts
from robodual_client.answer import Answer
from robodual_client.errors import DeadlineExceeded, NoConditioning, RoboDualError, ServiceUnavailable

STEPS = 24  # on the published schedule the generalist is asked at 0, 7, 15 and 23
PATIENCE = 150.0  # seconds that a robot asks for a step again
TIMEOUTS = Timeouts(act=20, condition=60, control=20, budget=150, connect=60)
PASSING = (DeadlineExceeded, NoConditioning, ServiceUnavailable)  # errors that say: ask for the step again


@dataclass
class Gate:
    """A step before which a robot waits."""

    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)


class Robot:
    """One client's episode. Two robots of different `number` differ in seed, instruction and everything they see.

    A step that fails with one of the errors that say so is asked for again, like a person's loop would.
    """

    def __init__(
        self,
        number: int,
        generalist: str,
        specialists: str | Sequence[str],
        *,
        session: str | None = None,
        episode: int = 1,
        schedule: str = "published",
        timeouts: Timeouts = TIMEOUTS,
        steps: int = STEPS,
    ) -> None:
        self.number, self.episode, self.schedule, self.steps = number, episode, schedule, steps
        self.client = DualSystemClient(
            generalist, specialists, session=session, schedule=schedule, seed=number, timeouts=timeouts
        )
        self.actions: list[NDArray[np.float64]] = []
        self.answers: list[Answer] = []
        self.times: list[float] = []  # when each answer came
        self.longest = 0.0  # seconds of the longest step, errors on the way included
        self.errors: list[RoboDualError] = []
        self.pace = 0.0  # seconds between two steps
        self._gates: dict[int, Gate] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def reset(self) -> None:
        self.client.reset(f"push block {self.number}", episode=self.episode)

    def step(self) -> None:
        """The next step, asked for until it is answered."""
        began = time.monotonic()
        step = len(self.answers)
        while True:
            try:
                action = self.client.step(_seen(self.number, step))
                break
            except PASSING as error:
                self.errors.append(error)
                if time.monotonic() - began > PATIENCE:
                    raise
                time.sleep(0.05)
        assert self.client.last is not None
        self.actions.append(action)
        self.answers.append(self.client.last)
        self.times.append(time.monotonic())
        self.longest = max(self.longest, self.times[-1] - began)

    def start(self, *, hold: Iterable[int] = ()) -> None:
        """Runs the episode in a thread, which waits before each step of `hold` until it is told to go on."""
        self._gates = {step: Gate() for step in hold}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reach(self, step: int) -> None:
        """Returns once the robot waits before `step`."""
        gate = self._gates[step]
        until(lambda: gate.reached.is_set() or self._failure is not None, PATIENCE, lambda: f"step {step} never came")
        assert self._failure is None, self._failure

    def go(self, step: int) -> None:
        self._gates[step].opened.set()

    def join(self) -> None:
        """Returns once the episode is over; raises what ended it early."""
        assert self._thread is not None
        for gate in self._gates.values():
            gate.opened.set()
        self._thread.join(2 * PATIENCE)
        assert not self._thread.is_alive(), "the robot hangs"
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            self.reset()
            while len(self.answers) < self.steps:
                gate = self._gates.get(len(self.answers))
                if gate is not None:
                    gate.reached.set()
                    gate.opened.wait(PATIENCE)
                self.step()
                time.sleep(self.pace)
        except BaseException as failure:
            self._failure = failure
        finally:
            self.client.close()


class Undisturbed:
    """What robots get where nothing goes wrong, over the wire and before anything did."""

    def __init__(self, deployment: Deployment) -> None:
        self._place = deployment.generalist.address, deployment.b.address
        self._known: dict[tuple[int, int, str], Robot] = {}
        self._seen: set[bytes] = set()

    def of(self, number: int, episode: int = 1, schedule: str = "published") -> Robot:
        key = number, episode, schedule
        if key not in self._known:
            twin = Robot(number, *self._place, episode=episode, schedule=schedule)
            twin.start()
            twin.join()
            assert not twin.errors
            actions = {action.tobytes() for action in twin.actions}
            # Were two of them alike, a lost, repeated or foreign action could pass for the right one.
            assert len(actions) == STEPS
            assert not actions & self._seen
            self._seen |= actions
            self._known[key] = twin
        return self._known[key]

    def check(self, *robots: Robot) -> None:
        """Each step was answered once, in order, on the conditioning and with the very action that it should have."""
        for robot in robots:
            twin = self.of(robot.number, robot.episode, robot.schedule)
            steps = [(answer.episode, answer.step) for answer in robot.answers]
            assert steps == [(robot.episode, step) for step in range(robot.steps)]
            conditionings = [answer.conditioning_step for answer in robot.answers]
            assert conditionings == [answer.conditioning_step for answer in twin.answers[: robot.steps]]
            np.testing.assert_array_equal(robot.actions, twin.actions[: robot.steps])


def recovered(robots: Iterable[Robot], since: float) -> float:
    """Seconds from `since` until every robot that still had steps to go had its next answer."""
    late = [min((time for time in robot.times if time > since), default=since) - since for robot in robots]
    return max(late)


@cache
def _seen(number: int, step: int) -> dict[str, object]:
    seen: dict[str, object] = observation(1000 * number + step)
    return seen
