"""The specialist and what it finds in the store: in time or not, lost, late, older, or of no use."""

import asyncio

import grpc
import pytest
import redis
import torch
from replicas import (
    KEY,
    Replica,
    act,
    conditioning,
    drive,
    opened,
    specialist,
    status,
    until,
    version,
)
from structlog.testing import CapturingLogger

from robodual.conditioning import codec
from robodual.conditioning.record import Conditioning
from robodual.conditioning.store import Store
from robodual.conditioning.valkey import EmbeddedServer
from robodual.specialist import feed
from robodual.specialist.engine import SpecialistEngine
from robodual_client import wire


async def test_without_conditioning_there_is_no_action(replica: Replica) -> None:
    await replica.stub.Reset(wire.ResetRequest(session_id="robot", episode=1))
    code, details = await status(replica.stub.Act(act("robot", 0)))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "no conditioning of episode 1" in details


async def test_act_waits_for_the_conditioning_that_it_must_see(replica: Replica, store: Store) -> None:
    await opened(replica, store)
    await drive(replica, range(7))
    call = asyncio.ensure_future(replica.stub.Act(act("robot", 7, min_conditioning=version(1, 7)), timeout=30))
    await asyncio.sleep(0.3)
    assert not call.done()
    await store.put("robot", conditioning(1, 7))
    answer = await call
    assert (answer.conditioning, answer.age) == (version(1, 7), 0)


async def test_a_conditioning_that_does_not_come_in_time_is_named(replica: Replica, store: Store) -> None:
    await opened(replica, store)
    await drive(replica, range(7))
    code, details = await status(replica.stub.Act(act("robot", 7, min_conditioning=version(1, 7)), timeout=0.4))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "min_conditioning: (1, 7)" in details
    (answer,) = await drive(replica, range(7, 8))
    assert answer.age == 7


async def test_a_lost_announcement_is_made_up_for_by_one_fetch(replica: Replica, store: Store, url: str) -> None:
    await opened(replica, store)
    await drive(replica, range(1))
    with redis.Redis.from_url(url) as client:
        client.hset(KEY, mapping={"episode": 1, "step": 1, "record": codec.encode(conditioning(1, 1), "robot")})
    answer = await replica.stub.Act(act("robot", 1, min_conditioning=version(1, 1)), timeout=10)
    assert answer.conditioning == version(1, 1)


async def test_older_conditioning_after_newer_changes_nothing(replica: Replica, store: Store, url: str) -> None:
    await opened(replica, store)
    await store.put("robot", conditioning(1, 7))
    await replica.stub.Act(act("robot", 7, min_conditioning=version(1, 7)), timeout=10)
    with redis.Redis.from_url(url) as client:  # past the store's own guard
        client.hset(KEY, mapping={"episode": 1, "step": 3, "record": codec.encode(conditioning(1, 3), "robot")})
        client.publish("robodual:conditioning", "robot 1 3")
        client.publish("robodual:conditioning", "robot 1 8")
    await asyncio.sleep(0.2)
    answer = await replica.stub.Act(act("robot", 8), timeout=10)
    assert answer.conditioning == version(1, 7)


async def test_conditioning_of_another_episode_is_never_used(replica: Replica, store: Store) -> None:
    await opened(replica, store)
    await drive(replica, range(2))
    await store.put("robot", conditioning(2, 0))
    await asyncio.sleep(0.2)
    answer = await replica.stub.Act(act("robot", 2), timeout=10)
    assert answer.conditioning == version(1, 0), "the next episode's conditioning was used in this one"
    await replica.stub.Reset(wire.ResetRequest(session_id="robot", episode=2))
    answer = await replica.stub.Act(act("robot", 0, episode=2), timeout=10)
    assert answer.conditioning == version(2, 0)
    await replica.stub.Reset(wire.ResetRequest(session_id="robot", episode=3))
    code, details = await status(replica.stub.Act(act("robot", 0, episode=3), timeout=10))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "episode 3" in details


async def test_conditioning_of_a_later_frame_waits_for_its_step(replica: Replica, store: Store) -> None:
    await opened(replica, store)
    await drive(replica, range(5))
    await store.put("robot", conditioning(1, 7))
    await asyncio.sleep(0.2)
    answers = await drive(replica, range(5, 8))
    assert [answer.conditioning.step for answer in answers] == [0, 0, 7]


async def test_an_old_conditioning_degrades_answers_and_then_ends_them(
    specialist_engine: SpecialistEngine, url: str, store: Store
) -> None:
    async with specialist(specialist_engine, url, degraded_age_steps=2, max_age_steps=4) as replica:
        await opened(replica, store)
        answers = await drive(replica, range(5))
        assert [answer.degraded for answer in answers] == [False, False, False, True, True]
        metrics = replica.server.metrics
        await until(lambda: metrics.degraded._value.get() == 2)
        assert metrics.conditioning_age._sum.get() == 0 + 1 + 2 + 3 + 4
        assert 0 < metrics.conditioning_staleness._sum.get() < 60 * 5
        code, details = await status(replica.stub.Act(act("robot", 5)))
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert "5 steps ago; at most 4 (max_age_steps): ask the generalist" in details
        await store.put("robot", conditioning(1, 5))
        answer = await replica.stub.Act(act("robot", 5, min_conditioning=version(1, 5)), timeout=10)
        assert not answer.degraded


async def test_the_hot_path_makes_no_redis_command(replica: Replica, store: Store, url: str) -> None:
    await opened(replica, store)
    await drive(replica, range(2))
    with redis.Redis.from_url(url) as client:

        def commands() -> dict[str, int]:
            counted = client.info("commandstats")
            idle = ("cmdstat_info", "cmdstat_ping", "cmdstat_client", "cmdstat_auth", "cmdstat_select", "cmdstat_hello")
            return {name: stats["calls"] for name, stats in counted.items() if not name.startswith(idle)}

        before = commands()
        await drive(replica, range(2, 22))
        assert commands() == before


