"""The denoising loop with everything in tables that does not depend on the noisy actions.

It computes what `Policy.sample` computes, to rounding, in about twenty operations a block:

- The conditioned and the free pass of classifier-free guidance are one batch, over the same keys and values.
- Keys and values of all blocks come from one product: the norm before them is the same but for its scale and shift,
  which are folded into the weights.
- Timesteps are known, so the modulation of every block at every step is one product a request, and for the free pass,
  whose conditioning vector is zero, a constant.
- The rotation of queries and keys is two elementwise operations: the quarter-turned channels come out of the same
  product as the channels themselves.
- gamma and the bias of cross-attention's output are folded into the weights around them.

Tensor names: B requests, G passes (2 with guidance), D the width, S the context's length, T denoising steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robodual.specialist import ddim
from robodual.specialist.config import ACTION, CHUNK, SpecialistConfig
from robodual.specialist.denoiser import Block, Denoiser
from robodual.specialist.packing import Linear

PARTS = 6  # shift, scale and gate, twice a block


@dataclass(frozen=True)
class BlockTables:
    """One block's weights, folded."""

    qkv: Linear  # queries, keys, values, and the quarter-turned channels of queries and keys
    cos: Tensor  # of the rotation, [8, 1, 1, rotated channels of a head]
    sin: Tensor
    self_out: Linear
    norm_weight: Tensor
    norm_bias: Tensor
    query: Linear
    cross_out: Linear
    fc1: Linear  # with its GELU
    fc2: Linear


