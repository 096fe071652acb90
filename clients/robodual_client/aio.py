"""The asyncio client."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Mapping, Sequence

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt

from robodual_client.answer import Answer, ServiceInfo
from robodual_client.calls import Call, Halt, Launch, Operation, Plan, Resolve, Sleep, T, Timeouts
from robodual_client.channel import LOOKUP, Security, Tls, lookup, security, unresolved
from robodual_client.errors import Failure
from robodual_client.session import Session
from robodual_client.tracing import Tracer
from robodual_client.wire import rpc


class AsyncDualSystemClient:
    """The asyncio twin of `DualSystemClient`: the same arguments and behaviour, `async with`, and methods to await.

    For one task at a time, on the event loop of its first call.
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
        self._connections = AsyncConnections(security(token, tls), stream)
        # Last: it starts a thread, which nobody would end for a client that was refused.
        self._tracer = self._session.tracer = None if traces is None else Tracer(traces, "robodual-client")

    @property
    def session(self) -> str:
        return self._session.name

    @property
    def episode(self) -> int:
        return self._session.episode

    @property
    def last(self) -> Answer | None:
        return self._session.last

    async def info(self) -> dict[str, ServiceInfo]:
        return await self._connections.run(self._session.info())

    async def reset(self, instruction: str, *, episode: int | None = None) -> None:
        await self._connections.run(self._session.reset(instruction, episode))

    async def step(self, obs: Mapping[str, Any]) -> npt.NDArray[np.float64]:
        return await self._connections.run(self._session.step(obs))

    def skip(self, steps: int) -> None:
        self._session.skip(steps)

    async def close(self) -> None:
        if not self._connections.closed:
            try:
                await self._connections.run(self._session.close())
            finally:
                await self._connections.close()
                if self._tracer is not None:
                    await asyncio.get_running_loop().run_in_executor(None, self._tracer.close)

    async def __aenter__(self) -> AsyncDualSystemClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncConnections:
    """Runs plans over grpc.aio; `Connections` in all else."""

    def __init__(self, security: Security, stream: bool) -> None:
        self.closed = False
        self._security = security
        self._stream = stream
        self._channels: dict[str, Any] = {}
        self._hosts: dict[str, str] = {}
        self._stubs: dict[tuple[str, str], rpc.Stub] = {}
        self._streams: dict[str, Any] = {}
        self._background: asyncio.Task[None] | None = None

    async def run(self, plan: Plan[T]) -> T:
        if self.closed:
            raise RuntimeError("the client is closed")
        try:
            operation = next(plan)
            while True:
                try:
                    result = await self._perform(operation)
                except Failure as failure:
                    operation = plan.throw(failure)
                else:
                    operation = plan.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value
        finally:
            plan.close()

    async def close(self) -> None:
        self.closed = True
        await self._halt()
        for stream in self._streams.values():
            stream.cancel()
        self._streams.clear()
        for channel in self._channels.values():
            await channel.close()

    async def _perform(self, operation: Operation) -> Any:
        if isinstance(operation, Call):
            await asyncio.sleep(operation.delay)
            if self._stream and operation.method == "Act":
                return await self._exchange(operation)
            return await self._call(operation)
        if isinstance(operation, Resolve):
            return await self._resolve(operation.name)
        if isinstance(operation, Sleep):
            return await asyncio.sleep(operation.seconds)
        if isinstance(operation, Launch):
            self._background = asyncio.ensure_future(self._launch(operation))
            return None
        assert isinstance(operation, Halt)
        return await self._halt()

    async def _resolve(self, name: str) -> list[str]:
        looking = asyncio.get_running_loop().run_in_executor(None, lookup, name)
        try:
            addresses = await asyncio.wait_for(looking, LOOKUP)
        except asyncio.TimeoutError as error:
            raise unresolved(name, f"no answer within {LOOKUP:g} s") from error
        self._hosts.update(dict.fromkeys(addresses, name.rpartition(":")[0]))
        return addresses

    async def _call(self, call: Call) -> Any:
        method = getattr(self._stub(call), call.method)
        try:
            return await method(call.request, timeout=call.timeout, metadata=self._security.metadata)
        except grpc.RpcError as error:
            raise Failure.of(error, call.where) from error

    async def _exchange(self, call: Call) -> Any:
        stream = self._streams.get(call.address)
        if stream is None:
            stream = self._stub(call).ActStream(metadata=self._security.metadata)
            self._streams[call.address] = stream
        try:
            response = await asyncio.wait_for(_write_and_read(stream, call), call.timeout)
            if response is grpc.aio.EOF:
                raise Failure(grpc.StatusCode.UNAVAILABLE, "the service ended the stream", call.where)
            return response
        except BaseException as error:  # cancellation included: a late answer must not be taken for the next one
            del self._streams[call.address]
            stream.cancel()
            if isinstance(error, asyncio.TimeoutError):
                details = f"no answer within {call.timeout:g} s"
                raise Failure(grpc.StatusCode.DEADLINE_EXCEEDED, details, call.where) from error
            if isinstance(error, grpc.RpcError):
                raise Failure.of(error, call.where) from error
            raise

    async def _launch(self, launch: Launch | None) -> None:
        while launch is not None:
            try:
                outcome = await self._perform(launch.operation)
            except Failure as failure:
                outcome = failure
            launch = launch.landed(outcome)

    async def _halt(self) -> None:
        task, self._background = self._background, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def _stub(self, call: Call) -> rpc.Stub:
        key = call.address, call.service
        if key not in self._stubs:
            if call.address not in self._channels:
                self._channels[call.address] = self._security.channel(
                    grpc.aio, call.address, self._hosts.get(call.address)
                )
            self._stubs[key] = rpc.Stub(self._channels[call.address], call.service)
        return self._stubs[key]


async def _write_and_read(stream: Any, call: Call) -> Any:
    try:
        await stream.write(call.request)
    except (asyncio.InvalidStateError, grpc.RpcError) as error:
        # Whatever gRPC makes of it, this request was not what ended the stream: it may do better on a new one.
        why = f"the stream had ended ({(await stream.code()).name}: {await stream.details() or 'no details'})"
        raise Failure(grpc.StatusCode.UNAVAILABLE, why[:500], call.where) from error
    return await stream.read()
