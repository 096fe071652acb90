"""What the transport costs a step: a bare gRPC stream, ActStream with a policy that does nothing, openpi's websockets.

    python -m benchmarks.transport --rounds 500 --json transport.json

Each step carries one observation of CALVIN's cameras, raw (330 kB), and gives an action. Every client and every server
is a process of its own, as on a robot: in one process, clients would find the heap as the one before left it. Ours are
the real services with a real Valkey between them and models that answer zeros at once (noop.py), asked by the real
client. The bare stream is gRPC's own client and server, which move as many bytes each way, and look at none. openpi's
pair is the client of PyPI's openpi-client and the least server that answers it, on asyncio as openpi's own. Its wheel
asks for a NumPy before 2.0, which that client does not need: `pip install 'robodual[benchmarks]'`, then `pip install
--no-deps openpi-client`; without it, that row is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import queue
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

import grpc
from benchmarks import measurement, robots

from robodual.pair import Options, Pair
from robodual_client import DualSystemClient, observation, wire
from robodual_client.wire import rpc

PACKAGES = ("robodual", "robodual-client", "grpcio", "protobuf", "uvloop", "numpy")
OPENPI = ("openpi-client", "websockets", "msgpack")
BARE = "robodual.benchmarks.Bare"
METHOD = "Exchange"
INSTRUCTION = "push the sliding door to the left side"
ALWAYS = "every-99999"  # a conditioning at the first step alone: what is measured is the steps
SETTINGS = {
    "ROBODUAL_SPECIALIST_MAX_AGE_STEPS": "99999",
    "ROBODUAL_SPECIALIST_DEGRADED_AGE_STEPS": "99999",
    "ROBODUAL_LOG_LEVEL": "warning",
}

Step = Callable[[], object]


def serve_bare(answer_size: int, told: Connection) -> None:
    import uvloop

    async def main() -> None:
        answer = bytes(answer_size)

        async def exchange(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async for _ in requests:
                yield answer

        server = grpc.aio.server()
        method: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(exchange)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(BARE, {METHOD: method}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        told.send(port)
        await server.wait_for_termination()

    uvloop.run(main())


def serve_openpi(told: Connection) -> None:
    import numpy as np
    import websockets.asyncio.server
    import websockets.exceptions
    from openpi_client import msgpack_numpy

    async def main() -> None:
        packer = msgpack_numpy.Packer()
        actions = np.zeros((8, 7), np.float32)

        async def answer(connection: Any) -> None:
            await connection.send(packer.pack({}))  # a server says first what it is
            with contextlib.suppress(websockets.exceptions.ConnectionClosed):  # the client goes as it likes
                async for message in connection:
                    msgpack_numpy.unpackb(message)
                    await connection.send(packer.pack({"actions": actions}))

        listening = websockets.asyncio.server.serve(answer, "127.0.0.1", 0, compression=None, max_size=None)
        async with listening as server:
            told.send(next(iter(server.sockets)).getsockname()[1])
            await server.serve_forever()

    asyncio.run(main())


@contextmanager
def process(serve: Callable[..., None], *arguments: object) -> Iterator[int]:
    """Runs `serve(*arguments, told)` in a process of its own; gives the port that it tells."""
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    here, there = context.Pipe()
    child = context.Process(target=serve, args=(*arguments, there), daemon=True)
    child.start()
    there.close()
    try:
        yield here.recv()
    finally:
        child.terminate()
        child.join()


def bare_client(port: int, request: bytes, stack: ExitStack) -> Step:
    channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}"))
    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    stack.callback(requests.put, None)
    call: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{BARE}/{METHOD}")
    answers = call(iter(requests.get, None))

    def exchange() -> bytes:
        requests.put(request)
        return next(answers)

    return exchange


def openpi_client(port: int, stack: ExitStack) -> Step:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    policy = WebsocketClientPolicy("127.0.0.1", port)
    obs = robots.observation(0)
    return lambda: policy.infer(obs)


def our_client(addresses: Mapping[str, str], stream: bool, stack: ExitStack) -> Step:
    client = stack.enter_context(DualSystemClient(*robots.endpoints(addresses), schedule=ALWAYS, stream=stream))
    client.reset(INSTRUCTION)
    obs = robots.observation(0)
    return lambda: client.step(obs)


def drive(make: Callable[[ExitStack], Step], told: Connection) -> None:
    """Takes a step whenever it is told to, and tells how many seconds it took."""
    with ExitStack() as stack:
        step = make(stack)
        told.send(0.0)
        while told.recv():
            start = time.perf_counter()
            step()
            told.send(time.perf_counter() - start)


@contextmanager
def client(make: Callable[[ExitStack], Step], pause: float) -> Iterator[Callable[[], float]]:
    """A client in a process of its own: a function that has it take a step, and gives the seconds that took.

    `pause` seconds go by before each.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=drive, args=(make, there), daemon=True)
    child.start()
    there.close()
    here.recv()

    def step() -> float:
        time.sleep(pause)
        here.send(True)
        return float(here.recv())

    try:
        yield step
    finally:
        here.send(False)
        child.join()


