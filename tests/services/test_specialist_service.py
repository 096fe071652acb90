import asyncio
import threading
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest
import redis
from replicas import (
    KEY,
    Replica,
    act,
    action,
    chunk,
    conditioning,
    drive,
    opened,
    specialist,
    status,
    until,
    version,
)

from robodual.conditioning import codec
from robodual.conditioning.store import Store
from robodual.serving.metrics import Metrics
from robodual.specialist.control import noise, reference_actions
from robodual.specialist.engine import SpecialistEngine
from robodual.specialist.sessions import Sessions
from robodual_client import tensors, wire


async def test_an_answer_says_what_was_done_and_on_what(replica: Replica, store: Store) -> None:
    await opened(replica, store, seed=7)
    answers = await drive(replica, range(4))
    last = answers[-1]
    assert (last.episode, last.step, last.conditioning, last.age) == (1, 3, version(1, 0), 3)
    assert not last.degraded
    assert action(last)[-1] in (-1, 1)
    assert {timing.stage for timing in last.timings} >= {"decode", "queue", "model", "total"}
    assert last.recovery.seed == 7
    assert last.recovery.reference_window == wire.REFERENCE_WINDOW_PUBLISHED
    assert last.recovery.ByteSize() < 4096
    history = tensors.decode(last.recovery.history, field="history", dtype=np.float32, shape=(4, 7))
    assert np.array_equal(history, np.stack([action(answer) for answer in answers]))


