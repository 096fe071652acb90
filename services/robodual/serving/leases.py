"""Which sessions each owner has used of late, where a service keeps nothing of them itself."""

from __future__ import annotations

import time

from robodual.serving.errors import ResourceExhausted


class Leases:
    """At most `most` sessions of one owner; one counts for `ttl` seconds after it was used."""

    def __init__(self, *, most: int | None, ttl: float) -> None:
        self._most = most
        self._ttl = ttl
        self._used: dict[str, dict[str, float]] = {}  # when, by owner and session; the longest ago first

    def renew(self, owner: str, session: str) -> None:
        """Counts a use. Raises `ResourceExhausted` if the session is one too many."""
        if self._most is None:
            return
        now = time.monotonic()
        used = self._used.setdefault(owner, {})
        used.pop(session, None)
        for stale in [name for name, at in used.items() if at < now - self._ttl]:
            del used[stale]
        if len(used) >= self._most:
            raise ResourceExhausted(
                f"session_id: this token has {self._most} sessions in use, the most that it may; close one, "
                f"or wait until one has not been used for {self._ttl:g} s"
            )
        used[session] = now

    def end(self, owner: str, session: str) -> None:
        self._used.get(owner, {}).pop(session, None)
