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
# Time is spent on each piece, however small it is: by Pillow on a chunk, in Python, and by libjpeg on a scan, which
# goes over the whole picture. Encoders make chunks of 8 kB and more, few others than IDAT, and ten scans.
PIECES = {"PNG": "chunks", "JPEG": "scans"}
MOST_PIECES = {"PNG": 4096, "JPEG": 32}
OTHER_CHUNK = 64  # as many IDAT chunks does another one count for: it may hold a megabyte, compressed
MOST_SEGMENTS = 256  # of a JPEG before its first scan
_SCAN = 0xDA
# Start-of-frame markers: baseline, extended and progressive, Huffman-coded.
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)


def decode_image(image: wire.Image, *, field: str, sides: range = tensors.IMAGE_SIDES) -> NDArray[np.uint8]:
    """The image as uint8 [H, W, 3], RGB; a read-only view of its own bytes if it is raw.

    Raises `ValueError`, which names `field`, for an unknown encoding, a side out of `sides`, a PNG or JPEG whose
    header tells another size than the message or another kind of pixels, one in more pieces than pictures have, and
    for data that is damaged or cut short.
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
    if _pieces(kind, data) > MOST_PIECES[kind]:
        raise ValueError(f"{field}.data: the {kind} has more {PIECES[kind]} than a picture needs; encode it plainly")
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as opened:
            # A second header would be believed by Pillow. Memory for the pixels is taken after this.
            if opened.mode != "RGB" or opened.size != (image.width, image.height):
                raise ValueError(f"a second header says {opened.mode}, {opened.size}")
            return np.asarray(opened)
    # Pillow raises each of these on damaged files; warnings, where they are made errors, on damaged metadata.
    except (OSError, SyntaxError, ValueError, Warning, Image.DecompressionBombError) as error:
        raise ValueError(f"{field}.data: the {kind} is damaged or cut short: {error}") from error


def is_compressed(image: wire.Image) -> bool:
    return image.encoding in _FORMATS


def _png_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an 8-bit RGB PNG, from its first chunk."""
    if len(data) < 26 or not data.startswith(_PNG_START):
        return None
    width, height, depth, colour = struct.unpack_from(">IIBB", data, len(_PNG_START))
    return (height, width) if (depth, colour) == (8, 2) else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a three-component 8-bit JPEG, from its first frame header."""
    if not data.startswith(b"\xff\xd8"):
        return None
    at, size = 2, None
    for _ in range(MOST_SEGMENTS):
        if at + 10 > len(data):
            return None
        fill, marker, length = struct.unpack_from(">BBH", data, at)
        if fill != 0xFF or length < 2:
            return None
        if marker == _SCAN:
            return size
        if marker in _JPEG_FRAMES and size is None:
            depth, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            if (depth, components) != (8, 3):
                return None
            size = height, width
        at += 2 + length
    return None


def _pieces(kind: str, data: bytes) -> int:
    """How many scans a JPEG has, or chunks a PNG; of these no more than one too many are counted."""
    if kind == "JPEG":
        # What is no marker has a zero after the 0xFF.
        return data.count(bytes((0xFF, _SCAN)))
    at, count = 8, 0
    while at + 12 <= len(data) and count <= MOST_PIECES[kind]:
        count += 1 if data[at + 4 : at + 8] == b"IDAT" else OTHER_CHUNK
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return count
