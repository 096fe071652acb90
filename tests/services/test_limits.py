"""Limits of one token: how many sessions and open calls it may have, and how many requests it may make a second."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import pytest
from replicas import act, conditioning, frame, generalist, specialist, version

from robodual.conditioning.store import Store
from robodual.generalist.engine import GeneralistEngine
from robodual.serving import leases, rate, server
from robodual.specialist.engine import SpecialistEngine
from robodual_client import tensors, wire
from robodual_client.wire import rpc

ONE, TWO = "the-first-token-1", "the-second-token-2"
TOKENS = f"one:{ONE},two:{TWO}"
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def by(token: str) -> dict[str, Any]:
    return {"metadata": [("authorization", f"Bearer {token}")], "timeout": 60}


def reset(session: str) -> wire.ResetRequest:
    return wire.ResetRequest(session_id=session, episode=1)


async def refused(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details() or ""


async def test_a_token_that_has_its_sessions_open_leaves_room_for_others(
    specialist_engine: SpecialistEngine, url: str
) -> None:
    async with specialist(specialist_engine, url, tokens=TOKENS, max_sessions_per_token=2, max_sessions=3) as replica:
        for session in ("a", "b", "a"):
            await replica.stub.Reset(reset(session), **by(ONE))
        code, message = await refused(replica.stub.Reset(reset("c"), **by(ONE)))
        assert (code, "this token has 2 sessions open" in message) == (EXHAUSTED, True)
        await replica.stub.Reset(reset("d"), **by(TWO))
        code, message = await refused(replica.stub.Reset(reset("e"), **by(TWO)))
        assert (code, "all 3 sessions are taken" in message) == (EXHAUSTED, True)
        await replica.stub.Close(wire.CloseRequest(session_id="a"), **by(ONE))
        await replica.stub.Reset(reset("c"), **by(ONE))


async def test_the_generalist_keeps_the_sessions_of_a_token_to_as_many(
    generalist_engine: GeneralistEngine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(leases, "time", SimpleNamespace(monotonic=lambda: now))

    def glance(session: str) -> wire.ConditionRequest:
        picture = tensors.encode_image(frame(0))
        return wire.ConditionRequest(session_id=session, episode=1, rgb_static=picture, instruction="push")

    async with generalist(generalist_engine, url, tokens=TOKENS, max_sessions_per_token=2) as replica:
        await replica.stub.Condition(glance("a"), **by(ONE))
        await replica.stub.Reset(reset("b"), **by(ONE))
        await replica.stub.Reset(reset("b"), **by(ONE))
        code, message = await refused(replica.stub.Condition(glance("c"), **by(ONE)))
        assert (code, "this token has 2 sessions in use" in message) == (EXHAUSTED, True)
        await replica.stub.Reset(reset("c"), **by(TWO))
        await replica.stub.Close(wire.CloseRequest(session_id="a"), **by(ONE))
        await replica.stub.Reset(reset("d"), **by(ONE))
        now += 601  # conditioning_ttl, and one
        for session in ("e", "f"):
            await replica.stub.Reset(reset(session), **by(ONE))


async def test_messages_of_streams_count_as_calls_do_and_so_do_those_over_http(
    specialist_engine: SpecialistEngine, url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    async with specialist(specialist_engine, url, tokens=TOKENS, max_rate=4) as replica:
        await replica.stub.Reset(reset("robot"), **by(ONE))
        await store.put("robot", conditioning(1, 0))
        stream = replica.stub.ActStream(metadata=by(ONE)["metadata"])
        for step in range(3):
            await stream.write(act("robot", step, min_conditioning=version(1, 0)))
            assert (await stream.read()).step == step
        await stream.write(act("robot", 3))
        for call in (stream.read(), replica.stub.GetInfo(wire.InfoRequest(), **by(ONE))):
            code, message = await refused(call)
            assert code == EXHAUSTED
            assert message == "max_rate: this token may make 4 requests a second; send fewer, or try again in 250 ms"

        base = f"http://127.0.0.1:{replica.server.http_port}"
        async with httpx.AsyncClient(base_url=base, trust_env=False) as http:
            late = await http.get("/info", headers={"Authorization": f"Bearer {ONE}"})
            assert (late.status_code, late.headers["retry-after"], late.json()["detail"]) == (429, "1", message)
            assert (await http.get("/info", headers={"Authorization": f"Bearer {TWO}"})).status_code == 200
            assert (await http.get("/healthz")).status_code == 200
        assert (await replica.stub.GetInfo(wire.InfoRequest(), **by(TWO))).service == "specialist"


async def test_a_token_with_its_share_of_open_calls_leaves_the_port_to_others(
    specialist_engine: SpecialistEngine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    monkeypatch.setattr(server, "SHARE", 6)
    async with specialist(specialist_engine, url, tokens=TOKENS, max_sessions=1) as replica:
        # A call of one message is open too while that does not come, and before anything counts it as a request.
        idle = [replica.stub.ActStream(metadata=by(ONE)["metadata"]) for _ in range(3)]
        act = replica.channel.stream_stream(f"/{rpc.SPECIALIST}/Act")
        idle += [act(nothing(), metadata=by(ONE)["metadata"]) for _ in range(3)]
        await asyncio.sleep(0.3)
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{replica.server.port}", options=[("grpc.use_local_subchannel_pool", 1)]
        ) as elsewhere:
            stub = rpc.Stub(elsewhere, rpc.SPECIALIST)
            code, message = await refused(stub.GetInfo(wire.InfoRequest(), **by(ONE)))
            assert (code, "this token has 6 calls open, the most that it may" in message) == (EXHAUSTED, True)
            assert replica.server.metrics.answered()["RESOURCE_EXHAUSTED"] == 1
            assert (await stub.GetInfo(wire.InfoRequest(), **by(TWO))).service == "specialist"
            for call in idle:
                call.cancel()
            await asyncio.sleep(0.3)
            assert (await stub.GetInfo(wire.InfoRequest(), **by(ONE))).service == "specialist"


async def test_an_owner_of_all_sessions_has_calls_for_them(specialist_engine: SpecialistEngine, url: str) -> None:
    async with specialist(specialist_engine, url, tokens=TOKENS) as replica:
        streams = [replica.stub.ActStream(metadata=by(ONE)["metadata"]) for _ in range(2 * 256)]
        await asyncio.gather(*(replica.stub.GetInfo(wire.InfoRequest(), **by(ONE)) for _ in range(256)))
        for stream in streams:
            stream.cancel()
