"""Those who look at the sessions, and what each is told.

Nothing is kept for them while nobody looks: a session's view begins when its first observer comes, and is dropped when
the last one goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from robodual.serving.errors import ResourceExhausted
from robodual.serving.metrics import Metrics
from robodual.serving.readiness import Readiness
from robodual.specialist.operator.pictures import Pictures
from robodual.specialist.sessions import NEVER, Session, Sessions
from robodual.specialist.view import Reference, Step, View

MOST = 8  # observers at a time
INTERVAL = 0.2  # seconds between two reports
ROWS = 20  # sessions a page


@dataclass(eq=False)
class _Look:
    """One session that is looked at."""

    session: Session
    view: View = field(default_factory=View)
    pictures: Pictures = field(default_factory=Pictures)
    observers: int = 0


class Observers:
    """Lets a few look at the sessions of a specialist."""

    def __init__(
        self, sessions: Sessions, metrics: Metrics, readiness: Readiness, *, operators: Collection[str] = ()
    ) -> None:
        """`operators`: the owners who may look at the sessions of all others too."""
        self.sessions = sessions
        self.operators = operators
        self.metrics = metrics
        self.readiness = readiness
        self.count = 0
        self._looks: dict[str, _Look] = {}
        self._closed = asyncio.Event()

    @contextlib.contextmanager
    def enter(self, owner: str, session: str | None, page: int) -> Iterator[Observer]:
        """A place for an observer of `session` (None: the one that was opened last) and of a page of the list.

        Sessions and errors of other owners are not there for one who is no operator.

        Raises `ResourceExhausted` if all are taken.
        """
        if self.count >= MOST:
            raise ResourceExhausted(f"{MOST} observers look already, and no more may; close one of their pages")
        self.count += 1
        observer = Observer(self, owner, session, page)
        try:
            yield observer
        finally:
            observer.turn_to(None)
            self.count -= 1

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """Sends all observers home."""
        self._closed.set()

    async def pause(self, gone: asyncio.Future[None]) -> None:
        """Returns when the next report is due, or there is none: at `close`, and when `gone` is done."""
        closed: asyncio.Future[Any] = asyncio.ensure_future(self._closed.wait())
        await asyncio.wait({closed, gone}, timeout=INTERVAL, return_when=asyncio.FIRST_COMPLETED)
        closed.cancel()

    def join(self, session: Session) -> _Look:
        look = self._looks.get(session.identity)
        if look is None or look.session is not session:
            look = self._looks[session.identity] = _Look(session)
            session.view = look.view
        look.observers += 1
        return look

    def leave(self, look: _Look) -> None:
        look.observers -= 1
        if not look.observers:
            look.session.view = None
            if self._looks.get(look.session.identity) is look:
                del self._looks[look.session.identity]


class Observer:
    """One observer, and how much it has been told."""

    def __init__(self, observers: Observers, owner: str, session: str | None, page: int) -> None:
        self._observers = observers
        self._owner = owner
        self._wanted = session
        self._page = page
        self._look: _Look | None = None
        self._steps = self._references = self._pictures = self._problems = 0

    def turn_to(self, session: Session | None) -> None:
        """Looks at `session` from here on, and no longer at another."""
        if self._look is not None and self._look.session is not session:
            self._observers.leave(self._look)
            self._look = None
        if self._look is None and session is not None:
            self._look = self._observers.join(session)
            self._steps = self._references = self._pictures = 0

    async def report(self) -> dict[str, Any]:
        """What there is to see now; of steps, reference chunks, pictures and errors, what is new to this observer."""
        metrics, readiness, sessions = self._observers.metrics, self._observers.readiness, self._observers.sessions
        by_code = metrics.answered()
        problems, self._problems = metrics.problems.since(self._problems), metrics.problems.count
        listed = [session for session in reversed(sessions.all()) if self._may_see(session.owner)]
        pages = max(1, -(-len(listed) // ROWS))
        page = min(self._page, pages)
        self.turn_to(next((session for session in listed if self._wanted in (None, session.identity)), None))
        return {
            "ready": readiness.ready,
            "missing": readiness.missing,
            "totals": {
                "answers": by_code.pop("OK", 0),
                "missed": by_code.pop("DEADLINE_EXCEEDED", 0),
                "errors": by_code.total(),
                "degraded": metrics.value(metrics.degraded),
                "waiting": metrics.value(metrics.queue_depth),
            },
            "problems": [asdict(problem) for problem in problems if self._may_see(problem.owner)],
            "page": page,
            "pages": pages,
            "open": len(listed),
            "sessions": [_row(session) for session in listed[(page - 1) * ROWS : page * ROWS]],
            "session": None if self._look is None else await self._detail(self._look),
        }

    def _may_see(self, owner: str) -> bool:
        return owner == self._owner or self._owner in self._observers.operators

    async def _detail(self, look: _Look) -> dict[str, Any]:
        session, view = look.session, look.view
        steps, self._steps = view.steps.since(self._steps), view.steps.count
        references, self._references = view.references.since(self._references), view.references.count
        pictures: dict[str, str] = {}
        if view.frame is not None:
            self._pictures, pictures = await look.pictures.latest(view.frame, self._pictures)
        return {
            **_row(session),
            "conditioning": None if session.newest == NEVER else list(session.newest),
            "steps": [_step(step) for step in steps],
            "references": [_reference(reference) for reference in references],
            "pictures": pictures,
        }


def _row(session: Session) -> dict[str, Any]:
    answer = session.answer
    episode, step = session.progress
    return {
        "id": session.identity,
        "instruction": session.instruction,
        "episode": episode,
        "step": step,
        "age": None if answer is None else answer.age,
        "degraded": answer is not None and answer.degraded,
        "milliseconds": None if answer is None else round(answer.timings[-1].milliseconds, 2),
        "idle": round(time.monotonic() - session.used_at, 1),
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "episode": step.episode,
        "step": step.number,
        "action": step.action.round(4).tolist(),
        "age": step.age,
        "degraded": step.degraded,
        "stages": {stage: round(seconds * 1e3, 2) for stage, seconds in step.stages},
    }


def _reference(reference: Reference) -> dict[str, Any]:
    return {
        "episode": reference.episode,
        "step": reference.step,
        "actions": reference.actions.round(4).tolist(),
    }
