"""The conditioning store: the latest record of each session in Redis, and the announcements of new ones."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import ReadOnlyError, RedisError

from robodual.conditioning import codec
from robodual.conditioning.record import Conditioning, Version

CHANNEL = "robodual:conditioning"
FOREIGN = "session_id: this session belongs to another token; use the token that opened it, or another session id"
PING_INTERVAL = 2.0
RECONNECT_FIRST = 0.05
RECONNECT_MOST = 1.0
CONNECTIONS = 32

T = TypeVar("T")

# Whether the record under KEYS[1] is another owner's. Owners are told apart only where both are named.
_FOREIGN = """
local function foreign(owner)
    local held = redis.pcall('HGET', KEYS[1], 'owner')
    return type(held) == 'string' and held ~= '' and owner ~= '' and held ~= owner
end
"""

# KEYS: the session's key. ARGV: session, owner, episode, step, record, TTL in milliseconds, channel.
# Returns 1, 0 or -1 (stored, not newer, another owner's) and the version that is there now. What is not a hash of ours
# is replaced.
_PUT = (
    _FOREIGN
    + """
local held = redis.pcall('HMGET', KEYS[1], 'episode', 'step')
local episode, step = tonumber(ARGV[3]), tonumber(ARGV[4])
if held.err then
    redis.call('DEL', KEYS[1])
elseif foreign(ARGV[2]) then
    return {-1, 0, 0}
else
    local e, s = tonumber(held[1]), tonumber(held[2])
    if e and s and (e > episode or (e == episode and s >= step)) then
        return {0, e, s}
    end
