"""How many inputs there are, and how valid ones are spoiled."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TOTAL = int(os.environ.get("FUZZ_INPUTS", 6000))  # over all the tests of this folder

NUMBERS = st.sampled_from([0, 1, 2, 7, 8, 64, 255, 256, 1024, 1025, 4096, 65_536, 2**31 - 1, 2**31, 2**32 - 1])
BLOBS = st.one_of(
    st.binary(max_size=64),
    st.integers(0, 1 << 16).map(bytes),
    st.sampled_from([b"\xff" * 300, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"]),
)


def inputs(share: float) -> Callable[[Any], Any]:
    """Hypothesis' settings for a test that gets this share of all inputs. The same ones in CI, new ones by hand."""
    return settings(
        max_examples=max(1, round(share * TOTAL)),
        deadline=None,
        derandomize="FUZZ_INPUTS" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """`valid` with bytes changed, cut out, doubled, cut off or put in; or nothing of it at all."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 16, 300]))
        match draw(st.sampled_from(["flip", "flip", "flip", "remove", "double", "cut", "insert", "replace"])):
            case "flip" if data:
                data[at] ^= draw(st.integers(1, 255))
            case "remove":
                del data[at : at + length]
            case "double":
                data[at:at] = data[at : at + length]
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
            case "replace":
                data = bytearray(draw(BLOBS))
    return bytes(data)


@st.composite
def spoiled(draw: st.DrawFn, valid: Message) -> Message:
    """A copy of `valid` in which one to three fields, however deep, have another value or none."""
    message = type(valid)()
    message.CopyFrom(valid)
    for _ in range(draw(st.integers(1, 3))):
        inner: Message = message
        while True:
            fields = inner.DESCRIPTOR.fields
            field = fields[draw(st.integers(0, len(fields) - 1))]
            if field.message_type is None or not inner.HasField(field.name) or draw(st.integers(0, 5)) == 0:
                break
            inner = getattr(inner, field.name)
        _spoil(draw, inner, field)
    return message


def _spoil(draw: st.DrawFn, message: Message, field: FieldDescriptor) -> None:
    name = field.name
    if field.message_type is not None:
        if draw(st.booleans()):
            message.ClearField(name)
        else:
            getattr(message, name).SetInParent()
    elif field.is_repeated:
        getattr(message, name)[:] = draw(st.lists(NUMBERS, max_size=5))
    elif field.type == FieldDescriptor.TYPE_STRING:
        setattr(message, name, draw(st.one_of(st.text(max_size=80), st.just("x" * 5000))))
    elif field.type == FieldDescriptor.TYPE_BYTES:
        setattr(message, name, draw(st.one_of(BLOBS, damaged(getattr(message, name)))))
    elif field.type == FieldDescriptor.TYPE_ENUM:
        setattr(message, name, draw(st.sampled_from([0, 1, 2, 3, 4, 99, -1])))
    else:
        setattr(message, name, draw(NUMBERS))