class Sampler:
    """Denoises chunks for a batch of requests.

    The tables are made once, from a denoiser in its final device and dtype, and do not follow later changes of it.
    """

    def __init__(self, denoiser: Denoiser, config: SpecialistConfig) -> None:
        self.width, self.heads = config.width, config.heads
        self.guidance_scale = config.guidance_scale
        self.steps = ddim.schedule(config.diffusion_steps)
        blocks = [block for block in denoiser.blocks if isinstance(block, Block)]
        self.blocks = [_fold(block) for block in blocks]
        weight = denoiser.x_embedder.weight
        self.dtype = weight.dtype
        self.embed_reference = Linear(weight[:, :ACTION], denoiser.x_embedder.bias)
        self.embed_actions = weight[:, ACTION:].t().contiguous()
        final = denoiser.final_layer
        self.out = Linear.of(final.linear)
        self.context = _fold_context(blocks)
        sequences = [*(block.adaLN_modulation for block in blocks), final.adaLN_modulation]
        layers = [cast(nn.Linear, sequence[1]) for sequence in sequences]
        self.modulation = Linear(  # to (6 * blocks + 2) * D
            torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        )
        timesteps = torch.tensor([step.timestep for step in self.steps], device=weight.device)
        self.timesteps = denoiser.t_embedder(timesteps)  # [T, D]
        self.free_modulation = self._modulation(self.timesteps)[:, None, None]  # [T, 1, 1, parts, D]

    def keys_values(self, tokens: Tensor) -> Tensor:
        """Context tokens [..., D] to all blocks' keys and values [..., blocks * 2 * D]."""
        return self.context(F.layer_norm(tokens, (self.width,)))

    def __call__(
        self, noise: Tensor, reference: Tensor, conditioning: Tensor, keys_values: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Denoises.

        Args:
            noise: starting sample, float32 [B, 8, 7]
            reference: reference actions [B, 8, 7]
            conditioning: the conditioning vector without its timestep [B, D]
            keys_values: of the context [B, S, blocks * 2 * D]
            mask: bool [B, S], True where the context is no padding; None where there is none

        Returns:
            Actions, float32 [B, 8, 7].
        """
        batch, width, heads = len(noise), self.width, self.heads
        guided = self.guidance_scale != 1
        modulation = self._modulation(conditioning[:, None] + self.timesteps).transpose(0, 1)[:, :, None]
        if guided:  # [T, B, G, parts, D]: the free pass is the first
            modulation = torch.cat((self.free_modulation.expand(-1, batch, -1, -1, -1), modulation), dim=2)
        split = keys_values.view(batch, -1, len(self.blocks), 2, heads, width // heads)
        context = split.permute(2, 3, 0, 4, 1, 5).contiguous()  # [blocks, 2, B, heads, S, D / heads]
        visible = None if mask is None else mask[:, None, None]  # [B, 1, 1, S]
        base = self.embed_reference(reference.reshape(-1, ACTION))  # [B * 8, D]

        x = noise
        for step, table in zip(self.steps, modulation):
            parts = table[:, :, :, None].unbind(2)  # each [B, G, 1, D]
            actions = x.reshape(-1, ACTION).to(self.dtype)
            h = torch.addmm(base, actions, self.embed_actions).view(batch, 1, CHUNK, width)
            for index, block in enumerate(self.blocks):
                key, value = context[index].unbind(0)
                h = self._block(block, h, parts[PARTS * index : PARTS * (index + 1)], key, value, visible)
            shift, scale = parts[-2:]
            h = torch.addcmul(shift, F.layer_norm(h, (width,), eps=1e-6), scale)
            eps = self.out(h.view(-1, width)).view(batch, -1, CHUNK, ACTION).float()
            if guided:
                free, guide = eps.unbind(1)
                eps = free + self.guidance_scale * (guide - free)
            else:
                eps = eps[:, 0]
            x = step.apply(x, eps)
        return x

    def _block(
        self, block: BlockTables, x: Tensor, parts: tuple[Tensor, ...], key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        # x: [B, G or 1, 8, D], parts: [B, G, 1, D] each, key and value: [B, heads, S, D / heads]
        width, heads, rotated = self.width, self.heads, block.cos.shape[-1]
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        h = torch.addcmul(shift1, F.layer_norm(x, (width,), eps=1e-6), scale1)
        batch, passes = h.shape[:2]
        rows = (batch * passes, CHUNK)
        qkv = block.qkv(h.view(-1, width))
        qk, v, turned = qkv.split_with_sizes((2 * width, width, 2 * heads * rotated), dim=-1)
        qk = qk.view(*rows, 2, heads, -1)
        qk[..., :rotated].mul_(block.cos).addcmul_(turned.view(*rows, 2, heads, rotated), block.sin)
        q, k = qk.permute(2, 0, 3, 1, 4).unbind(0)
        v = v.view(*rows, heads, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, width)
        x = torch.addcmul(x, gate1, block.self_out(mixed).view(batch, passes, CHUNK, width))

        x = F.layer_norm(x, (width,), block.norm_weight, block.norm_bias).view(-1, width)
        q = block.query(x).view(batch, passes * CHUNK, heads, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, key, value, attn_mask=mask).transpose(1, 2).reshape(-1, width)
        x = block.cross_out.add(x, mixed).view(batch, passes, CHUNK, width)

        h = torch.addcmul(shift2, F.layer_norm(x, (width,), eps=1e-6), scale2)
        h = block.fc2(block.fc1(h.view(-1, width))).view(batch, passes, CHUNK, width)
        return torch.addcmul(x, gate2, h)

    def _modulation(self, conditioning: Tensor) -> Tensor:
        """[..., D] to [..., parts, D], with 1 added to the scales."""
        flat = F.silu(conditioning).reshape(-1, self.width)
        parts: Tensor = self.modulation(flat).view(*conditioning.shape[:-1], -1, self.width)
        parts[..., 1::3, :] += 1  # of the blocks; the final layer's scale is the last part, also at 1 modulo 3
        return parts


def _fold(block: Block) -> BlockTables:
    self_attention, cross = block.attn_temporal, block.cross_attn
    heads = self_attention.heads
    weight, bias = self_attention.qkv.weight, self_attention.qkv.bias
    width = weight.shape[1]
    # A quarter turn of each pair (a, b) is (-b, a).
    angles = self_attention.rotary_emb.table(CHUNK).repeat_interleave(2, dim=-1)[:, None, None].to(weight.dtype)
    rotated = angles.shape[-1]
    partner = torch.arange(rotated, device=weight.device).view(-1, 2).flip(1).flatten()
    sign = torch.tensor([-1.0, 1.0], device=weight.device, dtype=weight.dtype).repeat(rotated // 2)
    turned_weight = weight[: 2 * width].view(2, heads, -1, width)[:, :, partner] * sign[:, None]
    turned_bias = bias[: 2 * width].view(2, heads, -1)[:, :, partner] * sign

    # v + gamma * (Wo m + bo) = (v + gamma * bo) + (gamma * Wo) m, with the constant moved into the norm's bias, whence
    # the query must lose it again.
    out, query = cross.attn.out_v_proj, cross.attn.v_proj
    constant = cross.gamma_v * out.bias
    return BlockTables(
        qkv=Linear(torch.cat((weight, turned_weight.flatten(0, 2))), torch.cat((bias, turned_bias.flatten()))),
        cos=angles.cos(),
        sin=angles.sin(),
        self_out=Linear.of(self_attention.proj),
        norm_weight=cross.layer_norm_v.weight,
        norm_bias=cross.layer_norm_v.bias + constant,
        query=Linear(query.weight, query.bias - query.weight @ constant),
        cross_out=Linear(cross.gamma_v[:, None] * out.weight),
        fc1=Linear.of(block.mlp.fc1, gelu="tanh"),
        fc2=Linear.of(block.mlp.fc2),
    )


def _fold_context(blocks: list[Block]) -> Linear:
    """From the context, normed but not scaled, to all blocks' keys and values, blocks * 2 * D."""
    weights, biases = [], []
    for block in blocks:
        norm, attention = block.cross_attn.layer_norm_l, block.cross_attn.attn
        for layer in (attention.l_proj, attention.values_l_proj):
            weights.append(layer.weight * norm.weight)
            biases.append(layer.bias + layer.weight @ norm.bias)
    return Linear(torch.cat(weights), torch.cat(biases))
