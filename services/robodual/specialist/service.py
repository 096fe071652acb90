"""The specialist over gRPC: an action for each observation, on the latest conditioning."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import structlog
import torch

from robodual.conditioning.record import Version
from robodual.facts import together
from robodual.serving import auth, fields, server
from robodual.serving.batching import Batcher
from robodual.serving.connect import connect
from robodual.serving.device_loss import guarded
from robodual.serving.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from robodual.serving.http import Pages
from robodual.serving.info import describe
from robodual.serving.metrics import Metrics
from robodual.serving.readiness import Background, Readiness
from robodual.serving.server import Server
from robodual.serving.settings import SpecialistSettings
from robodual.serving.timings import LATER, Timings
from robodual.specialist import observation
from robodual.specialist.control import noise
from robodual.specialist.engine import Answer, Frame, Projected, Request, SpecialistEngine
from robodual.specialist.engines import load, warm_up
from robodual.specialist.feed import Feed
from robodual.specialist.layouts import Layouts, Received
from robodual.specialist.operator.observers import Observers
from robodual.specialist.operator.pages import events, files
from robodual.specialist.sessions import Conditioned, Session, Sessions
from robodual.specialist.view import Reference, Step
from robodual_client import wire

logger = structlog.get_logger(__name__)

PATIENCE = 0.05  # seconds that an announcement gets before the store is asked directly
MARGIN = 0.02  # seconds before a caller's deadline at which waiting ends, so that the reason still reaches it
DRAINING = "the service is shutting down; go on with another replica"


class SpecialistService:
    """The methods of `robodual.v1.Specialist`, as protos/robodual/v1/specialist.proto describes them."""

    def __init__(
        self,
        settings: SpecialistSettings,
        batchers: Sequence[Batcher[Request, Answer]],
        sessions: Sessions,
        feed: Feed,
        info: wire.InfoResponse,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._batchers = batchers
        self._sessions = sessions
        self._feed = feed
        self._info = info
        self._metrics = metrics
        self._layouts = Layouts(info.sensors)
        self._loop = asyncio.get_running_loop()
        self._draining = False
        self._idle_streams: set[asyncio.Task[Any]] = set()

    @property
    def readers(self) -> dict[str, Callable[[bytes], Received]]:
        """What reads the requests of Act and ActStream."""
        return dict.fromkeys(("Act", "ActStream"), self._layouts.receive)

    async def Act(self, request: Received, context: Any) -> wire.ActResponse:
        answer, follow_up = await self._act(request, server.deadline(context))
        self._loop.call_later(LATER, follow_up)
        return answer

    async def ActStream(self, requests: AsyncIterator[Received], context: Any) -> AsyncIterator[wire.ActResponse]:
        stream = asyncio.current_task()
        if stream is None:
            raise RuntimeError("a stream runs in a task")
        deadline = server.deadline(context)
        self._idle_streams.add(stream)
        try:
            if self._draining:
                raise Unavailable(DRAINING)
            async for request in requests:
                self._idle_streams.discard(stream)
                answer, follow_up = await self._act(request, deadline)
                try:
                    yield answer  # which gRPC sends before it goes on here
                finally:
                    follow_up()
                if self._draining:
                    raise Unavailable(DRAINING)
                self._idle_streams.add(stream)
        except asyncio.CancelledError:
            if not self._draining:
                raise
            raise Unavailable(DRAINING) from None
        finally:
            self._idle_streams.discard(stream)

    async def Reset(self, request: wire.ResetRequest, context: Any) -> wire.ResetResponse:
        identity = fields.session_id(request)
        window = observation.window(request.reference_window, "reference_window")
        session = self._sessions.open(identity, auth.owner())
        async with session.lock:
            self._check_open(session)
            episode, step = session.progress
            if request.episode < episode:
                raise FailedPrecondition(f"episode: the session is at episode {episode}, after {request.episode}")
            if request.episode == episode and step >= 0:
                raise FailedPrecondition(f"episode: {episode} has begun already; reset to a later one")
            if request.episode == episode and session.client not in (0, request.client):
                raise FailedPrecondition(
                    f"session_id: another client has begun episode {episode} of {identity}; take another name"
                )
            session.begin(request.episode, request.seed, window)
            session.client = request.client
        # Its conditioning may be there already, announced before the session was open.
        self._feed.look(session)
        return wire.ResetResponse()

    async def Close(self, request: wire.CloseRequest, context: Any) -> wire.CloseResponse:
        return wire.CloseResponse(was_open=self._sessions.close(fields.session_id(request), auth.owner()))

    async def GetInfo(self, request: wire.InfoRequest, context: Any) -> wire.InfoResponse:
        return self._info

    def end_streams(self) -> None:
        """Ends each stream after the request that it is at, and takes no new one."""
        self._draining = True
        for stream in self._idle_streams:
            stream.cancel()

    async def _act(self, received: Received, deadline: float | None) -> tuple[wire.ActResponse, Callable[[], None]]:
        """The answer, and what is to be done once it is on its way."""
        timings = Timings(self._metrics)
        request = received.message
        identity = fields.session_id(request)
        owner = auth.owner()
        session = self._sessions.use(identity, owner)
        resumption, state = None, request.recovery
        if request.HasField("recovery") and (session is None or (state.episode, state.step) > session.progress):
            resumption = await observation.resumption(request)
            session = self._sessions.open(identity, owner)
        if session is None:
            raise NotFound(f"session_id: {identity} is not open here; call Reset, or send the recovery state")
        async with session.lock:
            self._check_open(session)
            looked = False
            if resumption is not None and (resumption.episode, resumption.step) > session.progress:
                r = resumption
                session.resume(r.episode, r.seed, r.window, r.control, r.previous)
                looked = await self._feed.refresh(session)
                self._metrics.resumed.inc()
                logger.info("resumed", after=r.step)
            if session.answer is not None and session.progress == (request.episode, request.step):
                return session.answer, _nothing
            self._check_order(session, request)
            frame = await self._layouts.frame(received)
            timings.lap("decode")
            conditioned = await self._conditioning(session, request, frame, deadline, looked)
            timings.lap("wait")
            return await self._answer(session, request.step, frame, conditioned, deadline, timings)

    async def _answer(
        self,
        session: Session,
        step: int,
        frame: Frame,
        conditioned: Conditioned,
        deadline: float | None,
        timings: Timings,
    ) -> tuple[wire.ActResponse, Callable[[], None]]:
        episode, version = session.episode, conditioned.version
        reference = session.reference(conditioned, step)
        start = noise(session.seed, episode, step)
        if self._settings.only == "generalist":
            # Its latest chunk, one row a step: what later chunks would say of a step is not blended in.
            observation.check_values(frame)
            chunk = reference
            session.forget_chunks()
        else:
            if self._settings.only == "specialist":
                reference = np.zeros_like(reference)
            item = Request(frame, session.previous, conditioned.projected, reference, start)
            batcher = self._batchers[session.engine]
            # The model may compute what turns out to be of no use: harmless, and the rule is that it does not.
            check = partial(observation.check_values, frame)
            done = await batcher.submit(item, session=session.identity, deadline=deadline, meanwhile=check)
            timings.add("queue", done.queued)
            timings.add("model", done.computed)
            chunk = done.answer.chunk
            if not all(map(math.isfinite, chunk.ravel().tolist())):
                raise RuntimeError("the model gave values that are not finite")
            session.previous = done.answer.features
        staleness = time.perf_counter() - conditioned.at
        if timings.span is not None and session.traced != version:
            session.traced = version
            timings.span.stage("conditioning", conditioned.took, ago=staleness)
        degraded = not self._feed.up or step - version.step > self._settings.degraded_age_steps
        answer = session.advance(step, chunk, version, degraded=degraded)
        timings.conclude(answer.timings)
        session.answer = answer
        if session.view is not None:
            action = session.control.history[-1]
            taken = Step(answer.episode, step, action, answer.age, degraded, timings.stages)
            session.view.note(taken, frame, Reference(*version, conditioned.reference_actions))
        return answer, partial(self._follow_up, session, answer, staleness, timings)

    def _follow_up(self, session: Session, answer: wire.ActResponse, staleness: float, timings: Timings) -> None:
        """What the answer need not wait for."""
        timings.observe()
        self._metrics.conditioning_age.observe(answer.age)
        self._metrics.conditioning_staleness.observe(staleness)
        if answer.degraded:
            self._metrics.degraded.inc()
        if session.answer is answer and answer.step < fields.LAST:
            session.prepare(answer.step + 1)

    def _check_open(self, session: Session) -> None:
        if self._sessions.find(session.identity) is not session:
            raise NotFound(f"session_id: {session.identity} was closed")

    def _check_order(self, session: Session, request: wire.ActRequest) -> None:
        episode, step = session.progress
        if request.episode < episode:
            raise FailedPrecondition(f"episode: the session is at episode {episode}, after {request.episode}")
        if request.episode > episode:
            raise FailedPrecondition(
                f"episode: {request.episode} has not begun; call Reset, the session is at {episode}"
            )
        if request.step <= step:
            raise FailedPrecondition(f"step: the session is at step {step}; {request.step} is not after it")

    async def _conditioning(
        self, session: Session, request: wire.ActRequest, frame: Frame, deadline: float | None, looked: bool
    ) -> Conditioned:
        """The conditioning for this step: new enough, or what there is to say about it, or about a `frame` that waits.

        `looked`: the store has just been asked for a session that was served elsewhere, so that what it lacks is lost.
        """
        step = request.step
        least = Version(request.min_conditioning.episode, request.min_conditioning.step)
        if least > (request.episode, step):
            raise InvalidArgument(f"min_conditioning: expected at most this episode and step, got {tuple(least)}")
        most = self._settings.max_age_steps
        found = session.usable(step)
        if found is None or found.version < least or step - found.version.step > most:
            observation.check_values(frame)
        if request.HasField("min_conditioning"):
            if found is None or found.version < least:
                if looked:
                    self._check_refused(session, least)
                    raise FailedPrecondition(
                        f"min_conditioning: the store holds no conditioning from {tuple(least)} on any more; "
                        "ask the generalist for it again"
                    )
                found = await self._await_conditioning(session, step, least, deadline)
        elif found is None or step - found.version.step > most:
            # Its announcement may be on its way still.
            await self._feed.refresh(session)
            found = session.usable(step)
            if found is None:
                self._check_refused(session, Version(session.episode, 0))
                reason = "" if self._feed.up else "; the conditioning store is out of reach"
                raise FailedPrecondition(
                    f"no conditioning of episode {session.episode} up to step {step} yet: ask the generalist for one, "
                    f"and name it in min_conditioning to wait for it{reason}"
                )
        age = step - found.version.step
        if age > most:
            raise FailedPrecondition(
                f"the conditioning is of step {found.version.step}, {age} steps ago; at most {most} (max_age_steps): "
                "ask the generalist for a newer one"
            )
        return found

    def _check_refused(self, session: Session, least: Version) -> None:
        refused = session.refused
        if refused is not None and refused.version >= least:
            raise FailedPrecondition(f"the conditioning of step {refused.version.step} is of no use: {refused.reason}")

    async def _await_conditioning(
        self, session: Session, step: int, least: Version, deadline: float | None
    ) -> Conditioned:
        limit = self._loop.time() + self._settings.max_wait
        if deadline is not None:
            limit = min(limit, deadline - MARGIN)
        asked = False
        spoiled = session.spoiled
        while True:
            found = session.usable(step)
            if found is not None and found.version >= least:
                return found
            self._check_refused(session, least)
            if session.spoiled > spoiled:
                raise FailedPrecondition(
                    "the conditioning in the store could not be read, the log says why: ask the generalist for it again"
                )
            left = limit - self._loop.time()
            if left <= 0:
                raise DeadlineExceeded(
                    f"min_conditioning: {tuple(least)} did not arrive; newest: {tuple(session.newest)}"
                )
            session.arrived.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(session.arrived.wait(), left if asked else min(left, PATIENCE))
                continue
            if not asked:
                asked = True
                refresh = asyncio.ensure_future(self._feed.refresh(session))
                refresh.add_done_callback(asyncio.Future.exception)  # or it is said to have been lost
                await asyncio.wait({refresh}, timeout=left)
                if refresh.done():
                    refresh.result()


def _nothing() -> None:
    pass


@asynccontextmanager
async def serving(settings: SpecialistSettings, *engines: SpecialistEngine) -> AsyncIterator[Server]:
    """A specialist service that is ready (the store aside), with `engines` or those it loads; drains on exit."""
    metrics = Metrics()
    readiness = Readiness(model="loading", store="not subscribed yet")
    store = connect(settings)
    sessions = Sessions(
        most=settings.max_sessions,
        most_of_one=settings.max_sessions_per_token,
        ttl=settings.session_ttl,
        metrics=metrics,
        engines=len(engines) or len(settings.places),
    )
    observers = Observers(sessions, metrics, readiness, operators=settings.operators)
    endpoints = Server(settings, readiness, metrics, Pages(public=files(), guarded=events(observers)))
    async with contextlib.AsyncExitStack() as cleanup:
        cleanup.push_async_callback(store.close)
        await endpoints.start()
        cleanup.push_async_callback(endpoints.stop)
        cleanup.callback(observers.close)
        models = engines or await asyncio.to_thread(load, settings)
        batchers = []
        for model in models:
            work = guarded(model.act, model.facts.device, endpoints.fail)
            batcher = Batcher(work, max_batch=settings.max_batch, max_queue=settings.max_queue, metrics=metrics)
            cleanup.push_async_callback(batcher.close)
            await batcher.call(warm_up, model, settings.max_batch)
            batchers.append(batcher)
        readiness.meet("model")

        async def project(session: Session, hidden_states: torch.Tensor) -> Projected:
            model, width = models[session.engine], hidden_states.shape[-1]
            if width != model.width:
                raise ValueError(
                    f"the generalist's hidden states are {width} wide and this specialist's context is {model.width}, "
                    "so they are no pair; serve both with checkpoints that were trained together"
                )
            if settings.only == "specialist":
                hidden_states = torch.zeros_like(hidden_states)
            work = guarded(model.project, model.facts.device, endpoints.fail)
            return await batchers[session.engine].call(work, hidden_states)

        feed = Feed(store, sessions, project, readiness=readiness, metrics=metrics)
        cleanup.push_async_callback(feed.close)
        background = Background(readiness)
        background.run("feed", feed.run())
        background.run("expiry", _expire(sessions, settings.session_ttl))
        cleanup.push_async_callback(background.close)
        facts = together([model.facts for model in models])
        facts = replace(facts, details={**facts.details, "only": settings.only or "no"})
        info = describe("specialist", facts, models[0].sensors)
        metrics.watch_memory(*facts.device.split(","))
        service = SpecialistService(settings, batchers, sessions, feed, info, metrics)
        endpoints.open(service, info, readers=service.readers, end_streams=service.end_streams)
        cleanup.push_async_callback(endpoints.drain)
        yield endpoints


def run(settings: SpecialistSettings) -> None:
    """Serves until SIGTERM or SIGINT, then drains. Blocks, in an event loop of its own."""
    server.run(settings, serving(settings))


async def _expire(sessions: Sessions, ttl: float) -> None:
    while True:
        await asyncio.sleep(min(ttl / 4, 10.0))
        for identity in sessions.expire():
            logger.info("session expired", session=identity)
