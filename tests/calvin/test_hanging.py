"""A simulator that hangs is killed and its sequence repeated; one that is slow, or waits, is left alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_table import FakeTable
from running import outcomes, start, wait_until_gone, workers_of

from robodual_client.calvin import EvaluationError, evaluate, workers
from robodual_client.calvin.hanging import STARTING, Watch, Watched, share

Make = "Callable[..., Options]"
HANGING = "fake_table:Hanging"

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def hanging(tmp_path: Path, where: str) -> dict[str, Any]:
    return {"env": HANGING, "env_options": {"where": where, "mark": str(tmp_path / "mark")}, "hang_limit": 1.0}


def wait_for(mark: Path) -> None:
    deadline = time.monotonic() + 60
    while not mark.exists():
        assert time.monotonic() < deadline, "nothing hung in a minute"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("start", r"for 4 s in its start, after 0 control steps"),
        ("reset", r"for 4 s in reset\(\), after 0 control steps"),
        ("step", r"for 1 s in step\(\), after 1 control steps"),
    ],
)
def test_a_simulator_that_hangs_is_killed_and_its_sequence_repeated(
    options: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, said: str
) -> None:
    numbers = (3, 4)
    whole = evaluate(options("whole", numbers))
    capsys.readouterr()
    results = evaluate(options("run", numbers, **hanging(tmp_path, where)))
    assert (tmp_path / "mark").exists()
    assert outcomes(results) == outcomes(whole)
    repeated = [line for line in capsys.readouterr().err.splitlines() if "repeated" in line]
    assert len(repeated) == 1
    assert re.match(rf"sequence 3 is repeated: the simulator hung {said}, and was killed; .*--hang-limit", repeated[0])
    log = tmp_path / "run" / "logs" / "worker-1.log"
    assert str(log) in repeated[0]
    assert "fake_table.py" in log.read_text(), "where in Python it hung"


@pytest.mark.parametrize(
    "slow",
    [
        {"env": HANGING, "env_options": {"slow": 0.3}, "ep_len": 6},
        {"policy_options": {"skill": 0.0, "pause": 1.5}},
        {"realtime": 0.6},
    ],
    ids=["simulator", "policy", "clock"],
)
def test_what_is_slow_but_lives_is_left_alone(
    options: Make, capsys: pytest.CaptureFixture[str], slow: dict[str, Any]
) -> None:
    given = {"ep_len": 3, "policy_options": {"skill": 0.0}, "hang_limit": 1.0, **slow}
    began = time.monotonic()
    evaluate(options("run", (0,), **given))
    assert time.monotonic() - began > 1.5
    assert "repeated" not in capsys.readouterr().err


@needs_proc
def test_time_in_which_the_evaluation_was_stopped_does_not_count(options: Make) -> None:
    slow = {"env": HANGING, "env_options": {"slow": 0.4}, "policy_options": {"skill": 0.0}, "ep_len": 10}
    process = start(options("run", (0,), hang_limit=1.0, **slow))
    while not workers_of(process.pid):
        time.sleep(0.02)
    time.sleep(3)
    stopped = [process.pid, *workers_of(process.pid)]
    for signal_ in (signal.SIGSTOP, signal.SIGCONT):
        for each in stopped:
            os.kill(each, signal_)
        time.sleep(3)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "repeated" not in stderr


@pytest.mark.slow
@needs_proc
def test_ctrl_c_while_simulators_hang_ends_them(options: Make, tmp_path: Path) -> None:
    process = start(options("run", **{**hanging(tmp_path, "step"), "hang_limit": 0.0}))
    wait_for(tmp_path / "mark")
    children = workers_of(process.pid)
    assert children
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in stderr
    wait_until_gone(children)


def test_a_process_that_cannot_be_killed_is_left_behind(
    options: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[subprocess.Popen[str]] = []
    kill = subprocess.Popen.kill
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: left.append(process))
    monkeypatch.setattr(workers, "STOP_SECONDS", 2.0)
    try:
        results = evaluate(options("run", (0, 1), **hanging(tmp_path, "step")))
    finally:
        for process in left:
            kill(process)
            process.wait()
    assert len(results.sequences) == 2
    assert left


def test_only_time_inside_the_simulator_counts_and_more_of_it_before_the_first_step() -> None:
    watch = Watch(limit=20.0)
    memory = share(watch.path)
    assert not Path(watch.path).exists()

    def look(times: int) -> str | None:
        seen = [watch.look() for _ in range(times)]
        assert seen[:-1] == [None] * (times - 1)
        return seen[-1]

    class Looked(FakeTable):
        def step(self, action: np.ndarray) -> Any:
            self.hang = look(self.looks)
            return super().step(action)

    assert look(20 * STARTING - 1) is None
    assert "80 s in its start" in str(look(1))
    env = Looked()
    watched = Watched(env, memory)
    assert look(1000) is None
    watched.reset(np.zeros(15), np.zeros(24))
    for env.looks, hangs in (
        (20 * STARTING, False),
        (20, False),
        (21, True),
    ):  # a step's first look sees that it is new
        watched.step(np.zeros(7))
        assert (env.hang is not None) == hangs
        assert look(1000) is None
    assert "20 s in step(), after 2 control steps" in str(env.hang)


@pytest.mark.parametrize("limit", [-1.0, 0.5, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(options: Make, limit: float) -> None:
    with pytest.raises(EvaluationError, match="hang_limit: must be 1 to 86400 seconds, or 0"):
        options(hang_limit=limit)
