"""Whether memory grows with the steps that a specialist takes: resident memory over 10,000 steps, in one process.

    python -m benchmarks.memory --steps 10000 --json memory.json

Sessions take steps in turn, in batches of all sizes up to their number; each keeps its previous frame's features, and
now and then gets a new conditioning, of another length. The bound is on the growth after the warm-up.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from benchmarks import measurement
from benchmarks.specialist import frame

from robodual.profiles import PROFILES
from robodual.specialist.control import noise
from robodual.specialist.engine import Features, Projected, Request, SpecialistEngine, load_specialist

PACKAGES = ("torch", "numpy", "robodual")
FRAMES = 16
EVERY = 8  # steps on one conditioning
LENGTHS = (80, 96)  # of a conditioning, from and to
LOOKS = 20  # at the memory, after the warm-up


def steps(engine: SpecialistEngine, sessions: int, total: int) -> Iterator[int]:
    """Takes `total` steps; gives the number of those that are done, after each batch."""
    random = np.random.default_rng(0)
    frames = [frame(number) for number in range(FRAMES)]
    reference = random.uniform(-1, 1, (8, 7)).astype(np.float32)
    previous: list[Features | None] = [None] * sessions
    conditionings: list[Projected | None] = [None] * sessions
    taken = [0] * sessions
    done = 0
    while done < total:
        batch = random.permutation(sessions)[: min(total - done, random.integers(1, sessions + 1))]
        requests = []
        for session in batch:
            if taken[session] % EVERY == 0:
                states = torch.randn(int(random.integers(*LENGTHS)), engine.width, dtype=torch.bfloat16)
                conditionings[session] = engine.project(states)
            start = noise(0, 1, taken[session])
            picture = frames[(taken[session] + session) % FRAMES]
            requests.append(Request(picture, previous[session], conditionings[session], reference, start))
            taken[session] += 1
        for session, answer in zip(batch, engine.act(requests)):
            previous[session] = answer.features
        done += len(batch)
        yield done


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if memory grew by more than the bound."""
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="toy", choices=sorted(PROFILES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--warmup", type=int, default=1_000, help="steps before the growth is counted")
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bound", type=float, default=2.0, help="per cent that memory may grow")
    parser.add_argument("--json", type=Path, help="where to write the record")
    options = parser.parse_args(argv)

    torch.set_num_threads(options.threads)
    engine = load_specialist(options.profile, device=options.device)
    process = psutil.Process()
    looks: list[tuple[int, float]] = []
    start, due = time.perf_counter(), options.warmup
    for done in steps(engine, options.sessions, options.steps):
        if done >= due or done >= options.steps:
            looks.append((done, process.memory_info().rss / 1e6))
            due += max(1, (options.steps - options.warmup) // LOOKS)
    seconds = time.perf_counter() - start
    first, most = looks[0][1], max(rss for _, rss in looks)
    growth = 100 * (most / first - 1)
    within = growth <= options.bound
    measurement.markdown(
        [str(options.steps), f"{first:.1f}", f"{most:.1f}", f"{growth:.2f}", f"{options.bound:g}", f"{seconds:.0f}"],
        header=("steps", "MB after warm-up", "MB at most", "growth %", "bound %", "seconds"),
    )
    if not within:
        print(
            f"missed: memory grew by {growth:.2f} % in {options.steps} steps; see the looks by --json", file=sys.stderr
        )
    if options.json:
        given = {name: getattr(options, name) for name in ("profile", "steps", "warmup", "sessions", "threads")}
        facts = {**given, "looks": looks, "growth_percent": growth, "machine": measurement.machine(PACKAGES)}
        measurement.write(options.json, "memory", [], **facts)
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
