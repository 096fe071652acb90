"""What a service still waits for."""

from __future__ import annotations

import asyncio


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
