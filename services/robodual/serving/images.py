"""Images off the wire: raw, PNG or JPEG to uint8 [H, W, 3], with every size checked before anything is decoded."""

from __future__ import annotations

import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robodual_client import tensors, wire

_FORMATS = {wire.IMAGE_ENCODING_PNG: "PNG", wire.IMAGE_ENCODING_JPEG: "JPEG"}
_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
# Start-of-frame markers: baseline, extended and progressive, Huffman-coded.
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)


def decode_image(image: wire.Image, *, field: str, sides: range = tensors.IMAGE_SIDES) -> NDArray[np.uint8]:
    """The image as uint8 [H, W, 3], RGB; a read-only view of its own bytes if it is raw.

    Raises `ValueError`, which names `field`, for an unknown encoding, a side out of `sides`, a PNG or JPEG whose
    header tells another size than the message or another kind of pixels, and for data that is damaged or cut short.
    Blocks for about 1 ms per 200x200 PNG: run it in a thread.
    """
    if image.height not in sides or image.width not in sides:
        raise ValueError(
            f"{field}: expected sides of {sides.start} to {sides.stop - 1} pixels, "
            f"got height {image.height}, width {image.width}"
        )
    if image.encoding == wire.IMAGE_ENCODING_RAW_RGB8:
        return tensors.decode_image(image, field=field)
    if image.encoding not in _FORMATS:
        raise ValueError(f"{field}.encoding: expected RAW_RGB8, PNG or JPEG, got {image.encoding}")
    kind, data = _FORMATS[image.encoding], image.data
    size = _png_size(data) if kind == "PNG" else _jpeg_size(data)
    if size is None:
        raise ValueError(f"{field}.data: expected an 8-bit RGB {kind}, got something else or a header cut short")
    if size != (image.height, image.width):
        raise ValueError(f"{field}: its {kind} header says {size}, the message ({image.height}, {image.width})")
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as opened:
            # A second header may say another size; until it is decoded, a picture takes no memory.
            if opened.size != (image.width, image.height):
                raise ValueError("its headers contradict each other")
            mode, pixels = opened.mode, np.asarray(opened)
    # On damaged files Pillow raises nearly anything: IndexError, struct.error, SyntaxError, warnings made errors.
    except Exception as error:
        raise ValueError(f"{field}.data: the {kind} is damaged or cut short: {error}") from error
    if mode != "RGB" or pixels.shape != (image.height, image.width, 3):
        raise ValueError(f"{field}.data: expected an 8-bit RGB {kind}, got mode {mode}, shape {pixels.shape}")
    return pixels


def is_compressed(image: wire.Image) -> bool:
    return image.encoding in _FORMATS


def _png_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an 8-bit RGB PNG, from its first chunk."""
    if len(data) < 26 or not data.startswith(_PNG_START):
        return None
    width, height, depth, colour = struct.unpack_from(">IIBB", data, len(_PNG_START))
    return (height, width) if (depth, colour) == (8, 2) else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a three-component 8-bit JPEG, from its frame header."""
    if not data.startswith(b"\xff\xd8"):
        return None
    at = 2
    while at + 10 <= len(data):
        fill, marker, length = struct.unpack_from(">BBH", data, at)
        if fill != 0xFF or length < 2:
            return None
        if marker in _JPEG_FRAMES:
            depth, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            return (height, width) if (depth, components) == (8, 3) else None
        at += 2 + length
    return None
