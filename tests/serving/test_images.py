import contextlib
import io
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from robodual.serving.images import decode_image
from robodual_client import tensors, wire

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
KINDS = {"PNG": wire.IMAGE_ENCODING_PNG, "JPEG": wire.IMAGE_ENCODING_JPEG}


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> wire.Image:
    buffer = io.BytesIO()
    image = Image.fromarray(PIXELS) if image is None else image
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return wire.Image(encoding=KINDS[kind], height=image.height, width=image.width, data=buffer.getvalue())


def test_png_is_exact_and_raw_is_a_view() -> None:
    raw = decode_image(tensors.encode_image(PIXELS), field="image")
    assert np.array_equal(raw, PIXELS)
    assert raw.base is not None
    assert np.array_equal(decode_image(encoded("PNG"), field="image"), PIXELS)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"exif": b"Exif\0\0" + bytes(60)}])
def test_jpeg_is_close(options: dict[str, object]) -> None:
    smooth = Image.fromarray(np.dstack([np.tile(np.arange(32, dtype=np.uint8) * 8, (16, 1))] * 3))
    decoded = decode_image(encoded("JPEG", smooth, quality=95, **options), field="image")
    assert np.abs(decoded.astype(int) - np.asarray(smooth)).max() < 8


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16"])
def test_a_png_of_other_pixels_is_refused(mode: str) -> None:
    image = Image.new(mode, (30, 20))
    with pytest.raises(ValueError, match=r"image\.data: expected an 8-bit RGB PNG"):
        decode_image(encoded("PNG", image), field="image")


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_jpeg_of_other_pixels_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=r"image\.data: expected an 8-bit RGB JPEG"):
        decode_image(encoded("JPEG", Image.new(mode, (30, 20))), field="image")


@pytest.mark.parametrize("kind", KINDS)
def test_a_header_of_another_size_is_refused_before_decoding(kind: str) -> None:
    large = encoded(kind, Image.new("RGB", (4000, 4000)))
    large.height = large.width = 100
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"image: its {kind} header says \(4000, 4000\)"):
        decode_image(large, field="image")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(side: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))


def with_another_header(kind: str, side: int) -> wire.Image:
    """A picture that has a second header, of another size, behind the one that fits the message."""
    image = encoded(kind)
    if kind == "PNG":
        first, second = png_header(0), png_header(side)
        at = len(b"\x89PNG\r\n\x1a\n") + len(first)
    else:
        start = image.data.index(b"\xff\xc0")
        at = start + 2 + int.from_bytes(image.data[start + 2 : start + 4], "big")
        second = image.data[start : start + 5] + struct.pack(">HH", side, side) + image.data[start + 9 : at]
    image.data = image.data[:at] + second + image.data[at:]
    return image


def many_scans() -> wire.Image:
    image = encoded("JPEG", Image.new("RGB", (1000, 1000)), progressive=True)
    last = image.data[image.data.rindex(b"\xff\xda") : -2]
    image.data = image.data[:-2] + last * 10_000 + image.data[-2:]
    return image


def many_chunks(kind: bytes) -> wire.Image:
    image = encoded("PNG")
    at = 8 + len(png_header(0))
    image.data = image.data[:at] + chunk(kind) * 300_000 + image.data[at:]
    return image


def many_comments() -> wire.Image:
    image = encoded("JPEG")
    image.data = image.data[:2] + b"\xff\xfe\x00\x02" * 300_000 + image.data[2:]
    return image


BOMBS = {
    "second PNG header": lambda: with_another_header("PNG", 9000),
    "second PNG header, beyond Pillow's limit": lambda: with_another_header("PNG", 60_000),
    "second JPEG header": lambda: with_another_header("JPEG", 9000),
    "second JPEG header, beyond Pillow's limit": lambda: with_another_header("JPEG", 60_000),
    "scans": many_scans,
    "chunks": lambda: many_chunks(b"teSt"),
    "data chunks": lambda: many_chunks(b"IDAT"),
    "comments": many_comments,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_costs_time_or_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: Image.Image) -> None:
        raise AssertionError("memory was taken for its pixels")

    bomb = BOMBS[name]()
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    started = time.process_time()
    with pytest.raises(ValueError, match=r"image\.data: "):
        decode_image(bomb, field="image")
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_with_what_cameras_write_into_them_are_decoded(kind: str) -> None:
    metadata = PngImagePlugin.PngInfo()
    for number in range(20):
        metadata.add_text(f"key {number}", "text " * 100)
    options = {"pnginfo": metadata} if kind == "PNG" else {"progressive": True, "exif": b"Exif\0\0" + bytes(60_000)}
    large = Image.fromarray(np.random.default_rng(1).integers(0, 256, (1000, 1000, 3), np.uint8))
    picture = encoded(kind, large, icc_profile=bytes(200_000), **options)
    assert decode_image(picture, field="image").shape == (1000, 1000, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 0.95])
def test_a_picture_cut_short_is_refused(kind: str, share: float) -> None:
    picture = encoded(kind)
    picture.data = picture.data[: int(len(picture.data) * share)]
    with pytest.raises(ValueError, match=r"image\.data"):
        decode_image(picture, field="image")


def test_sides_out_of_bounds_are_refused() -> None:
    for height, width in ((7, 100), (100, 7), (1025, 100), (2**32 - 1, 2**32 - 1)):
        picture = wire.Image(encoding=wire.IMAGE_ENCODING_RAW_RGB8, height=height, width=width)
        with pytest.raises(ValueError, match="image: expected sides of 8 to 1024"):
            decode_image(picture, field="image", sides=range(8, 1025))


@given(st.sampled_from(list(KINDS)), st.data())
def test_a_damaged_picture_is_refused_or_decoded_but_never_anything_else(kind: str, data: st.DataObject) -> None:
    picture = encoded(kind)
    content = bytearray(picture.data)
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    picture.data = bytes(content)
    with contextlib.suppress(ValueError):
        assert decode_image(picture, field="image").shape == PIXELS.shape
