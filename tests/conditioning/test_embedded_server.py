import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from robodual.conditioning.valkey import EmbeddedServer, ServerNotFound, find_server

ORPHAN = """
import os, signal
from robodual.conditioning.valkey import EmbeddedServer
server = EmbeddedServer()
server.start()
print(server.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_answers_once_started_and_is_gone_once_stopped() -> None:
    with EmbeddedServer() as server:
        pid, url = server.pid, server.url
        with redis.Redis.from_url(url) as client:
            assert client.ping()
    assert pid is not None
    assert not psutil.pid_exists(pid)
    assert server.pid is None
    server.stop()


def test_it_takes_no_one_without_the_password_and_keeps_nothing_on_disk() -> None:
    with EmbeddedServer() as server:
        address, _, _ = server.url.rpartition("@")[2].partition("/")
        host, _, port = address.partition(":")
        assert host == "127.0.0.1"
        with (
            redis.Redis(port=int(port), retry=Retry(NoBackoff(), 0)) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()
        command_line = " ".join(psutil.Process(server.pid).cmdline())
        assert server.url.split(":")[2].split("@")[0] not in command_line
        with redis.Redis.from_url(server.url) as client:
            assert client.config_get("save")["save"] == ""
            assert client.config_get("appendonly")["appendonly"] == "no"


def test_started_again_it_keeps_its_url_but_not_its_data() -> None:
    server = EmbeddedServer()
    with server:
        url = server.url
        with redis.Redis.from_url(url) as client:
            client.set("key", "value")
    with server, redis.Redis.from_url(server.url) as client:
        assert server.url == url
        assert client.get("key") is None


def test_two_of_them_do_not_collide() -> None:
    with EmbeddedServer() as one, EmbeddedServer() as other:
        assert one.url != other.url


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends it with its parent on Linux only")
def test_it_does_not_outlive_a_parent_that_was_killed() -> None:
    parent = subprocess.run([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, check=False)
    pid = int(parent.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.02)


def test_a_server_on_the_path_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("redis-server", "valkey-server"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server() == tmp_path / "valkey-server"


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "valkey-server").write_text("#!/bin/sh\necho no luck today >&2\nexit 1\n")
    (tmp_path / "valkey-server").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    with pytest.raises(RuntimeError, match="no luck today"):
        EmbeddedServer().start()


def test_without_any_server_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ServerNotFound, match=r"robodual\[embedded\]"):
        EmbeddedServer()
