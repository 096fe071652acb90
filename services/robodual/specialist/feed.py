"""Brings new conditionings from the store to the device, off the hot path."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog
import torch

from robodual.conditioning.codec import RecordError
from robodual.conditioning.store import Announced, ForeignSession, Interrupted, Store, StoreUnavailable
from robodual.serving.metrics import Metrics
from robodual.serving.readiness import Readiness
from robodual.specialist.engine import Projected
from robodual.specialist.sessions import Conditioned, Refused, Session, Sessions

logger = structlog.get_logger(__name__)

PARALLEL = 8  # fetches at a time, after a reconnect


class Feed:
    """Follows the store's announcements for the open sessions; each version is fetched and projected once."""

    def __init__(
        self,
        store: Store,
        sessions: Sessions,
        project: Callable[[Session, torch.Tensor], Awaitable[Projected]],
        *,
        readiness: Readiness,
        metrics: Metrics,
    ) -> None:
        self.up: bool | None = None  # whether announcements arrive; None before the first look
        self._store = store
        self._sessions = sessions
        self._project = project
        self._readiness = readiness
        self._metrics = metrics
        self._permits = asyncio.Semaphore(PARALLEL)
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Follows until it is cancelled."""
        async for event in self._store.subscribe():
            if isinstance(event, Announced):
                session = self._sessions.find(event.session)
                if session is not None and event.version > max(session.newest, (session.episode, -1)):
                    self.look(session)
            elif isinstance(event, Interrupted):
                self._lost(event.reason)
            else:
                self._found()

    def look(self, session: Session) -> None:
        """Has the session's latest conditioning fetched; returns at once."""
        session.stale = True
        if not session.following:
            session.following = True
            task = asyncio.create_task(self._follow(session))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    async def refresh(self, session: Session) -> bool:
        """Fetches and projects the session's latest conditioning. A store or a record that fails is logged.

        Returns whether the store answered: then what it holds is here, or of no use.
        """
        async with session.fetching:
            started = time.perf_counter()
            try:
                conditioning = await self._store.fetch(session.identity, session.owner)
                if conditioning is None or conditioning.version <= max(session.newest, (session.episode, -1)):
                    return True
            except StoreUnavailable as error:
                logger.warning("conditioning not fetched", session=session.identity, reason=str(error))
                return False
            except ForeignSession:
                # The store knows who came first at any replica; whoever came first at this one has no right to it.
                logger.warning("session closed: in the store it is another's", session=session.identity)
                if self._sessions.find(session.identity) is session:
                    self._sessions.drop(session.identity)
                return True
            except RecordError as error:
                self._refuse(session, str(error))
                session.spoil()
                return True
            fetched = time.perf_counter()
            self._metrics.stage("fetch").observe(fetched - started)
            try:
                projected = await self._project(session, conditioning.hidden_states)
            except ValueError as error:
                self._refuse(session, str(error))
                session.refuse(Refused(conditioning.version, str(error)))
            else:
                took = time.perf_counter() - started
                self._metrics.stage("project").observe(took - (fetched - started))
                told = (conditioning.reference_actions, conditioning.instruction)
                session.keep(Conditioned(conditioning.version, projected, *told, took))
            return True

    async def close(self) -> None:
        """Ends the fetches that are under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _refuse(self, session: Session, reason: str) -> None:
        self._metrics.refused_records.inc()
        logger.error("conditioning refused", session=session.identity, reason=reason)

    async def _follow(self, session: Session) -> None:
        async with self._permits:
            try:
                while session.stale and self._sessions.find(session.identity) is session:
                    session.stale = False
                    await self.refresh(session)
            finally:
                session.following = False

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("conditioning not projected", exc_info=task.exception())

    def _lost(self, reason: str) -> None:
        if self.up is not False:
            logger.warning("store out of reach: going on with the conditionings at hand", reason=reason)
        self.up = False
        self._metrics.store_up.set(0)
        self._readiness.lack("store", reason)

    def _found(self) -> None:
        if self.up is False:
            logger.info("store back")
        self.up = True
        self._metrics.store_up.set(1)
        self._readiness.meet("store")
        # Announcements in the gap are lost.
        for session in self._sessions.all():
            self.look(session)
