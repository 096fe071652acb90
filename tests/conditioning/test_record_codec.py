import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robodual.conditioning import codec
from robodual.conditioning.record import Conditioning, Version

INSTRUCTION = "öffne <b>die</b> Schublade"  # 27 bytes
ROBOT = "robot"


def conditioning(length: int = 3, width: int = 5) -> Conditioning:
    draw = np.random.default_rng(0)
    actions = draw.uniform(-1, 1, (8, 7)).astype(np.float32)
    states = torch.from_numpy(draw.normal(size=(length, width)).astype(np.float32)).bfloat16()
    return Conditioning(4, 9, actions, states, INSTRUCTION)


def test_a_record_comes_back_bit_for_bit() -> None:
    sent = conditioning(90, 4096)
    received = codec.decode(codec.encode(sent, ROBOT), ROBOT)
    assert received.version == Version(4, 9)
    assert received.instruction == INSTRUCTION
    assert np.array_equal(received.reference_actions, sent.reference_actions)
    assert torch.equal(received.hidden_states.view(torch.uint16), sent.hidden_states.view(torch.uint16))


def test_a_published_record_takes_two_bytes_a_value() -> None:
    assert len(codec.encode(conditioning(90, 4096), ROBOT)) == 32 + 224 + 2 * 90 * 4096 + 27


def test_hidden_states_that_are_a_view_are_stored_in_order() -> None:
    sent = conditioning(6, 4)
    turned = Conditioning(0, 0, sent.reference_actions, sent.hidden_states.T)
    assert torch.equal(codec.decode(codec.encode(turned, ROBOT), ROBOT).hidden_states, sent.hidden_states.T)


def patched(offset: int, layout: str, value: object) -> bytes:
    """A record with one field changed, and a checksum that is right again."""
    record = bytearray(codec.encode(conditioning(), ROBOT))
    struct.pack_into(layout, record, offset, value)
    struct.pack_into("<I", record, 28, zlib.crc32(record[32:], zlib.crc32(b"robot")))
    return bytes(record)


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (b"", "at least 32 bytes, got 0"),
        (patched(0, "<4s", b"\x80\x04\x95\x00"), "magic"),
        (patched(4, "<H", 1), "format version 2, got 1"),
        (patched(6, "<H", 4), "element type 3"),
        (patched(16, "<I", 0), r"hidden_states: expected \[1..4096"),
        (patched(16, "<I", 2**32 - 1), r"hidden_states: expected \[1..4096"),
        (patched(20, "<I", 16384), "bytes for hidden states"),
        (patched(24, "<I", 2049), "instruction: expected at most 2048 bytes"),
        (patched(24, "<I", 26), "and 26 bytes of instruction"),
        (patched(32, "<f", float("nan")), "reference_actions: expected finite"),
        (patched(256, "<H", 0x7F80), "hidden_states: expected finite"),
        (patched(286, "<H", 0xFFFF), "utf-8"),
        (codec.encode(conditioning(), ROBOT) + b"\0", "expected 313 bytes .* got 314"),
        (codec.encode(conditioning(), ROBOT)[:-1], "expected 313 bytes .* got 312"),
        (codec.encode(conditioning(), ROBOT)[:-1] + b"\0", "checksum"),
    ],
)
def test_what_it_does_not_know_is_refused(record: bytes, complaint: str) -> None:
    with pytest.raises(codec.RecordError, match=complaint):
        codec.decode(record, ROBOT)


def test_a_record_of_another_session_is_refused() -> None:
    record = codec.encode(conditioning(), "other")
    with pytest.raises(codec.RecordError, match="another session's"):
        codec.decode(record, ROBOT)
    assert codec.decode(record, "other").version == Version(4, 9)


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(record: bytes) -> None:
    with pytest.raises(codec.RecordError):
        codec.decode(record, ROBOT)


@given(st.integers(0, 312), st.integers(1, 255))
def test_one_changed_byte_is_refused_or_changes_the_version_alone(offset: int, flip: int) -> None:
    record = bytearray(codec.encode(conditioning(), ROBOT))
    record[offset] ^= flip
    try:
        received = codec.decode(bytes(record), ROBOT)
    except codec.RecordError:
        return
    assert 8 <= offset < 16
    assert torch.equal(received.hidden_states, conditioning().hidden_states)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"reference_actions": np.zeros((8, 7))}, "reference_actions: expected float32"),
        ({"reference_actions": np.zeros((7, 7), np.float32)}, "reference_actions: expected float32"),
        ({"reference_actions": np.full((8, 7), np.inf, np.float32)}, "reference_actions: expected finite"),
        ({"hidden_states": torch.zeros(3, 5)}, "hidden_states: expected bfloat16"),
        ({"hidden_states": torch.zeros(5).bfloat16()}, "hidden_states: expected bfloat16"),
        ({"hidden_states": torch.zeros(4097, 1).bfloat16()}, "hidden_states: expected"),
        ({"hidden_states": torch.full((3, 5), -torch.inf).bfloat16()}, "hidden_states: expected finite"),
        ({"episode": -1}, "episode: expected 0"),
        ({"step": 2**32}, "step: expected 0"),
        ({"instruction": "a" * 513}, "instruction: expected at most 512"),
    ],
)
def test_a_conditioning_that_no_record_may_hold_is_refused(change: dict[str, object], complaint: str) -> None:
    good = conditioning()
    fields: dict[str, object] = {name: getattr(good, name) for name in good.__dataclass_fields__}
    with pytest.raises(ValueError, match=complaint):
        Conditioning(**(fields | change))  # type: ignore[arg-type]
