"""Simulated robots at a fixed rate, through the pair's three processes: deadlines, ages, throughput, CPU and memory.

    python -m benchmarks.system --policy toy --robots 1 2 4 8 --rate 15 --seconds 20 --json system.json
    python -m benchmarks.system --policy noop --find-limit --rate 15 --seconds 10

Robots are real clients, several in one process (robots.py). With the policy noop the models answer zeros at once
(noop.py), and what is measured is the services themselves; with the policy specialist the generalist's does, and the
specialist is of published size. --find-limit doubles the robots until a deadline is missed,
then bisects. Everything shares this machine: robots that are late because their own process is count as late.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import psutil
from benchmarks import measurement, robots

from robodual.pair import Options, Pair

PACKAGES = ("robodual", "robodual-client", "torch", "grpcio", "psutil")
MOST = 1024  # sessions, and requests that wait


@dataclass(frozen=True)
class Process:
    """CPU seconds that it took in the measured time, and its resident memory at the end, MB; robots' are summed."""

    name: str
    cpu_seconds: float
    rss: float


@dataclass(frozen=True)
class Row:
    """So many robots. Latency in milliseconds, from a frame's due time to its action; ages in control steps, median and
    p99; `ratio` is the first row's median latency by this one's.
    """

    name: str
    robots: int
    median: float
    p99: float
    ratio: float
    deadlines: int
    missed: int
    action_age: tuple[float, float]
    conditioning_age: tuple[float, float]
    actions_per_second: float
    conditionings_per_second: float
    seconds: float
    processes: list[Process]

    def cells(self) -> list[str]:
        met = 100 * (1 - self.missed / self.deadlines)
        ages = [f"{median:.0f} / {p99:.0f}" for median, p99 in (self.action_age, self.conditioning_age)]
        rates = [f"{self.actions_per_second:.1f}", f"{self.conditionings_per_second:.1f}"]
        cores = [f"{process.cpu_seconds / self.seconds:.2f}" for process in self.processes]
        latency = [f"{self.median:.1f}", f"{self.p99:.1f}"]
        return [
            str(self.robots),
            f"{met:.2f} ({self.missed} of {self.deadlines} missed)",
            *latency,
            *ages,
            *rates,
            *cores,
        ]


HEADER = (
    *("robots", "deadlines met %", "latency median ms", "p99 ms", "action age", "conditioning age"),
    *("actions /s", "conditionings /s", "cores: generalist", "specialist", "redis", "robots"),
)


class Rig:
    """A started pair and the processes of the robots."""

    def __init__(self, pair: Pair, pool: ProcessPoolExecutor, barrier: Any, options: argparse.Namespace) -> None:
        self._pair = pair
        self._pool = pool
        self._barrier = barrier
        self._options = options
        self.rows: list[Row] = []

    def measure(self, count: int) -> Row:
        """Runs `count` robots for the time that the options say; prints and keeps the row."""
        options = self._options
        phases = np.random.default_rng(count).uniform(size=count).tolist()
        steps = max(1, round(options.seconds * options.rate))
        drills = [
            robots.Drill(self._pair.addresses, share, options.schedule, 1 / options.rate, round(options.rate), steps)
            for share in (phases[first :: options.processes] for first in range(options.processes))
        ]
        futures = [self._pool.submit(robots.work, drill) for drill in drills]
        with contextlib.suppress(threading.BrokenBarrierError):  # a result below says what broke it
            self._barrier.wait(180)
        before, start = self._cpu(), time.perf_counter()
        done = [future.result() for future in futures]
        seconds, after = time.perf_counter() - start, self._cpu()
        log = robots.Log()
        for each, _, _ in done:
            log.add(each)
        processes = [Process(name, after[name] - before[name], _rss(pid)) for name, pid in self._pair.pids.items()]
        crew = Process("robots", sum(cpu for _, cpu, _ in done), sum(_rss(pid) for _, _, pid in done))
        row = self._row(count, log, seconds, [*processes, crew])
        self.rows.append(row)
        measurement.markdown(row.cells(), header=() if len(self.rows) > 1 else HEADER)
        return row

    def _row(self, count: int, log: robots.Log, seconds: float, processes: list[Process]) -> Row:
        median = statistics.median(log.latencies)
        measured = self._options.seconds
        return Row(
            name=f"{count} robot{'s' if count > 1 else ''}",
            robots=count,
            median=median,
            p99=measurement.percentile(log.latencies, 0.99),
            ratio=(self.rows[0].median if self.rows else median) / median,
            deadlines=log.deadlines,
            missed=log.missed,
            action_age=_spread(log.action_ages),
            conditioning_age=_spread(log.conditioning_ages),
            actions_per_second=len(log.latencies) / measured,
            conditionings_per_second=log.conditionings / measured,
            seconds=seconds,
            processes=processes,
        )

    def _cpu(self) -> dict[str, float]:
        return {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in self._pair.pids.items()}


