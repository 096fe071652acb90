"""The wall clock jumps: Redis counts expiries by it, the services and the client nothing.

Redis alone runs on a moved clock here: under libfaketime, threads of gRPC that wait hang for reasons of libfaketime's.
That nothing else goes by the wall clock is checked in the sources.
"""

from __future__ import annotations

import ast
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from deployment import Deployment, until
from recovery import Report
from robots import Robot, Undisturbed

ROOT = Path(__file__).parents[2]
SOURCES = [
    *(ROOT / "clients/robodual_client").glob("*.py"),
    *(ROOT / "services/robodual").glob("*.py"),
    *(path for name in ("conditioning", "generalist", "serving", "specialist")
      for path in (ROOT / "services/robodual" / name).glob("*.py")),
]  # fmt: skip
WALL_CLOCK = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("date", "today")}
# What is only ever shown: when an error was (the operator's page), when a stage ended (traces).
SHOWN = {
    ROOT / "services/robodual/serving/calls.py": {("time", "time")},
    ROOT / "clients/robodual_client/tracing.py": {("time", "time_ns")},
}


@pytest.fixture
def clock(deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that says how far the clock of Redis, restarted for it, is off."""
    library = _libfaketime()
    if library is None:
        pytest.skip("no libfaketime: pip install libfaketime")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    deployment.kill_redis()
    with monkeypatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        patch.setenv("FAKETIME_TIMESTAMP_FILE", str(clock))
        patch.setenv("FAKETIME_NO_CACHE", "1")
        patch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        deployment.redis.start()
    deployment.mend()
    yield clock
    deployment.kill_redis()


def test_a_clock_that_jumps_expires_records_which_are_made_again(
    deployment: Deployment, undisturbed: Undisturbed, report: Report, clock: Path
) -> None:
    replicas = deployment.specialists
    robots = [Robot(number, deployment.generalist.address, list(replicas)) for number in (1, 2)]
    for robot in robots:
        robot.start(hold=[3, 10, 18] if robot is robots[0] else [])
    key = f"robodual:{robots[0].client.session}:conditioning"

    with redis.Redis.from_url(deployment.redis.url) as client:
        robots[0].reach(3)
        assert client.exists(key)
        clock.write_text("+30d")
        until(lambda: not client.exists(key), 10, lambda: "the clock did not jump")
        robots[0].go(3)
        robots[0].reach(10)
        clock.write_text("-30d")
        until(lambda: client.time()[0] < time.time() - 86400, 10, lambda: "the clock did not jump")
        robots[0].go(10)
        robots[0].reach(18)
        assert client.exists(key)
        lost = time.monotonic()
        clock.write_text("+400d")
        until(lambda: not client.exists(key), 10, lambda: "the clock did not jump")
        victim = replicas[robots[0].answers[-1].address]
        victim.kill()
        back = time.monotonic()
        robots[0].go(18)
        for robot in robots:
            robot.join()

    undisturbed.check(*robots)
    assert not any(robot.errors for robot in robots)
    report("clock of Redis jumps by months, a specialist lost then", robots, lost=lost, back=back)
    victim.start()


def test_nothing_decides_by_the_wall_clock() -> None:
    read = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = set()
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = {(node.value.id, node.attr)}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module, alias.name) for alias in node.names}
            if names & WALL_CLOCK - SHOWN.get(path, set()):
                read.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not read, "use time.monotonic; a time that is only shown is fine: add it to SHOWN"


def _libfaketime() -> Path | None:
    """From the `libfaketime` wheel, else the system's."""
    found = importlib.util.find_spec("libfaketime")
    folders = [] if found is None or found.origin is None else [Path(found.origin).parent / "vendor/libfaketime/src"]
    candidates = [folder / "libfaketime.so.1" for folder in folders]
    candidates += sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    return next((path for path in candidates if path.exists()), None)
