"""Around every call: errors become statuses in this one place, answers are counted, calls in flight are known."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from robodual.serving import auth, fields
from robodual.serving.errors import InvalidArgument, ServiceError
from robodual.serving.metrics import Metrics, Problem

logger = structlog.get_logger(__name__)

Parse = Callable[[bytes], Any]

UNTOUCHED = "/grpc.health.v1.Health/"  # its watchers never end, and it has nothing to say about errors


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Turns `ServiceError` into its status, and anything unexpected into INTERNAL with an id that the log explains."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Returns when no call is in flight."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        # None of them takes a stream: what does is a refusal.
        if handler is None or (details.method.startswith(UNTOUCHED) and not handler.request_streaming):
            return handler
        method = details.method.rpartition("/")[2]
        parse = handler.request_deserializer
        # Requests are parsed here: gRPC's own answer to bytes that are none is UNKNOWN, and a traceback in the log.
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(method, handler.stream_stream, parse), None, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, handler.unary_unary, parse), None, handler.response_serializer
        )

    def _unary(
        self, method: str, answer: Callable[[Any, Any], Awaitable[Any]], parse: Parse | None
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def guarded(request: bytes, context: Any) -> Any:
            with self._counted():
                try:
                    response = await answer(_parsed(request, parse), context)
                except asyncio.CancelledError:
                    self._given_up(method, context)
                    raise
                except Exception as error:
                    # gRPC keeps what `abort` raises, and with it this frame, until a garbage collection.
                    del request
                    await self._abort(method, error, context)
                else:
                    self._metrics.request(method, "OK").inc()
                    return response

        return guarded

    def _stream(
        self, method: str, answers: Callable[[Any, Any], AsyncIterator[Any]], parse: Parse | None
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def guarded(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            messages = _Messages(requests, parse)
            with self._counted():
                try:
                    async for response in answers(messages, context):
                        yield response
                        # Only now: it is on its way.
                        self._metrics.request(method, "OK").inc()
                except asyncio.CancelledError:
                    self._given_up(method, context)
                    raise
                except Exception as error:
                    await self._abort(method, error, context)
                finally:
                    await messages.close()

        return guarded

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    async def _abort(self, method: str, error: Exception, context: Any) -> None:
        if isinstance(error, ServiceError):
            code, message = error.code, str(error)
            logger.info("refused", method=method, code=code.name, message=message)
        else:
            identity = uuid.uuid4().hex[:12]
            code, message = grpc.StatusCode.INTERNAL, f"internal error {identity}; the service's log has the details"
            logger.error("failed", method=method, error_id=identity, exc_info=error)
        self._count(method, code, message)
        # Nor are the frames that held the request to be kept.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        await context.abort(code, message)

    def _given_up(self, method: str, context: Any) -> None:
        """A call that gRPC cancels: counted as a deadline that was missed, unless its caller just changed its mind."""
        remaining = context.time_remaining()
        if remaining is not None and remaining <= 0:
            self._count(method, grpc.StatusCode.DEADLINE_EXCEEDED, "the caller's deadline passed before the answer")

    def _count(self, method: str, code: grpc.StatusCode, message: str) -> None:
        self._metrics.request(method, code.name).inc()
        session = fields.labels().get("session", "")
        owner = structlog.contextvars.get_contextvars().get("token", auth.NOBODY)
        self._metrics.problems.add(Problem(time.time(), method, code.name, owner, session, message))


class _Messages:
    """A stream's requests, parsed as they are read."""

    def __init__(self, requests: AsyncIterator[bytes], parse: Parse | None) -> None:
        self._requests = requests
        self._parse = parse

    def __aiter__(self) -> AsyncIterator[Any]:
        self._requests = aiter(self._requests)
        return self

    async def __anext__(self) -> Any:
        return _parsed(await anext(self._requests), self._parse)

    async def close(self) -> None:
        """Lets go of the latest, which gRPC's reader and its generator, each holding the other, keep as well."""
        if isinstance(self._requests, AsyncGenerator):
            await self._requests.aclose()


def _parsed(request: bytes, parse: Parse | None) -> Any:
    """The message in `request`; the bytes themselves for a handler that reads none.

    Raises `InvalidArgument`, and what `auth.admit` raises.
    """
    auth.admit()
    if parse is None:
        return request
    try:
        return parse(request)
    except DecodeError as error:
        raise InvalidArgument(f"request: {error}") from error