end
redis.call('HSET', KEYS[1], 'owner', ARGV[2], 'episode', ARGV[3], 'step', ARGV[4], 'record', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('PUBLISH', ARGV[7], ARGV[1] .. ' ' .. ARGV[3] .. ' ' .. ARGV[4])
return {1, episode, step}
"""
)

# KEYS: the session's key. ARGV: owner, episode, TTL in milliseconds. Returns 1 if an older episode's record was
# dropped, -1 if the session is another owner's. An owner with a name leaves it there: the session is theirs now.
_DROP_BEFORE = (
    _FOREIGN
    + """
if foreign(ARGV[1]) then
    return -1
end
local held, dropped = tonumber(redis.call('HGET', KEYS[1], 'episode')), 0
if held and held < tonumber(ARGV[2]) then
    dropped = redis.call('DEL', KEYS[1])
end
if ARGV[1] ~= '' and redis.call('HSETNX', KEYS[1], 'owner', ARGV[1]) == 1 then
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return dropped
"""
)

# KEYS: the session's key. ARGV: owner. Returns 1 if there was something to delete, -1 if it is another owner's.
_DELETE = (
    _FOREIGN
    + """
if foreign(ARGV[1]) then
    return -1
end
return redis.call('DEL', KEYS[1])
"""
)

# KEYS: one of no session. Writes what needs room, and leaves nothing.
_TRY = """
redis.call('HSET', KEYS[1], 'at', 1)
return redis.call('DEL', KEYS[1])
"""

# KEYS: the session's key. ARGV: the SHA-1 of a record that cannot be read, TTL in milliseconds. Drops that record and
# no other; the session stays its owner's.
_DROP_UNREADABLE = """
local record, owner = unpack(redis.call('HMGET', KEYS[1], 'record', 'owner'))
if record and redis.sha1hex(record) == ARGV[1] then
    redis.call('DEL', KEYS[1])
    if owner and owner ~= '' then
        redis.call('HSET', KEYS[1], 'owner', owner)
        redis.call('PEXPIRE', KEYS[1], ARGV[2])
    end
end
"""


class StoreUnavailable(Exception):
    """The store did not answer in time, or answered with an error; the message says which."""


class ForeignSession(ValueError):
    """The session in the store is another owner's."""


@dataclass(frozen=True)
class Tls:
    """PEM files for a `rediss://` store: who signed its certificate (default: the system's roots), and our own."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


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

    A session belongs to the first `owner` that drops or puts something in it, until it is deleted or expires; calls in
    another's name raise `ForeignSession`. No name, "", is everyone's: it is that of services without tokens.
    """

    def __init__(self, url: str, *, ttl: float = 600.0, timeout: float = 2.0, tls: Tls | None = None) -> None:
        """`ttl`: seconds that a record outlives its writing. Connects at the first call.

        Raises `ValueError` for a malformed URL; it does not show it.
        """
        self._milliseconds = int(ttl * 1000)
        self._timeout = timeout
        retry = Retry(ExponentialWithJitterBackoff(base=0.02, cap=0.5), retries=3)
        self._redis = _connect(url, timeout, retry, tls)
        # Its own connection, without silent retries, so that an interruption is noticed and told.
        self._listener = _connect(url, timeout, Retry(NoBackoff(), retries=0), tls)
        self._put = self._redis.register_script(_PUT)
        self._drop_before = self._redis.register_script(_DROP_BEFORE)
        self._delete = self._redis.register_script(_DELETE)
        self._drop_unreadable = self._redis.register_script(_DROP_UNREADABLE)
        self._try = self._redis.register_script(_TRY)

    async def put(self, session: str, conditioning: Conditioning, owner: str = "") -> tuple[bool, Version]:
        """Stores and announces `conditioning` unless the store holds its version or a newer one, in one atomic step.

        Returns whether it was stored, and the newest version in the store after the call.
        """
        record = codec.encode(conditioning, session)
        arguments = (session, owner, *conditioning.version, record, self._milliseconds, CHANNEL)
        stored, episode, step = await self._ask(self._put(keys=[_key(session)], args=arguments))
        return _own(stored), Version(episode, step)

    async def fetch(self, session: str, owner: str = "") -> Conditioning | None:
        """The session's latest conditioning, or None.

        Raises `RecordError` for a record that cannot be read, after dropping it: under the version that stands beside
        it, it would keep the session's own conditionings out. One of another release's format is left to that release.
        """
        record, held = await self._ask(self._redis.hmget(_key(session), "record", "owner"))
        if held and owner and held != owner.encode():
            raise ForeignSession(FOREIGN)
        if record is None:
            return None
        try:
            return await asyncio.to_thread(codec.decode, record, session)
        except codec.UnknownFormat:
            raise
        except codec.RecordError:
            with contextlib.suppress(StoreUnavailable):  # may not write, or is gone: then another reader drops it
                digest = hashlib.sha1(record, usedforsecurity=False).hexdigest()
                await self._ask(self._drop_unreadable(keys=[_key(session)], args=[digest, self._milliseconds]))
            raise

    async def delete(self, session: str, owner: str = "") -> bool:
        """Drops all of the session; returns whether there was anything."""
        return _own(await self._ask(self._delete(keys=[_key(session)], args=[owner])))

    async def drop_before(self, session: str, episode: int, owner: str = "") -> bool:
        """Drops the session's conditioning if it is of an episode before `episode`; returns whether it was."""
        arguments = (owner, episode, self._milliseconds)
        return _own(await self._ask(self._drop_before(keys=[_key(session)], args=arguments)))

    async def probe(self) -> None:
        """Returns if the store takes what is written: one that is full or another's replica answers, and does not."""
        await self._ask(self._try(keys=["robodual:probe"]))

    async def subscribe(self) -> AsyncGenerator[Announced | Subscribed | Interrupted, None]:
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
            if isinstance(error, ReadOnlyError):
                # A primary that was made a replica keeps its connections: new ones find the one in its place.
                await self._redis.connection_pool.disconnect(inuse_connections=False)
            raise StoreUnavailable(f"the conditioning store cannot be used: {_reason(error)}") from error


def _connect(url: str, timeout: float, retry: Retry, tls: Tls | None) -> Redis:
    files = {} if tls is None else {"ca_certs": tls.ca, "certfile": tls.certificate, "keyfile": tls.key}
    given: dict[str, Any] = {f"ssl_{name}": str(path) for name, path in files.items() if path is not None}
    try:
        # Who finds all connections taken waits, as for an answer, and is not turned away.
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=timeout,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=retry,
            protocol=2,
            decode_responses=False,
            **given,
        )
        return Redis.from_pool(pool)
    except ValueError:
        # Its own message may show a piece of the password, which an unescaped character has made a host or a port.
        raise ValueError(
            "redis_url: expected redis://[USER]:PASSWORD@HOST:PORT/DB, rediss:// or unix://; "
            "percent-encode any of /?#@:% in the password"
        ) from None


def _own(answer: int) -> bool:
    if answer < 0:
        raise ForeignSession(FOREIGN)
    return bool(answer)


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