def sizes(pair: Pair) -> tuple[bytes, int]:
    """A request of ours, and the bytes of the answer to it once eight chunks are aggregated."""
    with DualSystemClient(*robots.endpoints(pair.addresses), schedule=ALWAYS, session="sizes") as client:
        client.reset(INSTRUCTION)
        for number in range(8):
            client.step(robots.observation(number))
        sensors = client.info()["specialist"].sensors
        head = wire.ActRequest(session_id="sizes", episode=1, step=8, min_conditioning=wire.Version(episode=1))
        request = b"".join(observation.encode(robots.observation(8), sensors).act_request(head))
        with grpc.insecure_channel(pair.addresses["specialist"]) as channel:
            return request, rpc.Stub(channel, rpc.SPECIALIST).Act(request).ByteSize()


def contenders(stack: ExitStack, pause: float) -> tuple[dict[str, Callable[[], float]], dict[str, int]]:
    """The client of each, and how many bytes a step moves each way."""

    def pair() -> Pair:
        return Pair(Options(command=(sys.executable, "-m", "benchmarks.noop"), settings=SETTINGS))

    def ours(stream: bool) -> Callable[[ExitStack], Step]:
        return partial(our_client, stack.enter_context(pair()).addresses, stream)

    with pair() as measured:
        request, answer_size = sizes(measured)
    bare = stack.enter_context(process(serve_bare, answer_size))
    makers: dict[str, Callable[[ExitStack], Step]] = {
        "bare gRPC stream": partial(bare_client, bare, request),
        "ActStream": ours(stream=True),
        "Act, unary": ours(stream=False),
    }
    if find_spec("openpi_client") is not None:
        makers["openpi's websocket pair"] = partial(openpi_client, stack.enter_context(process(serve_openpi)))
    clients = {name: stack.enter_context(client(make, pause)) for name, make in makers.items()}
    return clients, {"request": len(request), "answer": answer_size}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if ActStream takes too long, or a ratio has fallen."""
    parser = argparse.ArgumentParser(prog="benchmarks.transport", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each step, as a robot has")
    parser.add_argument("--at-most", type=float, default=1.4, help="times the bare stream's time that ActStream takes")
    measurement.add_outputs(parser)
    options = parser.parse_args(argv)

    with ExitStack() as stack:
        clients, moved = contenders(stack, options.pause)
        rows = measurement.interleave_timed(clients, options.rounds, options.warmup)
    found = {row.name: row for row in rows}
    taken = 1 / found["ActStream"].ratio
    missed = []
    if taken > options.at_most:
        missed.append(f"ActStream takes {taken:.2f} times the bare stream's time, not {options.at_most:g}")
    notes = [
        f"{moved['request']:,} bytes there and {moved['answer']:,} back",
        f"ActStream takes {taken:.2f} times the bare stream's time",
    ]
    packages: tuple[str, ...] = PACKAGES
    if len(rows) == 4:
        packages += OPENPI
        if found["ActStream"].ratio < found["openpi's websocket pair"].ratio:
            missed.append("ActStream is slower than openpi's websocket pair")
    else:
        notes.append("openpi's websocket pair: not measured, openpi-client is not installed")
    title = "transport, a step"
    measurement.show(title, rows, notes)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    status = measurement.conclude(options, "transport", title, rows, packages, rounds=options.rounds, bytes=moved)
    return 1 if missed else status


if __name__ == "__main__":
    sys.exit(main())
