"""Two processes of a training stay together, whatever happens to one of them."""

from __future__ import annotations

import faulthandler
import os
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from robodual import tensor_file
from robodual.facts import CheckpointError
from robodual.training import checkpoint
from robodual.training.group import Group, joined
from robodual.training.loop import Learner, Settings, train


def in_two_processes(work: Callable[[Group], Any]) -> list[Any]:
    """What it returns in each process of a group of two."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with ProcessPoolExecutor(2, get_context("spawn")) as processes:
        return [future.result() for future in [processes.submit(_work, work, rank, port) for rank in range(2)]]


def _work(work: Callable[[Group], Any], rank: int, port: int) -> Any:
    faulthandler.dump_traceback_later(60, exit=True)  # a deadlock
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    with joined("cpu") as group:
        return work(group)


class Numbers(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        return torch.ones(1)


class Line(Learner[Tensor]):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.layer(batch).square().mean(), {}

    def export(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        pass


def run(group: Group, output: Path, max_steps: int, **options: Any) -> int:
    settings = Settings(output, max_steps, batch_size=2, learning_rate=1e-3, save_steps=2, eval_every=2)
    return train(Line(), Numbers(), torch.stack, settings, group, described={}, **options)


@pytest.mark.parametrize("fsdp", [False, True])
def test_autocast_keeps_no_copy_of_a_weight_that_was_gathered(fsdp: bool, tmp_path: Path) -> None:
    kept: list[bool] = []

    class Looking(Line):
        def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            kept.append(torch.is_autocast_cache_enabled())
            return super().forward(batch)

    settings = Settings(tmp_path, 2, batch_size=2, learning_rate=1e-3, bf16=True, fsdp=fsdp)
    train(Looking(), Numbers(), torch.stack, settings, Group(torch.device("cpu")), described={})
    assert kept == [not fsdp] * 2


def fill_the_disk(output: Path, group: Group) -> tuple[int, list[str], str]:
    """Of a training with no space for its second step's checkpoint, and of one with space for none."""
    write, tried, evaluated = tensor_file.write, [], []

    def full(*arguments: Any) -> None:
        tried.append(arguments)
        if len(tried) <= 2 or max_steps == 1:  # once for an evaluation, and once more for the step
            raise OSError(28, "No space left on device")
        write(*arguments)

    def evaluate(path: Path) -> dict[str, float]:
        evaluated.append(path.name)
        return {}

    checkpoint.tensor_file = SimpleNamespace(write=full)  # type: ignore[assignment]
    max_steps = 6
    done = run(group, output / "some", max_steps, evaluate=evaluate)
    max_steps = 1
    try:
        run(group, output / "none", max_steps)
    except CheckpointError as error:
        return done, evaluated, str(error)
    raise AssertionError("a training without a checkpoint ended as if it had one")


def test_a_failed_save_is_known_to_all(tmp_path: Path) -> None:
    leading, other = in_two_processes(partial(fill_the_disk, tmp_path))
    assert leading[:2] == (6, ["step-00000004", "step-00000006"])
    assert other[:2] == (6, [])
    assert "No space left on device" in leading[2]
    assert "the leading process could not write it" in other[2]


def test_an_evaluation_finds_the_memory_that_the_steps_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its services are other processes, for which what PyTorch keeps of a GPU is not there."""
    happened: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append("freed"))

    def evaluate(path: Path) -> dict[str, float]:
        happened.append(path.name)
        return {}

    run(Group(torch.device("cpu")), tmp_path, 4, evaluate=evaluate)
    assert happened == ["freed", "step-00000002", "freed", "step-00000004"]


def be_late(group: Group) -> tuple[bool, str]:
    """The leading process comes to each meeting later than the default group waits, as from a long evaluation."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.5))
    for meet in (group.wait, lambda: group.any(group.leads)):
        time.sleep(1.0 if group.leads else 0.0)
        found = meet()
    time.sleep(1.0 if group.leads else 0.0)
    try:
        group.mean(torch.zeros(1))
    except RuntimeError as error:
        return bool(found), str(error)
    return bool(found), ""


def test_processes_wait_for_one_another_longer_than_for_a_hang(tmp_path: Path) -> None:
    leading, other = in_two_processes(be_late)
    assert leading[0]
    assert other[0]
    assert "imed out" in other[1]


def resume_apart(output: Path, group: Group) -> str:
    """Of machines without a common disk, where the leading process alone has written checkpoints."""
    own = output / f"machine-{group.rank}"
    run(group, own, 2)
    try:
        run(group, own, 4, resume=True)
    except CheckpointError as error:
        return str(error)
    raise AssertionError("processes went on from different steps")


def test_processes_resume_at_one_step(tmp_path: Path) -> None:
    leading, other = in_two_processes(partial(resume_apart, tmp_path))
    assert "the processes would resume at different steps, this one at 2; the output must be on a disk" in leading
    assert "this one at 0" in other
