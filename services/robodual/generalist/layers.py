"""The Llama's layers over a static cache, by PyTorch's operations: prompts, and new tokens where no kernel is fused.

The linear layers are the model's own, whatever they have become (quantised, adapted); norms and rotation are its
formulas in fewer kernels, whose number is what a captured pass of a small batch costs beside its weights.

Tensor names: B sequences, T tokens of a prompt, N new tokens, D the width, H heads of width W, K key-value heads, M
slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from robodual.generalist.model import Generalist

Rotation = tuple[Tensor, Tensor]  # cosines, and sines with the sign of the first half, [B, T, 1, W]


def read(model: Generalist, x: Tensor, positions: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor) -> Tensor:
    """Prompts x [B, T, D] through all layers and the final norm; their keys and values go to the first T slots.

    positions: int64 [B, T]; mask: bool [B, T], False where a row is padded in front, or None where none is, with which
    attention takes its fastest kernel; keys, values: [layers, B, K, M, W].
    """
    rotation = _rotation(model.language_model.model.rotary_emb(x, positions))
    seen = None if mask is None else visible(mask)
    for layer, own_keys, own_values in zip(_layers(model), keys, values):
        queries, new_keys, new_values = _projected(layer, normed(layer.input_layernorm, x), rotation, keys.shape[2])
        own_keys[:, :, : x.shape[1]] = new_keys
        own_values[:, :, : x.shape[1]] = new_values
        grouped = queries.shape[1] > new_keys.shape[1]
        mixed = F.scaled_dot_product_attention(
            queries, new_keys, new_values, attn_mask=seen, is_causal=seen is None, enable_gqa=grouped
        )
        x = _after(layer, x, mixed)
    return normed(model.language_model.model.norm, x)


def visible(mask: Tensor) -> Tensor:
    """Which tokens of prompts each sees, bool [B, 1, T, T], of a mask [B, T] that is False where a row is padded."""
    every = torch.arange(mask.shape[1], device=mask.device)
    # Padding sees itself, so that nothing is divided by zero.
    return (every <= every[:, None]) & (mask[:, None, None] | (every == every[:, None]))


def step(
    model: Generalist,
    x: Tensor,
    angles: tuple[Tensor, Tensor],
    slots: Tensor,
    padding: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """New tokens x [B, N, D] through all layers, before the final norm.

    angles: the rotation's cosines and sines [B, N, W]; slots: int64 [B, N], where the tokens' keys and values go;
    padding: int64 [B, 1], slots in front that do not count; keys, values: [layers, B, K, M, W].
    """
    batch, count, _ = x.shape
    groups, every = keys.shape[2], torch.arange(keys.shape[3], device=x.device)
    rotation = _rotation(angles)
    unseen = (every > slots.unsqueeze(2)) | (every < padding.unsqueeze(2))  # [B, N, M]
    bias = torch.zeros(unseen.shape, dtype=x.dtype, device=x.device).masked_fill_(unseen, -math.inf).unsqueeze(1)
    # Heads of a group share keys and values (arXiv 2305.13245): to these they are more queries.
    group = model.config.language.heads // groups
    if group > 1:
        bias = bias.repeat(1, 1, group, 1)  # [B, 1, heads of a group * N, M]
    where = slots[:, None, :, None].expand(-1, groups, -1, keys.shape[4])
    for layer, own_keys, own_values in zip(_layers(model), keys, values):
        queries, new_keys, new_values = _projected(layer, normed(layer.input_layernorm, x), rotation, groups)
        own_keys.scatter_(2, where, new_keys)
        own_values.scatter_(2, where, new_values)
        queries = queries.reshape(batch, groups, group * count, -1)
        mixed = F.scaled_dot_product_attention(queries, own_keys, own_values, attn_mask=bias)
        x = _after(layer, x, mixed.reshape(batch, group * groups, count, -1))
    return x


def normed(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
    """Llama's norm, as one operation: it rounds after it scales, where Transformers' rounds before too."""
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _layers(model: Generalist) -> Sequence[LlamaDecoderLayer]:
    return cast(Sequence[LlamaDecoderLayer], model.language_model.model.layers)


def _rotation(angles: tuple[Tensor, Tensor]) -> Rotation:
    cos, sin = angles
    half = cos.shape[-1] // 2
    return cos.unsqueeze(2), torch.cat((-sin[..., :half], sin[..., half:]), dim=-1).unsqueeze(2)


def _projected(layer: LlamaDecoderLayer, x: Tensor, rotation: Rotation, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, T, W], keys and values [B, K, T, W] of x [B, T, D], rotated."""
    attention, (batch, count, _), (cos, sin) = layer.self_attn, x.shape, rotation
    width = cos.shape[-1]
    # [B, T, H + K, W]
    together = torch.cat((attention.q_proj(x), attention.k_proj(x)), dim=-1).view(batch, count, -1, width)
    # Rotary position embedding (arXiv 2104.09864): the halves change places, and the sine has the sign of the first.
    together = together * cos + together.roll(width // 2, dims=-1) * sin
    own = attention.v_proj(x).view(batch, count, groups, width).transpose(1, 2)
    queries, keys = together.transpose(1, 2).split_with_sizes((together.shape[2] - groups, groups), dim=1)
    return queries, keys, own


def _after(layer: LlamaDecoderLayer, x: Tensor, mixed: Tensor) -> Tensor:
    """The rest of a layer after its attention's mixture [B, H, T, W]."""
    x = x + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
    out: Tensor = x + layer.mlp(normed(layer.post_attention_layernorm, x))
    return out
