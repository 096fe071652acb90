from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from robodual_client import tensors, wire


@pytest.mark.parametrize("dtype", ["u1", "<f2", "<u2", "<f4", "<f8", "<i4", "<i8"])
@pytest.mark.parametrize("shape", [(), (7,), (8, 7), (0, 8, 7), (2, 3, 4, 5)])
def test_every_dtype_and_shape_comes_back_as_it_was(dtype, shape):
    array = (np.arange(np.prod(shape, dtype=int)) % 200).astype(dtype).reshape(shape)
    message = wire.Tensor.FromString(tensors.encode(array).SerializeToString())
    back = tensors.decode(message, field="x", dtype=dtype, shape=shape)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_strided_and_big_endian_arrays_travel_in_c_order_little_endian():
    array = np.arange(24, dtype=">f4").reshape(4, 6).T[::2]
    message = tensors.encode(array)
    assert message.data == array.astype("<f4").tobytes(order="C")
    np.testing.assert_array_equal(tensors.decode(message, field="x", dtype=np.float32, shape=(3, 4)), array)


def test_uint16_bits_travel_as_bfloat16():
    assert tensors.encode(np.zeros(3, np.uint16)).dtype == wire.DTYPE_BFLOAT16


def test_decoded_array_is_a_read_only_view_without_a_copy():
    array = tensors.decode(tensors.encode(np.ones(4, np.float32)), field="x", dtype=np.float32, shape=(4,))
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 2


def test_sizes_may_be_ranges_or_free():
    message = tensors.encode(np.zeros((3, 8, 7), np.float32))
    assert tensors.decode(message, field="chunks", dtype=np.float32, shape=(range(9), 8, None)).shape == (3, 8, 7)
    with pytest.raises(ValueError, match=r"chunks: shape must be \[0\.\.2, 8, any\], got \[3, 8, 7\]"):
        tensors.decode(message, field="chunks", dtype=np.float32, shape=(range(3), 8, None))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            wire.Tensor(dtype=wire.DTYPE_FLOAT64, shape=[7], data=bytes(56)),
            "dtype must be DTYPE_FLOAT32, got DTYPE_FLOAT64",
        ),
        (wire.Tensor(dtype=99, shape=[7], data=bytes(28)), "dtype must be DTYPE_FLOAT32, got unknown (99)"),
        (wire.Tensor(shape=[7], data=bytes(28)), "dtype must be DTYPE_FLOAT32, got DTYPE_UNSPECIFIED"),
        (wire.Tensor(dtype=wire.DTYPE_FLOAT32, shape=[1, 7], data=bytes(28)), "must have 1 dimensions, [7], got 2"),
        (wire.Tensor(dtype=wire.DTYPE_FLOAT32, shape=[8], data=bytes(32)), "shape must be [7], got [8]"),
        (wire.Tensor(dtype=wire.DTYPE_FLOAT32, shape=[7], data=bytes(27)), "needs 28 bytes of data, got 27"),
        (wire.Tensor(dtype=wire.DTYPE_FLOAT32, shape=[1] * 5000, data=bytes(4)), "must have 1 dimensions"),
        (wire.Tensor(), "dtype must be"),
    ],
)
def test_refusal_names_the_field_with_expected_and_got(message, expected):
    with pytest.raises(ValueError, match=r"^observation\.proprio: ") as raised:
        tensors.decode(message, field="observation.proprio", dtype=np.float32, shape=(7,))
    assert expected in str(raised.value)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("shape", [(2**28,), (2**31, 2**31, 4), (2**32 - 1, 2**32 - 1, 2**32 - 1)])
def test_header_that_promises_more_than_its_data_is_refused_without_allocating(shape):
    message = wire.Tensor(dtype=wire.DTYPE_FLOAT32, shape=shape, data=bytes(16))
    tracemalloc.start()
    with pytest.raises(ValueError, match="got 16"):
        tensors.decode(message, field="depth", dtype=np.float32, shape=[None] * len(shape))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_empty_tensor_of_an_impossible_shape_is_refused():
    message = wire.Tensor(dtype=wire.DTYPE_FLOAT32, shape=(0, 2**32 - 1, 2**32 - 1))
    with pytest.raises(ValueError, match="depth"):
        tensors.decode(message, field="depth", dtype=np.float32, shape=(None, None, None))


def test_unsupported_dtypes_are_refused():
    with pytest.raises(ValueError, match="complex64 cannot travel"):
        tensors.encode(np.zeros(3, np.complex64))
    with pytest.raises(ValueError, match="cannot travel"):
        tensors.encode(np.array([object()]))


def test_image_comes_back_as_it_was():
    array = np.random.default_rng(0).integers(0, 256, (200, 208, 3), np.uint8)
    image = wire.Image.FromString(tensors.encode_image(array).SerializeToString())
    np.testing.assert_array_equal(tensors.decode_image(image, field="rgb"), array)


@pytest.mark.parametrize(
    "array",
    [np.zeros((9, 9, 3)), np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((3, 9, 9), np.uint8)],
)
def test_array_that_is_no_image_is_refused(array):
    with pytest.raises(ValueError, match="uint8"):
        tensors.encode_image(array)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"encoding": wire.IMAGE_ENCODING_PNG}, "encoding must be IMAGE_ENCODING_RAW_RGB8"),
        ({"height": 7}, "each side must be 8 to 4096 pixels, got height 7"),
        ({"width": 2**32 - 1}, "each side must be 8 to 4096 pixels"),
        ({"height": 4096, "width": 4096}, "4096x4096 RGB needs 50331648 bytes of data, got 192"),
    ],
)
def test_malformed_raw_image_is_refused(changes, expected):
    fields = {"encoding": wire.IMAGE_ENCODING_RAW_RGB8, "height": 8, "width": 8, "data": bytes(192), **changes}
    with pytest.raises(ValueError, match=r"^rgb_static: ") as raised:
        tensors.decode_image(wire.Image(**fields), field="rgb_static")
    assert expected in str(raised.value)
