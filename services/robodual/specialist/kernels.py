"""Triton kernels: the denoiser's block in six; `ends.py` has the ends of a denoising step in one.

Only what runs them imports this module, and only where Triton is installed (`fusing.can_launch`).

All tensors are float32 and contiguous. B requests, G passes, D the width, C a head's channels, P parts of a modulation
table. A program works on one request: its G * 8 rows (`ROWS`), padded to the 16 that a product takes. GROUPS of a
product's channels are multiplied side by side, one by each warp, and then summed. No kernel writes what another program
of the same launch reads. Sizes that a model fixes are constants; PAD are sizes rounded up to powers of two.

Where launches are CHAINED, a kernel starts while the one before still runs, and reads meanwhile what was there before
both: weights, modulations, the context. All that the loop itself writes is read after `wait`, and written after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from robodual.chained import wait
from robodual.specialist.tiles import (
    CHUNK,
    HIDDEN,
    TILE,
    channels_of_head,
    gelu_tanh,
    grouped,
    normed,
    read,
    read_weight,
    rows_of_request,
    summed_dot,
)


@triton.jit
def _rotated(x, cos, sin, C_PAD: tl.constexpr):
    """Channels [16, C] with their pairs (0, 1), (2, 3), ... turned by the angles of cos and sin [16, C / 2]."""
    even, odd = tl.split(tl.reshape(x, (TILE, C_PAD // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (TILE, C_PAD))


@triton.jit
def self_attention(
    x_ptr,  # [B * G * 8, D]
    parts_ptr,  # [B * G, P, D], of which shift and scale are the first two
    weight_ptr,  # [3 * D, D], of queries, keys and values
    bias_ptr,  # [3 * D]
    cos_ptr,  # [8, C / 2], 1 for the pairs that do not turn
    sin_ptr,  # [8, C / 2], 0 for them
    out_ptr,  # [B * G * 8, D]
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    P: tl.constexpr,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Norm, modulation, projections, rotation and attention within each pass: one head of one request, [B, heads]."""
    rows, passes, real = rows_of_request(ROWS)
    n, here = channels_of_head(D, C, C_PAD)
    k = grouped(0, D_PAD, GROUPS)
    q_weight = read_weight(weight_ptr, n, k, D, D)
    key_weight = read_weight(weight_ptr + D * D, n, k, D, D)
    value_weight = read_weight(weight_ptr + 2 * D * D, n, k, D, D)
    q_bias = tl.load(bias_ptr + n, mask=here, other=0.0)[None, :]
    key_bias = tl.load(bias_ptr + D + n, mask=here, other=0.0)[None, :]
    value_bias = tl.load(bias_ptr + 2 * D + n, mask=here, other=0.0)[None, :]
    row = tl.arange(0, TILE)
    pair = tl.arange(0, C_PAD // 2)[None, :]
    at = (row % CHUNK)[:, None] * (C // 2) + pair
    cos = tl.load(cos_ptr + at, mask=pair < C // 2, other=0.0)
    sin = tl.load(sin_ptr + at, mask=pair < C // 2, other=0.0)
    shift = read(parts_ptr, passes, real, k, P * D, D)
    scale = read(parts_ptr + D, passes, real, k, P * D, D)

    wait(CHAINED)
    h, _, _ = normed(read(x_ptr, rows, real, k, D, D), real, k, 1e-6, D)
    h = h * scale + shift
    q = summed_dot(h, q_weight, PRECISION) + q_bias
    key = summed_dot(h, key_weight, PRECISION) + key_bias
    value = summed_dot(h, value_weight, PRECISION) + value_bias
    q = _rotated(q * SCALE, cos, sin, C_PAD)
    key = _rotated(key, cos, sin, C_PAD)
    scores = tl.dot(q, tl.trans(key), input_precision=PRECISION)
    together = (row // CHUNK)[:, None] == (row // CHUNK)[None, :]
    scores = tl.where(together, scores, HIDDEN)
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    weights = weights / tl.sum(weights, axis=1)[:, None]
    mixed = tl.dot(weights, value, input_precision=PRECISION)
    tl.store(out_ptr + rows[:, None] * D + n[None, :], mixed, mask=real[:, None] & here[None, :])


@triton.jit
def _context(context_ptr, mask_ptr, length, s, n, here, D: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr):
    """Of places s [GROUPS, n] of the context: keys [GROUPS, C, n], values [GROUPS, n, C], and which are seen."""
    present = s < length
    at = (tl.program_id(0) * length + s) * STRIDE
    inside = present[:, None, :] & here[None, :, None]
    keys = tl.load(context_ptr + at[:, None, :] + n[None, :, None], mask=inside, other=0.0)
    inside = present[:, :, None] & here[None, None, :]
    values = tl.load(context_ptr + D + at[:, :, None] + n[None, None, :], mask=inside, other=0.0)
    seen = present
    if MASKED:
        seen = tl.load(mask_ptr + tl.program_id(0) * length + s, mask=present, other=0) != 0
    return keys, values, seen


@triton.jit
def _look(q, keys, values, seen, most, total, mixed, PRECISION: tl.constexpr):
    """Adds what queries [GROUPS, 16, C] see to what they saw: the most and the sum of the weights, and the mixture."""
    scores = tl.where(seen[:, None, :], tl.dot(q, keys, input_precision=PRECISION), HIDDEN)
    highest = tl.maximum(most, tl.max(scores, axis=2))
    weights = tl.exp(scores - highest[:, :, None])
    fade = tl.exp(most - highest)
    mixed = tl.dot(weights, values, mixed * fade[:, :, None], input_precision=PRECISION)
    return highest, total * fade + tl.sum(weights, axis=2), mixed


@triton.jit(do_not_specialize=["length"])
def cross_attention(
    x_ptr,  # [B * G * 8, D]
    norm_weight_ptr,  # [D]
    norm_bias_ptr,  # [D]
    weight_ptr,  # [D, D], of queries
    bias_ptr,  # [D]
    context_ptr,  # [B, S, STRIDE], of which this block's keys and values are the first 2 * D
    mask_ptr,  # uint8 [B, S], 0 where the context is padding
    out_ptr,  # [B * G * 8, D]
    length,  # S
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,  # at a time
    END: tl.constexpr,  # S, rounded up to KEYS
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Norm, queries, and attention of a request's passes to its context: one head of one request, [B, heads]."""
    rows, _, real = rows_of_request(ROWS)
    n, here = channels_of_head(D, C, C_PAD)
    k = grouped(0, D_PAD, GROUPS)
    weight = read_weight(weight_ptr, n, k, D, D)
    bias = tl.load(bias_ptr + n, mask=here, other=0.0)[None, :]
    scale = tl.load(norm_weight_ptr + k, mask=k < D, other=0.0)[:, None, :]
    shift = tl.load(norm_bias_ptr + k, mask=k < D, other=0.0)[:, None, :]
    s = grouped(0, KEYS, GROUPS)
    keys, values, seen = _context(context_ptr, mask_ptr, length, s, n, here, D, STRIDE, MASKED)

    wait(CHAINED)
    h, _, _ = normed(read(x_ptr, rows, real, k, D, D), real, k, 1e-5, D)
    q = (summed_dot(h * scale + shift, weight, PRECISION) + bias) * SCALE
    q = tl.broadcast_to(q[None, :, :], (GROUPS, TILE, C_PAD))
    most = tl.full((GROUPS, TILE), HIDDEN, tl.float32)
    total = tl.zeros((GROUPS, TILE), tl.float32)
    mixed = tl.zeros((GROUPS, TILE, C_PAD), tl.float32)
    most, total, mixed = _look(q, keys, values, seen, most, total, mixed, PRECISION)
    for start in range(KEYS, END, KEYS):
        keys, values, seen = _context(context_ptr, mask_ptr, length, start + s, n, here, D, STRIDE, MASKED)
        most, total, mixed = _look(q, keys, values, seen, most, total, mixed, PRECISION)
    fade = tl.exp(most - tl.max(most, axis=0)[None, :])
    mixed = tl.sum(mixed * fade[:, :, None], axis=0) / tl.sum(total * fade, axis=0)[:, None]
    tl.store(out_ptr + rows[:, None] * D + n[None, :], mixed, mask=real[:, None] & here[None, :])


@triton.jit
def gated_product(
    x_ptr,  # [B * G * 8, K]
    weight_ptr,  # [D, K]
    bias_ptr,  # [D]
    gate_ptr,  # [B * G, P, D], of which the gate is the first
    residual_ptr,  # [B * G * 8, D]
    out_ptr,  # [B * G * 8, D]
    ROWS: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    SLAB: tl.constexpr,  # channels of K at a time, the first of them before the wait
    P: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """residual + gate * (x weight + bias): WIDE columns of one request, [B, D / WIDE]."""
    rows, passes, real = rows_of_request(ROWS)
    n = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = real[:, None] & (n < D)[None, :]
    k = grouped(0, SLAB, GROUPS)
    weight = read_weight(weight_ptr, n, k, D, K)
    bias = tl.load(bias_ptr + n, mask=n < D, other=0.0)[None, :]
    gate = tl.load(gate_ptr + passes[:, None] * (P * D) + n[None, :], mask=inside, other=0.0)
    at = rows[:, None] * D + n[None, :]

    wait(CHAINED)
    residual = tl.load(residual_ptr + at, mask=inside, other=0.0)
    out = tl.dot(read(x_ptr, rows, real, k, K, K), weight, input_precision=PRECISION)
    for start in range(SLAB, K, SLAB):
        x = read(x_ptr, rows, real, start + k, K, K)
        out = tl.dot(x, read_weight(weight_ptr, n, start + k, D, K), out, input_precision=PRECISION)
    tl.store(out_ptr + at, residual + gate * (tl.sum(out, axis=0) + bias), mask=inside)


@triton.jit
def normed_product(
    x_ptr,  # [B * G * 8, D]
    weight_ptr,  # [D, D]
    residual_ptr,  # [B * G * 8, D], before its norm
    norm_weight_ptr,  # [D]
    norm_bias_ptr,  # [D]
    out_ptr,  # [B * G * 8, D]
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """norm(residual) + x weight: WIDE columns of one request, [B, D / WIDE]."""
    rows, _, real = rows_of_request(ROWS)
    n = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    k = grouped(0, D_PAD, GROUPS)
    weight = read_weight(weight_ptr, n, k, D, D)
    scale = tl.load(norm_weight_ptr + n, mask=n < D, other=0.0)[None, :]
    shift = tl.load(norm_bias_ptr + n, mask=n < D, other=0.0)[None, :]
    at = rows[:, None] * D + n[None, :]
    inside = real[:, None] & (n < D)[None, :]

    wait(CHAINED)
    x = read(x_ptr, rows, real, k, D, D)
    residual = tl.load(residual_ptr + at, mask=inside, other=0.0)
    _, mean, inverse = normed(read(residual_ptr, rows, real, k, D, D), real, k, 1e-5, D)
    out = summed_dot(x, weight, PRECISION) + (residual - mean[:, None]) * inverse[:, None] * scale + shift
    tl.store(out_ptr + at, out, mask=inside)


@triton.jit
def expand(
    x_ptr,  # [B * G * 8, D]
    parts_ptr,  # [B * G, P, D], of which shift and scale are the first two
    weight_ptr,  # [N, D]
    bias_ptr,  # [N]
    out_ptr,  # [B * G * 8, N]
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Norm, modulation, the MLP's first product and its GELU (tanh): WIDE columns of one request, [B, N / WIDE]."""
    rows, passes, real = rows_of_request(ROWS)
    n = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    k = grouped(0, D_PAD, GROUPS)
    weight = read_weight(weight_ptr, n, k, N, D)
    bias = tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
    shift = read(parts_ptr, passes, real, k, P * D, D)
    scale = read(parts_ptr + D, passes, real, k, P * D, D)

    wait(CHAINED)
    h, _, _ = normed(read(x_ptr, rows, real, k, D, D), real, k, 1e-6, D)
    out = gelu_tanh(summed_dot(h * scale + shift, weight, PRECISION) + bias)
    tl.store(out_ptr + rows[:, None] * N + n[None, :], out, mask=real[:, None] & (n < N)[None, :])
