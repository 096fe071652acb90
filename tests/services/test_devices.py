"""Several engines behind one port: all of them work, and nobody sees which one answered."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence

import grpc
import numpy as np
import pytest
import torch
from replicas import Replica, act, chunk, conditioning, frame, generalist, specialist, until, version

from robodual import facts
from robodual.conditioning.store import Store
from robodual.facts import EngineFacts
from robodual.generalist import service as generalist_service
from robodual.generalist.engine import GeneralistEngine, Thought, load_generalist
from robodual.serving.metrics import Metrics
from robodual.serving.settings import GeneralistSettings, SpecialistSettings
from robodual.specialist import service as specialist_service
from robodual.specialist.engine import Answer, Features, Projected, Request, SpecialistEngine, load_specialist
from robodual.specialist.sessions import Sessions
from robodual_client import tensors, wire
from robodual_client.wire import rpc

NAMES = [f"robot{number}" for number in range(4)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several engines on a CPU, of as many threads as it has cores each, would wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Watched(SpecialistEngine):
    """An engine on a device of its own: it is given no conditioning and no features of another."""

    def __init__(self) -> None:
        plain = load_specialist("toy", device="cpu")
        super().__init__(plain.policy, plain.facts)
        self.own: list[object] = []
        self.steps = 0

    def project(self, hidden_states: object) -> Projected:
        projected = super().project(hidden_states)  # type: ignore[arg-type]
        self.own.append(projected)
        return projected

    def act(self, requests: Sequence[Request]) -> list[Answer]:
        for request in requests:
            assert any(request.conditioning is mine for mine in self.own)
            assert not isinstance(request.previous, Features) or any(request.previous is mine for mine in self.own)
        answers = super().act(requests)
        self.own += [answer.features for answer in answers]
        self.steps += len(requests)
        return answers


async def drive(replica: Replica, store: Store, steps: int) -> dict[str, list[wire.ActResponse]]:
    """Each session's answers; all sessions at once."""

    async def session(name: str) -> list[wire.ActResponse]:
        return [
            await replica.stub.Act(act(name, step, min_conditioning=version(1, 0)), timeout=60) for step in range(steps)
        ]

    for number, name in enumerate(NAMES):
        await replica.stub.Reset(wire.ResetRequest(session_id=name, episode=1, seed=number))
        await store.put(name, conditioning(1, 0))
    answers = await asyncio.gather(*map(session, NAMES))
    return dict(zip(NAMES, answers, strict=True))


async def test_a_session_stays_with_one_of_the_specialists_engines_and_gets_what_one_engine_gives(
    specialist_engine: SpecialistEngine, url: str, store: Store
) -> None:
    async with specialist(specialist_engine, url) as replica:
        alone = await drive(replica, store, steps=4)
    first, second = Watched(), Watched()
    async with specialist(first, url, second) as replica:
        warm_up = first.steps
        spread = await drive(replica, store, steps=3)
        assert (first.steps - warm_up, second.steps - warm_up) == (6, 6)

        # A session that was closed is resumed with the other engine, from what the client carries.
        moved = NAMES[2]
        for name in NAMES[1:]:
            await replica.stub.Close(wire.CloseRequest(session_id=name))
        request = act(moved, 3, min_conditioning=version(1, 0))
        request.recovery.CopyFrom(spread[moved][-1].recovery)
        request.previous_rgb_static.CopyFrom(act(moved, 2).observation.rgb_static)
        spread[moved].append(await replica.stub.Act(request, timeout=60))
        assert (first.steps - warm_up, second.steps - warm_up) == (6, 7)
    for name in NAMES:
        for one, other in zip(alone[name], spread[name]):
            np.testing.assert_allclose(chunk(other), chunk(one), atol=1e-5)


def test_a_session_is_opened_with_the_engine_that_has_the_fewest() -> None:
    sessions = Sessions(most=9, ttl=60, metrics=Metrics(), engines=3)
    assert [sessions.open(name).engine for name in "abcdef"] == [0, 1, 2, 0, 1, 2]
    sessions.close("b")
    sessions.close("c")
    sessions.close("f")
    assert [sessions.open(name).engine for name in "agcb"] == [0, 2, 1, 2]


