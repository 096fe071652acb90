"""Services with scripted faults, on real gRPC, and observations for them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from concurrent import futures

import grpc
import numpy as np

from robodual_client import AsyncDualSystemClient, tensors, wire
from robodual_client.wire import rpc

SENSORS = ("rgb_static", "rgb_gripper", "depth_static", "depth_gripper", "proprio")


def observation(number: int) -> dict:
    """CALVIN's observation dict; `number` tells it from others."""
    draw = np.random.default_rng(number)
    return {
        "rgb_obs": {
            "rgb_static": draw.integers(0, 256, (200, 200, 3), np.uint8),
            "rgb_gripper": draw.integers(0, 256, (84, 84, 3), np.uint8),
        },
        "depth_obs": {
            "depth_static": draw.uniform(3.5, 6.2, (200, 200)).astype(np.float32),
            "depth_gripper": draw.uniform(0, 2, (84, 84)).astype(np.float32),
        },
        "robot_obs": np.concatenate([draw.uniform(-1, 1, 14), [1.0]]),
        "scene_obs": draw.uniform(-1, 1, 24),
    }


class Server:
    """A servicer on a port of its own, which can be killed and started again there.

    `faults` maps a method to what its next calls meet: (code, details) to fail with, or a function to call.
    `calls` lists (method, request) in order.
    """

    service = ""

    def __init__(self, credentials=None) -> None:
        self._credentials = credentials
        self.faults: dict[str, deque] = {}
        self.calls: list[tuple[str, object]] = []
        self.metadata: list[tuple[str, str]] = []
        self.port = 0
        self._server = None
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((rpc.handler(self.service, self),))
        address = f"127.0.0.1:{self.port}"
        if self._credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, self._credentials)
        self._server.start()

    def kill(self) -> None:
        if self._server is not None:
            self._server.stop(0).wait()
            self._server = None

    def fail(self, method: str, *faults) -> None:
        self.faults.setdefault(method, deque()).extend(faults)

    def requests(self, method: str) -> list:
        return [request for name, request in self.calls if name == method]

    def meet(self, method: str, request: object, context) -> None:
        self.calls.append((method, request))
        self.metadata = [(key, value) for key, value in context.invocation_metadata()]
        if self.faults.get(method):
            fault = self.faults[method].popleft()
            if callable(fault):
                fault()
            else:
                context.abort(*fault)


class FakeGeneralist(Server):
    service = rpc.GENERALIST
    checkpoint = ""
    delay = 0.0

    def Condition(self, request, context):
        self.meet("Condition", request, context)
        time.sleep(self.delay)
        version = wire.Version(episode=request.episode, step=request.step)
        timing = wire.Timing(stage="generate", milliseconds=5)
        return wire.ConditionResponse(version=version, latest=version, stored=True, timings=[timing])

    def Reset(self, request, context):
        self.meet("Reset", request, context)
        return wire.ResetResponse()

    def Close(self, request, context):
        self.meet("Close", request, context)
        return wire.CloseResponse(was_open=True)

    def GetInfo(self, request, context):
        self.meet("GetInfo", request, context)
        return wire.InfoResponse(
            service="generalist", profile="fake", sensors=["rgb_static"], checkpoint=self.checkpoint
        )


class FakeSpecialist(Server):
    """An action is a function of seed, episode, step and of the actions before it, as recovery states carry them."""

    service = rpc.SPECIALIST
    sensors = SENSORS
    checkpoint = "c0ffee"
    delay = 0.0

    def __init__(self, credentials=None) -> None:
        self.sessions: dict[str, dict] = {}
        self._lock = threading.Lock()
        super().__init__(credentials)

    def kill(self) -> None:
        super().kill()
        self.sessions.clear()

    def Act(self, request, context):
        self.meet("Act", request, context)
        return self.answer(request, context)

    def ActStream(self, requests, context):
        for request in requests:
            self.meet("Act", request, context)
            yield self.answer(request, context)

    def answer(self, request, context):
        time.sleep(self.delay)
        with self._lock:
            session = self.sessions.get(request.session_id)
            recovery = request.recovery
            if request.HasField("recovery") and (
                session is None or (session["episode"], session["step"]) < (recovery.episode, recovery.step)
            ):
                history = tensors.decode(recovery.history, field="history", dtype=np.float32, shape=(4, 7))
                assert request.previous_rgb_static.height == 200
                session = {
                    "episode": recovery.episode,
                    "step": recovery.step,
                    "seed": recovery.seed,
                    "history": history,
                }
                self.sessions[request.session_id] = session
            if session is None:
                context.abort(grpc.StatusCode.NOT_FOUND, "session_id: not open here")
            if (request.episode, request.step) == (session["episode"], session["step"]):
                return session["answer"]
            if request.episode != session["episode"] or request.step < session["step"]:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"step: the session is at {session['step']}")
            proprio = tensors.decode(request.observation.proprio, field="proprio", dtype=np.float32, shape=(7,))
            step, history = request.step, session["history"]
            action = np.sin(history.sum(0) * 0.5 + proprio + session["seed"] + request.episode * 10 + step)
            action = action.astype(np.float32)
            session["step"], session["history"] = step, np.concatenate([history[1:], action[None]])
            session["answer"] = wire.ActResponse(
                episode=request.episode,
                step=step,
                action=tensors.encode(action),
                chunk=tensors.encode(np.tile(action, (8, 1))),
                conditioning=request.min_conditioning,
                age=step - request.min_conditioning.step,
                recovery=wire.RecoveryState(
                    episode=request.episode, step=step, seed=session["seed"], history=tensors.encode(session["history"])
                ),
                timings=[wire.Timing(stage="denoise", milliseconds=2)],
            )
            return session["answer"]

    def Reset(self, request, context):
        self.meet("Reset", request, context)
        with self._lock:
            session = self.sessions.get(request.session_id)
            if session is not None and session["step"] >= 0 and session["episode"] >= request.episode:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"episode: at {session['episode']}")
            self.sessions[request.session_id] = {
                "episode": request.episode,
                "step": -1,
                "seed": request.seed,
                "history": np.zeros((4, 7), np.float32),
            }
        return wire.ResetResponse()

    def Close(self, request, context):
        self.meet("Close", request, context)
        return wire.CloseResponse(was_open=self.sessions.pop(request.session_id, None) is not None)

    def GetInfo(self, request, context):
        self.meet("GetInfo", request, context)
        return wire.InfoResponse(
            service="specialist", profile="fake", sensors=self.sensors, checkpoint=self.checkpoint, parameters=7
        )


def episode(client, steps=20):
    return np.array([client.step(observation(step)) for step in range(steps)])


class Awaited:
    """AsyncDualSystemClient, driven step by step as the blocking one is."""

    def __init__(self, *arguments, **options):
        self._client = AsyncDualSystemClient(*arguments, **options)
        self._loop = asyncio.new_event_loop()

    def __getattr__(self, name):
        value = getattr(self._client, name)
        if not asyncio.iscoroutinefunction(value):
            return value
        return lambda *arguments, **options: self._loop.run_until_complete(value(*arguments, **options))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
        self._loop.close()
