"""The async schedule's background: at most one Condition in the air, always of the newest frame."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import Any, Callable

import grpc

from robodual_client.answer import Conditioning
from robodual_client.calls import FIRST_DELAY, LONGEST_DELAY, Call, Launch, Plan, Replicas, Resolve
from robodual_client.errors import Failure, RoboDualError

logger = logging.getLogger(__name__)

_FINAL = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
)


class Thinking:
    """One episode's conditionings in the background.

    `offer` gives it each step's frame, as a plan for its conditioning; what it returns is to be launched. The answers
    come to the launch's `landed`, on whichever thread, where the plan goes on. A generalist that is away costs nothing
    but age: the newest frame is tried again at the first step after a pause that grows with each failure, at the next
    replica, and where names are looked up, at what they stand for by then.
    """

    def __init__(self, generalists: Replicas, latest: Conditioning) -> None:
        self.latest = latest
        self._generalists = generalists
        self._lock = threading.Lock()
        self._offered: tuple[int, Callable[[], Plan[Conditioning]]] | None = None
        self._asked = latest.step
        self._in_the_air = False
        self._stopped = False
        self._failures = 0
        self._not_before = 0.0
        self._error: RoboDualError | None = None

    def offer(self, step: int, thought: Callable[[], Plan[Conditioning]]) -> Launch | None:
        """The frame of `step`, as the plan that asks for its conditioning once."""
        with self._lock:
            self._offered = step, thought
            return self._next()

    def raise_error(self) -> None:
        """Raises, once, the RoboDualError that a request in the background ended with, if repeating would not help."""
        with self._lock:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def stop(self) -> None:
        with self._lock:
            self._stopped = True

    def _next(self) -> Launch | None:
        if self._stopped or self._in_the_air or self._offered is None or time.monotonic() < self._not_before:
            return None
        step, thought = self._offered
        if step <= self._asked:
            return None
        self._in_the_air = True
        self._asked = step
        return self._go_on(self._attempt(thought), None)

    def _attempt(self, thought: Callable[[], Plan[Conditioning]]) -> Plan[Conditioning]:
        if self._failures:
            yield from self._generalists.refresh(avoid=self._generalists.advance())
        return (yield from thought())

    def _landed(self, plan: Plan[Conditioning], outcome: Any) -> Launch | None:
        with self._lock:
            return None if self._stopped else self._go_on(plan, outcome)

    def _go_on(self, plan: Plan[Conditioning], outcome: Any) -> Launch | None:
        """Takes `plan` to its next operation, or to its end and on to the newest frame's."""
        try:
            operation = plan.throw(outcome) if isinstance(outcome, Failure) else plan.send(outcome)
            assert isinstance(operation, (Call, Resolve))
            return Launch(operation, partial(self._landed, plan))
        except StopIteration as stop:
            self._failures = 0
            self.latest = stop.value
        except (Failure, RoboDualError) as error:
            self._failures += 1
            self._generalists.checked = ""
            self._not_before = time.monotonic() + min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(self._failures, 10))
            logger.warning("no conditioning of step %d: %s", self._asked, error)
            if isinstance(error, RoboDualError):
                self._error = error
            elif error.code in _FINAL or error.too_large:
                self._error = error.error()
        self._in_the_air = False
        return self._next()
