"""Triton kernels: the denoiser's block in six, the ends of a denoising step in one, and the encoders' products.

Only what runs them imports this module, and only where Triton is installed (`fusing.can_launch`).

All tensors are float32 and contiguous. B requests, G passes, D the width, C a head's channels, P parts of a modulation
table. A program of the denoiser works on one request: its G * 8 rows (`ROWS`), padded to the 16 that a product takes.
No kernel writes what another program of the same launch reads. Sizes that a model fixes are constants, so that loops
have constant bounds; PAD are sizes rounded up to powers of two.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

TILE = tl.constexpr(16)  # rows of a program
CHUNK = tl.constexpr(8)  # actions in a chunk
ACTION = tl.constexpr(7)
HIDDEN = tl.constexpr(-1e30)  # the score of what must not be seen: finite, so that no difference of two is NaN


@triton.jit
def _rows(ROWS: tl.constexpr):
    """Of this program's request: numbers of its rows, and of their passes, in all rows; which rows are no padding."""
    row = tl.arange(0, TILE)
    request = tl.program_id(0)
    return request * ROWS + row, request * (ROWS // CHUNK) + row // CHUNK, row < ROWS


@triton.jit
def _moments(x_ptr, rows, real, EPS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Mean and inverse deviation [16, 1] of rows of x [B * G * 8, D]."""
    column = tl.arange(0, D_PAD)[None, :]
    inside = real[:, None] & (column < D)
    x = tl.load(x_ptr + rows[:, None] * D + column, mask=inside, other=0.0)
    mean = tl.sum(x, axis=1) / D
    apart = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(apart * apart, axis=1) / D
    return mean[:, None], tl.rsqrt(variance + EPS)[:, None]


@triton.jit
def _modulated(x_ptr, parts_ptr, rows, passes, real, mean, inverse, k, D: tl.constexpr, P: tl.constexpr):
    """Channels k of rows of x, normed, scaled and shifted by parts [B * G, P, D]: [16, len(k)], zero in padding."""
    inside = real[:, None] & (k < D)[None, :]
    at = passes[:, None] * (P * D) + k[None, :]
    x = tl.load(x_ptr + rows[:, None] * D + k[None, :], mask=inside, other=0.0)
    shift = tl.load(parts_ptr + at, mask=inside, other=0.0)
    scale = tl.load(parts_ptr + D + at, mask=inside, other=0.0)
    return (x - mean) * inverse * scale + shift


@triton.jit
def _weight(weight_ptr, n, k, N: tl.constexpr, K: tl.constexpr):
    """Rows n and columns k of a weight [N, K], transposed: [len(k), len(n)]."""
    return tl.load(weight_ptr + n[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)


@triton.jit
def _channels(D: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr):
    """Of this program's head: numbers of its channels in all D, or D where they are padding, and which are not."""
    channel = tl.arange(0, C_PAD)
    n = tl.program_id(1) * C + channel
    if C != C_PAD:
        n = tl.where(channel < C, n, D)
    return n, channel < C


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
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Norm, modulation, projections, rotation and attention within each pass: one head of one request, [B, heads]."""
    rows, passes, real = _rows(ROWS)
    mean, inverse = _moments(x_ptr, rows, real, 1e-6, D, D_PAD)
    n, here = _channels(D, C, C_PAD)
    q = tl.zeros((TILE, C_PAD), tl.float32)
    key = tl.zeros((TILE, C_PAD), tl.float32)
    value = tl.zeros((TILE, C_PAD), tl.float32)
    for start in range(0, D, DEPTH):
        k = start + tl.arange(0, DEPTH)
        h = _modulated(x_ptr, parts_ptr, rows, passes, real, mean, inverse, k, D, P)
        q = tl.dot(h, _weight(weight_ptr, n, k, D, D), q, input_precision=PRECISION)
        key = tl.dot(h, _weight(weight_ptr + D * D, n, k, D, D), key, input_precision=PRECISION)
        value = tl.dot(h, _weight(weight_ptr + 2 * D * D, n, k, D, D), value, input_precision=PRECISION)
    q += tl.load(bias_ptr + n, mask=here, other=0.0)[None, :]
    key += tl.load(bias_ptr + D + n, mask=here, other=0.0)[None, :]
    value += tl.load(bias_ptr + 2 * D + n, mask=here, other=0.0)[None, :]

    row = tl.arange(0, TILE)
    pair = tl.arange(0, C_PAD // 2)[None, :]
    at = (row % CHUNK)[:, None] * (C // 2) + pair
    cos = tl.load(cos_ptr + at, mask=pair < C // 2, other=0.0)
    sin = tl.load(sin_ptr + at, mask=pair < C // 2, other=0.0)
    q = _rotated(q * SCALE, cos, sin, C_PAD)
    key = _rotated(key, cos, sin, C_PAD)

    scores = tl.dot(q, tl.trans(key), input_precision=PRECISION)
    together = (row // CHUNK)[:, None] == (row // CHUNK)[None, :]
    scores = tl.where(together, scores, HIDDEN)
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    weights = weights / tl.sum(weights, axis=1)[:, None]
    mixed = tl.dot(weights, value, input_precision=PRECISION)
    tl.store(out_ptr + rows[:, None] * D + n[None, :], mixed, mask=real[:, None] & here[None, :])


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
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Norm, queries, and attention of a request's passes to its context: one head of one request, [B, heads]."""
    request = tl.program_id(0)
    rows, _, real = _rows(ROWS)
    mean, inverse = _moments(x_ptr, rows, real, 1e-5, D, D_PAD)
    n, here = _channels(D, C, C_PAD)
    q = tl.zeros((TILE, C_PAD), tl.float32)
    for start in range(0, D, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = real[:, None] & (k < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] * D + k[None, :], mask=inside, other=0.0)
        scale = tl.load(norm_weight_ptr + k, mask=k < D, other=0.0)[None, :]
        shift = tl.load(norm_bias_ptr + k, mask=k < D, other=0.0)[None, :]
        h = (x - mean) * inverse * scale + shift
        q = tl.dot(h, _weight(weight_ptr, n, k, D, D), q, input_precision=PRECISION)
    q = (q + tl.load(bias_ptr + n, mask=here, other=0.0)[None, :]) * SCALE

    most = tl.full((TILE,), HIDDEN, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    mixed = tl.zeros((TILE, C_PAD), tl.float32)
    for start in range(0, END, KEYS):
        s = start + tl.arange(0, KEYS)
        present = s < length
        at = (request * length + s) * STRIDE
        keys = tl.load(context_ptr + at[None, :] + n[:, None], mask=present[None, :] & here[:, None], other=0.0)
        values = tl.load(context_ptr + D + at[:, None] + n[None, :], mask=present[:, None] & here[None, :], other=0.0)
        seen = present
        if MASKED:
            seen = tl.load(mask_ptr + request * length + s, mask=present, other=0) != 0
        scores = tl.where(seen[None, :], tl.dot(q, keys, input_precision=PRECISION), HIDDEN)
        highest = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp(scores - highest[:, None])
        fade = tl.exp(most - highest)
        total = total * fade + tl.sum(weights, axis=1)
        mixed = tl.dot(weights, values, mixed * fade[:, None], input_precision=PRECISION)
        most = highest
    tl.store(out_ptr + rows[:, None] * D + n[None, :], mixed / total[:, None], mask=real[:, None] & here[None, :])


@triton.jit
def _product(x_ptr, weight_ptr, rows, real, n, N: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
             DEPTH: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Rows of x [B * G * 8, K] times rows n of a weight [N, K]: [16, WIDE].

    GROUPS of channels are multiplied side by side, at best one by each warp, and then summed.
    """
    if GROUPS == 1:
        out = tl.zeros((TILE, WIDE), tl.float32)
        for start in range(0, K, DEPTH):
            k = start + tl.arange(0, DEPTH)
            x = tl.load(x_ptr + rows[:, None] * K + k[None, :], mask=real[:, None] & (k < K)[None, :], other=0.0)
            out = tl.dot(x, _weight(weight_ptr, n, k, N, K), out, input_precision=PRECISION)
        return out
    else:
        parts = tl.zeros((GROUPS, TILE, WIDE), tl.float32)
        for start in range(0, K, GROUPS * DEPTH):
            k = start + tl.arange(0, GROUPS)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
            inside = real[None, :, None] & (k < K)[:, None, :]
            x = tl.load(x_ptr + rows[None, :, None] * K + k[:, None, :], mask=inside, other=0.0)
            inside = (n < N)[None, None, :] & (k < K)[:, :, None]
            weight = tl.load(weight_ptr + n[None, None, :] * K + k[:, :, None], mask=inside, other=0.0)
            parts = tl.dot(x, weight, parts, input_precision=PRECISION)
        return tl.sum(parts, axis=0)


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
    P: tl.constexpr,
    WIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """residual + gate * (x weight + bias): WIDE columns of one request, [B, D / WIDE]."""
    rows, passes, real = _rows(ROWS)
    n = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = real[:, None] & (n < D)[None, :]
    out = _product(x_ptr, weight_ptr, rows, real, n, D, K, WIDE, DEPTH, GROUPS, PRECISION)
    out += tl.load(bias_ptr + n, mask=n < D, other=0.0)[None, :]
    gate = tl.load(gate_ptr + passes[:, None] * (P * D) + n[None, :], mask=inside, other=0.0)
    at = rows[:, None] * D + n[None, :]
    tl.store(out_ptr + at, tl.load(residual_ptr + at, mask=inside, other=0.0) + gate * out, mask=inside)


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
    DEPTH: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """norm(residual) + x weight: WIDE columns of one request, [B, D / WIDE]."""
    rows, _, real = _rows(ROWS)
    mean, inverse = _moments(residual_ptr, rows, real, 1e-5, D, D_PAD)
    n = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = real[:, None] & (n < D)[None, :]
    out = _product(x_ptr, weight_ptr, rows, real, n, D, D, WIDE, DEPTH, GROUPS, PRECISION)
    scale = tl.load(norm_weight_ptr + n, mask=n < D, other=0.0)[None, :]
    shift = tl.load(norm_bias_ptr + n, mask=n < D, other=0.0)[None, :]
    at = rows[:, None] * D + n[None, :]
    out += (tl.load(residual_ptr + at, mask=inside, other=0.0) - mean) * inverse * scale + shift
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
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Norm, modulation, the MLP's first product and its GELU (tanh): WIDE columns of one request, [B, N / WIDE]."""
    rows, passes, real = _rows(ROWS)
    mean, inverse = _moments(x_ptr, rows, real, 1e-6, D, D_PAD)
    n = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    out = tl.zeros((TILE, WIDE), tl.float32)
    for start in range(0, D, DEPTH):
        k = start + tl.arange(0, DEPTH)
        h = _modulated(x_ptr, parts_ptr, rows, passes, real, mean, inverse, k, D, P)
        out = tl.dot(h, _weight(weight_ptr, n, k, N, D), out, input_precision=PRECISION)
    out += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
    tl.store(out_ptr + rows[:, None] * N + n[None, :], gelu_tanh(out), mask=real[:, None] & (n < N)[None, :])


@triton.jit
def gelu_tanh(x):
    # (1 + tanh(y)) / 2 is the logistic function of 2 y.
    return x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def _embed(x, weight_ptr, base_ptr, out_ptr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """Actions [16, 16] of a request, the same for each pass, embedded by a weight [D, 7], plus the base [B, 8, D]."""
    rows, _, real = _rows(ROWS)
    n = tl.arange(0, D_PAD)
    out = tl.dot(x, _weight(weight_ptr, n, tl.arange(0, TILE), D, ACTION), input_precision=PRECISION)
    inside = real[:, None] & (n < D)[None, :]
    place = tl.program_id(0) * CHUNK + tl.arange(0, TILE) % CHUNK
    out += tl.load(base_ptr + place[:, None] * D + n[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + rows[:, None] * D + n[None, :], out, mask=inside)


@triton.jit
def begin(
    sample_ptr,  # [B, 8, 7]
    weight_ptr,  # [D, 7]
    base_ptr,  # [B, 8, D]
    out_ptr,  # [B * G * 8, D]
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first sample, embedded: one request, [B]."""
    place = tl.program_id(0) * CHUNK + tl.arange(0, TILE) % CHUNK
    c = tl.arange(0, TILE)[None, :]
    x = tl.load(sample_ptr + place[:, None] * ACTION + c, mask=(c < ACTION) & (place >= 0)[:, None], other=0.0)
    _embed(x, weight_ptr, base_ptr, out_ptr, ROWS, D, D_PAD, PRECISION)


@triton.jit
def finish(
    x_ptr,  # [B * G * 8, D]
    parts_ptr,  # [B * G, P, D], of which shift and scale are the first two
    weight_ptr,  # [7, D]
    bias_ptr,  # [7]
    sample_ptr,  # [B, 8, 7]
    next_ptr,  # [B, 8, 7]
    embed_weight_ptr,  # [D, 7]
    base_ptr,  # [B, 8, D]
    embedded_ptr,  # [B * G * 8, D]
    first,  # weight of the first pass's noise
    second,  # and of the second's
    inverse_signal,
    noise_ratio,
    next_signal,
    next_noise,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    P: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The final layer, guidance, the DDIM step, and the next sample and its embedding: one request, [B]."""
    rows, passes, real = _rows(ROWS)
    mean, inverse = _moments(x_ptr, rows, real, 1e-6, D, D_PAD)
    row = tl.arange(0, TILE)
    eps = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, D, DEPTH):
        k = start + tl.arange(0, DEPTH)
        h = _modulated(x_ptr, parts_ptr, rows, passes, real, mean, inverse, k, D, P)
        eps = tl.dot(h, _weight(weight_ptr, row, k, ACTION, D), eps, input_precision=PRECISION)
    eps += tl.load(bias_ptr + row, mask=row < ACTION, other=0.0)[None, :]
    eps = eps * tl.where(row < CHUNK, first, second)[:, None]
    eps = tl.sum(tl.reshape(eps, (2, CHUNK, TILE)), axis=0)

    i, c = tl.arange(0, CHUNK)[:, None], tl.arange(0, TILE)[None, :]
    at = (tl.program_id(0) * CHUNK + i) * ACTION + c
    inside = (i < CHUNK) & (c < ACTION)
    x = tl.load(sample_ptr + at, mask=inside, other=0.0)
    clean = tl.minimum(tl.maximum(x * inverse_signal - eps * noise_ratio, -1.0), 1.0)
    x = clean * next_signal + eps * next_noise
    tl.store(next_ptr + at, x, mask=inside)
    both = tl.reshape(tl.broadcast_to(x[None, :, :], (2, CHUNK, TILE)), (TILE, TILE))
    _embed(both, embed_weight_ptr, base_ptr, embedded_ptr, ROWS, D, D_PAD, PRECISION)


def current(device: torch.device) -> AbstractContextManager[None]:
    """Makes a GPU the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
