"""A service as a process of its own: ready line, signals, and what it says when it cannot start."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from replicas import act, version

from robodual_client import wire
from robodual_client.wire import rpc

# A service whose model takes a minute.
LOADING = """
import asyncio, time
from contextlib import asynccontextmanager
from robodual.serving.server import run
from robodual.serving.settings import SpecialistSettings

@asynccontextmanager
async def service():
    print("loading", flush=True)
    await asyncio.to_thread(time.sleep, 60)
    yield

run(SpecialistSettings(), service())
"""


@contextmanager
def process(service: str, url: str, **environment: str) -> Iterator[tuple["subprocess.Popen[str]", list[str]]]:
    """The process once it has written its ready line, and its lines so far."""
    variables = {
        "ROBODUAL_REDIS_URL": url,
        "ROBODUAL_LOG_FORMAT": "json",
        f"ROBODUAL_{service.upper()}_PORT": "0",
        f"ROBODUAL_{service.upper()}_HTTP_PORT": "0",
    }
    child = subprocess.Popen(
        [sys.executable, "-m", "robodual", "serve", service],
        env={**os.environ, **variables, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    lines: list[str] = []
    ready = threading.Event()

    def read() -> None:
        for line in child.stderr:  # type: ignore[union-attr]
            lines.append(line)
            if '"event": "ready"' in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert ready.wait(60), lines
        yield child, lines
    finally:
        child.kill()
        child.wait()
        reader.join()
        child.stderr.close()


def port(lines: list[str]) -> int:
    found = re.search(r'"port": (\d+)', "".join(lines))
    assert found, lines
    return int(found[1])


@pytest.mark.slow
@pytest.mark.parametrize(("service", "number"), [("generalist", signal.SIGTERM), ("specialist", signal.SIGINT)])
def test_it_says_when_it_is_ready_and_ends_in_order_when_told(service: str, number: signal.Signals, url: str) -> None:
    with process(service, url) as (child, lines):
        name = {"generalist": rpc.GENERALIST, "specialist": rpc.SPECIALIST}[service]
        with grpc.insecure_channel(f"127.0.0.1:{port(lines)}") as channel:
            assert rpc.Stub(channel, name).GetInfo(wire.InfoRequest(), timeout=10).profile == "playtable"
        child.send_signal(number)
        assert child.wait(15) == 0
    assert '"event": "stopped"' in lines[-1]


def test_a_load_in_progress_is_not_waited_for_when_ctrl_c_comes() -> None:
    child = subprocess.Popen([sys.executable, "-c", LOADING], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "loading\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(10) == 130


@pytest.mark.skipif(sys.platform != "linux", reason="PID namespaces are Linux's")
def test_the_first_process_of_a_container_ends_at_once_when_told_while_it_starts(tmp_path: Path) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs to make a PID namespace")
    os.mkfifo(tmp_path / "config.toml")
    environment = {**os.environ, "ROBODUAL_CONFIG": str(tmp_path / "config.toml")}
    serve = [sys.executable, "-m", "robodual", "serve", "specialist"]
    with subprocess.Popen([*namespace, *serve], env=environment) as child:
        try:
            with (tmp_path / "config.toml").open("wb"):  # waits until it reads
                first = int(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text())
                os.kill(first, signal.SIGTERM)
                assert child.wait(10) == 128 + signal.SIGTERM
        finally:
            child.kill()


@pytest.mark.slow
def test_a_waiting_act_is_answered_and_a_stream_ended_when_told_to_stop(url: str) -> None:
    # The service's own limit: at a caller's, its answer and the caller's giving up would race.
    with (
        process("specialist", url, ROBODUAL_SPECIALIST_MAX_WAIT="2") as (child, lines),
        grpc.insecure_channel(f"127.0.0.1:{port(lines)}") as channel,
    ):
        stub = rpc.Stub(channel, rpc.SPECIALIST)
        stub.Reset(wire.ResetRequest(session_id="robot", episode=1), timeout=10)
        waiting = stub.Act.future(act("robot", 0, min_conditioning=version(1, 0)))
        more = threading.Event()

        def requests() -> Iterator[wire.ActRequest]:
            more.wait(30)
            yield from ()

        stream = stub.ActStream(requests())
        stub.GetInfo(wire.InfoRequest(), timeout=10)
        child.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as ended:
            next(stream)
        assert ended.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        with pytest.raises(grpc.RpcError) as answered:
            waiting.result(10)
        assert answered.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
        assert "min_conditioning: (1, 0)" in answered.value.details()  # type: ignore[attr-defined]
        more.set()
        assert child.wait(15) == 0


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line_and_an_exit(url: str) -> None:
    with process("specialist", url) as (_, lines):
        taken = {"ROBODUAL_SPECIALIST_PORT": str(port(lines))}
        with process("specialist", url, **taken) as (child, said):
            assert child.wait(15) == 1
    assert "cannot listen on 127.0.0.1" in said[-1]
    assert "Traceback" not in "".join(said)