async def test_a_request_goes_to_the_generalists_engine_that_has_least_to_do(
    generalist_engine: GeneralistEngine, url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load_generalist("toy", device="cpu")
    go = threading.Event()
    seen: dict[str, list[int]] = {"one": [], "other": []}

    def watch(name: str, engine: GeneralistEngine) -> None:
        think = engine.think

        def watched(frames: Sequence[np.ndarray], instructions: Sequence[str]) -> list[Thought]:
            if "warm up" not in instructions:
                seen[name].append(len(frames))
                go.wait(30)
            return think(frames, instructions)

        monkeypatch.setattr(engine, "think", watched)

    watch("one", generalist_engine)
    watch("other", other)
    async with generalist(generalist_engine, url, other, max_batch=2) as replica:
        calls = []
        for number in range(6):
            calls.append(replica.stub.Condition(condition(number), timeout=60))
            await until(lambda number=number: depth(replica) + sum(map(sum, seen.values())) == number + 1)
        assert seen == {"one": [1], "other": [1]}
        go.set()
        await asyncio.gather(*calls)
    assert seen == {"one": [1, 2], "other": [1, 2]}
    monkeypatch.undo()
    for number in range(6):
        (alone,) = generalist_engine.think([frame(number)], ["push the block"])
        stored = await store.fetch(f"robot{number}")
        assert stored is not None
        assert np.array_equal(stored.reference_actions, alone.reference_actions)


async def test_a_caller_that_gives_up_leaves_the_queue_at_once(
    generalist_engine: GeneralistEngine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, think, seen = threading.Event(), generalist_engine.think, []

    def held(frames: Sequence[np.ndarray], instructions: Sequence[str]) -> list[Thought]:
        if "warm up" not in instructions:
            seen.append(len(frames))
            go.wait(30)
        return think(frames, instructions)

    monkeypatch.setattr(generalist_engine, "think", held)
    async with generalist(generalist_engine, url, max_queue=1) as replica:
        running = replica.stub.Condition(condition(0), timeout=60)
        await until(lambda: seen == [1])
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await replica.stub.Condition(condition(1), timeout=0.3)
        assert refused.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: depth(replica) == 0)
        waiting = replica.stub.Condition(condition(2), timeout=60)
        await until(lambda: depth(replica) == 1)
        waiting.cancel()
        await until(lambda: depth(replica) == 0)
        go.set()
        await running
        await replica.stub.Condition(condition(3), timeout=60)
    assert seen == [1, 1], "a request whose caller was gone cost compute"


async def test_devices_are_served_by_an_engine_each(
    generalist_engine: GeneralistEngine, specialist_engine: SpecialistEngine, url: str
) -> None:
    shared = {"profile": "toy", "devices": "cpu,cpu", "port": 0, "http_port": 0, "redis_url": url}
    for serving, name, engine in (
        (generalist_service.serving(GeneralistSettings(**shared)), rpc.GENERALIST, generalist_engine),
        (specialist_service.serving(SpecialistSettings(**shared)), rpc.SPECIALIST, specialist_engine),
    ):
        async with serving as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            info = await rpc.Stub(channel, name).GetInfo(wire.InfoRequest(), timeout=30)
        assert (info.device, info.checkpoint) == ("cpu,cpu", engine.facts.checkpoint)
        assert (info.parameters, info.weight_bytes) == (engine.facts.parameters, 2 * engine.facts.weight_bytes)


def test_facts_of_several_engines_say_where_they_differ() -> None:
    one = EngineFacts("toy", "abc", "cuda:0", "float32", 10, 40, {"decoding": "free", "device_memory_bytes": "50"})
    other = EngineFacts("toy", "abc", "cuda:1", "float32", 10, 40, {"decoding": "free", "device_memory_bytes": "60"})
    both = facts.together([one, other])
    assert (both.device, both.weight_bytes, both.parameters) == ("cuda:0,cuda:1", 80, 10)
    assert both.details == {"decoding": "free", "device_memory_bytes": "50,60"}
    assert facts.together([one]) == one


def condition(number: int) -> wire.ConditionRequest:
    return wire.ConditionRequest(
        session_id=f"robot{number}",
        episode=1,
        step=number,
        rgb_static=tensors.encode_image(frame(number)),
        instruction="push the block",
    )


def depth(replica: Replica) -> float:
    """Requests that wait."""
    return float(replica.server.metrics.value(replica.server.metrics.queue_depth))
