"""The way of a conditioning from the generalist to the specialist's device, against torch.save, SET, and polling.

    python -m benchmarks.conditioning --profile toy robodual-7b --rounds 200 --json conditioning.json

A real Valkey (or the one at --redis-url), one process, hidden states [90, 64] or [90, 4096] in bfloat16. Ours: the
record is stored by the compare-and-set script, which announces it; the reader fetches it on the announcement, checks
it, and projects it on the device. The plain way: torch.save, SET; the reader GETs every millisecond until there is
something, then torch.load(weights_only=True), and the same projection. Both take turns, each with its reader waiting.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from benchmarks import measurement
from redis.asyncio import Redis

from robodual.conditioning import codec
from robodual.conditioning.record import Conditioning
from robodual.conditioning.store import Announced, Store, Subscribed
from robodual.conditioning.valkey import EmbeddedServer
from robodual.profiles import PROFILES
from robodual.specialist.engine import SpecialistEngine, load_specialist

PACKAGES = ("torch", "numpy", "redis", "robodual")
SESSION = "benchmark"
POLL = 0.001  # seconds
WARMUP = 3

Stages = dict[str, float]  # milliseconds


def draw(width: int, length: int) -> Conditioning:
    random = np.random.default_rng(0)
    states = torch.from_numpy(random.normal(size=(length, width)).astype(np.float32)).bfloat16()
    return Conditioning(1, 0, random.uniform(-1, 1, (8, 7)).astype(np.float32), states)


class Clock:
    """Milliseconds of each stage since the one before."""

    def __init__(self) -> None:
        self.stages: Stages = {}
        self._start = self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.stages[stage] = (now - self._last) * 1e3
        self._last = now

    def total(self) -> Stages:
        return {**self.stages, "total": (self._last - self._start) * 1e3}


def project(engine: SpecialistEngine, hidden_states: torch.Tensor) -> None:
    """To the device, and all that depends on the conditioning alone; waits until it is done."""
    engine.project(hidden_states)
    if engine.preparation.device.type == "cuda":
        torch.cuda.synchronize(engine.preparation.device)


class Ours:
    """The store and its announcements; writer and reader have connections of their own, as in two processes."""

    def __init__(self, url: str, engine: SpecialistEngine) -> None:
        self._engine = engine
        self._writer, self._reader = Store(url), Store(url)
        self._events = self._reader.subscribe()
        self._step = 0

    async def start(self) -> None:
        while not isinstance(await anext(self._events), Subscribed):
            pass

    async def _announced(self) -> None:
        while not isinstance(await anext(self._events), Announced):
            pass

    async def run(self, made: Conditioning) -> Stages:
        self._step += 1
        conditioning = Conditioning(1, self._step, made.reference_actions, made.hidden_states)
        reading = asyncio.ensure_future(self._announced())
        await asyncio.sleep(0)  # the reader waits
        clock = Clock()
        writing = asyncio.ensure_future(self._writer.put(SESSION, conditioning))
        await reading
        clock.lap("put to announcement")
        fetched = await self._reader.fetch(SESSION)
        assert fetched is not None
        assert fetched.version == (1, self._step)
        clock.lap("fetch and decode")
        project(self._engine, fetched.hidden_states)
        clock.lap("project on the device")
        await writing
        return clock.total()

    async def close(self) -> None:
        await self._writer.delete(SESSION)
        await self._events.aclose()
        await self._writer.close()
        await self._reader.close()


class Plain:
    """What one would write first. A reader finds nothing until the conditioning is there, so that polling is cheap."""

    def __init__(self, url: str, engine: SpecialistEngine) -> None:
        self._engine = engine
        self._writer, self._reader = Redis.from_url(url), Redis.from_url(url)

    async def _poll(self) -> bytes:
        while (found := await self._reader.get(SESSION)) is None:
            await asyncio.sleep(POLL)
        assert isinstance(found, bytes)
        return found

    async def run(self, made: Conditioning) -> Stages:
        reading = asyncio.ensure_future(self._poll())
        await asyncio.sleep(0)
        clock = Clock()
        buffer = io.BytesIO()
        torch.save({"actions": torch.from_numpy(made.reference_actions), "states": made.hidden_states}, buffer)
        writing = asyncio.ensure_future(self._writer.set(SESSION, buffer.getvalue()))
        record = await reading
        clock.lap("torch.save, SET, poll")
        loaded = torch.load(io.BytesIO(record), weights_only=True)  # noqa: TID251 (weights only)
        clock.lap("torch.load")
        project(self._engine, loaded["states"])
        clock.lap("project on the device")
        await writing
        await self._writer.delete(SESSION)
        return clock.total()

    async def close(self) -> None:
        await self._writer.aclose()
        await self._reader.aclose()


def alone(made: Conditioning) -> Stages:
    """What encoding and decoding cost by themselves: parts of the stages above."""
    clock = Clock()
    record = codec.encode(made, SESSION)
    clock.lap("encode, of the put")
    codec.decode(record, SESSION)
    clock.lap("decode, of the fetch")
    return clock.stages


async def measure(url: str, engine: SpecialistEngine, made: Conditioning, rounds: int) -> list[measurement.Row]:
    """The plain total first: it is the baseline. Stages follow; what has no counterpart has no ratio (0)."""
    plain, ours = Plain(url, engine), Ours(url, engine)
    await ours.start()
    taken: dict[str, list[float]] = {}
    try:
        for position in range(-WARMUP, rounds):
            stages = {f"plain: {name}": value for name, value in (await plain.run(made)).items()}
            stages |= {f"ours: {name}": value for name, value in (await ours.run(made)).items()}
            stages |= {f"ours: {name}": value for name, value in alone(made).items()}
            for name, value in stages.items() if position >= 0 else ():
                taken.setdefault(name, []).append(value)
    finally:
        await plain.close()
        await ours.close()
    totals = {name: taken.pop(name) for name in ("plain: total", "ours: total")}
    parts = [
        measurement.Row(name, float(np.median(own)), measurement.percentile(own, 0.99), 0.0)
        for name, own in taken.items()
    ]
    return [*measurement.paired(totals), *parts]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if `--compare` finds a regression."""
    parser = argparse.ArgumentParser(prog="benchmarks.conditioning", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", nargs="+", default=["toy", "robodual-7b"], choices=sorted(PROFILES))
    parser.add_argument("--length", type=int, default=90, help="hidden states of a conditioning")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--redis-url", help="a running Redis or Valkey; by default one that is started here")
    measurement.add_outputs(parser)
    options = parser.parse_args(argv)

    torch.set_num_threads(options.threads)
    rows, sizes = [], {}
    for profile in options.profile:
        engine = load_specialist(profile, device=options.device)
        made = draw(engine.width, options.length)
        sizes[profile] = len(codec.encode(made, SESSION))
        with nullcontext() if options.redis_url else EmbeddedServer() as server:
            url = options.redis_url if server is None else server.url
            own = asyncio.run(measure(url, engine, made, options.rounds))
        rows += [measurement.Row(f"{profile}, {row.name}", row.median, row.p99, row.ratio) for row in own]
        title = f"conditioning {profile}: {options.length} x {engine.width}, {sizes[profile]} bytes, {options.device}"
        measurement.show(title, own)
    facts = {"rounds": options.rounds, "length": options.length, "threads": options.threads, "record_bytes": sizes}
    return measurement.conclude(options, "conditioning", "from put to projected", rows, PACKAGES, **facts)


if __name__ == "__main__":
    sys.exit(main())
