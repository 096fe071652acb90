"""Checks of request fields that both services make."""

from __future__ import annotations

import asyncio
import re
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robodual.serving.errors import InvalidArgument
from robodual.serving.images import decode_image, is_compressed
from robodual_client import wire

LAST = 2**31 - 1  # recovery states carry steps as int32
_COUNTERS = ("episode", "step")
_SESSION = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_REQUEST: ContextVar[Any] = ContextVar("request", default=None)


def session_id(request: Any) -> str:
    """The request's session; the log's lines carry it from here on (see `labels`).

    Raises `InvalidArgument` for a name that is none, and for an episode or step that no control loop can count.
    """
    session: str = request.session_id
    if not _SESSION.fullmatch(session):
        raise InvalidArgument("session_id: expected 1 to 64 characters of [A-Za-z0-9_.-]")
    for name in _COUNTERS:
        value = getattr(request, name, 0)
        if value > LAST:
            raise InvalidArgument(f"{name}: expected at most {LAST}, got {value}")
    _REQUEST.set(request)
    return session


def labels() -> dict[str, Any]:
    """Session, episode and step of the request that runs, as far as it has them; of none, nothing."""
    request = _REQUEST.get()
    if request is None:
        return {}
    counters = {name: getattr(request, name) for name in _COUNTERS if hasattr(request, name)}
    return {"session": request.session_id, **counters}


async def image(message: Any, name: str, *, field: str, sides: range) -> NDArray[np.uint8]:
    """The image `name` of `message` as uint8 [H, W, 3]. Raises `InvalidArgument`."""
    if not message.HasField(name):
        raise InvalidArgument(f"{field}: is missing")
    value: wire.Image = getattr(message, name)
    try:
        if is_compressed(value):
            return await asyncio.to_thread(decode_image, value, field=field, sides=sides)
        return decode_image(value, field=field, sides=sides)
    except ValueError as error:
        raise InvalidArgument(str(error)) from error
