"""The whole deployment on one machine: Redis, a generalist and a specialist, each in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from robodual.conditioning.valkey import EmbeddedServer, free_port
from robodual.parent import end_with_parent
from robodual.serving import settings_file
from robodual.serving.probe import LOOPBACK, waiting_for
from robodual.serving.settings import TABLES

SERVICES = ("generalist", "specialist")
LOCAL = "127.0.0.1"


class PairError(RuntimeError):
    """A process of the pair did not come up, or went away."""


@dataclass(frozen=True)
class Options:
    """How to start a pair. Ports of 0 are chosen freely; `settings` go to both services as ROBODUAL_* variables.

    `command`, followed by a service's name and flags, runs that service.
    """

    profile: str = "toy"
    redis_url: str | None = None
    ports: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(SERVICES, 0))
    http_ports: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(SERVICES, 0))
    checkpoints: Mapping[str, Path] = field(default_factory=dict)
    device: str | None = None  # of both services; None leaves it to the environment
    devices: str | None = None  # several, comma-separated, in the place of `device`
    settings: Mapping[str, str] = field(default_factory=dict)
    start_timeout: float = 300.0  # seconds until both are ready
    command: Sequence[str] = (sys.executable, "-m", "robodual", "serve")


class Pair:
    """Starts the three processes, waits until both services are ready, and stops them all on exit.

    `log` gets each line that a service writes, with the service's name. Children end with this process, however it ends
    (Linux: the kernel tells them; elsewhere: on a normal exit).

    Raises:
        PairError: from `start`, when there is no Redis to start, or a service exits or is not ready in time; the last
            lines are in the message.
    """

    def __init__(self, options: Options, log: Callable[[str, str], None] = lambda service, line: None) -> None:
        self.options = options
        self.redis_url = options.redis_url or ""
        self.ports = {name: options.ports.get(name) or free_port() for name in SERVICES}
        self.http_ports = {name: options.http_ports.get(name) or free_port() for name in SERVICES}
        self._log = log
        self._redis: EmbeddedServer | None = None
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._tails: dict[str, list[str]] = {name: [] for name in SERVICES}
        self._readers: list[threading.Thread] = []

    @property
    def addresses(self) -> dict[str, str]:
        """host:port of each service's gRPC endpoint."""
        return {name: f"{self.host(name)}:{port}" for name, port in self.ports.items()}

    def host(self, service: str) -> str:
        """Where this machine reaches the service, as a URL has it."""
        bound = self._setting(service, "host") or LOCAL
        host = LOOPBACK.get(bound, bound)
        return f"[{host}]" if ":" in host else host

    @property
    def pids(self) -> dict[str, int]:
        """The process id of each service, and of "redis" if it is the pair's own; while they run."""
        ids = {name: process.pid for name, process in self._processes.items()}
        if self._redis is not None and self._redis.pid is not None:
            ids["redis"] = self._redis.pid
        return ids

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that the services get: a replica that is to give the same bits needs the same."""
        # Engines that each spread over every core make each other's threads wait, at several times the cost.
        engines = len(SERVICES) * len((self.options.devices or "one").split(","))
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // engines))}
        # The URL may hold a password: it travels in the environment, which other users cannot list.
        return {**threads, **os.environ, **self.options.settings, "ROBODUAL_REDIS_URL": self.redis_url}

    def start(self) -> None:
        self._check_ports()
        try:
            if not self.redis_url:
                try:
                    self._redis = EmbeddedServer()
                    self._redis.start()
                except RuntimeError as error:
                    raise PairError(str(error)) from error
                self.redis_url = self._redis.url
            for name in SERVICES:
                self._spawn(name)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def check(self) -> None:
        """Raises PairError if a service has exited."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                tail = "\n".join(self._tails[name][-15:])
                raise PairError(f"the {name} exited with status {process.returncode}; its last lines:\n{tail}")

    def stop(self) -> None:
        """Terminates the services, waits for them to drain, then stops Redis. Safe to call twice."""
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self._processes.values():
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reader in self._readers:
            reader.join(timeout=5)
        if self._redis is not None:
            self._redis.stop()
            self._redis = None

    def __enter__(self) -> Pair:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _check_ports(self) -> None:
        """A service of another pair would answer for one of ours that is still starting, and look ready."""
        for name in SERVICES:
            for flag, port in ((f"--{name}-port", self.ports[name]), (f"--{name}-http-port", self.http_ports[name])):
                if not _is_free(port):
                    raise PairError(f"port {port} is taken: does another pair run? Choose a free one with {flag}")

    def _spawn(self, name: str) -> None:
        command = [*self.options.command, name, "--profile", self.options.profile]
        command += ["--port", str(self.ports[name]), "--http-port", str(self.http_ports[name])]
        for flag in ("device", "devices"):
            if (value := getattr(self.options, flag)) is not None:
                command += [f"--{flag}", value]
        if name in self.options.checkpoints:
            command += ["--checkpoint", str(self.options.checkpoints[name])]
        process = subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Ctrl-C reaches this process alone, which then stops the services in order.
            start_new_session=True,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        self._processes[name] = process
        assert process.stdout is not None
        reader = threading.Thread(target=self._read, args=(name, process.stdout), daemon=True)
        reader.start()
        self._readers.append(reader)

    def _read(self, name: str, stream: IO[str]) -> None:
        tail = self._tails[name]
        with stream:
            for line in stream:
                tail.append(line.rstrip())
                del tail[:-50]
                self._log(name, line.rstrip())

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.options.start_timeout
        waiting = set(SERVICES)
        places: dict[str, tuple[str, Path | None, Path | None]] = {}
        for name in SERVICES:
            certificate, key = self._setting(name, "tls_certificate"), self._setting(name, "tls_key")
            host = self._setting(name, "host") or LOCAL
            places[name] = host, Path(certificate) if certificate else None, Path(key) if key else None
        while waiting:
            self.check()
            waiting -= {name for name in waiting if not waiting_for(self.http_ports[name], *places[name])}
            if waiting and time.monotonic() > deadline:
                names = " and ".join(sorted(waiting))
                raise PairError(f"the {names} was not ready after {self.options.start_timeout:.0f} s; see its log")
            time.sleep(0.05)

    def _setting(self, service: str, name: str) -> str | None:
        """One of the settings, where the service will find it."""
        for prefix in (f"ROBODUAL_{service.upper()}_", "ROBODUAL_"):
            if value := self.environment.get(prefix + name.upper()):
                return value
        if not (file := self.environment.get("ROBODUAL_CONFIG")):
            return None
        try:
            value = settings_file.merged(settings_file.read(Path(file), TABLES), service).get(name)
        except ValueError as error:
            raise PairError(str(error)) from error
        return str(value) if value else None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the services do: connections that linger from an earlier pair do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOCAL, port))
        except OSError:
            return False
        return True
