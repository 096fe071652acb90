"""Weights before the first step, of a specialist and of a generalist that starts from nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from robodual.facts import CheckpointError
from robodual.generalist.model import Generalist
from robodual.specialist.adapters import Pooling, Resampler
from robodual.specialist.config import SpecialistConfig
from robodual.specialist.denoiser import Block
from robodual.specialist.depth import PlainViT
from robodual.specialist.policy import Policy


@torch.no_grad()
def starting_policy(config: SpecialistConfig, seed: int, vision: Path | None = None) -> Policy:
    """Seeded weights as the published training starts from (prismatic/models/policy/diffusion_transformer.py).

    The denoiser's modulation and its output layer are zero, so that it starts as the identity. The colour encoder is
    DINO's where `vision` is given, and otherwise initialised as timm does.

    vision: safetensors of timm's `vit_small_patch16_224.dino`

    Raises:
        CheckpointError: if the file is not that.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = Policy(config)
        _colour_encoder(policy)
        for encoder in policy.modules():
            if isinstance(encoder, PlainViT):
                nn.init.normal_(encoder.pos_embedding)
                nn.init.normal_(encoder.cls_token)
        _denoiser(policy)
    if vision is not None:
        _load_vision(policy, vision)
    return policy


@torch.no_grad()
def start_generalist(model: Generalist, seed: int) -> None:
    """Seeded weights to train a small generalist from: normal with deviation 0.02 (Llama's), biases 0, scales 1.

    The published generalist starts from OpenVLA's weights instead.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "bias":
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1)
        else:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def _colour_encoder(policy: Policy) -> None:
    encoder = policy.vision_encoder
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(encoder.pos_embed, std=0.02)
    nn.init.normal_(encoder.cls_token, std=1e-6)


def _denoiser(policy: Policy) -> None:
    model = policy.model
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Resampler):
            nn.init.normal_(module.latents)
            nn.init.normal_(module.media_pos_emb)
        elif isinstance(module, Pooling):
            nn.init.normal_(module.latents, std=0.02)
    nn.init.normal_(_linear(model.t_embedder.mlp[0]).weight, std=0.02)
    nn.init.normal_(_linear(model.t_embedder.mlp[2]).weight, std=0.02)
    modulations = [_linear(block.adaLN_modulation[-1]) for block in model.blocks if isinstance(block, Block)]
    for layer in (*modulations, _linear(model.final_layer.adaLN_modulation[-1]), model.final_layer.linear):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def _linear(module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise TypeError(f"expected a linear layer, got {type(module).__name__}")
    return module


def _load_vision(policy: Policy, path: Path) -> None:
    try:
        state = load_file(path)
        policy.vision_encoder.load_state_dict(state)
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: not the weights of timm's vit_small_patch16_224.dino as safetensors ({reason})"
        ) from None
