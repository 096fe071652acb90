"""The blocking client."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from robodual_client.answer import Answer, ServiceInfo
from robodual_client.calls import Timeouts
from robodual_client.channel import Tls, security
from robodual_client.connection import Connections
from robodual_client.session import Session
from robodual_client.tracing import Tracer


class DualSystemClient:
    """Drives one robot, or one simulator, through a generalist and a specialist service. For one thread at a time.

        with DualSystemClient("127.0.0.1:50051", "127.0.0.1:50052") as client:
            client.reset("push the sliding door to the left side")
            for _ in range(360):
                obs, _, _, _ = env.step(client.step(obs))

    Args:
        generalist, specialist: "host:port", or a list of these for replicas; "dns:///host:port" is every address that
            the name resolves to, looked up again at each reset and when a replica fails.
        session: 1 to 64 characters of [A-Za-z0-9_.-]; None for a new unique one.
        schedule: when to ask the generalist: "published" (steps 0, 7, 15, 23, …), "every-N", or "async".
        seed: of the sampler's noise, which depends on (seed, episode, step) alone.
        token: the services' bearer token.
        tls: True for TLS with the default roots, or a `Tls`.
        timeouts: limits of single calls, and of how long they are repeated.
        stream: whether steps travel by `ActStream` (faster) or as unary calls.
        latency: seconds that each Condition ("generalist") and each Act ("specialist") is held back before it is sent,
            to see what slower models or a longer way to them would do.
        traces: an OTLP/HTTP collector that gets a trace of each step, as "http://127.0.0.1:4318" (extra `telemetry`).

    Nothing is sent before the first `reset` or `info`. Raises ValueError for a malformed argument. Calls raise
    RoboDualError (errors.py says which), after whatever repeating, reconnecting and moving to another replica could do.
    A step that raised, or was interrupted, may be asked for again: nothing counts a step that was not answered.
    """

    def __init__(
        self,
        generalist: str | Sequence[str] = "127.0.0.1:50051",
        specialist: str | Sequence[str] = "127.0.0.1:50052",
        *,
        session: str | None = None,
        schedule: str = "published",
        seed: int = 0,
        token: str | None = None,
        tls: Tls | bool = False,
        timeouts: Timeouts | None = None,
        stream: bool = True,
        latency: Mapping[str, float] | None = None,
        traces: str | None = None,
    ) -> None:
        self._session = Session(
            generalist,
            specialist,
            session=session,
            schedule=schedule,
            seed=seed,
            timeouts=timeouts,
            latency=latency,
        )
        self._connections = Connections(security(token, tls), stream)
        # Last: it starts a thread, which nobody would end for a client that was refused.
        self._tracer = self._session.tracer = None if traces is None else Tracer(traces, "robodual-client")
        # Also at exit, for a client that nobody closed: the interpreter must not go while gRPC's threads hold locks.
        self._finalizer = weakref.finalize(self, self._connections.close)

    @property
    def session(self) -> str:
        return self._session.name

    @property
    def episode(self) -> int:
        """The current episode's number; 0 before the first."""
        return self._session.episode

    @property
    def last(self) -> Answer | None:
        """Everything that the specialist answered to the last step, and how long it took."""
        return self._session.last

    def info(self) -> dict[str, ServiceInfo]:
        """What both services are, by "generalist" and "specialist"."""
        return self._connections.run(self._session.info())

    def reset(self, instruction: str, *, episode: int | None = None) -> None:
        """Starts an episode: one instruction (1 to 512 characters), from step 0.

        Episodes count from 1, and only upwards; `episode` skips ahead to that number. The same seed and episode give
        the same noise wherever and whenever the episode is run.
        """
        self._connections.run(self._session.reset(instruction, episode))

    def step(self, obs: Mapping[str, Any]) -> npt.NDArray[np.float64]:
        """The action [7] for CALVIN's observation `obs`: relative translation (x 50 per metre) and rotation (x 20 per
        radian) in [-1, 1], gripper -1 (close) or 1 (open).

        Raises InvalidObservation, before anything is sent, if a sensor that the model reads is missing or malformed.
        """
        return self._connections.run(self._session.step(obs))

    def skip(self, steps: int) -> None:
        """Counts control steps that went by without being asked for, because an answer was late.

        Ages, the schedule and temporal aggregation go by control steps: without this, an action that took three of
        them would count as one. Raises ValueError for a negative number.
        """
        self._session.skip(steps)

    def close(self) -> None:
        """Lets the services forget the session and closes the connections. The client cannot be used afterwards."""
        if self._connections.inherited:
            self._finalizer()
        elif self._finalizer.alive:
            try:
                self._connections.run(self._session.close())
            finally:
                self._finalizer()
                if self._tracer is not None:
                    self._tracer.close()

    def __enter__(self) -> DualSystemClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
