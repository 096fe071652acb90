"""How long each stage of one request took."""

from __future__ import annotations

import time

from robodual.serving.metrics import Metrics
from robodual_client import wire


class Timings:
    """Collects a request's stages for its answer and for the metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.stages: list[tuple[str, float]] = []  # in seconds, in the order of their ends
        self._started = self._lap = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Counts the time since the last lap (or since the beginning) as `stage`."""
        now = time.perf_counter()
        self.add(stage, now - self._lap)

    def add(self, stage: str, seconds: float) -> None:
        """Counts `seconds` as `stage`; the next lap begins here."""
        self.stages.append((stage, seconds))
        self._metrics.stage(stage).observe(seconds)
        self._lap = time.perf_counter()

    def messages(self) -> list[wire.Timing]:
        """The stages so far, and "total"."""
        self.add("total", time.perf_counter() - self._started)
        return [wire.Timing(stage=stage, milliseconds=seconds * 1e3) for stage, seconds in self.stages]
