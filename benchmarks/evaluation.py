"""What an evaluation costs beside its models: the client's own time a control step, and two workers against one.

    python -m benchmarks.evaluation --rounds 5 --json evaluation.json

The overhead is what passes between the end of one `env.step` and the start of the next, with services that do nothing,
in another process: the oracle, encoding the observation, both round trips, decoding the action, bookkeeping. The
simulator is the play table with both cameras; nothing is filmed. The workers run it with a policy that costs nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from benchmarks import measurement

from robodual_client import DualSystemClient, tensors, wire
from robodual_client.calvin import Options, evaluate
from robodual_client.calvin.annotations import load
from robodual_client.calvin.progress import Silent
from robodual_client.calvin.rollout import run_sequence
from robodual_client.calvin.sequences import published
from robodual_client.playtable import PlayTable
from robodual_client.wire import rpc

PACKAGES = ("robodual-client", "grpcio", "protobuf", "numpy", "pybullet")
LIMIT = 5.0  # milliseconds, the median overhead of a step
SPEEDUP = 1.7  # of two workers on two idle cores


class Nothing:
    """Both services, without models: the arm holds still."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._action = tensors.encode(np.array([0, 0, 0, 0, 0, 0, 1], np.float32))
        self._chunk = tensors.encode(np.zeros((8, 7), np.float32))

    def Condition(self, request: wire.ConditionRequest, context: Any) -> wire.ConditionResponse:
        version = wire.Version(episode=request.episode, step=request.step)
        return wire.ConditionResponse(version=version, latest=version, stored=True)

    def Act(self, request: wire.ActRequest, context: Any) -> wire.ActResponse:
        asked = request.min_conditioning
        return wire.ActResponse(
            episode=request.episode,
            step=request.step,
            action=self._action,
            chunk=self._chunk,
            conditioning=asked,
            age=request.step - asked.step,
        )

    def ActStream(self, requests: Iterator[wire.ActRequest], context: Any) -> Iterator[wire.ActResponse]:
        return (self.Act(request, context) for request in requests)

    def Reset(self, request: wire.ResetRequest, context: Any) -> wire.ResetResponse:
        return wire.ResetResponse()

    def Close(self, request: wire.CloseRequest, context: Any) -> wire.CloseResponse:
        return wire.CloseResponse(was_open=True)

    def GetInfo(self, request: wire.InfoRequest, context: Any) -> wire.InfoResponse:
        sensors = ["rgb_static", "rgb_gripper", "depth_static", "depth_gripper", "proprio"]
        return wire.InfoResponse(service=self._service, profile="nothing", sensors=sensors)


def serve() -> None:
    """Both services until standard input ends; their address is the one line on standard output."""
    server = grpc.server(futures.ThreadPoolExecutor(8))
    for service, name in ((rpc.GENERALIST, "generalist"), (rpc.SPECIALIST, "specialist")):
        server.add_generic_rpc_handlers((rpc.handler(service, Nothing(name)),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    sys.stdin.read()


@contextmanager
def services() -> Iterator[str]:
    """The address of both."""
    command = [sys.executable, "-m", "benchmarks.evaluation", "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


class Timed(PlayTable):
    """Keeps when each step began and ended."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []
        super().__init__()

    def step(self, action: Sequence[float] | np.ndarray) -> tuple[dict[str, Any], float, bool, dict[str, Any]]:
        began = time.perf_counter()
        result = super().step(action)
        self.times.append((began, time.perf_counter()))
        return result


def overhead(rounds: int, steps: int) -> list[measurement.Row]:
    """Milliseconds between steps, by how the observation travels; unary calls are the baseline."""
    milliseconds: dict[str, list[float]] = {"a call a step": [], "ActStream": []}
    simulator: list[float] = []
    with services() as address, closing(Timed()) as env:
        for _ in range(rounds):
            for name, stream in (("a call a step", False), ("ActStream", True)):
                env.times.clear()
                with DualSystemClient(address, address, stream=stream) as client:
                    run_sequence(env, client, published()[0], load(), ep_len=steps)
                starts, ends = zip(*env.times)
                milliseconds[name] += [(start - end) * 1e3 for start, end in zip(starts[1:], ends)]
                simulator += [(end - start) * 1e3 for start, end in env.times]
    baseline = float(np.median(milliseconds["a call a step"]))
    rows = [
        measurement.Row(name, float(np.median(own)), float(np.quantile(own, 0.99)), baseline / float(np.median(own)))
        for name, own in milliseconds.items()
    ]
    median = float(np.median(simulator))
    return [*rows, measurement.Row("env.step itself", median, float(np.quantile(simulator, 0.99)), baseline / median)]


def workers(rounds: int, sequences: int, steps: int) -> list[measurement.Row]:
    """Milliseconds a sequence with one and with two workers, processes started and ended."""
    milliseconds: dict[int, list[float]] = {1: [], 2: []}
    run = partial(Options, policy="zero", env_options={"render": True}, numbers=tuple(range(sequences)), ep_len=steps)
    for _ in range(rounds):
        for count, own in milliseconds.items():
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                evaluate(run(out=Path(folder), workers=count), Silent())
                own.append((time.perf_counter() - began) * 1e3 / sequences)
    return [
        measurement.Row(
            f"{count} worker{'s' if count > 1 else ''}, a sequence",
            float(np.median(own)),
            max(own),
            float(np.median(np.divide(milliseconds[1], own))),
        )
        for count, own in milliseconds.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if a limit is missed, or if `--compare` finds a regression."""
    parser = argparse.ArgumentParser(prog="benchmarks.evaluation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120, help="control steps a sequence")
    parser.add_argument("--sequences", type=int, default=8, help="sequences a round, of the workers")
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--compare", type=Path, help="an earlier record, to flag ratios that have fallen")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        serve()
        return 0
    own = overhead(options.rounds, options.steps)
    measurement.show("between two steps of the simulator", own)
    crew = workers(options.rounds, options.sequences, options.steps)
    measurement.show(f"workers, {options.sequences} sequences of {options.steps} steps, started and ended", crew)
    missed = []
    if own[1].median >= LIMIT:
        missed.append(f"overhead: {own[1].median:.2f} ms a step, {LIMIT:g} are allowed")
    if crew[1].ratio < SPEEDUP:
        missed.append(f"workers: two are {crew[1].ratio:.2f} times one, on idle cores it should be {SPEEDUP:g}")
    rows = [*own, *crew]
    if options.json:
        facts = {"rounds": options.rounds, "steps": options.steps, "machine": measurement.machine(PACKAGES)}
        measurement.write(options.json, "evaluation", rows, **facts)
    missed += measurement.regressions(options.compare, rows) if options.compare else []
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
