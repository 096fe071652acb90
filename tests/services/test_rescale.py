"""Replicas behind one name: one is added and one removed while sessions go on."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from replicas import Replica, frame, generalist, specialist

from robodual.generalist.engine import GeneralistEngine
from robodual.specialist.engine import SpecialistEngine
from robodual_client import AsyncDualSystemClient
from robodual_client.calls import Replicas

NAME = "specialists.test"
A, B, C = "127.0.0.1", "127.0.0.2", "127.0.0.3"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What NAME resolves to."""
    addresses: list[str] = []
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if host != NAME:
            return real(host, port, *arguments, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return addresses


def observation(number: int) -> dict[str, Any]:
    draw = np.random.default_rng(number)
    return {
        "rgb_obs": {"rgb_static": frame(number), "rgb_gripper": frame(number, 84)},
        "depth_obs": {
            "depth_static": draw.uniform(3.5, 6.2, (200, 200)).astype(np.float32),
            "depth_gripper": draw.uniform(0, 2, (84, 84)).astype(np.float32),
        },
        "robot_obs": np.append(draw.uniform(-1, 1, 14), 1.0),
    }


def home(session: str, port: int, *hosts: str) -> str:
    return Replicas([f"{host}:{port}" for host in hosts], session).current.rpartition(":")[0]


def robots(port: int) -> dict[tuple[str, str], str]:
    """A session's name for each pair of homes that it can have: with A and B there, and with C as well."""
    found: dict[tuple[str, str], str] = {}
    for number in range(1000):
        session = f"robot-{number}"
        found.setdefault((home(session, port, A, B), home(session, port, A, B, C)), session)
    assert set(found) == {(A, A), (A, C), (B, B), (B, C)}, "a replica that is added takes sessions only for itself"
    return found


async def test_sessions_keep_their_replica_and_their_actions_while_replicas_come_and_go(
    generalist_engine: GeneralistEngine, specialist_engine: SpecialistEngine, url: str, names: list[str]
) -> None:
    async with contextlib.AsyncExitStack() as stack:

        async def replica(host: str, port: int = 0) -> tuple[Replica, contextlib.AsyncExitStack]:
            own = await stack.enter_async_context(contextlib.AsyncExitStack())
            return await own.enter_async_context(specialist(specialist_engine, url, host=host, port=port)), own

        thinker = await stack.enter_async_context(generalist(generalist_engine, url))
        first, leaving = await replica(A)
        port = first.server.port
        await replica(B, port)
        names += [A, B]
        clients = {}
        sessions = robots(port)
        for seed, (homes, session) in enumerate(sessions.items()):
            for name, address in ((session, f"dns:///{NAME}:{port}"), (f"{session}-alone", f"{B}:{port}")):
                clients[homes, name == session] = await stack.enter_async_context(
                    AsyncDualSystemClient(f"127.0.0.1:{thinker.server.port}", address, session=name, seed=seed)
                )

        async def reset() -> None:
            for client in clients.values():
                await client.reset("open the drawer")

        async def step(number: int) -> dict[tuple[str, str], str]:
            """Where each session was answered; the actions are those of a session that nothing happens to."""
            places = {}
            for homes in sessions:
                moving, still = clients[homes, True], clients[homes, False]
                np.testing.assert_array_equal(
                    await moving.step(observation(number)), await still.step(observation(number))
                )
                assert moving.last is not None
                places[homes] = moving.last.address.rpartition(":")[0]
            return places

        await reset()
        for number in range(2):
            assert await step(number) == {(before, after): before for before, after in sessions}
        await replica(C, port)
        names.append(C)
        assert await step(2) == {(before, after): before for before, after in sessions}
        await reset()
        for number in range(3):
            assert await step(number) == {(before, after): after for before, after in sessions}
        names.remove(A)
        await leaving.aclose()
        for number in range(3, 9):
            places = await step(number)
            assert places.pop((A, A)) in (B, C)
            assert places == {(before, after): after for before, after in places}
