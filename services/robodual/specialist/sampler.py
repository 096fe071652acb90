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
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robodual.specialist import ddim
from robodual.specialist.config import ACTION, CHUNK, SpecialistConfig
from robodual.specialist.denoiser import Block, CrossAttentionBlock, Denoiser
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


class Prepared(NamedTuple):
    modulation: Tensor  # [T, B * G, parts, D], of all steps
    base: Tensor  # [B, 8, D], the reference actions, embedded


class Sampler:
    """Denoises chunks for a batch of requests.

    The tables are made once, from a denoiser in its final device and dtype, and do not follow later changes of it.
    """

    def __init__(self, denoiser: Denoiser, config: SpecialistConfig) -> None:
        self.width, self.heads = config.width, config.heads
        self.guidance_scale = config.guidance_scale
        self.steps = ddim.schedule(config.diffusion_steps)
        blocks = [block for block in denoiser.blocks if isinstance(block, Block)]
        rows = CHUNK if config.guidance_scale == 1 else 2 * CHUNK
        self.blocks = [_fold(block, rows) for block in blocks]
        weight = denoiser.x_embedder.weight
        self.embed_reference = Linear(weight[:, :ACTION], denoiser.x_embedder.bias)
        self.embed_actions = Linear(weight[:, ACTION:])
        final = denoiser.final_layer
        self.out = Linear.of(final.linear, rows=rows)
        self.context = _fold_context(blocks, denoiser.sensor_latents)
        sequences = [*(block.adaLN_modulation for block in blocks), final.adaLN_modulation]
        layers = [cast(nn.Linear, sequence[1]) for sequence in sequences]
        self.modulation = Linear(  # to (6 * blocks + 2) * D
            torch.cat([layer.weight for layer in layers]),
            torch.cat([layer.bias for layer in layers]),
            rows=len(self.steps),
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
        return self.denoise(noise, self.prepare(reference, conditioning), keys_values, mask)

    def prepare(self, reference: Tensor, conditioning: Tensor) -> Prepared:
        """What denoising takes of all that is not the context."""
        return Prepared(self.modulations(conditioning), self.embed_reference(reference))

    def denoise(self, noise: Tensor, prepared: Prepared, keys_values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Denoises; the other arguments and the result are those of a call."""
        batch, width, heads = len(noise), self.width, self.heads
        modulation = prepared.modulation.unsqueeze(3)  # [T, B * G, parts, 1, D]
        passes = modulation.shape[1] // batch
        split = keys_values.view(batch, -1, len(self.blocks), 2, heads, width // heads)
        context = split.permute(2, 3, 0, 4, 1, 5).contiguous()  # [blocks, 2, B, heads, S, D / heads]
        pairs = [pair.unbind(0) for pair in context.unbind(0)]  # keys and values [B, heads, S, D / heads] of each block
        visible = None if mask is None else mask[:, None, None]  # [B, 1, 1, S]
        base = prepared.base

        x = noise
        for step, table in zip(self.steps, modulation.unbind(0)):
            parts = table.unbind(1)  # each [B * G, 1, D]
            h = self.embed_actions.add(base, x).repeat_interleave(passes, dim=0)  # [B * G, 8, D]
            for index, block in enumerate(self.blocks):
                h = self._block(block, h, parts[PARTS * index : PARTS * (index + 1)], pairs[index], visible)
            shift, scale = parts[-2:]
            h = torch.addcmul(shift, F.layer_norm(h, (width,), eps=1e-6), scale)
            eps = self.out(h)  # [B * G, 8, 7]
            if passes == 2:
                free, guide = eps.view(batch, 2, CHUNK, ACTION).unbind(1)
                eps = free + self.guidance_scale * (guide - free)
            x = step.apply(x, eps)
        return x

    def _block(
        self,
        block: BlockTables,
        x: Tensor,
        parts: tuple[Tensor, ...],
        context: tuple[Tensor, ...],
        mask: Tensor | None,
    ) -> Tensor:
        # x: [B * G, 8, D], parts: [B * G, 1, D] each, context: keys and values [B, heads, S, D / heads]
        width, heads, rotated = self.width, self.heads, block.cos.shape[-1]
        rows = x.shape[0]
        key, value = context
        shift1, scale1, gate1, shift2, scale2, gate2 = parts

        h = torch.addcmul(shift1, F.layer_norm(x, (width,), eps=1e-6), scale1)
        qkv, turned = block.qkv(h).split_with_sizes((3 * width, 2 * heads * rotated), dim=-1)
        qkv = qkv.view(rows, CHUNK, 3, heads, -1)
        head = qkv[:, :, :2, :, :rotated]
        head.mul_(block.cos).addcmul_(turned.view(rows, CHUNK, 2, heads, rotated), block.sin)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, CHUNK, width)
        x = torch.addcmul(x, gate1, block.self_out(mixed))

        x = F.layer_norm(x, (width,), block.norm_weight, block.norm_bias)
        q = block.query(x).view(key.shape[0], -1, heads, width // heads).transpose(1, 2)  # [B, heads, G * 8, D / heads]
        mixed = F.scaled_dot_product_attention(q, key, value, attn_mask=mask).transpose(1, 2)
        x = block.cross_out.add(x, mixed.reshape(rows, CHUNK, width))

        h = torch.addcmul(shift2, F.layer_norm(x, (width,), eps=1e-6), scale2)
        return torch.addcmul(x, gate2, block.fc2(block.fc1(h)))

    def modulations(self, conditioning: Tensor) -> Tensor:
        """Conditioning vectors [B, D] to all steps' modulation [T, B * G, parts, D], the free pass before the other."""
        modulation = self._modulation(conditioning[:, None] + self.timesteps).transpose(0, 1)[:, :, None]
        if self.guidance_scale != 1:  # [T, B, G, parts, D]
            free = self.free_modulation.expand(-1, len(conditioning), -1, -1, -1)
            modulation = torch.cat((free, modulation), dim=2)
        return modulation.flatten(1, 2)

    def _modulation(self, conditioning: Tensor) -> Tensor:
        """[..., D] to [..., parts, D], with 1 added to the scales."""
        flat = F.silu(conditioning).reshape(-1, self.width)
        parts: Tensor = self.modulation(flat).view(*conditioning.shape[:-1], -1, self.width)
        parts[..., 1::3, :] += 1  # of the blocks; the final layer's scale is the last part, also at 1 modulo 3
        return parts


def _fold(block: Block, rows: int) -> BlockTables:
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
    norm_bias, query_bias, cross_out = fold_cross(cross)
    qkv_weight = torch.cat((weight, turned_weight.flatten(0, 2)))
    return BlockTables(
        qkv=Linear(qkv_weight, torch.cat((bias, turned_bias.flatten())), rows=rows),
        cos=angles.cos(),
        sin=angles.sin(),
        self_out=Linear.of(self_attention.proj, rows=rows),
        norm_weight=cross.layer_norm_v.weight,
        norm_bias=norm_bias,
        query=Linear(cross.attn.v_proj.weight, query_bias, rows=rows),
        cross_out=Linear(cross_out, rows=rows),
        fc1=Linear.of(block.mlp.fc1, gelu="tanh", rows=rows),
        fc2=Linear.of(block.mlp.fc2, rows=rows),
    )


def fold_cross(cross: CrossAttentionBlock) -> tuple[Tensor, Tensor, Tensor]:
    """The norm's bias [D], the queries' bias [D] and the output's weight [D, D], with gamma and the output's bias."""
    # v + gamma * (Wo m + bo) = (v + gamma * bo) + (gamma * Wo) m, with the constant moved into the norm's bias, whence
    # the query must lose it again.
    out, query = cross.attn.out_v_proj, cross.attn.v_proj
    constant = cross.gamma_v * out.bias
    return cross.layer_norm_v.bias + constant, query.bias - query.weight @ constant, cross.gamma_v[:, None] * out.weight


def _fold_context(blocks: list[Block], rows: int) -> Linear:
    """From the context, normed but not scaled, to all blocks' keys and values, blocks * 2 * D."""
    weights, biases = [], []
    for block in blocks:
        norm, attention = block.cross_attn.layer_norm_l, block.cross_attn.attn
        for layer in (attention.l_proj, attention.values_l_proj):
            weights.append(layer.weight * norm.weight)
            biases.append(layer.bias + layer.weight @ norm.bias)
    return Linear(torch.cat(weights), torch.cat(biases), rows=rows)
