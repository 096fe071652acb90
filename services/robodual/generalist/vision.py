"""The vision towers: ViTs with the parameter names of timm 0.9.16, as published checkpoints spell them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robodual.generalist.config import TowerConfig
from robodual.vit import EPSILON, Block, FeedForward, PatchEmbedding


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
        self.patch_embed = PatchEmbedding(config.width, config.patch)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_width, layer_scale=config.layer_scale)
            for _ in range(config.depth)
        )
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
