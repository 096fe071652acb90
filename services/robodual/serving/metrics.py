"""Prometheus metrics of one service."""

from __future__ import annotations

import functools
import math
from collections import Counter as Counted
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from robodual.serving.recent import Recent

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.066, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # alerts ask for 66 ms
STEPS = (0, 1, 2, 4, 7, 8, 16, 32, 64)
STALE = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
FORWARDS = (2, 4, 8, 12, 16, 24, 32, 48, 57, 64)
BATCHES = (1, 2, 4, 8, 16, 32)
WATCHED = ("INTERNAL", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAUTHENTICATED", "PERMISSION_DENIED")
PROBLEMS = 50
LONGEST = 300  # characters of a message that are kept


@dataclass(frozen=True)
class Problem:
    """A call that got an error instead of an answer, in words."""

    at: float  # seconds since the epoch
    method: str
    code: str
    owner: str  # of the token that was shown, if one was
    session: str  # "" where it had not been read yet
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", self.message[:LONGEST])


class Metrics:
    """The metrics of one service, in a registry of their own, so that several services can share a process."""

    def __init__(self) -> None:
        self.problems = Recent[Problem](PROBLEMS)
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "robodual_requests", "Answers by method and status.", ["method", "code"], registry=registry
        )
        self.stages = Histogram(
            "robodual_stage_seconds", "Time in each stage of a request.", ["stage"], buckets=SECONDS, registry=registry
        )
        self.queues: list[Callable[[], int]] = []  # how many wait in each
        self.queue_depth = Gauge("robodual_queue_depth", "Requests that wait for the model.", registry=registry)
        self.queue_depth.set_function(lambda: sum(queue() for queue in self.queues))
        self.batch_size = Histogram(
            "robodual_batch_size", "Requests in one pass of the model.", buckets=BATCHES, registry=registry
        )
        self.dropped = Counter(
            "robodual_dropped", "Requests cancelled or expired before they cost compute.", registry=registry
        )
        self.sessions = Gauge("robodual_sessions", "Open sessions.", registry=registry)
        self.conditioning_age = Histogram(
            "robodual_conditioning_age_steps", "Age of the conditioning used.", buckets=STEPS, registry=registry
        )
        self.conditioning_staleness = Histogram(
            "robodual_conditioning_staleness_seconds",
            "Time since the conditioning used was ready here.",
            buckets=STALE,
            registry=registry,
        )
        self.degraded = Counter("robodual_degraded_answers", "Answers marked as degraded.", registry=registry)
        self.forwards = Histogram(
            "robodual_forwards",
            "Passes through the language model of one conditioning: fewer where guesses were right.",
            buckets=FORWARDS,
            registry=registry,
        )
        self.malformed = Counter(
            "robodual_malformed_tokens", "Decoded tokens that did not fit the action layout.", registry=registry
        )
        self.refused_records = Counter(
            "robodual_refused_records", "Conditioning records that could not be read.", registry=registry
        )
        self.resumed = Counter(
            "robodual_resumed_sessions", "Sessions that went on here from a recovery state.", registry=registry
        )
        self.ready = Gauge("robodual_ready", "1 while the service is ready.", registry=registry)
        self.store_up = Gauge("robodual_store_up", "1 while the conditioning store can be used.", registry=registry)
        self.store_up.set(math.nan)  # until it has been asked, which is after a model is loaded

        self.device_memory = Gauge(
            "robodual_device_memory_bytes",
            "Memory of a GPU: allocated and reserved by this process, used by all, and in total.",
            ["device", "kind"],
            registry=registry,
        )
        ProcessCollector(registry=registry)

        # One lookup without the library's locks: a request passes through half a dozen stages.
        self.stage = functools.cache(self.stages.labels)
        self.request = functools.cache(self.requests.labels)

    def expect(self, methods: Iterable[str]) -> None:
        """Shows the errors of these methods that alerts look for as 0: of a count that begins at 1 no rate is seen."""
        for method in methods:
            for code in WATCHED:
                self.request(method, code)

    def watch_memory(self, *devices: str) -> None:
        """Has `device_memory` asked for whenever it is shown, for those of `devices` that are GPUs."""
        for device in devices:
            if device.startswith("cuda"):
                for kind, ask in _MEMORY.items():
                    self.device_memory.labels(device, kind).set_function(functools.partial(ask, device))

    def answered(self) -> Counted[str]:
        """Calls so far by status."""
        counted = Counted[str]()
        for labels, value in _samples(self.requests):
            if value:
                counted[labels["code"]] += int(value)
        return counted

    def value(self, metric: Counter | Gauge) -> int:
        """Of a metric without labels."""
        return int(sum(value for _, value in _samples(metric)))

    def exposition(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)


def _samples(metric: Counter | Gauge) -> list[tuple[dict[str, str], float]]:
    samples = (sample for family in metric.collect() for sample in family.samples)
    return [(sample.labels, sample.value) for sample in samples if not sample.name.endswith("_created")]


_MEMORY: dict[str, Callable[[str], float]] = {
    "allocated": torch.cuda.memory_allocated,
    "reserved": torch.cuda.memory_reserved,
    "used": lambda device: torch.cuda.mem_get_info(device)[1] - torch.cuda.mem_get_info(device)[0],
    "total": lambda device: torch.cuda.mem_get_info(device)[1],
}
