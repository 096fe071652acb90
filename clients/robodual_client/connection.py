"""Runs plans over blocking gRPC."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from typing import Any, Iterator

import grpc
from google.protobuf.message import Message

from robodual_client import wire
from robodual_client.calls import Call, Halt, Launch, Operation, Plan, Resolve, Sleep, T
from robodual_client.channel import LOOKUP, Security, lookup, unresolved
from robodual_client.errors import Failure
from robodual_client.wire import rpc

logger = logging.getLogger(__name__)

JOIN = 2.0  # seconds that close waits for each of gRPC's threads


class Connections:
    """The channels of one client, opened as plans need them. For one thread at a time."""

    def __init__(self, security: Security, stream: bool) -> None:
        self._security = security
        self._stream = stream
        self._channels: dict[str, grpc.Channel] = {}
        self._hosts: dict[str, str] = {}  # the names under which addresses were found
        self._stubs: dict[tuple[str, str], rpc.Stub] = {}
        self._streams: dict[str, ActStream] = {}
        self._background: Any = None
        self._launching = threading.RLock()
        self._halted = 0
        self._closed = False

    def run(self, plan: Plan[T]) -> T:
        """Runs `plan` to its end and gives what it returns. Raises what it raises."""
        if self._closed:
            raise RuntimeError("the client is closed")
        try:
            operation = next(plan)
            while True:
                try:
                    result = self._perform(operation)
                except Failure as failure:
                    operation = plan.throw(failure)
                else:
                    operation = plan.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value
        finally:
            plan.close()

    def close(self) -> None:
        """Ends every call and every thread of gRPC's that serves one."""
        self._closed = True
        self._halt()
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self._stubs.clear()

    def _perform(self, operation: Operation) -> Any:
        if isinstance(operation, Call):
            if operation.delay:
                time.sleep(operation.delay)
            if self._stream and operation.method == "Act":
                return self._exchange(operation)
            return self._call(operation)
        if isinstance(operation, Resolve):
            return self._resolve(operation.name)
        if isinstance(operation, Sleep):
            return time.sleep(operation.seconds)
        if isinstance(operation, Launch):
            return self._schedule(operation, self._halted)
        assert isinstance(operation, Halt)
        return self._halt()

    def _resolve(self, name: str) -> list[str]:
        answers: queue.SimpleQueue[list[str] | Failure] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(lookup(name))
            except Failure as failure:
                answers.put(failure)

        threading.Thread(target=ask, name="robodual-lookup", daemon=True).start()
        try:
            answer = answers.get(timeout=LOOKUP)
        except queue.Empty:
            answer = unresolved(name, f"no answer within {LOOKUP:g} s")
        if isinstance(answer, Failure):
            raise answer
        self._hosts.update(dict.fromkeys(answer, name.rpartition(":")[0]))
        return answer

    def _call(self, call: Call) -> Any:
        method = getattr(self._stub(call), call.method)
        try:
            return method(call.request, timeout=call.timeout, metadata=self._security.metadata)
        except grpc.RpcError as error:
            raise Failure.of(error, call.where) from error

    def _exchange(self, call: Call) -> Any:
        stream = self._streams.get(call.address)
        if stream is None:
            stream = ActStream(self._stub(call), self._security.metadata)
            self._streams[call.address] = stream
        usable = False
        try:
            response = stream.exchange(call)
            usable = not stream.expired
            return response
        finally:
            if not usable:  # Ctrl-C included: an answer that is still to come must not be taken for the next one
                del self._streams[call.address]
                stream.close()

    def _schedule(self, launch: Launch, halted: int) -> None:
        if isinstance(launch.operation, Resolve):
            threading.Thread(target=self._look_up, args=(launch, launch.operation.name, halted), daemon=True).start()
        elif launch.operation.delay == 0:
            self._launch(launch, launch.operation, halted)
        else:
            timer = threading.Timer(launch.operation.delay, self._launch, (launch, launch.operation, halted))
            timer.daemon = True
            timer.start()

    def _look_up(self, launch: Launch, name: str, halted: int) -> None:
        try:
            self._land(launch, self._resolve(name), halted)
        except Failure as failure:
            self._land(launch, failure, halted)

    def _launch(self, launch: Launch, call: Call, halted: int) -> None:
        with self._launching:
            if halted != self._halted:
                return
            future = getattr(self._stub(call), call.method).future(
                call.request, timeout=call.timeout, metadata=self._security.metadata
            )
            self._background = future
        future.add_done_callback(lambda done: self._landed(launch, done, call.where, halted))

    def _landed(self, launch: Launch, future: Any, where: str, halted: int) -> None:
        """On one of gRPC's threads."""
        done = future.code() is grpc.StatusCode.OK
        self._land(launch, future.result() if done else Failure.of(future, where), halted)

    def _land(self, launch: Launch, outcome: Any, halted: int) -> None:
        following = launch.landed(outcome) if halted == self._halted else None
        if following is not None:
            self._schedule(following, halted)

    def _halt(self) -> None:
        with self._launching:
            self._halted += 1
            future, self._background = self._background, None
        if future is not None:
            landed = threading.Event()
            future.add_done_callback(lambda done: landed.set())
            future.cancel()
            landed.wait(JOIN)

    def _stub(self, call: Call) -> rpc.Stub:
        key = call.address, call.service
        if key not in self._stubs:
            if call.address not in self._channels:
                self._channels[call.address] = self._security.channel(grpc, call.address, self._hosts.get(call.address))
            self._stubs[key] = rpc.Stub(self._channels[call.address], call.service)
        return self._stubs[key]


