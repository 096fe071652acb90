"""The colour encoder: DINO ViT-S/16, with the parameter names of timm's `vit_small_patch16_224.dino`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robodual.specialist.config import SpecialistConfig


class Attention(nn.Module):
    """Multi-head self-attention with one biased projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # x: [B, N, D]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, N, D / heads]
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbedding(nn.Module):
    """Non-overlapping patches through one convolution."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return out


class VisionEncoder(nn.Module):
    """Images to tokens; frozen in the published training.

    Raises:
        RuntimeError: from torch, if the images are not of the configured size.
    """

    def __init__(self, config: SpecialistConfig) -> None:
        super().__init__()
        width = config.vision_width
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.patch_embed = PatchEmbedding(width, config.patch_size)
        self.blocks = nn.ModuleList(Block(width, config.vision_heads) for _ in range(config.vision_blocks))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] to tokens [B, 1 + patches, D]: the class token first, after the final norm."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def embed(self, images: Tensor) -> Tensor:
        """The blocks' input, [B, 1 + patches, D]."""
        patches = self.patch_embed(images)
        return torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1) + self.pos_embed
