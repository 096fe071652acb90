"""The conditioning store: the latest record of each session in Redis, and the announcements of new ones."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import RedisError

from robodual.conditioning import codec
from robodual.conditioning.record import Conditioning, Version

CHANNEL = "robodual:conditioning"
PING_INTERVAL = 2.0
RECONNECT_FIRST = 0.05
RECONNECT_MOST = 1.0

T = TypeVar("T")

# KEYS: the session's key. ARGV: session, episode, step, record, TTL in milliseconds, channel.
# Returns 1 or 0 (stored or not) and the version that is there now. What is not a hash of ours is replaced.
_PUT = """
local held = redis.pcall('HMGET', KEYS[1], 'episode', 'step')
local episode, step = tonumber(ARGV[2]), tonumber(ARGV[3])
if held.err then
    redis.call('DEL', KEYS[1])
else
    local e, s = tonumber(held[1]), tonumber(held[2])
    if e and s and (e > episode or (e == episode and s >= step)) then
        return {0, e, s}
    end
end
redis.call('HSET', KEYS[1], 'episode', ARGV[2], 'step', ARGV[3], 'record', ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
redis.call('PUBLISH', ARGV[6], ARGV[1] .. ' ' .. ARGV[2] .. ' ' .. ARGV[3])
return {1, episode, step}
"""

# KEYS: the session's key. ARGV: episode. Returns 1 if an older episode's record was dropped.
_DROP_BEFORE = """
local held = tonumber(redis.call('HGET', KEYS[1], 'episode'))
if held and held < tonumber(ARGV[1]) then
    return redis.call('DEL', KEYS[1])
end
return 0
"""


# KEYS: the session's key. ARGV: the SHA-1 of a record that cannot be read. Drops that record and no other.
_DROP_UNREADABLE = """
local record = redis.call('HGET', KEYS[1], 'record')
if record and redis.sha1hex(record) == ARGV[1] then
    return redis.call('DEL', KEYS[1])
end
return 0
"""


class StoreUnavailable(Exception):
    """The store did not answer in time, or answered with an error; the message says which."""


@dataclass(frozen=True)
class Announced:
    """`session` has a conditioning of `version` in the store."""

    session: str
    version: Version


@dataclass(frozen=True)
class Subscribed:
    """Announcements arrive from here on. Those before are lost: fetch every session that matters."""


@dataclass(frozen=True)
class Interrupted:
    """Announcements do not arrive until the next `Subscribed`."""

    reason: str


class Store:
    """The latest conditioning of each session, under `robodual:SESSION:conditioning`.

    Every call answers within `timeout` seconds or raises `StoreUnavailable`; lost connections are re-established.
    Sessions' names are the caller's to check: they become part of the key as they are.
    """

    def __init__(self, url: str, *, ttl: float = 600.0, timeout: float = 2.0) -> None:
        """`ttl`: seconds that a record outlives its writing. Connects at the first call."""
        self._ttl = ttl
        self._timeout = timeout
        retry = Retry(ExponentialWithJitterBackoff(base=0.02, cap=0.5), retries=3)
        self._redis = _connect(url, timeout, retry)
        # Its own connection, without silent retries, so that an interruption is noticed and told.
        self._listener = _connect(url, timeout, Retry(NoBackoff(), retries=0))
        self._put = self._redis.register_script(_PUT)
        self._drop_before = self._redis.register_script(_DROP_BEFORE)
        self._drop_unreadable = self._redis.register_script(_DROP_UNREADABLE)

    async def put(self, session: str, conditioning: Conditioning) -> tuple[bool, Version]:
        """Stores and announces `conditioning` unless the store holds its version or a newer one, in one atomic step.

        Returns whether it was stored, and the newest version in the store after the call.
        """
        record = codec.encode(conditioning, session)
        arguments = (session, *conditioning.version, record, int(self._ttl * 1000), CHANNEL)
        stored, episode, step = await self._ask(self._put(keys=[_key(session)], args=arguments))
        return bool(stored), Version(episode, step)

    async def fetch(self, session: str) -> Conditioning | None:
        """The session's latest conditioning, or None.

        Raises `RecordError` for a record that cannot be read, after dropping it: under the version that stands beside
        it, it would keep the session's own conditionings out. One of another release's format is left to that release.
        """
        record = await self._ask(self._redis.hget(_key(session), "record"))
        if record is None:
            return None
        try:
            return await asyncio.to_thread(codec.decode, record, session)
        except codec.UnknownFormat:
            raise
        except codec.RecordError:
            with contextlib.suppress(StoreUnavailable):  # may not write, or is gone: then another reader drops it
                digest = hashlib.sha1(record, usedforsecurity=False).hexdigest()
                await self._ask(self._drop_unreadable(keys=[_key(session)], args=[digest]))
            raise

    async def delete(self, session: str) -> bool:
        """Drops the session's conditioning; returns whether there was one."""
        return bool(await self._ask(self._redis.delete(_key(session))))

    async def drop_before(self, session: str, episode: int) -> bool:
        """Drops the session's conditioning if it is of an episode before `episode`; returns whether it was."""
        return bool(await self._ask(self._drop_before(keys=[_key(session)], args=[episode])))

    async def ping(self) -> None:
        """Returns if the store answers."""
        await self._ask(self._redis.ping())

    async def subscribe(self) -> AsyncIterator[Announced | Subscribed | Interrupted]:
        """Announcements for all sessions, for ever; `Subscribed` and `Interrupted` mark the gaps between them.

        A silent connection is probed every two seconds, so that a lost network is an interruption too.
        """
        delay = RECONNECT_FIRST
        while True:
            pubsub = self._listener.pubsub()
            try:
                await asyncio.wait_for(pubsub.subscribe(CHANNEL), self._timeout)
                silent = False
                while True:
                    message = await pubsub.get_message(timeout=PING_INTERVAL)
                    if message is None:
                        if silent:
                            raise StoreUnavailable("the store's connection is silent")
                        silent = True
                        await asyncio.wait_for(pubsub.ping(), self._timeout)
                        continue
                    silent = False
                    if message["type"] == "subscribe":
                        delay = RECONNECT_FIRST
                        yield Subscribed()
                    elif message["type"] == "message":
                        announced = _parse(message["data"])
                        if announced is not None:
                            yield announced
            except (RedisError, OSError, asyncio.TimeoutError, StoreUnavailable) as error:
                yield Interrupted(_reason(error))
            finally:
                await pubsub.aclose()  # type: ignore[no-untyped-call]
            await asyncio.sleep(delay)
            delay = min(2 * delay, RECONNECT_MOST)

    async def close(self) -> None:
        """Closes the connections."""
        await self._redis.aclose()
        await self._listener.aclose()

    async def _ask(self, answer: Awaitable[Any]) -> Any:
        try:
            return await asyncio.wait_for(answer, self._timeout)
        except (RedisError, OSError, asyncio.TimeoutError) as error:
            raise StoreUnavailable(f"the conditioning store did not answer: {_reason(error)}") from error


def _connect(url: str, timeout: float, retry: Retry) -> Redis:
    return Redis.from_url(
        url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=retry, protocol=2, decode_responses=False
    )


def _key(session: str) -> str:
    return f"robodual:{session}:conditioning"


def _parse(data: bytes) -> Announced | None:
    """None for what is no announcement of ours: anyone with access may publish on the channel."""
    fields = data.split()
    if len(fields) != 3 or not (fields[1].isdigit() and fields[2].isdigit()) or len(data) > 128:
        return None
    return Announced(fields[0].decode(errors="replace"), Version(int(fields[1]), int(fields[2])))


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
