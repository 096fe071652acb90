"""A linear layer as a Triton kernel, for the encoders' few hundred rows in float32: it imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from robodual.device import current
from robodual.specialist.tiles import gelu_tanh

NONE, EXACT, TANH = 0, 1, 2
GELUS = {None: NONE, "none": EXACT, "tanh": TANH}
Tile = tuple[int, int, int]  # rows and columns of a program, and how many share its depth: 1, or one by each warp
TILES: tuple[Tile, ...] = ((64, 64, 1), (32, 64, 1), (32, 32, 4))  # largest first
PROGRAMS = 140  # at least so many, if a tile is small enough, or a GPU's 132 processors are not busy
DEPTH = 32
STAGES = {1: 4, 4: 3}  # with as many groups


@triton.jit
def linear_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N]
    residual_ptr,  # [M, N]
    out_ptr,  # [M, N]
    M,
    N,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,  # of channels, multiplied side by side, one by each warp, and then summed; 1 is none
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x weight + bias, its GELU, or plus a residual: one tile, [M / ROWS, N / COLUMNS]."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if GROUPS == 1:
        out = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, K, DEPTH):
            k = start + tl.arange(0, DEPTH)
            x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
            w = tl.load(weight_ptr + n[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
            out = tl.dot(x, w, out, input_precision=PRECISION)
    else:
        parts = tl.zeros((GROUPS, ROWS, COLUMNS), tl.float32)
        for start in range(0, K, GROUPS * DEPTH):
            k = start + tl.arange(0, GROUPS)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
            inside = (m < M)[None, :, None] & (k < K)[:, None, :]
            x = tl.load(x_ptr + m[None, :, None] * K + k[:, None, :], mask=inside, other=0.0)
            inside = (n < N)[None, None, :] & (k < K)[:, :, None]
            w = tl.load(weight_ptr + n[None, None, :] * K + k[:, :, None], mask=inside, other=0.0)
            parts = tl.dot(x, w, parts, input_precision=PRECISION)
        out = tl.sum(parts, axis=0)
    if BIAS:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
    if GELU == 1:
        out = 0.5 * out * (1 + tl.erf(out * 0.7071067811865476))
    if GELU == 2:
        out = gelu_tanh(out)
    at = m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if RESIDUAL:
        out += tl.load(residual_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + at, out, mask=inside)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gelu: str | None = None,
    residual: Tensor | None = None,
    *,
    precision: str = "tf32x3",
    tile: Tile | None = None,
) -> Tensor:
    """x @ weight.T + bias, then a GELU ("none" is exact, "tanh"), or plus a residual: float32.

    Args:
        x: [..., in]
        weight: [out, in]
        bias: [out], or None
        gelu: the approximation of a GELU, or None for no GELU
        residual: [..., out], or None
        precision: of the product, "tf32x3" or "ieee"
        tile: of a program, or None for the largest that fills a GPU

    Returns:
        [..., out].
    """
    columns, depth = weight.shape
    flat, weight = x.reshape(-1, depth).contiguous(), weight.contiguous()
    out = flat.new_empty(len(flat), columns)
    height, width, groups = tile or choose_tile(len(flat), columns)
    grid = (triton.cdiv(len(flat), height), triton.cdiv(columns, width))
    with current(x.device):
        linear_kernel[grid](
            flat,
            weight,
            weight if bias is None else bias.contiguous(),
            out if residual is None else residual.reshape(-1, columns).contiguous(),
            out,
            len(flat),
            columns,
            K=depth,
            BIAS=bias is not None,
            GELU=GELUS[gelu],
            RESIDUAL=residual is not None,
            ROWS=height,
            COLUMNS=width,
            GROUPS=groups,
            DEPTH=DEPTH,
            PRECISION=precision,
            num_warps=4,
            num_stages=STAGES[groups],
        )
    return out.view(*x.shape[:-1], columns)


def choose_tile(rows: int, columns: int) -> Tile:
    """The largest tile of which there are enough to fill a GPU, or else the smallest."""
    for tile in TILES:
        if -(-rows // tile[0]) * -(-columns // tile[1]) >= PROGRAMS:
            return tile
    return TILES[-1]
