"""One step's observation as bytes, and the requests around it.

A protobuf message is the concatenation of its serialised fields, so requests are joined from a small message and the
arrays' own memory: each frame is copied once, into the request. Through the message classes it would be four times, and
take twenty times as long.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Iterable, Union

import numpy as np
import numpy.typing as npt

from robodual_client import wire

Buffer = Union[bytes, memoryview]  # of bytes: len() is its size


def image_buffers(array: npt.NDArray[np.uint8]) -> list[Buffer]:
    """A serialised raw Image of a uint8 [H, W, 3] array."""
    return [_image_head(array.shape[0], array.shape[1]), _memory(array)]


def tensor_buffers(array: npt.NDArray[Any]) -> list[Buffer]:
    """A serialised Tensor of a uint8 or float32 array."""
    dtype = wire.DTYPE_UINT8 if array.dtype == np.uint8 else wire.DTYPE_FLOAT32
    little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return [_tensor_head(dtype, array.shape, array.nbytes), _memory(little_endian)]


class Frame:
    """The serialised sensors of one step, each as what `field` gives, one after the other, rgb_static first.

    They are read from the caller's arrays until `act_request`; from then on from the bytes that it returned, so that
    the caller may overwrite the arrays.
    """

    def __init__(self, sensors: list[Buffer]) -> None:
        self._observation = sensors
        self._size = _size(sensors)
        self._request: bytes | None = None

    def condition_request(self, head: wire.ConditionRequest) -> bytes:
        """`head` with this frame's static image."""
        return b"".join(
            [head.SerializeToString(), *field(wire.ConditionRequest.RGB_STATIC_FIELD_NUMBER, self._rgb_static())]
        )

    def act_request(self, head: wire.ActRequest, previous: Frame | None = None) -> bytes:
        """`head` with this frame's observation, and `previous`'s static image where it is given."""
        parts: list[Buffer] = [head.SerializeToString()]
        if previous is not None:
            parts += field(wire.ActRequest.PREVIOUS_RGB_STATIC_FIELD_NUMBER, previous._rgb_static())
        self._request = b"".join([*parts, *self.pieces()])
        return self._request

    def pieces(self) -> list[Buffer]:
        """The serialised observation field: bytes, and as memoryviews the sensors' values."""
        key = _key(wire.ActRequest.OBSERVATION_FIELD_NUMBER, self._size)
        return [key, *self._observation] if self._request is None else [key, self._copied()]

    def _rgb_static(self) -> list[Buffer]:
        """The buffers of the static image: of the field that comes first, the three after its key."""
        key, head, pixels = self._observation[:3]
        if self._request is None:
            return [head, pixels]
        return [self._copied()[len(key) : len(key) + len(head) + len(pixels)]]

    def _copied(self) -> memoryview:
        """The observation as it stands in the request."""
        assert self._request is not None
        return memoryview(self._request)[-self._size :]


def field(number: int, value: list[Buffer]) -> list[Buffer]:
    """A length-delimited field: its key and length in one buffer, then the buffers of its value."""
    return [_key(number, _size(value)), *value]


# A camera's frames are all of one size, so that these few bytes are the same at every step.
@lru_cache(maxsize=256)
def _key(number: int, size: int) -> bytes:
    """What stands before the `size` bytes of a length-delimited field."""
    return _varint(number << 3 | 2) + _varint(size)


@lru_cache(maxsize=64)
def _image_head(height: int, width: int) -> bytes:
    """A serialised raw Image up to its pixels."""
    header = wire.Image(encoding=wire.IMAGE_ENCODING_RAW_RGB8, height=height, width=width)
    return header.SerializeToString() + _key(wire.Image.DATA_FIELD_NUMBER, height * width * 3)


@lru_cache(maxsize=64)
def _tensor_head(dtype: wire.DType, shape: tuple[int, ...], size: int) -> bytes:
    """A serialised Tensor up to its data."""
    return wire.Tensor(dtype=dtype, shape=shape).SerializeToString() + _key(wire.Tensor.DATA_FIELD_NUMBER, size)


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _memory(array: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")


def _size(buffers: Iterable[Buffer]) -> int:
    return sum(map(len, buffers))
