"""The vision towers: ViTs with the parameter names of timm 0.9.16, as published checkpoints spell them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robodual.generalist.config import TowerConfig

EPSILON = 1e-6


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, W] -> [B, N, W]
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, W / H] each
        attended = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        return out


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    """Published checkpoints call the parameter `scale_factor`; in timm it is `gamma`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class Block(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=EPSILON)
        self.attn = Attention(config.width, config.heads)
        self.ls1 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width, eps=EPSILON)
        self.mlp = FeedForward(config.width, config.mlp_width)
        self.ls2 = LayerScale(config.width) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class PatchEmbedding(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, kernel_size=config.patch, stride=config.patch)

    def forward(self, pixels: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, P, W], row by row
        patches: Tensor = self.proj(pixels).flatten(2).transpose(1, 2)
        return patches


class AttentionPool(nn.Module):
    """Holds the parameters of SigLIP's pooling head, which checkpoints carry and the features never pass through."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, config.width))
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=EPSILON)
        self.mlp = FeedForward(config.width, config.mlp_width)


class VisionTransformer(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        positions = config.patches + (config.prefix_tokens if config.prefix_positions else 0)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, config.width)) if config.registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, config.width))
        self.patch_embed = PatchEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=EPSILON)
        self.attn_pool = AttentionPool(config) if config.attention_pool else None

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S], normalised -> the second-to-last block's patch features [B, P, W].

        No final norm, no class token, no registers; the last block is never run (OpenVLA,
        prismatic/extern/hf/modeling_prismatic.py).
        """
        x = self.patch_embed(pixels)
        if not self.config.prefix_positions:
            x = x + self.pos_embed
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), x], dim=1)
        if self.config.prefix_positions:
            x = x + self.pos_embed
        for block in self.blocks[:-1]:
            x = block(x)
        features: Tensor = x[:, self.config.prefix_tokens :]
        return features


class VisionBackbone(nn.Module):
    def __init__(self, towers: tuple[TowerConfig, TowerConfig]) -> None:
        super().__init__()
        self.featurizer = VisionTransformer(towers[0])
        self.fused_featurizer = VisionTransformer(towers[1])

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 6, S, S], three channels as each tower wants them -> features side by side [B, P, W1 + W2]."""
        return torch.cat([self.featurizer(pixels[:, :3]), self.fused_featurizer(pixels[:, 3:])], dim=2)
