"""The generalist network: two vision towers, a projector, a Llama. Parameter names are OpenVLA's."""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from robodual.generalist.config import GeneralistConfig, LanguageConfig
from robodual.generalist.vision import VisionBackbone

BLOCK = 1_000_003  # a prime
# Transformers 5.24 renamed the argument.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


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

    def see(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 6, S, S] -> the P image tokens of each frame, embedded, [B, P, D]."""
        images: Tensor = self.projector(self.vision_backbone(pixels))
        return images

    def embed(self, images: Tensor, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Input of the Llama for a batch of frames and prompts.

        images: what `see` gives; prompts: B vectors of token ids, BOS first. Returns embeddings [B, T, D] and a mask
        [B, T] that is True where they count: a frame's tokens follow its BOS, and rows shorter than the longest are
        padded on the left.
        """
        lookup = self.language_model.get_input_embeddings()
        if len({len(prompt) for prompt in prompts}) == 1:
            words = lookup(torch.stack(list(prompts)))
            embeddings = torch.cat([words[:, :1], images, words[:, 1:]], dim=1)
            return embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        rows = []
        for image, prompt in zip(images, prompts):
            words = lookup(prompt)
            rows.append(torch.cat([words[:1], image, words[1:]]))
        ones = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows]
        return (
            pad_sequence(rows, batch_first=True, padding_side="left"),
            pad_sequence(ones, batch_first=True, padding_side="left"),
        )

    def read(self, embeddings: Tensor, positions: Tensor, mask: Tensor | None, cache: DynamicCache) -> Tensor:
        """One pass of the Llama over N more tokens: their last hidden states [B, N, D], after the final norm.

        embeddings: [B, N, D]; positions: int64 [B, N]; mask: bool [B, all so far], False where a row is padded, or None
        where none is, with which attention takes its fastest kernel; cache: the keys and values, to which it adds.
        """
        output = self.language_model.model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{CACHE: cache},
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


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


def build(config: GeneralistConfig, *, attention: str, dtype: torch.dtype) -> Generalist:
    """A generalist in evaluation mode whose parameters are on the meta device: names and shapes, no memory.

    The rotary frequencies, which no checkpoint holds, stay in float32 whatever `dtype` is, as in the published model.
    """
    with torch.device("meta"):
        model = Generalist(config, attention).to(dtype).eval()
    return model.requires_grad_(False)


def place_rotary(model: Generalist, device: torch.device) -> None:
    """Computes the rotary frequencies on the device, once the parameters are there."""
    llama = model.language_model.model
    with device:
        llama.rotary_emb = LlamaRotaryEmbedding(llama.config)


def randomise(model: Generalist, device: torch.device, seed: int) -> None:
    """Puts random parameters on the device: the same for a seed on every machine.

    Each follows from (seed, name): normal values by NumPy's PCG64, scaled so that activations stay of order one.
    Large ones repeat a block of a prime length, so that 7 B values take seconds and no two rows are alike.
    """
    model.to_empty(device=device)
    place_rotary(model, device)
    for name, parameter in model.named_parameters():
        generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + (seed << 32)))
        block = torch.from_numpy(generator.standard_normal(min(parameter.numel(), BLOCK), dtype=np.float32))
        leaf = name.rsplit(".", 1)[-1]
        if parameter.dim() == 1:
            block = 0.1 * block + (0.0 if leaf == "bias" else 0.5 if leaf == "scale_factor" else 1.0)
        elif leaf in ("cls_token", "reg_token", "pos_embed", "latent"):
            block = 0.5 * block
        elif "embed_tokens" in name:
            block = 0.05 * block  # small, so that what attention gathers from the frame and the words decides
        else:
            block = (1.6 if "_proj" in name else 0.8) * block / math.sqrt(parameter[0].numel())
        block = block.to(device, parameter.dtype)
        values = parameter.data.view(-1)
        for start in range(0, len(values), BLOCK):
            piece = values[start : start + BLOCK]
            piece.copy_(block[: len(piece)])
