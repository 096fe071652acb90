"""The Llama's layers in a decoding step, by the kernels of kernels.py: where they can be, and how they are launched."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import structlog
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from robodual.generalist.layers import visible
from robodual.generalist.model import Generalist
from robodual.generalist.quantisation import Float8Linear
from robodual.generalist.tokens import ROW

logger = structlog.get_logger(__name__)

MOST_ROWS = 64  # beyond, products are no longer bound by the weights' reading, and cuBLAS is as good
NARROW = 16  # rows up to which all stages fit
TOKENS = 64  # of a prompt that a program rotates
GATES = 1024  # that a program computes
WHOLE = 128  # what every size must be a multiple of
LINE = 128  # bytes of a line of the second-level cache

# What an H200 is fastest with: columns of a program, depth at once, stages, warps.
TILES = {"qkv": (32, 128, 4, 4), "out": (32, 256, 6, 4), "gate_up": (32, 128, 4, 4), "down": (32, 256, 6, 4)}
ATTENTION = (64, 3, 4)  # slots at once, stages, warps
AHEAD = 96  # programs that bring the output's weight near while others attend


@dataclass(frozen=True)
class Matrix:
    """Linear layers' weights one below the other, [out, in]; scale: float8's [out]."""

    weight: Tensor
    scale: Tensor | None


@dataclass(frozen=True)
class Layer:
    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix
    norm1: Tensor
    norm2: Tensor


@dataclass(frozen=True)
class _Stream:
    """The residual stream, and what the next norm needs of it."""

    x: Tensor  # [R, D]
    normed: Tensor  # [R, D], times the norm's weight, not yet divided
    squares: Tensor  # float32 [R, S], sums of squares of parts of a row


class FusedLayers:
    """All layers of one model. Their weights are laid one below the other, where they then stay; values may change."""

    def __init__(self, model: Generalist) -> None:
        config = model.config.language
        self._heads, self._groups, self._width = config.heads, config.key_value_heads, config.width // config.heads
        self._epsilon = config.rms_epsilon
        self._depths = config.width, config.mlp_width
        self._layers = [
            _lay_out(layer) for layer in cast(Sequence[LlamaDecoderLayer], model.language_model.model.layers)
        ]

    def try_one(self) -> None:
        """Runs the first layer once, which compiles the kernels; raises what goes wrong."""
        weight = self._layers[0].norm1
        x = weight.new_zeros(1, ROW, len(weight))
        angles = weight.new_zeros(1, ROW, self._width // 2)
        cache = weight.new_zeros(1, 1, self._groups, ATTENTION[0], self._width)
        slots = torch.arange(ROW, device=weight.device).unsqueeze(0)
        self(x, angles, angles, slots, slots[:, :1], cache, cache.clone())
        if self.reads:
            self.read(x, (angles, angles), None, cache, cache.clone())
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)

    def takes(self, rows: int) -> bool:
        """Whether so many rows are what they are for."""
        return rows <= MOST_ROWS

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, padding: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """x [B, N, D] through all layers, before the final norm.

        cos, sin: [B, N, W / 2], of the rotation; slots: int64 [B, N], where the tokens' keys and values go; padding:
        int64 [B, 1], slots in front that do not count; keys, values: [layers, B, K, M, W].
        """
        batch, count, width = x.shape
        rows, inner = batch * count, self._heads * self._width
        joined = inner + 2 * self._groups * self._width
        x = x.reshape(rows, width).clone()
        qkv, mixed, hidden = x.new_empty(rows, joined), x.new_empty(rows, inner), x.new_empty(rows, self._depths[1])
        cos, sin, slots, padding = (tensor.contiguous() for tensor in (cos, sin, slots, padding))
        first = self._layers[0].norm1
        stream = _Stream(x, x * first, x.float().square().sum(dim=1, keepdim=True))
        after = [*(layer.norm1 for layer in self._layers[1:]), first]  # the last is not read
        for layer, following, own_keys, own_values in zip(self._layers, after, keys, values):
            self._linear("qkv", stream.normed, layer.qkv, qkv, squares=stream.squares)
            self._attend(qkv, own_keys, own_values, cos, sin, slots, padding, mixed, count, layer.out.weight)
            stream = self._add("out", mixed, layer.out, stream.x, layer.norm2)
            self._linear("gate_up", stream.normed, layer.gate_up, hidden, squares=stream.squares, gated=True)
            stream = self._add("down", hidden, layer.down, stream.x, following)
        return stream.x.view(batch, count, width)

    @property
    def reads(self) -> bool:
        """Whether they read prompts too: cuBLAS, whose products those are, takes no float8 weight with bfloat16."""
        return self._layers[0].qkv.scale is None

    def read(
        self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Prompts x [B, T, D] through all layers, before the final norm; their keys and values go to the first T slots.

        angles: the rotation's cosines and sines [B, T, W / 2]; mask: bool [B, T], False where a row is padded in front,
        or None where none is; keys, values: [layers, B, K, M, W].
        """
        from robodual.generalist import kernels

        batch, count, width = x.shape
        rows, (columns, slots) = batch * count, (self._depths[1], keys.shape[3])
        cos, sin = (tensor.contiguous() for tensor in angles)
        seen = None if mask is None else visible(mask)
        queries = x.new_empty(batch, self._heads, count, self._width)
        hidden = x.new_empty(rows, columns)
        programs = batch, self._heads + 2 * self._groups, -(-count // TOKENS)
        x = x.reshape(rows, width)
        for layer, own_keys, own_values in zip(self._layers, keys, values):
            qkv = F.linear(F.rms_norm(x, (width,), layer.norm1, self._epsilon), layer.qkv.weight)
            kernels.rotate[programs](
                qkv,
                cos,
                sin,
                queries,
                own_keys,
                own_values,
                count,
                HEADS=self._heads,
                GROUPS=self._groups,
                WIDTH=self._width,
                SLOTS=slots,
                PART=TOKENS,
            )
            mixed = F.scaled_dot_product_attention(
                queries,
                own_keys[:, :, :count],
                own_values[:, :, :count],
                attn_mask=seen,
                is_causal=seen is None,
                enable_gqa=self._heads > self._groups,
            )
            x = torch.addmm(x, mixed.transpose(1, 2).reshape(rows, -1), layer.out.weight.T)
            both = F.linear(F.rms_norm(x, (width,), layer.norm2, self._epsilon), layer.gate_up.weight)
            kernels.gate[rows, -(-columns // GATES)](both, hidden, COLUMNS=columns, PART=GATES)
            x = torch.addmm(x, hidden, layer.down.weight.T)
        return x.view(batch, count, width)

    def _add(self, name: str, x: Tensor, matrix: Matrix, residual: Tensor, norm: Tensor) -> _Stream:
        """The residual stream after a product is added, ready for the norm of that weight."""
        rows, columns = residual.shape
        sums = torch.empty(rows, columns // _divisor(columns, TILES[name][0]), device=x.device)
        stream = _Stream(residual, torch.empty_like(residual), sums)
        self._linear(name, x, matrix, residual, stream=stream, norm=norm)
        return stream

    def _linear(
        self,
        name: str,
        x: Tensor,
        matrix: Matrix,
        out: Tensor,
        *,
        squares: Tensor | None = None,
        stream: _Stream | None = None,
        norm: Tensor | None = None,
        gated: bool = False,
    ) -> None:
        from robodual.generalist import kernels

        (rows, depth), columns = x.shape, out.shape[1]
        each, part, stages, warps = TILES[name]
        each, part = _divisor(columns, each), _divisor(depth, part)
        kernels.linear[(columns // each,)](
            x,
            matrix.weight,
            matrix.weight if matrix.scale is None else matrix.scale,
            squares,
            out,
            norm,
            out,
            None if stream is None else stream.normed,
            None if stream is None else stream.squares,
            rows,
            columns,
            self._epsilon,
            DEPTH=depth,
            NORMED=squares is not None,
            SUMS=1 if squares is None else squares.shape[1],
            MOST_SUMS=1 if squares is None else _power(squares.shape[1]),
            GATED=gated,
            ADDED=stream is not None,
            SCALED=matrix.scale is not None,
            ROWS=_power(rows),
            COLUMNS=each,
            PART=part,
            STAGES=stages if rows <= NARROW else 3,
            num_warps=warps,
        )

    def _attend(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        padding: Tensor,
        out: Tensor,
        count: int,
        ahead: Tensor,
    ) -> None:
        from robodual.generalist import kernels

        batch, groups, length, width = keys.shape
        part, stages, warps = ATTENTION
        bytes_each = ahead.element_size()
        kernels.attention[(batch * groups + (AHEAD if ahead.is_cuda else 0),)](
            qkv,
            keys,
            values,
            cos,
            sin,
            slots,
            padding,
            out,
            ahead,
            width**-0.5,
            HEADS=self._heads,
            GROUPS=groups,
            WIDTH=width,
            SLOTS=length,
            COUNT=count,
            PROGRAMS=batch * groups,
            LINES=ahead.numel() * bytes_each // LINE,
            LINE=LINE // bytes_each,
            QUERIES=_power(count * (self._heads // groups)),
            NEW=_power(count),
            PART=part,
            STAGES=stages,
            num_warps=warps,
        )


def fuse(model: Generalist) -> FusedLayers | None:
    """The model's layers by kernels, where that can be and a first run of them succeeds."""
    if not can_fuse(model):
        return None
    try:
        layers = FusedLayers(model)
        layers.try_one()
    except Exception as error:  # a compiler, a cache folder, a driver: PyTorch's operations need none of them
        logger.warning("decoding runs without fused kernels", reason=f"{type(error).__name__}: {error}")
        return None
    return layers


def can_fuse(model: Generalist) -> bool:
    """Whether the model's layers are such as the kernels read: on a GPU, in bfloat16, plain or float8, with Triton."""
    config = model.config.language
    sizes = config.width, config.mlp_width, config.key_value_heads * (config.width // config.heads)
    kinds = {type(module) for layer in _layers(model) for module in _linears(layer)}
    return (
        model.device.type == "cuda"
        and model.dtype == torch.bfloat16
        and all(size % WHOLE == 0 for size in sizes)
        and config.width // config.heads in (32, 64, 128, 256)
        and (kinds == {nn.Linear} or kinds == {Float8Linear})
        and importlib.util.find_spec("triton") is not None
    )


def _layers(model: Generalist) -> Sequence[LlamaDecoderLayer]:
    return cast(Sequence[LlamaDecoderLayer], model.language_model.model.layers)


def _linears(layer: LlamaDecoderLayer) -> list[nn.Module]:
    """Queries, keys, values, out, gate, up, down."""
    attention, mlp = layer.self_attn, layer.mlp
    own = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*own, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _lay_out(layer: LlamaDecoderLayer) -> Layer:
    linears = _linears(layer)
    return Layer(
        qkv=_join(linears[:3]),
        out=_join(linears[3:4]),
        gate_up=_join(linears[4:6]),
        down=_join(linears[6:]),
        norm1=layer.input_layernorm.weight,
        norm2=layer.post_attention_layernorm.weight,
    )


def _join(layers: Sequence[nn.Module]) -> Matrix:
    """Moves the layers' weights into one tensor, of which they are parts from then on."""
    return Matrix(_joined(layers, "weight"), _joined(layers, "scale") if isinstance(layers[0], Float8Linear) else None)


def _joined(layers: Sequence[nn.Module], name: str) -> Tensor:
    parameters = [cast(nn.Parameter, getattr(layer, name)) for layer in layers]
    if len(parameters) == 1:
        return parameters[0].detach()
    # Bytes, since not all that joins tensors takes float8.
    whole = torch.cat([parameter.detach().view(torch.uint8) for parameter in parameters]).view(parameters[0].dtype)
    for parameter, part in zip(parameters, torch.split(whole, [len(p) for p in parameters])):
        parameter.data = part
    return whole


def _power(rows: int) -> int:
    """The smallest power of two that holds them, and that a product takes."""
    return max(16, 1 << (rows - 1).bit_length())


def _divisor(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides it."""
    return min(most, size & -size)
