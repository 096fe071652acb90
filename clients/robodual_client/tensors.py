"""NumPy arrays to and from the wire's `Tensor` and `Image`.

bfloat16, which NumPy lacks, stands as its uint16 bits: `encode` of a uint16 array gives a bfloat16 tensor, and
`decode(..., dtype=np.uint16)` reads one.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Sequence, Union

import numpy as np
import numpy.typing as npt

from robodual_client import wire

# Sides of an image, in pixels, that the services accept.
IMAGE_SIDES = range(8, 4097)

# A size that a dimension must have, the sizes that it may have, or None for any.
Dimension = Union[int, range, None]

_NUMPY = {
    wire.DTYPE_UINT8: np.dtype("u1"),
    wire.DTYPE_FLOAT16: np.dtype("<f2"),
    wire.DTYPE_BFLOAT16: np.dtype("<u2"),
    wire.DTYPE_FLOAT32: np.dtype("<f4"),
    wire.DTYPE_FLOAT64: np.dtype("<f8"),
    wire.DTYPE_INT32: np.dtype("<i4"),
    wire.DTYPE_INT64: np.dtype("<i8"),
}
_WIRE = {dtype: number for number, dtype in _NUMPY.items()}


def encode(array: npt.NDArray[Any]) -> wire.Tensor:
    """`array` of any shape as a Tensor; uint16 means bfloat16 bits. Raises ValueError if its dtype cannot travel."""
    dtype = array.dtype.newbyteorder("<")
    if dtype not in _WIRE:
        raise ValueError(f"an array of {array.dtype} cannot travel; use one of {', '.join(map(str, _WIRE))}")
    return wire.Tensor(dtype=_WIRE[dtype], shape=array.shape, data=array.astype(dtype, copy=False).tobytes())


def decode(tensor: wire.Tensor, *, field: str, dtype: npt.DTypeLike, shape: Sequence[Dimension]) -> npt.NDArray[Any]:
    """The tensor as a read-only array over its own bytes, of native byte order on little-endian machines.

    `shape` gives for each dimension its size, a `range` of allowed sizes, or None for any. Raises ValueError, which
    names `field`, if dtype, shape or the number of bytes differ; nothing is allocated for a shape that the bytes do
    not fill.
    """
    expected, number = _expected(np.dtype(dtype))
    if expected is None:
        raise ValueError(f"{field}: no tensor is of {np.dtype(dtype)}")
    if tensor.dtype != number:
        raise ValueError(f"{field}: dtype must be {_dtype_name(number)}, got {_dtype_name(tensor.dtype)}")
    sizes = tuple(tensor.shape)
    if len(sizes) != len(shape):
        raise ValueError(f"{field}: must have {len(shape)} dimensions, {_spell(shape)}, got {len(sizes)}")
    if sizes != shape and not all(map(_fits, sizes, shape)):
        raise ValueError(f"{field}: shape must be {_spell(shape)}, got {_spell(sizes)}")
    data = tensor.data
    size = math.prod(sizes) * expected.itemsize  # Python integers: a product of 32-bit sizes cannot wrap
    if len(data) != size:
        raise ValueError(f"{field}: shape {_spell(sizes)} needs {size} bytes of data, got {len(data)}")
    try:
        return np.ndarray(sizes, expected, data)
    except ValueError as error:  # [0, 4e9, 4e9] is empty, yet no array can have that shape
        raise ValueError(f"{field}: {error}") from error


@lru_cache(maxsize=32)
def _expected(dtype: np.dtype[Any]) -> tuple[np.dtype[Any] | None, int]:
    """What NumPy calls `dtype` on the wire, if it can travel, and its number there."""
    little_endian = dtype.newbyteorder("<")
    return (little_endian, _WIRE[little_endian]) if little_endian in _WIRE else (None, 0)


def encode_image(array: npt.NDArray[Any]) -> wire.Image:
    """A uint8 [H, W, 3] RGB array as a raw Image. Raises ValueError for another dtype or shape."""
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image must be uint8 [height, width, 3], got {array.dtype} {_spell(array.shape)}")
    height, width, _ = array.shape
    return wire.Image(encoding=wire.IMAGE_ENCODING_RAW_RGB8, height=height, width=width, data=array.tobytes())


def decode_image(image: wire.Image, *, field: str) -> npt.NDArray[np.uint8]:
    """A raw Image as a read-only uint8 [H, W, 3] array over its own bytes.

    Raises ValueError, which names `field`, for another encoding, a side out of `IMAGE_SIDES`, or too few or many bytes.
    """
    if image.encoding != wire.IMAGE_ENCODING_RAW_RGB8:
        raise ValueError(f"{field}: encoding must be IMAGE_ENCODING_RAW_RGB8, got {image.encoding}")
    check_sides(image, field=field)
    data = image.data
    size = image.height * image.width * 3
    if len(data) != size:
        raise ValueError(f"{field}: {image.height}x{image.width} RGB needs {size} bytes of data, got {len(data)}")
    return np.ndarray((image.height, image.width, 3), np.uint8, data)


def check_sides(image: wire.Image, *, field: str) -> None:
    """Raises ValueError, which names `field`, unless height and width, whatever the encoding, are in `IMAGE_SIDES`."""
    if image.height not in IMAGE_SIDES or image.width not in IMAGE_SIDES:
        raise ValueError(
            f"{field}: each side must be {IMAGE_SIDES.start} to {IMAGE_SIDES.stop - 1} pixels, "
            f"got height {image.height}, width {image.width}"
        )


def _fits(size: int, allowed: Dimension) -> bool:
    return allowed is None or (size in allowed if isinstance(allowed, range) else size == allowed)


def _spell(shape: Sequence[Dimension]) -> str:
    def spell(allowed: Dimension) -> str:
        if isinstance(allowed, range):
            return f"{allowed.start}..{allowed.stop - 1}"
        return "any" if allowed is None else str(allowed)

    return f"[{', '.join(map(spell, shape))}]"


def _dtype_name(number: int) -> str:
    return wire.DType.Name(number) if number in wire.DType.values() else f"unknown ({number})"
