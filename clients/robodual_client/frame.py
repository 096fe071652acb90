"""One step's observation as bytes, and the requests around it.

A protobuf message is the concatenation of its serialised fields, so a request is a small message and the arrays' own
memory, one after the other. A stream writes them to its socket as they are; for gRPC they are joined, one copy. Through
the message classes it would be four, and take twenty times as long.
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

    They are read from the caller's arrays, but for the static image, of which `act_request` keeps a copy: another
    replica, and the generalist, may want it after the step, when the caller has overwritten them.
    """

    def __init__(self, sensors: list[Buffer]) -> None:
        self._observation = sensors
        self._size = _size(sensors)
        self._static: bytes | None = None

    def condition_request(self, head: wire.ConditionRequest) -> bytes:
        """`head` with this frame's static image."""
        return b"".join(
            [head.SerializeToString(), *field(wire.ConditionRequest.RGB_STATIC_FIELD_NUMBER, self._rgb_static())]
        )

    def act_request(self, head: wire.ActRequest, previous: Frame | None = None) -> list[Buffer]:
        """`head` with this frame's observation, and `previous`'s static image where it is given."""
        if self._static is None:
            self._static = bytes(self._observation[2])
        parts: list[Buffer] = [head.SerializeToString()]
        if previous is not None:
            parts += field(wire.ActRequest.PREVIOUS_RGB_STATIC_FIELD_NUMBER, previous._rgb_static())
        return [*parts, *self.pieces()]

    def pieces(self) -> list[Buffer]:
        """The serialised observation field: bytes, and as memoryviews the sensors' values."""
        key = _key(wire.ActRequest.OBSERVATION_FIELD_NUMBER, self._size)
        return [key, *self._observation]

    def _rgb_static(self) -> list[Buffer]:
        """The buffers of the static image, whose field comes first, without its key."""
        _, head, pixels = self._observation[:3]
        return [head, pixels if self._static is None else self._static]


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
