"""What a service is, as `GetInfo` and `/info` show it."""

from __future__ import annotations

from collections.abc import Iterable

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
        details=facts.details,
    )
