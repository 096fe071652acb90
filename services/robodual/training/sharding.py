"""Weights, gradients and optimiser state spread over processes (FSDP2), and put together again to be saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from robodual.training.group import Group


def shard(learner: nn.Module, blocks: list[nn.Module], group: Group) -> None:
    """Spreads the trained parameters over the group, in place; each block is gathered when it is run.

    Frozen parameters stay whole on every process.
    """
    mesh = init_device_mesh(group.device.type, (group.size,))
    frozen = {parameter for parameter in learner.parameters() if not parameter.requires_grad}
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=frozen)
    fully_shard(learner, mesh=mesh, ignored_params=frozen)


@torch.no_grad()
def whole(value: Tensor) -> Tensor:
    """A tensor as one process would have it; every process must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole value, the same on every process, spread as `target` is."""
    value = value.to(target.device)
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value, target.device_mesh, target.placements)
