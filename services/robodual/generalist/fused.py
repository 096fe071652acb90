"""The Llama's layers in a decoding step, by the kernels of kernels.py. Imports Triton: fusing.py does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from robodual.chained import chaining
from robodual.device import padded
from robodual.generalist import end_kernels, kernels
from robodual.generalist.joined import Matrix, lay_out
from robodual.generalist.layers import visible
from robodual.generalist.model import Generalist
from robodual.generalist.products import Plan, Products, Stream
from robodual.generalist.tokens import GENERATED, ROW

SEEN = 64  # slots that a program attends to
FEW = 16  # queries of a program of four warps; eight have more
TOKENS = 64  # of a prompt that a program rotates
GATES = 1024  # that a program computes

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Parts:
    """What attention finds in parts of the slots, of each sequence and key-value head."""

    mixtures: Tensor  # float32 [B * K, parts, queries, W], of values
    weights: Tensor  # float32 [B * K, parts, 2, queries], highest scores and sums of shares
    ended: Tensor  # int32 [B * K], 0


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
        head, ids = model.language_model.lm_head.weight.detach(), model.config.tokens
        self._heads_of = {False: Matrix(head, None), True: Matrix(head[ids.action_start : ids.action_end], None)}
        self._products = Products(model.device, model.dtype, config.rms_epsilon)
        self._frequencies = model.language_model.model.rotary_emb.inv_freq
        self._layers = [
            lay_out(layer) for layer in cast(Sequence[LlamaDecoderLayer], model.language_model.model.layers)
        ]

    @property
    def plan(self) -> Plan:
        """How steps are launched from now on."""
        return self._products.plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._products.plan = plan

    def try_ends(self) -> None:
        """Runs once what is not of a step's layers, which compiles the kernels; raises what goes wrong."""
        weight = self._layers[0].norm1
        slots = torch.arange(ROW, device=weight.device).unsqueeze(0)
        place, tokens = slots[:, :1], slots.new_zeros(1, GENERATED + 1)
        stream, _, slots = self.begin(tokens, place, slots[0, :1], place, ROW)
        for constrained in (False, True):
            best = self.best(stream.x.unsqueeze(0), constrained)
            self.conclude(best, tokens, place.clone(), slots[0, :1], tokens[0], 0 if constrained else None, True)
        if self.reads:
            angles = weight.new_zeros(1, ROW, self._width // 2)
            cache = weight.new_zeros(2, 1, 1, self._groups, SEEN, self._width)
            self.read(stream.x.unsqueeze(0), (angles, angles), None, *cache)
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)

    def takes(self, rows: int) -> bool:
        """Whether so many rows are what they are for, and fit what a processor of this GPU shares."""
        return self._products.takes(rows)

    def begin(
        self, tokens: Tensor, place: Tensor, length: Tensor, padding: Tensor, count: int
    ) -> tuple[Stream, Rotation, Tensor]:
        """Of `count` new tokens a sequence: the stream of their embeddings, rotation, and slots int64 [B, N].

        tokens: int64 [B, 65], place, padding: int64 [B, 1], length: int64 [1], as in stepping.py.
        """
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

    def best(self, hidden: Tensor, constrained: bool) -> Tensor:
        """`greedy.best_tokens`; bits of one state's answer do not depend on how many there are."""
        (batch, count, width), head = hidden.shape, self._heads_of[constrained]
        logits = hidden.new_empty(batch * count, len(head.weight))
        self._products.linear("head" if constrained else "qkv", hidden.reshape(-1, width), head, logits)
        return logits.argmax(dim=-1).view(batch, count)

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
        parts = self._parts(batch, count, keys.shape[3])
        after = [*(layer.norm1 for layer in self._layers[1:]), self._layers[0].norm1]  # the last is not read
        for layer, following, own_keys, own_values in zip(self._layers, after, keys, values):
            self._products.linear("qkv", stream.normed, layer.qkv, qkv, squares=stream.squares)
            self._attend(qkv, own_keys, own_values, cos, sin, slots, padding, parts, mixed)
            stream = self._products.add("out", mixed, layer.out, stream.x, layer.norm2)
            self._products.linear("gate_up", stream.normed, layer.gate_up, hidden, squares=stream.squares, gated=True)
            stream = self._products.add("down", hidden, layer.down, stream.x, following)
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

    def _parts(self, batch: int, count: int, slots: int) -> Parts:
        """Where attention leaves what it finds in parts of so many slots."""
        pairs, parts, queries = (
            batch * self._groups,
            -(-slots // SEEN),
            padded(count * self._heads // self._groups),
        )
        device = self._embeddings.device
        return Parts(
            mixtures=torch.empty(pairs, parts, queries, self._width, device=device),
            weights=torch.empty(pairs, parts, 2, queries, device=device),
            ended=torch.zeros(pairs, dtype=torch.int32, device=device),
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
        parts: Parts,
        out: Tensor,
    ) -> None:
        (groups, length, width), count = keys.shape[1:], slots.shape[1]
        pairs, number, queries, _ = parts.mixtures.shape
        kernels.attention[(pairs, number)](
            qkv,
            keys,
            values,
            cos,
            sin,
            slots,
            padding,
            parts.mixtures,
            parts.weights,
            parts.ended,
            out,
            width**-0.5,
            HEADS=self._heads,
            GROUPS=groups,
            WIDTH=width,
            SLOTS=length,
            COUNT=count,
            QUERIES=queries,
            NEW=padded(count),
            PART=SEEN,
            PARTS=number,
            MOST_PARTS=padded(number),
            num_warps=4 if queries <= FEW else 8,
            **chaining(self.plan.chained),
        )
