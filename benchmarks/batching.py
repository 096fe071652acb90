"""Concurrent sessions with batching against the same services without, in turns: throughput, and the same answers.

    python -m benchmarks.batching --sessions 8 --rounds 20 --json batching.json

Two pairs of service processes on this machine, one with max_batch 1 and one with max_batch 8; while one is asked the
other is idle. A round's time is divided by its answers: throughput, which is no session's latency. The specialist's
sessions are real clients that take their steps as fast as they are answered; the generalist's ask for one conditioning
after another. Both pairs must give the same: actions within 1e-5, reference chunks to the bit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import Sequence

import grpc
import numpy as np
from benchmarks import measurement
from benchmarks.robots import endpoints, observation

from robodual.conditioning.store import Store
from robodual.pair import Options, Pair
from robodual_client import AsyncDualSystemClient, tensors, wire
from robodual_client.wire import rpc

PACKAGES = ("robodual", "robodual-client", "torch", "grpcio")
ALWAYS = "every-99999"  # a conditioning at the first step alone
SAME = 1e-5
INSTRUCTION = "push the sliding door to the left side"

Answers = list[np.ndarray]  # one for each session


class Specialist:
    """Sessions of one pair that take steps on the conditioning of their first."""

    def __init__(self, pair: Pair, sessions: int) -> None:
        services = endpoints(pair.addresses)
        self._clients = [
            AsyncDualSystemClient(*services, session=f"robot-{number}", schedule=ALWAYS, seed=number)
            for number in range(sessions)
        ]
        self._observations = [observation(number) for number in range(sessions)]

    async def start(self) -> None:
        # One by one: hidden states that were computed in a batch may be rounded otherwise, which is not the question.
        for client, frame in zip(self._clients, self._observations):
            await client.reset(INSTRUCTION)
            await client.step(frame)

    async def run(self, turns: int) -> Answers:
        """Actions [turns, 7] of each session."""

        async def drive(number: int, client: AsyncDualSystemClient) -> np.ndarray:
            frames = self._observations[number:] + self._observations[:number]
            return np.array([await client.step(frames[turn % len(frames)]) for turn in range(turns)])

        return await asyncio.gather(*(drive(number, client) for number, client in enumerate(self._clients)))

    async def close(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients))


class Generalist:
    """Sessions of one pair that ask for conditionings."""

    def __init__(self, pair: Pair, sessions: int) -> None:
        self._store = Store(pair.redis_url, timeout=10)
        self._channel = grpc.aio.insecure_channel(pair.addresses["generalist"])
        self._stub = rpc.Stub(self._channel, rpc.GENERALIST)
        frames = [observation(number)["rgb_obs"]["rgb_static"] for number in range(sessions)]
        self._frames = [tensors.encode_image(frame) for frame in frames]
        self._step = 0

    async def start(self) -> None:
        await self.run(1)

    async def run(self, turns: int) -> Answers:
        """The reference chunk [8, 7] of each session's last conditioning."""

        async def ask(number: int) -> None:
            for turn in range(turns):
                request = wire.ConditionRequest(
                    session_id=f"thinker-{number}",
                    episode=1,
                    step=self._step + turn,
                    instruction=INSTRUCTION,
                    rgb_static=self._frames[(number + turn) % len(self._frames)],
                )
                await self._stub.Condition(request, timeout=120)

        await asyncio.gather(*(ask(number) for number in range(len(self._frames))))
        self._step += turns
        found = [await self._store.fetch(f"thinker-{number}") for number in range(len(self._frames))]
        return [conditioning.reference_actions for conditioning in found if conditioning is not None]

    async def close(self) -> None:
        await self._channel.close()
        await self._store.close()


Crew = type[Specialist] | type[Generalist]
SERVICES: dict[str, Crew] = {"specialist": Specialist, "generalist": Generalist}


async def compare(
    kind: Crew, pairs: dict[str, Pair], options: argparse.Namespace
) -> tuple[list[measurement.Row], float]:
    """Milliseconds an answer by pair, the first the baseline, and how far their answers are apart at most."""
    times: dict[str, list[float]] = {name: [] for name in pairs}
    difference = 0.0
    async with contextlib.AsyncExitStack() as cleanup:
        crews = {name: kind(pair, options.sessions) for name, pair in pairs.items()}
        for crew in crews.values():
            cleanup.push_async_callback(crew.close)
            await crew.start()
        for position in range(-1, options.rounds):
            answers = []
            for name, crew in crews.items():
                start = time.perf_counter()
                answers.append(np.array(await crew.run(options.turns)))
                seconds = time.perf_counter() - start
                if position >= 0:
                    times[name].append(seconds * 1e3 / (options.sessions * options.turns))
            difference = max(difference, float(np.abs(answers[0] - answers[1]).max()))
    return measurement.paired(times), difference


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if answers differ, batching is not fast enough, or a ratio has fallen."""
    parser = argparse.ArgumentParser(prog="benchmarks.batching", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="toy", choices=["toy", "playtable", "robodual-7b"])
    parser.add_argument("--service", nargs="+", default=list(SERVICES), choices=list(SERVICES))
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--turns", type=int, default=10, help="answers a session in a round")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="of each service; small models want one")
    parser.add_argument("--at-least", type=float, default=2.0, help="times the throughput without batching")
    measurement.add_outputs(parser)
    options = parser.parse_args(argv)

    def pair(max_batch: int) -> Pair:
        settings = {
            "OMP_NUM_THREADS": str(options.threads),
            "ROBODUAL_MAX_BATCH": str(max_batch),
            "ROBODUAL_SPECIALIST_MAX_AGE_STEPS": "1000000",
        }
        return Pair(Options(profile=options.profile, device=options.device, settings=settings))

    rows, missed, differences = [], [], {}
    with pair(1) as alone, pair(options.max_batch) as together:
        for service in options.service:
            pairs = {
                f"{service}, max_batch 1": alone,
                f"{service}, max_batch {options.max_batch}": together,
            }
            own, differences[service] = asyncio.run(compare(SERVICES[service], pairs, options))
            rows += own
            if own[1].ratio < options.at_least:
                missed.append(f"{service}: {own[1].ratio:.2f} times the throughput, not {options.at_least:g}")
            if differences[service] > (SAME if service == "specialist" else 0):
                missed.append(f"{service}: answers of the two differ by {differences[service]:.1e}")
    title = f"{options.sessions} sessions of {options.profile}, milliseconds of the service for each answer, by round"
    notes = [f"{service}: answers differ by at most {value:.1e}" for service, value in differences.items()]
    measurement.show(title, rows, notes)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    given = {
        name: getattr(options, name) for name in ("profile", "sessions", "max_batch", "rounds", "turns", "threads")
    }
    status = measurement.conclude(options, "batching", title, rows, PACKAGES, **given, differences=differences)
    return 1 if missed else status


if __name__ == "__main__":
    sys.exit(main())
