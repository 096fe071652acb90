"""The async schedule's background: at most one Condition in the air, always of the newest frame."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, Callable

import grpc

from robodual_client.answer import Conditioning
from robodual_client.calls import FIRST_DELAY, LONGEST_DELAY, Call, Launch, Replicas
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

    `offer` gives it each step's frame; what it returns is to be launched. The answer comes to the launch's `landed`,
    on whichever thread. A generalist that is away costs nothing but age: the newest frame is tried again at the first
    step after a pause that grows with each failure.
    """

    def __init__(self, generalists: Replicas, latest: Conditioning) -> None:
        self.latest = latest
        self._generalists = generalists
        self._lock = threading.Lock()
        self._offered: tuple[int, Callable[[], Call]] | None = None
        self._asked = latest.step
        self._in_the_air = False
        self._stopped = False
        self._failures = 0
        self._not_before = 0.0
        self._error: RoboDualError | None = None

    def offer(self, step: int, call: Callable[[], Call]) -> Launch | None:
        """The frame of `step`, as the Condition call that it would be."""
        with self._lock:
            self._offered = step, call
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
        step, call = self._offered
        if step <= self._asked:
            return None
        self._in_the_air = True
        self._asked = step
        start = time.perf_counter()
        return Launch(call(), lambda outcome: self._landed(outcome, start))

    def _landed(self, outcome: Any, start: float) -> Launch | None:
        with self._lock:
            self._in_the_air = False
            if self._stopped:
                return None
            if isinstance(outcome, Failure):
                self._failures += 1
                self._generalists.advance()
                self._not_before = time.monotonic() + min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(self._failures, 10))
                logger.warning("no conditioning of step %d: %s", self._asked, outcome)
                if outcome.code in _FINAL or outcome.too_large:
                    self._error = outcome.error()
            else:
                self._failures = 0
                self.latest = Conditioning.of(outcome, (time.perf_counter() - start) * 1e3)
            return self._next()
