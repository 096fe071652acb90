import asyncio
import sys
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
import redis
import torch

from robodual.conditioning.codec import RecordError
from robodual.conditioning.record import Conditioning, Version
from robodual.conditioning.store import Announced, ForeignSession, Interrupted, Store, StoreUnavailable, Subscribed
from robodual.conditioning.valkey import EmbeddedServer

WRITES = 5_000

# Writes every version of 10 episodes of 500 steps, each up to 80 places late, in its own order.
WRITER = """
import asyncio, random, sys
import numpy as np, torch
from robodual.conditioning.record import Conditioning, Version
from robodual.conditioning.store import Store

async def main(url, seed):
    draw = random.Random(seed)
    order = [divmod(i, 500) for i in sorted(range(WRITES), key=lambda i: i + draw.randrange(80))]
    store, newest, late = Store(url), Version(0, 0), 0
    for episode, step in order:
        mark = float(episode * 500 + step)
        states = torch.tensor([[mark // 256, mark % 256]]).bfloat16()
        stored, latest = await store.put("robot", Conditioning(episode, step, np.zeros((8, 7), np.float32), states))
        assert latest >= newest, (latest, newest)
        assert latest >= (episode, step)
        assert not stored or latest == (episode, step)
        late += not stored
        newest = latest
    await store.close()
    print(len(order), late)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
""".replace("WRITES", str(WRITES))


@pytest.fixture
def valkey(shared_valkey: EmbeddedServer) -> Iterator[EmbeddedServer]:
    yield shared_valkey
    with redis.Redis.from_url(shared_valkey.url) as client:
        client.flushall()


@pytest.fixture
async def store(valkey: EmbeddedServer) -> AsyncIterator[Store]:
    store = Store(valkey.url, timeout=5)
    yield store
    await store.close()


def conditioning(episode: int, step: int) -> Conditioning:
    return Conditioning(episode, step, np.full((8, 7), 0.5, np.float32), torch.full((3, 4), 1.5).bfloat16())


async def test_what_was_put_is_fetched(store: Store) -> None:
    assert await store.fetch("robot") is None
    assert await store.put("robot", conditioning(1, 7)) == (True, Version(1, 7))
    fetched = await store.fetch("robot")
    assert fetched is not None
    assert fetched.version == Version(1, 7)
    assert torch.equal(fetched.hidden_states, conditioning(1, 7).hidden_states)
    assert await store.fetch("other") is None


@pytest.mark.parametrize("late", [(1, 7), (1, 6), (0, 300)])
async def test_older_conditioning_never_replaces_newer(store: Store, late: tuple[int, int]) -> None:
    await store.put("robot", conditioning(1, 7))
    assert await store.put("robot", conditioning(*late)) == (False, Version(1, 7))
    fetched = await store.fetch("robot")
    assert fetched is not None
    assert fetched.version == Version(1, 7)


async def test_a_later_episode_replaces_any_step_of_an_earlier_one(store: Store) -> None:
    await store.put("robot", conditioning(1, 300))
    assert await store.put("robot", conditioning(2, 0)) == (True, Version(2, 0))


async def test_versions_compare_as_numbers_up_to_the_largest(store: Store) -> None:
    await store.put("robot", conditioning(9, 9))
    assert await store.put("robot", conditioning(10, 0)) == (True, Version(10, 0))
    last = 2**32 - 1
    assert await store.put("robot", conditioning(last, last - 1)) == (True, Version(last, last - 1))
    assert await store.put("robot", conditioning(last, last)) == (True, Version(last, last))


@pytest.mark.slow
async def test_two_writers_with_late_frames_never_take_the_store_back(valkey: EmbeddedServer, store: Store) -> None:
    announcements = store.subscribe()
    assert await anext(announcements) == Subscribed()
    writers = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, valkey.url, str(seed), stdout=asyncio.subprocess.PIPE
        )
        for seed in (1, 2)
    ]
    finished = asyncio.gather(*(writer.communicate() for writer in writers))

    observed: list[Version] = []
    while not finished.done():
        seen = await store.fetch("robot")
        if seen is not None:
            high, low = seen.hidden_states.float()[0].tolist()
            assert high * 256 + low == seen.episode * 500 + seen.step, "a version with another version's record"
            observed.append(seen.version)
    outputs = [stdout.split() for stdout, _ in await finished]

    assert [writer.returncode for writer in writers] == [0, 0]
    assert sum(int(writes) for writes, _ in outputs) == 2 * WRITES
    assert all(int(late) > WRITES / 10 for _, late in outputs), "the writers did not write late frames"
    assert observed == sorted(observed)
    assert len(set(observed)) > 50, "too few moments were observed"
    final = await store.fetch("robot")
    assert final is not None
    assert final.version == Version(9, 499)
    announced = [await anext(announcements)]
    while announced[-1] != Announced("robot", Version(9, 499)):
        announced.append(await anext(announcements))
    versions = [event.version for event in announced if isinstance(event, Announced)]
    assert versions == sorted(set(versions)), "an announcement went back"
    await announcements.aclose()


