"""The HTTP side of a service: health, readiness, metrics and what is loaded."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Response
from google.protobuf.json_format import MessageToDict

import robodual
from robodual.serving.auth import Authenticator
from robodual.serving.errors import ResourceExhausted
from robodual.serving.metrics import Metrics
from robodual.serving.readiness import Readiness
from robodual_client import wire


def application(
    readiness: Readiness,
    metrics: Metrics,
    authenticator: Authenticator,
    info: Callable[[], wire.InfoResponse | None],
) -> FastAPI:
    """`/healthz` and `/readyz` for anyone, `/metrics`, `/info` and `/openapi.json` for those with a token."""
    app = FastAPI(title="RoboDual Serve", version=robodual.__version__, docs_url=None, redoc_url=None, openapi_url=None)

    def authorized(authorization: Annotated[str | None, Header()] = None) -> None:
        caller = authenticator.caller(authorization)
        if caller is None:
            raise HTTPException(
                401, "expected the header 'Authorization: Bearer TOKEN'", {"WWW-Authenticate": "Bearer"}
            )
        try:
            caller.admit()
        except ResourceExhausted as error:
            raise HTTPException(429, str(error), {"Retry-After": "1"}) from error

    guarded = APIRouter(
        dependencies=[Depends(authorized)],
        responses={401: {"description": "no token, or a wrong one"}, 429: {"description": "over the token's rate"}},
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

    app.include_router(guarded)
    return app


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
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            ws="none",
            limit_concurrency=64,
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
