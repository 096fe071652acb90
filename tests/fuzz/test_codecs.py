"""What decodes bytes gives what it promises, or refuses by name; never anything else, and never at any size."""

from __future__ import annotations

import asyncio
import io
import resource
import struct
import tracemalloc
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from inputs import DAMAGE, NUMBERS, SPOILING, damaged, inputs, spoiled
from PIL import Image

from robodual.conditioning import codec
from robodual.conditioning.record import Conditioning
from robodual.serving import fields
from robodual.serving.errors import InvalidArgument
from robodual_client import tensors, wire

DTYPES = [np.dtype(name) for name in ("u1", "<f2", "<u2", "<f4", "<f8", "<i4", "<i8")]
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8)
SIDES = range(8, 1025)
GROWTH = 200 * 2**10  # KiB that this process may grow by, whatever it is given
KINDS = {"PNG": wire.IMAGE_ENCODING_PNG, "JPEG": wire.IMAGE_ENCODING_JPEG}
CHUNKS = [b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"iCCP", b"zTXt", b"iTXt", b"eXIf"]


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


sizes = st.one_of(st.none(), st.integers(0, 9), st.builds(range, st.integers(0, 3), st.integers(4, 9)))


@inputs(0.15)
@given(
    st.one_of(
        st.builds(
            wire.Tensor,
            dtype=st.integers(-1, 9),
            shape=st.lists(st.one_of(st.integers(0, 9), NUMBERS), max_size=4),
            data=st.one_of(st.binary(max_size=300), st.integers(0, 3000).map(bytes)),
        ),
        st.lists(st.integers(0, 4), max_size=3).map(lambda shape: tensors.encode(np.ones(shape, np.float32))),
    ),
    st.sampled_from(DTYPES),
    st.lists(sizes, max_size=4),
)
def test_a_tensor_is_what_it_says_or_is_refused(
    bounded_memory: None, tensor: wire.Tensor, dtype: np.dtype, shape: list
) -> None:
    tracemalloc.start()
    try:
        array = tensors.decode(tensor, field="here", dtype=dtype, shape=shape)
    except ValueError as error:
        _check(error, "here: ")
    else:
        assert (array.dtype, array.shape, array.nbytes) == (dtype, tuple(tensor.shape), len(tensor.data))
        assert not array.flags.writeable
        for size, allowed in zip(array.shape, shape, strict=True):
            assert allowed is None or size == allowed or (isinstance(allowed, range) and size in allowed)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 50_000


@inputs(0.05)
@given(arrays.arrays(st.sampled_from(DTYPES), arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
def test_every_array_comes_back_as_it_was(array: np.ndarray) -> None:
    message = wire.Tensor.FromString(tensors.encode(array).SerializeToString())
    back = tensors.decode(message, field="here", dtype=array.dtype, shape=array.shape)
    assert back.tobytes() == array.tobytes()


@inputs(0.05)
@given(DAMAGE)
def test_bytes_that_may_be_a_tensor_are_read_or_refused(bounded_memory: None, damage: list) -> None:
    valid = tensors.encode(np.arange(56, dtype=np.float32).reshape(8, 7)).SerializeToString()
    try:
        tensor = wire.Tensor.FromString(damaged(valid, damage))
        array = tensors.decode(tensor, field="here", dtype=np.float32, shape=(None, 7))
    except DecodeError:
        return
    except ValueError as error:
        _check(error, "here: ")
    else:
        assert array.shape[1] == 7


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind)
    return buffer.getvalue()


RAW = tensors.encode_image(PIXELS)
PICTURES = {kind: wire.Image(encoding=KINDS[kind], height=16, width=20, data=encoded(kind)) for kind in KINDS}


@st.composite
def rebuilt_png(draw: st.DrawFn) -> wire.Image:
    """A PNG with parts put in that are whole by their own checksum."""
    data = PICTURES["PNG"].data
    at = draw(st.sampled_from([33, len(data) - 12]))  # after its header, before its end
    parts = b""
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(CHUNKS))
        content = draw(
            st.one_of(
                st.binary(max_size=40),
                st.builds(struct.pack, st.just(">IIBBBBB"), NUMBERS, NUMBERS, *[st.integers(0, 8)] * 5),
                st.integers(0, 1 << 18).map(lambda size: b"k\0\0" + zlib.compress(bytes(size))),
            )
        )
        parts += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return wire.Image(encoding=wire.IMAGE_ENCODING_PNG, height=16, width=20, data=data[:at] + parts + data[at:])


def damaged_picture(kind: str, damage: list) -> wire.Image:
    image = wire.Image()
    image.CopyFrom(PICTURES[kind])
    image.data = damaged(image.data, damage)
    return image


pictures = st.one_of(
    st.builds(damaged_picture, st.sampled_from(list(KINDS)), DAMAGE),
    rebuilt_png(),
    st.builds(spoiled, st.sampled_from([RAW, *PICTURES.values()]), SPOILING),
)


@inputs(0.15)
@given(pictures)
def test_a_picture_is_what_it_says_or_is_refused(
    bounded_memory: None, loop: asyncio.AbstractEventLoop, image: wire.Image
) -> None:
    request = wire.ConditionRequest(rgb_static=image)
    try:
        array = loop.run_until_complete(fields.image(request, "rgb_static", field="here", sides=SIDES))
    except InvalidArgument as error:
        _check(error, "here")
    else:
        assert (array.dtype, array.shape) == (np.uint8, (image.height, image.width, 3))


@inputs(0.05)
@given(st.text(max_size=70), NUMBERS, NUMBERS)
def test_a_session_is_named_as_it_should_be_or_refused(name: str, episode: int, step: int) -> None:
    try:
        fields.session_id(wire.ActRequest(session_id=name, episode=episode, step=step))
    except InvalidArgument:
        return
    assert 1 <= len(name) <= 64
    assert name.isascii()
    assert not set(name) & set(" /:*?[]\r\n\0")
    assert max(episode, step) < 2**31


RECORD = codec.encode(
    Conditioning(
        3, 7, np.linspace(-1, 1, 56, dtype=np.float32).reshape(8, 7), torch.arange(24.0).view(3, 8).bfloat16()
    ),
    "robot",
)


def sealed(record: bytes) -> bytes:
    """The record with its checksum, the last of its header, made right."""
    size = codec._HEADER.size
    if len(record) < size:
        return record
    checksum = zlib.crc32(record[size:], zlib.crc32(b"robot"))
    return record[: size - 4] + struct.pack("<I", checksum) + record[size:]


@inputs(0.15)
@given(DAMAGE, st.booleans())
def test_a_record_is_a_conditioning_or_is_refused(bounded_memory: None, damage: list, seal: bool) -> None:
    record = damaged(RECORD, damage)
    if seal:
        record = sealed(record)
    try:
        conditioning = codec.decode(record, "robot")
    except codec.RecordError as error:
        _check(error, "conditioning record: ")
    else:
        assert np.isfinite(conditioning.reference_actions).all()
        assert torch.isfinite(conditioning.hidden_states).all()
        assert conditioning.hidden_states.numel() * 2 < len(record)


def _check(error: Exception, start: str) -> None:
    """A refusal names what it refuses, in a line."""
    assert str(error).startswith(start)
    assert len(str(error)) < 300
