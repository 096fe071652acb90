"""The operator's page over HTTP: its files for anyone, and what it shows, as server-sent events."""

from __future__ import annotations

import asyncio
import json
from importlib import resources
from typing import Annotated

import structlog
from fastapi import APIRouter, HTTPException, Query, Request, Response
from starlette.types import Receive, Scope, Send

from robodual.serving.auth import Caller
from robodual.serving.errors import ResourceExhausted
from robodual.specialist.operator.observers import Observer, Observers

logger = structlog.get_logger(__name__)

STALLED = 10.0  # seconds that one event may take to be read before its observer is given up
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def files() -> APIRouter:
    """The page itself, which holds nothing of any session."""
    router = APIRouter(prefix="/operator", include_in_schema=False)
    folder = resources.files(__package__) / "assets"
    contents = {file.name: file.read_bytes() for file in folder.iterdir()}

    @router.get("/")
    @router.get("/{name}")
    async def file(name: str = "index.html") -> Response:
        if name not in contents:
            raise HTTPException(404, f"no such file; the page is at {router.prefix}/")
        return Response(contents[name], media_type=TYPES[name.rpartition(".")[2]], headers=HEADERS)

    return router


def events(observers: Observers) -> APIRouter:
    """What the page shows; for those with a token."""
    router = APIRouter(prefix="/operator", include_in_schema=False)

    @router.get("/events")
    async def look(
        request: Request,
        session: Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = None,
        page: Annotated[int, Query(ge=1, le=10_000)] = 1,
    ) -> Response:
        return _Events(observers, request.state.caller, session, page)

    return router


class _Events(Response):
    """Server-sent events for one observer, whose place is free again when the response ends, however it does."""

    media_type = "text/event-stream"

    def __init__(self, observers: Observers, caller: Caller, session: str | None, page: int) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["Content-Length"]
        self._observers = observers
        self._caller = caller
        self._chosen = session, page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._observers.enter(self._caller.owner, *self._chosen) as observer:
                await self._stream(observer, receive, send)
        except ResourceExhausted as error:
            raise HTTPException(429, str(error), {"Retry-After": "2"}) from error

    async def _stream(self, observer: Observer, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while not (self._observers.closed or self._caller.withdrawn or gone.done()):
                report = json.dumps(await observer.report(), allow_nan=False, separators=(",", ":"))
                event = {"type": "http.response.body", "body": f"data: {report}\n\n".encode(), "more_body": True}
                await asyncio.wait_for(send(event), STALLED)
                await self._observers.pause(gone)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.TimeoutError:
            logger.warning("an observer does not read: given up")
        finally:
            gone.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
