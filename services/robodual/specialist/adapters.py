"""Encoder tokens to a few latents of the denoiser's width: a resampler for colour, attention pooling for depth."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResamplerAttention(nn.Module):
    """Latents look at the frame and at themselves (Flamingo, arXiv 2204.14198, section 2.1)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        # media: [B, N, D], latents: [B, K, D]
        latents = self.norm_latents(latents)
        seen = torch.cat((self.norm_media(media), latents), dim=1)
        q = self.to_q(latents).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(seen).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Resampler(nn.Module):
    """Colour tokens to latents, each frame on its own; a frame's place says how old it is (0: the current one)."""

    def __init__(self, *, vision_width: int, width: int, heads: int, latents: int, frames: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(latents, width))
        self.media_pos_emb = nn.Parameter(torch.zeros(frames, 1, vision_width))
        self.proj = nn.Linear(vision_width, width)
        feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )
        self.layers = nn.ModuleList([nn.ModuleList([ResamplerAttention(width, heads), feed_forward])])
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, frames, N, vision width] to [B, frames, latents, width]."""
        batch, frames = tokens.shape[:2]
        media = self.proj(tokens + self.media_pos_emb[:frames]).flatten(0, 1)  # [B * frames, N, D]
        latents = self.latents.expand(len(media), -1, -1)
        attention, feed_forward = cast(nn.ModuleList, self.layers[0])
        latents = attention(media, latents) + latents
        latents = feed_forward(latents) + latents
        out: Tensor = self.norm(latents).unflatten(0, (batch, frames))
        return out


class RMSNorm(nn.Module):
    """x / max(|x| / sqrt(width), 1e-8) * g."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        out: Tensor = x / norm.clamp(min=1e-8) * self.g
        return out


class SwishGLU(nn.Module):
    """a * SiLU(b), where a and b are halves of one projection."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.project(x).chunk(2, dim=-1)
        out: Tensor = a * F.silu(b)
        return out


class PoolingAttention(nn.Module):
    """Latents look at the tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        # latents: [B, K, D], tokens: [B, N, D]
        q = self.q(latents).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Pooling(nn.Module):
    """Depth or tactile tokens to latents, post-norm (Set Transformer's pooling as in Voltron's and Prismatic's MAP)."""

    def __init__(self, *, token_width: int, width: int, heads: int, latents: int) -> None:
        super().__init__()
        self.projection = nn.Linear(token_width, width)
        self.latents = nn.Parameter(torch.zeros(latents, width))
        self.attn_norm = RMSNorm(width)
        self.attn = PoolingAttention(width, heads)
        self.mlp_norm = RMSNorm(width)
        self.mlp = nn.Sequential(SwishGLU(width, 4 * width), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, token width] to [B, latents, width]."""
        latents = self.latents.expand(len(tokens), -1, -1)
        latents = self.attn_norm(latents + self.attn(latents, self.projection(tokens)))
        out: Tensor = self.mlp_norm(latents + self.mlp(latents))
        return out