async def test_the_engine_is_given_the_cut_reference_and_the_noise_of_the_step(
    replica: Replica, store: Store, specialist_engine: SpecialistEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    plain = specialist_engine.act
    monkeypatch.setattr(specialist_engine, "act", lambda requests: seen.extend(requests) or plain(requests))
    # The replica under test was built before the patch: a second one sees it.
    async with specialist(specialist_engine, await url_of(store)) as patched:
        seen.clear()
        await opened(patched, store, seed=9, reference_window=wire.REFERENCE_WINDOW_AGE)
        await drive(patched, range(2))
    reference = conditioning(1, 0).reference_actions
    expected = reference_actions(reference, conditioning_step=0, step=1, window="age")
    assert np.array_equal(seen[1].reference_actions, expected)
    assert np.array_equal(seen[1].noise, noise(9, 1, 1))
    assert seen[0].previous is None
    assert seen[1].previous is not None


async def test_a_step_beyond_what_can_be_counted_is_refused_and_spoils_nothing(replica: Replica, store: Store) -> None:
    await opened(replica, store)

    code, message = await status(replica.stub.Act(act("robot", 2**31), timeout=30))

    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert message == "step: expected at most 2147483647, got 2147483648"
    assert (await drive(replica, range(1)))[0].step == 0


async def test_a_conditioning_past_its_age_is_looked_for_in_the_store_before_the_step_is_refused(
    replica: Replica, store: Store
) -> None:
    await opened(replica, store)
    await drive(replica, range(1))
    with redis.Redis.from_url(await url_of(store)) as client:  # stored, its announcement not here yet
        client.hset(KEY, mapping={"episode": 1, "step": 90, "record": codec.encode(conditioning(1, 90), "robot")})

    answer = await replica.stub.Act(act("robot", 91), timeout=30)

    assert answer.conditioning == version(1, 90)


async def url_of(store: Store) -> str:
    arguments = store._redis.connection_pool.connection_kwargs
    return f"redis://:{arguments['password']}@{arguments['host']}:{arguments['port']}/0"


async def test_the_latest_step_is_answered_again_with_the_same_bytes(replica: Replica, store: Store) -> None:
    await opened(replica, store)
    await drive(replica, range(2))
    first = await replica.stub.Act(act("robot", 2))
    await store.put("robot", conditioning(1, 2))
    again = await replica.stub.Act(act("robot", 2))
    assert first.SerializeToString() == again.SerializeToString()


async def test_steps_and_episodes_only_move_forward(replica: Replica, store: Store) -> None:
    await opened(replica, store)
    await drive(replica, range(3))
    for request, message in [
        (act("robot", 1), "step: the session is at step 2"),
        (act("robot", 9, episode=0), "episode: the session is at episode 1"),
        (act("robot", 0, episode=2), "2 has not begun; call Reset"),
    ]:
        code, details = await status(replica.stub.Act(request))
        assert (code, message in details) == (grpc.StatusCode.FAILED_PRECONDITION, True), details
    for episode in (0, 1):
        code, _ = await status(replica.stub.Reset(wire.ResetRequest(session_id="robot", episode=episode)))
        assert code == grpc.StatusCode.FAILED_PRECONDITION
    await drive(replica, range(3, 4))


async def test_an_episode_may_be_reset_until_its_first_action(replica: Replica, store: Store) -> None:
    await opened(replica, store, seed=1)
    await opened(replica, store, seed=2)
    (answer,) = await drive(replica, range(1))
    assert answer.recovery.seed == 2


async def test_an_episode_that_one_client_has_begun_is_not_reset_by_another(replica: Replica, store: Store) -> None:
    await opened(replica, store)  # which does not say who it is
    await opened(replica, store, client=1, seed=1)
    await opened(replica, store, client=1, seed=1)
    code, details = await status(replica.stub.Reset(wire.ResetRequest(session_id="robot", episode=1, client=2)))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "another client has begun episode 1" in details
    (answer,) = await drive(replica, range(1))
    assert answer.recovery.seed == 1
    await replica.stub.Reset(wire.ResetRequest(session_id="robot", episode=2, client=2))


async def test_an_unknown_session_is_not_found(replica: Replica) -> None:
    code, details = await status(replica.stub.Act(act("stranger", 0)))
    assert code == grpc.StatusCode.NOT_FOUND
    assert "stranger" in details


async def test_a_closed_session_is_forgotten(replica: Replica, store: Store) -> None:
    await opened(replica, store)
    assert (await replica.stub.Close(wire.CloseRequest(session_id="robot"))).was_open
    assert not (await replica.stub.Close(wire.CloseRequest(session_id="robot"))).was_open
    code, _ = await status(replica.stub.Act(act("robot", 0)))
    assert code == grpc.StatusCode.NOT_FOUND


async def test_a_few_requests_of_a_session_wait_for_the_one_before_and_no_more(replica: Replica, store: Store) -> None:
    await replica.stub.Reset(wire.ResetRequest(session_id="robot", episode=1))
    calls = [replica.stub.Act(act("robot", 0, min_conditioning=version(1, 0)), timeout=20) for _ in range(6)]
    refused, waiting = await asyncio.wait(map(asyncio.ensure_future, calls), return_when=asyncio.FIRST_COMPLETED)
    (one_more,) = refused
    code, message = await status(one_more)
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert message == "session_id: 4 requests of this session wait already; send the next when one is answered"
    await opened(replica, store, session="another")
    await drive(replica, range(1), session="another")
    await store.put("robot", conditioning(1, 0))
    answers = await asyncio.gather(*waiting)
    assert all(answer == answers[0] for answer in answers)
    await drive(replica, range(1, 2))


async def test_a_reset_that_waited_while_its_session_was_closed_is_refused(
    specialist_engine: SpecialistEngine, url: str
) -> None:
    async with specialist(specialist_engine, url, max_wait=1.0) as replica:
        await replica.stub.Reset(wire.ResetRequest(session_id="robot", episode=1))
        acting = replica.stub.Act(act("robot", 0, min_conditioning=version(1, 0)))
        await asyncio.sleep(0.2)
        waiting = replica.stub.Reset(wire.ResetRequest(session_id="robot", episode=2))
        await asyncio.sleep(0.2)
        assert (await replica.stub.Close(wire.CloseRequest(session_id="robot"))).was_open
        assert (await status(acting))[0] == grpc.StatusCode.DEADLINE_EXCEEDED
        assert await status(waiting) == (grpc.StatusCode.NOT_FOUND, "session_id: robot was closed")


async def test_a_stream_answers_in_order_and_like_single_calls(replica: Replica, store: Store) -> None:
    await opened(replica, store, "single", seed=3)
    await opened(replica, store, "stream", seed=3)
    single = await drive(replica, range(6), "single")

    async def requests() -> AsyncIterator[wire.ActRequest]:
        for step in range(6):
            yield act("stream", step, min_conditioning=version(1, 0))

    streamed = [answer async for answer in replica.stub.ActStream(requests())]
    assert [answer.step for answer in streamed] == list(range(6))
    for one, other in zip(single, streamed, strict=True):
        assert np.array_equal(action(one), action(other))


async def test_the_first_failing_request_ends_a_stream(replica: Replica, store: Store) -> None:
    await opened(replica, store)

    async def requests() -> AsyncIterator[wire.ActRequest]:
        yield act("robot", 0, min_conditioning=version(1, 0))
        yield act("robot", 1)
        yield act("robot", 0)
        yield act("robot", 2)

    stream = replica.stub.ActStream(requests())
    assert [(await stream.read()).step for _ in range(2)] == [0, 1]
    code, details = await status(stream.read())
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "step: the session is at step 1" in details
    await drive(replica, range(2, 3))


async def test_another_replica_carries_on_with_exactly_the_same_actions(
    specialist_engine: SpecialistEngine, url: str, store: Store
) -> None:
    async with specialist(specialist_engine, url) as one, specialist(specialist_engine, url) as other:
        await opened(one, store, seed=5)
        undisturbed = await drive(one, range(24))
        await store.delete("robot")
        await other.stub.Reset(wire.ResetRequest(session_id="other", episode=1, seed=5))
        await store.put("other", conditioning(1, 0))
        last = undisturbed[11]
        for step in range(12, 24):
            request = act("other", step, min_conditioning=version(1, 0))
            if step == 12:
                await other.stub.Close(wire.CloseRequest(session_id="other"))
                request.recovery.CopyFrom(last.recovery)
                request.previous_rgb_static.CopyFrom(act("robot", 11).observation.rgb_static)
            last = await other.stub.Act(request, timeout=30)
            expected = undisturbed[step]
            assert last.action == expected.action
            assert last.chunk == expected.chunk
            assert last.recovery == expected.recovery
        assert other.server.metrics.resumed._value.get() == 1


async def test_a_session_that_moves_is_told_at_once_that_the_store_has_lost_its_conditioning(
    specialist_engine: SpecialistEngine, url: str, store: Store
) -> None:
    async with specialist(specialist_engine, url) as one, specialist(specialist_engine, url) as other:
        await opened(one, store)
        *_, last = await drive(one, range(3))
        await store.delete("robot")
        request = act("robot", 3, min_conditioning=version(1, 0))
        request.recovery.CopyFrom(last.recovery)
        request.previous_rgb_static.CopyFrom(act("robot", 2).observation.rgb_static)
        began = asyncio.get_running_loop().time()
        code, details = await status(other.stub.Act(request, timeout=30))
        assert asyncio.get_running_loop().time() - began < 5
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert "no conditioning" in details
        await store.put("robot", conditioning(1, 0))
        moved = await other.stub.Act(request, timeout=30)
        stayed = await one.stub.Act(act("robot", 3, min_conditioning=version(1, 0)), timeout=30)
        assert moved.action == stayed.action


async def test_recovery_overtakes_a_replica_that_fell_behind_and_not_one_that_is_ahead(
    specialist_engine: SpecialistEngine, url: str, store: Store
) -> None:
    async with specialist(specialist_engine, url) as stale, specialist(specialist_engine, url) as fresh:
        await opened(stale, store)
        (first, second) = await drive(stale, range(2))
        request = act("robot", 2, min_conditioning=version(1, 0))
        request.recovery.CopyFrom(second.recovery)
        request.previous_rgb_static.CopyFrom(act("robot", 1).observation.rgb_static)
        await fresh.stub.Act(request, timeout=10)
        *_, last = await drive(fresh, range(3, 6))

        request = act("robot", 6)
        request.recovery.CopyFrom(last.recovery)
        request.previous_rgb_static.CopyFrom(act("robot", 5).observation.rgb_static)
        returned = await stale.stub.Act(request, timeout=10)
        carried_on = await fresh.stub.Act(act("robot", 6), timeout=10)
        assert returned.action == carried_on.action

        request = act("robot", 7)
        request.recovery.CopyFrom(first.recovery)
        request.previous_rgb_static.CopyFrom(act("robot", 0).observation.rgb_static)
        ahead = await stale.stub.Act(request, timeout=10)
        carried_on = await fresh.stub.Act(act("robot", 7), timeout=10)
        assert ahead.action == carried_on.action


async def test_sessions_in_one_batch_get_the_answers_that_they_get_alone(
    specialist_engine: SpecialistEngine, url: str, store: Store
) -> None:
    names = [f"robot{number}" for number in range(6)]
    async with specialist(specialist_engine, url, max_batch=1) as single, specialist(specialist_engine, url) as batched:
        for number, name in enumerate(names):
            await single.stub.Reset(wire.ResetRequest(session_id=name, episode=1, seed=number))
            await batched.stub.Reset(wire.ResetRequest(session_id=name, episode=1, seed=number))
            await store.put(name, conditioning(1, number))

        async def run(replica: Replica, name: str, number: int) -> list[wire.ActResponse]:
            requests = [act(name, step, min_conditioning=version(1, number)) for step in range(number, number + 5)]
            return [await replica.stub.Act(request, timeout=60) for request in requests]

        alone = [await run(single, name, number) for number, name in enumerate(names)]
        together = await asyncio.gather(*(run(batched, name, number) for number, name in enumerate(names)))
        assert batched.server.metrics.batch_size._sum.get() > batched_count(batched), "nothing was batched"
    for expected, answers in zip(alone, together, strict=True):
        for one, other in zip(expected, answers, strict=True):
            np.testing.assert_allclose(chunk(one), chunk(other), atol=1e-5)
            np.testing.assert_allclose(action(one), action(other), atol=1e-5)


def batched_count(replica: Replica) -> float:
    (family,) = replica.server.metrics.batch_size.collect()
    return next(sample.value for sample in family.samples if sample.name.endswith("_count"))


async def test_there_are_so_many_sessions_and_idle_ones_make_room(
    specialist_engine: SpecialistEngine, url: str
) -> None:
    async with specialist(specialist_engine, url, max_sessions=2, session_ttl=0.4) as replica:
        for name in ("one", "two"):
            await replica.stub.Reset(wire.ResetRequest(session_id=name, episode=1))
        code, details = await status(replica.stub.Reset(wire.ResetRequest(session_id="three", episode=1)))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "all 2 sessions" in details
        sessions = replica.server.metrics.sessions
        assert sessions._value.get() == 2
        await until(lambda: sessions._value.get() == 0)  # nobody asks for their places
        await replica.stub.Reset(wire.ResetRequest(session_id="three", episode=1))
        code, _ = await status(replica.stub.Act(act("one", 0)))
        assert code == grpc.StatusCode.NOT_FOUND


def test_a_new_session_takes_the_place_of_one_whose_time_is_over_and_of_no_other() -> None:
    sessions = Sessions(most=2, ttl=0.0, metrics=Metrics())
    sessions.open("over")
    busy = sessions.open("busy")
    busy.used_at += 60
    sessions.open("new")
    assert [session.identity for session in sessions.all()] == ["busy", "new"]


async def test_a_drain_answers_what_is_in_flight_and_ends_streams(
    specialist_engine: SpecialistEngine, url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, plain = threading.Event(), specialist_engine.act
    go.set()
    monkeypatch.setattr(specialist_engine, "act", lambda requests: go.wait(30) and plain(requests))
    async with specialist(specialist_engine, url) as replica:
        await opened(replica, store)
        await opened(replica, store, "stream")
        stream = replica.stub.ActStream()
        await stream.write(act("stream", 0, min_conditioning=version(1, 0)))
        assert (await stream.read()).step == 0
        go.clear()
        call = asyncio.ensure_future(replica.stub.Act(act("robot", 0, min_conditioning=version(1, 0)), timeout=30))
        await until(lambda: replica.server._calls._active == 2)
        started = asyncio.get_running_loop().time()
        drain = asyncio.ensure_future(replica.server.drain())
        await until(lambda: not replica.server.readiness.ready)
        assert not call.done()
        go.set()
        await drain
        assert asyncio.get_running_loop().time() - started < 5
        assert (await call).step == 0
        code, details = await status(stream.read())
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "another replica" in details
        assert not replica.server.readiness.ready
        assert (await status(replica.stub.Act(act("robot", 1), timeout=5)))[0] == grpc.StatusCode.UNAVAILABLE
