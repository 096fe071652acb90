import asyncio
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest
from replicas import Replica, conditioning, frame, generalist, until, version
from structlog.testing import CapturingLogger

from robodual.conditioning.record import Version
from robodual.conditioning.store import Store
from robodual.conditioning.valkey import EmbeddedServer
from robodual.generalist import service
from robodual.generalist.engine import GeneralistEngine
from robodual_client import tensors, wire

Refused = grpc.aio.AioRpcError


def request(session: str, step: int, *, episode: int = 1, instruction: str = "push the block") -> wire.ConditionRequest:
    return wire.ConditionRequest(
        session_id=session,
        episode=episode,
        step=step,
        rgb_static=tensors.encode_image(frame(step)),
        instruction=instruction,
    )


@pytest.fixture
async def thinker(generalist_engine: GeneralistEngine, url: str) -> AsyncIterator[Replica]:
    async with generalist(generalist_engine, url) as replica:
        yield replica


async def test_what_the_engine_thinks_is_in_the_store_bit_for_bit(
    thinker: Replica, store: Store, generalist_engine: GeneralistEngine
) -> None:
    answer = await thinker.stub.Condition(request("robot", 7), timeout=60)
    assert (answer.version, answer.latest, answer.stored) == (version(1, 7), version(1, 7), True)
    assert {timing.stage for timing in answer.timings} == {"decode", "queue", "think", "store", "total"}
    (thought,) = generalist_engine.think([frame(7)], ["push the block"])
    stored = await store.fetch("robot")
    assert stored is not None
    assert np.array_equal(stored.reference_actions, thought.reference_actions)
    assert stored.hidden_states.equal(thought.hidden_states)
    assert answer.malformed_tokens == thought.malformed_tokens
    counted = thinker.server.metrics.registry.get_sample_value
    assert (counted("robodual_forwards_count"), counted("robodual_forwards_sum")) == (1, thought.forwards)
    assert 2 <= thought.forwards < 64


async def test_a_late_older_frame_is_answered_but_not_stored(thinker: Replica, store: Store) -> None:
    await store.put("robot", conditioning(1, 9))
    answer = await thinker.stub.Condition(request("robot", 7), timeout=60)
    assert (answer.version, answer.latest, answer.stored) == (version(1, 7), version(1, 9), False)
    stored = await store.fetch("robot")
    assert stored is not None
    assert stored.version == Version(1, 9)


async def test_sessions_that_ask_together_get_what_they_get_alone(
    thinker: Replica, store: Store, generalist_engine: GeneralistEngine
) -> None:
    instructions = ["push", "open the drawer and take the red block out of it", "lift the blue block"]
    calls = [
        thinker.stub.Condition(request(f"robot{n}", n, instruction=text), timeout=60)
        for n, text in enumerate(instructions)
    ]
    await asyncio.gather(*calls)
    for n, text in enumerate(instructions):
        (alone,) = generalist_engine.think([frame(n)], [text])
        stored = await store.fetch(f"robot{n}")
        assert stored is not None
        assert np.array_equal(stored.reference_actions, alone.reference_actions)
        np.testing.assert_allclose(stored.hidden_states.float(), alone.hidden_states.float(), atol=1e-2)


async def test_reset_drops_earlier_episodes_and_close_drops_all(thinker: Replica, store: Store) -> None:
    await store.put("robot", conditioning(1, 9))
    await thinker.stub.Reset(wire.ResetRequest(session_id="robot", episode=1))
    assert await store.fetch("robot") is not None
    await thinker.stub.Reset(wire.ResetRequest(session_id="robot", episode=2))
    assert await store.fetch("robot") is None
    await store.put("robot", conditioning(2, 0))
    assert (await thinker.stub.Close(wire.CloseRequest(session_id="robot"))).was_open
    assert await store.fetch("robot") is None
    assert not (await thinker.stub.Close(wire.CloseRequest(session_id="robot"))).was_open


async def test_a_lost_store_is_unavailable_until_it_is_back(
    generalist_engine: GeneralistEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CapturingLogger()
    monkeypatch.setattr(service, "logger", log)
    valkey = EmbeddedServer()
    valkey.start()
    await _lose_store(generalist_engine, valkey)
    assert [call.args[0] for call in log.calls] == ["store out of reach", "store back"]


async def _lose_store(engine: GeneralistEngine, valkey: EmbeddedServer) -> None:
    async with generalist(engine, valkey.url, redis_timeout=0.5) as thinker:
        await thinker.stub.Condition(request("robot", 0), timeout=60)
        await until(lambda: thinker.server.readiness.ready)
        valkey.stop()
        with pytest.raises(Refused) as refused:
            await thinker.stub.Condition(request("robot", 1), timeout=60)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "store" in (refused.value.details() or "")
        await until(lambda: not thinker.server.readiness.ready)
        valkey.start()
        answer = await thinker.stub.Condition(request("robot", 2), timeout=60)
        assert answer.stored
        await until(lambda: thinker.server.readiness.ready)
    valkey.stop()


async def test_a_full_queue_turns_requests_away(generalist_engine: GeneralistEngine, url: str) -> None:
    async with generalist(generalist_engine, url, max_queue=2, max_batch=1) as thinker:
        calls = [thinker.stub.Condition(request(f"robot{n}", n), timeout=60) for n in range(8)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, Refused)]
        assert refused
        assert {outcome.code() for outcome in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert len(refused) < len(outcomes)


async def test_an_instruction_whose_prompt_is_too_long_for_a_record_costs_no_thought(thinker: Replica) -> None:
    with pytest.raises(Refused) as refused:
        await thinker.stub.Condition(request("robot", 0, instruction="\N{ROBOT FACE}" * 512), timeout=60)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    details = refused.value.details() or ""
    assert details.startswith("instruction: its prompt is ")
    assert "expected at most 640" in details
    answer = await thinker.stub.Condition(request("robot", 0, instruction="push " * 102), timeout=60)
    assert answer.stored
