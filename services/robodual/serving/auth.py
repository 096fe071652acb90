"""Who calls, and whether they may: bearer tokens, from the settings and from a file that may change."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import grpc
import structlog
from pydantic import SecretStr

from robodual.serving.errors import ResourceExhausted, ServiceError, Unauthenticated
from robodual.serving.rate import Rate
from robodual.serving.tokens import Token, TokensFile, digest, parse

logger = structlog.get_logger(__name__)

EXEMPT = "/grpc.health.v1.Health/"
EXEMPT_CALLS = 16  # open at a time, of each exempt method
MESSAGE = "authorization: expected metadata 'Bearer TOKEN' with one of the service's tokens"
WITHDRAWN = "authorization: the token has been withdrawn; call again with one of the service's tokens"
NOBODY = ""  # the owner of what is made through a service without tokens
LOOK = 1.0  # seconds between looks at the file


class Caller:
    """Whoever shows one token; all callers of one owner share its rate."""

    def __init__(self, owner: str, rate: Rate | None) -> None:
        self.owner = owner
        self.withdrawn = False
        self._rate = rate

    def admit(self) -> None:
        """Counts a request. Raises `Unauthenticated` once the token is withdrawn, `ResourceExhausted` over the rate."""
        if self.withdrawn:
            raise Unauthenticated(WITHDRAWN)
        if self._rate is not None:
            self._rate.take()


_CALLER: ContextVar[Caller] = ContextVar("caller")


def admit() -> None:
    """Counts a request of the call that runs; see `Caller.admit`."""
    caller = _CALLER.get(None)
    if caller is not None:
        caller.admit()


def owner() -> str:
    """The owner of what the call that runs makes."""
    return _CALLER.get().owner


class Authenticator:
    """Tells callers by their tokens; without tokens, everyone is the same caller."""

    def __init__(
        self, tokens: Iterable[SecretStr] = (), *, file: Path | None = None, max_rate: float | None = None
    ) -> None:
        """`max_rate`: requests a second of one owner. Raises `ValueError` for tokens or a file that are no good."""
        self._given = [(f"tokens: number {n}", token.get_secret_value()) for n, token in enumerate(tokens, 1)]
        self._file = None if file is None else TokensFile(file)
        self._max_rate = max_rate
        self._rates: dict[str, Rate] = {}
        self._callers: dict[Token, Caller] = {}
        self._seen = b""  # of the file's content: its SHA-256
        if self._file is None:
            self._admit_only(parse(self._given))
        else:
            self._take(self._file, *self._file.read())
        self._anyone = None if self._callers else Caller(NOBODY, self._rate(NOBODY))

    def caller(self, authorization: str | None) -> Caller | None:
        """Who shows an `Authorization` header, or None. Its time depends on the number of tokens alone."""
        if self._anyone is not None:
            return self._anyone
        scheme, _, secret = (authorization or "").partition(" ")
        offered = digest(secret)
        matches = [(hmac.compare_digest(offered, token.digest), caller) for token, caller in self._callers.items()]
        return next((caller for same, caller in matches if same and scheme.lower() == "bearer"), None)

    async def follow(self) -> None:
        """Takes in what is new in the file, for as long as it runs. What is no good is logged, and changes nothing."""
        while self._file is not None:
            await asyncio.sleep(LOOK)
            before, self._seen = self._seen, b""
            try:
                # The content, not its date: a mounted secret is replaced through links and may keep that.
                content, exposed = await asyncio.to_thread(self._file.read)
                self._seen = hashlib.sha256(content).digest()
                if self._seen != before:
                    self._take(self._file, content, exposed)
                    logger.info("tokens read again", tokens=len(self._callers))
            except ValueError as error:
                if self._seen != before:
                    logger.error("tokens not read again: those from before stay valid", reason=str(error))

    def _take(self, file: TokensFile, content: bytes, exposed: bool) -> None:
        self._seen = hashlib.sha256(content).digest()
        self._admit_only(parse([*self._given, *file.entries(content)]))
        if exposed:
            logger.warning(
                "tokens_file: every user of this machine may read or write it; chmod o-rw", path=str(file.path)
            )

    def _admit_only(self, tokens: Iterable[Token]) -> None:
        before = self._callers
        self._callers = {token: before.get(token) or Caller(token.owner, self._rate(token.owner)) for token in tokens}
        for token, caller in before.items():
            caller.withdrawn = token not in self._callers

    def _rate(self, owner: str) -> Rate | None:
        return None if self._max_rate is None else self._rates.setdefault(owner, Rate(self._max_rate))


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Answers UNAUTHENTICATED to calls without a token, and RESOURCE_EXHAUSTED to those beyond an owner's share.

    Health checks need no token, and have places of their own.
    """

    def __init__(self, authenticator: Authenticator, *, share: int) -> None:
        """`share`: how many calls one owner may have open."""
        self._authenticator = authenticator
        self._share = share
        self._open = Counter[str]()  # calls by their owner, or by their method where it is exempt

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        if details.method.startswith(EXEMPT):
            if self._enter(details.method, EXEMPT_CALLS):
                return handler
            return _refusal(ResourceExhausted(f"{EXEMPT_CALLS} such calls are open already; try again later"))
        header = next((value for key, value in details.invocation_metadata or () if key == "authorization"), None)
        caller = self._authenticator.caller(_text(header))
        if caller is None:
            return _refusal(Unauthenticated(MESSAGE))
        # Interceptors and handler of a call run in one task, whose context these are of.
        _CALLER.set(caller)
        if caller.owner:
            structlog.contextvars.bind_contextvars(token=caller.owner)
        if not self._enter(caller.owner, self._share):
            return _refusal(
                ResourceExhausted(
                    f"this token has {self._share} calls open, the most that it may; end streams that are not used, "
                    "or try again later"
                )
            )
        return handler

    def _enter(self, whose: str, most: int) -> bool:
        """Counts the call that runs until it ends, one whose message never comes too; False if it is one too many."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call runs in a task")
        if self._open[whose] >= most:
            return False
        self._open[whose] += 1
        task.add_done_callback(lambda _: self._open.subtract([whose]))
        return True


def _refusal(error: ServiceError) -> Any:
    """A handler of one kind may refuse calls of every kind: it answers before it reads."""

    def refuse(requests: Any, context: Any) -> AsyncIterator[Any]:
        raise error

    return grpc.stream_stream_rpc_method_handler(refuse)


def _text(header: str | bytes | None) -> str | None:
    return header.decode(errors="replace") if isinstance(header, bytes) else header
