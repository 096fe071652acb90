"""Weights before the first step, of a specialist and of a generalist that starts from nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

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
def whiten(policy: Policy, proprio: Tensor, means: Tensor) -> None:
    """Makes a fresh specialist's two inputs to its conditioning vector vary by about 1, by its own first layers.

    The published start takes metres and the mean of some hundred hidden states as they are: what tells one step from
    another is then a small part of the vector, which 100,000 steps find and a few thousand do not.

    Args:
        proprio: [N, 7], of the data
        means: [N, context width], each the mean of one conditioning's hidden states
    """

    def absorb(layer: nn.Linear, values: Tensor, gain: float) -> None:
        deviation = values.std(dim=0).clamp(min=1e-2 * float(values.std()))
        layer.weight.copy_(gain * layer.weight / deviation)
        layer.bias.sub_(layer.weight @ values.mean(dim=0))

    model = policy.model
    first = _linear(model.proprio_embedder[0])
    # Xavier's start is for inputs as many as outputs.
    absorb(first, proprio, (sum(first.weight.shape) / (2 * first.in_features)) ** 0.5)
    absorb(model.context_adapter, means, (sum(model.context_adapter.weight.shape) / (2 * means.shape[1])) ** 0.5)


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
