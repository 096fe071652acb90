"""A span for each request that is answered, below the one that its traceparent names."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc
import structlog

from robodual_client.tracing import Span, Tracer

TRACED = ("Condition", "Act", "ActStream")

current: ContextVar[Span | None] = ContextVar("current", default=None)


class TraceInterceptor(grpc.aio.ServerInterceptor):
    """Goes innermost, on a service that traces. Log lines of a request carry its trace id."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        method = details.method.rpartition("/")[2]
        if handler is None or method not in TRACED:
            return handler
        if handler.stream_stream is not None:
            traced = self._stream(handler.stream_stream)
            make = grpc.stream_stream_rpc_method_handler
        else:
            traced = self._unary(method, handler.unary_unary)
            make = grpc.unary_unary_rpc_method_handler
        return make(traced, handler.request_deserializer, handler.response_serializer)

    def begin(self, method: str, request: Any) -> Span:
        attributes = {"session": request.session_id, "episode": request.episode, "step": request.step}
        span = self._tracer.begin(method, attributes, request.traceparent)
        structlog.contextvars.bind_contextvars(trace_id=span.trace_id)
        current.set(span)
        return span

    def _unary(self, method: str, answer: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Any]:
        async def traced(request: Any, context: Any) -> Any:
            span = self.begin(method, request)
            try:
                response = await answer(request, context)
            except BaseException as error:
                span.end(error)
                raise
            span.end()
            return response

        return traced

    def _stream(self, answers: Callable[[Any, Any], AsyncIterator[Any]]) -> Callable[[Any, Any], Any]:
        async def traced(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            messages = _Messages(requests, self)
            try:
                async for response in answers(messages, context):
                    messages.end()
                    yield response
            except BaseException as error:
                messages.end(error)
                raise

        return traced


class _Messages:
    """A stream's requests; each has its span from when it is read until `end`."""

    def __init__(self, requests: AsyncIterator[Any], interceptor: TraceInterceptor) -> None:
        self._requests = requests
        self._interceptor = interceptor
        self._span: Span | None = None

    def end(self, error: BaseException | None = None) -> None:
        span, self._span = self._span, None
        current.set(None)
        if span is not None:
            span.end(error)

    def __aiter__(self) -> AsyncIterator[Any]:
        self._requests = aiter(self._requests)
        return self

    async def __anext__(self) -> Any:
        request = await anext(self._requests)
        self._span = self._interceptor.begin("Act", request)
        return request
