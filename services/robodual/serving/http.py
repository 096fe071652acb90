"""The HTTP side of a service: health, readiness, metrics and what is loaded."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request, Response
from google.protobuf.json_format import MessageToDict
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

import robodual
from robodual.serving.auth import NOBODY, Authenticator
from robodual.serving.errors import ResourceExhausted
from robodual.serving.metrics import Metrics
from robodual.serving.readiness import Readiness
from robodual.serving.settings import is_loopback
from robodual_client import wire

# Seconds that a connection may be without a whole request. A little more than uvicorn waits after an answer, where it
# parts in order.
PATIENCE = 6.0
REQUESTS = 64  # at a time, beside probes
PROBES = ("/healthz", "/readyz")


@dataclass(frozen=True)
class Pages:
    """What one service alone serves over HTTP: to anyone, and to those with a token (`request.state.caller`)."""

    public: APIRouter
    guarded: APIRouter


def application(
    readiness: Readiness,
    metrics: Metrics,
    authenticator: Authenticator,
    info: Callable[[], wire.InfoResponse | None],
    pages: Pages | None = None,
) -> FastAPI:
    """`/healthz` and `/readyz` for anyone, `/metrics`, `/info` and `/openapi.json` for those with a token; `pages`."""
    app = FastAPI(title="RoboDual Serve", version=robodual.__version__, docs_url=None, redoc_url=None, openapi_url=None)

    def authorized(request: Request, authorization: Annotated[str | None, Header()] = None) -> None:
        caller = authenticator.caller(authorization)
        if caller is None:
            raise HTTPException(
                401, "expected the header 'Authorization: Bearer TOKEN'", {"WWW-Authenticate": "Bearer"}
            )
        if caller.owner == NOBODY and _is_rebound(request):
            # A page of any site may have its name stand for 127.0.0.1: without tokens, that would be all it takes.
            raise HTTPException(403, "expected a Host of this machine (localhost), as long as no tokens are set")
        try:
            caller.admit()
        except ResourceExhausted as error:
            raise HTTPException(429, str(error), {"Retry-After": "1"}) from error
        request.state.caller = caller

    guarded = APIRouter(
        dependencies=[Depends(authorized)],
        responses={
            401: {"description": "no token, or a wrong one"},
            403: {"description": "no tokens are set, and the Host is not of this machine"},
            429: {"description": "over the token's rate"},
        },
    )

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """200 while the process serves."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"description": "not ready; `missing` says why"}})
    async def readyz(response: Response) -> dict[str, Any]:
        """200 while the model is loaded and warm, the store answers and the service is not draining; else 503."""
        if not readiness.ready:
            response.status_code = 503
        return {"ready": readiness.ready, "missing": readiness.missing}

    @guarded.get("/metrics", response_class=Response)
    async def exposition() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @guarded.get("/info", responses={503: {"description": "the model is not loaded yet"}})
    async def what_is_loaded() -> dict[str, Any]:
        """What GetInfo answers."""
        message = info()
        if message is None:
            raise HTTPException(503, "the model is not loaded yet")
        return MessageToDict(message, preserving_proto_field_name=True)

    @guarded.get("/openapi.json", include_in_schema=False)
    async def schema() -> dict[str, Any]:
        return app.openapi()

    if pages is not None:
        guarded.include_router(pages.guarded)
    app.include_router(guarded)
    if pages is not None:
        app.include_router(pages.public)
    return app


def _is_rebound(request: Request) -> bool:
    """Whether the connection came to this machine's own address under another machine's name."""
    own = request.scope.get("server") or ("",)
    return is_loopback(own[0]) and not is_loopback(urlsplit(f"//{request.headers.get('host', '')}").hostname or "")


def _limited(app: ASGIApp) -> ASGIApp:
    """`app` for so many requests at a time; uvicorn's own limit counts connections, those without a request too."""
    running = 0

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal running
        if running >= REQUESTS and scope["path"] not in PROBES:
            refusal = PlainTextResponse(f"{REQUESTS} requests are being answered, no more may be; try again", 503)
            return await refusal(scope, receive, send)
        running += 1
        try:
            return await app(scope, receive, send)
        finally:
            running -= 1

    return limited


class _Protocol(H11Protocol):
    """Ends a connection that brings no request in time, its first or the next; uvicorn waits as long as bytes come."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waiting = self._wait()

    def on_response_complete(self) -> None:
        self._waiting.cancel()
        self._waiting = self._wait()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.cancel()
        super().connection_lost(exc)

    def _wait(self) -> asyncio.TimerHandle:
        return self.loop.call_later(PATIENCE, self._end, self.cycle)

    def _end(self, latest: object) -> None:
        # A request in progress, an event stream say, has a cycle of its own.
        if self.cycle is latest:
            self.transport.abort()


class HttpServer:
    """Uvicorn in the event loop that is running, on a socket that is bound from the start."""

    def __init__(
        self,
        app: FastAPI,
        host: str,
        port: int,
        *,
        certificate: Path | None = None,
        key: Path | None = None,
        client_ca: Path | None = None,
    ) -> None:
        """Port 0 takes a free one; with `client_ca`, callers must show a certificate of that authority.

        Raises `OSError` if the address is taken.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            raise OSError(error.errno, f"http_port: cannot listen on {host}:{port}: {error.strerror}") from error
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            _limited(app),
            http=_Protocol,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=1,
            ssl_certfile=certificate,
            ssl_keyfile=key,
            ssl_ca_certs=None if client_ca is None else str(client_ca),
            ssl_cert_reqs=ssl.CERT_NONE if client_ca is None else ssl.CERT_REQUIRED,
        )
        self._server = _Uvicorn(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.005)
        if self._task.done():
            await self._task

    async def stop(self) -> None:
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        self._socket.close()


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the service, which drains gRPC first."""
        yield
