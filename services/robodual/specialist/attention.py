"""The encoders' attention as a Triton kernel, in float32 from where the product before left it: it imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from robodual.device import current, padded

QUERIES = 32  # of a program
KEYS = 64  # at a time
WARPS, STAGES = 4, 2


@triton.jit
def attention_kernel(
    qkv_ptr,  # [B * N, 3 * H * C]
    out_ptr,  # [B * N, H * C]
    N,
    H: tl.constexpr,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    SCALE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    END: tl.constexpr,  # N, rounded up to KEYS
    PRECISION: tl.constexpr,
):
    """Attention among a sequence's N tokens: QUERIES of them in one head, [N / QUERIES, H, B]."""
    own = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    first = tl.program_id(2) * N
    channel = tl.arange(0, C_PAD)
    column = tl.program_id(1) * C + channel
    queries = (own < N)[:, None] & (channel < C)[None, :]
    q = tl.load(qkv_ptr + (first + own)[:, None] * (3 * H * C) + column[None, :], mask=queries, other=0.0) * SCALE
    most = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, C_PAD), tl.float32)
    for start in range(0, END, KEYS):
        s = start + tl.arange(0, KEYS)
        at = qkv_ptr + (first + s) * (3 * H * C)
        here, there = s < N, channel < C
        keys = tl.load(at[None, :] + (H * C + column)[:, None], mask=here[None, :] & there[:, None], other=0.0)
        values = tl.load(at[:, None] + (2 * H * C + column)[None, :], mask=here[:, None] & there[None, :], other=0.0)
        scores = tl.where(here[None, :], tl.dot(q, keys, input_precision=PRECISION), float("-inf"))
        highest = tl.maximum(most, tl.max(scores, axis=1))  # finite from the first keys on, which are never hidden
        weights = tl.exp(scores - highest[:, None])
        fade = tl.exp(most - highest)
        total = total * fade + tl.sum(weights, axis=1)
        mixed = tl.dot(weights, values, mixed * fade[:, None], input_precision=PRECISION)
        most = highest
    tl.store(out_ptr + (first + own)[:, None] * (H * C) + column[None, :], mixed / total[:, None], mask=queries)


def attend(qkv: Tensor, batch: int, heads: int, precision: str = "tf32x3") -> Tensor:
    """Self-attention, float32.

    Args:
        qkv: queries, keys and values of all tokens of all sequences, contiguous [B * N, 3 * heads * C]
        batch: B, the sequences
        heads: of C channels
        precision: of the products, "tf32x3" or "ieee"

    Returns:
        [B * N, heads * C].
    """
    rows, width = qkv.shape
    count, channels = rows // batch, width // (3 * heads)
    out = qkv.new_empty(rows, heads * channels)
    with current(qkv.device):
        attention_kernel[triton.cdiv(count, QUERIES), heads, batch](
            qkv,
            out,
            count,
            H=heads,
            C=channels,
            C_PAD=padded(channels),
            SCALE=channels**-0.5,
            QUERIES=QUERIES,
            KEYS=KEYS,
            END=triton.cdiv(count, KEYS) * KEYS,
            PRECISION=precision,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return out
