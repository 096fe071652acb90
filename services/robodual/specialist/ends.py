"""Triton kernels: the beginning of the denoising loop, and the end of each of its steps, as `kernels.py` has them."""

from __future__ import annotations

import triton
import triton.language as tl

from robodual.chained import wait
from robodual.specialist.tiles import (
    ACTION,
    CHUNK,
    TILE,
    grouped,
    normed,
    read,
    read_weight,
    rows_of_request,
    summed_dot,
)


@triton.jit
def _embedding(weight_ptr, base_ptr, n, real, D: tl.constexpr):
    """What embeds actions: of a weight [D, 7], [16, len(n)], and of the base [B, 8, D], the same for each pass."""
    c = tl.arange(0, TILE)
    inside = (c < ACTION)[:, None] & (n < D)[None, :]
    weight = tl.load(weight_ptr + n[None, :] * ACTION + c[:, None], mask=inside, other=0.0)
    place = tl.program_id(0) * CHUNK + c % CHUNK
    inside = real[:, None] & (n < D)[None, :]
    return weight, tl.load(base_ptr + place[:, None] * D + n[None, :], mask=inside, other=0.0)


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
    CHAINED: tl.constexpr,
):
    """The first sample, embedded: one request, [B]. It waits first of all, for what made the loop's inputs."""
    wait(CHAINED)
    rows, _, real = rows_of_request(ROWS)
    n = tl.arange(0, D_PAD)
    weight, base = _embedding(weight_ptr, base_ptr, n, real, D)
    place = tl.program_id(0) * CHUNK + tl.arange(0, TILE) % CHUNK
    c = tl.arange(0, TILE)[None, :]
    x = tl.load(sample_ptr + place[:, None] * ACTION + c, mask=(c < ACTION) & (place >= 0)[:, None], other=0.0)
    out = tl.dot(x, weight, input_precision=PRECISION) + base
    tl.store(out_ptr + rows[:, None] * D + n[None, :], out, mask=real[:, None] & (n < D)[None, :])


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
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """The final layer, guidance, the DDIM step, and the next sample and its embedding: one request, [B]."""
    rows, passes, real = rows_of_request(ROWS)
    row = tl.arange(0, TILE)
    k = grouped(0, D_PAD, GROUPS)
    weight = read_weight(weight_ptr, row, k, ACTION, D)
    bias = tl.load(bias_ptr + row, mask=row < ACTION, other=0.0)[None, :]
    shift = read(parts_ptr, passes, real, k, P * D, D)
    scale = read(parts_ptr + D, passes, real, k, P * D, D)
    n = tl.arange(0, D_PAD)
    embed_weight, base = _embedding(embed_weight_ptr, base_ptr, n, real, D)

    wait(CHAINED)
    h, _, _ = normed(read(x_ptr, rows, real, k, D, D), real, k, 1e-6, D)
    eps = summed_dot(h * scale + shift, weight, PRECISION) + bias
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
    out = tl.dot(both, embed_weight, input_precision=PRECISION) + base
    tl.store(embedded_ptr + rows[:, None] * D + n[None, :], out, mask=real[:, None] & (n < D)[None, :])
