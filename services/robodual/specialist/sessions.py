"""The sessions that a specialist serves: what each knows of its episode, and how many there may be."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from robodual.conditioning.record import Version
from robodual.conditioning.store import FOREIGN
from robodual.serving.errors import PermissionDenied, ResourceExhausted
from robodual.serving.metrics import Metrics
from robodual.specialist import answers
from robodual.specialist.control import Array, ControlLoop, Window, noise, reference_actions
from robodual.specialist.engine import Features, Projected
from robodual.specialist.view import View
from robodual_client import wire

WAITING = 4  # requests of a session behind the one in progress: a client may repeat one whose answer was lost
KEPT = 2  # conditionings a session: one may be of a frame that its steps have not reached
NEVER = Version(-1, -1)


@dataclass(frozen=True)
class Refused:
    """A conditioning that came whole and cannot be used, and why."""

    version: Version
    reason: str


@dataclass(frozen=True)
class Conditioned:
    """A conditioning on the device, ready to be used."""

    version: Version
    projected: Projected
    reference_actions: NDArray[np.float32]  # [8, 7], as the generalist gave it
    instruction: str
    took: float = 0.0  # seconds to fetch and project it
    at: float = field(default_factory=time.perf_counter)  # when that was done


class Turns(asyncio.Lock):
    """One request of a session at a time. A few may wait, with their frames in memory; beyond, `ResourceExhausted`."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting = 0

    async def acquire(self) -> Literal[True]:
        if self._waiting >= WAITING:
            raise ResourceExhausted(
                f"session_id: {WAITING} requests of this session wait already; send the next when one is answered"
            )
        self._waiting += 1
        try:
            return await super().acquire()
        finally:
            self._waiting -= 1


class Session:
    """One robot's state: its episode, the control loop, the previous frame's features, the latest conditionings.

    Features and conditionings are on the device of its engine, which answers all its steps.
    """

    def __init__(self, identity: str, owner: str = "", engine: int = 0) -> None:
        self.identity = identity
        self.owner = owner
        self.engine = engine  # its number among the service's
        self.lock = Turns()
        self.fetching = asyncio.Lock()
        self.arrived = asyncio.Event()
        self.used_at = time.monotonic()
        self.stale = False  # the store may hold a newer conditioning
        self.following = False  # a fetch is under way
        self.episode = 0
        self.seed = 0
        self.window: Window = "published"
        self.control = ControlLoop()
        self.previous: Features | NDArray[np.uint8] | None = None
        self.answer: wire.ActResponse | None = None
        self.refused: Refused | None = None  # the newest, if a conditioning was
        self.view: View | None = None  # of its steps, while somebody looks
        self.traced = NEVER  # the latest conditioning that is in a trace
        self.spoiled = 0  # records in the store that could not be read
        self.client = 0  # who began the episode; 0: it did not say
        self._kept: list[Conditioned] = []
        self._draft: wire.ActResponse | None = None
        # Made ahead: of which conditioning, at which step.
        self._reference: tuple[Conditioned, int, Array] | None = None

    @property
    def progress(self) -> tuple[int, int]:
        """The episode and its latest step with an action; -1 before the first."""
        step = self.control.last_step
        return self.episode, -1 if step is None else step

    @property
    def instruction(self) -> str:
        """What the newest conditioning was made for; "" before the first."""
        return self._kept[-1].instruction if self._kept else ""

    @property
    def newest(self) -> Version:
        """The newest conditioning at hand, of whichever episode."""
        return self._kept[-1].version if self._kept else NEVER

    def begin(self, episode: int, seed: int, window: Window) -> None:
        """Starts `episode` at step 0."""
        self.resume(episode, seed, window, ControlLoop(), None)

    def resume(
        self, episode: int, seed: int, window: Window, control: ControlLoop, previous: NDArray[np.uint8] | None
    ) -> None:
        """Goes on with `episode` where `control` is, with the static frame of the step before."""
        self.episode, self.seed, self.window = episode, seed, window
        self.control, self.previous, self.answer, self._draft = control, previous, None, None
        self._reference = None
        self._kept = [conditioned for conditioned in self._kept if conditioned.version.episode >= episode]

    def forget_chunks(self) -> None:
        """Has the next step follow its chunk alone: nothing that earlier ones say is blended in."""
        self.control, self._draft = ControlLoop(), None

    def prepare(self, step: int) -> wire.ActResponse:
        """Makes ahead what `step` needs and its frame does not change; what there is of its answer."""
        noise(self.seed, self.episode, step)
        newest = self.usable(step)
        if newest is not None:
            self._reference = newest, step, self.reference(newest, step)
        state = self.control.prepare(step)
        self._draft = answers.draft(self.episode, step, self.seed, self.window, state)
        return self._draft

    def reference(self, conditioned: Conditioned, step: int) -> Array:
        """The reference chunk at `step`, read-only."""
        if self._reference is not None and self._reference[0] is conditioned and self._reference[1] == step:
            return self._reference[2]
        return reference_actions(
            conditioned.reference_actions,
            conditioning_step=conditioned.version.step,
            step=step,
            window=self.window,
        )

    def advance(
        self, step: int, chunk: NDArray[np.float32], conditioning: Version, *, degraded: bool
    ) -> wire.ActResponse:
        """Takes `step`, whose diffusion gave `chunk` [8, 7]: the answer to it, but for its timings."""
        answer = self._draft
        if answer is None or answer.step != step:
            answer = self.prepare(step)
        self._draft = None
        self.control.advance(step, chunk)
        answers.complete(answer, self.control.recovery(), conditioning, degraded=degraded)
        return answer

    def keep(self, conditioned: Conditioned) -> None:
        """Takes in a conditioning, unless it is of an episode gone by or not newer than the newest."""
        if conditioned.version.episode >= self.episode and conditioned.version > self.newest:
            self._kept = [*self._kept[1 - KEPT :], conditioned]
            self.arrived.set()

    def refuse(self, refused: Refused) -> None:
        """Notes that a conditioning cannot be used, and tells whoever waits for it."""
        self.refused = refused
        self.arrived.set()

    def spoil(self) -> None:
        """Notes that the store's record could not be read, and tells whoever waits for one."""
        self.spoiled += 1
        self.arrived.set()

    def usable(self, step: int) -> Conditioned | None:
        """The newest conditioning of this episode whose frame is not later than `step`."""
        for conditioned in reversed(self._kept):
            if conditioned.version.episode == self.episode and conditioned.version.step <= step:
                return conditioned
        return None


