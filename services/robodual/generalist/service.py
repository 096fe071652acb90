"""The generalist over gRPC: frames and instructions in, conditionings into the store."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from robodual.conditioning.record import MAX_INSTRUCTION, MAX_VALUES, Conditioning, Version
from robodual.conditioning.store import ForeignSession, Store, StoreUnavailable
from robodual.facts import together
from robodual.generalist.engine import GeneralistEngine, Thought, load_generalist
from robodual.generalist.tokens import GENERATED
from robodual.profiles import shipped
from robodual.serving import auth, fields, server
from robodual.serving.batching import Batcher
from robodual.serving.connect import connect
from robodual.serving.device_loss import guarded
from robodual.serving.errors import InvalidArgument, PermissionDenied, Unavailable
from robodual.serving.info import describe
from robodual.serving.leases import Leases
from robodual.serving.metrics import Metrics
from robodual.serving.readiness import Background, Readiness
from robodual.serving.server import Server
from robodual.serving.settings import GeneralistSettings
from robodual.serving.timings import LATER, Timings
from robodual_client import tensors, wire

logger = structlog.get_logger(__name__)

MAX_PROMPT = 640  # tokens: of 512 characters, where a tokenizer has one for each
HEARTBEAT = 1.0  # seconds between looks at the store


class Glance(NamedTuple):
    """What the generalist looks at: a frame, uint8 [H, W, 3], and what to do."""

    frame: NDArray[np.uint8]
    instruction: str


class GeneralistService:
    """The methods of `robodual.v1.Generalist`, as protos/robodual/v1/generalist.proto describes them."""

    def __init__(
        self,
        batchers: Sequence[Batcher[Glance, Thought]],
        store: Store,
        leases: Leases,
        info: wire.InfoResponse,
        metrics: Metrics,
        model: GeneralistEngine,
    ) -> None:
        """`model`: any of those behind the batchers; its tokenizer says how long a prompt is."""
        self._batchers = batchers
        self._store = store
        self._leases = leases
        self._info = info
        self._metrics = metrics
        self._most_tokens = min(MAX_PROMPT, MAX_VALUES // model.width - GENERATED)
        self._count = functools.lru_cache(maxsize=1024)(lambda text: len(model.processor.prompt(text)))

    async def Condition(self, request: wire.ConditionRequest, context: Any) -> wire.ConditionResponse:
        timings = Timings(self._metrics)
        session, owner = fields.session_id(request), auth.owner()
        instruction = request.instruction
        if not instruction.strip() or len(instruction) > MAX_INSTRUCTION:
            raise InvalidArgument(
                f"instruction: expected 1 to {MAX_INSTRUCTION} characters that say what to do, got {len(instruction)}"
            )
        if (count := self._count(instruction)) > self._most_tokens:
            raise InvalidArgument(
                f"instruction: its prompt is {count} tokens long, expected at most {self._most_tokens}; say it shorter"
            )
        self._leases.renew(owner, session)
        frame = await fields.image(request, "rgb_static", field="rgb_static", sides=tensors.IMAGE_SIDES)
        timings.lap("decode")
        batcher = min(self._batchers, key=lambda batcher: batcher.load)
        done = await batcher.submit(Glance(frame, instruction), session=session, deadline=server.deadline(context))
        timings.add("queue", done.queued)
        timings.add("think", done.computed)
        thought = done.answer
        self._metrics.malformed.inc(thought.malformed_tokens)
        self._metrics.forwards.observe(thought.forwards)
        conditioning = Conditioning(
            request.episode, request.step, thought.reference_actions, thought.hidden_states, instruction
        )
        with _reachable():
            stored, latest = await self._store.put(session, conditioning, owner)
        timings.lap("store")
        answer = wire.ConditionResponse(
            version=_message(conditioning.version),
            stored=stored,
            latest=_message(latest),
            malformed_tokens=thought.malformed_tokens,
        )
        timings.conclude(answer.timings)
        asyncio.get_running_loop().call_later(LATER, timings.observe)
        return answer

    async def Reset(self, request: wire.ResetRequest, context: Any) -> wire.ResetResponse:
        session, owner = fields.session_id(request), auth.owner()
        self._leases.renew(owner, session)
        with _reachable():
            await self._store.drop_before(session, request.episode, owner)
        return wire.ResetResponse()

    async def Close(self, request: wire.CloseRequest, context: Any) -> wire.CloseResponse:
        session, owner = fields.session_id(request), auth.owner()
        with _reachable():
            was_open = await self._store.delete(session, owner)
        self._leases.end(owner, session)
        return wire.CloseResponse(was_open=was_open)

    async def GetInfo(self, request: wire.InfoRequest, context: Any) -> wire.InfoResponse:
        return self._info


@asynccontextmanager
async def serving(settings: GeneralistSettings, *engines: GeneralistEngine) -> AsyncIterator[Server]:
    """A generalist service that is ready (the store aside), with `engines` or those it loads; drains on exit."""
    metrics = Metrics()
    readiness = Readiness(model="loading", store="not asked yet")
    store = connect(settings)
    endpoints = Server(settings, readiness, metrics)
    async with contextlib.AsyncExitStack() as cleanup:
        cleanup.push_async_callback(store.close)
        await endpoints.start()
        cleanup.push_async_callback(endpoints.stop)
        models = engines or await asyncio.to_thread(_load, settings)
        batchers = []
        for model in models:
            think = guarded(functools.partial(_think, model), model.facts.device, endpoints.fail)
            batcher = Batcher(think, max_batch=settings.max_batch, max_queue=settings.max_queue, metrics=metrics)
            cleanup.push_async_callback(batcher.close)
            await batcher.call(_warm_up, model, settings.max_batch)
            batchers.append(batcher)
        readiness.meet("model")
        background = Background(readiness)
        background.run("heartbeat", _watch(store, readiness, metrics))
        cleanup.push_async_callback(background.close)
        facts = together([model.facts for model in models])
        info = describe("generalist", facts, ["rgb_static"])
        metrics.watch_memory(*facts.device.split(","))
        leases = Leases(most=settings.max_sessions_per_token, ttl=settings.conditioning_ttl)
        endpoints.open(GeneralistService(batchers, store, leases, info, metrics, models[0]), info)
        cleanup.push_async_callback(endpoints.drain)
        yield endpoints


def run(settings: GeneralistSettings) -> None:
    """Serves until SIGTERM or SIGINT, then drains. Blocks, in an event loop of its own."""
    server.run(settings, serving(settings))


def _think(model: GeneralistEngine, glances: Sequence[Glance]) -> list[Thought]:
    return model.think([glance.frame for glance in glances], [glance.instruction for glance in glances])


def _warm_up(model: GeneralistEngine, max_batch: int) -> None:
    """One answer; of a model that captures its steps, batches of all sizes, the largest first, whose memory they share.

    The length of the prompt is that of most: a longer one is captured when it comes (stepping.py, `SLOTS`).
    """
    glance = Glance(np.zeros((200, 200, 3), np.uint8), "warm up")
    for size in range(max_batch if model.captures else 1, 0, -1):
        try:
            _think(model, [glance] * size)
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise
            logger.warning("no memory for a batch of this size: it will run one by one", size=size, reason=str(error))


def _load(settings: GeneralistSettings) -> tuple[GeneralistEngine, ...]:
    return tuple(_load_on(device, settings) for device in settings.places)


def _load_on(device: str, settings: GeneralistSettings) -> GeneralistEngine:
    try:
        return load_generalist(
            settings.profile,
            checkpoint=settings.checkpoint or shipped(settings.profile, "generalist"),
            adapters=settings.adapters,
            merge_adapters=settings.merge_adapters,
            device=device,
            dtype=settings.dtype,
            seed=settings.seed,
            attention=settings.attention,
            quantisation=settings.quantisation,
            constrained=settings.constrained,
            speculation=settings.speculation,
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"device: {device} has no room for these weights with quantisation {settings.quantisation}; "
            "choose int8, fp8 or nf4, or a device with more memory"
        ) from error


async def _watch(store: Store, readiness: Readiness, metrics: Metrics) -> None:
    """Keeps readiness to whether the store takes conditionings."""
    lost = False
    while True:
        try:
            await store.probe()
        except StoreUnavailable as error:
            if not lost:
                logger.warning("store out of reach", reason=str(error))
            lost = True
            readiness.lack("store", str(error))
            metrics.store_up.set(0)
        else:
            if lost:
                logger.info("store back")
            lost = False
            readiness.meet("store")
            metrics.store_up.set(1)
        await asyncio.sleep(HEARTBEAT)


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except StoreUnavailable as error:
        raise Unavailable(str(error)) from error
    except ForeignSession as error:
        raise PermissionDenied(str(error)) from error


def _message(version: Version) -> wire.Version:
    return wire.Version(episode=version.episode, step=version.step)
