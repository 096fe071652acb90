"""Services in this process over real gRPC on loopback, and requests for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import torch

from robodual.conditioning.record import Conditioning
from robodual.generalist import service as generalist_service
from robodual.generalist.engine import GeneralistEngine
from robodual.serving.server import Server
from robodual.serving.settings import GeneralistSettings, SpecialistSettings
from robodual.specialist import service as specialist_service
from robodual.specialist.engine import SpecialistEngine
from robodual_client import tensors, wire
from robodual_client.wire import rpc

WIDTH = 64


@dataclass(frozen=True)
class Replica:
    server: Server
    channel: grpc.aio.Channel
    stub: rpc.Stub


@asynccontextmanager
async def specialist(
    engine: SpecialistEngine, url: str, *others: SpecialistEngine, **settings: Any
) -> AsyncIterator[Replica]:
    chosen = SpecialistSettings(**{"port": 0, "http_port": 0, "redis_url": url} | settings)
    serving = specialist_service.serving(chosen, engine, *others)
    async with serving as server, _connected(server, rpc.SPECIALIST) as replica:
        yield replica


@asynccontextmanager
async def generalist(
    engine: GeneralistEngine, url: str, *others: GeneralistEngine, **settings: Any
) -> AsyncIterator[Replica]:
    chosen = GeneralistSettings(**{"port": 0, "http_port": 0, "redis_url": url} | settings)
    serving = generalist_service.serving(chosen, engine, *others)
    async with serving as server, _connected(server, rpc.GENERALIST) as replica:
        yield replica


@asynccontextmanager
async def _connected(server: Server, service: str) -> AsyncIterator[Replica]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield Replica(server, channel, rpc.Stub(channel, service))


def conditioning(episode: int, step: int) -> Conditioning:
    """A conditioning that differs with its version."""
    draw = np.random.default_rng((episode, step))
    actions = draw.uniform(-1, 1, (8, 7)).astype(np.float32)
    states = torch.from_numpy(draw.normal(size=(20 + step % 3, WIDTH)).astype(np.float32)).bfloat16()
    return Conditioning(episode, step, actions, states)


def frame(number: int, size: int = 200) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)


def observation(number: int) -> wire.Observation:
    draw = np.random.default_rng(number + 10_000)
    return wire.Observation(
        rgb_static=tensors.encode_image(frame(number)),
        rgb_gripper=tensors.encode_image(frame(number, 84)),
        depth_static=tensors.encode(draw.uniform(3.5, 6.2, (200, 200)).astype(np.float32)),
        depth_gripper=tensors.encode(draw.uniform(0, 2, (84, 84)).astype(np.float32)),
        proprio=tensors.encode(draw.normal(size=7).astype(np.float32)),
    )


def act(session: str, step: int, *, episode: int = 1, **fields: Any) -> wire.ActRequest:
    return wire.ActRequest(session_id=session, episode=episode, step=step, observation=observation(step), **fields)


def action(response: wire.ActResponse) -> np.ndarray:
    return tensors.decode(response.action, field="action", dtype=np.float32, shape=(7,))


def chunk(response: wire.ActResponse) -> np.ndarray:
    return tensors.decode(response.chunk, field="chunk", dtype=np.float32, shape=(8, 7))


def version(episode: int, step: int) -> wire.Version:
    return wire.Version(episode=episode, step=step)


async def until(condition: Callable[[], bool]) -> None:
    """Returns when `condition` holds; fails after ten seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.01)