async def test_delete_and_drop_before(store: Store) -> None:
    await store.put("robot", conditioning(3, 1))
    assert not await store.drop_before("robot", 3)
    assert await store.fetch("robot") is not None
    assert await store.drop_before("robot", 4)
    assert await store.fetch("robot") is None
    assert not await store.drop_before("robot", 4)
    await store.put("robot", conditioning(3, 1))
    assert await store.delete("robot")
    assert not await store.delete("robot")


async def test_a_session_belongs_to_who_comes_first_until_it_ends(valkey: EmbeddedServer) -> None:
    store = Store(valkey.url, ttl=0.5)
    assert not await store.drop_before("robot", 1, "alice")
    attempts = (
        lambda: store.put("robot", conditioning(9, 9), "bob"),
        lambda: store.fetch("robot", "bob"),
        lambda: store.drop_before("robot", 9, "bob"),
        lambda: store.delete("robot", "bob"),
    )
    for _ in range(2):  # with nothing stored yet, and with a record
        for attempt in attempts:
            with pytest.raises(ForeignSession, match="belongs to another token"):
                await attempt()
        assert await store.put("robot", conditioning(1, 7), "alice") in ((True, (1, 7)), (False, (1, 7)))
    fetched = await store.fetch("robot", "alice")
    assert fetched is not None
    assert fetched.version == Version(1, 7)
    assert await store.fetch("robot") is not None, "no name is everyone's"

    await store.delete("robot", "alice")
    assert await store.put("robot", conditioning(1, 1), "bob") == (True, Version(1, 1))
    await asyncio.sleep(0.7)
    assert await store.put("robot", conditioning(1, 1), "alice") == (True, Version(1, 1))
    await store.close()


async def test_a_session_whose_record_cannot_be_read_stays_its_owners(valkey: EmbeddedServer, store: Store) -> None:
    await store.put("robot", conditioning(1, 1), "alice")
    with redis.Redis.from_url(valkey.url) as intruder:
        intruder.hset("robodual:robot:conditioning", mapping={"step": 50, "record": b"junk"})
        with pytest.raises(RecordError):
            await store.fetch("robot", "alice")
        assert 0 < intruder.pttl("robodual:robot:conditioning") <= 600_000  # type: ignore[operator]
    with pytest.raises(ForeignSession):
        await store.put("robot", conditioning(1, 60), "bob")
    assert await store.put("robot", conditioning(1, 2), "alice") == (True, Version(1, 2))


async def test_every_record_expires(valkey: EmbeddedServer) -> None:
    store = Store(valkey.url, ttl=0.1)
    await store.put("robot", conditioning(1, 1))
    await asyncio.sleep(0.2)
    assert await store.fetch("robot") is None
    await store.close()


async def test_a_poisoned_record_is_refused_and_replaced(valkey: EmbeddedServer, store: Store) -> None:
    with redis.Redis.from_url(valkey.url) as intruder:
        intruder.hset("robodual:robot:conditioning", mapping={"episode": 1, "step": 1, "record": b"\x80\x04junk"})
        with pytest.raises(RecordError):
            await store.fetch("robot")
        intruder.delete("robodual:robot:conditioning")
        intruder.set("robodual:robot:conditioning", "not a hash")
    with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
        await store.fetch("robot")
    assert await store.put("robot", conditioning(1, 2)) == (True, Version(1, 2))
    assert await store.fetch("robot") is not None


async def test_an_unreadable_record_is_dropped_so_that_the_session_s_own_can_follow(
    valkey: EmbeddedServer, store: Store
) -> None:
    await store.put("other", conditioning(1, 9))
    with redis.Redis.from_url(valkey.url) as intruder:
        theirs = intruder.hget("robodual:other:conditioning", "record")
        for record in (b"\x80\x04junk", theirs):
            intruder.hset("robodual:robot:conditioning", mapping={"episode": 1, "step": 50, "record": record})
            assert await store.put("robot", conditioning(1, 2)) == (False, Version(1, 50))
            with pytest.raises(RecordError):
                await store.fetch("robot")
            assert await store.put("robot", conditioning(1, 2)) == (True, Version(1, 2))


async def test_a_record_of_another_release_is_left_to_that_release(valkey: EmbeddedServer, store: Store) -> None:
    await store.put("robot", conditioning(1, 2))
    with redis.Redis.from_url(valkey.url) as client:
        record = bytearray(client.hget("robodual:robot:conditioning", "record"))
        record[4] += 1
        client.hset("robodual:robot:conditioning", "record", bytes(record))
        with pytest.raises(RecordError, match="format version"):
            await store.fetch("robot")
        assert client.exists("robodual:robot:conditioning")


