"""How long each stage of one request took."""

from __future__ import annotations

import time
from typing import Any

from robodual.serving import tracing
from robodual.serving.metrics import Metrics

LATER = 0.002  # seconds after an answer at which what does not belong to it is done, so that it competes with nothing


class Timings:
    """Collects a request's stages for its answer, for the metrics and for its trace."""

    def __init__(self, metrics: Metrics) -> None:
        self.span = tracing.current.get()  # None where nothing is traced
        self._metrics = metrics
        self.stages: list[tuple[str, float]] = []  # in seconds, in the order of their ends
        self._started = self._lap = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Counts the time since the last lap (or since the beginning) as `stage`."""
        now = time.perf_counter()
        self.stages.append((stage, now - self._lap))
        self._lap = now

    def add(self, stage: str, seconds: float) -> None:
        """Counts `seconds` as `stage`; the next lap begins here."""
        self.stages.append((stage, seconds))
        self._lap = time.perf_counter()

    def conclude(self, timings: Any) -> None:
        """Puts the stages, and "total", into an answer's repeated wire.Timing."""
        total = time.perf_counter() - self._started
        if self.span is not None:
            ended = 0.0
            for stage, seconds in self.stages:
                ended += seconds
                self.span.stage(stage, seconds, ago=total - ended)
        self.stages.append(("total", total))
        for stage, seconds in self.stages:
            timings.add(stage=stage, milliseconds=seconds * 1e3)

    def observe(self) -> None:
        """Gives them to the metrics."""
        for stage, seconds in self.stages:
            self._metrics.stage(stage).observe(seconds)
