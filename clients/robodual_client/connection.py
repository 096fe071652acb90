"""Runs plans over blocking gRPC."""

from __future__ import annotations

import os
import queue
import threading
import time
from functools import partial
from typing import Any, Callable

import grpc

from robodual_client.calls import Call, Halt, Launch, Operation, Plan, Resolve, Sleep, T
from robodual_client.channel import LOOKUP, Security, is_ip, is_proxied, lookup, unresolved
from robodual_client.errors import Failure
from robodual_client.stream import ActStream
from robodual_client.wire import rpc
from robodual_client.worker import JOIN, Worker

CLOSING = 5 * JOIN  # seconds that close waits in all


class Connections:
    """The channels of one client, opened as plans need them. For one thread at a time.

    That thread is often the main one, where Ctrl-C may come between any two lines of Python. In gRPC's own this leaves
    locks held, and calls counted that are none, and whoever ends the call or the channel then waits for ever. So gRPC
    is called from other threads, and this one waits at queues; a stream is a socket of this thread's own.
    """

    def __init__(self, security: Security, stream: bool) -> None:
        self._security = security
        self._stream = stream
        self._hosts: dict[str, str] = {}  # the names under which addresses were found
        self._streams: dict[str, ActStream] = {}  # those between two steps
        self._current: ActStream | None = None
        self._halted = 0
        self._closed = False
        self._process = os.getpid()
        # The worker's:
        self._channels: dict[str, grpc.Channel] = {}
        self._stubs: dict[tuple[str, str], rpc.Stub] = {}
        self._foreground: Any = None
        self._background: Any = None
        self._worker = Worker()

    @property
    def inherited(self) -> bool:
        """Whether this is the copy that a fork left in the child: without threads, its sockets still the parent's."""
        return self._process != os.getpid()

    def run(self, plan: Plan[T]) -> T:
        """Runs `plan` to its end and gives what it returns. Raises what it raises."""
        self._check_open()
        if self.inherited:
            raise RuntimeError("the client is another process's, from before a fork: make one in this process")
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

    def _check_open(self) -> None:
        """Raises RuntimeError if the client was closed: by a signal's handler in the middle of a step, it may be."""
        if self._closed:
            raise RuntimeError("the client is closed")

    def _perform(self, operation: Operation) -> Any:
        self._check_open()
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
        found = _look_up(name)
        self._hosts.update(dict.fromkeys(found, name.rpartition(":")[0]))
        return found

    def _call(self, call: Call) -> Any:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._worker.do(partial(self._begin, call, answers.put))
        self._check_open()  # or the worker may have ended before it came to this
        try:
            outcome = answers.get()
        except BaseException:  # Ctrl-C
            self._worker.do(self._abandon)
            raise
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _exchange(self, call: Call) -> Any:
        start = time.monotonic()
        stream = self._streams.pop(call.address, None)
        if stream is not None and stream.has_ended():
            stream.close()
            stream = None
        if stream is None:
            if is_proxied(call.address):  # gRPC knows how to get through
                return self._call(call)
            stream = self._open(call, start)
        assert isinstance(call.request, list)
        self._current = stream
        try:
            self._check_open()
            response = stream.exchange(call.request, call.timeout, start)
            self._check_open()
        except BaseException:  # Ctrl-C included
            stream.close()
            raise
        self._streams[call.address] = stream
        return response

    def _open(self, call: Call, start: float) -> ActStream:
        found = [call.address] if is_ip(call.address) else _look_up(call.address, min(LOOKUP, call.timeout))
        name = self._security.name(call.address, self._hosts.get(call.address))
        return ActStream(self._security, found, name, call.where, call.timeout, start)

    def _schedule(self, launch: Launch, halted: int) -> None:
        if isinstance(launch.operation, Resolve):
            threading.Thread(
                target=self._resolve_for, args=(launch, launch.operation.name, halted), daemon=True
            ).start()
            return
        job = partial(self._launch, launch, launch.operation, halted)
        if launch.operation.delay == 0:
            self._worker.do(job)
        else:
            timer = threading.Timer(launch.operation.delay, self._worker.do, (job,))
            timer.daemon = True
            timer.start()

    def _resolve_for(self, launch: Launch, name: str, halted: int) -> None:
        try:
            self._land(launch, halted, self._resolve(name))
        except Failure as failure:
            self._land(launch, halted, failure)

    def _land(self, launch: Launch, halted: int, outcome: Any) -> None:
        """On one of gRPC's threads, or that of a lookup."""
        if isinstance(outcome, Exception) and not isinstance(outcome, Failure):
            outcome = Failure(grpc.StatusCode.INTERNAL, f"the call could not be made: {outcome!r}", "in the background")
        following = launch.landed(outcome) if halted == self._halted else None
        if following is not None:
            self._schedule(following, halted)

    def _halt(self) -> None:
        self._halted += 1
        self._worker.ask(self._end_background)

    def close(self) -> None:
        """Ends every call and every thread of gRPC's that serves one."""
        self._closed = True
        self._halted += 1
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        if self._current is not None and not self.inherited:
            self._current.interrupt()
        if not self.inherited:
            self._worker.end(self._end, CLOSING)

    # What follows is done by the worker.

    def _begin(self, call: Call, tell: Callable[[Any], None]) -> None:
        self._foreground = self._start(call, tell)

    def _abandon(self) -> None:
        if self._foreground is not None:
            self._foreground.cancel()

    def _launch(self, launch: Launch, call: Call, halted: int) -> None:
        if halted == self._halted:
            self._background = self._start(call, partial(self._land, launch, halted))

    def _start(self, call: Call, tell: Callable[[Any], None]) -> Any:
        """The call's future. `tell` gets its response or what went wrong, on one of gRPC's threads."""

        def ended(future: Any) -> None:
            good = future.code() is grpc.StatusCode.OK
            tell(future.result() if good else Failure.of(future, call.where))

        try:
            method = getattr(self._stub(call), call.method)
            future = method.future(call.request, timeout=call.timeout, metadata=self._security.metadata)
        except Exception as error:  # a file for TLS that cannot be read
            tell(error)
            return None
        future.add_done_callback(ended)
        return future

    def _end_background(self) -> None:
        future, self._background = self._background, None
        if future is not None:
            landed = threading.Event()
            future.add_done_callback(lambda _: landed.set())
            future.cancel()
            landed.wait(JOIN)

    def _end(self) -> None:
        self._abandon()
        self._end_background()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self._stubs.clear()

    def _stub(self, call: Call) -> rpc.Stub:
        key = call.address, call.service
        if key not in self._stubs:
            if call.address not in self._channels:
                self._channels[call.address] = self._security.channel(grpc, call.address, self._hosts.get(call.address))
            self._stubs[key] = rpc.Stub(self._channels[call.address], call.service)
        return self._stubs[key]


def _look_up(name: str, limit: float = LOOKUP) -> list[str]:
    """`lookup`, which has no time limit of its own, in `limit` seconds at most. Raises Failure."""
    answers: queue.SimpleQueue[list[str] | Failure] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(lookup(name))
        except Failure as failure:
            answers.put(failure)

    threading.Thread(target=ask, name="robodual-lookup", daemon=True).start()
    try:
        answer = answers.get(timeout=limit)
    except queue.Empty:
        answer = unresolved(name, f"no answer within {limit:g} s")
    if isinstance(answer, Failure):
        raise answer
    return answer
