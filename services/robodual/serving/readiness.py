"""What a service still waits for, and the work in its background that it cannot be ready without."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

logger = structlog.get_logger(__name__)


class Readiness:
    """Ready when nothing is missing. Starts with everything in `missing`, a reason for each name."""

    def __init__(self, **missing: str) -> None:
        self._missing = dict(missing)
        self._changed = asyncio.Event()

    @property
    def ready(self) -> bool:
        return not self._missing

    @property
    def missing(self) -> dict[str, str]:
        """What is missing, and why."""
        return dict(self._missing)

    def lack(self, name: str, reason: str) -> None:
        self._missing[name] = reason
        self._changed.set()

    def meet(self, name: str) -> None:
        self._missing.pop(name, None)
        self._changed.set()

    async def change(self) -> None:
        """Returns after the next call of `lack` or `meet`; for one waiter."""
        await self._changed.wait()
        self._changed.clear()


class Background:
    """Tasks that run as long as the service does. One that ends by itself is logged, and readiness ends with it."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness
        self._tasks: list[asyncio.Task[None]] = []

    def run(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    async def close(self) -> None:
        """Ends them all."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            logger.error("background work ended", work=task.get_name(), exc_info=task.exception())
            self._readiness.lack(task.get_name(), "its background work has ended; restart the service")
