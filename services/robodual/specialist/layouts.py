"""Requests that are laid out like one before, read in place: neither parsed nor copied but for their first few bytes.

A protobuf message is the concatenation of its fields, and a robot's requests differ in their head and in the values of
their arrays alone. So a request that ends in the very bytes that an accepted one had around its arrays, with as many
between them, holds an observation of the same shapes at the same places. All others are parsed by protobuf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from robodual.specialist import observation
from robodual.specialist.engine import Frame
from robodual_client import frame as client
from robodual_client import wire

MOST = 8  # layouts that are remembered: robots with the same cameras share one


class Layout:
    """A request's observation as robodual_client writes it, last: the bytes around its arrays, and their places."""

    def __init__(self, frame: Frame, sensors: Sequence[str]) -> None:
        """Of the request that `frame` came in, if a robodual_client wrote it; `sensors` in the order of GetInfo."""
        numbers = wire.Observation.DESCRIPTOR.fields_by_name
        arrays = {name: getattr(frame, name) for name in ("rgb_static", *sensors)}
        fields: list[client.Buffer] = []
        for name, array in arrays.items():
            buffers = client.image_buffers(array) if name in _COLOUR else client.tensor_buffers(array)
            fields += client.field(numbers[name].number, buffers)
        pieces, named = client.Frame(fields).pieces(), iter(arrays.items())
        self._size = sum(map(len, pieces))
        self._fixed: list[tuple[int, bytes]] = []  # each with its place, from the end
        self._arrays: list[tuple[str, int, tuple[int, ...], np.dtype[Any]]] = []
        place, fixed = -self._size, b""
        for piece in pieces:
            if isinstance(piece, bytes):
                fixed += piece
            else:
                self._fixed.append((place - len(fixed), fixed))
                fixed = b""
                name, array = next(named)
                self._arrays.append((name, place, array.shape, array.dtype))
            place += len(piece)

    def head(self, request: bytes) -> wire.ActRequest | None:
        """The request without its observation, if it is of this layout."""
        end = len(request)
        if end < self._size or not all(request.startswith(fixed, end + place) for place, fixed in self._fixed):
            return None
        try:
            head = wire.ActRequest.FromString(request[: end - self._size])
        except DecodeError:
            return None
        # Two observations would have to be merged.
        return None if head.HasField("observation") else head

    def frame(self, request: bytes) -> Frame:
        """Views of the request's bytes."""
        end = len(request)
        arrays = {name: np.ndarray(shape, dtype, request, end + place) for name, place, shape, dtype in self._arrays}
        return Frame(**_NOTHING | arrays)


_COLOUR = ("rgb_static", "rgb_gripper")
_NOTHING: dict[str, Any] = dict.fromkeys(Frame.__dataclass_fields__)


class Received:
    """A request, parsed but for its observation where a layout reads that; it has the message's fields."""

    def __init__(self, message: wire.ActRequest, raw: bytes, layout: Layout | None = None) -> None:
        self.message = message
        self.raw = raw
        self.layout = layout

    def __getattr__(self, name: str) -> Any:
        return getattr(self.message, name)


class Layouts:
    """Reads requests, and remembers the layouts of the last few that were new."""

    def __init__(self, sensors: Sequence[str]) -> None:
        self._sensors = sensors
        self._known: list[Layout] = []

    def receive(self, request: bytes) -> Received:
        """Raises `DecodeError`."""
        for layout in self._known:
            head = layout.head(request)
            if head is not None:
                return Received(head, request, layout)
        return Received(wire.ActRequest.FromString(request), request)

    async def frame(self, received: Received) -> Frame:
        """The observation, whose values are not checked yet. Raises `InvalidArgument`."""
        if received.layout is not None:
            return received.layout.frame(received.raw)
        frame = await observation.frame(received.message, self._sensors)
        layout = Layout(frame, self._sensors)
        if layout.head(received.raw) is not None:
            self._known = [layout, *self._known[: MOST - 1]]
        return frame