async def test_strangers_on_the_channel_are_ignored(valkey: EmbeddedServer, store: Store) -> None:
    announcements = store.subscribe()
    assert await anext(announcements) == Subscribed()
    with redis.Redis.from_url(valkey.url) as intruder:
        for message in (b"", b"robot 1", b"robot x y", b"robot 1 -2", b"\xff " * 3, b"r" * 10_000):
            intruder.publish("robodual:conditioning", message)
    await store.put("robot", conditioning(1, 2))
    assert await anext(announcements) == Announced("robot", Version(1, 2))
    await announcements.aclose()


async def test_a_store_that_went_away_is_told_apart_and_comes_back() -> None:
    server = EmbeddedServer()
    server.start()
    store = Store(server.url, timeout=1)
    announcements = store.subscribe()
    assert await anext(announcements) == Subscribed()
    await store.put("robot", conditioning(1, 1))
    assert await anext(announcements) == Announced("robot", Version(1, 1))

    server.stop()
    assert isinstance(await anext(announcements), Interrupted)
    with pytest.raises(StoreUnavailable):
        await store.put("robot", conditioning(1, 2))
    with pytest.raises(StoreUnavailable):
        await store.probe()

    server.start()
    event = await anext(announcements)
    while isinstance(event, Interrupted):
        event = await anext(announcements)
    assert event == Subscribed()
    assert await store.put("robot", conditioning(1, 3)) == (True, Version(1, 3))
    assert await anext(announcements) == Announced("robot", Version(1, 3))
    await announcements.aclose()
    await store.close()
    server.stop()


async def test_a_store_that_hangs_is_unavailable_within_the_timeout(valkey: EmbeddedServer) -> None:
    store = Store(valkey.url, timeout=0.3)
    await store.probe()
    with redis.Redis.from_url(valkey.url) as client:
        client.execute_command("CLIENT", "PAUSE", 1500, "ALL")
    started = asyncio.get_running_loop().time()
    with pytest.raises(StoreUnavailable):
        await store.put("robot", conditioning(1, 1))
    assert asyncio.get_running_loop().time() - started < 1
    await asyncio.sleep(1.5)
    await store.put("robot", conditioning(1, 2))
    await store.close()


async def test_a_store_that_takes_nothing_more_is_noticed_and_left_as_it_was(
    valkey: EmbeddedServer, store: Store
) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        await store.probe()
        assert client.keys() == []
        before = client.config_get("maxmemory*")
        try:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 1)
            with pytest.raises(StoreUnavailable, match="maxmemory"):
                await store.probe()
        finally:
            client.config_set("maxmemory", before["maxmemory"])
            client.config_set("maxmemory-policy", before["maxmemory-policy"])


async def test_a_primary_that_was_made_a_replica_is_left_for_the_one_in_its_place() -> None:
    with EmbeddedServer() as old, EmbeddedServer() as new:
        target = old

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65536):
                writer.write(data)
            writer.close()

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far, to_far = await asyncio.open_connection("127.0.0.1", _port(target))
            await asyncio.gather(forward(reader, to_far), forward(far, writer))

        async with await asyncio.start_server(relay, "127.0.0.1", 0) as address:
            with redis.Redis.from_url(new.url) as client:
                client.config_set("requirepass", old.url[9:].partition("@")[0])
            store = Store(old.url.replace(str(_port(old)), str(address.sockets[0].getsockname()[1])))
            await store.put("robot", conditioning(1, 1))
            target = new
            with redis.Redis.from_url(old.url) as client:
                client.replicaof("127.0.0.1", str(_port(new)))
            with pytest.raises(StoreUnavailable, match="read only replica"):
                await store.put("robot", conditioning(1, 2))
            assert await store.put("robot", conditioning(1, 2)) == (True, Version(1, 2))
            await store.close()


def _port(server: EmbeddedServer) -> int:
    return int(server.url.rpartition("/")[0].rpartition(":")[2])


async def test_a_password_never_shows_in_an_error(valkey: EmbeddedServer) -> None:
    store = Store(valkey.url.replace("://:", "://:wrong-secret"), timeout=1)
    with pytest.raises(StoreUnavailable) as failure:
        await store.probe()
    assert "wrong-secret" not in str(failure.value)
    await store.close()


async def test_who_finds_every_connection_taken_waits_for_one(valkey: EmbeddedServer) -> None:
    store = Store(valkey.url, timeout=5)
    with redis.Redis.from_url(valkey.url) as client:
        client.client_pause(300, all=True)
    await asyncio.gather(*(store.put(f"robot{number}", conditioning(1, 0)) for number in range(150)))
    await store.close()
    with redis.Redis.from_url(valkey.url) as client:
        assert client.info("stats")["total_connections_received"] < 150
        assert len(client.keys("robodual:robot*")) == 150
