"""The encoder of depth maps and of tactile images: a ViT with the parameter names of lucidrains' vit-pytorch layout."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Patches(nn.Module):
    """Images [B, C, H, W] cut into flattened patches [B, patches, patch * patch * C], the channel fastest."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        size = self.patch_size
        batch, channels, height, width = images.shape
        tiles = images.reshape(batch, channels, height // size, size, width // size, size)
        return tiles.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, size * size * channels)


class Attention(nn.Module):
    """Pre-norm self-attention whose heads need not add up to the width; no bias on queries, keys and values."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_width, width))

    def forward(self, x: Tensor) -> Tensor:
        # x: [B, N, D]
        q, k, v = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """LayerNorm, Linear, exact GELU, Linear; the published dropout of zero keeps its place in the numbering."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Transformer(nn.Module):
    """Blocks of attention and feed-forward, then a final norm."""

    def __init__(self, width: int, blocks: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.ModuleList((Attention(width, heads, head_width), FeedForward(width))) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            attention, feed_forward = cast(nn.ModuleList, layer)
            x = attention(x) + x
            x = feed_forward(x) + x
        out: Tensor = self.norm(x)
        return out


class PlainViT(nn.Module):
    """A ViT with a norm before and after the patch projection, and tokens out instead of a class.

    Because of the norm before it, a constant added to a whole patch hardly changes the tokens.
    """

    def __init__(
        self, *, image_size: int, patch_size: int, channels: int, width: int, blocks: int, heads: int, head_width: int
    ) -> None:
        super().__init__()
        patch_width = channels * patch_size**2
        self.to_patch_embedding = nn.Sequential(
            Patches(patch_size), nn.LayerNorm(patch_width), nn.Linear(patch_width, width), nn.LayerNorm(width)
        )
        self.pos_embedding = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2 + 1, width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.transformer = Transformer(width, blocks, heads, head_width)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, S, S] to tokens [B, 1 + patches, D]: the class token first, after the final norm."""
        out: Tensor = self.transformer(self.embed(images))
        return out

    def embed(self, images: Tensor) -> Tensor:
        """The blocks' input, [B, 1 + patches, D]."""
        patches = self.to_patch_embedding(images)
        return torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1) + self.pos_embedding


def resize(images: Tensor, size: int) -> Tensor:
    """[B, C, H, W] to [B, C, size, size], bilinear and antialiased: what torchvision's Resize does to tensors."""
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
