"""Sessions through the real pair for as long as asked: no error, and memory, file descriptors and latency stay flat.

    python -m benchmarks.soak --minutes 30 --sessions 8 --json soak.json

Each session steps as fast as it is answered: episode after episode, every few of them with a new client under a new
name. Steps are timed as a robot sees them, the waits for the generalist included. Exits with 1 if anything moved.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
from benchmarks import measurement, robots

from robodual.pair import Options, Pair
from robodual.profiles import PROFILES
from robodual.serving.settings import SpecialistSettings
from robodual_client import DualSystemClient

PACKAGES = ("torch", "numpy", "grpcio", "redis", "robodual", "robodual-client")
STEPS = 48  # an episode
EPISODES = 4  # a client
SLACK = 1.0  # MiB that no growth is seen in: a small process moves by single allocations
ROUNDS = 5  # of each batch size, before the run
MOST = 2000  # steps a second, of all sessions, that there is room to note
PROCESSES = ("generalist", "specialist", "redis", "client")


class Record:
    """What the sessions and the sampler see, in memory that is taken at the beginning: it must not look like a leak."""

    def __init__(self, seconds: float) -> None:
        self.began = time.monotonic()
        self.errors: list[str] = []
        self.steps = np.full((int(seconds * MOST), 2), np.nan)  # when each was answered, and after how long
        self.looks = {name: np.full((int(seconds) + 60, 3), np.nan) for name in PROCESSES}  # when, bytes, descriptors
        self._counts = {name: itertools.count() for name in ("steps", *PROCESSES)}

    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def answered(self, seconds: float) -> None:
        self.steps[next(self._counts["steps"])] = self.now(), seconds

    def looked(self, name: str, process: psutil.Process) -> None:
        look = self.now(), process.memory_info().rss, process.num_fds()
        self.looks[name][next(self._counts[name])] = look


@dataclass(frozen=True)
class Row:
    """One stretch of the run; memory (MiB), the least and the median, and the fewest file descriptors, by process."""

    until: float
    steps: int
    rate: float
    median: float
    p99: float
    longest: float
    errors: int
    memory: dict[str, tuple[float, float]]
    descriptors: dict[str, float]


def drive(addresses: dict[str, str], seed: int, record: Record, over: threading.Event) -> None:
    """One session after another until it is over; what goes wrong is noted, and the next one begins."""
    seen = itertools.cycle([robots.observation(100 * seed + number) for number in range(8)])
    while not over.is_set():
        try:
            with DualSystemClient(*robots.endpoints(addresses), seed=seed) as client:
                for _ in range(EPISODES):
                    client.reset("move the door all the way to the left")
                    for _ in range(STEPS):
                        if over.is_set():
                            return
                        start = time.monotonic()
                        client.step(next(seen))
                        record.answered(time.monotonic() - start)
                        if client.last is not None and client.last.failures:
                            record.errors.append(f"step {client.last.step} took {client.last.failures} attempts more")
        except Exception as error:  # whatever it is, it is noted, and the session goes on
            record.errors.append(f"{type(error).__name__}: {error}")
            time.sleep(0.1)


def crowd(addresses: dict[str, str], most: int) -> None:
    """Has both services make batches of every size up to `most`, for each of which they keep some memory.

    Of requests at the same moment, one or two are taken at once and the others together after them.
    """
    for schedule, size in itertools.product(("every-1", "every-1000"), range(2, most + 3)):
        together = threading.Barrier(size)

        def step(seed: int, schedule: str = schedule, together: threading.Barrier = together) -> None:
            seen = robots.observation(seed)
            with DualSystemClient(*robots.endpoints(addresses), schedule=schedule, seed=seed) as client:
                client.reset("move the door all the way to the left")
                for _ in range(ROUNDS):
                    together.wait(60)
                    client.step(seen)

        with ThreadPoolExecutor(size) as threads:
            list(threads.map(step, range(size)))


def watch(record: Record, over: threading.Event) -> None:
    """Looks at each process once a second."""
    processes = {"client": psutil.Process()}
    for child in processes["client"].children(recursive=True):
        command = " ".join(child.cmdline())
        name = next((name for name in ("generalist", "specialist") if f"serve {name}" in command), "redis")
        processes[name] = child
    while not over.wait(1.0):
        for name, process in processes.items():
            record.looked(name, process)


def row(record: Record, since: float, until: float) -> Row:
    """The stretch from `since` to `until`, in seconds."""
    times = _within(record.steps, since, until)[:, 1] * 1e3
    looks = {name: _within(table, since, until) for name, table in record.looks.items()}
    median, p99, longest = np.percentile(times, (50, 99, 100)).tolist() if len(times) else [float("nan")] * 3
    return Row(
        until,
        len(times),
        len(times) / (until - since),
        median,
        p99,
        longest,
        len(record.errors),
        {name: (look[:, 1].min() / 2**20, float(np.median(look[:, 1])) / 2**20) for name, look in looks.items()},
        {name: float(look[:, 2].min()) for name, look in looks.items()},
    )


def complaints(record: Record, warm: float, *, growth: float, flat: float) -> list[str]:
    """What moved after `warm` seconds: the first half of what follows against the second."""
    middle, end = (warm + record.now()) / 2, record.now()
    first, second = row(record, warm, middle), row(record, middle, end)
    found = [f"{len(record.errors)} errors, the first: {record.errors[0]}"] if record.errors else []
    for name in PROCESSES:
        # A leak lifts both; what the allocator gives back for a moment, or keeps for one, moves one of them.
        (least, median), (least_after, median_after) = first.memory[name], second.memory[name]
        if _grown(least, least_after, growth, SLACK) and _grown(median, median_after, growth, SLACK):
            found.append(
                f"memory of {name}: at least {least:.1f} MiB, then {least_after:.1f}; "
                f"in the median {median:.1f} MiB, then {median_after:.1f}"
            )
        if _grown(first.descriptors[name], second.descriptors[name], growth):
            found.append(f"file descriptors of {name}: {first.descriptors[name]:g}, then {second.descriptors[name]:g}")
    if not second.p99 <= first.p99 * flat:
        found.append(f"p99: {first.p99:.1f} ms, then {second.p99:.1f} ms")
    return found


def _grown(before: float, after: float, growth: float, slack: float = 0.0) -> bool:
    return after > max(before * growth, before + slack)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the soak; returns 1 if there was an error or something moved."""
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--profile", default="playtable", choices=sorted(PROFILES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--warm-up", type=float, help="seconds that nothing is held against; a tenth, 30 at least")
    parser.add_argument("--every", type=float, default=60, help="seconds for a row of the table")
    parser.add_argument(
        "--growth", type=float, default=1.02, help="how far memory and descriptors may rise, as a ratio"
    )
    parser.add_argument("--flat", type=float, default=1.2, help="how far p99 may rise, as a ratio")
    parser.add_argument("--json", type=Path, help="where to write the record")
    options = parser.parse_args(argv)
    duration = 60 * options.minutes
    warm = options.warm_up if options.warm_up is not None else max(30.0, duration / 10)
    if duration < 2 * warm:
        parser.error(f"--minutes: {duration:g} s are too few for a warm-up of {warm:g} s; give twice as many at least")

    rows: list[Row] = []
    with Pair(Options(profile=options.profile, device=options.device)) as pair:
        record, over = Record(duration), threading.Event()
        crowd(pair.addresses, SpecialistSettings.model_fields["max_batch"].default)
        warm += record.now()
        threads = [
            threading.Thread(target=drive, args=(pair.addresses, seed, record, over))
            for seed in range(options.sessions)
        ]
        threads.append(threading.Thread(target=watch, args=(record, over)))
        for thread in threads:
            thread.start()
        try:
            print(_HEADS)
            while (since := record.now()) < duration:
                time.sleep(min(options.every, duration - since) + 0.01)
                pair.check()
                rows.append(row(record, since, record.now()))
                print(_line(rows[-1]), flush=True)
            found = complaints(record, warm, growth=options.growth, flat=options.flat)
        finally:
            over.set()
            for thread in threads:
                thread.join()

    for complaint in found:
        print(f"not steady: {complaint}", file=sys.stderr)
    if not found:
        print(f"steady: {sum(each.steps for each in rows)} steps, no error, nothing moved after the first {warm:.0f} s")
    if options.json:
        facts = {"minutes": options.minutes, "sessions": options.sessions, "profile": options.profile, "warm_up": warm}
        written = {"benchmark": "soak", "rows": [asdict(each) for each in rows], "complaints": found, **facts}
        written["machine"] = measurement.machine(PACKAGES)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(written, indent=2) + "\n")
    return 1 if found else 0


_HEADS = (
    f"{'minute':>6}  {'steps':>7}  {'per s':>6}  {'median ms':>9}  {'p99 ms':>8}  {'longest ms':>10}  {'errors':>6}  "
    f"median MiB/descriptors of {', '.join(PROCESSES)}"
)


def _line(at: Row) -> str:
    processes = "  ".join(f"{at.memory[name][1]:7.1f}/{at.descriptors[name]:<3g}" for name in PROCESSES)
    return (
        f"{at.until / 60:6.1f}  {at.steps:7}  {at.rate:6.1f}  {at.median:9.2f}  {at.p99:8.2f}  {at.longest:10.1f}  "
        f"{at.errors:6}  {processes}"
    )


def _within(table: npt.NDArray[np.float64], since: float, until: float) -> npt.NDArray[np.float64]:
    return table[(since <= table[:, 0]) & (table[:, 0] < until)]


if __name__ == "__main__":
    sys.exit(main())
