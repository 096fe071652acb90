"""What a service is, as `GetInfo` and `/info` show it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

import robodual
from robodual.facts import EngineFacts
from robodual_client import wire


def describe(service: str, facts: EngineFacts, sensors: Iterable[str]) -> wire.InfoResponse:
    """The answer of `service` ("generalist" or "specialist") to GetInfo."""
    return wire.InfoResponse(
        service=service,
        version=robodual.__version__,
        profile=facts.profile,
        checkpoint=facts.checkpoint,
        device=facts.device,
        dtype=facts.dtype,
        parameters=facts.parameters,
        weight_bytes=facts.weight_bytes,
        sensors=sensors,
        # Sums over more threads are rounded otherwise: replicas that must agree to the last bit need the same number.
        details={**facts.details, "threads": str(torch.get_num_threads())},
    )
