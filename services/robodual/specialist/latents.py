"""The adapters as the engine runs them: their queries are weights, so a third of the published arithmetic is left.

An attention head scores a row r by q . (Wk r) = (q Wk) . r, where q Wk is known beforehand, and sums Wo Wv r over the
rows, which is Wo Wv times the sum of rows. So neither keys nor values are ever made: rows are scored and summed as they
are, and only the few sums are multiplied.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robodual.specialist.adapters import Pooling, Resampler, ResamplerAttention
from robodual.specialist.packing import Linear


class _Attention:
    """Attention of fixed queries, from rows [B, N, D] to [B, K, out].

    Args:
        query: after its projection [K, heads * C]
        key: weight [heads * C, D]; its bias would change no softmax
        value: weight [heads * C, D]
        out: weight [out, heads * C]
        bias: [out] of the output, or None
    """

    def __init__(self, heads: int, query: Tensor, key: Tensor, value: Tensor, out: Tensor, bias: Tensor | None) -> None:
        self._heads, dtype = heads, query.dtype
        q = query.double().view(len(query), heads, -1)
        k = key.double().view(heads, -1, key.shape[1])
        v = value.double().view(heads, -1, value.shape[1])
        o = out.double().view(len(out), heads, -1)
        scores = torch.einsum("khc,hcd->hkd", q, k) * q.shape[-1] ** -0.5
        self._scores = scores.flatten(0, 1).to(dtype)  # [heads * K, D]
        self._out = Linear(torch.einsum("ohc,hcd->ohd", o, v).flatten(1).to(dtype), bias)  # from heads * D

    def __call__(self, rows: Tensor) -> Tensor:
        weights = torch.matmul(self._scores, rows.transpose(1, 2)).softmax(dim=-1)  # [B, heads * K, N]
        sums = torch.matmul(weights, rows)  # [B, heads * K, D]
        by_query = sums.view(len(rows), self._heads, -1, rows.shape[-1]).transpose(1, 2)
        return self._out(by_query.flatten(2))


class ColourLatents:
    """Computes what a `Resampler` computes, to rounding, of one frame in each of its places."""

    def __init__(self, module: Resampler) -> None:
        layer = cast(nn.ModuleList, module.layers[0])
        attention = cast(ResamplerAttention, layer[0])
        norm, fc1, _, fc2 = cast(nn.Sequential, layer[1])
        self._project = Linear(module.proj.weight)
        self._places = F.linear(module.media_pos_emb, module.proj.weight, module.proj.bias)  # [places, 1, D]
        self._norm_media = attention.norm_media
        self._latents = module.latents
        self._own = attention.norm_latents(module.latents)  # [K, D]: the latents' rows among those they look at
        key, value = attention.to_kv.weight.chunk(2)
        query = attention.to_q(self._own)
        self._attend = _Attention(attention.heads, query, key, value, attention.to_out.weight, None)
        self._norm_feed = cast(nn.LayerNorm, norm)
        self._fc1 = Linear.of(cast(nn.Linear, fc1), gelu="none")
        self._fc2 = Linear.of(cast(nn.Linear, fc2))
        self._norm = module.norm

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens of frames [B, N, vision width] to latents [B, places, K, D]."""
        media = self._project(tokens)[:, None] + self._places  # [B, places, N, D]
        batch, places = media.shape[:2]
        seen = self._norm_media(media.flatten(0, 1))
        rows = torch.cat((seen, self._own.expand(len(seen), -1, -1)), dim=1)
        latents = self._latents + self._attend(rows)
        latents = self._fc2.add(latents, self._fc1(self._norm_feed(latents)))
        out: Tensor = self._norm(latents).view(batch, places, -1, latents.shape[-1])
        return out


class MapLatents:
    """Computes what a `Pooling` computes, to rounding."""

    def __init__(self, module: Pooling) -> None:
        attention, first = module.attn, module.projection
        key, value = attention.kv.weight.chunk(2)
        # The projection before keys and values is folded into them; of its bias, only the values' part is left.
        bias = attention.proj.bias + attention.proj.weight @ (value @ first.bias)
        self._attend = _Attention(
            attention.heads,
            attention.q(module.latents),
            key @ first.weight,
            value @ first.weight,
            attention.proj.weight,
            bias,
        )
        self._latents = module.latents
        self._attn_norm, self._mlp_norm, self._mlp = module.attn_norm, module.mlp_norm, module.mlp

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens of maps [B, N, token width] to latents [B, K, D]."""
        latents = self._attn_norm(self._latents + self._attend(tokens))
        out: Tensor = self._mlp_norm(latents + self._mlp(latents))
        return out
