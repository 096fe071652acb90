"""The binary record that a conditioning travels in: a fixed layout, with nothing in it to interpret.

    offset  size  field (little-endian)
    0       4     magic "RDCR"
    4       2     format version, 2
    6       2     element type of the hidden states: 3, bfloat16 (numbered as in `robodual.v1.DType`)
    8       20    episode, step, L, width, T: uint32 each
    28      4     CRC-32 of the session's name and everything after this header
    32      224   reference actions: float32 [8, 7]
    256     2Lw   hidden states: bfloat16 [L, width]
            T     instruction: UTF-8

About 0.7 MB for the published model (L about 90, width 4096).
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import torch

from robodual.conditioning.record import CHUNK, MAX_INSTRUCTION, Conditioning, check_size

MAGIC = b"RDCR"
FORMAT = 2
BFLOAT16 = 3
_HEADER = struct.Struct("<4sHHIIIIII")
_ACTION_BYTES = 4 * CHUNK[0] * CHUNK[1]
_MAX_TEXT = 4 * MAX_INSTRUCTION


class RecordError(ValueError):
    """A conditioning record that was damaged, is no record at all, or is another session's."""


class UnknownFormat(RecordError):
    """A conditioning record of a format that this version of the software does not know."""


def encode(conditioning: Conditioning, session: str) -> bytes:
    """The record of `conditioning`, for `session` alone."""
    length, width = conditioning.hidden_states.shape
    actions = conditioning.reference_actions.astype("<f4", copy=False).tobytes()
    states = conditioning.hidden_states.contiguous().view(torch.uint16).numpy().astype("<u2", copy=False).data
    text = conditioning.instruction.encode()
    checksum = zlib.crc32(text, zlib.crc32(states, zlib.crc32(actions, zlib.crc32(session.encode()))))
    header = _HEADER.pack(MAGIC, FORMAT, BFLOAT16, *conditioning.version, length, width, len(text), checksum)
    return b"".join((header, actions, states, text))


def decode(record: bytes, session: str) -> Conditioning:
    """The conditioning in `record`, which was made for `session`. Every size is checked before memory is taken for it.

    Raises `UnknownFormat` for another format version or element type; `RecordError` for another magic, for sizes over
    the limits or other than the record's own, for a wrong checksum, for values that are not finite and for a text that
    is not UTF-8.
    """
    if len(record) < _HEADER.size:
        raise RecordError(f"conditioning record: expected at least {_HEADER.size} bytes, got {len(record)}")
    magic, version, dtype, episode, step, length, width, text_bytes, checksum = _HEADER.unpack_from(record)
    if magic != MAGIC:
        raise RecordError(f"conditioning record: expected magic {MAGIC!r}, got {magic!r}")
    if version != FORMAT:
        raise UnknownFormat(
            f"conditioning record: expected format version {FORMAT}, got {version}; "
            "run the same release of both services"
        )
    if dtype != BFLOAT16:
        raise UnknownFormat(f"conditioning record: expected element type {BFLOAT16} (bfloat16), got {dtype}")
    try:
        check_size(length, width)
    except ValueError as error:
        raise RecordError(f"conditioning record: {error}") from error
    if text_bytes > _MAX_TEXT:
        raise RecordError(f"conditioning record: instruction: expected at most {_MAX_TEXT} bytes, got {text_bytes}")
    text_at = _HEADER.size + _ACTION_BYTES + 2 * length * width
    expected = text_at + text_bytes
    if len(record) != expected:
        raise RecordError(
            f"conditioning record: expected {expected} bytes for hidden states [{length}, {width}] "
            f"and {text_bytes} bytes of instruction, got {len(record)}"
        )
    if zlib.crc32(memoryview(record)[_HEADER.size :], zlib.crc32(session.encode())) != checksum:
        raise RecordError(
            f"conditioning record: the checksum is not that of a record of session {session}; "
            "the record was damaged, or is another session's"
        )
    actions = np.frombuffer(record, "<f4", CHUNK[0] * CHUNK[1], _HEADER.size).astype(np.float32).reshape(CHUNK)
    states = torch.empty((length, width), dtype=torch.bfloat16)
    bits = np.frombuffer(record, "<u2", length * width, _HEADER.size + _ACTION_BYTES)
    states.view(torch.uint16).numpy()[...] = bits.reshape(length, width)
    try:
        return Conditioning(episode, step, actions, states, record[text_at:].decode())
    except ValueError as error:
        raise RecordError(f"conditioning record: {error}") from error