class ActStream:
    """An open ActStream, with a time limit for each answer, which gRPC's blocking streams lack."""

    def __init__(self, stub: rpc.Stub, metadata: tuple[tuple[str, str], ...]) -> None:
        self._requests: queue.SimpleQueue[Message | bytes | None] = queue.SimpleQueue()
        self._sender: threading.Thread | None = None
        self._call: Any = stub.ActStream(self._take(), metadata=metadata)
        self._ended = threading.Event()
        if not self._call.add_callback(self._ended.set):
            self._ended.set()
        self._watch = Watch(self._call.cancel)
        self.expired = False  # whether it was cancelled for want of an answer, which may have come all the same

    def exchange(self, call: Call) -> wire.ActResponse:
        self._watch.set(call.timeout)
        self._requests.put(call.request)
        try:
            response: wire.ActResponse = next(self._call)
        except StopIteration:
            raise Failure(grpc.StatusCode.UNAVAILABLE, "the service ended the stream", call.where) from None
        except grpc.RpcError as error:
            if self._watch.clear():
                details = f"no answer within {call.timeout:g} s"
                raise Failure(grpc.StatusCode.DEADLINE_EXCEEDED, details, call.where) from error
            raise Failure.of(error, call.where) from error
        finally:
            self.expired = self._watch.clear()
        return response

    def close(self) -> None:
        """Ends the call and waits for its threads: one that outlived the interpreter could keep it from exiting."""
        self._watch.stop()
        self._call.cancel()
        self._requests.put(None)
        self._ended.wait(JOIN)
        if self._sender is not None:
            self._sender.join(JOIN)

    def _take(self) -> Iterator[Message | bytes]:
        self._sender = threading.current_thread()
        while True:
            request = self._requests.get()
            if request is None:
                return
            yield request


class Watch:
    """Calls `expire` from its own thread once a limit that was set has passed. Setting and clearing it cost next to
    nothing: the thread looks when the last limit that it knew of would have passed. It expires once, and never again.
    """

    def __init__(self, expire: Any) -> None:
        self._expired = False
        self._expire = expire
        self._due = math.inf
        self._next_look = math.inf
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._stopped = False
        self._limit = 0.0
        self._thread: threading.Thread | None = None

    def set(self, seconds: float) -> None:
        with self._lock:
            self._limit = seconds
            self._due = time.monotonic() + seconds
            early = self._due < self._next_look
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="robodual-watch", daemon=True)
            self._thread.start()
        elif early:
            self._wake.set()

    def clear(self) -> bool:
        """Whether a limit had passed first. Afterwards none does until one is set."""
        with self._lock:
            self._due = math.inf
            return self._expired

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(JOIN)

    def _run(self) -> None:
        while not self._stopped:
            with self._lock:
                now = time.monotonic()
                if self._due <= now:
                    self._expired = True
                    self._expire()
                    return
                # With no limit set, one that is set now passes after this look.
                self._next_look = min(self._due, now + self._limit)
                pause = self._next_look - now
            self._wake.wait(pause)
            self._wake.clear()
