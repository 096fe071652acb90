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

from robodual.device import current, padded
from robodual.generalist.joined import Matrix, lay_out, layers_of, linears
from robodual.generalist.layers import visible
from robodual.generalist.model import Generalist
from robodual.generalist.quantisation import Float8Linear
from robodual.generalist.tokens import GENERATED, ROW

logger = structlog.get_logger(__name__)

MOST_ROWS = 64  # beyond, products are no longer bound by the weights' reading, and cuBLAS is as good
NARROW = 16  # rows up to which the stages are those of `TILES`
WIDE_STAGES = 3  # and of more
LEAST_STAGES = 2
SMALL = 99 * 1024  # bytes that a program can share on the smallest of GPUs from Ampere on
TOKENS = 64  # of a prompt that a program rotates
GATES = 1024  # that a program computes
WHOLE = 128  # what every size must be a multiple of

# What an H200 was fastest with: columns of a program, depth at once, stages, warps.
TILES = {"qkv": (32, 128, 4, 4), "out": (32, 256, 4, 4), "gate_up": (64, 128, 3, 4), "down": (32, 256, 4, 4)}
ATTENTION = (64, 3, 4)  # slots at once, stages, warps

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Stream:
    """The residual stream, and what the next norm needs of it."""

    x: Tensor  # [R, D]
    normed: Tensor  # [R, D], times the norm's weight, not yet divided
    squares: Tensor  # float32 [R, S], sums of squares of parts of a row


