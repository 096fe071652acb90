"""The store over `rediss://` with certificates on both sides, as an ACL user that may do what is needed and no more."""

import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import redis
import torch
from relay import relay

from robodual.conditioning.record import Conditioning, Version
from robodual.conditioning.store import Announced, Interrupted, Store, StoreUnavailable, Subscribed, Tls
from robodual.conditioning.valkey import EmbeddedServer, find_server, free_port

PASSWORD = "p@ss/word:#1?"
QUOTED = "p%40ss%2Fword%3A%231%3F"
# docs/security.md shows these rules.
RULES = (
    "resetchannels -@all ~robodual:* &robodual:* +ping +subscribe +unsubscribe +publish +evalsha +script|load "
    "+hget +hmget +hset +hsetnx +del +pexpire"
)
RECORD = Conditioning(1, 7, np.full((8, 7), 0.5, np.float32), torch.full((3, 4), 1.5).bfloat16())


@pytest.fixture
def plain(shared_valkey: EmbeddedServer) -> Iterator[str]:
    """A server without TLS that has the user `robodual`."""
    with redis.Redis.from_url(shared_valkey.url) as client:
        client.execute_command("ACL", "SETUSER", "robodual", "on", f">{PASSWORD}", *RULES.split())
        yield shared_valkey.url
        client.execute_command("ACL", "DELUSER", "robodual")
        client.flushall()


@contextlib.contextmanager
def own(certificates: Path) -> Iterator[int]:
    """A server that speaks TLS itself."""
    port = free_port()
    lines = [
        "port 0",
        f"tls-port {port}",
        *(f"tls-{kind}-file {certificates / name}" for kind, name in (("cert", "server.pem"), ("key", "server.key"))),
        f"tls-ca-cert-file {certificates / 'ca.pem'}",
        "tls-auth-clients yes",
        'save ""',
        f'user robodual on "{">" + PASSWORD}" {RULES}',
    ]
    with subprocess.Popen(
        [str(find_server()), "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with process.stdin:
                process.stdin.write("\n".join(lines) + "\n")
            said = []
            while "Ready to accept connections" not in "".join(said[-1:]):
                said.append(process.stdout.readline())
                if not said[-1]:
                    without = any("TLS support" in line for line in said)
                    raise pytest.skip.Exception("the server was built without TLS") if without else AssertionError(said)
            yield port
        finally:
            process.kill()


@pytest.fixture(params=["relay", "own"])
async def port(request: pytest.FixtureRequest, plain: str, certificates: Path) -> AsyncIterator[int]:
    if request.param == "own":
        with own(certificates) as port:
            yield port
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
        context.load_verify_locations(certificates / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        async with relay(context, int(plain.rpartition(":")[2].partition("/")[0])) as port:
            yield port


def store(port: int, certificates: Path, caller: str | None = "client", url: str = "rediss") -> Store:
    pair = (None, None) if caller is None else (certificates / f"{caller}.pem", certificates / f"{caller}.key")
    address = f"{url}://robodual:{QUOTED}@127.0.0.1:{port}/0"
    return Store(address, timeout=5, tls=Tls(certificates / "ca.pem", *pair) if url == "rediss" else None)


async def test_everything_that_the_store_does_works_for_that_user(port: int, certificates: Path) -> None:
    secure = store(port, certificates)
    announcements = secure.subscribe()
    assert await anext(announcements) == Subscribed()
    await secure.probe()
    assert await secure.put("robot", RECORD, "alice") == (True, Version(1, 7))
    assert await anext(announcements) == Announced("robot", Version(1, 7))
    fetched = await secure.fetch("robot", "alice")
    assert fetched is not None
    assert fetched.hidden_states.equal(RECORD.hidden_states)
    assert await secure.drop_before("robot", 2, "alice")
    assert await secure.delete("robot", "alice")
    await announcements.aclose()
    await secure.close()


@pytest.mark.parametrize(
    ("caller", "url"),
    [(None, "rediss"), ("stranger", "rediss"), ("client", "redis")],
    ids=["none", "stranger", "plain"],
)
async def test_without_a_certificate_of_the_authority_there_is_no_store(
    port: int, certificates: Path, caller: str | None, url: str
) -> None:
    refused = store(port, certificates, caller, url)
    with pytest.raises(StoreUnavailable) as failure:
        await refused.probe()
    assert isinstance(await anext(refused.subscribe()), Interrupted)
    assert PASSWORD not in str(failure.value)
    assert QUOTED not in str(failure.value)
    await refused.close()


async def test_a_server_of_another_authority_is_not_spoken_to(port: int, certificates: Path) -> None:
    pair = certificates / "client.pem", certificates / "client.key"
    deceived = Store(
        f"rediss://robodual:{QUOTED}@127.0.0.1:{port}/0", timeout=5, tls=Tls(certificates / "stranger.pem", *pair)
    )
    with pytest.raises(StoreUnavailable, match="certificate"):
        await deceived.probe()
    await deceived.close()


async def test_that_user_can_do_nothing_else(plain: str, certificates: Path) -> None:
    address = plain.rpartition("@")[2]
    with redis.Redis.from_url(f"redis://robodual:{QUOTED}@{address}") as client:
        for command in (("GET", "other"), ("KEYS", "*"), ("CONFIG", "GET", "*"), ("FLUSHALL",), ("PUBLISH", "x", "y")):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)


@pytest.mark.parametrize("url", ["redis://:se/cret@host:6379/0", "rediss://me:se#cret@host", "http://:secret@host"])
def test_a_malformed_url_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ValueError, match=r"redis_url: expected .*percent-encode") as refused:
        Store(url)
    assert refused.value.__cause__ is None
    assert not any(piece in str(refused.value) for piece in ("cret", "secret", "'se'"))
