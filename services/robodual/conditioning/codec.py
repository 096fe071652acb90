"""The binary record that a conditioning travels in: a fixed layout, with nothing in it to interpret.

    offset  size  field (little-endian)
    0       4     magic "RDCR"
    4       2     format version, 1
    6       2     element type of the hidden states: 3, bfloat16 (numbered as in `robodual.v1.DType`)
    8       16    episode, step, L, width: uint32 each
    24      4     CRC-32 of everything after this header
    28      224   reference actions: float32 [8, 7]
    252     2Lw   hidden states: bfloat16 [L, width]

About 0.7 MB for the published model (L about 90, width 4096).
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import torch

from robodual.conditioning.record import CHUNK, Conditioning, check_size

MAGIC = b"RDCR"
FORMAT = 1
BFLOAT16 = 3
_HEADER = struct.Struct("<4sHHIIIII")
_ACTION_BYTES = 4 * CHUNK[0] * CHUNK[1]


class RecordError(ValueError):
    """A conditioning record that this version of the software does not know or that was damaged."""


def encode(conditioning: Conditioning) -> bytes:
    """The record of `conditioning`."""
    length, width = conditioning.hidden_states.shape
    actions = conditioning.reference_actions.astype("<f4", copy=False).tobytes()
    states = conditioning.hidden_states.contiguous().view(torch.uint16).numpy().astype("<u2", copy=False).data
    checksum = zlib.crc32(states, zlib.crc32(actions))
    header = _HEADER.pack(MAGIC, FORMAT, BFLOAT16, *conditioning.version, length, width, checksum)
    return b"".join((header, actions, states))


def decode(record: bytes) -> Conditioning:
    """The conditioning in `record`. Every size is checked before memory is taken for it.

    Raises `RecordError` for another magic, format version or element type, for sizes over the limits or other than
    the record's own, for a wrong checksum, and for values that are not finite.
    """
    if len(record) < _HEADER.size:
        raise RecordError(f"conditioning record: expected at least {_HEADER.size} bytes, got {len(record)}")
    magic, version, dtype, episode, step, length, width, checksum = _HEADER.unpack_from(record)
    if magic != MAGIC:
        raise RecordError(f"conditioning record: expected magic {MAGIC!r}, got {magic!r}")
    if version != FORMAT:
        raise RecordError(
            f"conditioning record: expected format version {FORMAT}, got {version}; "
            "run the same release of both services"
        )
    if dtype != BFLOAT16:
        raise RecordError(f"conditioning record: expected element type {BFLOAT16} (bfloat16), got {dtype}")
    try:
        check_size(length, width)
    except ValueError as error:
        raise RecordError(f"conditioning record: {error}") from error
    expected = _HEADER.size + _ACTION_BYTES + 2 * length * width
    if len(record) != expected:
        raise RecordError(
            f"conditioning record: expected {expected} bytes for hidden states [{length}, {width}], got {len(record)}"
        )
    if zlib.crc32(memoryview(record)[_HEADER.size :]) != checksum:
        raise RecordError("conditioning record: the checksum does not match; the record was damaged")
    actions = np.frombuffer(record, "<f4", CHUNK[0] * CHUNK[1], _HEADER.size).astype(np.float32).reshape(CHUNK)
    states = torch.empty((length, width), dtype=torch.bfloat16)
    bits = np.frombuffer(record, "<u2", length * width, _HEADER.size + _ACTION_BYTES)
    states.view(torch.uint16).numpy()[...] = bits.reshape(length, width)
    try:
        return Conditioning(episode, step, actions, states)
    except ValueError as error:
        raise RecordError(f"conditioning record: {error}") from error
