"""Bearer tokens: who may call."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import grpc
from pydantic import SecretStr

from robodual.serving.errors import Unauthenticated

EXEMPT = "/grpc.health.v1.Health/"
MESSAGE = "authorization: expected metadata 'Bearer TOKEN' with one of the service's tokens"


class Authenticator:
    """Accepts any of several tokens; everyone, if there are none."""

    def __init__(self, tokens: Iterable[SecretStr]) -> None:
        self._digests = [_digest(token.get_secret_value()) for token in tokens]

    def accepts(self, authorization: str | None) -> bool:
        """Whether an `Authorization` header opens. Its time depends on the number of tokens alone."""
        if not self._digests:
            return True
        scheme, _, token = (authorization or "").partition(" ")
        offered = _digest(token)
        matches = [hmac.compare_digest(offered, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Answers UNAUTHENTICATED to calls without a token. Health checks need none."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        header = next((value for key, value in details.invocation_metadata or () if key == "authorization"), None)
        if handler is None or details.method.startswith(EXEMPT) or self._authenticator.accepts(_text(header)):
            return handler
        # A handler of one kind may refuse calls of every kind: it answers before it reads.
        return grpc.stream_stream_rpc_method_handler(_refuse)


def _refuse(requests: Any, context: Any) -> AsyncIterator[Any]:
    raise Unauthenticated(MESSAGE)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


def _text(header: str | bytes | None) -> str | None:
    return header.decode(errors="replace") if isinstance(header, bytes) else header
