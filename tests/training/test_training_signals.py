"""What is sent to a training's whole process group finishes its step and is saved, with workers that read its data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

SCRIPT = """
import sys
import time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from test_training_agreement import Line, Numbers
from robodual.training.group import Group
from robodual.training.loop import Settings, train

class SlowLine(Line):
    def export(self, folder, trained):
        print("saving", flush=True)
        time.sleep(1)

def report(shown):
    print("at", shown.step, flush=True)
    time.sleep(0.5)  # as long a step as a large model's
    if shown.step == 2 and sys.argv[3:] == ["fail"]:
        raise RuntimeError("no good")

settings = Settings(
    Path(sys.argv[2]), 10**6, batch_size=2, learning_rate=1e-3, save_steps=10**6, num_workers=2, log_steps=1
)
group = Group(torch.device("cpu"))
print("stopped at", train(SlowLine(), Numbers(), torch.stack, settings, group, described={}, report=report))
"""


@contextmanager
def started(output: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A training whose two workers have both read, in a process group of its own, and those workers."""
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(output), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert [process.stdout.readline() for _ in range(2)] == ["at 1\n", "at 2\n"]
            workers = psutil.Process(process.pid).children()
            assert len(workers) == 2
            yield process, workers
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def gone(workers: list[psutil.Process]) -> bool:
    return not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_the_group_are_one_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path) as (process, workers):
        os.killpg(process.pid, number)
        assert process.stdout is not None
        while process.stdout.readline() != "saving\n":
            assert process.poll() is None
        os.killpg(process.pid, number)  # by Slurm and torchrun, or impatience
        said, _ = process.communicate(timeout=60)
        assert gone(workers)
    assert process.returncode == 0
    step = int(said.removeprefix("stopped at "))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{step:08d}"]


def test_workers_end_with_a_training_that_is_killed(tmp_path: Path) -> None:
    with started(tmp_path) as (process, workers):
        process.kill()
        process.communicate(timeout=60)
        deadline = time.monotonic() + 30
        while not gone(workers):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_workers_end_with_a_training_that_fails(tmp_path: Path) -> None:
    with started(tmp_path, "fail") as (process, workers):
        process.communicate(timeout=60)
        assert gone(workers)
    assert process.returncode == 1
