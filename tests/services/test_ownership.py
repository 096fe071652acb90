"""A session belongs to the token that opened it, on both services, over real gRPC and a real Valkey."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import redis
from replicas import Replica, act, action, conditioning, frame, generalist, specialist, until, version

from robodual.conditioning.store import Store
from robodual.generalist.engine import GeneralistEngine
from robodual.serving import auth
from robodual.specialist.engine import SpecialistEngine
from robodual_client import tensors, wire

Refused = grpc.aio.AioRpcError
OLD, NEW, OTHER, NAMELESS = "alices-first-token", "alices-second-token", "token-of-mallory-1", "a-token-without-name"
TOKENS = f"alice:{OLD},alice:{NEW},mallory:{OTHER},{NAMELESS}"
SESSION = "alices-robot"
MESSAGE = "session_id: this session belongs to another token; use the token that opened it, or another session id"
Calls = list[tuple[str, Callable[[], Awaitable[Any]]]]


def by(token: str) -> dict[str, Any]:
    return {"metadata": [("authorization", f"Bearer {token}")], "timeout": 60}


def glance(step: int, session: str = SESSION, episode: int = 1) -> wire.ConditionRequest:
    picture = tensors.encode_image(frame(step))
    return wire.ConditionRequest(
        session_id=session, episode=episode, step=step, rgb_static=picture, instruction="push the block"
    )


def reset(episode: int = 1, session: str = SESSION) -> wire.ResetRequest:
    return wire.ResetRequest(session_id=session, episode=episode)


def close(session: str = SESSION) -> wire.CloseRequest:
    return wire.CloseRequest(session_id=session)


async def streamed(replica: Replica, requests: list[wire.ActRequest], token: str) -> list[wire.ActResponse]:
    stream = replica.stub.ActStream(metadata=by(token)["metadata"])
    answers = []
    for request in requests:
        await stream.write(request)
        answers.append(await stream.read())
    stream.cancel()
    return answers


async def refused(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(Refused) as error:
        await call
    return error.value.code(), error.value.details() or ""


DENIED = (grpc.StatusCode.PERMISSION_DENIED, MESSAGE)


@pytest.fixture
async def first(specialist_engine: SpecialistEngine, url: str) -> AsyncIterator[Replica]:
    async with specialist(specialist_engine, url, tokens=TOKENS) as replica:
        yield replica


@pytest.fixture
async def second(specialist_engine: SpecialistEngine, url: str) -> AsyncIterator[Replica]:
    async with specialist(specialist_engine, url, tokens=TOKENS) as replica:
        yield replica


@pytest.fixture
async def thinker(generalist_engine: GeneralistEngine, url: str) -> AsyncIterator[Replica]:
    async with generalist(generalist_engine, url, tokens=TOKENS) as replica:
        yield replica


async def test_without_a_valid_token_neither_service_answers_anything(first: Replica, thinker: Replica) -> None:
    calls = [
        *((replica.stub, "GetInfo", wire.InfoRequest()) for replica in (first, thinker)),
        *((replica.stub, "Reset", reset()) for replica in (first, thinker)),
        *((replica.stub, "Close", close()) for replica in (first, thinker)),
        (first.stub, "Act", act(SESSION, 0)),
        (thinker.stub, "Condition", glance(0)),
    ]
    for stub, method, request in calls:
        for metadata in ((), by(OLD[:-1])["metadata"], by(f"alice:{OLD}")["metadata"]):
            code, message = await refused(getattr(stub, method)(request, metadata=metadata, timeout=60))
            assert (code, "expected metadata 'Bearer TOKEN'" in message) == (grpc.StatusCode.UNAUTHENTICATED, True)
    assert (await refused(streamed(first, [act(SESSION, 0)], OLD[:-1])))[0] == grpc.StatusCode.UNAUTHENTICATED
    for replica in (first, thinker):
        base = f"http://127.0.0.1:{replica.server.http_port}"
        async with httpx.AsyncClient(base_url=base, trust_env=False) as http:
            for path in ("/info", "/metrics", "/openapi.json"):
                for headers in ({}, {"Authorization": f"Bearer {OLD[:-1]}"}):
                    assert (await http.get(path, headers=headers)).status_code == 401


async def test_another_token_neither_uses_nor_resets_nor_closes_a_session(
    first: Replica, thinker: Replica, store: Store
) -> None:
    await first.stub.Reset(reset(), **by(OLD))
    await thinker.stub.Reset(reset(), **by(OLD))
    await thinker.stub.Condition(glance(0), **by(OLD))
    await first.stub.Act(act(SESSION, 0, min_conditioning=version(1, 0)), **by(OLD))
    before = await store.fetch(SESSION)
    assert before is not None
    recovery = (await first.stub.Act(act(SESSION, 1), **by(OLD))).recovery
    moved = act(SESSION, 2, recovery=recovery, previous_rgb_static=tensors.encode_image(frame(1)))

    attempts: Calls = [
        ("Act", lambda: first.stub.Act(act(SESSION, 2), **by(OTHER))),
        ("Act, recovering", lambda: first.stub.Act(moved, **by(OTHER))),
        ("ActStream", lambda: streamed(first, [act(SESSION, 2)], OTHER)),
        ("Act without a name", lambda: first.stub.Act(act(SESSION, 2), **by(NAMELESS))),
        ("Reset", lambda: first.stub.Reset(reset(2), **by(OTHER))),
        ("Close", lambda: first.stub.Close(close(), **by(OTHER))),
        ("Condition", lambda: thinker.stub.Condition(glance(3), **by(OTHER))),
        ("Reset of the generalist", lambda: thinker.stub.Reset(reset(2), **by(OTHER))),
        ("Close of the generalist", lambda: thinker.stub.Close(close(), **by(OTHER))),
    ]
    for name, attempt in attempts:
        assert await refused(attempt()) == DENIED, name

    after = await store.fetch(SESSION)
    assert after is not None
    assert after.version == before.version
    assert (await first.stub.Act(act(SESSION, 2), **by(OLD))).step == 2
    assert (await first.stub.Close(close(), **by(OLD))).was_open
    assert (await thinker.stub.Close(close(), **by(OLD))).was_open


async def test_a_stream_that_was_let_in_is_let_into_its_own_sessions_only(first: Replica, store: Store) -> None:
    for session, token in (("alices", OLD), ("mallorys", OTHER)):
        await first.stub.Reset(reset(session=session), **by(token))
        await store.put(session, conditioning(1, 0))
    requests = [act(session, 0, min_conditioning=version(1, 0)) for session in ("mallorys", "alices")]
    assert await refused(streamed(first, requests, OTHER)) == DENIED


async def test_a_session_is_anyones_again_once_it_is_closed_at_both(first: Replica, thinker: Replica) -> None:
    for replica in (first, thinker):
        await replica.stub.Reset(reset(), **by(OLD))
        assert await refused(replica.stub.Reset(reset(), **by(OTHER))) == DENIED
        await replica.stub.Close(close(), **by(OLD))
        await replica.stub.Reset(reset(), **by(OTHER))


async def test_another_token_of_the_same_name_goes_on_with_the_episode(first: Replica, thinker: Replica) -> None:
    await first.stub.Reset(reset(), **by(OLD))
    await thinker.stub.Condition(glance(0), **by(OLD))
    await first.stub.Act(act(SESSION, 0, min_conditioning=version(1, 0)), **by(OLD))

    await thinker.stub.Condition(glance(1), **by(NEW))
    answer = await first.stub.Act(act(SESSION, 1, min_conditioning=version(1, 1)), **by(NEW))

    assert answer.conditioning == version(1, 1)
    await first.stub.Reset(reset(2), **by(NEW))
    assert (await first.stub.Close(close(), **by(NEW))).was_open


async def test_a_session_moves_to_another_replica_with_its_owner_alone(
    first: Replica, second: Replica, thinker: Replica
) -> None:
    await first.stub.Reset(reset(), **by(OLD))
    await thinker.stub.Condition(glance(0), **by(OLD))
    answers = [await first.stub.Act(act(SESSION, step, min_conditioning=version(1, 0)), **by(OLD)) for step in range(3)]
    moved = act(SESSION, 2, recovery=answers[1].recovery, previous_rgb_static=tensors.encode_image(frame(1)))

    # Whoever came before them at that replica has no say: in the store the session is its owner's.
    await second.stub.Reset(reset(), **by(OTHER))
    code, _ = await refused(second.stub.Act(act(SESSION, 0), **by(OTHER)))
    # The one while the store is asked whose it is, the other from then on.
    assert code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND)
    taken = await second.stub.Act(moved, **by(NEW))

    assert (action(taken) == action(answers[2])).all()
    assert taken.conditioning == version(1, 0)
    assert await refused(second.stub.Act(moved, **by(OTHER))) == DENIED


async def test_a_token_that_is_withdrawn_ends_its_streams_and_its_successor_goes_on(
    specialist_engine: SpecialistEngine, url: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "LOOK", 0.01)
    file = tmp_path / "tokens"
    file.write_text(f"alice:{OLD}\n")
    async with specialist(specialist_engine, url, tokens_file=file) as replica:
        await replica.stub.Reset(reset(), **by(OLD))
        await store.put(SESSION, conditioning(1, 0), "alice")
        stream = replica.stub.ActStream(metadata=by(OLD)["metadata"])
        await stream.write(act(SESSION, 0, min_conditioning=version(1, 0)))
        assert (await stream.read()).step == 0
        file.write_text(f"alice:{NEW}\n")

        async def is_in() -> bool:
            try:
                await replica.stub.GetInfo(wire.InfoRequest(), **by(NEW))
            except Refused:
                return False
            return True

        while not await is_in():
            await asyncio.sleep(0.01)
        await stream.write(act(SESSION, 1))
        code, message = await refused(stream.read())
        assert (code, "withdrawn" in message) == (grpc.StatusCode.UNAUTHENTICATED, True)
        assert (await replica.stub.Act(act(SESSION, 1), **by(NEW))).step == 1


async def test_services_without_tokens_share_sessions_with_those_that_have_some(
    replica: Replica, thinker: Replica
) -> None:
    await thinker.stub.Condition(glance(0), **by(OLD))
    await replica.stub.Reset(reset())
    assert (await replica.stub.Act(act(SESSION, 0, min_conditioning=version(1, 0)), timeout=30)).step == 0


async def test_nothing_of_an_owner_is_left_when_its_sessions_end(first: Replica, thinker: Replica, url: str) -> None:
    for replica in (first, thinker):
        await replica.stub.Reset(reset(), **by(NAMELESS))
    with redis.Redis.from_url(url) as client:
        (key,) = client.keys("robodual:*")
        assert 0 < client.pttl(key) <= 600_000  # type: ignore[operator]
        for replica in (first, thinker):
            await replica.stub.Close(close(), **by(NAMELESS))
        await until(lambda: not client.keys("robodual:*"))
