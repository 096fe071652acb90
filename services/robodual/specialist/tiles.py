"""What the specialist's Triton kernels have in common."""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(16)  # rows of a program
CHUNK = tl.constexpr(8)  # actions in a chunk
ACTION = tl.constexpr(7)
HIDDEN = tl.constexpr(-1e30)  # the score of what must not be seen: finite, so that no difference of two is NaN


@triton.jit
def rows_of_request(ROWS: tl.constexpr):
    """Of this program's request: numbers of its rows, and of their passes, in all rows; which rows are no padding."""
    row = tl.arange(0, TILE)
    request = tl.program_id(0)
    return request * ROWS + row, request * (ROWS // CHUNK) + row // CHUNK, row < ROWS


@triton.jit
def channels_of_head(D: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr):
    """Of this program's head: numbers of its channels in all D, or D where they are padding, and which are not."""
    channel = tl.arange(0, C_PAD)
    n = tl.program_id(1) * C + channel
    if C != C_PAD:
        n = tl.where(channel < C, n, D)
    return n, channel < C


@triton.jit
def grouped(START: tl.constexpr, PAD: tl.constexpr, GROUPS: tl.constexpr):
    """Numbers of PAD channels from START on, in groups: [GROUPS, PAD / GROUPS]."""
    each: tl.constexpr = PAD // GROUPS
    return START + tl.arange(0, GROUPS)[:, None] * each + tl.arange(0, each)[None, :]


@triton.jit
def read(x_ptr, rows, real, k, STRIDE: tl.constexpr, K: tl.constexpr):
    """Channels k [GROUPS, n] of K of rows that are STRIDE apart, zero in padding: [GROUPS, 16, n]."""
    inside = real[None, :, None] & (k < K)[:, None, :]
    return tl.load(x_ptr + rows[None, :, None] * STRIDE + k[:, None, :], mask=inside, other=0.0)


@triton.jit
def read_weight(weight_ptr, n, k, N: tl.constexpr, K: tl.constexpr):
    """Rows n and columns k [GROUPS, m] of a weight [N, K], transposed: [GROUPS, m, len(n)]."""
    inside = (n < N)[None, None, :] & (k < K)[:, :, None]
    return tl.load(weight_ptr + n[None, None, :] * K + k[:, :, None], mask=inside, other=0.0)


@triton.jit
def normed(x, real, k, EPS: tl.constexpr, D: tl.constexpr):
    """Rows x [GROUPS, 16, n], normed, and their means and inverse deviations [16]; in padding, anything finite."""
    mean = tl.sum(tl.sum(x, axis=2), axis=0) / D
    apart = x - mean[None, :, None]
    counted = tl.where(real[None, :, None] & (k < D)[:, None, :], apart, 0.0)
    inverse = tl.rsqrt(tl.sum(tl.sum(counted * counted, axis=2), axis=0) / D + EPS)
    return apart * inverse[None, :, None], mean, inverse


@triton.jit
def summed_dot(x, weight, PRECISION: tl.constexpr):
    """[GROUPS, 16, k] times [GROUPS, k, n], all groups summed: [16, n]."""
    return tl.sum(tl.dot(x, weight, input_precision=PRECISION), axis=0)


@triton.jit
def gelu_tanh(x):
    # (1 + tanh(y)) / 2 is the logistic function of 2 y.
    return x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