class Sessions:
    """The open sessions by name: at most `most`, each closed after `ttl` seconds without use, spread over `engines`.

    One is used and closed in the name of the owner who opened it; in another's, it is `PermissionDenied`.
    """

    def __init__(
        self, *, most: int, ttl: float, metrics: Metrics, most_of_one: int | None = None, engines: int = 1
    ) -> None:
        """`most_of_one`: how many of them one owner may have open."""
        self._most = most
        self._most_of_one = most_of_one
        self._engines = engines
        self._ttl = ttl
        self._metrics = metrics
        self._open: dict[str, Session] = {}

    def find(self, identity: str) -> Session | None:
        return self._open.get(identity)

    def all(self) -> list[Session]:
        return list(self._open.values())

    def use(self, identity: str, owner: str = "") -> Session | None:
        """The session, if it is open; its time begins again."""
        session = self._open.get(identity)
        if session is not None:
            if session.owner != owner:
                raise PermissionDenied(FOREIGN)
            session.used_at = time.monotonic()
        return session

    def open(self, identity: str, owner: str = "") -> Session:
        """The session, opened if it is not, on the engine with the fewest.

        Raises `ResourceExhausted` if there are too many.
        """
        session = self.use(identity, owner)
        if session is not None:
            return session
        if self._too_many(owner):
            self.expire()
        if reason := self._too_many(owner):
            raise ResourceExhausted(f"session_id: {reason}; close one, or wait for one to expire")
        loads = Counter(session.engine for session in self._open.values())
        engine = min(range(self._engines), key=loads.__getitem__)
        session = self._open[identity] = Session(identity, owner, engine)
        self._metrics.sessions.set(len(self._open))
        return session

    def close(self, identity: str, owner: str = "") -> bool:
        """Forgets the session; returns whether it was open."""
        was_open = self.use(identity, owner) is not None
        if was_open:
            self.drop(identity)
        return was_open

    def drop(self, identity: str) -> None:
        """Forgets a session that is open, whoever owns it."""
        del self._open[identity]
        self._metrics.sessions.set(len(self._open))

    def expire(self) -> list[str]:
        """Closes the sessions whose time is over and which have no step in progress; returns their names."""
        before = time.monotonic() - self._ttl
        over = [s.identity for s in self._open.values() if s.used_at < before and not s.lock.locked()]
        for identity in over:
            self.drop(identity)
        return over

    def _too_many(self, owner: str) -> str:
        """Why `owner` may not open another session, or ""."""
        if len(self._open) >= self._most:
            return f"all {self._most} sessions are taken"
        own = sum(session.owner == owner for session in self._open.values())
        if self._most_of_one is not None and own >= self._most_of_one:
            return f"this token has {own} sessions open, the most that it may"
        return ""
