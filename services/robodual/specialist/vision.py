"""The colour encoder: DINO ViT-S/16, with the parameter names of timm's `vit_small_patch16_224.dino`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robodual.specialist.config import SpecialistConfig
from robodual.vit import EPSILON, Block, PatchEmbedding


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
        self.blocks = nn.ModuleList(Block(width, config.vision_heads, 4 * width) for _ in range(config.vision_blocks))
        self.norm = nn.LayerNorm(width, eps=EPSILON)

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
