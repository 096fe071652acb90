"""When the client asks the generalist."""

from __future__ import annotations

import re
from dataclasses import dataclass

from robodual_client import wire


@dataclass(frozen=True)
class Schedule:
    """`published` asks at steps 0, 7, 15, 23, … as RoboDual's evaluation does; `every-N` at 0, N, 2N, …: both wait for
    the answer. `async` waits at step 0 and then keeps one request in the air, always of the newest frame.
    """

    name: str
    period: int  # 0: async

    @classmethod
    def parse(cls, name: str) -> Schedule:
        """Raises ValueError for a name that is none of `published`, `every-N` (N from 1) and `async`."""
        if name == "published":
            return cls(name, 8)
        if name == "async":
            return cls(name, 0)
        match = re.fullmatch(r"every-([1-9][0-9]{0,4})", str(name))
        if match is None:
            raise ValueError(f"schedule must be 'published', 'async' or 'every-N' with N from 1, got {name!r}")
        return cls(name, int(match.group(1)))

    @property
    def asynchronous(self) -> bool:
        return self.period == 0

    def waits(self, step: int) -> bool:
        """Whether this step's frame goes to the generalist, and its answer is waited for before acting."""
        if step == 0 or self.asynchronous:
            return step == 0
        if self.name == "published":
            return (step + 1) % self.period == 0
        return step % self.period == 0

    @property
    def reference_window(self) -> wire.ReferenceWindow:
        """How the specialist cuts the reference chunk; the published cut fits the published steps alone."""
        return wire.REFERENCE_WINDOW_PUBLISHED if self.name == "published" else wire.REFERENCE_WINDOW_AGE
