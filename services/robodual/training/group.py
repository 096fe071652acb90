"""The processes of one training: started by torchrun, or just this one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from robodual.device import choose

# How long processes wait for the one that saves or evaluates, which can take hours. NCCL takes 10 minutes for a hang.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Group:
    """This process's place among `size`, and the device it works on.

    What the processes agree on goes over `hosts` (gloo), which has `PATIENCE`; what they compute goes over the default
    group, which ends when one of them hangs.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    hosts: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes; the same tensor where there is one."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, self.hosts)
        return bool(flags)

    def same(self, number: int) -> bool:
        """Whether it is one number in all processes."""
        if self.size == 1:
            return True
        extremes = torch.tensor([number, -number])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, self.hosts)
        return not extremes.sum()

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier(self.hosts)


@contextmanager
def joined(device: str = "auto") -> Iterator[Group]:
    """Joins the group that torchrun's environment describes (RANK, WORLD_SIZE, LOCAL_RANK); NCCL on GPUs, else gloo.

    device: auto (CUDA where there is one), cpu, cuda or cuda:N; under torchrun, cuda is the process's own GPU.

    Raises:
        ValueError: if the device is not there.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    place = _device(device, int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else None)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield Group(place)
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    hosts = dist.new_group(backend="gloo", timeout=PATIENCE)
    failed = True
    try:
        yield Group(place, rank, size, hosts)
        failed = False
    finally:
        # NCCL ends together: a process that fails alone would wait here for the others, and they for it.
        dist.destroy_process_group(hosts if failed and place.type == "cuda" else None)


def _device(name: str, local_rank: int | None) -> torch.device:
    device = choose(name)
    return device if device.type == "cpu" or local_rank is None else choose(f"cuda:{local_rank}")
