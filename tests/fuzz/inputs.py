"""How many inputs there are, and how valid ones are spoiled."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

M = TypeVar("M", bound=Message)
TOTAL = int(os.environ.get("FUZZ_INPUTS", 6000))  # over all the tests of this folder

NUMBERS = st.sampled_from([0, 1, 2, 7, 8, 64, 255, 256, 1024, 1025, 4096, 65_536, 2**31 - 1, 2**31, 2**32 - 1])
BLOBS = st.one_of(
    st.binary(max_size=64),
    st.integers(0, 2000).map(bytes),
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


# What is done to valid bytes: where (as a share of 65,536), what, how many bytes of it, and with which.
DAMAGE = st.lists(
    st.tuples(
        st.integers(0, 65_535),
        st.sampled_from(["flip", "flip", "flip", "flip", "remove", "double", "cut", "insert", "replace"]),
        st.sampled_from([1, 2, 4, 16, 300]),
        BLOBS,
    ),
    min_size=1,
    max_size=3,
)
# What is done to a valid message: which field (of which field …), and what it becomes.
SPOILING = st.lists(
    st.tuples(
        st.lists(st.integers(0, 30), min_size=1, max_size=4),
        st.one_of(NUMBERS, BLOBS, st.text(max_size=80), st.just("x" * 5000), st.lists(NUMBERS, max_size=5)),
    ),
    min_size=1,
    max_size=3,
)


def damaged(valid: bytes, damage: list[Any]) -> bytes:
    """`valid` with bytes changed, cut out, doubled, cut off or put in; or nothing of it at all."""
    data = bytearray(valid)
    for where, what, length, blob in damage:
        at = where * len(data) >> 16
        if what == "flip" and data:
            data[at] ^= 1 << where % 8
        elif what == "remove":
            del data[at : at + length]
        elif what == "double":
            data[at:at] = data[at : at + length]
        elif what == "cut":
            del data[at:]
        elif what == "insert":
            data[at:at] = blob
        elif what == "replace":
            data = bytearray(blob)
    return bytes(data)


def spoiled(valid: M, spoiling: list[Any]) -> M:
    """A copy of `valid` in which one to three fields, however deep, have another value or none."""
    message = type(valid)()
    message.CopyFrom(valid)
    for path, value in spoiling:
        inner: Any = message
        field = _field(inner, path[0])
        for number in path[1:]:
            if field.message_type is None or not inner.HasField(field.name):
                break
            inner = getattr(inner, field.name)
            field = _field(inner, number)
        _spoil(inner, field, value)
    return message


def _field(message: Message, number: int) -> Any:
    fields = message.DESCRIPTOR.fields
    return fields[number % len(fields)]


def _spoil(message: Any, field: FieldDescriptor, value: Any) -> None:
    """Sets the field to what the value is in its type."""
    number = value if isinstance(value, int) else len(value)
    name = field.name
    if field.message_type is not None:
        message.ClearField(name)
        if number % 2:
            getattr(message, name).SetInParent()
    elif field.is_repeated:
        getattr(message, name)[:] = value if isinstance(value, list) else [number]
    elif field.type == FieldDescriptor.TYPE_STRING:
        setattr(message, name, value if isinstance(value, str) else str(value)[:600])
    elif field.type == FieldDescriptor.TYPE_BYTES:
        setattr(message, name, value if isinstance(value, bytes) else bytes(min(number, 1 << 16)))
    elif field.type == FieldDescriptor.TYPE_ENUM:
        setattr(message, name, number % 6 - 1)
    else:
        setattr(message, name, number)
