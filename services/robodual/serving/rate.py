"""How many requests a caller may make."""

from __future__ import annotations

import time

from robodual.serving.errors import ResourceExhausted


class Rate:
    """At most `most` requests a second on average; after a pause, a second's worth of them at once.

    The generic cell rate algorithm: one number stands for the bucket, the time at which it would be full again.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._interval = 1.0 / most
        self._slack = max(0.0, 1.0 - self._interval)
        self._full_at = 0.0

    def take(self) -> None:
        """Counts a request. Raises `ResourceExhausted` if it is one too many, which then does not count."""
        now = time.monotonic()
        wait = self._full_at - self._slack - now
        if wait > 0:
            raise ResourceExhausted(
                f"max_rate: this token may make {self._most:g} requests a second; "
                f"send fewer, or try again in {wait * 1e3:.0f} ms"
            )
        self._full_at = max(self._full_at, now) + self._interval
