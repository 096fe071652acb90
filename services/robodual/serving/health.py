"""Whether the services of a process serve, as `grpc.health.v1` tells it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """One state for all `services`. Setting it waits for no watcher: grpcio's own waits for one that does not read."""

    def __init__(self, *services: str) -> None:
        self._services = services
        self._state = health_pb2.HealthCheckResponse.NOT_SERVING
        self._changed = asyncio.Event()

    def set(self, *, serving: bool) -> None:
        states = health_pb2.HealthCheckResponse
        self._state = states.SERVING if serving else states.NOT_SERVING
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Any) -> Any:
        state = self._of(request.service)
        if state == SERVICE_UNKNOWN:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"service: expected one of {', '.join(filter(None, self._services))}, or none",
            )
        return health_pb2.HealthCheckResponse(status=state)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        told = None
        while True:
            changed, state = self._changed, self._of(request.service)
            if state != told:
                told = state
                yield health_pb2.HealthCheckResponse(status=state)
            await changed.wait()

    def _of(self, service: str) -> Any:
        return self._state if service in self._services else SERVICE_UNKNOWN