def _rss(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss) / 1e6


def _spread(ages: Sequence[int]) -> tuple[float, float]:
    return statistics.median(ages), measurement.percentile(ages, 0.99)


@contextlib.contextmanager
def rig(options: argparse.Namespace) -> Iterator[Rig]:
    """Starts what is needed, and stops it."""
    settings = {"ROBODUAL_MAX_QUEUE": str(MOST), "ROBODUAL_SPECIALIST_MAX_SESSIONS": str(MOST)}
    if options.policy == "noop":
        pair = Options(settings=settings, command=(sys.executable, "-m", "benchmarks.noop"))
    elif options.policy == "specialist":
        command = (sys.executable, "-m", "benchmarks.noop", "--real", "specialist")
        pair = Options(profile="robodual-7b", device=options.device, settings=settings, command=command)
    else:
        pair = Options(profile=options.policy, device=options.device, settings=settings)
    context = get_context("spawn")
    barrier = context.Barrier(options.processes + 1)
    pool = ProcessPoolExecutor(options.processes, context, robots.join, (barrier,))
    with Pair(pair) as started, pool:
        yield Rig(started, pool, barrier, options)


def highest(holds: Callable[[int], bool], most: int) -> int:
    """The highest number up to `most` for which `holds` is true: doubling, then bisecting; 0 if it is not for 1."""
    good, bad = 0, 1
    while bad <= most and holds(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        if holds(middle):
            good = middle
        else:
            bad = middle
    return good


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if `--compare` finds a regression."""
    parser = argparse.ArgumentParser(prog="benchmarks.system", description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="toy", choices=["noop", "specialist", "toy", "playtable", "robodual-7b"])
    parser.add_argument("--robots", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rate", type=float, default=15.0, help="control steps a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="measured, after one that is not")
    parser.add_argument("--schedule", help="by default published with noop and specialist, else async")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="of robots")
    parser.add_argument("--find-limit", action="store_true", help="the most robots with no deadline missed")
    parser.add_argument("--most", type=int, default=256, help="robots that --find-limit tries")
    parser.add_argument("--tolerate", type=float, default=0.0, help="share of deadlines that --find-limit lets pass")
    measurement.add_outputs(parser)
    options = parser.parse_args(argv)
    options.schedule = options.schedule or ("published" if options.policy in ("noop", "specialist") else "async")

    def holds(count: int) -> bool:
        row = running.measure(count)
        tolerated: float = options.tolerate * row.deadlines
        return row.missed <= tolerated

    facts: dict[str, object] = {}
    with rig(options) as running:
        if options.find_limit:
            facts["limit"] = highest(holds, options.most)
        else:
            for count in options.robots:
                running.measure(count)
    title = f"{options.policy}, {options.rate:g} Hz, schedule {options.schedule}, {options.seconds:g} s"
    print()
    measurement.markdown(
        *([row.name, *(f"{process.rss:.0f}" for process in row.processes)] for row in running.rows),
        header=(title, *(f"{process.name} MB" for process in running.rows[0].processes)),
    )
    if options.find_limit:
        missing = f"at most {options.tolerate:.2%} of deadlines missed" if options.tolerate else "no deadline missed"
        print(f"\nthe most robots at {options.rate:g} Hz with {missing}: {facts['limit']}")
    given = {name: getattr(options, name) for name in ("policy", "rate", "seconds", "schedule", "processes")}
    return measurement.conclude(options, "system", title, running.rows, PACKAGES, **given, **facts)


if __name__ == "__main__":
    sys.exit(main())
