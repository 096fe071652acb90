"""The generalist network: two vision towers, a projector, a Llama. Parameter names are OpenVLA's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from robodual.generalist.config import GeneralistConfig, LanguageConfig
from robodual.generalist.vision import VisionBackbone


class Projector(nn.Module):
    def __init__(self, vision_width: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_width, 4 * vision_width)
        self.fc2 = nn.Linear(4 * vision_width, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:  # [B, P, V] -> [B, P, D]
        out: Tensor = self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))
        return out


class Generalist(nn.Module):
    def __init__(self, config: GeneralistConfig, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.vision_backbone = VisionBackbone(config.towers)
        self.projector = Projector(sum(tower.width for tower in config.towers), config.language.width)
        self.language_model = LlamaForCausalLM(llama_config(config.language, attention))

    @property
    def device(self) -> torch.device:
        return self.projector.fc1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.projector.fc1.weight.dtype

    def embed(self, pixels: Tensor, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Input of the Llama for a batch of frames and prompts.

        pixels: [B, 6, S, S]; prompts: B vectors of token ids, BOS first. Returns embeddings [B, T, D] and a mask
        [B, T] that is True where they count: the P image tokens of a frame follow its BOS, and rows shorter than the
        longest are padded on the left.
        """
        images = self.projector(self.vision_backbone(pixels))  # [B, P, D]
        lookup = self.language_model.get_input_embeddings()
        rows = []
        for image, prompt in zip(images, prompts):
            words = lookup(prompt)
            rows.append(torch.cat([words[:1], image, words[1:]]))
        ones = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows]
        return (
            pad_sequence(rows, batch_first=True, padding_side="left"),
            pad_sequence(ones, batch_first=True, padding_side="left"),
        )


def llama_config(config: LanguageConfig, attention: str) -> LlamaConfig:
    llama = LlamaConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_value_heads,
        max_position_embeddings=config.positions,
        rms_norm_eps=config.rms_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        tie_word_embeddings=False,
    )
    llama._attn_implementation = attention
    return llama
