"""deploy/secrets.sh: what it makes is what docker-compose.yml mounts, and opens Redis over TLS and nothing else."""

from __future__ import annotations

import contextlib
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import torch

from robodual.conditioning.record import Conditioning
from robodual.conditioning.store import Announced, Store, StoreUnavailable, Subscribed
from robodual.conditioning.valkey import find_server
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


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    """A Redis with the configuration that the container gets, its paths and port changed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
    configuration = (folder / "redis.conf").read_text().replace(MOUNTED, str(folder)).replace("6379", str(number))
    own = folder.parent / "redis.conf"
    own.write_text(configuration)
    server = subprocess.Popen([str(find_server()), str(own)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", number)):
                break
            if server.poll() is not None and server.stdout is not None:
                said = server.stdout.read().decode()
                if "tls" in said.lower() and "support" in said.lower():
                    pytest.skip("the Redis or Valkey server of this machine was built without TLS")
                raise AssertionError(said)
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield number
    finally:
        server.terminate()
        server.wait(10)
        if server.stdout is not None:
            server.stdout.close()


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
    assert [token.get_secret_value() for token in settings.tokens] == [(folder / "token").read_text()]
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
        await store.ping()
    finally:
        await events.aclose()  # type: ignore[attr-defined]
        await store.close()


@pytest.mark.parametrize(
    "change",
    [
        ("rediss://robodual:", "rediss://robodual:x"),
        ("rediss://robodual:", "redis://robodual:"),
        ("ssl_ca_certs=", "ssl_cert_reqs=required&nothing="),
    ],
    ids=["another password", "plain text", "an unknown authority"],
)
async def test_nothing_else_does(url: str, change: tuple[str, str]) -> None:
    other = url.replace(*change)
    if change[0].startswith("ssl"):
        other = other.partition("?")[0]
    store = Store(other, timeout=5)
    with pytest.raises(StoreUnavailable):
        await store.ping()
    await store.close()


def test_the_services_user_may_do_no_more_than_they_do(url: str, folder: Path) -> None:
    with redis.Redis.from_url(url) as client:
        for forbidden in (
            ["FLUSHALL"],
            ["CONFIG", "GET", "*"],
            ["KEYS", "*"],
            ["SET", "another:key", "1"],
            ["ACL", "LIST"],
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*forbidden)
    health = url.replace("robodual:", "health:", 1)
    with redis.Redis.from_url(health) as client:
        assert client.ping()
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.get("robodual:robot:conditioning")


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
