"""What a service still waits for, and the work in its background that it cannot be ready without."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

logger = structlog.get_logger(__name__)

ASK_AGAIN = 0.1  # seconds until a task that was cancelled and goes on is cancelled again


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
        """Ends them all; asks again, since before Python 3.12 wait_for can lose a cancellation to an answer."""
        pending = set(self._tasks)
        while pending:
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=ASK_AGAIN)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            logger.error("background work ended", work=task.get_name(), exc_info=task.exception())
            self._readiness.lack(task.get_name(), "its background work has ended; restart the service")
