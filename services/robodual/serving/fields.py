"""Checks of request fields that both services make."""

from __future__ import annotations

import asyncio
import functools
import re
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from robodual.serving.errors import InvalidArgument
from robodual.serving.images import decode_image, is_compressed
from robodual_client import wire

LAST = 2**31 - 1  # recovery states carry steps as int32
_LABELS = ("episode", "step")
_SESSION = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def session_id(request: Any) -> str:
    """The request's session, which the log's lines carry from here on.

    Raises `InvalidArgument` for a name that is none, and for an episode or step that no control loop can count.
    """
    session: str = request.session_id
    if not _SESSION.fullmatch(session):
        raise InvalidArgument("session_id: expected 1 to 64 characters of [A-Za-z0-9_.-]")
    labels = {name: getattr(request, name) for name in _labels(request.DESCRIPTOR)}
    for name, value in labels.items():
        if value > LAST:
            raise InvalidArgument(f"{name}: expected at most {LAST}, got {value}")
    structlog.contextvars.bind_contextvars(session=session, **labels)
    return session


@functools.cache
def _labels(message: Any) -> list[str]:
    return [name for name in _LABELS if name in message.fields_by_name]


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
