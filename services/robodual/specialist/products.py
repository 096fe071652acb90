"""A linear layer as a Triton kernel, for the encoders' few hundred rows in float32: it imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, nn

from robodual.specialist.fusing import can_chain
from robodual.specialist.tiles import current, gelu_tanh, wait

NONE, EXACT, TANH = 0, 1, 2
GELUS = {None: NONE, "none": EXACT, "tanh": TANH}
Norm = tuple[Tensor, float]  # of a layer whose weight and bias have the norm's: the sums of the weight's rows, epsilon
Tile = tuple[int, int, int]  # rows and columns of a program, and how many share its depth: 1, or one by each warp
TILES: tuple[Tile, ...] = ((64, 64, 1), (32, 64, 1), (32, 32, 4))  # largest first
PROGRAMS = 140  # at least so many, if a tile is small enough, or a GPU's 132 processors are not busy
DEPTH = 32
CHAINED = True  # kernels are launched before those before them end, where the GPU can
STAGES = {1: 4, 4: 3}  # with as many groups


@triton.jit
def linear_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N]
    residual_ptr,  # [M, N]
    sums_ptr,  # [N], of the weight's rows
    out_ptr,  # [M, N]
    M,
    N,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,  # rows of x are normed first
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,  # of channels, multiplied side by side, one by each warp, and then summed; 1 is none
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """x weight + bias, its GELU, or plus a residual: one tile, [M / ROWS, N / COLUMNS].

    The norm of a row is applied to its product: (x - mean) weight = x weight - mean * sum of weight.
    """
    wait(CHAINED)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    origin = tl.zeros((ROWS,), tl.float32)
    if NORM:  # a row's moments are taken about its first channel, so that they do not cancel
        origin = tl.load(x_ptr + m * K, mask=m < M, other=0.0)
    if GROUPS == 1:
        out = tl.zeros((ROWS, COLUMNS), tl.float32)
        first = tl.zeros((ROWS,), tl.float32)
        second = tl.zeros((ROWS,), tl.float32)
        for start in range(0, K, DEPTH):
            k = start + tl.arange(0, DEPTH)
            x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
            w = tl.load(weight_ptr + n[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
            out = tl.dot(x, w, out, input_precision=PRECISION)
            if NORM:
                apart = tl.where((k < K)[None, :], x - origin[:, None], 0.0)
                first += tl.sum(apart, axis=1)
                second += tl.sum(apart * apart, axis=1)
    else:
        parts = tl.zeros((GROUPS, ROWS, COLUMNS), tl.float32)
        firsts = tl.zeros((GROUPS, ROWS), tl.float32)
        seconds = tl.zeros((GROUPS, ROWS), tl.float32)
        for start in range(0, K, GROUPS * DEPTH):
            k = start + tl.arange(0, GROUPS)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
            inside = (m < M)[None, :, None] & (k < K)[:, None, :]
            x = tl.load(x_ptr + m[None, :, None] * K + k[:, None, :], mask=inside, other=0.0)
            inside = (n < N)[None, None, :] & (k < K)[:, :, None]
            w = tl.load(weight_ptr + n[None, None, :] * K + k[:, :, None], mask=inside, other=0.0)
            parts = tl.dot(x, w, parts, input_precision=PRECISION)
            if NORM:
                apart = tl.where((k < K)[:, None, :], x - origin[None, :, None], 0.0)
                firsts += tl.sum(apart, axis=2)
                seconds += tl.sum(apart * apart, axis=2)
        out = tl.sum(parts, axis=0)
        first = tl.sum(firsts, axis=0)
        second = tl.sum(seconds, axis=0)
    if NORM:
        beyond = first / K
        inverse = tl.rsqrt(tl.maximum(second / K - beyond * beyond, 0.0) + EPS)
        sums = tl.load(sums_ptr + n, mask=n < N, other=0.0)
        out = (out - (origin + beyond)[:, None] * sums[None, :]) * inverse[:, None]
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
    norm: Norm | None = None,
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
        norm: of x, with the weight and the bias that `fold` gave with it; or None
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
    chained = CHAINED and can_chain(x.device)
    with current(x.device):
        linear_kernel[grid](
            flat,
            weight,
            weight if bias is None else bias.contiguous(),
            out if residual is None else residual.reshape(-1, columns).contiguous(),
            out if norm is None else norm[0],
            out,
            len(flat),
            columns,
            K=depth,
            BIAS=bias is not None,
            GELU=GELUS[gelu],
            RESIDUAL=residual is not None,
            NORM=norm is not None,
            EPS=0.0 if norm is None else norm[1],
            ROWS=height,
            COLUMNS=width,
            GROUPS=groups,
            DEPTH=DEPTH,
            PRECISION=precision,
            CHAINED=chained,
            **({"launch_pdl": True} if chained else {}),
            num_warps=4,
            num_stages=STAGES[groups],
        )
    return out.view(*x.shape[:-1], columns)


def fold(weight: Tensor, bias: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, Norm]:
    """A norm's weight and bias put into those of the layer after it, and what is left of the norm."""
    folded = (weight.double() * norm.weight.double()).to(weight.dtype).contiguous()
    constant = weight.double() @ norm.bias.double() + (0 if bias is None else bias.double())
    return folded, constant.to(weight.dtype), (folded.double().sum(dim=1).to(weight.dtype), norm.eps)


def choose_tile(rows: int, columns: int) -> Tile:
    """The largest tile of which there are enough to fill a GPU, or else the smallest."""
    for tile in TILES:
        if -(-rows // tile[0]) * -(-columns // tile[1]) >= PROGRAMS:
            return tile
    return TILES[-1]