async def test_a_reset_has_a_conditioning_fetched_that_was_announced_before(replica: Replica, store: Store) -> None:
    fetched = replica.server.metrics.stage("fetch")
    before = fetched._sum.get()
    await store.put("robot", conditioning(1, 0))

    await replica.stub.Reset(wire.ResetRequest(session_id="robot", episode=1))

    await until(lambda: fetched._sum.get() > before)


async def test_a_lost_store_degrades_answers_until_it_is_back(
    specialist_engine: SpecialistEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CapturingLogger()
    monkeypatch.setattr(feed, "logger", log)
    valkey = EmbeddedServer()
    valkey.start()
    store = Store(valkey.url)
    await _lose_store(specialist_engine, valkey, store)
    await store.close()
    valkey.stop()
    told = [call.args[0] for call in log.calls if call.args[0].startswith("store")]
    assert told == ["store out of reach: going on with the conditionings at hand", "store back"]


async def _lose_store(engine: SpecialistEngine, valkey: EmbeddedServer, store: Store) -> None:
    async with specialist(engine, valkey.url, redis_timeout=0.5) as replica:
        await opened(replica, store)
        await drive(replica, range(2))
        assert replica.server.readiness.ready

        valkey.stop()
        await until(lambda: not replica.server.readiness.ready)
        answers = await drive(replica, range(2, 4))
        assert all(answer.degraded for answer in answers)
        assert replica.server.metrics.store_up._value.get() == 0
        await replica.stub.Reset(wire.ResetRequest(session_id="late", episode=1))
        code, details = await status(replica.stub.Act(act("late", 0), timeout=10))
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert "store is out of reach" in details

        valkey.start()
        await until(lambda: replica.server.readiness.ready)
        await store.put("robot", conditioning(1, 4))
        answer = await replica.stub.Act(act("robot", 4, min_conditioning=version(1, 4)), timeout=10)
        assert not answer.degraded


async def test_what_was_written_while_the_subscription_was_down_is_fetched(specialist_engine: SpecialistEngine) -> None:
    valkey = EmbeddedServer()
    valkey.start()
    store = Store(valkey.url)
    async with specialist(specialist_engine, valkey.url, redis_timeout=0.5) as replica:
        await opened(replica, store)
        await drive(replica, range(1))
        with redis.Redis.from_url(valkey.url) as client:
            # In one go, so that no one can be subscribed when the record is announced.
            client.execute_command("CLIENT", "PAUSE", 600, "ALL")
            with client.pipeline(transaction=False) as pipeline:
                pipeline.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
                pipeline.hset(
                    KEY, mapping={"episode": 1, "step": 1, "record": codec.encode(conditioning(1, 1), "robot")}
                )
                pipeline.execute()
        await asyncio.sleep(1.5)
        answer = await replica.stub.Act(act("robot", 1), timeout=10)
        assert answer.conditioning == version(1, 1)
    await store.close()
    valkey.stop()


async def test_a_poisoned_record_is_refused_and_the_session_goes_on(replica: Replica, store: Store, url: str) -> None:
    await opened(replica, store)
    await drive(replica, range(1))
    wide = Conditioning(1, 2, conditioning(1, 2).reference_actions, conditioning(1, 2).hidden_states.repeat(1, 2))
    with redis.Redis.from_url(url) as client:
        for record in (b"\x80\x04junk", codec.encode(wide, "robot")):
            client.hset(KEY, mapping={"episode": 1, "step": 1, "record": record})
            client.publish("robodual:conditioning", "robot 1 1")
    await until(lambda: replica.server.metrics.refused_records._value.get() >= 1)
    answers = await drive(replica, range(1, 3))
    assert answers[-1].conditioning == version(1, 0)
    await store.put("robot", conditioning(1, 3))
    answer = await replica.stub.Act(act("robot", 3, min_conditioning=version(1, 3)), timeout=10)
    assert answer.conditioning == version(1, 3)


async def test_whoever_waits_is_told_at_once_that_the_record_cannot_be_read(
    replica: Replica, store: Store, url: str
) -> None:
    await opened(replica, store)
    await drive(replica, range(2))
    with redis.Redis.from_url(url) as client:
        client.hset(KEY, mapping={"episode": 1, "step": 50, "record": codec.encode(conditioning(1, 50), "other")})
    assert not (await store.put("robot", conditioning(1, 2)))[0]
    request = act("robot", 2, min_conditioning=version(1, 2))
    began = asyncio.get_running_loop().time()
    code, details = await status(replica.stub.Act(request, timeout=30))
    assert asyncio.get_running_loop().time() - began < 5
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "could not be read" in details
    assert (await store.put("robot", conditioning(1, 2)))[0]
    assert (await replica.stub.Act(request, timeout=30)).conditioning == version(1, 2)


async def test_a_projection_that_fails_is_an_error_at_once_and_not_a_deadline(
    specialist_engine: SpecialistEngine, store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def project(hidden_states: torch.Tensor) -> None:
        raise RuntimeError("no memory left")

    async with specialist(specialist_engine, url) as replica:
        monkeypatch.setattr(specialist_engine, "project", project)
        await replica.stub.Reset(wire.ResetRequest(session_id="robot", episode=1))
        await store.put("robot", conditioning(1, 0))
        call = replica.stub.Act(act("robot", 0, min_conditioning=version(1, 0)), timeout=30)
        code, details = await asyncio.wait_for(status(call), 5)
    assert code == grpc.StatusCode.INTERNAL
    assert details.startswith("internal error")
