"""Redis, a generalist and two specialists as real processes that can be hurt, on ports that outlive them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from proxy import Proxy

from robodual.conditioning.valkey import EmbeddedServer, free_port

START = 240.0  # seconds that a service gets until it is ready
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "ROBODUAL_PROFILE": "toy",
    "ROBODUAL_DEVICE": "cpu",
    # Alone in its batch a session gets the same bits each time: batched, they differ in the last.
    "ROBODUAL_MAX_BATCH": "1",
    "ROBODUAL_REDIS_TIMEOUT": "1",
    "ROBODUAL_SPECIALIST_MAX_AGE_STEPS": "1000",
}


class Service:
    """One service's process, which keeps its ports over restarts and writes one log."""

    def __init__(self, name: str, kind: str, redis_url: str, folder: Path, **environment: str) -> None:
        self.name = name
        self.port, self.http_port = free_port(), free_port()
        self.log = folder / f"{name}.log"
        prefix = f"ROBODUAL_{kind.upper()}_"
        ports = {f"{prefix}PORT": str(self.port), f"{prefix}HTTP_PORT": str(self.http_port)}
        self._environment = {**os.environ, **SETTINGS, "ROBODUAL_REDIS_URL": redis_url, **ports, **environment}
        self._command = [sys.executable, "-m", "robodual", "serve", kind]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def process(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def start(self) -> None:
        """Returns at once."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)

    def ready(self) -> bool:
        """What /readyz says; False where nobody answers."""
        try:
            with urllib.request.urlopen(f"http://{self._http}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def metric(self, name: str) -> float:
        """A counter's or gauge's value, as /metrics tells it."""
        with urllib.request.urlopen(f"http://{self._http}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")))

    def readiness(self) -> int:
        """The status of /readyz. Raises OSError where nobody answers."""
        try:
            with urllib.request.urlopen(f"http://{self._http}/readyz", timeout=2) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def wait_until_ready(self) -> None:
        def came_up() -> bool:
            assert self.runs, f"{self.name} ended: {self.tail()}"
            return self.ready()

        until(came_up, START, lambda: f"{self.name} is not ready: {self.tail()}")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def terminate(self) -> None:
        """Asks it to drain; returns at once."""
        assert self._process is not None
        self._process.terminate()

    def wait(self, seconds: float) -> int:
        """Its exit status, once it has ended."""
        assert self._process is not None
        return self._process.wait(seconds)

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    @property
    def _http(self) -> str:
        return f"127.0.0.1:{self.http_port}"


class Deployment:
    """All of them. Specialist A reaches Redis through `link`; everything else goes direct."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.redis = EmbeddedServer()
        self.redis.start()
        credentials, _, address = self.redis.url.rpartition("@")
        self.link = Proxy(int(address.partition("/")[0].rpartition(":")[2]))
        extra = dict(environment or {})
        self.generalist = Service("generalist", "generalist", self.redis.url, folder, **extra)
        self.a = Service("specialist-a", "specialist", f"{credentials}@{self.link.address}/0", folder, **extra)
        self.b = Service("specialist-b", "specialist", self.redis.url, folder, **extra)
        self.services = (self.generalist, self.a, self.b)

    @property
    def specialists(self) -> dict[str, Service]:
        """By address."""
        return {service.address: service for service in (self.a, self.b)}

    def mend(self) -> None:
        """Starts what does not run, undoes what was done to the network, and waits until everything is ready."""
        self.link.mend()
        if self.redis.pid is None:
            self.redis.start()
        for service in self.services:
            if not service.runs:
                service.start()
        for service in self.services:
            service.wait_until_ready()

    def kill_redis(self) -> None:
        """As a crash would: without goodbyes. What it held is gone."""
        assert self.redis.pid is not None
        os.kill(self.redis.pid, signal.SIGKILL)
        self.redis.stop()

    @contextmanager
    def frozen_redis(self) -> Iterator[None]:
        assert self.redis.pid is not None
        os.kill(self.redis.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.redis.pid, signal.SIGCONT)

    def stop(self) -> None:
        for service in self.services:
            if service.runs:
                service.kill()
        self.link.close()
        self.redis.stop()


def until(condition: Callable[[], bool], seconds: float, complaint: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.02)
