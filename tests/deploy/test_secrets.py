"""deploy/secrets.sh: what it makes is what docker-compose.yml mounts, and opens Redis over TLS and nothing else."""

from __future__ import annotations

import contextlib
import re
import shutil
import ssl
import stat
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError
from relay import relay

from robodual.conditioning.record import Conditioning
from robodual.conditioning.store import Announced, Store, StoreUnavailable, Subscribed
from robodual.conditioning.valkey import find_server, free_port
from robodual.serving.auth import Authenticator
from robodual.serving.settings import SpecialistSettings

yaml = pytest.importorskip("yaml", reason="needs PyYAML, which the extra dev brings")
pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command for certificates")

ROOT = Path(__file__).parents[2]
SCRIPT = ["sh", str(ROOT / "deploy" / "secrets.sh")]
MOUNTED = "/run/secrets"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("deploy") / "secrets"
    subprocess.run([*SCRIPT, str(made)], check=True)
    return made


@contextlib.contextmanager
def server(folder: Path, *, tls: bool) -> Iterator[int]:
    """A Redis with the configuration that the container gets, but for its paths and its port."""
    port = free_port()
    text = (folder / "redis.conf").read_text().replace(MOUNTED, str(folder)).replace("6379", str(port))
    if not tls:
        text = re.sub(r"^tls-.*\n", "", text.replace("port 0", f"port {port}"), flags=re.MULTILINE)
    with subprocess.Popen(
        [str(find_server()), "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with process.stdin:
                process.stdin.write(text)
            said = ""
            while "Ready to accept connections" not in said:
                line = process.stdout.readline()
                if not line and "TLS support" in said:
                    pytest.skip("this machine's server was built without TLS")
                assert line, said
                said += line
            yield port
        finally:
            process.kill()


@pytest.fixture(params=["its own TLS", "a relay's TLS"])
async def port(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[int]:
    if request.param == "its own TLS":
        with server(folder, tls=True) as port:
            yield port
    else:
        with server(folder, tls=False) as plain:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(folder / "redis.pem", folder / "redis.key")
            async with relay(context, plain) as port:
                yield port


@pytest.fixture
def url(folder: Path, port: int) -> str:
    configuration = folder.parent / "robodual.toml"
    configuration.write_text(
        (folder / "robodual.toml")
        .read_text()
        .replace(MOUNTED, str(folder))
        .replace("@redis:6379", f"@127.0.0.1:{port}")
    )
    settings = SpecialistSettings(config=configuration, host="0.0.0.0")
    token = (folder / "token").read_text()
    caller = Authenticator(settings.tokens, file=settings.tokens_file).caller(f"Bearer {token}")
    assert caller is not None
    assert caller.owner == "robots"
    assert token not in configuration.read_text()
    return settings.redis_url.get_secret_value()


async def test_the_settings_open_the_store_over_tls(url: str) -> None:
    store = Store(url, timeout=5)
    events = store.subscribe()
    try:
        assert isinstance(await anext(events), Subscribed)
        conditioning = Conditioning(1, 0, torch.zeros(8, 7).numpy(), torch.zeros(4, 8, dtype=torch.bfloat16))
        assert (await store.put("robot", conditioning))[0]
        assert isinstance(await anext(events), Announced)
        assert await store.fetch("robot") is not None
        assert not await store.drop_before("robot", 1)
        assert await store.delete("robot")
        await store.probe()
    finally:
        await events.aclose()  # type: ignore[attr-defined]
        await store.close()


@pytest.mark.parametrize("wrong", ["password", "no TLS", "authority"])
async def test_nothing_else_does(url: str, wrong: str) -> None:
    bare = url.partition("?")[0]
    others = {
        "password": url.replace("rediss://robodual:", "rediss://robodual:x"),
        "no TLS": bare.replace("rediss://", "redis://"),
        "authority": bare,
    }
    store = Store(others[wrong], timeout=5)
    with pytest.raises(StoreUnavailable):
        await store.probe()
    await store.close()


async def test_the_services_user_may_do_no_more_than_they_do(url: str) -> None:
    async with Redis.from_url(url) as client:
        for forbidden in ("FLUSHALL", "CONFIG GET *", "KEYS *", "SET another:key 1", "HGET another:key a", "ACL LIST"):
            with pytest.raises(NoPermissionError):
                await client.execute_command(*forbidden.split())
    async with Redis.from_url(url.replace("robodual:", "health:", 1)) as client:
        assert await client.ping()
        with pytest.raises(NoPermissionError):
            await client.hget("robodual:robot:conditioning", "record")


def test_everything_that_is_mounted_is_made_and_no_other_user_can_look(folder: Path) -> None:
    secrets = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["secrets"]

    assert {Path(secret["file"]).name for secret in secrets.values()} <= {path.name for path in folder.iterdir()}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "ca.key").stat().st_mode) == 0o600


def test_what_is_there_is_never_overwritten(folder: Path) -> None:
    before = (folder / "token").read_text()

    again = subprocess.run([*SCRIPT, str(folder)], capture_output=True, text=True)

    assert again.returncode == 1
    assert "has secrets already" in again.stderr
    assert (folder / "token").read_text() == before