class FusedLayers:
    """All layers of one model. Their weights are laid one below the other, where they then stay; values may change.

    The caller makes the model's device the current one, on which Triton launches.
    """

    def __init__(self, model: Generalist) -> None:
        config = model.config.language
        self._heads, self._groups, self._width = config.heads, config.key_value_heads, config.width // config.heads
        self._epsilon = config.rms_epsilon
        self._depths = config.width, config.mlp_width
        self._embeddings = model.language_model.model.embed_tokens.weight.detach()
        self._shared = _shared_memory(model.device)
        self._frequencies = model.language_model.model.rotary_emb.inv_freq
        self._layers = [
            lay_out(layer) for layer in cast(Sequence[LlamaDecoderLayer], model.language_model.model.layers)
        ]

    def try_one(self) -> None:
        """Runs the first layer once, which compiles the kernels; raises what goes wrong."""
        weight = self._layers[0].norm1
        x = weight.new_zeros(1, ROW, len(weight))
        angles = weight.new_zeros(1, ROW, self._width // 2)
        cache = weight.new_zeros(1, 1, self._groups, ATTENTION[0], self._width)
        slots = torch.arange(ROW, device=weight.device).unsqueeze(0)
        tokens = slots.new_zeros(1, GENERATED + 1)
        stream, rotation, slots = self.begin(tokens, slots[:, :1], slots[0, :1], slots[:, :1], ROW)
        self(stream, rotation, slots, slots[:, :1].clone(), cache, cache.clone())
        self.conclude(slots, tokens, slots[:, :1].clone(), slots[0, :1], tokens[0], 0, True)
        if self.reads:
            self.read(x, (angles, angles), None, cache, cache.clone())
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)

    def takes(self, rows: int) -> bool:
        """Whether so many rows are what they are for, and fit what a processor of this GPU shares."""
        return rows <= MOST_ROWS and all(
            self._fitting(rows, each * (1 + (name == "gate_up")), part) >= LEAST_STAGES
            for name, (each, part, _, _) in TILES.items()
        )

    def _fitting(self, rows: int, columns: int, part: int) -> int:
        """How many parts of so many rows of x, and rows of a weight, fit the memory that a program's threads share."""
        each = (padded(rows) + columns) * part * self._embeddings.element_size()
        return int(self._shared // each)

    def begin(
        self, tokens: Tensor, place: Tensor, length: Tensor, padding: Tensor, count: int
    ) -> tuple[Stream, Rotation, Tensor]:
        """Of `count` new tokens a sequence: the stream of their embeddings, rotation, and slots int64 [B, N].

        tokens: int64 [B, 65], place, padding: int64 [B, 1], length: int64 [1], as in stepping.py.
        """
        from robodual.generalist import end_kernels

        table, norm = self._embeddings, self._layers[0].norm1
        (batch, every), width, half = tokens.shape, table.shape[1], self._width // 2
        rows = batch * count
        x, normed = table.new_empty(2, rows, width).unbind()
        cos, sin = table.new_empty(2, batch, count, half).unbind()
        squares = torch.empty(rows, 1, device=table.device)
        slots = tokens.new_empty(batch, count)
        end_kernels.begin[(rows,)](
            tokens,
            place,
            length,
            padding,
            table,
            self._frequencies,
            norm,
            x,
            normed,
            squares,
            cos,
            sin,
            slots,
            COUNT=count,
            ALL=every,
            LAST=GENERATED - 1,
            D=width,
            MOST=padded(width),
            HALF=half,
        )
        return Stream(x, normed, squares), (cos, sin), slots

    def conclude(
        self,
        best: Tensor,
        tokens: Tensor,
        place: Tensor,
        limit: Tensor,
        layout: Tensor,
        first: int | None,
        refining: bool,
    ) -> None:
        """Keeps the guesses that are right. best: int64 [B, N], counted from the token `first` on; None: all tokens."""
        from robodual.generalist import end_kernels

        batch, count = best.shape
        end_kernels.conclude[(batch,)](
            best,
            tokens,
            place,
            limit,
            layout,
            COUNT=count,
            MOST=padded(count),
            ALL=tokens.shape[1],
            LAST=GENERATED - 1,
            ROW=ROW,
            FIRST_ACTION=0 if first is None else first,
            CONSTRAINED=first is not None,
            REFINING=refining,
        )

    def stream(self, x: Tensor) -> Stream:
        """The stream of tokens x [R, D], which it will write to."""
        return Stream(x, x * self._layers[0].norm1, x.float().square().sum(dim=1, keepdim=True))

    def __call__(
        self, stream: Stream, rotation: Rotation, slots: Tensor, padding: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """New tokens [R, D] through all layers, before the final norm, to [B, N, D].

        rotation: cosines and sines [B, N, W / 2]; slots: int64 [B, N], where the tokens' keys and values go; padding:
        int64 [B, 1], slots in front that do not count; keys, values: [layers, B, K, M, W].
        """
        (batch, count), x, (cos, sin) = slots.shape, stream.x, rotation
        (rows, width), inner = x.shape, self._heads * self._width
        qkv = x.new_empty(rows, inner + 2 * self._groups * self._width)
        mixed, hidden = x.new_empty(rows, inner), x.new_empty(rows, self._depths[1])
        after = [*(layer.norm1 for layer in self._layers[1:]), self._layers[0].norm1]  # the last is not read
        for layer, following, own_keys, own_values in zip(self._layers, after, keys, values):
            self._linear("qkv", stream.normed, layer.qkv, qkv, squares=stream.squares)
            self._attend(qkv, own_keys, own_values, cos, sin, slots, padding, mixed, count)
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

    def _add(self, name: str, x: Tensor, matrix: Matrix, residual: Tensor, norm: Tensor) -> Stream:
        """The residual stream after a product is added, ready for the norm of that weight."""
        rows, columns = residual.shape
        sums = torch.empty(rows, columns // _divisor(columns, TILES[name][0]), device=x.device)
        stream = Stream(residual, torch.empty_like(residual), sums)
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
        stream: Stream | None = None,
        norm: Tensor | None = None,
        gated: bool = False,
    ) -> None:
        from robodual.generalist import kernels

        (rows, depth), columns = x.shape, out.shape[1]
        each, part, stages, warps = TILES[name]
        each, part = _divisor(columns, each), _divisor(depth, part)
        stages = min(stages if rows <= NARROW else WIDE_STAGES, self._fitting(rows, each * (1 + gated), part))
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
            MOST_SUMS=1 if squares is None else padded(squares.shape[1]),
            GATED=gated,
            ADDED=stream is not None,
            SCALED=matrix.scale is not None,
            ROWS=padded(rows),
            COLUMNS=each,
            PART=part,
            STAGES=stages,
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
    ) -> None:
        from robodual.generalist import kernels

        batch, groups, length, width = keys.shape
        part, stages, warps = ATTENTION
        stages = stages if count <= NARROW else LEAST_STAGES
        kernels.attention[(batch * groups,)](
            qkv,
            keys,
            values,
            cos,
            sin,
            slots,
            padding,
            out,
            width**-0.5,
            HEADS=self._heads,
            GROUPS=groups,
            WIDTH=width,
            SLOTS=length,
            COUNT=count,
            QUERIES=padded(count * (self._heads // groups)),
            NEW=padded(count),
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
        with current(model.device):
            layers.try_one()
    except Exception as error:  # a compiler, a cache folder, a driver: PyTorch's operations need none of them
        logger.warning("decoding runs without fused kernels", reason=f"{type(error).__name__}: {error}")
        return None
    return layers


def can_fuse(model: Generalist) -> bool:
    """Whether the model's layers are such as the kernels read: on a GPU, in bfloat16, plain or float8, with Triton."""
    config = model.config.language
    sizes = config.width, config.mlp_width, config.key_value_heads * (config.width // config.heads)
    kinds = {type(module) for layer in layers_of(model) for module in linears(layer)}
    return (
        model.device.type == "cuda"
        and model.dtype == torch.bfloat16
        and all(size % WHOLE == 0 for size in sizes)
        and config.width // config.heads in (32, 64, 128, 256)
        and (kinds == {nn.Linear} or kinds == {Float8Linear})
        and importlib.util.find_spec("triton") is not None
    )


def _divisor(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides it."""
    return min(most, size & -size)


def _shared_memory(device: torch.device) -> int:
    """Bytes that a program can share, less what compilers take for themselves."""
    if device.type != "cuda":
        return 1 << 30
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SMALL)) - 4096
